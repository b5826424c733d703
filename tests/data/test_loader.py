"""Batches: a function of (seed, step) alone, whatever the workers, shards and interruptions."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kdjax import data
from kdjax.data import build, plans, stages, transforms
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
    """The config without chance: the plain resize."""
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


def test_what_is_not_valid_is_zero_and_off_the_image_is_grey(dataset, cfg):
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
def test_batches_depend_on_the_seed_and_the_step_alone(dataset, cfg, augment):
    cfg = varied(cfg, **augment)
    whole = train(dataset, cfg, 9)
    same(whole, train(dataset, cfg, 9))
    for start in (1, 5):
        same(whole[start:], train(dataset, cfg, 9 - start, start_step=start))
    others = train(dataset, cfg, 9, seed=8)
    assert not any(np.array_equal(a["image"], b["image"]) for a in whole for b in others)
    # An image is augmented differently whenever it comes.
    assert len({row.tobytes() for batch in whole for row in batch["image"]}) > 30


@pytest.mark.parametrize("count, augment", [(2, {}), (4, {}), (2, MIXED), (4, MIXED)])
def test_shards_put_together_are_the_whole_batch(dataset, cfg, count, augment):
    cfg = varied(cfg, **augment)
    whole = train(dataset, cfg, 4, batch_size=8)
    parts = [train(dataset, cfg, 4, batch_size=8, shard=(index, count)) for index in range(count)]
    joined = [{key: np.concatenate([p[key] for p in step]) for key in step[0]} for step in zip(*parts, strict=True)]
    same(whole, joined)


def test_keeping_images_in_memory_changes_nothing(dataset, cfg, monkeypatch):
    kept = train(dataset, cfg, 8)
    monkeypatch.setattr(build, "KEEP_BYTES", 0)
    same(kept, train(dataset, cfg, 8))
    images = build.Images(dataset.splits["train"])
    assert images[3] is not images[3]


# Mosaic, MixUp and the second stage


def test_mixup_shows_the_mean_with_a_late_image_of_its_stream(cfg):
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
            # Whose image is in it? All that may be are tried; a dark one can look like another.
            first, end = next((a, b) for a, b in zip(rows, rows[1:], strict=False) if a <= row < b)
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


def test_partners_are_the_last_of_the_same_stream():
    cfg = settings("", augment=dict(mosaic=True, mixup=1.0, cache=7))
    [stage] = stages.read_stages(cfg)[0]
    planned = plans.TrainPlans(
        order=range(10**6), seed=3, batch=10, rows=range(10), stages=(stage,), starts=(0,)
    )  # the image is the position
    streams = [[10 * step + row for step in range(40) for row in rows] for rows in ([0, 1, 2, 3], [8, 9])]
    for stream in streams:
        ages = set()
        for row in (row for step in range(40) for row in planned[step]):
            if row.position not in stream:
                continue
            place = stream.index(row.position)
            assert row.images[0] == row.position and len(row.images) == 4
            allowed = stream[max(0, place - 7) : place] or [row.position]
            assert set(row.images[1:]) <= set(allowed)
            ages |= {place - stream.index(p) for p in row.images[1:]}
            partner = row.partner
            assert partner.position in (stream[max(0, place - 3) : place] or [row.position])
            before = planned[partner.position // 10][partner.position % 10]
            assert partner == before._replace(partner=None, mirrored=False)
            assert all(0.5 <= share <= 1.5 for share in row.centre)
        assert ages == {0, 1, 2, 3, 4, 5, 6, 7}  # 0 at the very beginning alone


def test_boxes_of_a_mosaic_lie_on_what_is_painted(dataset, cfg):
    colours = {0: (COLOURS[0], COLOURS[2]), 1: (COLOURS[1],)}  # of the labels
    mosaic = varied(cfg, mosaic=True, mixup=0.0, cache=8, hsv=(0.0, 0.0, 0.0), scale=(0.3, 2.0))
    seen = 0
    for batch in train(dataset, mosaic, 10):
        for row in range(4):
            for box, label in zip(batch["boxes"][row], batch["labels"][row], strict=True):
                if box[2] - box[0] >= 3 and box[3] - box[1] >= 3:
                    x0, y0, x1, y1 = np.rint(box).astype(int)
                    inside = batch["image"][row, y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].astype(int)
                    assert any(np.abs(inside - c).max() < 130 for c in colours[int(label)]), (box, label)
                    seen += 1
    assert seen > 60


def test_a_mosaic_needs_one_decoded_image_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "KEEP_BYTES", 0)
    cfg = settings(tmp_path, source="scenes", scenes_train=150, image_size=(64, 64))
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


def test_the_stage_is_decided_by_the_step(dataset, cfg):
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


def test_workers_and_a_clean_end(cfg):
    # In a process of its own: it shows the exit, and that nothing but Grain asks for jax.
    code = """
import hashlib, sys, warnings
warnings.simplefilter("error")
from ml_collections import ConfigDict
from kdjax import data

def main():
    cfg = ConfigDict(eval(sys.argv[1]))
    dataset = data.open_dataset(cfg)
    for mixed, workers in ((False, 0), (False, 1), (False, 2), (True, 0), (True, 2)):
        cfg.workers = workers
        cfg.augment.update(mosaic=mixed, mixup=0.7 * mixed, cache=5)
        batches = data.train_batches(dataset, cfg, batch_size=10, seed=7, start_step=2)
        seen = hashlib.sha256()
        for _ in range(5):
            for name, array in sorted(next(batches).items()):
                seen.update(name.encode() + array.tobytes())
        assert batches.decoded >= 11, batches.decoded
        batches.close()
        print(seen.hexdigest(), flush=True)
    for workers in (0, 1):
        cfg.workers = workers
        seen = hashlib.sha256()
        for batch in data.eval_batches(dataset, "val", cfg, batch_size=2):
            seen.update(batch["image"].tobytes() + batch["image_id"].tobytes())
        print(seen.hexdigest(), flush=True)
    print("tensorflow" in sys.modules)

if __name__ == "__main__":
    main()
"""
    script = Path(cfg.cache) / "run.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script), repr(cfg.to_dict())],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    *hashes, tensorflow = done.stdout.split()
    assert len(hashes) == 7 and tensorflow == "False"
    assert len(set(hashes[:3])) == len(set(hashes[3:5])) == len(set(hashes[5:])) == 1 and len(set(hashes)) == 3
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_workers_do_not_outlive_a_killed_trainer(cfg):
    code = """
import multiprocessing, sys
from kdjax import data

def main():
    cfg = eval(sys.argv[1]) | {"workers": 1}
    batches = data.train_batches(data.open_dataset(cfg), cfg, batch_size=4, seed=7)
    next(batches)
    [worker] = multiprocessing.active_children()
    print(worker.pid, flush=True)
    sys.stdin.read()

if __name__ == "__main__":
    main()
"""
    script = Path(cfg.cache) / "killed.py"
    script.write_text(code)
    command = [sys.executable, str(script), repr(cfg.to_dict())]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}) as trainer:
        worker = Path("/proc") / trainer.stdout.readline().decode().strip()
        assert worker.is_dir()
        trainer.kill()
    deadline = time.monotonic() + 20
    while worker.is_dir() and "(zombie)" not in (worker / "status").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert time.monotonic() < deadline


def test_workers_live_on_when_the_group_is_asked_to_stop(cfg):
    """So that a trainer that saves its state on SIGTERM or Ctrl-C still gets the batch that it waits for."""
    code = """
import os, signal, sys
from kdjax import data

def main():
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    cfg = eval(sys.argv[1]) | {"workers": 1}
    batches = data.train_batches(data.open_dataset(cfg), cfg, batch_size=4, seed=7)
    next(batches)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.killpg(0, number)
    for _ in range(10):  # more than are made ahead
        next(batches)
    batches.close()

if __name__ == "__main__":
    main()
"""
    script = Path(cfg.cache) / "stopped.py"
    script.write_text(code)
    command = [sys.executable, str(script), repr(cfg.to_dict())]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(ROOT)}, start_new_session=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_iterator_left_open_does_not_hold_up_the_end(cfg):
    code = """
import sys
from kdjax import data
cfg = eval(sys.argv[1])
next(data.train_batches(data.open_dataset(cfg), cfg, batch_size=4, seed=7))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, repr(cfg.to_dict())],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")


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
        mine = [a for a in truth["annotations"] if a["image_id"] == joined["image_id"][row]]
        ratio = (joined["image_size"][row] / joined["original_size"][row])[[1, 0, 1, 0]]
        boxes = np.reshape([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in mine)], (-1, 4)) * ratio
        valid = joined["valid"][row]
        np.testing.assert_allclose(joined["boxes"][row][valid], boxes, rtol=1e-5)
        ids = [dataset.category_ids[label] for label in joined["labels"][row][valid]]
        assert ids == [a["category_id"] for a in mine]
    assert not joined["valid"][11].any() and (joined["image"][11] == 114).all() and joined["image_id"][11] == -1


def test_evaluation_of_the_first_images(dataset, cfg):
    batches = list(data.eval_batches(dataset, "train", cfg, batch_size=4, limit=5))
    ids = np.concatenate([batch["image_id"][batch["real"]] for batch in batches])
    assert ids.tolist() == [image["id"] for image in data.ground_truth(dataset, "train", limit=5)["images"]]


def test_evaluation_may_round_sizes_down(dataset, cfg):
    batches = list(data.eval_batches(dataset, "train", cfg, batch_size=11, round_down=True))
    originals, sizes = (batches[0][name] for name in ("original_size", "image_size"))
    exact = originals * np.min([48, 64] / originals, axis=1, keepdims=True)
    np.testing.assert_array_equal(sizes, np.floor(exact + 1e-6))
    assert (exact - sizes).max() > 0.5  # rounded, it would be one more
    for row, (height, width) in enumerate(sizes):
        assert (batches[0]["image"][row, height:] == 114).all() and (batches[0]["image"][row, :, width:] == 114).all()


def test_of_too_many_boxes_the_largest_are_kept(tmp_path):
    boxes = [(2, 2, 5, 5), (10, 2, 40, 30), (2, 10, 8, 30), (2, 35, 40, 47)]
    truth = coco_json({"a.png": (48, 64)}, [(0, 3, [x, y, p - x, q - y], {}) for x, y, p, q in boxes])
    root = write_folder(tmp_path / "set", {"train": truth, "val": truth}, {"a.png": paint(48, 64, boxes)})
    cfg = plain(settings(tmp_path / "cache", root=root, max_boxes=2, image_size=(48, 64)))
    dataset = data.open_dataset(cfg)
    assert dataset.max_boxes == 2
    [batch] = train(dataset, cfg, 1, batch_size=1)
    np.testing.assert_array_equal(batch["boxes"][0], [boxes[1], boxes[3]])
    assert "1 images have more than max_boxes=2 boxes" in data.summary(dataset, cfg)


def test_settings_out_of_range_are_refused(dataset, cfg):
    def start(**changes):
        other = cfg.copy_and_resolve_references()
        options = dict(batch_size=4, seed=0) | {
            k: changes.pop(k) for k in ("batch_size", "seed", "shard") if k in changes
        }
        keys = ("flip", "scale", "hsv", "mixup", "cache")
        other.augment.update({k: changes.pop(k) for k in keys if k in changes})
        other.update(changes)
        data.train_batches(dataset, other, **options)

    for changes, words in [
        (dict(batch_size=3, shard=(0, 2)), "batch_size must be a positive multiple of the 2 shards, not 3"),
        (dict(seed=-1), "seed must be at least 0"),
        (dict(image_size=(0, 64)), "image_size must be .height, width."),
        (dict(flip=1.5), "^augment.flip must be a probability in 0 .. 1, not 1.5"),
        (dict(scale=(2.0, 0.5)), "augment.scale"),
        (dict(scale=(1.0, np.inf)), "augment.scale"),
        (dict(hsv=(-1.0, 0.0, 0.0)), "augment.hsv"),
        (dict(hsv=(0.0, np.nan, 0.0)), "augment.hsv"),
        (dict(mixup=-0.5), "augment.mixup must be a probability in 0 .. 1, not -0.5"),
        (dict(cache=0), "augment.cache must be at least 1 image, not 0"),
        (dict(stage2=dict(start=-3)), "stage2.start must be a step, .* not -3"),
        (dict(stage2=dict(start=3, augment=dict(flip=2.0))), "^stage2.augment.flip must be"),
    ]:
        with pytest.raises(UserError, match=words):
            start(**changes)


def test_an_image_that_cannot_be_decoded_is_named(cfg, tmp_path):
    other = settings(tmp_path / "cache", root=cfg.root, image_size=(48, 64))
    fresh = data.open_dataset(other)
    reader = fresh.splits["train"].records
    raw = reader.raw(0)
    object.__setattr__(reader, "raw", lambda index: raw | {"image": b"spoilt"})
    with pytest.raises(data.Damaged, match="image p0.png cannot be decoded"):
        reader[0]
