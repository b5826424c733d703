"""Models with weights: what a run does with those of other classes, detectors and files."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from kdjax import data, detectors, weights
from kdjax.cli import sentence
from kdjax.detectors.api import flatten
from kdjax.errors import UserError
from kdjax.training import config as settings
from kdjax.training.models import load_detector, precision
from kdjax.training.run import run
from kdjax.training.setup import prepare, resume, run_fingerprint
from kdjax.weights import checkpoint
from tests.support.checkpoints import spoilt
from tests.support.runs import tiny_config


@pytest.mark.user_input(
    "Weights", "a teacher of other classes, whose predictions are read", "refused: the class map does not fit"
)
def test_class_map_of_the_teacher_must_fit(folder, teacher_folder, tmp_path):
    detector, params, stats, classes = weights.load(teacher_folder)
    classes = ["zebra", *classes[1:]]
    weights.save(tmp_path / "other", detector, params, stats, classes=classes, image_size=(64, 64))
    config = tiny_config(folder, teacher=tmp_path / "other", method="hinton")
    with pytest.raises(UserError, match=r"config.teacher.weights: the class map of .*other does not fit .*unknown"):
        run(config, tmp_path / "run")


@pytest.mark.user_input(
    "Weights", "a teacher of other classes, whose maps alone are read", "reported: it is not evaluated"
)
def test_a_teacher_whose_maps_alone_are_read_may_have_other_classes(folder, tmp_path, capsys):
    """It is not evaluated, and the user is told so."""
    dataset = data.open_dataset(tiny_config(folder, teacher=None).data)
    detector = detectors.build("rtmdet_pico", 2)
    params, stats = detector.init(jax.random.PRNGKey(0))
    weights.save(tmp_path, detector, params, stats, classes=["cat", "dog"], image_size=(64, 64))
    setup = prepare(tiny_config(folder, teacher=tmp_path, method="cwd"), dataset)
    assert not setup.teachers[0].detects
    assert "are not those of the data: only its feature maps are used; it is not evaluated" in capsys.readouterr().err


@pytest.mark.user_input(
    "Weights",
    "a teacher of 80 classes without names for data of 6",
    "refused: the weights are for 80 classes, but 6 are needed",
)
def test_a_teacher_of_another_number_of_classes_is_refused(folder, teacher_folder, tmp_path):
    """A PyTorch file does not name its classes; re-initialised classifiers would teach noise."""
    detector = detectors.build("rtmdet_pico", 80)
    np.savez(tmp_path / "coco.npz", **weights.to_torch(detector, *detector.init(jax.random.PRNGKey(0))))
    changes = dict(method="hinton", teacher__weights=str(tmp_path / "coco.npz"), teacher__detector="rtmdet_pico")
    with pytest.raises(UserError, match=r"coco.npz: the weights are for 80 classes, but 6 are needed"):
        run(tiny_config(folder, teacher=teacher_folder, **changes), tmp_path / "run")


def test_spoilt_weights_of_a_teacher_are_refused(folder, teacher_folder, tmp_path):
    expected = spoilt(tmp_path, {"bbox_head.rtm_cls.0.bias": np.zeros(6)})
    for name in sorted(name for name in expected if name.startswith(("pickle", "code"))):
        changes = dict(teacher__weights=str(tmp_path / name), teacher__detector="rtmdet_pico")
        with pytest.raises(UserError, match=name) as caught:
            run(tiny_config(folder, teacher=teacher_folder, **changes), tmp_path / "run")
        assert expected[name] in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_weights_of_another_detector_get_one_line(folder, teacher_folder, tmp_path):
    detector = detectors.build("rtmdet_micro", 6)
    np.savez(tmp_path / "micro.npz", **weights.to_torch(detector, *detector.init(jax.random.PRNGKey(0))))
    changes = dict(teacher__weights=str(tmp_path / "micro.npz"), teacher__detector="rtmdet_pico")
    with pytest.raises(UserError, match="do not fit rtmdet_pico") as caught:
        run(tiny_config(folder, teacher=teacher_folder, **changes), tmp_path / "run")
    assert sentence(caught.value).endswith(" more") and "\n" not in sentence(caught.value)


@pytest.mark.user_input(
    "Weights", "weights of other classes to start a student from", "reported: the classifiers are re-initialised"
)
def test_a_student_may_start_from_weights_of_other_classes(folder, teacher_folder, tmp_path):
    """Fine-tuning: all weights but the classifiers are loaded, with a warning."""
    dataset, key = data.open_dataset(tiny_config(folder, teacher=None).data), jax.random.PRNGKey(0)
    fresh = flatten(detectors.build("rtmdet_pico", len(dataset.classes)).init(key)[0])
    for classes in (["zebra", *dataset.classes[1:]], ["zebra"]):
        detector = detectors.build("rtmdet_pico", len(classes))
        params, stats = detector.init(jax.random.PRNGKey(99))
        weights.save(tmp_path, detector, params, stats, classes=classes, image_size=(64, 64))
        chosen = ConfigDict(dict(detector="rtmdet_pico", options={}, weights=str(tmp_path)))
        with pytest.warns(UserWarning, match="classifiers of rtmdet_pico are re-initialised"):
            detector, (loaded, _) = load_detector("student", chosen, dataset, key)
        assert detector.num_classes == len(dataset.classes)
        old = flatten(params)
        for path, value in flatten(loaded).items():
            np.testing.assert_array_equal(value, (fresh if "rtm_cls" in path else old)[path], err_msg=path)


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs",
    "an interrupted run of the former `rtmdet_nano`",
    "refused: belongs to a run of what is rtmdet_micro now",
)
def test_a_run_under_a_former_name_is_not_resumed(tmp_path):
    states = {}
    for name in ("rtmdet_micro", "rtmdet_nano"):
        detector = detectors.build(name, 2, widen=0.0625)
        states[name] = {"student": {"params": dict.fromkeys(flatten(detector.shapes[0]), np.zeros(1))}}
    setup: Any = SimpleNamespace(
        student=detector,
        dataset=SimpleNamespace(classes=["a", "b"], fingerprint="x"),
        config=ConfigDict(dict(seed=0, batch_size=1, dtype="auto", extend=False)),
        states=states["rtmdet_nano"],
        methods={},
        teachers=(),
    )
    note = {"run": run_fingerprint(setup), "sha256": dict.fromkeys(checkpoint.flat(states["rtmdet_micro"]))}
    checkpoints: Any = SimpleNamespace(note=lambda: note, directory=tmp_path)
    with pytest.raises(UserError, match="a run of what is rtmdet_micro now, which was called rtmdet_nano when"):
        resume(setup, checkpoints)


@pytest.mark.parametrize(("backend", "expected"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")])
def test_accelerators_train_in_bfloat16_unless_told_otherwise(monkeypatch, backend, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    config = settings.base()
    assert precision(config) == expected
    config.dtype = "float32"
    assert precision(config) == "float32"
