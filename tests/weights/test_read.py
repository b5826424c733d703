"""Reading checkpoint files of all kinds, and refusing broken ones."""

import pickle
import sys
from pathlib import PurePath

import chex
import numpy as np
import pytest
from safetensors.numpy import save_file as save_safetensors

from kdjax import weights
from kdjax.weights import read
from tests.support.checkpoints import CLASSES, spoilt


@pytest.mark.parametrize("wrapper", ["", "state_dict.", "ema_state_dict.module.", "model."])
def test_files_of_arrays(tmp_path, detector, variables, state, wrapper):
    arrays = {wrapper + name: value for name, value in state.items()}
    if wrapper.startswith("ema"):
        arrays["ema_state_dict.steps"] = np.zeros((), np.int64)
    np.savez(tmp_path / "weights.npz", **arrays)
    save_safetensors(arrays, tmp_path / "weights.safetensors")
    for file in ("weights.npz", "weights.safetensors"):
        arrays, classes = weights.read_checkpoint(tmp_path / file)
        assert classes is None
        chex.assert_trees_all_equal(weights.from_torch(detector, arrays), variables)


def test_mmengine_keeps_the_average_in_state_dict():
    checkpoint = {"meta": {}, "state_dict": {"a": np.ones(1)}, "ema_state_dict": {"module.a": np.zeros(1)}}
    assert read._unwrap(checkpoint)["a"] == 1


def test_file_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"weights.h5: unknown kind of weights: the kinds are .npz, .saf"):
        weights.read_checkpoint(tmp_path / "weights.h5")
    with pytest.raises(ValueError, match=r"weights.npz: there is no such file"):
        weights.read_checkpoint(tmp_path / "weights.npz")
    for name in ("broken.npz", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"not arrays at all")
        with pytest.raises(ValueError, match=f"{name}: the weights cannot be read"):
            weights.read_checkpoint(tmp_path / name)
    np.savez(tmp_path / "whole.npz", a=np.arange(1000))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut.npz: the weights cannot be read"):
        weights.read_checkpoint(tmp_path / "cut.npz")
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights.pth: reading it needs PyTorch: install the extra kdjax\[torch\]"):
        weights.read_checkpoint(tmp_path / "weights.pth")


def test_spoilt_files_are_refused_and_nothing_in_them_runs(tmp_path, state):
    for name, words in spoilt(tmp_path, state).items():
        with pytest.raises(ValueError, match=name) as caught:
            weights.read_checkpoint(tmp_path / name)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()
    (tmp_path / "executed").mkdir()
    with pytest.raises(FileExistsError):  # the code is really there
        pickle.loads((tmp_path / "pickle.npz").read_bytes())


def test_pth_is_read_as_weights_alone(tmp_path, detector, variables, state):
    torch = pytest.importorskip("torch")
    checkpoint = {"meta": {"epoch": 1}, "state_dict": {k: torch.tensor(v) for k, v in state.items()}}
    torch.save(checkpoint, tmp_path / "weights.pth")
    _, *found, classes = weights.load(tmp_path / "weights.pth", detector)
    chex.assert_trees_all_equal(tuple(found), variables)
    assert classes is None
    for told in (CLASSES, [*CLASSES, "one more"]):
        checkpoint["meta"] = {"dataset_meta": {"classes": tuple(told)}}
        torch.save(checkpoint, tmp_path / "weights.pth")
        assert weights.load(tmp_path / "weights.pth", detector)[3] == (told if told is CLASSES else None)
    checkpoint = {"state_dict": {k: torch.nn.Parameter(torch.tensor(v).float()) for k, v in state.items()}}
    torch.save(checkpoint | {"meta": {"CLASSES": 3}}, tmp_path / "weights.pth")  # parameters, as some save them
    _, *found, classes = weights.load(tmp_path / "weights.pth", detector)
    chex.assert_trees_all_equal(tuple(found), variables)
    assert classes is None
    torch.save({"state_dict": {}, "code": PurePath("x")}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        weights.read_checkpoint(tmp_path / "code.pth")
