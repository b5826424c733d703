"""LiteRT (TensorFlow Lite) files, in float32 and int8; needs `kdjax[litert]`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from kdjax import nn
from kdjax.boxes import nms
from kdjax.boxes.convert import clip
from kdjax.detectors.api import is_rounded
from kdjax.errors import UserError
from kdjax.export import graphs
from kdjax.inference.model import Model
from kdjax.structs import AnyArray, Array, DetectorOutput, PaddedDetections

if TYPE_CHECKING:
    from ai_edge_litert.interpreter import Interpreter

PRE_NMS = 30000  # candidates that enter the NMS of `runner`


def write(model: Model, path: str | Path, *, raw: bool = False) -> None:
    """Writes the model as a LiteRT (TensorFlow Lite) file for one image, by way of StableHLO.

    It is in float32, or in int8 if the model's values are rounded to 8 bits: composites tell the converter the trained
    scales (`quant.fake_quant`), between which it computes with bytes.

    Its outputs are, by name, the head's maps, or `boxes` f32[1, N, 4] and `scores` f32[1, N, K] of all priors. NMS is
    left out, because LiteRT's converter cannot write the bodies of loops.

    Args:
      model: from `kdjax.inference.load`.
      path: the file.
      raw: the head's maps instead of boxes and scores.

    Raises:
      UserError: see `graphs.check`.
    """
    graphs.check(model, raw=raw, nms=False)
    # The package is optional.
    from litert_converter import converter_api_ext as converter  # pyright: ignore[reportMissingImports]
    from litert_converter.mlir import ir, passmanager  # pyright: ignore[reportMissingImports]

    rounded = is_rounded(model.variables[1])

    def candidates(images: Array, image_size: Array) -> tuple[Array, Array]:
        found = graphs.network(model, images)
        return graphs.candidates(model, {}, _apart(found) if rounded else found, image_size)

    function = functools.partial(graphs.maps, model) if raw else candidates
    of_bytes = {"fake_quantise": _bytes_of_map, "bytes_of_kernel": _bytes_of_kernel} if rounded else {}
    with nn.portable(), nn.replaced(**of_bytes):
        program = jax.jit(function).trace(*graphs.inputs(model, raw=raw)).lower(lowering_platforms=("cpu",))
    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context:
        module = ir.Module.parse(program.as_text())  # the portable artifact has a sort for top_k, which LiteRT lacks
        names = graphs.map_names(model) if raw else ["boxes", "scores"]
        converter.set_signature(module.operation, "serving_default", list(graphs.INPUTS[: 1 if raw else 2]), names)
        settings = converter.ConvertToTFLConfig()
        settings.strict_qdq_mode = rounded
        converter.run_convert_to_tfl_passes(module, passmanager.PassManager(), settings)
        content = converter.export_flatbuffer_to_bytes(module.operation)
    Path(path).write_bytes(content)


def quantise(path: str | Path) -> None:
    """Makes a file in float32 int8, in place: kernels of convolutions are stored as bytes, with a scale per channel.

    Their inputs become bytes while it runs, by their own range, so that nothing is calibrated; all else stays float.

    Args:
      path: the file that `write` has written.
    """
    from ai_edge_quantizer import qtyping, quantizer  # pyright: ignore[reportMissingImports] - the package is optional

    made = quantizer.Quantizer(str(path))
    for kind in (qtyping.TFLOperationName.CONV_2D, qtyping.TFLOperationName.DEPTHWISE_CONV_2D):
        made.add_dynamic_config(".*", kind, 8)
    Path(path).write_bytes(made.quantize(enable_progress_bar=False, enable_progress_report=False).quantized_model)


def _apart(found: DetectorOutput) -> DetectorOutput:
    """The predictions in float.

    The converter would join the bytes of the levels, with one scale for all. It does not compute a sum with a constant
    with bytes, and this one changes nothing.
    """

    def shifted(maps: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(x + 1e-30 for x in maps)

    predictions = {name: shifted(getattr(found, name)) for name in ("cls_logits", "box_reg", "quality")}
    return dataclasses.replace(found, **predictions)


def _fake_quant(x: AnyArray, **form: object) -> Array:
    """What LiteRT's converter knows as rounding to signed bytes."""
    named = jax.lax.composite(lambda x, **_: x, name="quant.fake_quant")
    return named(x, dtype="i8", **form)


def _bytes_of_map(x: Array, scale: float, zero: float) -> Array:
    """`kdjax.nn.fake_quantise`; the zero point is that of signed bytes."""
    form = {"scale": np.array([scale], np.float64), "zero_point": np.array([int(zero) - 128], np.int64)}
    return _fake_quant(x, narrow_range=False, **form)


def _bytes_of_kernel(kernel: AnyArray, *, depthwise: bool) -> Array:
    """A rounded kernel, in the layout of LiteRT's convolutions, and back."""
    scale = nn.kernel_scale(np.asarray(kernel))
    order = (2, 0, 1, 3) if depthwise else (3, 0, 1, 2)
    form = {"scale": np.asarray(scale, np.float64), "zero_point": np.zeros(len(scale), np.int64)}
    axis = np.int32(order.index(3))
    found = _fake_quant(np.transpose(kernel, order).copy(), narrow_range=True, quantization_dimension=axis, **form)
    return jax.numpy.transpose(found, np.argsort(order).tolist())


def interpreter(path: str | Path, *, threads: int = 1) -> "Interpreter":
    """LiteRT's interpreter of a file, on the CPU.

    Raises:
      UserError: it cannot be read.
    """
    from ai_edge_litert.interpreter import Interpreter

    try:
        made = Interpreter(model_path=str(path), num_threads=threads)
        made.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path}: LiteRT cannot read it: {str(error).splitlines()[0]}") from error
    return made


def runner(path: str | Path, model: Model, *, raw: bool = False) -> Callable[..., Sequence[np.ndarray]]:
    """A function from the inputs of a LiteRT file to its outputs, both in order; NMS is done in JAX unless `raw`."""
    running = interpreter(path).get_signature_runner()
    if raw:
        names = graphs.map_names(model)

        def maps(image: np.ndarray) -> Sequence[np.ndarray]:
            found = running(image=image)
            return [found[name] for name in names]

        return maps
    limits = graphs.nms_settings(model)

    @jax.jit
    def suppress(boxes: Array, scores: Array, image_size: Array) -> PaddedDetections:
        found = nms.select_detections(
            boxes, scores, level_sizes=boxes.shape[1:2], image_size=None, score_threshold=0.0, pre_nms=PRE_NMS, **limits
        )
        return found._replace(boxes=clip(found.boxes, image_size))

    def call(image: np.ndarray, image_size: np.ndarray) -> Sequence[np.ndarray]:
        outputs = running(image=image, image_size=image_size)
        found = jax.device_get(suppress(outputs["boxes"], outputs["scores"], image_size))
        return [value[found.valid] for value in (found.boxes, found.scores, found.labels)]

    return call
