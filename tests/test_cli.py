"""The command line: what each verb writes, and that mistakes get one sentence before any compute."""

import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from kdjax import cli
from kdjax.detectors import build, convert, weights
from kdjax.detectors.api import flatten
from kdjax.verbs import import_weights

CLASSES = ["disc", "wedge", "star", "cross", "striped", "checked"]


def refused(capsys, *arguments: str) -> str:
    """The one sentence of a command that is refused."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    told = capsys.readouterr().err.strip()
    assert code == 2 and len(told.splitlines()) == 1, told
    return told


def test_help_is_instant_and_names_every_verb():
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "kdjax", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and time.perf_counter() - begun < 5
    assert not {"jax", "numpy", "matplotlib"} & {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    for verb in ("import-weights",):
        assert verb in done.stdout


@pytest.fixture(scope="module")
def state():
    detector = build("rtmdet_pico", 6)
    return detector, convert.to_torch(detector, *detector.init(jax.random.key(3)))


def mmyolo_names(state: dict) -> dict:
    """The state under mmyolo's names, written down here by its module tree."""
    parts = [("bbox_head.", "bbox_head.head_module."), ("neck.reduce_layers.0.", "neck.reduce_layers.2.")]
    parts += [("neck.reduce_layers.1.", "neck.top_down_layers.0.1."), ("neck.out_convs.", "neck.out_layers.")]
    parts += [
        ("neck.top_down_blocks.0.", "neck.top_down_layers.0.0."),
        ("neck.downsamples.", "neck.downsample_layers."),
    ]
    parts += [
        ("neck.top_down_blocks.1.", "neck.top_down_layers.1."),
        ("neck.bottom_up_blocks.", "neck.bottom_up_layers."),
    ]
    found = {}
    for name, value in state.items():
        old, new = next((pair for pair in parts if name.startswith(pair[0])), ("", ""))
        found[new + name.removeprefix(old)] = value
    return found


@pytest.mark.parametrize("source", ["mmdetection", "mmyolo", "mmrazor"])
def test_import_weights(tmp_path, capsys, state, source):
    detector, arrays = state
    arrays = dict(arrays)
    if source == "mmyolo":
        arrays = mmyolo_names(arrays)
        assert not set(arrays) & {name for name in state[1] if name.startswith(("neck.", "bbox_head."))}
    if source == "mmrazor":
        other = convert.to_torch(detector, *detector.init(jax.random.key(4)))
        arrays = {f"teacher.{k}": v for k, v in other.items()} | {f"architecture.{k}": v for k, v in arrays.items()}
    save_file({f"state_dict.{name}": np.array(value) for name, value in arrays.items()}, tmp_path / "w.safetensors")
    (tmp_path / "names.txt").write_text("\n".join(CLASSES) + "\n")
    command = ["import-weights", str(tmp_path / "w.safetensors"), "--detector=rtmdet_pico", f"--out={tmp_path / 'm'}"]
    command += [f"--classes={tmp_path / 'names.txt'}", "--image-size=64,96"]
    assert cli.main(command) == 0 and "550,882" in capsys.readouterr().out
    loaded, params, stats, classes = weights.load(tmp_path / "m")
    assert (loaded.name, classes) == ("rtmdet_pico", CLASSES)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["image_size"] == [64, 96]
    for mine, theirs in zip((params, stats), detector.init(jax.random.key(3)), strict=True):
        for path, value in flatten(theirs).items():
            np.testing.assert_array_equal(flatten(mine)[path], value, err_msg=path)


def test_mmyolos_large_models_have_no_exponential(state):
    theirs = mmyolo_names(state[1])
    assert import_weights.options_of("rtmdet_l", theirs) == {"exp_on_reg": False}
    assert import_weights.options_of("rtmdet_l", state[1]) == import_weights.options_of("rtmdet_s", theirs) == {}


def test_import_weights_refuses(tmp_path, capsys, state):
    file = tmp_path / "w.npz"
    np.savez(file, **state[1])
    (tmp_path / "names.txt").write_text("a\nb\n")
    base = ("import-weights", str(file), f"--out={tmp_path / 'm'}")
    assert "does not name its 6 classes" in refused(capsys, *base, "--detector=rtmdet_pico")
    names = f"--classes={tmp_path / 'names.txt'}"
    assert "has 6 classes, but" in refused(capsys, *base, "--detector=rtmdet_pico", names)
    assert "no detector 'rtmdet_big'" in refused(capsys, *base, "--detector=rtmdet_big", names)
    assert "multiples of 32" in refused(capsys, *base, "--detector=rtmdet_pico", names, "--image-size=100,64")
    (tmp_path / "six.txt").write_text("\n".join(CLASSES))
    assert "do not fit rtmdet_nano" in refused(
        capsys, *base, "--detector=rtmdet_nano", f"--classes={tmp_path / 'six.txt'}"
    )
    assert "There is no file" in refused(
        capsys, "import-weights", str(tmp_path / "no.npz"), "--detector=rtmdet_pico", f"--out={tmp_path / 'm'}"
    )
    assert "required: --detector" in refused(capsys, *base)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    assert "no classifier of RTMDet" in refused(
        capsys, "import-weights", str(tmp_path / "other.npz"), "--detector=rtmdet_pico", f"--out={tmp_path / 'm'}"
    )
    assert not (tmp_path / "m").exists()


def test_pth_tells_its_classes(tmp_path, state):
    torch = pytest.importorskip("torch", reason="reading .pth needs PyTorch")
    arrays = {name: torch.tensor(value) for name, value in state[1].items()}
    for key, meta in (("new", {"dataset_meta": {"classes": tuple(CLASSES)}}), ("old", {"CLASSES": CLASSES})):
        torch.save({"meta": meta, "state_dict": arrays}, tmp_path / f"{key}.pth")
        assert convert.load_checkpoint(tmp_path / f"{key}.pth")[1] == CLASSES
