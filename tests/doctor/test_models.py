"""Planted mistakes in weights, inputs, class maps, sizes and frozen layers are named; sound models are not."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import data, detectors, weights
from kdjax.commands.settings import read
from kdjax.doctor import models
from kdjax.doctor.findings import OK, WARNING
from kdjax.training.setup import Setup
from kdjax.training.step import TeacherVariables
from kdjax.training.teachers import TeacherOfRun
from kdjax.weights import folder
from tests.shared import ROOT
from tests.support.findings import errors

IMAGES = 16


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A setup of nothing but the quickstart's teacher and its data."""
    config = read("quickstart")
    config.data.update(dict(cache=str(tmp_path_factory.mktemp("shipped")), scenes_train=4, scenes_val=IMAGES))
    detector, params, stats, _ = weights.load(ROOT / "assets" / "quickstart_teacher")
    known = dict(
        config=config,
        dataset=data.open_dataset(config.data),
        teachers=(TeacherOfRun("", detector, True, Any, TeacherVariables(params, stats), None),),
    )
    return Setup(**dict.fromkeys(Setup._fields) | known)


def check(setup, **changes):
    [teacher] = setup.teachers
    return models.check_weights("teacher", setup._replace(teachers=(teacher._replace(**changes),)), IMAGES)


def test_a_sound_teacher_is_ok(shipped):
    [finding] = check(shipped)
    assert finding.level == OK and "AP50 " in finding.message


@pytest.mark.user_input(
    "Weights",
    "a teacher that wants BGR or another normalisation",
    "reported by `kdjax doctor`, with the input that fits better",
)
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda own, images: own[..., ::-1], "its own with red and blue swapped"),
        pytest.param(
            lambda own, images: images[..., ::-1].astype(jnp.float32),
            "BGR normalised with ImageNet's mean and std",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["swapped", "not normalised"],
)
def test_a_wrong_input_is_named(shipped, wrong, named):
    own = shipped.teachers[0].detector.preprocess
    detector = dataclasses.replace(shipped.teachers[0].detector, preprocess=lambda images: wrong(own(images), images))
    assert f"when the input is {named}" in errors(check(shipped, detector=detector))["teacher's input"]


@pytest.mark.user_input(
    "Weights", "a teacher whose classes are permuted", "reported by `kdjax doctor`, with two of them"
)
@pytest.mark.parametrize(
    "order",
    [(1, 0, 2, 3, 4, 5), pytest.param((1, 2, 3, 4, 5, 0), marks=pytest.mark.slow)],
    ids=["two", "all"],
)
def test_a_wrong_class_map_is_named(shipped, order):
    names, (params, stats) = shipped.dataset.classes, shipped.teachers[0].variables
    head = jax.tree.map(lambda leaf: leaf[..., jnp.array(order)], params["bbox_head"]["rtm_cls"])
    params = params | {"bbox_head": params["bbox_head"] | {"rtm_cls": head}}
    message = errors(check(shipped, variables=TeacherVariables(params, stats)))["teacher's classes"]
    assert f"detections of {names[0]!r} are objects of {names[1]!r}" in message


@pytest.mark.user_input("Weights", "an untrained teacher", "reported by `kdjax doctor`: barely detects anything")
def test_an_untrained_teacher_is_named(shipped):
    detector = detectors.build("rtmdet_micro", len(shipped.dataset.classes))
    variables = TeacherVariables(*detector.init(jax.random.PRNGKey(0)))
    assert (
        "the teacher barely detects anything"
        in errors(check(shipped, detector=detector, variables=variables))["teacher"]
    )


@pytest.mark.user_input(
    "Config and flags", "a student of random weights with frozen layers", "reported by `kdjax doctor`, with the options"
)
def test_a_random_student_with_frozen_layers_is_named():
    message = errors(models.check_frozen(detectors.build("retinanet_r50", 2)))["frozen layers"]
    assert "11 kernels" in message and "(frozen_stages, norm_eval, frozen_norm)" in message
    free = dict(frozen_stages=-1, frozen_norm=False, norm_eval=False)
    assert not models.check_frozen(detectors.build("fcos_r18", 2, **free))
    assert not models.check_frozen(detectors.build("yolox_pico", 2))


@pytest.mark.user_input("Config and flags", "student and teacher swapped", "reported by `kdjax doctor`")
def test_a_student_larger_than_its_teacher_is_noticed(tiny):
    larger = tiny[0]._replace(student=detectors.build("rtmdet_tiny", tiny[0].student.num_classes))
    [finding] = models.check_sizes(larger, larger.teachers[0])
    assert finding.level == WARNING and "are student and teacher swapped?" in finding.message


def test_the_class_map_of_weights(tiny, tmp_path):
    setup, _ = tiny
    finding, kept = models.check_class_map("teacher", setup.config.teacher, setup.dataset)
    assert kept and finding.level == OK
    config = setup.config.copy_and_resolve_references()
    config.student.weights = str(tmp_path / "w.npz")
    for count, named in ((6, None), (6, "abcdef"), (2, None)):
        detector = detectors.build(config.student.detector, count, **config.student.options)
        state = weights.to_torch(detector, *detector.init(jax.random.PRNGKey(5)))
        np.savez(tmp_path / "w.npz", **state)
        with pytest.MonkeyPatch.context() as patched:
            if named:  # as in a .pth of mmengine
                patched.setattr(folder, "read_checkpoint", lambda path, state=state, named=named: (state, list(named)))
            finding, kept = models.check_class_map("student", config.student, setup.dataset)
        assert kept == (count == 6 and not named)
        if named:
            assert "the weights have 6 others: a, b, c, d, e, f" in finding.message
        elif kept:
            assert "do not name their classes" in finding.message
        else:
            assert "re-initialised" in finding.message and "the weights have others" in finding.message
            of_teacher = models.check_class_map("teacher", config.student, setup.dataset)[0].message
            assert of_teacher.startswith("only the feature maps are used, because the classes are not the 6 classes of")


def test_taps_and_their_shapes(tiny):
    setup, _ = tiny
    [finding] = models.check_taps(setup, setup.teachers[0])
    assert finding.subject == "mkd's taps"
    assert finding.message == (
        "student neck (8: 8x8x4, 16: 4x4x4, 32: 2x2x4, 64: 1x1x4, 128: 1x1x4), "
        "teacher neck (8: 8x8x4, 16: 4x4x4, 32: 2x2x4, 64: 1x1x4, 128: 1x1x4)"
    )
    [finding] = models.check_taps(setup._replace(student=detectors.build("rtmdet_pico", 6)), setup.teachers[0])
    assert finding.message.endswith("; strides 64, 128 exist on one side only")
