"""Files in int8 of models that were trained for it compute what the JAX model computes with rounded values."""

import collections
import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from kdjax import cli, weights
from kdjax.commands import arguments
from kdjax.detectors import build
from kdjax.detectors.api import switched
from kdjax.errors import UserError
from kdjax.export import graphs, int8, litert, onnx, openvino, packages, verify
from kdjax.inference.model import Model
from tests.support.int8 import observed, tiny
from tests.support.models import CLASSES, OTHERS, read, refused, refused_at_the_end

IMAGES = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), np.uint8)


def model_of(detector, variables, names=("a", "b", "c")):
    return Model(
        path=Path("model"),
        detector=detector,
        variables=variables,
        class_names=tuple(names),
        category_ids=tuple(range(1, 1 + len(names))),
        image_size=(64, 64),
    )


@pytest.fixture(scope="module")
def small():
    detector = tiny()
    return model_of(detector, observed(detector, IMAGES))


def differences(model, call):
    """For each map the differences from the JAX model, in steps of its bytes, or relative where it has none."""
    network = jax.jit(functools.partial(graphs.maps, model))
    pairs = [(jax.device_get(network(image[None])), call(image[None])) for image in IMAGES]
    for maps in zip(*(zip(own, exported, strict=True) for own, exported in pairs), strict=True):
        own, exported = (np.concatenate([one[k] for one in maps]) for k in (0, 1))
        assert np.isfinite(exported).all()
        yield own, exported


def test_the_bytes_of_onnx_are_those_of_jax(small, tmp_path):
    format = pytest.importorskip("onnx")
    pytest.importorskip("jax2onnx")
    onnx.write(small, tmp_path / "m.onnx", raw=True)
    step = (
        float(small.variables[1]["cls"]["outputs"]["0"]["high"] - small.variables[1]["cls"]["outputs"]["0"]["low"])
        / 255
    )
    (logits, found), (boxes, found_boxes) = differences(small, onnx.runner(tmp_path / "m.onnx"))
    steps = np.abs(logits - found) / step
    assert np.abs(steps - np.rint(steps)).max() < 1e-2, "both are whole steps"
    assert steps.max() <= 16 and steps.mean() < 1 and np.median(steps) < 0.1, (steps.max(), steps.mean())
    assert np.abs(np.log(boxes / found_boxes)).mean() < 0.05
    # The bytes of the kernels are those that training rounded to.
    graph = format.load(str(tmp_path / "m.onnx")).graph
    format.checker.check_model(str(tmp_path / "m.onnx"))
    kernels = [one for one in graph.initializer if one.data_type == format.TensorProto.UINT8 and len(one.dims) == 4]
    assert len(kernels) == sum(node.op_type == "Conv" for node in graph.node) - 1  # the normalisation is in float
    trained = np.asarray(small.variables[0]["cls"]["kernel"])[0, 0].T
    [classifier] = [format.numpy_helper.to_array(one) for one in kernels if one.dims[0] == 3]
    wanted = np.rint(trained / (np.abs(trained).max(1, keepdims=True) / 127))
    np.testing.assert_array_equal(classifier[:, :, 0, 0].astype(int) - int8.ZERO, wanted)


def test_onnxruntime_computes_with_bytes(small, tmp_path):
    format = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("jax2onnx")
    onnx.write(small, tmp_path / "m.onnx", raw=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "runs.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = collections.Counter(node.op_type for node in format.load(str(tmp_path / "runs.onnx")).graph.node)
    assert kinds["QLinearConv"] == 12 and kinds["Conv"] == 1  # the normalisation of the image
    assert kinds["QLinearSigmoid"] == 7 and kinds["QLinearConcat"] == kinds["QLinearAdd"] == 1
    assert kinds["QLinearGlobalAveragePool"] == kinds["MaxPool"] == 1 and not kinds["Relu"] + kinds["Max"]
    assert kinds["QLinearMul"] == 9 and not kinds["Mul"]  # also of the hard-swish, and of the channel attention


def test_litert_computes_with_bytes(small, tmp_path):
    for package in packages.LITERT:
        pytest.importorskip(package, reason="LiteRT needs kdjax[litert]")
    litert.write(small, tmp_path / "m.tflite", raw=True)
    (logits, found), _ = differences(small, litert.runner(tmp_path / "m.tflite", small, raw=True))
    assert np.abs(logits - found).mean() < 0.05 * logits.std()
    running = litert.interpreter(tmp_path / "m.tflite")
    kinds = {one["index"]: one["dtype"].__name__ for one in running.get_tensor_details()}
    convs = [kinds[op["inputs"][0]] for op in running._get_ops_details() if "CONV_2D" in op["op_name"]]
    assert collections.Counter(convs) == {"int8": 12, "float32": 1}
    plain = graphs.in_dtype(small, "float32")
    litert.write(plain, tmp_path / "float.tflite", raw=True)
    for own, exported in differences(plain, litert.runner(tmp_path / "float.tflite", plain, raw=True)):
        np.testing.assert_allclose(exported, own, rtol=1e-4, atol=1e-4)


def test_the_float_network_of_the_model_has_another_file(small):
    rounded, plain = (graphs.maps(graphs.in_dtype(small, dtype), IMAGES[:1])[0] for dtype in ("int8", "float32"))
    assert 0 < np.abs(np.asarray(rounded) - np.asarray(plain)).mean() < 0.3 * np.std(plain)
    never = model_of(small.detector, (small.variables[0], switched(small.variables[1], np.float32(0))))
    with pytest.raises(UserError, match="was not trained with rounded values yet"):
        graphs.in_dtype(never, "int8")


def test_other_detections_are_refused(small, monkeypatch):
    detections = small.detector.decode(graphs.network(small, IMAGES[:1]), np.array([[64, 64]], np.int32))
    boxes, scores, labels = (np.asarray(one[0])[np.asarray(detections.valid[0])] for one in detections[:3])
    assert np.count_nonzero(scores >= verify.SURE) >= 10
    share, count = verify.check_int8(small, lambda *_: (boxes, scores, labels), IMAGES[:1], raw=False)
    assert share == 1.0 and count == 2 * np.count_nonzero(scores >= verify.SURE)
    for wrong, told in (
        ((boxes * 0, scores, labels), "share 0% of their detections"),
        ((boxes, scores - 0.2, labels), "of their detections with a score of at least 0.3, less than 90%"),
        ((boxes, scores, labels + 100), "share 0% of their detections"),
        ((boxes * np.nan, scores, labels), "hold numbers that are not finite"),
    ):
        with pytest.raises(UserError, match=told):
            verify.check_int8(small, lambda *_, given=wrong: given, IMAGES[:1], raw=False)


@pytest.mark.user_input(
    "Models and exports",
    "int8 without `--data` of a model that was not trained for int8, or for several images of one that was",
    "refused",
)
def test_what_int8_needs(made, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(packages, "missing", lambda packages: [])
    command = ("export", f"--model={made / 'model'}", "--dtype=int8")
    for format, name in (("onnx", "x.onnx"), ("openvino", "x.xml"), ("litert", "x.tflite")):
        told = refused(capsys, *command, f"--format={format}", f"--out={tmp_path / name}")
        assert "needs --data=DIR" in told and "model was not trained for int8" in told
    monkeypatch.setattr(arguments, "load_model", lambda path: small)
    command += (f"--out={tmp_path / 'x.onnx'}",)
    told = refused(capsys, *command, "--format=onnx", "--batch=4")
    assert "--batch=4" in told and "trained for int8, and its files in int8 take one image" in told
    assert "--batch=dynamic" in refused(capsys, *command, "--target=nvidia_gpu")


@pytest.mark.parametrize(
    ("target", "name", "needed"),
    [
        ("cpu", "m.onnx", packages.ONNX),
        ("intel_cpu", "m.xml", (*packages.OPENVINO, *packages.ONNX)),
        ("phone", "m.tflite", packages.LITERT),
    ],
)
def test_a_target_takes_the_trained_scales_without_data(target, name, needed, small, tmp_path, capsys, monkeypatch):
    if absent := packages.missing(needed):  # OpenVINO is imported by kdjax alone, which leaves its telemetry out
        pytest.skip(f"the format needs {', '.join(absent)}")
    monkeypatch.setattr(arguments, "load_model", lambda path: small)
    for wrong in ((onnx, "quantise"), (litert, "quantise"), (verify, "check")):  # of a model in float
        monkeypatch.delattr(*wrong)
    file = tmp_path / name
    assert cli.main(["export", "--model=m", f"--target={target}", f"--out={file}"]) == 0
    told = capsys.readouterr().out
    [share, count] = re.search(r"shared with the JAX model in int8: (\S+)% of (\d+)", told).groups()
    assert float(share) >= 90 and int(count) >= 50
    if target == "intel_cpu":
        facts = {key.replace("_", " "): value for key, value in openvino.metadata(file).items()}
        assert "FakeQuantize" in file.read_text()
    elif target == "cpu":
        facts = onnx.session(file).get_modelmeta().custom_metadata_map
    else:
        facts = read(tmp_path / f"{name}.json")
    assert facts["dtype"] == "int8" and "largest difference from JAX, float32" not in facts
    assert any(key.startswith("detections shared with JAX") for key in facts)
    before = file.read_bytes()
    monkeypatch.setattr(verify, "SAME", 1.1)
    told = refused_at_the_end(capsys, "export", "--model=m", f"--target={target}", f"--out={file}")
    assert "the exported file and the JAX model share" in told and file.read_bytes() == before


CASES = {
    "rtmdet_pico": {},
    "yolox_pico": {"activation": "relu"},
    "fcos_r18": OTHERS["fcos_r18"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_detectors_export_as_they_were_trained(made, name, tmp_path, capsys):
    """A byte that differs early changes others: bounds are on means over a map, relative to its deviation."""
    pytest.importorskip("jax2onnx")
    detector = build(name, len(CLASSES), int8=True, **CASES[name])
    variables = jax.tree.map(np.asarray, observed(detector, IMAGES, calm=True))
    weights.save(tmp_path / "m", detector, *variables, classes=CLASSES, image_size=(64, 64))
    sizes = {}
    for dtype in ("int8", "float32"):
        file = tmp_path / f"{dtype}.onnx"
        model = graphs.in_dtype(model_of(detector, variables, CLASSES), dtype)
        onnx.write(model, file, raw=True)
        sizes[dtype] = file.stat().st_size
        for own, exported in differences(model, onnx.runner(file)):
            away = np.abs(own - exported).mean() / max(
                own.std(), 0.1 * np.abs(own).mean()
            )  # a single cell: no deviation
            assert away < (0.1 if dtype == "int8" else 1e-4), (dtype, own.shape, away)
    assert sizes["int8"] < 0.35 * sizes["float32"]
    out = tmp_path / "m.onnx"
    assert cli.main(["export", f"--model={tmp_path / 'm'}", "--format=onnx", f"--out={out}", "--dtype=float32"]) == 0
    assert onnx.session(out).get_modelmeta().custom_metadata_map["dtype"] == "float32"
