"""The command line: help, and mistakes that get one sentence before any compute."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
import time

import cv2
import jax
import numpy as np
import pytest

from kdjax import weights
from kdjax.detectors import build
from kdjax.export import packages
from kdjax.inference import predict as prediction
from tests.shared import ROOT
from tests.support.checkpoints import Code
from tests.support.models import CLASSES, read, refused


def test_help_is_instant_and_names_every_command():
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "kdjax", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and time.perf_counter() - begun < 5
    assert not {"jax", "numpy", "matplotlib"} & {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    for command in ("train", "study", "doctor", "predict", "evaluate", "latency", "export", "import-weights"):
        assert command in done.stdout


def test_a_damaged_model_is_refused_by_every_command(made, tmp_path, capsys, monkeypatch):
    """Also where the hash beside it is that of the damaged file."""
    monkeypatch.setattr(prediction, "program", lambda *_, **__: pytest.fail("computed"))
    monkeypatch.setattr(packages, "check_installed", lambda *packages: None)
    shutil.copytree(made / "model", tmp_path / "model")
    file, beside = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    whole = file.read_bytes()
    code = pickle.dumps({"code": Code(tmp_path / "executed")})
    for content in (b"", whole[: len(whole) // 2], whole[:-1], code):
        file.write_bytes(content)
        for digest in (read(beside)["sha256"], hashlib.sha256(content).hexdigest()):
            beside.write_text(json.dumps(read(beside) | {"sha256": digest}))
            for arguments in (
                ("predict", str(made / "data" / "images"), f"--out={tmp_path / 'o'}"),
                ("evaluate", "--data=scenes"),
                ("evaluate", "--data=scenes", f"--against={made / 'model'}"),
                ("export", "--format=onnx", f"--out={tmp_path / 'x.onnx'}"),
                ("latency",),
            ):
                told = refused(capsys, *arguments, f"--model={tmp_path / 'model'}")
                assert "model.safetensors: the weights cannot be read" in told or "its SHA-256 differs" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_mistakes_get_one_sentence_before_any_compute(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prediction, "program", lambda *_, **__: pytest.fail("computed"))
    one, out = f"--model={made / 'model'}", f"--out={tmp_path / 'o'}"
    given = f"--data={made / 'data'}"
    image = str(made / "data" / "images" / "val" / "val_00000.png")
    (tmp_path / "void").mkdir()
    (tmp_path / "mine").mkdir()
    shutil.copy(image, tmp_path / "mine")
    (tmp_path / "x.gif").write_bytes(b"")
    (tmp_path / "model.pth").write_bytes(b"")
    for arguments, why in (
        (("predict", "nowhere.png", one, out), "nowhere.png: there is no such file or folder"),
        (("predict", str(tmp_path / "void"), one, out), "holds no images"),
        (("predict", str(tmp_path / "x.gif"), one, out), "neither an image nor a video"),
        (("predict", str(tmp_path / "mine"), one, f"--out={tmp_path / 'mine'}"), "outside of --out"),
        (("evaluate", one, "--data=scenes", "--split=train"), "scenes takes no --split"),
        (
            ("export", one, "--format=stablehlo", f"--out={tmp_path / 'x'}", "--data=scenes", "--images=a"),
            "takes no --split",
        ),
        (("latency", one, f"--out={tmp_path}"), "is a folder"),
        (("latency", one, f"--out={image}/x.json"), "cannot be created"),
        (("predict", image, "--model=nowhere", out), "--model: nowhere: there is no such file or folder"),
        (("predict", image, f"--model={tmp_path / 'model.pth'}", out), "import-weights"),
        (("predict", image, f"--model={tmp_path / 'void'}", out), "there is no config.json"),
        (("predict", image, one, out, "--threshold=3"), "a score in 0 .. 1"),
        (("predict", image, one, f"--out={image}"), "cannot be created"),
        (("predict", image, one), "required: --out"),
        (("evaluate", one, "--data=nowhere"), "there is no folder nowhere"),
        (("evaluate", one, given, "--split=test"), "split 'test': no instances json"),
        (("evaluate", one, given, "--limit=-1"), "--limit must be >= 0 (0: all images), not -1"),
        (("export", one, "--format=onnx", f"--out={tmp_path}"), "is a folder"),
        (("export", one, "--format=onnx", f"--out={tmp_path / 'x'}", "--max-ap-loss=1"), "needs --data"),
        (
            ("export", one, "--format=stablehlo", given, f"--out={tmp_path / 'x'}", "--dtype=int8"),
            "needs --format=onnx",
        ),
        (("latency", "--model=nowhere"), "there is no such file or folder"),
        (("evaluate", one, given, "--against=nowhere"), "--against: nowhere: there is no such file or folder"),
        (("evaluate", one, given, "--treshold=1"), "unexpected argument '--treshold=1'"),
        (("evaluation", one), "invalid choice: 'evaluation'"),
    ):
        assert why in refused(capsys, *arguments), arguments


@pytest.mark.slow
def test_the_examples_of_the_help_run(made, state, tmp_path):
    """Word for word, in a folder with what they speak of."""
    torch, _ = (pytest.importorskip(name, reason=f"an example needs {name}") for name in ("torch", "jax2onnx"))
    for folder in ("assets", "configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    shutil.copytree(made / "data" / "images" / "val", tmp_path / "photos")
    video = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (64, 48))
    video.write(np.full((48, 64, 3), 90, np.uint8))
    video.release()
    tiny = build("rtmdet_tiny", 6)
    arrays = {
        name: torch.tensor(value) for name, value in weights.to_torch(tiny, *tiny.init(jax.random.key(0))).items()
    }
    torch.save({"meta": {"dataset_meta": {"classes": CLASSES}}, "state_dict": arrays}, tmp_path / "rtmdet_tiny.pth")
    for command in ("train", "study", "doctor", "predict", "evaluate", "latency", "export", "import-weights"):
        help_ = subprocess.run(
            [sys.executable, "-m", "kdjax", command, "--help"], capture_output=True, text=True
        ).stdout
        example = help_.split("example:\n")[1].split()
        assert example[:2] == ["kdjax", command]
        done = subprocess.run([sys.executable, "-m", *example], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
