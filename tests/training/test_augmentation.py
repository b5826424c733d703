"""Images made on the device: equal to those of the host within the stated bound, for the same draws."""

import contextlib
import json

import cv2
import jax
import numpy as np
import pytest

from kdjax import data
from kdjax.data import transforms
from kdjax.errors import UserError
from kdjax.training import checks, setup
from kdjax.training.augmentation import images
from kdjax.training.run import run
from tests.support.data import coco_json, settings, write_folder
from tests.support.runs import killed_after, tiny_config

MIXED = dict(mosaic=True, mixup=0.6, cache=6, scale=(0.2, 2.0))
BOUND = {False: 1, True: 2}  # of 255, without and with MixUp


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A folder of images of many sizes, smooth in parts and noise in others, each with a box and its mask."""
    folder, rng = tmp_path_factory.mktemp("noisy"), np.random.default_rng(3)
    pixels, boxes = {}, []
    for i in range(23):
        height, width = (int(side) for side in rng.integers(20, 90, 2))
        if i == 5:
            height, width = 96, 128  # twice the canvas
        pixels[f"{i}.png"] = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        pixels[f"{i}.png"][: height // 2] = transforms.PAD + rng.integers(-2, 3, (height // 2, width, 3))  # near grey
        box = [2, 3, width // 2, height // 2]
        x0, y0, x1, y1 = 2, 3, 2 + width // 2, 3 + height // 2
        boxes.append((i, 3, box, {"segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]]}))
    truth = coco_json({name: image.shape[:2] for name, image in pixels.items()}, boxes)
    return write_folder(folder / "set", {"train": truth, "val": truth}, pixels), folder / "cache"


def opened(noisy, **changes):
    root, cache = noisy
    cfg = settings(cache, root=root, image_size=(48, 64), masks=True, **changes)
    return data.open_dataset(cfg), cfg


def taken(dataset, cfg, on, count, **options):
    cfg = cfg.copy_and_resolve_references()
    cfg.augment_on = on
    batches = data.train_batches(dataset, cfg, **dict(batch_size=8, seed=3) | options)
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def compared(dataset, cfg, count, **options):
    """How many values differ, and by how much; everything but the pixels must be equal.

    Returns:
      The share of values that differ in whole vectors of OpenCV's loop, the largest difference anywhere, and the number
      of images with a partner.
    """
    made, differ, total, most, mixed = jax.jit(lambda recipe: images(recipe)), 0, 0, 0, 0
    on_both = (taken(dataset, cfg, on, count, **options) for on in ("host", "device"))
    for host, device in zip(*on_both, strict=True):
        assert host.keys() - device.keys() == {"image"} and device.keys() - host.keys() == {"recipe"}
        for name in host.keys() & device.keys():
            np.testing.assert_array_equal(host[name], device[name], err_msg=name)
        off = np.abs(np.asarray(made(device["recipe"])).astype(int) - host["image"])
        rows = device["recipe"].get("mixed", np.zeros(len(off), bool))
        for row, with_partner in zip(off, rows, strict=True):
            assert row.max() <= BOUND[bool(with_partner)]
        whole = np.arange(off.shape[2]) < host["image_size"][:, 1:] // 32 * 32
        alone = off[~rows].transpose(0, 2, 1, 3)[whole[~rows]]
        differ, total = differ + (alone > 0).sum(), total + alone.size
        most, mixed = max(most, off.max()), mixed + rows.sum()
    assert made._cache_size() == 1, "one program"
    return differ / total, most, mixed


@pytest.mark.parametrize("augment", [dict(scale=(0.3, 2.5)), MIXED], ids=["single", "mixed"])
def test_the_device_makes_the_images_of_the_host(noisy, augment):
    dataset, cfg = opened(noisy, augment=augment)
    share, most, mixed = compared(dataset, cfg, 6)
    assert share < 1e-3 and most <= 2 and bool(mixed) == ("mixup" in augment)


def test_without_colours_they_are_equal_to_the_bit(noisy):
    dataset, cfg = opened(noisy, augment=MIXED | dict(hsv=(0.0, 0.0, 0.0)))
    assert compared(dataset, cfg, 4)[:2] == (0, 0)


def test_both_stages_and_stretched_images_have_one_program(noisy):
    later = dict(start=2, augment=dict(scale=(0.5, 2.0)))
    dataset, cfg = opened(noisy, augment=MIXED, stage2=later, longest=70)
    assert compared(dataset, cfg, 4, fit="stretch")[0] < 1e-3


def test_a_batch_is_a_function_of_the_seed_and_the_step(noisy):
    dataset, cfg = opened(noisy, augment=MIXED)
    whole = taken(dataset, cfg, "device", 7)
    for start, shard in ((5, (0, 1)), (4, (1, 2))):
        part = taken(dataset, cfg, "device", 7 - start, start_step=start, shard=shard)
        rows = slice(8 // shard[1] * shard[0], 8 // shard[1] * (shard[0] + 1))
        for before, again in zip(whole[start:], part, strict=True):
            cut = {key: jax.tree.map(lambda a, rows=rows: a[rows], value) for key, value in before.items()}
            jax.tree.map(np.testing.assert_array_equal, cut, again)
    [other] = taken(dataset, cfg, "device", 1, seed=4)
    assert not np.array_equal(whole[0]["recipe"]["rows"], other["recipe"]["rows"])


@pytest.mark.slow
@pytest.mark.parametrize("augment", [dict(scale=(0.1, 2.0)), MIXED | dict(scale=(0.1, 2.0))], ids=["single", "mixed"])
def test_a_thousand_samples_agree(noisy, augment):
    dataset, cfg = opened(noisy, augment=augment)
    share, most, _ = compared(dataset, cfg, 125)
    print(f"{share:.2e} of the values differ, at most by {most}")
    assert share < 2e-4


@pytest.mark.user_input(
    "Config and flags",
    "augmentation on the device with SSD's steps, or of photographs much larger than the canvas",
    "refused: what to set",
)
def test_what_the_device_cannot_do_is_refused(noisy):
    for changes, words in (
        (dict(augment_on="gpu"), "^augment_on must be 'host' or 'device', not 'gpu'"),
        (dict(augment_on="device", augment=dict(zoom_out=0.5)), "^augment_on: distort, zoom_out and iou_crop are made"),
    ):
        with pytest.raises(UserError, match=words):
            data.check_settings(settings("", **changes))
    dataset, cfg = opened(noisy)
    cfg.update(dict(image_size=(32, 32)))
    words = r"^augment_on: each image .* 96x128 px .* 4 times .* canvas 32x32 .*: set config.data.longest=64, or "
    with pytest.raises(UserError, match=words):
        taken(dataset, cfg, "device", 1)
    cfg.augment_on = "device"
    with pytest.raises(UserError, match=words):  # in the dry run too
        data.summary(dataset, cfg)
    cfg.update(dict(longest=64, augment_on="host"))
    above = sum(max(height, width) > 64 for height, width in dataset.splits["train"].sizes.tolist())
    assert 1 < above < 23 and f"; {above} are shrunk to 64 px (config.data.longest)" in data.summary(dataset, cfg)


def logged(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if row["kind"] == "train"}


def losses(row):
    return {name: value for name, value in row.items() if name.startswith(("student/", "twin/"))}


def few_steps(folder, **changes):
    short = dict(steps=4, log_every=2, checkpoint__every=2, optimizer__warmup=1, data__stage2__start=2, eval__limit=4)
    return tiny_config(folder, **short | changes)


def test_a_batch_is_placed_with_its_images(folder):
    """Where the trainer and the checks look at a batch it has images, and one program makes them."""
    config = few_steps(folder, teacher=None, data__augment_on="device")
    run_setup = setup.prepare(config, data.open_dataset(config.data))
    host = few_steps(folder, teacher=None).data
    [expected] = taken(run_setup.dataset, host, "host", 1, seed=config.seed)
    with contextlib.closing(setup.train_batches(run_setup)) as batches:
        placed = setup.placed(run_setup, next(batches))
    for found in (placed, checks.on_host(run_setup, taken(run_setup.dataset, host, "device", 1, seed=config.seed)[0])):
        assert found.keys() == expected.keys() and found["image"].dtype == np.uint8
        assert np.abs(np.asarray(found["image"]).astype(int) - expected["image"]).max() <= 2
    assert isinstance(found["image"], np.ndarray) and isinstance(placed["image"], jax.Array)
    assert run_setup.programs == {"augmentation": 1}


@pytest.mark.slow
def test_a_run_resumes_to_the_bit_and_is_that_of_the_host(folder, tmp_path):
    config = few_steps(folder, teacher=None, data__augment_on="device")
    run(config, tmp_path / "whole")
    with killed_after(2):
        run(config, tmp_path / "parts")
    run(config, tmp_path / "parts")
    whole, parts = logged(tmp_path / "whole"), logged(tmp_path / "parts")
    assert losses(whole[4]) == losses(parts[4])
    run(few_steps(folder, teacher=None), tmp_path / "host")
    host = logged(tmp_path / "host")
    for step in (2, 4):
        for name, value in losses(host[step]).items():
            assert whole[step][name] == pytest.approx(value, rel=0.02), name


@pytest.mark.slow
def test_a_cached_teacher_and_images_without_labels(folder, teacher_folder, tmp_path):
    """The cache holds what the teacher says of the device's images, so that it changes nothing."""
    rng, extra = np.random.default_rng(7), tmp_path / "extra"
    extra.mkdir()
    for number in range(12):
        cv2.imwrite(str(extra / f"{number}.png"), rng.integers(0, 256, (48, 80, 3)).astype(np.uint8))
    changes = dict(teacher=teacher_folder, method="hinton", data__augment_on="device", data__views=2)
    run(few_steps(folder, **changes), tmp_path / "live")
    run(few_steps(folder, **changes, teacher__cache=str(tmp_path / "cache")), tmp_path / "cached")
    assert losses(logged(tmp_path / "live")[4]) == losses(logged(tmp_path / "cached")[4])
    host = few_steps(folder, **changes | dict(data__augment_on="host", teacher__cache=str(tmp_path / "cache")))
    with pytest.raises(UserError, match=r"config.data.augment_on was 'device', is 'host'"):
        run(host, tmp_path / "other")
    more = dict(data__unlabelled=str(extra), data__unlabelled_ratio=0.5)
    run(few_steps(folder, **changes, **more), tmp_path / "more")
    assert len(losses(logged(tmp_path / "more")[4])) > 3
