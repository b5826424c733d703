"""NCNN's files compute the maps that the JAX model computes, in NCNN's own runtime."""

import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from kdjax import cli
from kdjax.commands import latency
from kdjax.errors import UserError
from kdjax.export import graphs, ncnn, packages
from kdjax.inference import load
from tests.support.models import OTHERS, read, refused, save_noisy


def needed() -> None:
    if absent := packages.missing((*packages.NCNN, *packages.ONNX)):  # pnnx cannot be imported without PyTorch
        pytest.skip(f"NCNN needs kdjax[ncnn]: {', '.join(absent)}")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("rtmdet_pico", "float16")]
    + [
        pytest.param(name, "float32", marks=pytest.mark.slow)
        for name in ("rtmdet_pico", *OTHERS)
        if "_ins_" not in name
    ],
)
def test_ncnn_is_the_jax_model(made, name, dtype, tmp_path, capsys, monkeypatch):
    needed()
    if name in OTHERS:
        save_noisy(name, tmp_path / "m")
    folder, file = made / "model" if name not in OTHERS else tmp_path / "m", tmp_path / "files" / "m.param"
    command = ["export", f"--model={folder}", "--format=ncnn", f"--out={file}", f"--data={made / 'data'}"]
    assert cli.main([*command, f"--dtype={dtype}", "--max-ap-loss=100"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"difference from the JAX model \S+e-0[5-9]", told)
    assert dtype != "float32" or "(+0.00)" in told
    assert sorted(path.name for path in file.parent.iterdir()) == ["m.bin", "m.param", "m.param.json"]
    facts, names = read(tmp_path / "files" / "m.param.json"), graphs.map_names(load(folder))
    assert facts["detector"] == name and facts["output"].startswith(", ".join(names) + ": f32[H, W, C]")
    assert facts["input"].startswith("image f32[3, 64, 64], 0 .. 255, RGB")
    # As a user of the file runs it: pixels of OpenCV's or any other order become a Mat with three channels.
    import ncnn as package

    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    network = package.Net()
    assert network.load_param(str(file)) == 0 and network.load_model(str(file.with_suffix(".bin"))) == 0
    extractor = network.create_extractor()
    extractor.input("image", package.Mat.from_pixels(image, package.Mat.PixelType.PIXEL_RGB, 64, 64))
    found = np.array(extractor.extract(names[0])[1])
    wanted = jax.jit(functools.partial(graphs.maps, load(folder)))(image[None])[0][0]
    np.testing.assert_allclose(found, wanted, atol=0.05 * np.abs(wanted).max())  # in float16 where NCNN chooses so
    monkeypatch.setattr(latency, "clock", lambda call, runs, name: dict(median=1.0, p25=1.0, p75=2.0 + bool(call())))
    assert cli.main(["latency", f"--model={file.parent}", "--threads=1"]) == 0
    [row] = [line.split() for line in capsys.readouterr().out.splitlines() if "NCNN" in line]
    assert row[1:3] == ["NCNN", "64x64"] and float(row[3]) == round(int(facts["parameters"]) / 1e6, 3)
    if (name, dtype) == ("rtmdet_pico", "float32"):  # the lines of the page find what `Model.detect` finds
        page = (Path(__file__).parents[2] / "docs" / "targets.md").read_text()
        lines = re.search(r"```python\n(import cv2.*?)```", page, re.DOTALL)[1]
        found = {"canvas": image}
        exec(lines.replace("student.", f"{file.with_suffix('')}."), found)
        wanted = load(folder).detect(image)
        wanted = wanted[wanted.scores > 0.3]
        assert len(found["scores"]) == len(wanted) > 5
        order = np.argsort(-found["scores"])
        np.testing.assert_allclose(found["scores"][order], wanted.scores, atol=0.02)
    bytes_of_weight = file.with_suffix(".bin").stat().st_size / int(facts["parameters"])
    assert facts["dtype"] == dtype and abs(bytes_of_weight - (2 if dtype == "float16" else 4)) < 0.7


@pytest.mark.user_input(
    "Models and exports",
    "NCNN of a detector of two stages, with queries or with masks",
    "refused, with the operator that is missing",
)
@pytest.mark.parametrize(
    ("name", "why"),
    [("faster_rcnn_r18", "its second stage is"), ("rtdetr_pico", "its queries"), ("rtmdet_ins_pico", "its masks")],
)
def test_what_ncnn_cannot_hold_is_refused(name, why, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(packages, "missing", lambda packages: [])
    save_noisy(name, tmp_path / "m")
    command = ("export", f"--model={tmp_path / 'm'}", "--format=ncnn", f"--out={tmp_path / 'x.param'}")
    assert why in (told := refused(capsys, *command)) and "NCNN" in told and told.endswith("use ONNX")


@pytest.mark.parametrize("chosen", [None, [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]])
def test_space_to_depth_becomes_a_convolution(chosen):
    """YOLOX's stem, as jax2onnx writes it: its corners are in another order than ONNX's."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [helper.make_node("SpaceToDepth", ["x"], ["deep" if chosen else "y"], blocksize=2)]
    if chosen:
        nodes.append(helper.make_node("Gather", ["deep", "chosen"], ["y"], axis=1))
    graph = helper.make_graph(
        nodes,
        "stem",
        [helper.make_tensor_value_info("x", floats, [1, 3, 6, 8])],
        [helper.make_tensor_value_info("y", floats, [1, 12, 3, 4])],
        [onnx.numpy_helper.from_array(np.array(chosen, np.int64), "chosen")] if chosen else [],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    x = np.random.default_rng(0).normal(size=(1, 3, 6, 8)).astype(np.float32)

    def outputs():
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, {"x": x})[0]

    before = outputs()
    ncnn.with_convolutions(model)
    assert [node.op_type for node in model.graph.node] == ["Conv"]
    np.testing.assert_array_equal(outputs(), before)


def test_an_operator_that_ncnn_lacks_is_named(tmp_path):
    needed()
    format = pytest.importorskip("onnx")
    helper = format.helper
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=1),
        helper.make_node("Transpose", ["x"], ["y"], perm=[0, 3, 1, 2]),
        helper.make_node("Hardmax", ["y"], ["out"], axis=1),
    ]
    image = helper.make_tensor_value_info("image", 2, [1, 8, 8, 3])
    graph = helper.make_graph(nodes, "g", [image], [helper.make_tensor_value_info("out", 1, [1, 3, 8, 8])])
    opset = helper.make_opsetid("", 19)
    format.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), str(tmp_path / "x.onnx"))
    with pytest.raises(UserError, match="NCNN does not have Hardmax: use another format"):
        ncnn.write(tmp_path / "x.onnx", tmp_path / "x.param")
    assert not (tmp_path / "x.param").exists()


@pytest.mark.user_input(
    "Models and exports",
    "a .param that is damaged, or without its .bin or the json beside it",
    "refused, with the reason",
)
def test_a_damaged_param_is_refused(tmp_path, capsys):
    pytest.importorskip("ncnn", reason="NCNN needs kdjax[ncnn]")
    file, command = tmp_path / "x.param", ("latency", f"--model={tmp_path / 'x.param'}")
    file.write_bytes(b"no graph")
    assert "x.param: NCNN cannot read it" in refused(capsys, *command)
    file.write_text("7767517\n1 1\nInput image 0 1 image\n")
    assert "x.bin: there is no such file" in refused(capsys, *command)
    file.with_suffix(".bin").touch()
    assert "x.param.json, which `kdjax export` writes, does not lie beside it" in refused(capsys, *command)
