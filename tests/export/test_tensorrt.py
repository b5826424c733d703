"""ONNX files have only what TensorRT's reader takes; see tests/export/tensorrt.py."""

import shutil

import numpy as np
import pytest

from kdjax.export import onnx
from kdjax.inference import load
from tests.export import tensorrt
from tests.support.models import OTHERS, TRANSFORMERS, TWO_STAGES, save_noisy


def test_tensorrt_takes_what_is_written(exported, tmp_path):
    assert tensorrt.complaints(exported[0]) == []
    half = tmp_path / "half.onnx"
    shutil.copy(exported[0], half)
    onnx.halve(half)
    assert tensorrt.complaints(half) == []


def test_what_tensorrt_does_not_take_is_found(tmp_path):
    """Of an operator, a type, a number and a domain that it does not take."""
    format = pytest.importorskip("onnx")
    helper = format.helper
    nodes = [
        helper.make_node("NonZero", ["kept"], ["rows"]),
        helper.make_node("Compress", ["x", "kept"], ["y"], axis=0),
        helper.make_node("TopK", ["x", "k"], ["best", "order"]),
        helper.make_node("Gelu", ["x"], ["z"], domain="com.microsoft"),
    ]
    inputs = [helper.make_tensor_value_info("x", 1, [9]), helper.make_tensor_value_info("kept", 9, [9])]
    k = format.numpy_helper.from_array(np.array([tensorrt.TOP_K]), "k")
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("best", 1, None)], [k])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    format.save(helper.make_model(graph, opset_imports=opsets), str(tmp_path / "x.onnx"))
    wanted = ["Compress", "NonZero of type 9", "TopK of [3840]", "com.microsoft Gelu", "opset 21"]
    assert tensorrt.complaints(tmp_path / "x.onnx") == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OTHERS, *TWO_STAGES, *TRANSFORMERS])
def test_tensorrt_takes_every_family(name, tmp_path):
    pytest.importorskip("jax2onnx", reason="ONNX needs kdjax[export]")
    pytest.importorskip("onnxruntime", reason="ONNX needs kdjax[export]")
    save_noisy(name, tmp_path / "m")
    onnx.write(load(tmp_path / "m"), tmp_path / "m.onnx")
    assert tensorrt.complaints(tmp_path / "m.onnx") == []
