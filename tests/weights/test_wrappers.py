"""What programs store around the weights of one network."""

import itertools

import numpy as np
import pytest

from kdjax import weights
from kdjax.detectors import build
from kdjax.weights import torch_names, wrappers

KNOWN = ("module.", "_orig_mod.", "ema.", "model_ema.", "model.", "state_dict.", "model_state_dict.", "ema_state_dict.")


@pytest.mark.user_input(
    "Weights", "`module.`, `_orig_mod.`, `ema.`, `model.` and others, nested", "read: removed as often as they occur"
)
@pytest.mark.parametrize("prefix", [*itertools.product(KNOWN, ("", *KNOWN)), ("module.",) * 3], ids="".join)
def test_known_wrappers_are_removed_as_often_as_they_occur(prefix):
    assert wrappers.unwrap({"".join(prefix) + "conv.weight": 1, "steps": 2}) == {"conv.weight": 1}


@pytest.mark.user_input("Weights", "wrappers inside of names (torch.compile, FSDP)", "read: removed")
@pytest.mark.user_input("Weights", "two arrays that have one name without their wrappers", "refused with the name")
def test_wrappers_inside_of_names():
    state = {"backbone._orig_mod.a.weight": 1, "neck.module._fsdp_wrapped_module.b.bias": 2}
    assert wrappers.unwrap(state) == {"backbone.a.weight": 1, "neck.module.b.bias": 2}
    state = {"backbone.module.stem.0.conv.weight": 1, "model.architecture.module.neck.x": 2}
    assert list(torch_names.plain(build("rtmdet_pico", 3), state)) == ["neck.x"]
    assert list(torch_names.plain(build("rtmdet_pico", 3), {"backbone.module.a": 1})) == ["backbone.a"]
    with pytest.raises(ValueError, match=r"two arrays have the name a\.b when their wrappers are removed"):
        wrappers.unwrap({"module.a.b": 1, "a.b": 2})


@pytest.mark.user_input("Weights", "the optimiser's state and counters beside the weights", "read without them")
def test_what_lies_beside_the_weights_is_left_out():
    assert wrappers.unwrap({"model.a": 1, "optimizer.state.0.exp_avg": 2, "epoch": 3}) == {"a": 1}
    # mmdetection 2 keeps averages as buffers of the model, and swaps the two when it saves.
    assert wrappers.unwrap({"a.weight": 1, "ema_a_weight": 2, "ema_x": 3}) == {"a.weight": 1, "ema_x": 3}


@pytest.mark.user_input("Weights", "an average (EMA) beside the weights", "reported: which of the two is taken")
def test_an_average_beside_the_weights():
    assert wrappers.unwrap({"state_dict.a": 1, "ema_state_dict.module.a": 2}) == {"a": 1}  # mmengine swaps them
    with pytest.warns(
        UserWarning, match="the file holds weights under 'model' and under 'ema': those under 'model' are"
    ):
        assert wrappers.unwrap({"model.a": 1, "ema.module.a": 2}) == {"a": 1}
    with pytest.warns(
        UserWarning, match="the file holds weights without a prefix and under 'model_ema': those without"
    ):
        assert wrappers.unwrap({"a": 1, "model_ema.a": 2}) == {"a": 1}


def test_pairs_stay_until_one_is_chosen():
    pair = {"model.student.module.a": 1, "model.teacher._orig_mod.a": 2, "model.ema.a": 3}
    state = wrappers.unwrap(pair)
    assert wrappers.unwrap(state) == state and set(state) >= {"student.module.a"}
    with pytest.warns(UserWarning, match="under 'ema'"):
        assert wrappers.unwrap(pair, "teacher") == {"a": 2}


@pytest.mark.user_input(
    "Weights", "dicts over 20 deep, of over a million entries, in a circle", "refused with the reason"
)
def test_nested_dicts():
    inner = {"a.weight": np.ones(1), "b": {0: np.zeros(1)}}
    checkpoint = {"epoch": 3, "state_dict": inner, "meta": {"classes": ["x"]}}
    assert list(wrappers.flatten(checkpoint, np.ndarray)) == ["state_dict.a.weight", "state_dict.b.0"]
    with pytest.raises(ValueError, match=r"two arrays have the name b\.0"):
        wrappers.flatten({"b.0": np.zeros(1), **inner}, np.ndarray)
    inner["self"] = checkpoint
    with pytest.raises(ValueError, match=r"state_dict\.self is a dict that holds itself"):
        wrappers.flatten(checkpoint, np.ndarray)
    deep: dict = {}
    for _ in range(25):
        deep = {"x": deep}
    with pytest.raises(ValueError, match="its dicts are nested more than 20 deep"):
        wrappers.flatten(deep, np.ndarray)
    wide: dict = {}
    for _ in range(19):
        wide = {str(k): wide for k in range(4)}  # 4^19 entries in 76 objects
    with pytest.raises(ValueError, match="its dicts have more than 1,000,000 entries"):
        wrappers.flatten(wide, np.ndarray)


@pytest.mark.user_input(
    "Weights",
    "an unknown prefix, or the names of another network",
    "refused: save the weights without it; choose the detector",
)
def test_names_of_other_networks_are_told(detector, state):
    for prefix in ("net.", "a.b."):
        told = rf"its names have the unknown prefix '{prefix}' \({prefix}backbone\.\S+\): save the weights without it"
        with pytest.raises(ValueError, match=told):
            weights.from_torch(detector, {f"model.{prefix}{name}": value for name, value in state.items()})
    told = r"its names \(a, b.x, c, …\) are not those of rtmdet_pico: choose the detector that they are of"
    with pytest.raises(ValueError, match=told):
        weights.from_torch(detector, dict.fromkeys(("a", "b.x", "c", "d"), np.ones(1)))
