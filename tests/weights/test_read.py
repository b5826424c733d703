"""Reading checkpoint files of all kinds, and refusing broken ones."""

import pickle
import sys
from pathlib import PurePath

import chex
import numpy as np
import pytest
from safetensors.numpy import save_file as save_safetensors

from kdjax import weights
from kdjax.detectors import build
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


@pytest.mark.user_input("Weights", "an unknown suffix, or no such file", "refused with the kinds that are read")
@pytest.mark.user_input("Weights", "a .pth without PyTorch", "refused: install the extra `kdjax[torch]`")
def test_file_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"weights.h5: unknown kind of weights: the kinds are .npz, .saf"):
        weights.read_checkpoint(tmp_path / "weights.h5")
    with pytest.raises(ValueError, match=r"weights.npz: there is no such file"):
        weights.read_checkpoint(tmp_path / "weights.npz")
    for name in ("broken.npz", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"\0not arrays at all")
        with pytest.raises(ValueError, match=f"{name}: it is not a file of npz, safetensors or PyTorch, or its begin"):
            weights.read_checkpoint(tmp_path / name)
    np.savez(tmp_path / "whole.npz", a=np.arange(1000))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut.npz: the weights cannot be read"):
        weights.read_checkpoint(tmp_path / "cut.npz")
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "weights.pth").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match=r"weights.pth: reading it needs PyTorch: install the extra kdjax\[torch\]"):
        weights.read_checkpoint(tmp_path / "weights.pth")


@pytest.mark.user_input("Weights", "code in a pickle, a .pth or an npz", "refused: kdjax never runs code from a file")
@pytest.mark.user_input("Weights", "an npz, safetensors or .pth cut in half", "refused: the file is damaged or cut off")
def test_spoilt_files_are_refused_and_nothing_in_them_runs(tmp_path, state):
    for name, words in spoilt(tmp_path, state).items():
        with pytest.raises(ValueError, match=name) as caught:
            weights.read_checkpoint(tmp_path / name)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()
    (tmp_path / "executed").mkdir()
    with pytest.raises(FileExistsError):  # the code is really there
        pickle.loads((tmp_path / "pickle.npz").read_bytes())


@pytest.mark.user_input("Weights", "an .onnx whose data lies outside of its folder", "refused")
@pytest.mark.user_input(
    "Weights", "an .onnx with onnx older than 1.21", "refused: older ones may read files outside of the folder"
)
def test_onnx_reads_nothing_outside_of_its_folder(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx", reason="reading .onnx needs kdjax[export]")
    (tmp_path / "secret").write_bytes(np.ones(9, np.float32).tobytes())
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "w.onnx"

    def write(location: str):
        kernel = onnx.numpy_helper.from_array(np.ones((1, 1, 3, 3), np.float32), "w")
        onnx.external_data_helper.set_external_data(kernel, location)
        kernel.ClearField("raw_data")
        kernel.data_location = onnx.TensorProto.EXTERNAL
        conv = onnx.helper.make_node("Conv", ["x", "w"], ["y"])
        sides = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy"]
        file.write_bytes(
            onnx.helper.make_model(onnx.helper.make_graph([conv], "g", *zip(sides), [kernel])).SerializeToString()
        )

    (tmp_path / "in" / "data").write_bytes((tmp_path / "secret").read_bytes())
    write("data")
    assert weights.read_checkpoint(file)[0]["onnx.0.weight"].sum() == 9
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    for location in ("../secret", "x/../../secret", str(tmp_path / "secret"), "link"):
        write(location)
        with pytest.raises(ValueError, match=r"w\.onnx: the weights cannot be read: "):
            weights.read_checkpoint(file)
    monkeypatch.setattr(onnx, "__version__", "1.20.1")
    with pytest.raises(
        ValueError, match=r"w\.onnx: reading it needs onnx 1\.21 or newer, not 1\.20\.1: older ones may read"
    ):
        weights.read_checkpoint(file)


@pytest.mark.user_input("Weights", "a .pth of parameters, or one that names its classes", "read")
@pytest.mark.user_input("Weights", "a .pth that names more classes than it has", "refused with both numbers")
def test_pth_is_read_as_weights_alone(tmp_path, detector, variables, state):
    torch = pytest.importorskip("torch")
    checkpoint = {"meta": {"epoch": 1}, "state_dict": {k: torch.tensor(v) for k, v in state.items()}}
    torch.save(checkpoint, tmp_path / "weights.pth")
    _, *found, classes = weights.load(tmp_path / "weights.pth", detector)
    chex.assert_trees_all_equal(tuple(found), variables)
    assert classes is None
    checkpoint["meta"] = {"dataset_meta": {"classes": tuple(CLASSES)}}
    torch.save(checkpoint, tmp_path / "weights.pth")
    assert weights.load(tmp_path / "weights.pth", detector)[3] == CLASSES
    with pytest.warns(UserWarning, match="re-initialised for 5 classes"):
        assert weights.load(tmp_path / "weights.pth", build("rtmdet_pico", 5))[3] is None
    checkpoint["meta"] = {"dataset_meta": {"classes": (*CLASSES, "one more")}}
    torch.save(checkpoint, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth: it has 3 classes, but its own metadata names 4$"):
        weights.load(tmp_path / "weights.pth", detector)
    checkpoint = {"state_dict": {k: torch.nn.Parameter(torch.tensor(v).float()) for k, v in state.items()}}
    torch.save(checkpoint | {"meta": {"CLASSES": 3}}, tmp_path / "weights.pth")  # parameters, as some save them
    _, *found, classes = weights.load(tmp_path / "weights.pth", detector)
    chex.assert_trees_all_equal(tuple(found), variables)
    assert classes is None
    torch.save({"state_dict": {}, "code": PurePath("x")}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="it cannot be loaded safely: it needs pathlib"):
        weights.read_checkpoint(tmp_path / "code.pth")
