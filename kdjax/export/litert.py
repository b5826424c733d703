"""LiteRT (TensorFlow Lite) files, in float32 and int8; needs `kdjax[litert]`."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from kdjax import nn
from kdjax.boxes import nms
from kdjax.boxes.convert import clip
from kdjax.errors import UserError
from kdjax.export import graphs
from kdjax.inference.model import Model
from kdjax.structs import Array, PaddedDetections

if TYPE_CHECKING:
    from ai_edge_litert.interpreter import Interpreter

PRE_NMS = 30000  # candidates that enter the NMS of `runner`


def write(model: Model, path: str | Path, *, raw: bool = False) -> None:
    """Writes the model as a LiteRT (TensorFlow Lite) file in float32 for one image, by way of StableHLO.

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

    def candidates(images: Array, image_size: Array) -> tuple[Array, Array]:
        return graphs.candidates(model, {}, graphs.network(model, images), image_size)

    function = functools.partial(graphs.maps, model) if raw else candidates
    with nn.portable():
        program = jax.jit(function).trace(*graphs.inputs(model, raw=raw)).lower(lowering_platforms=("cpu",))
    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context:
        module = ir.Module.parse(program.as_text())  # the portable artifact has a sort for top_k, which LiteRT lacks
        names = graphs.map_names(model) if raw else ["boxes", "scores"]
        converter.set_signature(module.operation, "serving_default", list(graphs.INPUTS[: 1 if raw else 2]), names)
        settings = converter.ConvertToTFLConfig()
        converter.run_convert_to_tfl_passes(module, passmanager.PassManager(), settings)
        content = converter.export_flatbuffer_to_bytes(module.operation)
    Path(path).write_bytes(content)


def quantise(path: str | Path) -> None:
    """Makes a LiteRT file int8, in place: the kernels of convolutions are stored as bytes, with a scale per channel.

    Their inputs become bytes while it runs, by their own range, so that nothing is calibrated; all else stays float.

    Args:
      path: the file that `write` has written.
    """
    from ai_edge_quantizer import qtyping, quantizer  # pyright: ignore[reportMissingImports] - the package is optional

    made = quantizer.Quantizer(str(path))
    for kind in (qtyping.TFLOperationName.CONV_2D, qtyping.TFLOperationName.DEPTHWISE_CONV_2D):
        made.add_dynamic_config(".*", kind, 8)
    Path(path).write_bytes(made.quantize(enable_progress_bar=False, enable_progress_report=False).quantized_model)


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
