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
from kdjax.detectors.api import is_rounded
from kdjax.errors import UserError
from kdjax.export import graphs, int8, operators
from kdjax.inference import predict
from kdjax.inference.model import Model

if TYPE_CHECKING:
    import onnxruntime
    from onnx import ModelProto, NodeProto

OPSET = 19
ANY = "batch"  # the name of a number of images that is left open


def write(model: Model, path: str | Path, *, raw: bool = False, batch: int = 1, signed: bool = False) -> None:
    """Writes the model as an ONNX file, in float32, or in int8 if its values are rounded to 8 bits.

    The batch norms are folded into the convolutions and the transpositions cancelled by onnxruntime's own basic
    optimisations, which stay inside the standard's operators.

    Args:
      model: from `kdjax.inference.load`.
      path: the file.
      raw: the head's maps instead of detections.
      batch: number of images; 0: any. Detections of one image are those that were found; those of several are padded
        to the detector's largest number, with a score of 0.
      signed: of a model in int8, see `int8.to_bytes`.

    Reference: ONNX's operators, https://onnx.ai/onnx/operators/, opset 19.

    Raises:
      UserError: see `graphs.check`.
    """
    graphs.check(model, raw=raw, batch=batch)
    path = Path(path)
    names = graphs.map_names(model) if raw else graphs.detection_names(model)
    padded = names if raw else [f"padded_{name}" for name in names]
    with quiet():
        import jax2onnx
        import onnx

        operators.register()
        with nn.portable(), nn.replaced(**operators.REPLACED):
            graph = jax2onnx.to_onnx(
                functools.partial(graphs.maps if raw else graphs.detections, model),
                graphs.inputs(model, raw=raw, batch=batch or ANY),
                opset=OPSET,
                input_names=list(graphs.INPUTS[: 1 if raw else 2]),
                output_names=padded,
            )
        if not raw:
            _cut_padding(graph, names, one=batch == 1)
        onnx.save(graph, str(path))
        session(path, optimised=path.with_suffix(".optimised"))
        path.with_suffix(".optimised").replace(path)
        if is_rounded(model.variables[1]):
            graph = onnx.load(str(path))
            int8.to_bytes(graph, signed=signed)
            onnx.save(graph, str(path))


def _cut_padding(graph: "ModelProto", names: Sequence[str], *, one: bool) -> None:
    """Renames the outputs of `graphs.detections`; of one image only the rows that are valid are left."""
    from onnx import TensorProto, helper, numpy_helper

    padded = {entry.name: entry.type.tensor_type for entry in graph.graph.output}
    del graph.graph.output[:]
    constants = {"first_image": np.array(0, np.int64), "axis_0": np.array([0], np.int64)}
    steps = [
        ("Gather", ["padded_valid", "first_image"], "kept", {}),
        ("Cast", ["kept"], "kept_numbers", {"to": TensorProto.FLOAT}),  # TensorRT's NonZero takes floats
        ("NonZero", ["kept_numbers"], "kept_rows", {}),
        ("Squeeze", ["kept_rows", "axis_0"], "rows", {}),
    ]
    if one:
        graph.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    else:
        steps.clear()
    for name in names:
        if name == "valid":
            continue
        known = padded[f"padded_{name}"]
        kind = TensorProto.INT64 if name == "labels" else known.elem_type
        sides = [side.dim_value or side.dim_param for side in known.shape.dim]
        source = f"padded_{name}"
        if one:
            steps.append(("Gather", [source, "first_image"], f"all_{name}", {}))
            steps.append(("Gather", [f"all_{name}", "rows"], f"kept_{name}", {"axis": 0}))
            sides, source = ["n", *sides[2:]], f"kept_{name}"
        steps.append(("Cast", [source], name, {"to": kind}))
        graph.graph.output.append(helper.make_tensor_value_info(name, kind, sides))
    for step, inputs, output, form in steps:
        graph.graph.node.append(helper.make_node(step, inputs, [output], name=output, **form))


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
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # what is rounded stays as it is written
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


def metadata(path: str | Path) -> dict[str, str]:
    """The facts that `add_metadata` wrote into a file; those of another program if it has any.

    Raises:
      UserError: the file cannot be read.
    """
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises its own kinds of errors
        raise UserError(f"{path}: it is no ONNX file: {str(error).splitlines()[0]}") from error
    return {entry.key: entry.value for entry in graph.metadata_props}


def quantise(path: str | Path, model: Model, images: Iterable[np.ndarray], *, batch: int = 1) -> None:
    """Makes a file in float32 int8, in place: onnxruntime's static quantisation, weights per channel, maps as bytes.

    Convolutions are quantised, and the SiLUs between them, which in float would cost the time that the convolutions
    save; the computation of scores and boxes is not.

    Args:
      path: the file that `write` has written.
      model: what it was written from.
      images: u8[h, w, 3] RGB, from which the ranges of the maps are taken.
      batch: number of images that the file takes at once; 1 where it takes any.
    """
    import onnx
    from onnxruntime import quantization

    path = Path(path)

    nodes = onnx.load(str(path)).graph.node
    chosen = [node for node in nodes if node.op_type == "Conv"] + _silus(nodes)
    names = [entry.name for entry in session(path).get_inputs()]
    batches = predict.canvases(images, model.image_size, batch_size=batch, fit=model.detector.fit)
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


def halve(path: str | Path) -> None:
    """Makes the network of an ONNX file float16, in place: all that a convolution is computed from, and itself.

    What follows the last convolutions, the computation of scores and boxes and the NMS, stays in float32, and so do
    inputs and outputs.

    Args:
      path: the file that `write` has written.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(str(path))
    graph, nodes = model.graph, list(model.graph.node)
    del graph.value_info[:]  # types that are no longer true
    network = _network(nodes)
    weights = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    known = onnx.shape_inference.infer_shapes(model).graph.value_info
    floats = {entry.name for entry in known if entry.type.tensor_type.elem_type == TensorProto.FLOAT}
    halves: set[str] = set()
    for place in sorted(network):
        node = nodes[place]
        for position, name in enumerate(node.input):
            if name in weights and weights[name].dtype == np.float32 and (node.op_type != "Resize" or not position):
                node.input[position] = f"{name}_float16"
                if node.input[position] not in halves:
                    largest = np.finfo(np.float16).max
                    half = np.clip(weights[name], -largest, largest).astype(np.float16)
                    graph.initializer.append(numpy_helper.from_array(half, node.input[position]))
                    halves.add(node.input[position])
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
    made = []
    for place, node in enumerate(nodes):
        made.append(node)
        for name in node.output if place in network else ():
            outside = [other for i, other in enumerate(nodes) if i not in network and name in other.input]
            if outside and name in floats:
                made.append(
                    helper.make_node("Cast", [name], [f"{name}_float32"], f"{name}_float32", to=TensorProto.FLOAT)
                )
                for other in outside:
                    other.input[:] = [f"{name}_float32" if used == name else used for used in other.input]
    del graph.node[:]
    graph.node.extend(made)
    used = {name for node in made for name in node.input}
    kept = [entry for entry in graph.initializer if entry.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    onnx.save(model, str(path))


def _network(nodes: "Sequence[NodeProto]") -> set[int]:
    """The places of the convolutions and of all nodes from which one is computed; nodes are in order."""
    wanted: set[str] = set()
    found = set()
    for place in reversed(range(len(nodes))):
        if nodes[place].op_type == "Conv" or wanted.intersection(nodes[place].output):
            found.add(place)
            wanted.update(nodes[place].input)
    return found


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
