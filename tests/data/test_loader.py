"""Batches: a function of the seed and the step, for any number of shards and after interruptions."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from kdjax import data
from kdjax.data import build, transforms
from kdjax.errors import UserError
from tests.support.data import COLOURS, coco_json, paint, settings, small_folder, write_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    return settings(folder / "cache", root=small_folder(folder / "set", count=11), image_size=(48, 64))


@pytest.fixture(scope="module")
def dataset(cfg):
    return data.open_dataset(cfg)


def train(dataset, cfg, count, **options):
    """The first `count` batches."""
    batches = data.train_batches(dataset, cfg, **{"batch_size": 4, "seed": 7} | options)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def varied(cfg, **augment):
    """The config with other settings of `augment`."""
    copy = cfg.copy_and_resolve_references()
    copy.augment.update(augment)
    return copy


def plain(cfg):
    """The config without random augmentation: only the resize."""
    return varied(cfg, flip=0.0, scale=(1.0, 1.0), hsv=(0.0, 0.0, 0.0))


MIXED = dict(mosaic=True, mixup=0.7, cache=5)


def test_shapes_and_types(dataset, cfg):
    [batch] = train(dataset, cfg, 1)
    kinds = {name: (array.shape, array.dtype.name) for name, array in batch.items()}
    assert kinds == {
        "image": ((4, 48, 64, 3), "uint8"),
        "boxes": ((4, 8, 4), "float32"),
        "labels": ((4, 8), "int32"),
        "valid": ((4, 8), "bool"),
        "image_size": ((4, 2), "int32"),
    }
    [*_, last] = data.eval_batches(dataset, "val", cfg, batch_size=2)
    extra = {name: (array.shape, array.dtype.name) for name, array in last.items() if name not in batch}
    assert extra == {
        "image_id": ((2,), "int64"),
        "original_size": ((2, 2), "int32"),
        "real": ((2,), "bool"),
    }


def test_invalid_rows_are_zero_and_the_padding_is_grey(dataset, cfg):
    for batch in train(dataset, cfg, 6):
        assert not batch["boxes"][~batch["valid"]].any() and not batch["labels"][~batch["valid"]].any()
        for row, (height, width) in enumerate(batch["image_size"]):
            boxes = batch["boxes"][row][batch["valid"][row]]
            assert (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()
            assert (boxes[:, 2:] - boxes[:, :2] >= transforms.MIN_SIZE).all()
            assert (batch["image"][row, height:] == 114).all() and (batch["image"][row, :, width:] == 114).all()


def test_an_epoch_is_every_image_once_in_a_new_order(dataset, cfg):
    # 11 images in batches of 4: epochs end inside batches.
    order = [tuple(size) for batch in train(dataset, plain(cfg), 11) for size in batch["image_size"]]
    sizes = {transforms.fitted((40 + i, 60 - i), (48, 64))[1] for i in range(11)}
    assert len(sizes) == 11, "the size tells the images apart"
    epochs = [order[start : start + 11] for start in range(0, 44, 11)]
    assert all(set(epoch) == sizes for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("augment", [{}, MIXED], ids=["single", "mixed"])
def test_batches_depend_on_the_seed_and_the_step_only(dataset, cfg, augment):
    cfg = varied(cfg, **augment)
    whole = train(dataset, cfg, 9)
    same(whole, train(dataset, cfg, 9))
    for start in (1, 5):
        same(whole[start:], train(dataset, cfg, 9 - start, start_step=start))
    others = train(dataset, cfg, 9, seed=8)
    assert not any(np.array_equal(a["image"], b["image"]) for a in whole for b in others)
    # An image is augmented differently each time.
    assert len({row.tobytes() for batch in whole for row in batch["image"]}) > 30


@pytest.mark.parametrize(("count", "augment"), [(2, {}), (4, {}), (2, MIXED), (4, MIXED)])
def test_shards_join_to_the_whole_batch(dataset, cfg, count, augment):
    cfg = varied(cfg, **augment)
    whole = train(dataset, cfg, 4, batch_size=8)
    parts = [train(dataset, cfg, 4, batch_size=8, shard=(index, count)) for index in range(count)]
    joined = [{key: np.concatenate([p[key] for p in step]) for key in step[0]} for step in zip(*parts, strict=True)]
    same(whole, joined)


@pytest.mark.parametrize("augment", [{}, MIXED], ids=["single", "mixed"])
def test_keeping_images_in_memory_changes_nothing(dataset, cfg, augment):
    first, decoded = [], []
    for images in (11, 4, 0):  # that fit the budget
        part = varied(cfg, **augment)
        part.keep = images * 50 * 50 * 3 / 2**30  # about the size of an image
        batches = data.train_batches(dataset, part, batch_size=4, seed=7)
        taken = [next(batches) for _ in range(9)]
        batches.close()
        first = first or taken
        same(first, taken)
        decoded.append(batches.decoded)
    # Two threads may decode an image at once; a Mosaic keeps its tiles besides.
    assert 11 <= decoded[0] <= 20 and (augment or decoded[0] < decoded[1] < decoded[2] == 36)


def test_images_are_shrunk_with_their_objects(dataset, cfg):
    whole, small = build.Images(dataset.splits["train"]), build.Images(dataset.splits["train"], keep=1.0, longest=30)
    for index in range(11):
        for _ in range(2):  # decoded, then kept
            now, before = small[index], whole[index]
            sides = np.array(before["image"].shape[:2])
            assert max(now["image"].shape) == 30 and abs(now["image"].shape[:2] / sides - 30 / sides.max()).max() < 0.02
            ratio = (now["image"].shape[:2] / sides)[[1, 0, 1, 0]]
            np.testing.assert_allclose(now["boxes"], before["boxes"] * ratio, rtol=1e-5)
            assert not now["image"].flags.writeable
    small.close()


# Mosaic, MixUp and the second stage


def test_mixup_is_the_mean_with_an_earlier_image_of_the_stream(cfg):
    rows, cache = (0, 4, 8, 10), 6  # streams of batches of 10: rows 0-3, 4-7, 8-9
    cfg = varied(cfg, mosaic=True, mixup=0.7, cache=cache)
    cfg.max_boxes = 64
    dataset = data.open_dataset(cfg)
    alone = train(dataset, varied(cfg, mixup=0.0), 8, batch_size=10)
    mixed = train(dataset, cfg, 8, batch_size=10)
    share, turned, back = [], [], []
    for step in range(1, 8):
        for row in range(10):
            at = {key: mixed[step][key][row] for key in mixed[step]}
            own = {key: alone[step][key][row] for key in alone[step]}
            if np.array_equal(at["image"], own["image"]):
                np.testing.assert_array_equal(at["boxes"], own["boxes"])
                share.append(0)
                continue
            # Try all images that may be mixed in; a dark one can look like another.
            first, end = next((a, b) for a, b in itertools.pairwise(rows) if a <= row < b)
            stream = [(s, r) for s in range(8) for r in range(first, end)]
            place = stream.index((step, row))
            found = []
            for age, (s, r) in enumerate(stream[max(0, place - cache // 2) : place][::-1], start=1):
                for mirrored in (False, True):
                    other, valid = {key: alone[s][key][r] for key in alone[s]}, alone[s]["valid"][r]
                    image = other["image"][:, ::-1] if mirrored else other["image"]
                    boxes = other["boxes"][valid]
                    boxes = (boxes * [-1, 1, -1, 1] + [64, 0, 64, 0])[:, [2, 1, 0, 3]] if mirrored else boxes
                    boxes = np.concatenate([own["boxes"][own["valid"]], boxes])
                    labels = np.concatenate([own["labels"][own["valid"]], other["labels"][valid]])
                    if (
                        np.abs((own["image"].astype(float) + image) / 2 - at["image"]).max() <= 0.5
                        and np.array_equal(at["labels"][at["valid"]], labels)
                        and np.allclose(at["boxes"][at["valid"]], boxes, atol=1e-4)
                    ):
                        found.append((age, mirrored))
            assert found
            if len(found) == 1:
                back.append(found[0][0])
                turned.append(found[0][1])
            share.append(1)
            assert at["image_size"].tolist() == [48, 64]
    assert 0.5 < np.mean(share) < 0.9 and 0.2 < np.mean(turned) < 0.8 and set(back) == {1, 2, 3}


def test_boxes_of_a_mosaic_match_the_pixels(dataset, cfg):
    colours = {0: (COLOURS[0], COLOURS[2]), 1: (COLOURS[1],)}  # of the labels
    mosaic = varied(cfg, mosaic=True, mixup=0.0, cache=8, hsv=(0.0, 0.0, 0.0), scale=(0.3, 2.0))
    checked = 0
    for batch in train(dataset, mosaic, 10):
        for row in range(4):
            for box, label in zip(batch["boxes"][row], batch["labels"][row], strict=True):
                if box[2] - box[0] >= 3 and box[3] - box[1] >= 3:
                    x0, y0, x1, y1 = np.rint(box).astype(int)
                    inside = batch["image"][row, y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].astype(int)
                    assert any(np.abs(inside - c).max() < 130 for c in colours[int(label)]), (box, label)
                    checked += 1
    assert checked > 60


def test_a_mosaic_decodes_one_image_per_sample(tmp_path):
    cfg = settings(tmp_path, source="scenes", scenes_train=150, image_size=(64, 64), keep=0.0)
    cfg.augment.update(mosaic=True, mixup=1.0, cache=8)
    dataset = data.open_dataset(cfg)
    assert dataset.max_boxes > 20  # more than any image has
    for start, most in ((0, 1.0), (40, 1.2)):
        batches = data.train_batches(dataset, cfg, batch_size=8, seed=0, start_step=start)
        valid = [next(batches)["valid"].sum(-1) for _ in range(36)]
        assert 0.6 * 8 * 36 < batches.decoded <= most * 8 * 36
        batches.close()
        assert (np.concatenate(valid) == dataset.max_boxes).mean() < 0.02
    cfg.augment.update(mosaic=False, mixup=0.0)
    batches = data.train_batches(data.open_dataset(cfg), cfg, batch_size=8, seed=0)
    shapes = {next(batches)["boxes"].shape for _ in range(5)}
    assert batches.decoded == 40 and shapes == {(8, 8, 4)}
    batches.close()


def test_the_step_decides_the_stage(dataset, cfg):
    first, second = varied(cfg, **MIXED), varied(cfg, scale=(0.1, 2.0))
    both = varied(cfg, **MIXED)
    both.stage2.update(dict(start=4, augment=second.augment))
    expected = [*train(dataset, first, 4), *train(dataset, second, 3, start_step=4)]
    same(expected, train(dataset, both, 7))
    for start in (3, 4, 5):
        same(expected[start:], train(dataset, both, 7 - start, start_step=start))
    whole = settings(Path(cfg.cache), root=cfg.root, stage2=both.stage2, augment=MIXED)
    opened, later = data.open_dataset(whole), data.open_dataset(varied(whole, mosaic=False, mixup=0.0))
    assert opened.max_boxes > later.max_boxes == 8
    shapes = [{name: (a.shape, a.dtype) for name, a in batch.items()} for batch in train(opened, whole, 6)]
    assert all(one == shapes[0] for one in shapes)


def test_evaluation_shows_every_image_once_in_order(dataset, cfg):
    truth = data.ground_truth(dataset, "train")
    batches = list(data.eval_batches(dataset, "train", cfg, batch_size=4))
    assert len(batches) == 3
    joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    real = joined["real"]
    assert real.tolist() == [True] * 11 + [False]
    assert joined["image_id"][real].tolist() == [image["id"] for image in truth["images"]]
    assert joined["original_size"][real].tolist() == [[i["height"], i["width"]] for i in truth["images"]]
    for row in range(11):
        _, size = transforms.fitted(tuple(joined["original_size"][row]), (48, 64))
        assert tuple(joined["image_size"][row]) == size
        own = [a for a in truth["annotations"] if a["image_id"] == joined["image_id"][row]]
        ratio = (joined["image_size"][row] / joined["original_size"][row])[[1, 0, 1, 0]]
        boxes = np.reshape([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)], (-1, 4)) * ratio
        valid = joined["valid"][row]
        np.testing.assert_allclose(joined["boxes"][row][valid], boxes, rtol=1e-5)
        ids = [dataset.category_ids[label] for label in joined["labels"][row][valid]]
        assert ids == [a["category_id"] for a in own]
    assert not joined["valid"][11].any() and (joined["image"][11] == 114).all() and joined["image_id"][11] == -1


def test_evaluation_of_the_first_images(dataset, cfg):
    batches = list(data.eval_batches(dataset, "train", cfg, batch_size=4, limit=5))
    ids = np.concatenate([batch["image_id"][batch["real"]] for batch in batches])
    assert ids.tolist() == [image["id"] for image in data.ground_truth(dataset, "train", limit=5)["images"]]


def test_hosts_share_the_images_of_an_evaluation(dataset, cfg):
    """Successive batches, so that all of them in the order of the hosts are those of one; a host may have none."""
    whole = data.eval_batches(dataset, "train", cfg, batch_size=4, limit=9)
    shares = [data.eval_batches(dataset, "train", cfg, batch_size=4, limit=9, shard=(host, 4)) for host in range(4)]
    shares = [[batch["image_id"].tolist() for batch in share] for share in shares]
    assert [len(share) for share in shares] == [1, 1, 1, 0]
    assert [ids for share in shares for ids in share] == [batch["image_id"].tolist() for batch in whole]


def test_evaluation_may_round_sizes_down(dataset, cfg):
    batches = list(data.eval_batches(dataset, "train", cfg, batch_size=11, fit="down"))
    originals, sizes = (batches[0][name] for name in ("original_size", "image_size"))
    exact = originals * np.min([48, 64] / originals, axis=1, keepdims=True)
    np.testing.assert_array_equal(sizes, np.floor(exact + 1e-6))
    assert (exact - sizes).max() > 0.5  # rounded, it would be one more
    for row, (height, width) in enumerate(sizes):
        assert (batches[0]["image"][row, height:] == 114).all() and (batches[0]["image"][row, :, width:] == 114).all()


def test_evaluation_may_fill_the_canvas(dataset, cfg):
    fitted, filled = (
        next(data.eval_batches(dataset, "train", cfg, batch_size=11, fit=fit)) for fit in ("round", "stretch")
    )
    assert (filled["image_size"] == [48, 64]).all() and (fitted["image_size"] != [48, 64]).any()
    ratio = (filled["image_size"] / fitted["image_size"])[:, None, [1, 0, 1, 0]]
    np.testing.assert_allclose(filled["boxes"], fitted["boxes"] * ratio, rtol=1e-5)


def test_training_of_a_detector_that_is_evaluated_so_fills_the_canvas(dataset, cfg):
    [fitted], [filled] = (train(dataset, plain(cfg), 1, batch_size=11, fit=fit) for fit in ("round", "stretch"))
    assert (filled["image_size"] == [48, 64]).all() and (fitted["image_size"] != [48, 64]).any()
    ratio = (filled["image_size"] / fitted["image_size"])[:, None, [1, 0, 1, 0]]
    np.testing.assert_allclose(filled["boxes"], fitted["boxes"] * ratio, rtol=1e-5)


def test_the_largest_of_too_many_boxes_are_kept(tmp_path):
    boxes = [(2, 2, 5, 5), (10, 2, 40, 30), (2, 10, 8, 30), (2, 35, 40, 47)]
    truth = coco_json({"a.png": (48, 64)}, [(0, 3, [x, y, p - x, q - y], {}) for x, y, p, q in boxes])
    root = write_folder(tmp_path / "set", {"train": truth, "val": truth}, {"a.png": paint(48, 64, boxes)})
    cfg = plain(settings(tmp_path / "cache", root=root, max_boxes=2, image_size=(48, 64)))
    dataset = data.open_dataset(cfg)
    assert dataset.max_boxes == 2
    [batch] = train(dataset, cfg, 1, batch_size=1)
    np.testing.assert_array_equal(batch["boxes"][0], [boxes[1], boxes[3]])
    assert "train: 2 left out: box over max_boxes=2 of an image, the smallest first" in data.summary(dataset, cfg)


# Masks


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    root = small_folder(folder / "set", count=11, masks=True)
    return settings(folder / "cache", root=root, image_size=(48, 64), masks=True)


@pytest.mark.parametrize("augment", [{}, MIXED], ids=["single", "mixed"])
def test_batches_with_masks_are_those_without_and_masks(masked, augment):
    cfg = varied(masked, **augment)
    dataset = data.open_dataset(cfg)
    some = train(dataset, cfg, 6)
    plain = cfg.copy_and_resolve_references()
    plain.masks = False
    same(
        [{key: batch[key] for key in batch if key != "masks"} for batch in some],
        train(data.open_dataset(plain), plain, 6),
    )
    same(some[2:], train(dataset, cfg, 4, start_step=2))
    parts = [train(dataset, cfg, 2, shard=(index, 2)) for index in range(2)]
    for first, second, whole in zip(*parts, some, strict=False):
        np.testing.assert_array_equal(np.concatenate([first["masks"], second["masks"]]), whole["masks"])
    for batch in some:
        assert batch["masks"].dtype == np.uint8 and batch["masks"].shape == (*batch["valid"].shape, 12, 16)
        assert not batch["masks"][~batch["valid"]].any()
    [last, *_] = data.eval_batches(dataset, "train", cfg, batch_size=2)
    assert "masks" not in last


@pytest.mark.parametrize("mosaic", [False, True])
def test_masks_lie_on_the_painted_pixels(masked, mosaic):
    """Every mask is a filled box: of each 4 x 4 pixels the share that is inside."""
    cfg = varied(masked, mosaic=mosaic, cache=5, hsv=(0.0, 0.0, 0.0))
    edges = [4.0 * np.arange(side // 4) for side in cfg.image_size]
    seen = 0
    for batch in train(data.open_dataset(cfg), cfg, 4):
        for image, boxes, valid, masks in zip(*(batch[k] for k in ("image", "boxes", "valid", "masks")), strict=True):
            for (x0, y0, x1, y1), mask in zip(boxes[valid], masks[valid], strict=True):
                down, across = (
                    np.clip(np.minimum(edge + 4, high) - np.maximum(edge, low), 0, 4)
                    for edge, low, high in zip(edges, (y0, x0), (y1, x1), strict=True)
                )
                np.testing.assert_allclose(mask, np.outer(down, across) / 16 * 255, atol=0.6)
                bright = image.max(-1).reshape(12, 4, 16, 4).max((1, 3)) > 50
                assert bright[mask > 200].all()
                seen += 1
    assert seen > 15


@pytest.mark.user_input("COCO json", "`data.masks` with some objects without a mask", "counted: they are left out")
@pytest.mark.user_input("COCO json", "`data.masks` with no mask at all", "refused: no object of the split has a mask")
def test_objects_without_masks_are_left_out_and_counted(tmp_path):
    boxes = [(2, 2, 15, 15), (20, 2, 40, 30), (2, 20, 18, 44)]
    polygon = [[20, 2, 40, 2, 40, 30, 20, 30]]
    truth = coco_json({"a.png": (48, 64)}, [(0, 3, [x, y, p - x, q - y], {}) for x, y, p, q in boxes])
    truth["annotations"][1]["segmentation"] = polygon
    root = write_folder(tmp_path / "set", {"train": truth, "val": truth}, {"a.png": paint(48, 64, boxes)})
    cfg = plain(settings(tmp_path / "cache", root=root, image_size=(48, 64), masks=True))
    dataset = data.open_dataset(cfg)
    [batch] = train(dataset, cfg, 1, batch_size=1)
    np.testing.assert_array_equal(batch["boxes"][0, batch["valid"][0]], [boxes[1]])
    text = data.summary(dataset, cfg)
    assert (
        "train: 2 left out: object without mask, as masks=True needs" in text and "1 with masks and 2 without" in text
    )
    del truth["annotations"][1]["segmentation"]
    write_folder(tmp_path / "set", {"train": truth}, {})
    with pytest.raises(UserError, match="masks: no object of the split 'train' has a mask"):
        data.open_dataset(cfg)


def test_masks_of_too_many_boxes_are_those_of_the_largest(masked):
    cfg = plain(masked)
    cfg.max_boxes = 2
    for batch in train(data.open_dataset(cfg), cfg, 3):
        areas = (batch["boxes"][..., 2:] - batch["boxes"][..., :2]).prod(-1)
        np.testing.assert_allclose(batch["masks"].sum((2, 3)) / 255 * 16, areas, rtol=0.01)


@pytest.mark.user_input("Prepared data", "a prepared image that cannot be decoded", "refused with its name")
def test_an_image_that_cannot_be_decoded_is_named(cfg, tmp_path):
    other = settings(tmp_path / "cache", root=cfg.root, image_size=(48, 64))
    fresh = data.open_dataset(other)
    reader = fresh.splits["train"].records
    raw = reader.raw(0)
    object.__setattr__(reader, "raw", lambda index: raw | {"image": b"spoilt"})
    with pytest.raises(data.Damaged, match=r"image p0.png cannot be decoded"):
        reader[0]


@pytest.mark.user_input(
    "Config and flags",
    "a batch size that the hosts cannot share, a negative seed",
    "refused: must be a positive multiple of the 2 shards",
)
def test_batch_sizes_and_seeds_out_of_range_are_refused(dataset, cfg):
    for options, words in [
        (dict(batch_size=3, seed=0, shard=(0, 2)), "batch_size must be a positive multiple of the 2 shards, not 3"),
        (dict(batch_size=4, seed=-1), "seed must be at least 0, not -1"),
    ]:
        with pytest.raises(UserError, match=words):
            data.train_batches(dataset, cfg, **options)
    with pytest.raises(UserError, match="batch_size must be at least 1, not 0"):
        data.eval_batches(dataset, "val", cfg, batch_size=0)


@pytest.mark.user_input(
    "Config and flags", "an evaluation batch larger than the split", "read: filled up with empty rows"
)
def test_an_evaluation_batch_may_be_larger_than_the_split(dataset, cfg):
    [batch] = data.eval_batches(dataset, "val", cfg, batch_size=8)
    assert batch["real"].tolist() == [True] * 3 + [False] * 5
    assert (batch["image_id"][3:] == -1).all() and not batch["valid"][3:].any()


@pytest.mark.parametrize("augment", [{}, MIXED])
def test_a_view_is_the_same_row_for_every_seed_batch_size_and_worker(dataset, cfg, augment):
    """`attach` gets the entries, and the given entries alone make the same rows."""
    cfg = varied(cfg, **augment)
    cfg.views = 2
    noted = dict(attach=lambda entries: entries)

    def rows(batches):
        return [
            (entry, {key: value[i] for key, value in batch.items() if key != "teacher"})
            for batch in batches
            for i, entry in enumerate(batch["teacher"].tolist())
        ]

    first = rows(train(dataset, cfg, 11, **noted))  # four epochs of 11 images
    assert sorted(entry for entry, _ in first[:22]) == list(range(22))
    assert sorted(entry for entry, _ in first[22:]) == list(range(22)), "the views come again"
    known = dict(first)
    assert any((known[i]["image"] != known[i + 11]["image"]).any() for i in range(11)), "a view is a draw of its own"
    cfg.workers = 1
    others = rows(train(dataset, cfg, 2, **noted, seed=8, batch_size=6, start_step=1))
    assert [entry for entry, _ in others] != [entry for entry, _ in first[6:18]]
    given = data.entry_batches(dataset, cfg, [range(3), range(20, 22)], batch_size=4, rows=3, seed=1)
    made = [
        {**batch, "teacher": entries} for batch, entries in zip(given, np.array([[0, 1, 2], [20, 21, 21]]), strict=True)
    ]
    for entry, row in [*first, *others, *rows(made)]:
        for key, value in row.items():
            np.testing.assert_array_equal(value, known[entry][key], err_msg=key)


def test_the_entries_of_an_endless_stream_are_its_positions(dataset, cfg):
    cfg = varied(cfg, **MIXED)
    batch = train(dataset, cfg, 1, start_step=3, shard=(1, 2), batch_size=8, attach=lambda entries: entries)[0]
    assert batch["teacher"].tolist() == [28, 29, 30, 31]
    [again] = data.entry_batches(dataset, cfg, [batch["teacher"].tolist()], batch_size=8, rows=4, seed=7)
    del batch["teacher"]
    same([again], [batch])
