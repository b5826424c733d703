"""Filling a detector from a PyTorch state dict, and writing one."""

import chex
import jax
import numpy as np
import pytest

from kdjax import weights
from kdjax.detectors import build
from kdjax.detectors.api import flatten


@pytest.mark.parametrize("share", [True, False])
def test_there_and_back(share):
    detector = build("rtmdet_pico", 2, share_conv=share)
    variables = detector.init(jax.random.key(1))
    chex.assert_trees_all_equal(weights.from_torch(detector, weights.to_torch(detector, *variables)), variables)


@pytest.mark.parametrize("prefix", ["module.", "architecture.", "architecture.module.", "student.", "teacher."])
def test_wrapped_networks(detector, variables, state, prefix):
    wrapped = {prefix + name: value for name, value in state.items()}
    chex.assert_trees_all_equal(weights.from_torch(detector, wrapped), variables)


@pytest.mark.user_input(
    "Weights",
    "student and teacher in one checkpoint of mmrazor",
    "read: the student, or the teacher if it is asked for",
)
def test_distiller_holds_two_networks(detector, variables, state):
    other = detector.init(jax.random.key(9))
    both = {f"architecture.{name}": value for name, value in state.items()}
    both |= {f"teacher.{name}": value for name, value in weights.to_torch(detector, *other).items()}
    both["distiller.connectors.neck_s0.weight"] = np.zeros((2, 2))
    chex.assert_trees_all_equal(weights.from_torch(detector, both), variables)
    chex.assert_trees_all_equal(weights.from_torch(detector, both, network="teacher"), other)
    with pytest.raises(ValueError, match="student or teacher, not 'assistant'"):
        weights.from_torch(detector, both, network="assistant")
    for alone in ("architecture", "student"):
        student = {f"{alone}.{name}": value for name, value in state.items()}
        with pytest.raises(ValueError, match="it holds a student, and no teacher beside it: leave --network out"):
            weights.from_torch(detector, student, network="teacher")


@pytest.mark.user_input(
    "Weights", "weights that do not fit the detector", "refused with every name and shape that differs"
)
def test_all_differences_in_one_error(detector, state):
    broken = dict(state)
    del broken["neck.out_convs.0.bn.weight"]
    broken["neck.extra.weight"] = np.zeros(3)
    broken["backbone.stem.0.conv.weight"] = np.zeros((4, 3, 5, 5))
    broken["bbox_head.cls_convs.1.0.conv.weight"] = 0 * state["bbox_head.cls_convs.1.0.conv.weight"]
    broken["bbox_head.rtm_reg.0.weight"] = np.zeros((5, 32, 1, 1))
    with pytest.raises(ValueError, match="do not fit rtmdet_pico") as error:
        weights.from_torch(detector, broken)
    for words in (
        "do not fit rtmdet_pico with 3 classes",
        "5 differences",
        "neck.out_convs.0.bn.weight is missing",
        "neck.extra.weight matches no parameter of the detector",
        "backbone.stem.0.conv.weight has shape (4, 3, 5, 5) instead of (4, 3, 3, 3)",
        "bbox_head.cls_convs.2.0.conv.weight should be one shared array but differ",
        "bbox_head.rtm_reg.0.weight has shape (5, 32, 1, 1) instead of (4, 32, 1, 1)",
    ):
        assert words in str(error.value)


def test_classifiers_are_reset_for_another_number_of_classes(detector, variables, state):
    wider = build("rtmdet_pico", 7)
    with pytest.warns(UserWarning, match="classifiers of rtmdet_pico are re-initialised for 7 classes"):
        params, stats = weights.from_torch(wider, state, key=jax.random.key(4))
    fresh, got = flatten(wider.init(jax.random.key(4))[0]), flatten(params)
    old = flatten(variables[0])
    for path in got:
        np.testing.assert_array_equal(got[path], (fresh if "rtm_cls" in path else old)[path], err_msg=path)
    np.testing.assert_allclose(jax.nn.sigmoid(got["bbox_head/rtm_cls/0/bias"]), np.full(7, 0.01), rtol=1e-5)
    chex.assert_trees_all_equal(stats, variables[1])


@pytest.mark.user_input("Weights", "classifiers of different numbers of classes by level", "refused with the numbers")
def test_classifiers_must_agree(detector, state):
    mixed = dict(state)
    for name, rows in (("weight", (5, 32, 1, 1)), ("bias", (5,))):
        mixed[f"bbox_head.rtm_cls.0.{name}"] = np.zeros(rows)
    mixed["bbox_head.rtm_cls.1.weight"] = np.zeros((6, 32, 1, 1))
    with pytest.raises(ValueError, match=r"different numbers of classes: \[3, 5, 6\]"):
        weights.from_torch(detector, mixed)
