"""The command line: help, and mistakes that get one sentence before any compute."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from kdjax import cli, weights
from kdjax.commands import latency
from kdjax.detectors import build
from kdjax.export import packages
from kdjax.inference import predict as prediction
from kdjax.training import run as training
from tests.shared import ROOT
from tests.support.checkpoints import Code
from tests.support.models import CLASSES, read, refused

COMMANDS = (
    "train",
    "study",
    "doctor",
    "cache",
    "compile",
    "predict",
    "label",
    "evaluate",
    "latency",
    "export",
    "import-weights",
    "push",
)


def test_help_is_instant_and_names_every_command():
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "kdjax", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and time.perf_counter() - begun < 5
    assert not {"jax", "numpy", "matplotlib"} & {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    for command in COMMANDS:
        assert command in done.stdout


@pytest.mark.user_input(
    "Models and exports",
    "damaged weights, even if the hash beside them fits",
    "refused by every command, before any compute",
)
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


@pytest.mark.user_input(
    "Config and flags",
    "paths that do not exist or cannot be created",
    "refused with the flag or the path, before any compute",
)
@pytest.mark.user_input(
    "Config and flags", "a number out of range, or text for it", "refused: what it must be, not what it is"
)
@pytest.mark.user_input(
    "Config and flags", "flags that are missing or do not go together", "refused: required: --out; needs --data"
)
@pytest.mark.user_input("Folders and names", "a folder without images for `predict`", "refused: holds no images")
def test_mistakes_get_one_sentence_before_any_compute(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prediction, "program", lambda *_, **__: pytest.fail("computed"))
    one, out = f"--model={made / 'model'}", f"--out={tmp_path / 'o'}"
    given = f"--data={made / 'data'}"
    image = str(made / "data" / "images" / "val" / "val_00000.png")
    (tmp_path / "void").mkdir()
    (tmp_path / "mine").mkdir()
    shutil.copy(image, tmp_path / "mine")
    (tmp_path / "x.txt").write_bytes(b"")
    (tmp_path / "model.pth").write_bytes(b"")
    for arguments, why in (
        (("predict", "nowhere.png", one, out), "nowhere.png: there is no such file or folder"),
        (("predict", str(tmp_path / "void"), one, out), "holds no images"),
        (("predict", str(tmp_path / "x.txt"), one, out), "neither an image nor a video"),
        (("predict", str(tmp_path / "mine"), one, f"--out={tmp_path / 'mine'}"), "outside of --out"),
        (("evaluate", one, "--data=scenes", "--split=train"), "scenes takes no --split"),
        (
            ("export", one, "--format=stablehlo", f"--out={tmp_path / 'x.stablehlo'}", "--data=scenes", "--images=a"),
            "takes no --split",
        ),
        (("latency", one, f"--out={tmp_path}"), "is a folder"),
        (("latency", f"--model={tmp_path / 'x.txt'}"), "x.txt: files that are timed end with .onnx, .xml, "),
        (("latency", one, "--out="), "kdjax latency: --out is empty: give a value, or leave it out"),
        (("latency", "--model", ""), "kdjax latency: --model is empty: give a value, or leave it out"),
        (("compare", "a", ""), "kdjax compare: an argument is empty: give a value, or leave it out"),
        (("train", "--config=quickstart", "--workdir="), "kdjax train: --workdir is empty: give a value"),
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
            ("export", one, "--format=stablehlo", given, f"--out={tmp_path / 'x.stablehlo'}", "--dtype=int8"),
            "is for --format=onnx",
        ),
        (("latency", "--model=nowhere"), "there is no such file or folder"),
        (
            ("train", "--config=quickstart", "--config.data.image_size=axb"),
            "kdjax: --config.data.image_size: it must be integers between commas, not 'axb'",
        ),
        (
            ("doctor", "--config=quickstart", "--config.data.augment.hsv=1,x,2"),
            "kdjax: --config.data.augment.hsv: it must be numbers between commas, not '1,x,2'",
        ),
        (("evaluate", one, given, "--against=nowhere"), "--against: nowhere: there is no such file or folder"),
        (("evaluate", one, given, "--treshold=1"), "kdjax evaluate: unexpected argument '--treshold=1'"),
        (("evaluation", one), "invalid choice: 'evaluation' (did you mean evaluate?)"),
    ):
        assert why in refused(capsys, *arguments), arguments


@pytest.mark.user_input(
    "Config and flags", "a flag or a setting twice", "refused: appears more than once (4, 40): keep one"
)
@pytest.mark.user_input("Config and flags", "a misspelt command, flag or setting", "refused: did you mean --config?")
@pytest.mark.user_input("Config and flags", "a path that begins with `-`", "read after `--`")
def test_flags_that_are_repeated_or_misspelt_are_refused(capsys):
    train = ("train", "--config=quickstart")
    for arguments, told in (
        (
            (*train, "--config.steps=4", "--config.steps=40"),
            "kdjax train: --config.steps appears more than once (4, 40): keep one",
        ),
        (
            (*train, "--config.data.image_size=(64,64)", "--config.data.image_size=(96,96)"),
            "kdjax train: --config.data.image_size appears more than once ((64,64), (96,96)): keep one",
        ),
        (
            (*train, "--workdir", "a", "--workdir", "b"),
            "kdjax train: --workdir appears more than once: keep one",
        ),
        (
            ("train", "--confg=quickstart"),
            "kdjax train: unexpected argument '--confg=quickstart' (did you mean --config?)",
        ),
        (
            (*train, "--optimizer.lr=1"),
            "kdjax train: unexpected argument '--optimizer.lr=1' (did you mean --config.optimizer.lr?)",
        ),
        (
            (*train, "-x"),
            "kdjax train: unexpected argument '-x'; override settings with --config.a.b=value",
        ),
        ((*train, "--steps=5"), "kdjax train: unexpected argument '--steps=5' (did you mean --config.steps?)"),
        (
            ("doctor", "--config=quickstart", "--workdir=a"),
            "kdjax doctor: unexpected argument '--workdir=a': it is a flag of kdjax train and supervise",
        ),
        (("predict", "a", "--modell=b"), "kdjax predict: unexpected argument '--modell=b' (did you mean --model?)"),
        (
            ("trian",),
            "kdjax: invalid choice: 'trian' (did you mean train?): choose from train, supervise, doctor, cache, "
            "compile, replay, study, league, compare, predict, label, evaluate, view, latency, export, import-weights, "
            "push",
        ),
    ):
        assert refused(capsys, *arguments) == f"{told}; see `{told.partition(':')[0]} --help`"
    assert "-a.png: there is no such file" in refused(
        capsys, "predict", "--model=a", "--out=b", "--", "-a.png", "--model"
    )
    for name, told in (
        ("lr", " (did you mean config.optimizer.lr?)"),
        ("optimizer.weight-decay", " (did you mean config.optimizer.weight_decay?)"),
        ("data.imagesize", " (did you mean config.data.image_size?)"),
        ("Optimizer.LR", " (did you mean config.optimizer.lr?)"),
    ):
        one = f"--config.{name}=1"
        assert refused(capsys, *train, "--workdir=a", one) == f"kdjax: unknown setting config.{name}{told}"


@pytest.mark.user_input(
    "The machine", "a full disk while a command runs", "reported: make room, then run the same command again"
)
def test_faults_of_the_machine_get_a_sentence_and_bugs_their_traceback(capsys, monkeypatch):
    def fail(**_):
        raise error

    for command in ("run", "main"):
        for module in (latency, training):
            monkeypatch.setattr(module, command, fail, raising=False)
    error = ValueError('Error writing "/a/b/": [OS error 28: ENOSPC No space left on device]')
    assert cli.main(["latency", "--model=a"]) == 2 == cli.main(["train", "--config=quickstart", "--workdir=a"])
    assert capsys.readouterr().err.splitlines() == [
        "kdjax: /a/b: the disk is full: make room; then run the same command again",
        "kdjax: /a/b: the disk is full: make room; then run the same command again: it continues from the last "
        "checkpoint",
    ]
    error = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["latency", "--model=a"])


@pytest.mark.user_input("The machine", "a terminal without UTF-8", "survived: what it lacks is printed as `\\u732b`")
@pytest.mark.parametrize("encoding", ["ascii", pytest.param("latin-1", marks=pytest.mark.slow), "utf-8"])
def test_a_terminal_that_lacks_a_character_loses_nothing(encoding):
    code = (
        "import sys; from kdjax import cli; from kdjax.commands import latency\n"
        "latency.run = lambda **_: print('1 \\u00b1 2 \\u732b \\udcff') or 0\n"
        "sys.exit(cli.main(['latency', '--model=a']))"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode(encoding) == "1 ± 2 猫 \\udcff\n" if encoding == "utf-8" else b"\\u732b" in done.stdout


@pytest.mark.user_input("The machine", "standard output that goes to a full disk", "reported in one sentence")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="it needs /dev/full")
def test_output_that_cannot_be_printed_gets_a_sentence():
    code = (
        "import sys; from kdjax import cli; from kdjax.commands import latency\n"
        "latency.run = lambda **_: print('table') or 0\n"
        "sys.exit(cli.main(['latency', '--model=a']))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    told = "kdjax: standard output: the disk is full: make room; then run the same command again\n"
    assert (done.returncode, done.stderr) == (2, told)


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
    for command in COMMANDS:
        help_ = subprocess.run(
            [sys.executable, "-m", "kdjax", command, "--help"], capture_output=True, text=True
        ).stdout
        example = help_.split("example:\n")[1].split()
        assert example[:2] == ["kdjax", command]
        if command == "push":  # to the Hub; test_push.py runs it with a stand-in
            continue
        done = subprocess.run([sys.executable, "-m", *example], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
