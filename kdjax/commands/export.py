"""`kdjax export`: a model as ONNX (float32, int8), LiteRT or StableHLO, held against JAX's before it is given out."""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import logging
import tempfile
import types
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import kdjax
from kdjax import nn
from kdjax.boxes import nms
from kdjax.boxes.convert import clip
from kdjax.commands import evaluate
from kdjax.data import records, scenes
from kdjax.evals import coco, complexity
from kdjax.files import write_json
from kdjax.inference import model as models
from kdjax.structs import DetectorOutput, PaddedDetections

OPSET = 19
SAMPLES = 8  # images on which outputs are compared
CALIBRATION = 64  # images that int8 is calibrated on
TOLERANCE = 1e-4  # of an output, relative where it is larger than 1
BUDGET = {"float32": 0.1, "int8": 1.0}  # points of AP
ONNX, LITERT = ("jax2onnx", "onnx", "onnxruntime"), ("litert_converter", "ai_edge_litert")  # what they need
PRE_NMS = 30000  # candidates of a LiteRT file that enter the suppression when it is measured
_INPUTS = ["image", "image_size"]
_PREDICTIONS = ("cls_logits", "box_reg", "quality")


def run(
    *,
    model: str,
    format: str,
    out: str,
    data: str | None,
    split: str,
    annotations: str,
    images: str,
    limit: int,
    dtype: str,
    raw: bool,
    max_ap_loss: float | None,
) -> int:
    """Exports a model; the file appears only if it passes.

    Args:
      model: see `kdjax.inference.model.load`.
      format: "onnx", "litert" or "stablehlo".
      out: the file.
      data, split, annotations, images: as for `kdjax evaluate`, to compare and measure on; without data outputs are
        compared on the embedded scenes.
      limit: only the first images; 0 takes all.
      dtype: "float32", or "int8" (ONNX; calibrated on images of the split train, if the folder has one).
      raw: the head's maps instead of detections.
      max_ap_loss: points of AP that may be lost; None is `BUDGET`.

    Returns:
      Exit code 0.

    Raises:
      ValueError: something is missing, or what was made is not good enough: outputs differ or AP is lost.
    """
    if dtype == "int8" and (format != "onnx" or not data):
        raise ValueError("--dtype=int8 needs --format=onnx and --data=DIR, to calibrate and to measure what it costs.")
    if max_ap_loss is not None and not data:
        raise ValueError("--max-ap-loss needs --data=DIR, to measure AP on.")
    target = Path(out).expanduser()
    if target.is_dir():
        raise ValueError(f"--out={out} is a folder, but names the file to write.")
    if format == "onnx":
        check_installed(ONNX)
    if format == "litert":
        check_installed(LITERT)
    loaded = models.load(model)
    models.check_out(str(target.parent))
    given = evaluate.open_data(data, split, annotations, images, limit) if data else None
    if given:
        loaded = evaluate.fitted(loaded, given)
        samples = [image for _, image in itertools.islice(given.stream(), SAMPLES)]
    else:
        samples = [records.decode(encoded) for _, encoded in scenes.stream("val", SAMPLES)]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
        made = Path(folder) / target.name
        facts = describe(loaded, raw=raw, suppressed=format != "litert")
        if format == "stablehlo":
            made.write_bytes(to_stablehlo(loaded, raw=raw))
            call = stablehlo_runner(made)
        elif format == "litert":
            made.write_bytes(to_litert(loaded, raw=raw))
            call = litert_runner(made, loaded, raw=raw)
        else:
            write_onnx(loaded, made, raw=raw)
            call = onnx_runner(made)
        worst = largest_difference(loaded, call, samples, raw=raw)
        if not np.isfinite(worst):
            what = "hold numbers that are not finite" if np.isnan(worst) else "are other objects than the JAX model's"
            raise ValueError(f"the exported outputs {what}.")
        if worst > TOLERANCE:
            raise ValueError(
                f"the exported outputs differ from the JAX model's by {worst:.2g}, more than {TOLERANCE:g}."
            )
        facts["largest difference from JAX, float32"] = f"{worst:.2g}"
        print(f"outputs: largest difference from the JAX model {worst:.2g} (float32, {len(samples)} images)")
        if dtype == "int8":
            quantise(made, loaded, calibration(data, split, given))
            call = onnx_runner(made)
        if given:
            before, after = (100 * ap for ap in aps(loaded, call, given, raw=raw))
            budget = BUDGET[dtype] if max_ap_loss is None else max_ap_loss
            facts |= {"AP of JAX": f"{before:.2f}", f"AP of this file, {dtype}": f"{after:.2f}"}
            facts["AP measured on"] = f"{given.name}, {split}, {len(given.truth['images'])} images"
            print(f"AP: {before:.2f} in JAX, {after:.2f} in the file ({round(after - before, 2) + 0.0:+.2f})")
            if before - after > budget:
                raise ValueError(
                    f"{dtype} loses {before - after:.2f} points of AP ({before:.2f} to {after:.2f}), more than "
                    f"--max-ap-loss={budget:g}: nothing was written."
                )
        if format == "onnx":
            add_metadata(made, facts | {"dtype": dtype})
        else:
            write_json(target.with_name(target.name + ".json"), facts | {"dtype": dtype})
        made.replace(target)
    print(f"{out}: {target.stat().st_size:,} bytes, {facts['input']}")
    return 0


def missing(packages: Iterable[str] = ONNX) -> list[str]:
    """Which of the packages that a format needs are not there."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def check_installed(packages: Sequence[str]) -> None:
    """Raises ValueError if one of the packages is not there; all are of `ONNX` or of `LITERT`."""
    if absent := missing(packages):
        name, extra = ("LiteRT", "litert") if packages[0] in LITERT else ("ONNX", "export")
        raise ValueError(f"{name} needs {', '.join(absent)}: pip install 'kdjax[{extra}]'.")


def describe(model: models.Model, *, raw: bool, suppressed: bool = True) -> dict[str, str]:
    """What whoever runs the file must know, as text by name."""
    height, width = model.image_size
    fit = "scaled to fit, fractions of a pixel cut off" if model.detector.round_down else "scaled to fit"
    image = f"image u8[1, {height}, {width}, 3], RGB, {fit}, at the top left, the rest {model.detector.pad_value}"
    outputs = "boxes f32[n, 4] x1 y1 x2 y2 in pixels of the canvas, scores f32[n], labels i64[n], best first"
    if not suppressed:
        limits = _limits(model)
        outputs = (
            "boxes f32[1, N, 4] x1 y1 x2 y2 in pixels of the canvas, scores f32[1, N, K], 0 where a class does not "
            f"count; left to do: suppression by class over an IoU of {limits['iou_threshold']:g}, the best "
            f"{limits['max_detections']}, clipping to image_size"
        )
    if raw:
        outputs = f"{', '.join(_names(model))}: f32[1, H, W, C] as in kdjax.structs.DetectorOutput"
    return {
        "kdjax": kdjax.__version__,
        "detector": model.detector.name,
        "classes": json.dumps(model.classes),
        "category_ids": json.dumps(model.category_ids),
        "image_size": json.dumps(model.image_size),
        "input": image if raw else f"{image}; image_size i32[1, 2], height and width of the image on it",
        "normalisation": _normalisation(model),
        "output": outputs,
        "parameters": str(complexity.parameters(model.variables[0])),
        "flops": str(complexity.flops(model.detector, model.image_size)),
    }


def _normalisation(model: models.Model) -> str:
    """Read off the detector: what it makes of black, white and red."""
    kernel, offset = _affine(model)
    std = 1 / kernel.sum(0)
    order = "RGB" if kernel[0, 0] else "BGR"
    mean, std = (" ".join(f"{value:g}" for value in values.round(3)) for values in (-offset * std, std))
    return f"inside the graph: {order}, minus {mean}, divided by {std}"


def _affine(model: models.Model) -> tuple[np.ndarray, np.ndarray]:
    """What a detector makes of colours, which is affine: kernel f32[3 in, 3 out] and offset f32[3]."""
    colours = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)
    with jax.ensure_compile_time_eval():  # also while something is traced
        offset, *pure = np.asarray(model.detector.preprocess(colours[None, None]))[0, 0]
    return (np.array(pure) - offset) / 255, offset


# -------------------------------------------------------------------------------------------------------------- maps


def maps(model: models.Model, images) -> tuple:
    """The head's maps of images u8[B, H, W, 3]: class logits fine to coarse, then box regressions."""
    return _maps(model, model.detector.preprocess(images))


def _portable_maps(model: models.Model, images) -> tuple:
    """The same with the normalisation as a convolution, which other runtimes do in a tenth of the time."""
    kernel, offset = _affine(model)
    return _maps(model, nn.conv2d(images.astype(jnp.float32), jnp.asarray(kernel)[None, None], jnp.asarray(offset)))


def _maps(model: models.Model, x) -> tuple:
    output, _ = model.detector.apply(*model.variables, x, train=False)
    return tuple(level for what in _PREDICTIONS for level in getattr(output, what))


def _spec(model: models.Model) -> DetectorOutput:
    """The shapes of an output."""
    x = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32)
    return jax.eval_shape(functools.partial(model.detector.apply, train=False), *model.variables, x)[0]


def _names(model: models.Model) -> list[str]:
    """What the maps are called, in their order."""
    spec = _spec(model)
    return [f"{what}_{stride}" for what in _PREDICTIONS if getattr(spec, what) for stride in spec.strides]


def _output(model: models.Model, found) -> DetectorOutput:
    """The predictions of an output from its maps."""
    spec, found = _spec(model), iter(found)
    return dataclasses.replace(spec, **{what: tuple(next(found) for _ in getattr(spec, what)) for what in _PREDICTIONS})


def _portable_candidates(model: models.Model, settings: dict, images, image_size):
    """What a suppression takes that is not `boxes.nms.select`.

    Args:
      model: from `load`.
      settings: is filled with the suppression's `iou_threshold` and `max_detections`.
      images: u8[1, H, W, 3].
      image_size: i32[1, 2].

    Returns:
      Boxes to compare f32[1, N, 4]; scores f32[1, K, N], 0 for what does not take part; boxes to hand out f32[1, N, 4].
    """
    compared = []

    def select(boxes, scores, *, level_sizes, image_size, score_threshold, pre_nms, quality=None, **rest):
        settings.update(rest)
        boxes = boxes if image_size is None else clip(boxes, image_size)
        takes_part = ((boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1]))[..., None]
        takes_part &= scores > score_threshold
        if pre_nms < 100 * rest["max_detections"]:  # a larger number changes nothing among the best
            ends = list(itertools.accumulate(level_sizes))
            pairs = [scores[:, end - size : end].reshape(1, -1) for size, end in zip(level_sizes, ends, strict=True)]
            # By its index, since LiteRT's converter makes a sort of a top_k whose indices nobody wants.
            last = [jax.lax.top_k(level, min(pre_nms, level.shape[1]))[1][:, -1:] for level in pairs]
            least = [jnp.take_along_axis(level, at, 1)[..., None] for level, at in zip(pairs, last, strict=True)]
            least = [jnp.broadcast_to(one, (1, size, 1)) for one, size in zip(least, level_sizes, strict=True)]
            takes_part &= scores >= jnp.concatenate(least, 1)
        scores = jnp.where(takes_part, scores if quality is None else scores * quality[..., None], 0.0)
        compared.extend((boxes, scores))
        return PaddedDetections(boxes, scores, None, None)

    model.detector.decode(_output(model, _portable_maps(model, images)), image_size, select=select)
    return compared[0], jnp.swapaxes(compared[1], 1, 2), clip(compared[0], image_size)


def _limits(model: models.Model) -> dict:
    """The settings of a detector's suppression."""
    settings = {}
    jax.eval_shape(functools.partial(_portable_candidates, model, settings), *_specs(model, False))
    return settings


def _specs(model: models.Model, raw: bool) -> list[jax.ShapeDtypeStruct]:
    image = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.uint8)
    return [image] if raw else [image, jax.ShapeDtypeStruct((1, 2), jnp.int32)]


# -------------------------------------------------------------------------------------------------------------- ONNX


def write_onnx(model: models.Model, path: Path, *, raw: bool) -> None:
    """Writes the model as an ONNX file in float32 for one image.

    The batch norms are folded into the convolutions and the transpositions cancelled by onnxruntime's own basic
    optimisations, which stay inside the standard's operators.

    Args:
      model: from `load`.
      path: the file.
      raw: the head's maps instead of detections.
    """
    with _quiet():
        import jax2onnx
        import onnx

        settings = {}
        function = functools.partial(_portable_candidates, model, settings)
        if raw:
            function = functools.partial(_portable_maps, model)
        with nn.portable():
            graph = jax2onnx.to_onnx(
                function,
                _specs(model, raw),
                opset=OPSET,
                input_names=_INPUTS[: 1 if raw else 2],
                output_names=_names(model) if raw else ["candidates", "candidate_scores", "candidate_boxes"],
            )
        _simplify_upsampling(graph)
        if not raw:
            _append_suppression(graph, **settings)
        onnx.save(graph, str(path))
        session(path, optimised=path.with_suffix(".optimised"))
        path.with_suffix(".optimised").replace(path)


def _simplify_upsampling(graph) -> None:
    """Writes nearest-neighbour resizing by whole factors, all that `nn.upsample_nearest` does, as onnxruntime likes it.

    It has a fast form for factors instead of sizes, with the cell rounded down: by a whole factor the same cell.
    """
    from onnx import helper, numpy_helper, shape_inference

    sizes = {constant.name: numpy_helper.to_array(constant) for constant in graph.graph.initializer}
    known = shape_inference.infer_shapes(graph).graph.value_info
    shapes = {entry.name: [dim.dim_value for dim in entry.type.tensor_type.shape.dim] for entry in known}
    for node in graph.graph.node:
        if node.op_type == "Resize":
            factors = sizes[node.input[3]] / shapes[node.input[0]]
            name = f"{node.output[0]}_factors"
            graph.graph.initializer.append(numpy_helper.from_array(factors.astype(np.float32), name))
            node.input[:] = [node.input[0], "", name]
            del node.attribute[:]
            told = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            node.attribute.extend(helper.make_attribute(key, value) for key, value in told.items())


def _append_suppression(graph, *, iou_threshold: float, max_detections: int) -> None:
    """Replaces the outputs of `_portable_candidates` by boxes, scores and labels of what is left of them."""
    from onnx import TensorProto, helper, numpy_helper

    constants = {
        "most": np.array([max_detections], np.int64),
        "iou_threshold": np.array([iou_threshold], np.float32),
        "score_threshold": np.array([0], np.float32),
        "first": np.array(0, np.int64),
        "column_class": np.array(1, np.int64),
        "column_box": np.array(2, np.int64),
    }
    graph.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    nodes = [
        ("NonMaxSuppression", ["candidates", "candidate_scores", "most", "iou_threshold", "score_threshold"], ["kept"]),
        ("GatherND", ["candidate_scores", "kept"], ["kept_scores"]),
        ("Shape", ["kept_scores"], ["number"]),
        ("Min", ["number", "most"], ["places"]),
        ("TopK", ["kept_scores", "places"], ["scores", "order"]),
        ("Gather", ["kept", "order"], ["best"]),
        ("Gather", ["best", "column_class"], ["labels"]),
        ("Gather", ["best", "column_box"], ["rows"]),
        ("Gather", ["candidate_boxes", "first"], ["all_boxes"]),
        ("Gather", ["all_boxes", "rows"], ["boxes"]),
    ]
    axis = {"labels": 1, "rows": 1}
    for kind, inputs, outputs in nodes:
        options = {"axis": axis.get(outputs[0], 0)} if kind == "Gather" else {}
        graph.graph.node.append(helper.make_node(kind, inputs, outputs, name=f"suppression_{outputs[0]}", **options))
    del graph.graph.output[:]
    for name, kind, shape in (
        ("boxes", TensorProto.FLOAT, ["n", 4]),
        ("scores", TensorProto.FLOAT, ["n"]),
        ("labels", TensorProto.INT64, ["n"]),
    ):
        graph.graph.output.append(helper.make_tensor_value_info(name, kind, shape))


def session(path: Path, *, threads: int = 0, optimised: Path | None = None):
    """An onnxruntime session on the CPU.

    Args:
      path: the file.
      threads: that compute an operator; 0 leaves it to onnxruntime.
      optimised: where to write the graph after the basic optimisations, or None.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its shape warnings are of no use to anyone here
    options.intra_op_num_threads = threads
    if optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(optimised)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever its bindings raise
        raise ValueError(f"{path} cannot be read by onnxruntime: {str(error).splitlines()[0]}") from error


def onnx_runner(path: Path):
    """A function of the inputs, in order, that gives the outputs of an ONNX file."""
    running = session(path)
    names = [entry.name for entry in running.get_inputs()]
    return lambda *inputs: running.run(None, dict(zip(names, inputs, strict=True)))


def add_metadata(path: Path, facts: dict[str, str]) -> None:
    """Writes facts into an ONNX file."""
    import onnx

    graph = onnx.load(str(path))
    onnx.helper.set_model_props(graph, facts)
    onnx.save(graph, str(path))


def quantise(path: Path, model: models.Model, images: Iterable[np.ndarray]) -> None:
    """Makes an ONNX file int8, in place: onnxruntime's static quantisation, weights by channel, maps as bytes.

    Convolutions are quantised, and the SiLUs between them, which in float would cost what the convolutions win; not
    what scores and boxes are made with.

    Args:
      path: of `write_onnx`.
      model: whose file it is.
      images: u8[h, w, 3] RGB, from which the ranges of the maps are taken.
    """
    import onnx
    from onnxruntime import quantization

    nodes = onnx.load(str(path)).graph.node
    chosen = [node for node in nodes if node.op_type == "Conv"] + _silus(nodes)
    names = [entry.name for entry in session(path).get_inputs()]
    feeds = (dict(zip(names, inputs, strict=False)) for inputs in _inputs(model, images))
    reader = types.SimpleNamespace(get_next=lambda: next(feeds, None))
    made = path.with_suffix(".int8")
    with _quiet():
        quantization.quantize_static(
            str(path),
            str(made),
            reader,
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=sorted({node.op_type for node in chosen}),
            nodes_to_quantize=[node.name for node in chosen],
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8,
        )
    made.replace(path)


def _silus(nodes) -> list:
    """The nodes of every x * sigmoid(x)."""
    maker = {name: node for node in nodes for name in node.output}
    found = []
    for node in nodes:
        for x, gate in (node.input, node.input[::-1]) if node.op_type == "Mul" else ():
            if gate in maker and maker[gate].op_type == "Sigmoid" and list(maker[gate].input) == [x]:
                found += [maker[gate], node]
    return found


def calibration(data: str, split: str, given: evaluate.Data) -> Iterator[np.ndarray]:
    """Images of the training split, or, where the folder has none, of the one that is measured on."""
    if data == "scenes":
        return (records.decode(encoded) for _, encoded in scenes.stream("train", CALIBRATION))
    try:
        train = evaluate.open_data(data, "train", "", "", CALIBRATION)
    except (ValueError, FileNotFoundError):
        train = given
        print(f"calibrated on the images of {split} itself: {data} has no split train that can be used")
    return (image for _, image in itertools.islice(train.stream(), CALIBRATION))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Converters talk much, through warnings, logging and print, about what is no concern of the user's."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ------------------------------------------------------------------------------------------------------------ LiteRT


def to_litert(model: models.Model, *, raw: bool) -> bytes:
    """The model as a LiteRT (TensorFlow Lite) file in float32 for one image, by way of StableHLO.

    Its outputs are, by name, the head's maps, or `boxes` f32[1, N, 4] and `scores` f32[1, N, K] of all priors: LiteRT's
    converter has no place for a suppression (it leaves the bodies of loops where its own writer cannot take them).
    """
    from litert_converter import converter_api_ext as converter
    from litert_converter.mlir import ir, passmanager

    def candidates(images, image_size):
        boxes, scores, _ = _portable_candidates(model, {}, images, image_size)
        return boxes, jnp.swapaxes(scores, 1, 2)

    function = functools.partial(_portable_maps, model) if raw else candidates
    with nn.portable():
        program = jax.jit(function).trace(*_specs(model, raw)).lower(lowering_platforms=("cpu",))
    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context:
        module = ir.Module.parse(program.as_text())  # the portable artifact has a sort for top_k, which LiteRT lacks
        names = _names(model) if raw else ["boxes", "scores"]
        converter.set_signature(module.operation, "serving_default", _INPUTS[: 1 if raw else 2], names)
        settings = converter.ConvertToTFLConfig()
        converter.run_convert_to_tfl_passes(module, passmanager.PassManager(), settings)
        return converter.export_flatbuffer_to_bytes(module.operation)


def interpreter(path: Path, *, threads: int = 1):
    """LiteRT's interpreter of a file, on the CPU.

    Raises:
      ValueError: it cannot be read.
    """
    from ai_edge_litert.interpreter import Interpreter

    try:
        made = Interpreter(model_path=str(path), num_threads=threads)
        made.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read by LiteRT: {str(error).splitlines()[0]}") from error
    return made


def litert_runner(path: Path, model: models.Model, *, raw: bool):
    """A function of the inputs, in order, that gives the outputs of a LiteRT file, suppressed unless they are maps."""
    running = interpreter(path).get_signature_runner()
    if raw:
        names = _names(model)
        return lambda image: list(map(running(image=image).get, names))
    limits = _limits(model)

    @jax.jit
    def suppress(boxes, scores, image_size):
        found = nms.select(
            boxes, scores, level_sizes=boxes.shape[1:2], image_size=None, score_threshold=0.0, pre_nms=PRE_NMS, **limits
        )
        return found._replace(boxes=clip(found.boxes, image_size))

    def call(image, image_size):
        outputs = running(image=image, image_size=image_size)
        *found, valid = (np.asarray(value)[0] for value in suppress(outputs["boxes"], outputs["scores"], image_size))
        return [value[valid] for value in found]

    return call


# --------------------------------------------------------------------------------------------------------- StableHLO


def to_stablehlo(model: models.Model, *, raw: bool) -> bytes:
    """The model as a portable program of `jax.export` for CPU, GPU and TPU, for one image.

    Its outputs are the head's maps, or boxes f32[1, D, 4], scores f32[1, D], labels i32[1, D] and valid bool[1, D].
    """

    def predict(images, image_size):
        return tuple(model.detector.decode(_output(model, maps(model, images)), image_size))

    function = functools.partial(maps, model) if raw else predict
    return jax.export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(*_specs(model, raw)).serialize()


def stablehlo_runner(path: Path):
    """A function of the inputs, in order, that gives the outputs of an exported program."""
    program = jax.jit(jax.export.deserialize(path.read_bytes()).call)

    def call(*inputs):
        outputs = [np.asarray(value) for value in program(*inputs)]
        if len(outputs) == 4:  # detections: as from ONNX, without the rows that hold nothing
            *found, valid = (value[0] for value in outputs)
            return [value[valid] for value in found]
        return outputs

    return call


# ------------------------------------------------------------------------------------------------------------ checks


def _inputs(model: models.Model, images: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for image in images:
        canvas, placed = models.on_canvas(image, model.image_size, round_down=model.detector.round_down)
        yield canvas[None], placed[None]


def largest_difference(model: models.Model, call, images: Iterable[np.ndarray], *, raw: bool) -> float:
    """How far the outputs of an exported model are from the JAX model's, relative where they are larger than 1.

    Each detection of the JAX model is held against the nearest of its class, and of every 100 the two that are farthest
    off are passed over: where an IoU or a score comes within rounding of its threshold, a box may stay or go.

    Args:
      model: the JAX model.
      call: the exported one, from `onnx_runner`, `litert_runner` or `stablehlo_runner`.
      images: u8[h, w, 3] RGB.
      raw: whether the outputs are maps.
    """
    network, program = jax.jit(functools.partial(maps, model)), models.program(model.detector)
    worst = 0.0
    for canvas, placed in _inputs(model, images):
        if not raw:
            wanted = jax.tree.map(lambda value: np.asarray(value)[0], program(model.variables, canvas, placed))
            boxes, scores, labels = call(canvas, placed)
            mine = np.column_stack([wanted.boxes, wanted.scores])[wanted.valid]
            theirs = np.column_stack([boxes, scores])
            if abs(len(mine) - len(theirs)) > 0.02 * len(mine):
                return np.inf
            away = (np.abs(mine[:, None] - theirs) / np.maximum(np.abs(mine[:, None]), 1)).max(-1, initial=0.0)
            away = np.where(wanted.labels[wanted.valid][:, None] == labels, away, np.inf).min(1, initial=np.inf)
            if wanted.valid.all():  # which of equals take the last places is chance
                away = away[mine[:, 4] > mine[-1, 4] + TOLERANCE]
            worst = np.maximum(worst, np.quantile(away, 0.98, method="lower") if len(away) else 0.0)
            continue
        for mine, theirs in zip(map(np.asarray, network(canvas)), call(canvas), strict=True):
            worst = np.maximum(worst, (np.abs(mine - theirs) / np.maximum(np.abs(mine), 1)).max())
    return float(worst)  # NaN if any output is


def aps(model: models.Model, call, data: evaluate.Data, *, raw: bool) -> tuple[float, float]:
    """AP, fractions, of the JAX model and of the exported one."""
    count = len(data.truth["images"])
    bar = functools.partial(tqdm, total=count, unit="image")
    mine = [row for _, rows in bar(models.detect(model, data.stream()), desc="JAX") for row in rows]
    decode = jax.jit(lambda found, image_size: model.detector.decode(_output(model, found), image_size))
    theirs = []
    for image_id, image in bar(data.stream(), desc="exported"):
        canvas, placed = models.on_canvas(image, model.image_size, round_down=model.detector.round_down)
        if raw:
            found = jax.device_get(decode(call(canvas[None]), placed[None]))
        else:
            boxes, scores, labels = (value[None] for value in call(canvas[None], placed[None]))
            found = PaddedDetections(boxes, scores, labels, np.ones(scores.shape, bool))
        rows = {"image_id": [image_id], "image_size": placed[None], "original_size": np.array([image.shape[:2]])}
        theirs += coco.to_coco(rows | {"real": np.array([True])}, found, model.category_ids)
    before, after = (coco.coco_metrics(data.truth, rows)["AP"] for rows in (mine, theirs))
    return before, after
