"""`kdjax export`."""

import collections
import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest

from kdjax import cli
from kdjax.commands import export
from kdjax.detectors.api import flatten, unflatten
from kdjax.errors import UserError
from kdjax.export import graphs, onnx, packages, targets, verify
from kdjax.inference import load
from tests.shared import ROOT
from tests.support.models import random_output, refused, refused_at_the_end, save_noisy


@pytest.mark.user_input(
    "Models and exports", "an export without the packages of its format", "refused: `pip install 'kdjax[export]'`"
)
def test_what_a_format_needs_is_reported(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(packages, "missing", lambda packages: list(packages))
    for format, told in (
        ("onnx", "ONNX needs jax2onnx, onnx, onnxruntime: pip install 'kdjax[export]'"),
        ("openvino", "OpenVINO needs openvino, jax2onnx, onnx, onnxruntime: pip install 'kdjax[openvino]'"),
        ("ncnn", "NCNN needs ncnn, pnnx, jax2onnx, onnx, onnxruntime: pip install 'kdjax[ncnn]'"),
        ("litert", "LiteRT needs litert_converter, ai_edge_litert: pip install 'kdjax[litert]'"),
    ):
        name = f"x{export.SUFFIXES[format]}"
        command = ("export", f"--model={made / 'model'}", f"--format={format}", f"--out={tmp_path / name}")
        assert told in refused(capsys, *command)


@pytest.mark.user_input(
    "Folders and names",
    "`--out` of a file that is read, or that belongs to a model or a run",
    "refused: nothing of them is overwritten",
)
def test_no_file_of_a_model_or_run_is_overwritten(made, tmp_path, capsys):
    shutil.copytree(made / "model", tmp_path / "run" / "student")
    (tmp_path / "run" / "metrics.jsonl").touch()
    (tmp_path / "mine.onnx").write_text("mine")
    model = f"--model={tmp_path / 'run' / 'student'}"
    for out, told in (
        ("run/student/model.safetensors", "is a file of a model: choose another name"),
        ("run/student/config.json", "is a file of a model: choose another name"),
        ("run/results.json", "is a file of a run: choose another name"),
        ("run/detections/student.json", "is a file of a run: choose another name"),
    ):
        assert told in refused(capsys, "latency", model, f"--out={tmp_path / out}")
        assert told in refused(capsys, "export", model, "--format=stablehlo", f"--out={tmp_path / out}")
        assert told in refused(capsys, "label", model, "--data=.", "--threshold=0.5", f"--out={tmp_path / out}")
    file = tmp_path / "mine.onnx"
    assert "is also what is read" in refused(capsys, "latency", f"--model={file}", f"--out={file}")
    assert file.read_text() == "mine"
    assert "must end with .onnx" not in refused(capsys, "export", f"--model={file}", "--format=onnx", f"--out={file}")
    for format, name, there, why in (
        ("onnx", "mine.onnx", "mine.onnx", "is there, and `kdjax export` did not write it: choose another name"),
        ("stablehlo", "a.stablehlo", "a.stablehlo", "is there, and `kdjax export` did not write it"),
        ("stablehlo", "b.stablehlo", "b.stablehlo.json", "b.stablehlo.json is there, and `kdjax export` did not"),
        ("openvino", "a.xml", "a.bin", "its weights would replace a.bin: take another name"),
        ("stablehlo", "notes.txt", "notes.txt", "must end with .stablehlo"),
    ):
        if not packages.missing(export.PACKAGES[format]) or format == "openvino":
            (tmp_path / there).write_text("mine")
            assert why in refused(capsys, "export", model, f"--format={format}", f"--out={tmp_path / name}")
            assert (tmp_path / there).read_text() == "mine"


@pytest.mark.user_input(
    "Config and flags",
    "flags of an export that contradict each other, or its format",
    "refused: what the format is written in, or how its files are named",
)
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "--format or --target is missing: formats are onnx, openvino, ncnn, litert, stablehlo"),
        (["--target=phone", "--format=onnx"], "--target=phone is for --format=litert, not onnx: leave one of the two"),
        (["--format=litert", "--dtype=float16"], "--dtype=float16 is for --format=onnx and openvino and ncnn, not li"),
        (["--format=ncnn", "--dtype=int8"], "--dtype=int8 is for --format=onnx and openvino and litert, not ncnn"),
        (["--target=raspberry_pi", "--out=x.param"], "a file in float16 needs --data=DIR, on which AP is"),
        (["--format=onnx", "--batch=00"], "--batch must be a number of images >= 1, or dynamic, not '00'"),
        (["--format=onnx", "--batch=0"], "--batch must be a number of images >= 1, or dynamic, not '0'"),
        (["--format=onnx", "--batch=-1"], "--batch must be a number of images >= 1, or dynamic, not '-1'"),
        (["--format=stablehlo", "--batch=dynamic"], "--batch=dynamic is for ONNX and OpenVINO: stablehlo files take"),
        (["--format=openvino"], "x.onnx: the name of a file for openvino must end with .xml"),
        (["--format=onnx", "--out=student"], "--out=student: the name of a file for onnx must end with .onnx"),
        (["--format=litert", "--out=x.onnx"], "--out=x.onnx: the name of a file for litert must end with .tflite"),
        (["--target=cpu"], "a file in int8 needs --data=DIR, on which AP is measured: "),
        (["--format=onnx", "--limit=5"], "--limit is for the data of --data, which is not given"),
        (["--format=onnx", "--annotations=a.json"], "--annotations is for the data of --data, which is not given"),
        (["--format=onnx", "--exif=stored"], "--exif is for the data of --data, which is not given"),
        (["--format=onnx", "--data=scenes", "--max-ap-loss=-1"], "--max-ap-loss must be a number of points of AP >= 0"),
        (["--target=all", "--out=files"], "--target=all needs --data=DIR, on which AP is measured"),
        (["--target=all", "--batch=4", "--out=files"], "--batch: with --target=all each target has its own: leave it"),
        (["--format=openvino", "--out=other.xml"], "its weights, other.bin, would be those of other.param"),
    ],
)
def test_flags_that_contradict_each_other(flags, told, made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.param").touch()
    out = [] if any(flag.startswith("--out=") for flag in flags) else ["--out=x.onnx"]
    assert told in refused(capsys, "export", f"--model={made / 'model'}", *out, *flags)


def test_a_target_has_a_format_that_can_be_written(capsys):
    for name, target in targets.TARGETS.items():
        form = export._form(None, None, False, None, name)
        assert (form.format, form.dtype) == (target.format, target.dtype), name
        assert form.raw == (targets.NMS[form.format] == "outside: maps"), name
        assert form.batch == (0 if target.batch == "dynamic" else 1), name
    assert export._form(None, "float32", False, "4", "nvidia_gpu") == ("onnx", "float32", False, 4)
    with pytest.raises(SystemExit):
        cli.main(["export", "--help"])
    printed, page = capsys.readouterr().out, (ROOT / "docs" / "targets.md").read_text()
    for row in targets.table()[1:]:
        assert re.search(r"  +".join(map(re.escape, row)), printed), row
        assert f"| `{row[0]}` | {' | '.join(row[1:])} |" in page, row


@pytest.mark.user_input(
    "Models and exports",
    "a target of `--target=all` that the model or the machine cannot have",
    "reported in a table, exit code 1; the others are written",
)
def test_all_targets_are_written_but_those_that_cannot_be(made, tmp_path, capsys, monkeypatch):
    """With two targets in a format that needs no packages, and one whose packages are missing."""
    chosen = {name: targets.TARGETS[name] for name in ("tpu", "phone")} | {"again": targets.TARGETS["tpu"]}
    monkeypatch.setattr(targets, "TARGETS", chosen)
    monkeypatch.setattr(packages, "missing", lambda needed=packages.ONNX: list(needed))
    measured, average_precision = [], verify.average_precision
    monkeypatch.setattr(
        verify, "average_precision", lambda *args, run: measured.append(run) or average_precision(*args, run=run)
    )
    command = [
        "export",
        f"--model={made / 'model'}",
        "--target=all",
        f"--data={made / 'data'}",
        f"--out={tmp_path / 'x'}",
    ]
    assert cli.main(command) == 1
    told = capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        name + end for name in ("again.stablehlo", "tpu.stablehlo") for end in ("", ".json")
    ]
    assert re.search(r"^tpu +tpu\.stablehlo +float32 +[\d.-]+ +[\d.-]+ +[\d.]+ +\d+$", told, re.MULTILINE)
    assert "phone: not written: LiteRT needs litert_converter, ai_edge_litert: pip install 'kdjax[litert]'" in told
    assert [run is None for run in measured] == [True, False, False]  # AP in JAX is measured once


@pytest.mark.user_input(
    "Models and exports", "an exported file that gives other detections", "refused: no file is left"
)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda value: value + 2e-3 * (value.dtype == np.float32), "differ from the JAX model's by 0.002"),
        pytest.param(
            lambda value: value * np.nan if value.ndim == 2 else value,
            "hold numbers that are not finite",
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda value: value[::2], "are not the detections of the JAX model", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_export_is_refused(change, told, made, exported, tmp_path, capsys, monkeypatch):
    running = onnx.runner(exported[0])
    monkeypatch.setattr(onnx, "write", lambda loaded, path, *, raw, batch=1: shutil.copy(exported[0], path))
    monkeypatch.setattr(onnx, "runner", lambda path: lambda *inputs: [change(value) for value in running(*inputs)])
    command = ["export", f"--model={made / 'model'}", "--format=onnx", f"--out={tmp_path / 'x.onnx'}"]
    assert told in refused_at_the_end(capsys, *command)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_export_of_another_model_is_refused(made, exported, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(onnx, "write", lambda loaded, path, *, raw, batch=1: shutil.copy(exported[0], path))
    command = ["export", f"--model={made / 'other'}", "--format=onnx", f"--out={tmp_path / 'x.onnx'}"]
    assert "differ from the JAX model's by" in refused_at_the_end(capsys, *command)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_wrong_export_of_equal_scores_is_refused(made):
    """All places are taken by detections with one score, so that any others of that score would be right too."""
    loaded = load(made / "model")
    classifiers = tuple(f"{path}/" for path in loaded.detector.classifiers)
    params = {
        path: np.zeros_like(value) if path.startswith(classifiers) else value
        for path, value in flatten(loaded.variables[0]).items()
    }
    loaded = dataclasses.replace(loaded, variables=(unflatten(params), loaded.variables[1]), image_size=(256, 256))
    image = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    found = loaded.detect(image)
    assert len(found) == 300 and len(set(found.scores.tolist())) == 1
    right = [found.boxes, found.scores, found.labels]
    for wrong, change in enumerate([None, (0, np.zeros_like), (1, lambda s: s + 0.1), (2, lambda k: k + 100)]):
        outputs = list(right)
        if change:
            outputs[change[0]] = change[1](right[change[0]])
        difference = verify.compare(loaded, lambda *_, given=outputs: given, [image], raw=False).difference
        assert (difference > verify.TOLERANCE) == bool(wrong), (wrong, difference)


@pytest.mark.user_input(
    "Models and exports", "an int8 file that loses more AP than `--max-ap-loss`", "refused: no file is left"
)
@pytest.mark.slow
def test_int8_keeps_to_its_budget(made, exported, tmp_path, capsys, monkeypatch):
    format = pytest.importorskip("onnx")
    monkeypatch.setattr(onnx, "write", lambda loaded, path, *, raw, batch=1: shutil.copy(exported[0], path))
    command = ["export", f"--model={made / 'model'}", "--format=onnx", f"--data={made / 'data'}", "--dtype=int8"]
    assert cli.main([*command, f"--out={tmp_path / 'small.onnx'}", "--max-ap-loss=100"]) == 0
    assert "calibrated on the split val, on which AP is measured too" in capsys.readouterr().out
    assert (tmp_path / "small.onnx").stat().st_size < 0.6 * exported[0].stat().st_size
    facts = onnx.session(tmp_path / "small.onnx").get_modelmeta().custom_metadata_map
    assert facts["dtype"] == "int8" and "AP of this file, int8" in facts
    nodes = format.load(str(tmp_path / "small.onnx")).graph.node
    as_bytes = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    kinds = collections.Counter(node.op_type for node in nodes if node.input and node.input[0] in as_bytes)
    assert kinds["Conv"] == sum(node.op_type == "Conv" for node in nodes)
    assert kinds["Sigmoid"] == kinds["Mul"] > kinds["Conv"] / 2  # SiLUs, and no score or box
    assert kinds["Sigmoid"] < sum(node.op_type == "Sigmoid" for node in nodes)
    # The loss is set by hand: the AP of random weights may rise as well.
    monkeypatch.setattr(verify, "average_precision", lambda *_, run: {"AP": 0.40 if run is None else 0.37})
    refusal = refused_at_the_end(capsys, *command, f"--out={tmp_path / 'no.onnx'}")
    assert "int8 loses 3.00 points of AP (40.00 to 37.00), more than --max-ap-loss=1" in refusal
    assert not (tmp_path / "no.onnx").exists()
    command = [part for part in command if "--data" not in part]
    assert "--data" in refused(capsys, *command, f"--out={tmp_path / 'no.onnx'}")


def test_float16_is_the_network_alone(made, exported, tmp_path, capsys, monkeypatch):
    """Inputs, outputs, boxes and NMS stay in float32, and the detections are those of float32 nearly."""
    format = pytest.importorskip("onnx")
    monkeypatch.setattr(onnx, "write", lambda loaded, path, *, raw, batch: shutil.copy(exported[0], path))
    file = tmp_path / "half.onnx"
    command = ["export", f"--model={made / 'model'}", "--format=onnx", f"--data={made / 'data'}", "--dtype=float16"]
    assert cli.main([*command, f"--out={file}", "--max-ap-loss=100"]) == 0
    assert file.stat().st_size < 0.55 * exported[0].stat().st_size
    session, whole = onnx.session(file), onnx.session(exported[0])
    assert session.get_modelmeta().custom_metadata_map["dtype"] == "float16"
    assert [(one.name, one.type) for one in session.get_outputs()] == [
        (one.name, one.type) for one in whole.get_outputs()
    ]
    graph = format.shape_inference.infer_shapes(format.load(str(file))).graph
    types = {one.name: one.type.tensor_type.elem_type for one in graph.value_info}
    half, single = format.TensorProto.FLOAT16, format.TensorProto.FLOAT
    [nms] = [node for node in graph.node if node.op_type == "NonMaxSuppression"]
    assert [types[name] for name in nms.input[:2]] == [single, single]
    assert all(types[node.output[0]] == half for node in graph.node if node.op_type == "Conv")
    feed = {"image": np.zeros((1, 64, 64, 3), np.uint8), "image_size": np.array([[64, 64]], np.int32)}
    feed["image"][:, 20:40, 20:40] = 200
    found, wanted = session.run(None, feed)[1], whole.run(None, feed)[1]
    assert len(found) > 20 and not np.array_equal(found, wanted)
    np.testing.assert_allclose(found[:20], wanted[:20], atol=0.02)


@pytest.mark.user_input(
    "Models and exports", "LiteRT of a detector of masks", "refused without `--raw`: masks are computed behind the NMS"
)
def test_masks_are_not_decoded_in_litert(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(packages, "missing", lambda packages: [])
    save_noisy("rtmdet_ins_pico", tmp_path / "m")
    command = ("export", f"--model={tmp_path / 'm'}", "--format=litert", f"--out={tmp_path / 'x.tflite'}")
    assert "its masks are computed behind an NMS, which a LiteRT file cannot hold" in refused(capsys, *command)


@pytest.mark.user_input(
    "Models and exports",
    "an export of a two-stage detector with `--raw`, or to LiteRT",
    "refused: the second stage needs boxes",
)
def test_two_stages_have_no_maps(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(packages, "missing", lambda packages: [])
    save_noisy("faster_rcnn_r18", tmp_path / "m")
    command = ["export", f"--model={tmp_path / 'm'}"]
    told = refused(capsys, *command, "--format=onnx", "--raw", f"--out={tmp_path / 'x.onnx'}")
    assert "has two stages, and the second has no maps" in told
    told = refused(capsys, *command, "--format=litert", f"--out={tmp_path / 'x.tflite'}")
    assert "its second stage is computed behind an NMS" in told


@pytest.mark.parametrize("name", ["rtmdet_ins_pico", pytest.param("mask_rcnn_r18", marks=pytest.mark.slow)])
def test_wrong_masks_are_refused(name, tmp_path, monkeypatch):
    """Of random maps, so that nothing has to be compiled but the decoding."""
    save_noisy(name, tmp_path / "m")
    loaded = load(tmp_path / "m")
    output = random_output(loaded)
    monkeypatch.setattr(graphs, "network", lambda model, images: output)
    found = jax.jit(loaded.detector.decode)(output, np.array([[64, 64]]))
    right = [np.asarray(value[0])[np.asarray(found.valid[0])] for value in found[:3] + found[4:]]
    image = np.zeros((64, 64, 3), np.uint8)
    assert len(right[0]) > 50
    for shift in (0, 1e-6, 1.0):
        outputs = [*right[:3], right[3] + np.float32(shift)]
        agreement = verify.compare(loaded, lambda *_, given=outputs: given, [image], raw=False)
        assert agreement.difference < verify.TOLERANCE
        assert (agreement.mask_iou < verify.MASK_IOU) == (shift == 1.0), agreement
    with pytest.raises(UserError, match="the exported masks have an IoU of 0"):
        verify.check(loaded, lambda *_: outputs, [image], raw=False)
