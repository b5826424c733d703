"""`kdjax import-weights`."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from kdjax import cli, weights
from kdjax.detectors import build
from kdjax.detectors.api import flatten
from tests.support.checkpoints import spoilt
from tests.support.models import CLASSES, mmyolo_names, refused


@pytest.mark.parametrize("source", ["mmdetection", "mmyolo", "mmrazor"])
def test_import_weights(tmp_path, capsys, state, source):
    detector, arrays = state
    arrays = dict(arrays)
    if source == "mmyolo":
        arrays = mmyolo_names(arrays)
        assert not set(arrays) & {name for name in state[1] if name.startswith(("neck.", "bbox_head."))}
    if source == "mmrazor":
        other = weights.to_torch(detector, *detector.init(jax.random.key(4)))
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


def test_mmyolos_large_models_have_no_exponential(tmp_path):
    for name, options in (("rtmdet_m", {}), ("rtmdet_m", {"exp_on_reg": True}), ("rtmdet_s", {})):
        detector = build(name, 3, widen=0.0625, deepen=0.1, **options)
        state = weights.to_torch(detector, *detector.init(jax.random.key(3)))
        for theirs in (False, True):
            np.savez(tmp_path / "w.npz", **(mmyolo_names(state) if theirs else state))
            loaded = weights.load(tmp_path / "w.npz", detector)[0]
            told = {"exp_on_reg": False} if theirs and (name, options) == ("rtmdet_m", {}) else {}
            assert loaded.options == detector.options | told


def test_import_weights_refuses(tmp_path, capsys, state):
    file = tmp_path / "w.npz"
    np.savez(file, **state[1])
    (tmp_path / "names.txt").write_text("a\nb\n")
    base = ("import-weights", str(file), f"--out={tmp_path / 'm'}")
    assert "does not name its 6 classes" in refused(capsys, *base, "--detector=rtmdet_pico")
    names = f"--classes={tmp_path / 'names.txt'}"
    assert "has 6 classes, but" in refused(capsys, *base, "--detector=rtmdet_pico", names)
    assert "unknown detector 'rtmdet_big'" in refused(capsys, *base, "--detector=rtmdet_big", names)
    assert "multiples of 32" in refused(capsys, *base, "--detector=rtmdet_pico", names, "--image-size=100,64")
    (tmp_path / "six.txt").write_text("\n".join(CLASSES))
    assert "do not fit rtmdet_nano" in refused(
        capsys, *base, "--detector=rtmdet_nano", f"--classes={tmp_path / 'six.txt'}"
    )
    assert "there is no such file or folder" in refused(
        capsys, "import-weights", str(tmp_path / "no.npz"), "--detector=rtmdet_pico", f"--out={tmp_path / 'm'}"
    )
    assert "required: --detector" in refused(capsys, *base)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    assert "no classifier of rtmdet_pico" in refused(
        capsys, "import-weights", str(tmp_path / "other.npz"), "--detector=rtmdet_pico", f"--out={tmp_path / 'm'}"
    )
    assert not (tmp_path / "m").exists()


def test_import_weights_of_damaged_files(tmp_path, capsys, state):
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    names = f"--classes={tmp_path / 'names.txt'}"
    told = spoilt(tmp_path, state[1])
    for name, words in told.items():
        command = ("import-weights", str(tmp_path / name), "--detector=rtmdet_pico", f"--out={tmp_path / 'm'}", names)
        assert words in refused(capsys, *command), name
    (tmp_path / "x.json").write_text('{"images": [], "annotations": [], "categories": [{"id": 1}]}')
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00\x81")
    for name in ("x.json", "x.txt"):
        command = ("import-weights", str(tmp_path / "whole.npz"), "--detector=rtmdet_pico", f"--out={tmp_path / 'm'}")
        assert f"{name} cannot be read as class names" in refused(capsys, *command, f"--classes={tmp_path / name}")
    assert not (tmp_path / "m").exists() and not (tmp_path / "executed").exists()


def test_pth_tells_its_classes(tmp_path, state):
    torch = pytest.importorskip("torch", reason="reading .pth needs PyTorch")
    arrays = {name: torch.tensor(value) for name, value in state[1].items()}
    for key, meta in (("new", {"dataset_meta": {"classes": tuple(CLASSES)}}), ("old", {"CLASSES": CLASSES})):
        torch.save({"meta": meta, "state_dict": arrays}, tmp_path / f"{key}.pth")
        assert weights.read_checkpoint(tmp_path / f"{key}.pth")[1] == CLASSES
