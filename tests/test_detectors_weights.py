"""Weights in and out: PyTorch's names and wrappers, and the folder that a user takes away."""

import importlib.util
import json
import os
import pickle
import sys
from pathlib import Path, PurePath

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file as load_safetensors
from safetensors.numpy import save_file as save_safetensors

from kdjax import weights
from kdjax.detectors import build
from kdjax.detectors.api import flatten
from kdjax.weights import read, torch_names

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def detector():
    return build("rtmdet_pico", 3)


@pytest.fixture(scope="module")
def variables(detector):
    return detector.init(jax.random.key(0))


@pytest.fixture(scope="module")
def state(detector, variables):
    """A state dict of PyTorch."""
    return weights.to_torch(detector, *variables)


def test_names_are_mmdetections(detector, state):
    assert state["backbone.stem.0.conv.weight"].shape == (4, 3, 3, 3)
    assert state["backbone.stage1.1.blocks.0.conv2.depthwise_conv.conv.weight"].shape == (8, 1, 5, 5)
    assert state["bbox_head.rtm_cls.2.bias"].shape == (3,)
    assert state["neck.out_convs.1.bn.num_batches_tracked"] == 0
    # One array that the levels share has a name for each of them.
    names = torch_names.table(detector)["params/bbox_head/reg_convs/0/1/conv/kernel"]
    assert names == [f"bbox_head.reg_convs.{level}.1.conv.weight" for level in range(3)]
    apart = torch_names.table(build("rtmdet_pico", 3, share_conv=False))
    assert all(len(names) == 1 for names in apart.values())


def test_layout_is_oihw(variables, state):
    kernel = variables[0]["backbone"]["stem"]["0"]["conv"]["kernel"]
    np.testing.assert_array_equal(state["backbone.stem.0.conv.weight"][1, 2], kernel[:, :, 2, 1])


@pytest.mark.parametrize("share", [True, False])
def test_there_and_back(share):
    detector = build("rtmdet_pico", 2, share_conv=share)
    variables = detector.init(jax.random.key(1))
    chex.assert_trees_all_equal(weights.from_torch(detector, weights.to_torch(detector, *variables)), variables)


@pytest.mark.parametrize("prefix", ["module.", "architecture.", "architecture.module.", "student.", "teacher."])
def test_wrapped_networks(detector, variables, state, prefix):
    wrapped = {prefix + name: value for name, value in state.items()}
    chex.assert_trees_all_equal(weights.from_torch(detector, wrapped), variables)


def test_distiller_holds_two_networks(detector, variables, state):
    other = detector.init(jax.random.key(9))
    both = {f"architecture.{name}": value for name, value in state.items()}
    both |= {f"teacher.{name}": value for name, value in weights.to_torch(detector, *other).items()}
    both["distiller.connectors.neck_s0.weight"] = np.zeros((2, 2))
    chex.assert_trees_all_equal(weights.from_torch(detector, both), variables)
    chex.assert_trees_all_equal(weights.from_torch(detector, both, network="teacher"), other)
    with pytest.raises(ValueError, match="student or teacher, not 'assistant'"):
        weights.from_torch(detector, both, network="assistant")


def test_all_differences_in_one_error(detector, state):
    broken = dict(state)
    del broken["neck.out_convs.0.bn.weight"]
    broken["neck.extra.weight"] = np.zeros(3)
    broken["backbone.stem.0.conv.weight"] = np.zeros((4, 3, 5, 5))
    broken["bbox_head.cls_convs.1.0.conv.weight"] = 0 * state["bbox_head.cls_convs.1.0.conv.weight"]
    broken["bbox_head.rtm_reg.0.weight"] = np.zeros((5, 32, 1, 1))
    with pytest.raises(ValueError) as error:
        weights.from_torch(detector, broken)
    for words in (
        "do not fit rtmdet_pico with 3 classes",
        "5 differences",
        "neck.out_convs.0.bn.weight is missing",
        "neck.extra.weight has no place in the detector",
        "backbone.stem.0.conv.weight has shape (4, 3, 5, 5) instead of (4, 3, 3, 3)",
        "bbox_head.cls_convs.2.0.conv.weight should be one shared array but differ",
        "bbox_head.rtm_reg.0.weight has shape (5, 32, 1, 1) instead of (4, 32, 1, 1)",
    ):
        assert words in str(error.value)


def test_new_number_of_classes_starts_the_classifier_anew(detector, variables, state):
    wider = build("rtmdet_pico", 7)
    with pytest.warns(UserWarning, match="classifiers of rtmdet_pico are re-initialised for 7 classes"):
        params, stats = weights.from_torch(wider, state, key=jax.random.key(4))
    fresh, got = flatten(wider.init(jax.random.key(4))[0]), flatten(params)
    old = flatten(variables[0])
    for path in got:
        np.testing.assert_array_equal(got[path], (fresh if "rtm_cls" in path else old)[path], err_msg=path)
    np.testing.assert_allclose(jax.nn.sigmoid(got["bbox_head/rtm_cls/0/bias"]), np.full(7, 0.01), rtol=1e-5)
    chex.assert_trees_all_equal(stats, variables[1])


def test_classifiers_must_agree(detector, state):
    mixed = dict(state)
    for name, rows in (("weight", (5, 32, 1, 1)), ("bias", (5,))):
        mixed[f"bbox_head.rtm_cls.0.{name}"] = np.zeros(rows)
    mixed["bbox_head.rtm_cls.1.weight"] = np.zeros((6, 32, 1, 1))
    with pytest.raises(ValueError, match=r"different numbers of classes: \[3, 5, 6\]"):
        weights.from_torch(detector, mixed)


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
    with pytest.raises(ValueError, match="weights.h5: unknown kind of weights: the kinds are .npz, .saf"):
        weights.read_checkpoint(tmp_path / "weights.h5")
    with pytest.raises(ValueError, match="weights.npz: there is no such file"):
        weights.read_checkpoint(tmp_path / "weights.npz")
    for name in ("broken.npz", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"not arrays at all")
        with pytest.raises(ValueError, match=f"{name}: the weights cannot be read"):
            weights.read_checkpoint(tmp_path / name)
    np.savez(tmp_path / "whole.npz", a=np.arange(1000))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:2000])
    with pytest.raises(ValueError, match="cut.npz: the weights cannot be read"):
        weights.read_checkpoint(tmp_path / "cut.npz")
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights.pth: reading it needs PyTorch: install the extra kdjax\[torch\]"):
        weights.read_checkpoint(tmp_path / "weights.pth")


class Code:
    """Makes a folder when it is unpickled without care."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def spoilt(folder: Path, state: dict) -> dict[str, str]:
    """Writes files that are cut off, empty, of something else or with code in a pickle: name -> words of the refusal.

    The code would make the folder `executed` beside them. Files of PyTorch are among them where it is installed.
    """
    code = {"state_dict": {**state, "code": Code(folder / "executed")}}
    np.savez(folder / "whole.npz", **state)
    save_safetensors(state, folder / "whole.safetensors")
    np.savez(folder / "objects.npz", **state, code=np.array([Code(folder / "executed")], dtype=object))
    np.savez(folder / "words.npz", **state | {"bbox_head.rtm_cls.0.bias": np.array(["a", "b", "c"])})
    np.save(folder / "one.npy", np.zeros(3))
    (folder / "one.npy").rename(folder / "one.npz")
    told = {
        "objects.npz": "allow_pickle=False",
        "words.npz": "is not an array of numbers",
        "one.npz": "it is not an npz file",
    }
    kinds = {"npz": "not an npz file", "safetensors": "Error while deserializing header"}
    if importlib.util.find_spec("torch"):
        import torch

        tensors = {name: torch.tensor(value) for name, value in state.items()}
        torch.save(tensors, folder / "whole.pth")
        torch.save({"state_dict": tensors, "code": Code(folder / "executed")}, folder / "code.pth")
        old = dict(_use_new_zipfile_serialization=False)
        torch.save({"state_dict": tensors, "code": Code(folder / "executed")}, folder / "old.pth", **old)
        torch.save(list(tensors.values()), folder / "list.pth")
        told |= dict.fromkeys(("code.pth", "old.pth"), f"it needs {os.mkdir.__module__}.mkdir")
        told |= {"list.pth": "holds a list, not weights by name"}
        kinds["pth"] = "cannot be read"
    for kind, words in kinds.items():
        whole = (folder / f"whole.{kind}").read_bytes()
        for name, content in (("cut", whole[: len(whole) // 2]), ("empty", b""), ("pickle", pickle.dumps(code))):
            (folder / f"{name}.{kind}").write_bytes(content)
            told[f"{name}.{kind}"] = words
    return told


def test_spoilt_files_are_refused_and_nothing_in_them_runs(tmp_path, state):
    for name, words in spoilt(tmp_path, state).items():
        with pytest.raises(ValueError, match=name) as caught:
            weights.read_checkpoint(tmp_path / name)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileExistsError):  # the code is really there
        (tmp_path / "executed").mkdir()
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


@pytest.fixture
def folder(tmp_path, detector, variables):
    weights.save(tmp_path / "student", detector, *variables, classes=CLASSES, image_size=(64, 96), extra={"AP": 0.5})
    return tmp_path / "student"


def test_folder(folder, detector, variables):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["detector"], config["num_classes"], config["options"]) == ("rtmdet_pico", 3, {})
    assert (config["classes"], config["image_size"], config["extra"]) == (CLASSES, [64, 96], {"AP": 0.5})
    assert set(config["versions"]) == {"kdjax", "jax", "flax", "numpy"}
    names = load_safetensors(folder / "model.safetensors")
    assert "params/backbone/stem/0/conv/kernel" in names and "stats/backbone/stem/0/bn/var" in names
    for path, given in ((folder, None), (folder / "model.safetensors", detector), (folder, build("rtmdet_pico", 9))):
        loaded, params, stats, classes = weights.load(path, given)
        assert (loaded.name, loaded.num_classes, classes) == ("rtmdet_pico", 3, CLASSES)
        chex.assert_trees_all_equal((params, stats), variables)


def test_half_precision(tmp_path, variables):
    detector = build("rtmdet_pico", 3, exp_on_reg=True)
    variables = detector.init(jax.random.key(5))
    sizes = {}
    for dtype in ("float32", "float16"):
        weights.save(tmp_path / dtype, detector, *variables, classes=CLASSES, image_size=(64, 64), dtype=dtype)
        sizes[dtype] = (tmp_path / dtype / "model.safetensors").stat().st_size
    assert sizes["float16"] < 0.55 * sizes["float32"]
    loaded, params, stats, _ = weights.load(tmp_path / "float16")
    assert loaded.options == {"exp_on_reg": True}
    chex.assert_trees_all_equal_dtypes((params, stats), variables)
    chex.assert_trees_all_close((params, stats), variables, rtol=1e-3, atol=1e-6)


def test_saving_again_replaces(folder, detector):
    other = detector.init(jax.random.key(8))
    weights.save(folder, detector, *other, classes=CLASSES, image_size=(64, 64))
    chex.assert_trees_all_equal(weights.load(folder)[1:3], other)
    assert len(list(folder.iterdir())) == 2


def test_pytorch_weights_need_a_detector(tmp_path, detector, variables, state):
    np.savez(tmp_path / "weights.npz", **state)
    loaded, params, stats, classes = weights.load(tmp_path / "weights.npz", detector)
    assert loaded is detector and classes is None
    chex.assert_trees_all_equal((params, stats), variables)
    with pytest.raises(ValueError, match="the file does not name its detector"):
        weights.load(tmp_path / "weights.npz")


def test_weights_that_are_not_finite_are_refused(tmp_path, detector, variables, state):
    broken = jax.tree.map(np.array, variables[0])
    broken["backbone"]["stage1"]["0"]["bn"]["bias"][3] = np.nan
    weights.save(tmp_path / "w", detector, broken, variables[1], classes=CLASSES, image_size=(64, 64))
    with pytest.raises(ValueError, match="w: params/backbone/stage1/0/bn/bias contains NaN or Inf"):
        weights.load(tmp_path / "w")
    name = next(name for name in state if name.endswith("running_var"))
    np.savez(tmp_path / "w.npz", **state | {name: np.full_like(state[name], np.inf)})
    with pytest.raises(ValueError, match="w.npz: stats/.* contains NaN or Inf"):
        weights.load(tmp_path / "w.npz", detector)


def test_save_errors(tmp_path, detector, variables):
    def save(params=variables[0], **options):
        options = {"classes": CLASSES, "image_size": (64, 64)} | options
        weights.save(tmp_path / "w", detector, params, variables[1], **options)

    with pytest.raises(ValueError, match="dtype must be float32 or float16, not 'int8'"):
        save(dtype="int8")
    with pytest.raises(ValueError, match="classes must hold 3 names, not 2"):
        save(classes=["a", "b"])
    with pytest.raises(ValueError, match="backbone/stage1/0/bn/bias holds values beyond float16"):
        large = jax.tree.map(np.asarray, variables[0])
        large["backbone"]["stage1"]["0"]["bn"]["bias"] = np.full(16, 1e6, np.float32)
        save(large, dtype="float16")


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def flip_a_bit(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage, message",
    [
        (flip_a_bit, "its SHA-256 differs"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "its SHA-256 differs"),
        (lambda folder: (folder / "model.safetensors").unlink(), "there is no model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: it cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: it cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json: it cannot be read"),
        (lambda folder: edit(folder, detector="rtmdet_huge"), "unknown detector 'rtmdet_huge'"),
        (lambda folder: edit(folder, num_classes=4, classes=list("abcd")), "it does not fit rtmdet_pico"),
        (lambda folder: edit(folder, num_classes=4), "3 names for 4 classes"),
        (lambda folder: edit(folder, num_classes="3"), "num_classes is '3'"),
        (
            lambda folder: edit(folder, options=["x"]),
            "it cannot be read as the config of weights.*options",
        ),
        (lambda folder: edit(folder, options={"depth": 1}), "rtmdet_pico has no option depth"),
        (lambda folder: edit(folder, image_size=None), "config.json: it cannot be read"),
        (lambda folder: edit(folder, image_size=["64", "64"]), "image_size is"),
        (lambda folder: edit(folder, extra=None), "extra is None"),
        (lambda folder: edit(folder, options={"stacked_convs": 1}), "it does not fit rtmdet_pico"),
    ],
)
def test_damaged_folders(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        weights.load(folder)


def test_folder_of_another_detector(folder, tmp_path):
    with pytest.raises(ValueError, match=r"for rtmdet_pico with options {}, not for rtmdet_nano"):
        weights.load(folder, build("rtmdet_nano", 3))
    with pytest.raises(ValueError, match="nowhere: there are no weights"):
        weights.load(tmp_path / "nowhere")
