"""Images without labels in a run: distillation terms alone, of which the twin knows nothing."""

import json
from types import SimpleNamespace
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import data, detectors, weights
from kdjax.distill import Custom, Distiller, Method, Reads
from kdjax.errors import UserError
from kdjax.structs import DetectorOutput
from kdjax.training import checks, setup, teachers
from kdjax.training.run import run
from kdjax.training.step import init_state, make_step
from tests.support.arrays import quick_jit
from tests.support.data import settings, small_folder
from tests.support.runs import killed_after, tiny_config


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of twelve pictures that no split has."""
    folder = tmp_path_factory.mktemp("unlabelled")
    rng = np.random.default_rng(7)
    for number in range(12):
        cv2.imwrite(str(folder / f"{number}.png"), rng.integers(0, 256, (48, 80, 3)).astype(np.uint8))
    return folder


def few_steps(folder, images, **changes):
    common = dict(steps=4, log_every=2, checkpoint__every=2, optimizer__warmup=1, data__stage2__start=2)
    common |= dict(data__unlabelled=str(images), data__unlabelled_ratio=0.5, student__detector="rtmdet_pico")
    return tiny_config(folder, teacher="quickstart_teacher", **common | changes)


def logged(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if row["kind"] == "train"}


@pytest.mark.slow
def test_the_twin_knows_nothing_of_them(folder, images, tmp_path, capsys):
    """It is a run without a teacher, to the bit."""
    config = few_steps(folder, images, method="hinton")
    run(config, tmp_path / "with")
    told = capsys.readouterr().out
    assert "Images without labels: 12, 4 in a batch beside 8 with labels" in told
    assert "Methods that read boxes take the detections of the teacher, from score 0.5 on." in told
    steps = dict(steps=4, log_every=2, optimizer__warmup=1, data__stage2__start=2)
    run(tiny_config(folder, teacher=None, student__detector="rtmdet_pico", **steps), tmp_path / "without")
    twin, alone = logged(tmp_path / "with")[4], logged(tmp_path / "without")[4]
    names = [name for name in twin if name.startswith("twin/")]
    assert len(names) > 3 and all(twin[name] == alone[name.replace("twin/", "student/")] for name in names)
    (images / "more.png").write_bytes((images / "0.png").read_bytes())
    with pytest.raises(UserError, match=r"data was .*choose another folder"):
        run(config, tmp_path / "with")
    (images / "more.png").unlink()


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped(folder, images, tmp_path):
    config = few_steps(folder, images, method="cwd")
    whole = run(config, tmp_path / "whole")
    with killed_after(2):
        run(config, tmp_path / "stopped")
    assert run(config, tmp_path / "stopped") == whole


def test_a_term_is_the_mean_over_all_images_and_methods_that_read_boxes_may_sit_out():
    """With a student of one weight: its map is the image, every method a mean of it."""

    def output(params, image):
        return DetectorOutput(strides=(1,), neck=(params["scale"] * image,))

    student: Any = SimpleNamespace(
        spec=lambda size: DetectorOutput(strides=(1,), neck=(jax.ShapeDtypeStruct((1, *size, 3), jnp.float32),)),
        preprocess=lambda images: images.astype(jnp.float32),
        apply=lambda params, stats, x, train: (output(params, x), {"seen": stats["seen"] + len(x)}),
        assign=lambda output, targets, key: None,
        loss=lambda output, targets, assignment: {"detection": output.neck[0].mean() + targets.valid.sum()},
    )
    maps = Method(
        init=lambda *_: {},
        apply=lambda params, context: {"mean": context.student.neck[0].mean() - context.teacher.neck[0].mean()},
        weights={"mean": 2.0},
        reads=Reads(("neck",), ("neck",)),
        name="maps",
    )
    counts = Method(
        init=lambda *_: {},
        apply=lambda params, context: {"count": context.targets.valid.sum() * context.student.neck[0].max()},
        weights={"count": 1.0},
        reads=Reads(("neck", "targets"), ("neck",)),
        name="counts",
    )
    teacher = Custom(spec=student.spec, observe=lambda variables, batch: output(variables, batch["image"]))
    distiller = Distiller(student, teacher, [maps, counts])
    assert set(distiller.without_boxes((2, 2)).methods) == {"maps"}
    optimizer = optax.sgd(0.5)
    start = ({"scale": jnp.float32(3.0)}, {"seen": jnp.int32(0)})
    state = init_state(student, jax.random.PRNGKey(0), start, distiller.init(jax.random.PRNGKey(0), (2, 2)), optimizer)
    step = quick_jit(make_step(student, optimizer, lambda _: 0.5, distiller=distiller))

    def batch(*values):
        images = np.array(values, np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
        boxes = {"boxes": np.ones((len(values), 1, 4), np.float32), "labels": np.ones((len(values), 1), np.int32)}
        sizes = np.full((len(values), 2), 2, np.int32)
        return {"image": images, "image_size": sizes, "valid": np.ones((len(values), 1), bool)} | boxes

    first, second = batch(10, 20), batch(40)
    bare = {name: second[name] for name in ("image", "image_size")}
    new, metrics = step(state, {"scale": jnp.float32(1.0)}, first | {"unlabelled": bare})
    # (3 - 1) times the mean of 10, 20 and 40; the counts are those of the labelled images alone.
    np.testing.assert_allclose(metrics["maps/mean"], 2 * 70 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["counts/count"], 2 * 60, rtol=1e-6)
    np.testing.assert_allclose(metrics["detection"], 3 * 15 + 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["total"], metrics["detection"] + 2 * 140 / 3 + 120, rtol=1e-6)
    assert int(new.stats["seen"]) == 3
    np.testing.assert_allclose(new.params["student"]["scale"], 3 - 0.5 * (15 + 2 * 70 / 3 + 40), rtol=1e-5)
    _, metrics = step(state, {"scale": jnp.float32(1.0)}, first | {"unlabelled": second})
    np.testing.assert_allclose(metrics["counts/count"], 2 / 3 * 120 + 1 / 3 * 120, rtol=1e-6)


def test_boxes_are_the_teachers_confident_detections(folder, images):
    config = few_steps(folder, images, method="hinton", data__unlabelled_score=0.3)
    dataset = data.open_dataset(config.data)
    prepared = setup.prepare(config, dataset)
    picture = cv2.resize(dataset.splits["val"].records[0]["image"], (64, 64))
    canvas = np.stack([picture, picture[::-1], picture[:, ::-1], np.zeros_like(picture)])
    given = {"image": canvas, "image_size": np.full((4, 2), 64, np.int32)}
    made = prepared.unlabelled({"": prepared.teachers[0].variables}, given)
    assert {"boxes", "labels", "valid", "teacher", "image", "image_size"} == set(made)
    found = prepared.teachers[0].detector

    @quick_jit
    def decoded(variables, batch):
        output = found.observe(variables, batch)
        return found.decode(output, batch["image_size"], pre_nms=1000, max_detections=dataset.max_boxes)

    best = decoded(tuple(prepared.teachers[0].variables), given)
    assert made["boxes"].shape == (4, dataset.max_boxes, 4) and made["valid"][:3].any()
    np.testing.assert_array_equal(made["valid"], best.valid & (best.scores >= 0.3))
    np.testing.assert_allclose(made["boxes"], best.boxes, atol=1e-3)
    np.testing.assert_array_equal(made["labels"], best.labels)
    assert len(np.unique(np.asarray(best.labels)[np.asarray(made["valid"])])) > 1


@pytest.mark.user_input(
    "Config and flags", "images without labels that cannot be used", "refused: the setting is named"
)
def test_images_without_labels_that_cannot_be_used_are_refused(folder, images, tmp_path):
    with pytest.raises(UserError, match=r"config\.data\.unlabelled has no effect without a teacher"):
        checks.check_settings(tiny_config(folder, teacher=None, data__unlabelled=str(images)))
    with pytest.raises(UserError, match=r"unlabelled_ratio: 0\.01 of 8 images is 0: it must be a positive multiple"):
        checks.check_settings(few_steps(folder, images, data__unlabelled_ratio=0.01))
    with pytest.raises(UserError, match=r"unlabelled: there is no folder"):
        data.open_dataset(few_steps(folder, tmp_path / "nowhere").data)
    small_folder(tmp_path / "coco")
    cfg = settings(tmp_path / "cache", source="coco_folder", root=str(tmp_path / "coco"))
    assert data.open_dataset(cfg).unlabelled is None
    cfg.unlabelled = str(tmp_path / "coco" / "images")
    with pytest.raises(UserError, match=r"unlabelled: 3 of the 14 images of .* are, byte for byte, validation images"):
        data.open_dataset(cfg)


def test_a_teacher_of_other_classes_leaves_methods_that_read_boxes_out(folder, images, tmp_path):
    detector = detectors.build("rtmdet_pico", 2)
    weights.save(tmp_path, detector, *detector.init(jax.random.PRNGKey(0)), classes=["cat", "dog"], image_size=(64, 64))
    dataset = data.open_dataset(few_steps(folder, images).data)
    changes = dict(teacher__weights=str(tmp_path))
    with pytest.raises(UserError, match=r"config\.data\.unlabelled: fgfi read boxes, and no teacher can give these"):
        setup.prepare(few_steps(folder, images, method="fgfi", **changes), dataset)
    made = setup.prepare(few_steps(folder, images, method="fgfi+cwd", **changes), dataset)
    assert teachers.sitting_out(made.teachers, (64, 64)) == ["fgfi"]
