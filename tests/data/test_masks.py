"""Masks: COCO's run-length encodings as pycocotools reads them."""

import numpy as np
import pytest
from pycocotools import mask as peer

from kdjax.data import masks


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
