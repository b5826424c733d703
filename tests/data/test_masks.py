"""Masks: COCO's run-length encodings as pycocotools reads them."""

import pickle

import numpy as np
import pytest
from pycocotools import mask as peer

from kdjax.data import masks
from kdjax.errors import UserError


def some_masks(seed: int) -> np.ndarray:
    """Masks u8[n, h, w]: blobs, stripes, noise, full, one pixel."""
    rng = np.random.default_rng(seed)
    h, w = rng.integers(3, 90, 2)
    y, x = np.mgrid[:h, :w] / np.array([h, w])[:, None, None]
    blob = (y - 0.5) ** 2 + (x - 0.4) ** 2 < rng.uniform(0.02, 0.2)
    point = (np.arange(h * w) == rng.integers(h * w)).reshape(h, w)
    full, striped = np.ones((h, w)), np.indices((h, w))[0] % 3 == 1
    return np.stack([blob, striped, rng.random((h, w)) < 0.3, full, point]).astype(np.uint8)


@pytest.mark.parametrize("seed", range(5))
def test_runs_and_boxes_equal_pycocotools(seed):
    for mask in some_masks(seed):
        if not mask.any():
            continue
        rle = peer.encode(np.asfortranarray(mask))
        text = {"size": rle["size"], "counts": rle["counts"].decode()}
        runs = masks.runs(text)
        assert runs is not None
        drawn = np.repeat(np.arange(len(runs)) % 2, runs).reshape(mask.shape[::-1]).T
        np.testing.assert_array_equal(drawn, mask)
        listed = {"size": rle["size"], "counts": runs.tolist()}
        for form in (text, listed):
            assert masks.usable(form, mask.shape) == (form, "")
            assert masks.box(form) == peer.toBbox(rle).tolist()


@pytest.mark.parametrize("text", ["", "x", "0x", "é", "1 2", "oooooooooooo0", "\x00", "N5"])
def test_text_that_is_no_rle_is_refused(text):
    kept, reason = masks.usable({"size": [2, 2], "counts": text}, (2, 2))
    assert kept is None and reason.startswith("counts of the RLE")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
def test_shapes_are_drawn_as_pycocotools_draws_them(seed):
    rng = np.random.default_rng(seed)
    rings = [rng.uniform(-10, 90, (int(rng.integers(3, 9)), 2)).round(2).ravel().tolist() for _ in range(3)]
    bitmaps = some_masks(seed)
    rles = [peer.encode(np.asfortranarray(mask)) for mask in bitmaps]
    cases = [([ring], (70, 80)) for ring in rings] + [(rings, (70, 80)), ([[5, 5, 5, 5, 5, 5]], (70, 80))]
    cases += [({**rle, "counts": rle["counts"].decode()}, tuple(rle["size"])) for rle in rles if peer.area(rle)]
    for segmentation, size in cases:
        shape = masks.shape(segmentation, size)
        whole = np.zeros(size, np.uint8)
        (x, y), (h, w) = shape.corner, shape.size
        whole[y : y + h, x : x + w] = shape.decoded()
        is_list = isinstance(segmentation, list)
        rle = peer.merge(peer.frPyObjects(segmentation, *size)) if is_list else segmentation
        np.testing.assert_array_equal(whole, peer.decode(rle))
        assert not whole.any() or [x, y, w, h] == peer.toBbox(rle).tolist()


def test_a_store_gives_masks_by_id_and_notices_damage(tmp_path):
    polygon, listed = [[4, 5, 20, 5.5, 20, 30]], {"size": [40, 50], "counts": [20, 980, 1000]}
    unusable = {"size": [50, 40], "counts": [20, 980, 1000]}
    rows = [(7, polygon, 0), (2**40, listed, 0), (3, [], 0), (4, unusable, 0), (5, listed, 1)]
    truth = {
        "images": [{"id": 1, "height": 40, "width": 50}],
        "annotations": [dict(id=i, image_id=1, segmentation=one, iscrowd=crowd) for i, one, crowd in rows],
    }
    masks.write(tmp_path, truth)
    store = pickle.loads(pickle.dumps(masks.Store(tmp_path).checked()))
    assert len(store) == 2
    first, second = masks.shape(polygon, (40, 50)), masks.shape(listed, (40, 50))
    assert store([2**40, 3, 4, 5, 7, 2**41, 0]) == [second, None, None, None, first, None, None]
    (tmp_path / "counts.npy").write_bytes((tmp_path / "counts.npy").read_bytes()[:-1] + b"#")
    with pytest.raises(UserError, match=r"counts\.npy: prepared data is damaged"):
        store.checked()
