"""Images without labels in a run: distillation terms alone, of which the twin knows nothing."""

import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import data, detectors, methods, weights
from kdjax.distill import Distiller
from kdjax.errors import UserError
from kdjax.training import checks, setup, teachers
from kdjax.training import run as trainer
from kdjax.training.run import run
from kdjax.training.step import TeacherVariables, init_state, make_step
from tests.support.arrays import quick_jit
from tests.support.data import settings, small_folder
from tests.support.runs import tiny_config


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
    common |= dict(data__unlabelled=str(images), data__unlabelled_ratio=0.5)
    return tiny_config(folder, teacher="quickstart_teacher", **common | changes)


def logged(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if row["kind"] == "train"}


def test_the_twin_is_the_same_and_the_student_sees_more(folder, images, tmp_path, capsys):
    results = run(few_steps(folder, images, method="hinton+crosskd"), tmp_path / "with")
    told = capsys.readouterr().out
    assert "Images without labels: 12, 4 in a batch beside 8 with labels" in told
    assert "Methods that read boxes take the detections of the teacher, from score 0.5 on." in told
    run(few_steps(folder, images, method="hinton+crosskd", data__unlabelled=""), tmp_path / "without")
    both = [logged(tmp_path / name)[4] for name in ("with", "without")]
    twin = [{name: value for name, value in row.items() if name.startswith("twin/")} for row in both]
    assert twin[0] == twin[1] and len(twin[0]) > 3
    assert all(both[0][name] != both[1][name] for name in ("student/hinton/classes", "student/crosskd/classes"))
    assert run(few_steps(folder, images, method="hinton+crosskd"), tmp_path / "with") == results
    (images / "more.png").write_bytes((images / "0.png").read_bytes())
    with pytest.raises(UserError, match=r"data was .*choose another folder"):
        run(few_steps(folder, images, method="hinton+crosskd"), tmp_path / "with")
    (images / "more.png").unlink()


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped(folder, images, tmp_path, monkeypatch):
    config = few_steps(folder, images, method="cwd")
    whole = run(config, tmp_path / "whole")
    save = trainer.Checkpoints.save

    def stopped(self, step, *rest):
        save(self, step, *rest)
        if step == 2:
            self.wait()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Checkpoints, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "stopped")
    assert run(config, tmp_path / "stopped") == whole


def test_a_term_is_the_mean_over_all_images_and_methods_that_read_boxes_may_sit_out():
    student, teacher = detectors.build("rtmdet_pico", 3), detectors.build("rtmdet_pico", 3)
    distiller = Distiller(student, teacher, [methods.cwd(), methods.fgfi()])  # the second reads boxes
    rng, key = np.random.default_rng(0), jax.random.PRNGKey(0)
    optimizer = optax.sgd(0.0)
    state = init_state(student, key, None, distiller.init(key, (64, 64)), optimizer)
    variables = TeacherVariables(*teacher.init(jax.random.PRNGKey(1)))

    def batch(count):
        return {
            "image": rng.integers(0, 256, (count, 64, 64, 3)).astype(np.uint8),
            "boxes": np.tile(np.array([4, 6, 50, 60], np.float32), (count, 1, 1)),
            "labels": np.ones((count, 1), np.int32),
            "valid": np.ones((count, 1), bool),
            "image_size": np.full((count, 2), 64, np.int32),
        }

    first, second = batch(2), batch(1)
    step = quick_jit(make_step(student, optimizer, lambda _: 0.5, distiller=distiller))
    _, labelled = step(state, variables, first)
    _, boxed = step(state, variables, first | {"unlabelled": second})
    bare = {name: second[name] for name in ("image", "image_size")}
    _, without = step(state, variables, first | {"unlabelled": bare})
    _, alone = step(state, variables, second)
    expected = 2 / 3 * labelled["cwd/cwd"] + 1 / 3 * alone["cwd/cwd"]
    for found in (boxed, without):
        np.testing.assert_allclose(found["cwd/cwd"], expected, rtol=2e-4)
        np.testing.assert_allclose(found["loss_cls"], labelled["loss_cls"], rtol=1e-5)
    [imitation] = [name for name in labelled if name.startswith("fgfi/")]
    np.testing.assert_allclose(without[imitation], labelled[imitation], rtol=1e-5)
    mixed = 2 / 3 * labelled[imitation] + 1 / 3 * alone[imitation]
    np.testing.assert_allclose(boxed[imitation], mixed, rtol=2e-4)


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
    output = found.observe(tuple(prepared.teachers[0].variables), given)
    best = found.decode(output, jnp.asarray(given["image_size"]), pre_nms=1000, max_detections=dataset.max_boxes)
    assert made["boxes"].shape == (4, dataset.max_boxes, 4) and made["valid"][:3].any()
    np.testing.assert_array_equal(made["valid"], best.valid & (best.scores >= 0.3))


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
    with pytest.raises(UserError, match=r"config\.data\.unlabelled: fgfi read boxes, and no teacher has the classes"):
        setup.prepare(few_steps(folder, images, method="fgfi", **changes), dataset)
    made = setup.prepare(few_steps(folder, images, method="fgfi+cwd", **changes), dataset)
    assert teachers.sitting_out(made.teachers, (64, 64)) == ["fgfi"]
