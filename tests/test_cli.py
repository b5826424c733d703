"""The command line: what each verb writes, and that mistakes get one sentence before any compute."""

import collections
import contextlib
import hashlib
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image
from safetensors.numpy import save_file

from kdjax import cli, data, nn, weights
from kdjax.boxes.iou import pairwise
from kdjax.commands import evaluate, export, latency, predict
from kdjax.data import records, scenes
from kdjax.detectors import build, layers
from kdjax.detectors.api import flatten, unflatten
from kdjax.evals import coco
from kdjax.inference import model
from kdjax.training import checkpoint, outputs, provenance, sharding
from kdjax.training import config as settings
from kdjax.training.log import Log
from kdjax.training.setup import prepare, run_fingerprint
from tests.shared import ROOT
from tests.support.checkpoints import Code, spoilt
from tests.support.data import coco_json, write_folder
from tests.support.pages import Page

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


def refused_at_the_end(capsys, *arguments: str) -> str:
    """As `refused`, of a command that has shown a bar before."""
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert sum("kdjax:" in line for line in lines) == 1, lines
    return lines[-1]


def test_help_is_instant_and_names_every_verb():
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "kdjax", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and time.perf_counter() - begun < 5
    assert not {"jax", "numpy", "matplotlib"} & {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    for verb in ("train", "study", "doctor", "predict", "evaluate", "latency", "export", "import-weights"):
        assert verb in done.stdout


@pytest.fixture(scope="module")
def state():
    detector = build("rtmdet_pico", 6)
    return detector, weights.to_torch(detector, *detector.init(jax.random.key(3)))


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
    assert "no.npz: there is no such file" in refused(
        capsys, "import-weights", str(tmp_path / "no.npz"), "--detector=rtmdet_pico", f"--out={tmp_path / 'm'}"
    )
    assert "required: --detector" in refused(capsys, *base)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    assert "no classifier of rtmdet_pico" in refused(
        capsys, "import-weights", str(tmp_path / "other.npz"), "--detector=rtmdet_pico", f"--out={tmp_path / 'm'}"
    )
    assert not (tmp_path / "m").exists()


def test_import_weights_of_spoilt_files(tmp_path, capsys, state):
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
        assert f"{name} cannot be read as names" in refused(capsys, *command, f"--classes={tmp_path / name}")
    assert not (tmp_path / "m").exists() and not (tmp_path / "executed").exists()


def test_a_spoilt_model_is_refused_by_every_verb(made, tmp_path, capsys, monkeypatch):
    """Also where the hash beside it is that of the spoilt file."""
    monkeypatch.setattr(model, "program", lambda detector: pytest.fail("computed"))
    monkeypatch.setattr(export, "check_installed", lambda *packages: None)
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
                assert "model.safetensors: it cannot be read" in told or "its SHA-256 differs" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_spoilt_config_of_a_model_is_refused(made, tmp_path, capsys):
    shutil.copytree(made / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    whole = read(file)
    for change, told in (
        ({"image_size": [0, 0]}, "image_size is [0, 0]"),
        ({"extra": {"category_ids": [1, 2]}}, "category_ids is [1, 2], not a number for each of the classes"),
        ({"extra": {"category_ids": [1, 1, 2, 3, 4, 5]}}, "not a number for each"),
        ({"extra": {"category_ids": [[1], 1, 2, 3, 4, 5]}}, "not a number for each"),
        ({"extra": {"category_ids": "123456"}}, "not a number for each"),
    ):
        file.write_text(json.dumps(whole | change))
        assert told in refused(capsys, "evaluate", "--data=scenes", f"--model={tmp_path / 'model'}"), change


def test_a_spoilt_onnx_file_is_refused(tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="ONNX needs kdjax[export]")
    for content in (b"", b"no graph", pickle.dumps({"code": Code(tmp_path / "executed")})):
        (tmp_path / "x.onnx").write_bytes(content)
        assert "x.onnx cannot be read by onnxruntime" in refused(capsys, "latency", f"--model={tmp_path / 'x.onnx'}")
    assert not (tmp_path / "executed").exists()


def test_onnx_files_of_others(tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime", reason="ONNX needs kdjax[export]")
    onnx = pytest.importorskip("onnx")
    monkeypatch.setattr(latency, "clock", lambda call, runs, name: dict(median=1.0 if call() else 0, p25=1.0, p75=2.0))
    command = ("latency", f"--model={tmp_path / 'x.onnx'}")

    def write(*shapes):
        values = [onnx.helper.make_tensor_value_info(f"x{i}", 1, shape) for i, shape in enumerate(shapes)]
        outputs = [onnx.helper.make_tensor_value_info(f"y{i}", 1, None) for i in range(len(shapes))]
        nodes = [onnx.helper.make_node("Relu", [f"x{i}"], [f"y{i}"]) for i in range(len(shapes))]
        graph = onnx.helper.make_graph(nodes, "g", values, outputs)
        opset = onnx.helper.make_opsetid("", 19)
        onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), str(tmp_path / "x.onnx"))

    write((1, 2), ("N", 3, 32, 64))
    assert cli.main(command) == 0 and "32x64" in capsys.readouterr().out
    write((7,))
    assert "takes no image" in refused(capsys, *command)
    write((1, 3, "h", "w"))
    assert "leaves the size of x0 free ([1, 3, 'h', 'w'])" in refused(capsys, *command)
    write((1, 3, 32, 32))
    monkeypatch.setattr(export, "session", lambda path, real=export.session, **rest: _Deaf(real(path, **rest)))
    assert "does not run: no" in refused(capsys, *command)


class _Deaf:
    """A session that cannot be run."""

    def __init__(self, session):
        self.get_inputs, self.get_modelmeta = session.get_inputs, session.get_modelmeta

    def run(self, *_):
        raise RuntimeError("no\nat all")


def test_pth_tells_its_classes(tmp_path, state):
    torch = pytest.importorskip("torch", reason="reading .pth needs PyTorch")
    arrays = {name: torch.tensor(value) for name, value in state[1].items()}
    for key, meta in (("new", {"dataset_meta": {"classes": tuple(CLASSES)}}), ("old", {"CLASSES": CLASSES})):
        torch.save({"meta": meta, "state_dict": arrays}, tmp_path / f"{key}.pth")
        assert weights.read_checkpoint(tmp_path / f"{key}.pth")[1] == CLASSES


def lively(params, seed: int):
    """Kernels through which signals pass: of the detector's own draws all scores are 0.01."""
    rng = np.random.default_rng(seed)
    flat = flatten(params)
    for path, value in flat.items():
        if path.endswith("kernel"):
            gain = 0.3 if "rtm_reg" in path else 3.0
            flat[path] = rng.normal(0, (gain / np.prod(value.shape[:-1])) ** 0.5, value.shape).astype(np.float32)
    return unflatten(flat)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with a model of the scenes, random weights, 64x64, and a COCO folder of six scenes."""
    root = tmp_path_factory.mktemp("cli")
    detector = build("rtmdet_pico", 6)
    for name, seed in (("model", 0), ("other", 1)):
        params, stats = detector.init(jax.random.key(seed))
        weights.save(root / name, detector, lively(params, seed), stats, classes=CLASSES, image_size=(64, 64))
    sizes, annotations, images = {}, [], {}
    for i, (image, encoded) in enumerate(scenes.stream("val", 6)):
        sizes[image.file_name] = (128, 128)
        images[image.file_name] = records.decode(encoded)
        annotations += [(i, 5 * row["category_id"], row["bbox"], {}) for row in image.annotations]
    categories = [(5 * (i + 1), name) for i, name in enumerate(CLASSES)]
    write_folder(root / "data", {"val": coco_json(sizes, annotations, categories)}, images)
    return root


def read(path):
    return json.loads(path.read_text())


def test_predict_finds_what_evaluate_measures(made, tmp_path, capsys):
    folder = made / "data"
    assert cli.main(["predict", str(folder / "images"), f"--model={made / 'model'}", f"--out={tmp_path / 'p'}"]) == 0
    command = ["evaluate", f"--model={made / 'model'}", f"--data={folder}", f"--out={tmp_path / 'e'}"]
    assert cli.main([*command, f"--against={made / 'other'}"]) == 0
    told = capsys.readouterr().out
    images = {entry["id"]: Path(entry["file_name"]).name for entry in read(tmp_path / "p" / "images.json")["images"]}
    truth = read(folder / "annotations" / "instances_val.json")
    names = {entry["file_name"]: entry["id"] for entry in truth["images"]}

    def rows(path, image_id, factor):
        return np.array(
            [[image_id(r["image_id"]), factor * r["category_id"], *r["bbox"], r["score"]] for r in read(path)]
        )

    mine = rows(tmp_path / "p" / "detections.json", lambda i: names[images[i]], 5)
    theirs = rows(tmp_path / "e" / "detections.json", lambda i: i, 1)
    assert len(mine) > 100 and len(set(theirs[:, -1])) > 100
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)
    for name in names:
        assert cv2.imread(str(tmp_path / "p" / "drawn" / "val" / name.replace(".png", ".jpg"))).shape == (128, 128, 3)

    written = read(tmp_path / "e" / "evaluation.json")
    detections = read(tmp_path / "e" / "detections.json")
    assert written["model"]["metrics"] == coco.coco_metrics(truth, detections) != written["other"]["metrics"]
    assert written["model"]["params"] == 550_882
    for entry in written["model"]["classes"].values():
        if entry["objects"]:
            assert np.mean(entry["precision"]) == pytest.approx(entry["AP50"])
    objects = [entry["objects"] for entry in written["model"]["classes"].values()]
    assert [sum(row) for row in written["model"]["confusion"]][:-1] == objects and sum(objects) == len(
        truth["annotations"]
    )
    for word in ("AP75", "difference", "best score", "background", "checked"):
        assert word in told
    page = Page((tmp_path / "e" / "report.html").read_text())
    assert len(page.all("img")) == 6 * 3 and len(page.all("svg")) == sum(n > 0 for n in objects)
    for figure in coco.METRICS:
        assert any(row and row[0].startswith(figure) for row in page.rows)
    again = rows(tmp_path / "e" / "detections_against.json", lambda i: i, 1)
    assert again.shape != theirs.shape or (again != theirs).any()
    assert not re.search(r"""(src|href)=["']?https?:""", (tmp_path / "e" / "report.html").read_text())


def test_predict_names_what_cannot_be_read_and_goes_on(made, tmp_path, capsys):
    good = records.decode((made / "data" / "images" / "val" / "val_00000.png").read_bytes())
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.fromarray(good).save(folder / "a.jpg")
    Image.fromarray(good).save(folder / "a.png")
    cv2.imwrite(str(folder / "deep.png"), good[:, :, ::-1].astype(np.uint16) * 257)
    cv2.imwrite(str(folder / "deep.tif"), good[:, :, ::-1].astype(np.uint16) * 16)  # 12 bits, as of a microscope
    Image.fromarray(good).convert("L").save(folder / "grey.png")
    Image.fromarray(good).convert("CMYK").save(folder / "cmyk.jpg")
    turned = Image.Exif()
    turned[274] = 6
    Image.fromarray(good).save(folder / "turned.jpg", exif=turned)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image\n" * 20)
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:1500])
    (folder / "notes.txt").write_text("left out")
    video = cv2.VideoWriter(str(folder / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for _ in range(3):
        video.write(good[:48, :64])
    video.release()
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "moving.gif").write_bytes(b"GIF89a")
    (tmp_path / "x.gif").write_bytes(b"GIF89a")
    paths = [str(folder), str(tmp_path / "x.gif")]
    assert cli.main(["predict", *paths, f"--model={made / 'model'}", f"--out={folder / 'out'}"]) == 2
    told = [
        line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.strip().startswith("kdjax:")
    ]
    assert len(told) == 8
    for file, why in (
        ("moving.gif", "neither an image nor a video that is known"),
        ("x.gif", "neither an image nor a video that is known"),
        ("empty.png", "it is empty"),
        ("text.jpg", "cannot be read as an image"),
        ("cut.jpg", "truncated"),
        ("broken.mp4", "cannot be read as a video"),
        ("turned.jpg", "EXIF orientation 6"),
        ("deep.tif", "fills less than an eighth"),
    ):
        assert any(file in line and why in line for line in told), (file, told)
    images = read(folder / "out" / "images.json")
    assert [Path(entry["file_name"]).name for entry in images["images"]] == [
        "a.jpg", "a.png", "clip.avi#0", "clip.avi#1", "clip.avi#2", "cmyk.jpg", "deep.png", "deep.tif", "grey.png",
        "turned.jpg",
    ]  # fmt: skip
    assert [entry["name"] for entry in images["categories"]] == CLASSES
    found = {}
    for row in read(folder / "out" / "detections.json"):
        found.setdefault(row["image_id"], []).append(row["score"])
    assert found[2][:5] == pytest.approx(found[7][:5], rel=1e-3)  # 16 bits hold the same image as 8
    drawn = folder / "out" / "drawn"
    assert sorted(path.name for path in drawn.iterdir()) == [
        "a.jpg", "a_.jpg", "clip.mp4", "cmyk.jpg", "deep.jpg", "deep_.jpg", "grey.jpg", "turned.jpg",
    ]  # fmt: skip
    assert int(cv2.VideoCapture(str(drawn / "clip.mp4")).get(cv2.CAP_PROP_FRAME_COUNT)) == 3
    # A second time, what the first wrote is not read.
    assert len(predict.find([str(folder)], folder / "out")) == 13


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_video_that_is_cut_short_is_told(tmp_path, share):
    video = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    rng = np.random.default_rng(0)
    for _ in range(20):
        video.write(rng.integers(0, 255, (48, 64, 3), np.uint8))
    video.release()
    whole = (tmp_path / "clip.avi").read_bytes()
    assert len(list(predict.frames(tmp_path / "clip.avi"))) == 20
    (tmp_path / "clip.avi").write_bytes(whole[: int(share * len(whole))])
    seen = []
    with pytest.raises(ValueError, match=r"clip.avi is broken: only \d+ of its 20 images can be read"):
        seen += [1 for _ in predict.frames(tmp_path / "clip.avi")]


def test_mistakes_get_one_sentence_before_any_compute(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model, "program", lambda detector: pytest.fail("computed"))
    one, out = f"--model={made / 'model'}", f"--out={tmp_path / 'o'}"
    given = f"--data={made / 'data'}"
    image = str(made / "data" / "images" / "val" / "val_00000.png")
    (tmp_path / "void").mkdir()
    (tmp_path / "mine").mkdir()
    shutil.copy(image, tmp_path / "mine")
    (tmp_path / "x.gif").write_bytes(b"")
    (tmp_path / "model.pth").write_bytes(b"")
    for arguments, why in (
        (("predict", "nowhere.png", one, out), "no file or folder nowhere.png"),
        (("predict", str(tmp_path / "void"), one, out), "holds no images"),
        (("predict", str(tmp_path / "x.gif"), one, out), "neither an image nor a video"),
        (("predict", str(tmp_path / "mine"), one, f"--out={tmp_path / 'mine'}"), "outside of --out"),
        (("evaluate", one, "--data=scenes", "--split=train"), "scenes has no --split"),
        (
            ("export", one, "--format=stablehlo", f"--out={tmp_path / 'x'}", "--data=scenes", "--images=a"),
            "has no --split",
        ),
        (("latency", one, f"--out={tmp_path}"), "is a folder"),
        (("latency", one, f"--out={image}/x.json"), "cannot be made"),
        (("predict", image, "--model=nowhere", out), "there is no such folder"),
        (("predict", image, f"--model={tmp_path / 'model.pth'}", out), "import-weights"),
        (("predict", image, f"--model={tmp_path / 'void'}", out), "there is no config.json"),
        (("predict", image, one, out, "--threshold=3"), "a score in 0 .. 1"),
        (("predict", image, one, f"--out={image}"), "cannot be made"),
        (("predict", image, one), "required: --out"),
        (("evaluate", one, "--data=nowhere"), "no such folder"),
        (("evaluate", one, given, "--split=test"), "split 'test': no instances json"),
        (("evaluate", one, given, "--limit=-1"), "number of images"),
        (("export", one, "--format=onnx", f"--out={tmp_path}"), "is a folder"),
        (("export", one, "--format=onnx", f"--out={tmp_path / 'x'}", "--max-ap-loss=1"), "needs --data"),
        (
            ("export", one, "--format=stablehlo", given, f"--out={tmp_path / 'x'}", "--dtype=int8"),
            "needs --format=onnx",
        ),
        (("latency", "--model=nowhere"), "there is no such folder"),
        (("evaluate", one, given, "--against=nowhere"), "there is no such folder"),
        (("evaluate", one, given, "--treshold=1"), "unexpected argument '--treshold=1'"),
        (("evaluation", one), "invalid choice: 'evaluation'"),
    ):
        assert why in refused(capsys, *arguments), arguments


def test_evaluate_refuses_other_classes_and_broken_images(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model, "program", lambda detector: pytest.fail("computed"))
    one = f"--model={made / 'model'}"
    shutil.copytree(made / "data", tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "instances_val.json"
    truth = read(file)
    renamed = [entry | {"name": entry["name"].replace("star", "planet")} for entry in truth["categories"]]
    file.write_text(json.dumps(truth | {"categories": renamed}))
    assert "the data has 'planet'" in refused_at_the_end(capsys, "evaluate", one, f"--data={tmp_path / 'data'}")
    file.write_text(json.dumps(truth | {"annotations": []}))
    assert "hold no object" in refused_at_the_end(capsys, "evaluate", one, f"--data={tmp_path / 'data'}")
    file.write_text(json.dumps(truth))
    (tmp_path / "data" / "images" / "val" / "val_00003.png").write_text("broken")
    assert "val_00003.png: cannot be read" in refused_at_the_end(capsys, "evaluate", one, f"--data={tmp_path / 'data'}")


def test_evaluate_tells_what_is_left_out(made, tmp_path, capsys):
    shutil.copytree(made / "data", tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "instances_val.json"
    truth = read(file)
    first, last = truth["images"][0]["id"], truth["images"][-1]["id"]
    common = {"category_id": truth["categories"][0]["id"], "area": 9, "iscrowd": 0}
    bad = [(first, [1, 1, 0, 3]), (first, [500, 500, 3, 3]), (first, [1, 1, 3, 0]), (last, [1, 1, 0, 3])]
    bad = [common | {"id": 900 + i, "image_id": key, "bbox": bbox} for i, (key, bbox) in enumerate(bad)]
    repaired = common | {"id": 1, "image_id": first, "bbox": [1, 1, 9, 9], "area": -1}
    file.write_text(json.dumps(truth | {"annotations": [repaired, *truth["annotations"], *bad]}))
    evaluate.open_data(str(tmp_path / "data"), "val", "", "", 2)
    [line] = capsys.readouterr().out.splitlines()
    assert line.endswith("left out, as in training: box has no extent (2), box outside the image (1)")
    assert line.startswith("3 boxes of ")


def test_classes_are_matched_by_name(made, tmp_path):
    """The same data with categories in another order gives the same metrics."""
    shutil.copytree(made / "data", tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "instances_val.json"
    truth = read(file)
    file.write_text(json.dumps(truth | {
        "categories": [entry | {"id": 100 - entry["id"]} for entry in truth["categories"]],
        "annotations": [row | {"category_id": 100 - row["category_id"]} for row in truth["annotations"]],
    }))  # fmt: skip
    metrics = []
    for folder in (made / "data", tmp_path / "data"):
        out = tmp_path / folder.parent.name
        assert cli.main(["evaluate", f"--model={made / 'model'}", f"--data={folder}", f"--out={out}"]) == 0
        written = read(out / "evaluation.json")["model"]
        metrics.append({name: entry["AP50"] for name, entry in written["classes"].items()} | written["metrics"])
    assert metrics[0] == pytest.approx(metrics[1])


@pytest.fixture(scope="session")
def finished(made, tmp_path_factory):
    """(workdir, results) of the end of a run, without its training: the start weights are handed out."""
    folder = tmp_path_factory.mktemp("run")
    config = settings.base()
    config.student.update(dict(detector="rtmdet_pico", weights=str(made / "model")))
    config.optimizer.warmup = 1
    config.data.update(dict(cache=str(folder / "cache"), scenes_train=8, scenes_val=10, image_size=(64, 64)))
    config.eval.batch_size = 8
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sharding, "make_mesh", lambda: Mesh(np.array(jax.devices()[:1]), ("data",)))
        setup = prepare(config, data.open_dataset(config.data))
        (folder / "work").mkdir()
        saved = checkpoint.Checkpoints(folder / "half" / "checkpoints", keep=2)
        note = {"next_batch": 1, "run": run_fingerprint(setup), "category_ids": [2, 3, 5, 7, 11, 13]}
        saved.save(1, setup.states, note)
        saved.close()
        provenance.write_config(config, folder / "half")
        with Log(folder / "work", 0) as log:
            log.write(0, "train", {"student/total": 1.0, "seconds": 1.0})
            return folder / "work", outputs.finish(setup, folder / "work", log)


def test_the_model_card_is_true_and_its_example_runs(made, finished, tmp_path, monkeypatch, capsys):
    text = (finished[0] / "student" / "README.md").read_text()
    assert f"initial weights: `{made / 'model'}`" in text and "without a teacher" in text and "gain" not in text
    shutil.copytree(finished[0] / "student", tmp_path / "student")
    Image.fromarray(records.decode(next(scenes.stream("val", 1))[1])).save(tmp_path / "image.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    exec(block, {})
    told = capsys.readouterr().out.splitlines()
    assert len(told) > 10 and all(line.split()[0] in CLASSES for line in told)
    [command] = re.findall(r"^    kdjax (.*)$", text, re.MULTILINE)
    monkeypatch.setattr(
        predict, "run", lambda *, paths, model, **rest: 7 * (Path(paths[0]).exists() and model == "student")
    )
    assert cli.main(command.replace("IMAGES", "image.jpg").split()) == 7


def test_an_unfinished_run_is_read_from_its_checkpoint(made, finished, tmp_path, capsys, monkeypatch):
    half = finished[0].parent / "half"
    loaded, given = model.load(str(half)), model.load(str(made / "model"))
    assert loaded.detector.name == "rtmdet_pico" and loaded.classes == tuple(CLASSES)
    assert loaded.image_size == (64, 64) and loaded.category_ids == (2, 3, 5, 7, 11, 13)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, given.variables)
    for path in (half / "checkpoints", half / "checkpoints" / "1"):
        again = model.load(str(path))
        jax.tree.map(np.testing.assert_array_equal, again.variables, given.variables)
        assert again.folder == half
    told = refused(capsys, "latency", f"--model={half / 'checkpoints' / '7'}")
    assert "there is no such folder" in told
    with monkeypatch.context() as patched:
        note, arrays = checkpoint.arrays(half / "checkpoints", "student/ema/")
        note["run"]["options"] = {"exp_on_reg": False}
        patched.setattr(checkpoint, "arrays", lambda *_, **__: (note, arrays))
        assert model.load(str(half)).detector.options == {"exp_on_reg": False} != loaded.detector.options
        patched.undo()
        patched.setattr(latency, "clock", lambda *_: dict(median=1.0, p25=1.0, p75=2.0))
        patched.setattr(export, "missing", lambda: ["onnx"])
        assert cli.main(["latency", f"--model={half}"]) == 0
    shutil.copytree(half, tmp_path / "half")
    for file in (tmp_path / "half" / "checkpoints").rglob("*"):
        if file.is_file() and file.stat().st_size > 100_000:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
    told = refused(capsys, "evaluate", f"--model={tmp_path / 'half'}", "--data=scenes")
    assert "no checkpoint in" in told and "can be used" in told
    told = refused(capsys, "evaluate", f"--model={tmp_path / 'half' / 'checkpoints' / '1'}", "--data=scenes")
    assert "the checkpoint 1 in" in told and "cannot be used" in told


@pytest.mark.parametrize("what", ["student", "."])
def test_evaluate_gives_the_metrics_of_the_run(finished, tmp_path, what):
    workdir, results = finished
    command = ["evaluate", f"--model={workdir / what}", "--data=scenes", "--limit=10", f"--out={tmp_path}"]
    assert cli.main(command) == 0
    got = read(tmp_path / "evaluation.json")["model"]
    assert got["metrics"] == pytest.approx({name: results["student"][name] for name in coco.METRICS}, abs=1e-6)
    assert {name: got[name] for name in ("params", "flops")} == {
        name: results["student"][name] for name in ("params", "flops")
    }
    mine, theirs = (read(path) for path in (tmp_path / "detections.json", workdir / "detections" / "student.json"))
    np.testing.assert_allclose(*([[*row["bbox"], row["score"]] for row in rows] for rows in (mine, theirs)), atol=1e-4)
    assert read(workdir / "student" / "config.json")["extra"]["category_ids"] == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="session")
def exported(made, tmp_path_factory):
    """A model as ONNX with decoding and suppression, measured on the COCO folder; what was said beside it."""
    pytest.importorskip("jax2onnx", reason="ONNX needs kdjax[export]")
    pytest.importorskip("onnxruntime", reason="ONNX needs kdjax[export]")
    file = tmp_path_factory.mktemp("export") / "model.onnx"
    command = ["export", f"--model={made / 'model'}", "--format=onnx", f"--out={file}", f"--data={made / 'data'}"]
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert cli.main(command) == 0
    return file, told.getvalue()


def test_onnx_is_the_jax_model(made, exported):
    file, told = exported
    assert re.search(r"largest difference from the JAX model \S+e-0[5-9]", told) and "(+0.00)" in told
    session = export.session(file)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == CLASSES and json.loads(facts["image_size"]) == [64, 64]
    assert facts["normalisation"].endswith("BGR, minus 103.53 116.28 123.675, divided by 57.375 57.12 58.395")
    assert facts["AP of JAX"] == facts["AP of this file, float32"] and "6 images" in facts["AP measured on"]
    assert [entry.name for entry in session.get_outputs()] == ["boxes", "scores", "labels"]
    # By another way than the export's own check: as a user of the file would, against `kdjax predict`'s functions.
    loaded = model.load(str(made / "model"))
    image = records.decode((made / "data" / "images" / "val" / "val_00001.png").read_bytes())
    [(_, rows)] = model.detect(loaded, [(1, image)], batch=1)
    canvas, placed = model.on_canvas(image, (64, 64))
    boxes, scores, labels = session.run(None, {"image": canvas[None], "image_size": placed[None]})
    assert len(scores) == len(rows)
    np.testing.assert_allclose(scores, [row["score"] for row in rows], atol=1e-5)
    mine = [[*row["bbox"][:2], row["bbox"][0] + row["bbox"][2], row["bbox"][1] + row["bbox"][3]] for row in rows]
    np.testing.assert_allclose(2 * boxes[:20], mine[:20], atol=1e-3)  # the canvas is half as large
    assert [loaded.category_ids[label] for label in labels[:20]] == [row["category_id"] for row in rows[:20]]


SMALL = {"base_channels": 8, "neck_channels": 8, "head_channels": 8, "stacked_convs": 1}
OTHERS = {
    "retinanet_r18": SMALL,
    "fcos_r18": SMALL | {"groups": 4},
    "gfl_r18": SMALL | {"groups": 4},
    "atss_r18": SMALL | {"groups": 4},
    "yolox_pico": {},
}


def greedy(boxes, scores, *, iou_threshold: float, max_detections: int):
    """ONNX's NonMaxSuppression and the choice behind it, slowly: rows (score, class, candidate), best first."""
    found, overlap = [], np.asarray(pairwise(boxes, boxes))
    for k, row in enumerate(scores):
        kept = []
        for i in sorted(np.flatnonzero(row > 0), key=lambda i: -row[i]):
            if all(overlap[i, j] <= iou_threshold for j in kept):
                kept.append(i)
        found += [(row[i], k, i) for i in kept]
    return sorted(found, reverse=True)[:max_detections]


@pytest.mark.parametrize("name", OTHERS)
def test_candidates_of_onnx_are_those_of_decode(name, monkeypatch):
    """Of random maps, so that nothing has to be compiled but the decoding."""
    detector = build(name, 3, **OTHERS[name])
    loaded = model.Model(None, detector, detector.shapes, tuple("abc"), (1, 2, 3), (64, 64))
    rng = np.random.default_rng(0)
    bins = name.startswith("gfl")  # whose average is in the middle unless they differ much
    maps = [
        (rng.normal(size=level.shape) * spread - shift).astype(np.float32)
        for what, spread, shift in (("cls_logits", 2, 2), ("box_reg", 8 if bins else 1, -1), ("quality", 2, 0))
        for level in getattr(export._spec(loaded), what)
    ]
    monkeypatch.setattr(export, "_portable_maps", lambda model, images: maps)
    assert len(export._names(loaded)) == len(maps)
    limits, size = {}, np.array([[64, 48]])
    compared, scores, boxes = export._portable_candidates(loaded, limits, None, size)
    mine = greedy(np.asarray(compared[0]), np.asarray(scores[0]), **limits)
    wanted = detector.decode(export._output(loaded, maps), size)
    assert len(mine) == int(wanted.valid.sum()) > 10
    np.testing.assert_allclose([row[0] for row in mine], wanted.scores[0][: len(mine)], atol=1e-6)
    np.testing.assert_array_equal([row[1] for row in mine], wanted.labels[0][: len(mine)])
    np.testing.assert_allclose(np.asarray(boxes)[0, [row[2] for row in mine]], wanted.boxes[0][: len(mine)], atol=1e-4)


def save_noisy(name: str, folder: Path) -> None:
    """Weights of another family that find something."""
    detector = build(name, 6, **OTHERS[name])
    params, stats = detector.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    noisy = flatten(params)
    for path, value in noisy.items():
        if "bbox_head" in path:  # and the focal prior taken back
            noisy[path] = value + rng.normal(size=value.shape, scale=0.3).astype(np.float32) + 4 * (value < -4)
    weights.save(folder, detector, unflatten(noisy), stats, classes=CLASSES, image_size=(64, 64))


@pytest.mark.parametrize("name", ["fcos_r18", "yolox_pico"])
def test_onnx_of_other_families(name, tmp_path, capsys):
    pytest.importorskip("jax2onnx", reason="ONNX needs kdjax[export]")
    pytest.importorskip("onnxruntime", reason="ONNX needs kdjax[export]")
    save_noisy(name, tmp_path / "m")
    command = ["export", f"--model={tmp_path / 'm'}", "--format=onnx", f"--out={tmp_path / 'm.onnx'}", "--raw"]
    assert cli.main(command) == 0 and re.search(r"difference from the JAX model \S+e-0[5-9]", capsys.readouterr().out)
    found = [entry.name for entry in export.session(tmp_path / "m.onnx").get_outputs()]
    assert found[0] == "cls_logits_8" and found[-1].startswith("quality_")


@pytest.mark.parametrize("raw", [[], ["--raw"]], ids=["decoded", "raw"])
@pytest.mark.parametrize("name", ["rtmdet_pico", *OTHERS])
def test_litert_is_the_jax_model(made, name, raw, tmp_path, capsys, monkeypatch):
    for package in export.LITERT:
        pytest.importorskip(package, reason="LiteRT needs kdjax[litert]")
    if name in OTHERS:
        save_noisy(name, tmp_path / "m")
    folder, file = made / "model" if name not in OTHERS else tmp_path / "m", tmp_path / "m.tflite"
    command = ["export", f"--model={folder}", "--format=litert", f"--out={file}", f"--data={made / 'data'}", *raw]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert re.search(r"difference from the JAX model \S+e-0[5-9]", told) and "(+0.00)" in told
    facts = read(tmp_path / "m.tflite.json")
    assert facts["detector"] == name and ("boxes f32[1, N, 4]" in facts["output"]) == (not raw)
    reader = export.interpreter(file).get_signature_runner()
    assert list(reader.get_input_details()) == ["image", "image_size"][: 1 if raw else 2]
    names = export._names(model.load(str(folder))) if raw else ["boxes", "scores"]
    assert sorted(reader.get_output_details()) == sorted(names)
    monkeypatch.setattr(latency, "clock", lambda call, runs, name: dict(median=1.0, p25=1.0, p75=2.0 + bool(call())))
    assert cli.main(["latency", f"--model={file}", "--threads=1"]) == 0
    [row] = [line.split() for line in capsys.readouterr().out.splitlines() if "LiteRT" in line]
    assert row[1:3] == ["LiteRT", "64x64"] and float(row[3]) == round(int(facts["parameters"]) / 1e6, 3)


def test_a_spoilt_litert_file_is_refused(tmp_path, capsys):
    pytest.importorskip("ai_edge_litert", reason="LiteRT needs kdjax[litert]")
    for content in (b"", b"no graph", pickle.dumps({"code": Code(tmp_path / "executed")})):
        (tmp_path / "x.tflite").write_bytes(content)
        assert "x.tflite cannot be read by LiteRT" in refused(capsys, "latency", f"--model={tmp_path / 'x.tflite'}")
    assert not (tmp_path / "executed").exists()


def test_what_a_format_needs_is_told(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "missing", lambda packages: list(packages))
    for format, told in (
        ("onnx", "ONNX needs jax2onnx, onnx, onnxruntime: pip install 'kdjax[export]'"),
        ("litert", "LiteRT needs litert_converter, ai_edge_litert: pip install 'kdjax[litert]'"),
    ):
        command = ("export", f"--model={made / 'model'}", f"--format={format}", f"--out={tmp_path / 'x'}")
        assert told in refused(capsys, *command)


def test_nothing_found_is_no_box(exported):
    session = export.session(exported[0])
    feed = {"image": np.zeros((1, 64, 64, 3), np.uint8), "image_size": np.zeros((1, 2), np.int32)}
    assert [value.shape for value in session.run(None, feed)] == [(0, 4), (0,), (0,)]


def test_a_wrong_export_is_refused(made, exported, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "write_onnx", lambda loaded, path, *, raw: shutil.copy(exported[0], path))
    command = ["export", f"--model={made / 'other'}", "--format=onnx", f"--out={tmp_path / 'x.onnx'}"]
    assert "differ from the JAX model's by" in refused_at_the_end(capsys, *command)
    command[1] = f"--model={made / 'model'}"
    running = export.onnx_runner(exported[0])

    def runner(change):
        return lambda path: lambda *inputs: [change(value) for value in running(*inputs)]

    for change, told in (
        (lambda value: value + 2e-3 * (value.dtype == np.float32), "differ from the JAX model's by 0.002"),
        (lambda value: value * np.nan if value.ndim == 2 else value, "hold numbers that are not finite"),
        (lambda value: value[::2], "are other objects than the JAX model's"),
    ):
        monkeypatch.setattr(export, "onnx_runner", runner(change))
        assert told in refused_at_the_end(capsys, *command)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_int8_keeps_to_its_budget(made, exported, tmp_path, capsys, monkeypatch):
    onnx = pytest.importorskip("onnx")
    monkeypatch.setattr(export, "write_onnx", lambda loaded, path, *, raw: shutil.copy(exported[0], path))
    command = ["export", f"--model={made / 'model'}", "--format=onnx", f"--data={made / 'data'}", "--dtype=int8"]
    assert cli.main([*command, f"--out={tmp_path / 'small.onnx'}", "--max-ap-loss=100"]) == 0
    assert "calibrated on the images of val itself" in capsys.readouterr().out
    assert (tmp_path / "small.onnx").stat().st_size < 0.6 * exported[0].stat().st_size
    facts = export.session(tmp_path / "small.onnx").get_modelmeta().custom_metadata_map
    assert facts["dtype"] == "int8" and "AP of this file, int8" in facts
    nodes = onnx.load(str(tmp_path / "small.onnx")).graph.node
    as_bytes = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    kinds = collections.Counter(node.op_type for node in nodes if node.input and node.input[0] in as_bytes)
    assert kinds["Conv"] == sum(node.op_type == "Conv" for node in nodes)
    assert kinds["Sigmoid"] == kinds["Mul"] > kinds["Conv"] / 2  # SiLUs, and no score or box
    assert kinds["Sigmoid"] < sum(node.op_type == "Sigmoid" for node in nodes)
    # A loss is made sure of, since the AP of random weights may as well rise.
    monkeypatch.setattr(export, "aps", lambda *arguments, **options: (0.40, 0.37))
    refusal = refused_at_the_end(capsys, *command, f"--out={tmp_path / 'no.onnx'}")
    assert "int8 loses 3.00 points of AP (40.00 to 37.00), more than --max-ap-loss=1" in refusal
    assert not (tmp_path / "no.onnx").exists()
    assert "--data" in refused(capsys, *[part for part in command if "--data" not in part], f"--out={tmp_path / 'n'}")


def test_portable_forms_are_the_others(made):
    """What is traced for other runtimes computes the same; both forms are also compared through ONNX above."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 8, 6, 4)).astype(np.float32)
    kernel, wise = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 1, 4, 5), (5, 5, 1, 4)))
    scale, bias, mean, var = rng.uniform(0.5, 2, (4, 4)).astype(np.float32)
    for function in (
        lambda: nn.conv2d(x, kernel),
        lambda: nn.conv2d(x, wise, groups=4, stride=2),
        lambda: nn.batch_norm(x, scale, bias, mean, var),
        lambda: layers.max_pool(x, 5, padding=2),
        lambda: layers.max_pool(x, 3, stride=2, padding=1),
        lambda: nn.upsample_nearest(x),
    ):
        wanted = function()
        with nn.portable():
            np.testing.assert_allclose(function(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_stablehlo_is_the_jax_model(made, tmp_path, capsys):
    file = tmp_path / "model.stablehlo"
    assert cli.main(["export", f"--model={made / 'model'}", "--format=stablehlo", f"--out={file}", "--raw"]) == 0
    assert read(tmp_path / "model.stablehlo.json")["detector"] == "rtmdet_pico"
    exported = jax.export.deserialize(file.read_bytes())
    assert exported.platforms == ("cpu", "cuda", "tpu") and len(exported.out_avals) == 6
    loaded = model.load(str(made / "model"))
    image = np.full((1, 64, 64, 3), 90, np.uint8)
    for mine, theirs in zip(exported.call(image), jax.jit(lambda x: export.maps(loaded, x))(image), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_latency(made, exported, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "write_onnx", lambda loaded, path, *, raw: shutil.copy(exported[0], path))
    monkeypatch.setattr(latency, "clock", lambda call, runs, name: dict(median=1.0 * runs, p25=1.0, p75=2.0))
    table = tmp_path / "t.json"
    command = ["latency", f"--model={made / 'model'}", f"--model={exported[0]}", "--runs=3", f"--out={table}"]
    assert cli.main([*command, "--threads=1"]) == 0
    rows = read(table)["rows"]
    assert [row["runtime"] for row in rows] == ["XLA", "onnxruntime", "onnxruntime"]
    assert {(row["params"], row["flops"]) for row in rows} == {(550_882, 9_254_656)}
    assert rows[2]["bytes"] == exported[0].stat().st_size and all(row["image_size"] == [64, 64] for row in rows)
    told = capsys.readouterr().out
    assert "1 thread, 3 runs after 20 to warm up" in told and told.count("64x64") == 3
    assert "--threads=99999" in refused(capsys, "latency", f"--model={made / 'model'}", "--threads=99999")


def test_the_clock_leaves_the_warm_up_out():
    calls = []
    times = latency.clock(lambda: time.sleep(0.02 if len(calls) < latency.WARM_UP else 0) or calls.append(1), 5, "x")
    assert len(calls) == latency.WARM_UP + 5 and 0 <= times["p25"] <= times["median"] <= times["p75"] < 15


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
    for verb in ("train", "study", "doctor", "predict", "evaluate", "latency", "export", "import-weights"):
        help_ = subprocess.run([sys.executable, "-m", "kdjax", verb, "--help"], capture_output=True, text=True).stdout
        example = help_.split("example:\n")[1].split()
        assert example[:2] == ["kdjax", verb]
        done = subprocess.run([sys.executable, "-m", *example], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
