"""ONNX files, in float32 and int8; needs `kdjax[export]`."""

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from kdjax import nn
from kdjax.errors import UserError
from kdjax.export import graphs, operators
from kdjax.inference import predict
from kdjax.inference.model import Model

if TYPE_CHECKING:
    import onnxruntime
    from onnx import ModelProto, NodeProto

OPSET = 19


def write(model: Model, path: str | Path, *, raw: bool = False) -> None:
    """Writes the model as an ONNX file in float32 for one image.

    The batch norms are folded into the convolutions and the transpositions cancelled by onnxruntime's own basic
    optimisations, which stay inside the standard's operators.

    Args:
      model: from `kdjax.inference.load`.
      path: the file.
      raw: the head's maps instead of detections.

    Reference: ONNX's operators, https://onnx.ai/onnx/operators/, opset 19.

    Raises:
      UserError: see `graphs.check`.
    """
    graphs.check(model, raw=raw)
    path = Path(path)
    names = graphs.map_names(model) if raw else graphs.detection_names(model)
    with quiet():
        import jax2onnx
        import onnx

        operators.register()
        with nn.portable(), nn.replaced(**operators.REPLACED):
            graph = jax2onnx.to_onnx(
                functools.partial(graphs.maps if raw else graphs.detections, model),
                graphs.inputs(model, raw=raw),
                opset=OPSET,
                input_names=list(graphs.INPUTS[: 1 if raw else 2]),
                output_names=names if raw else [f"padded_{name}" for name in names],
            )
        _simplify_upsampling(graph)
        if not raw:
            _cut_padding(graph, names)
        onnx.save(graph, str(path))
        session(path, optimised=path.with_suffix(".optimised"))
        path.with_suffix(".optimised").replace(path)


def _simplify_upsampling(graph: "ModelProto") -> None:
    """Rewrites nearest-neighbour resizing by whole factors (`nn.upsample_nearest`) in a faster form.

    onnxruntime is faster with factors instead of sizes and coordinates rounded down; for whole factors the result is
    the same.
    """
    from onnx import helper, numpy_helper, shape_inference

    sizes = {constant.name: numpy_helper.to_array(constant) for constant in graph.graph.initializer}
    known = shape_inference.infer_shapes(graph).graph.value_info
    shapes = {entry.name: [dim.dim_value for dim in entry.type.tensor_type.shape.dim] for entry in known}
    for node in graph.graph.node:
        modes = [helper.get_attribute_value(one) for one in node.attribute if one.name == "mode"]
        if node.op_type == "Resize" and modes in ([], [b"nearest"]):
            factors = sizes[node.input[3]] / shapes[node.input[0]]
            name = f"{node.output[0]}_factors"
            graph.graph.initializer.append(numpy_helper.from_array(factors.astype(np.float32), name))
            node.input[:] = [node.input[0], "", name]
            del node.attribute[:]
            form = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            node.attribute.extend(helper.make_attribute(key, value) for key, value in form.items())


def _cut_padding(graph: "ModelProto", names: Sequence[str]) -> None:
    """Replaces the outputs of `graphs.detections` by those of their rows that are valid."""
    from onnx import TensorProto, helper, numpy_helper

    padded = {entry.name: entry.type.tensor_type for entry in graph.graph.output}
    del graph.graph.output[:]
    first = numpy_helper.from_array(np.array(0, np.int64), "first_image")
    graph.graph.initializer.append(first)
    graph.graph.node.append(helper.make_node("Gather", ["padded_valid", "first_image"], ["kept"], name="kept"))
    for name in names:
        if name == "valid":
            continue
        known = padded[f"padded_{name}"]
        shape = ["n", *(side.dim_value for side in known.shape.dim[2:])]
        kind = TensorProto.INT64 if name == "labels" else known.elem_type
        steps = [
            ("Gather", [f"padded_{name}", "first_image"], [f"all_{name}"], {}),
            ("Compress", [f"all_{name}", "kept"], [f"kept_{name}"], {"axis": 0}),
            ("Cast", [f"kept_{name}"], [name], {"to": kind}),
        ]
        for step, inputs, outputs, form in steps:
            graph.graph.node.append(helper.make_node(step, inputs, outputs, name=outputs[0], **form))
        graph.graph.output.append(helper.make_tensor_value_info(name, kind, shape))


def session(path: str | Path, *, threads: int = 0, optimised: Path | None = None) -> "onnxruntime.InferenceSession":
    """An onnxruntime session on the CPU.

    Args:
      path: the file.
      threads: that compute an operator; 0 leaves it to onnxruntime.
      optimised: where to write the graph after the basic optimisations, or None.

    Raises:
      UserError: onnxruntime cannot read the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings about shapes are of no use here
    options.intra_op_num_threads = threads
    if optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(optimised)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its bindings raise many kinds of errors
        raise UserError(f"{path}: onnxruntime cannot read it: {str(error).splitlines()[0]}") from error


def runner(path: str | Path) -> Callable[..., Sequence[np.ndarray]]:
    """A function from the inputs of an ONNX file to its outputs, both in order."""
    running = session(path)
    names = [entry.name for entry in running.get_inputs()]

    def call(*inputs: np.ndarray) -> Sequence[np.ndarray]:
        return cast(Sequence[np.ndarray], running.run(None, dict(zip(names, inputs, strict=True))))

    return call


def add_metadata(path: str | Path, facts: dict[str, str]) -> None:
    """Writes facts into an ONNX file."""
    import onnx

    graph = onnx.load(str(path))
    onnx.helper.set_model_props(graph, facts)
    onnx.save(graph, str(path))


def quantise(path: str | Path, model: Model, images: Iterable[np.ndarray]) -> None:
    """Makes an ONNX file int8, in place: onnxruntime's static quantisation, weights per channel, maps as bytes.

    Convolutions are quantised, and the SiLUs between them, which in float would cost the time that the convolutions
    save; the computation of scores and boxes is not.

    Args:
      path: the file that `write` has written.
      model: what it was written from.
      images: u8[h, w, 3] RGB, from which the ranges of the maps are taken.
    """
    import onnx
    from onnxruntime import quantization

    path = Path(path)

    nodes = onnx.load(str(path)).graph.node
    chosen = [node for node in nodes if node.op_type == "Conv"] + _silus(nodes)
    names = [entry.name for entry in session(path).get_inputs()]
    batches = predict.canvases(images, model.image_size, batch_size=1, fit=model.detector.fit)
    feeds = ({name: batch[name] for name in names} for batch in batches)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(feeds, None)

    made = path.with_suffix(".int8")
    with quiet():
        quantization.quantize_static(
            str(path),
            str(made),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=sorted({node.op_type for node in chosen}),
            nodes_to_quantize=[node.name for node in chosen],
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8,
        )
    made.replace(path)


def _silus(nodes: "Sequence[NodeProto]") -> "list[NodeProto]":
    """The nodes of every x * sigmoid(x)."""
    maker = {name: node for node in nodes for name in node.output}
    found = []
    for node in nodes:
        for x, gate in (node.input, node.input[::-1]) if node.op_type == "Mul" else ():
            if gate in maker and maker[gate].op_type == "Sigmoid" and list(maker[gate].input) == [x]:
                found += [maker[gate], node]
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the converters' irrelevant warnings, log messages and prints."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
