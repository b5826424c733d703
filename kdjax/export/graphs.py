"""The functions that are exported: from the pixels of one image to the head's maps, or to the inputs of an NMS.

Other runtimes need two things in another form than JAX: the normalisation is a convolution, and NMS is left to them.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import nn
from kdjax.boxes.convert import clip
from kdjax.errors import UserError
from kdjax.inference.model import Model
from kdjax.structs import Array, DetectorOutput, PaddedDetections

INPUTS = ("image", "image_size")
_PREDICTIONS = ("cls_logits", "box_reg", "quality")


def check(model: Model) -> None:
    """Checks that the detector's results can be exported.

    Raises:
      UserError: it returns masks.
    """
    if model.detector.masks:
        raise UserError(
            f"{model.path}: {model.detector.name} returns masks, which kdjax cannot export yet: export a detector "
            "without masks"
        )


def maps(model: Model, images: Array) -> tuple[Array, ...]:
    """The head's maps of images u8[B, H, W, 3]: class logits fine to coarse, then box regressions."""
    return _maps(model, model.detector.preprocess(images))


def portable_maps(model: Model, images: Array) -> tuple[Array, ...]:
    """`maps` with the normalisation as a convolution, which takes other runtimes a tenth of the time."""
    kernel, offset = affine(model)
    return _maps(model, nn.conv2d(images.astype(jnp.float32), jnp.asarray(kernel)[None, None], jnp.asarray(offset)))


def _maps(model: Model, x: Array) -> tuple[Array, ...]:
    found, _ = model.detector.apply(*model.variables, x, train=False)
    return tuple(level for what in _PREDICTIONS for level in getattr(found, what))


def spec(model: Model) -> DetectorOutput:
    """The shapes of the detector's output for one image."""
    x = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32)
    return jax.eval_shape(functools.partial(model.detector.apply, train=False), *model.variables, x)[0]


def map_names(model: Model) -> list[str]:
    """The names of `maps`, in their order."""
    shapes = spec(model)
    return [f"{what}_{stride}" for what in _PREDICTIONS if getattr(shapes, what) for stride in shapes.strides]


def output(model: Model, found: Iterable[Array]) -> DetectorOutput:
    """The inverse of `maps`: the detector's output with the predictions alone."""
    shapes, levels = spec(model), iter(found)
    predictions: dict[str, Any] = {what: tuple(next(levels) for _ in getattr(shapes, what)) for what in _PREDICTIONS}
    return dataclasses.replace(shapes, **predictions)


def affine(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """The preprocessing of a detector, an affine function of the colour: kernel f32[3 in, 3 out] and offset f32[3]."""
    colours = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)
    with jax.ensure_compile_time_eval():  # also while something is traced
        offset, *pure = np.asarray(model.detector.preprocess(cast(Array, colours[None, None])))[0, 0]
    return (np.array(pure) - offset) / 255, offset


def candidates(model: Model, settings: dict[str, Any], images: Array, image_size: Array) -> tuple[Array, Array, Array]:
    """The inputs of an NMS that is not `kdjax.boxes.select_detections`.

    Args:
      model: from `kdjax.inference.load`.
      settings: is filled with the settings `iou_threshold` and `max_detections` of the NMS.
      images: u8[1, H, W, 3].
      image_size: i32[1, 2].

    Returns:
      Boxes to compare f32[1, N, 4]; scores f32[1, K, N], 0 for candidates that are left out; boxes to return
      f32[1, N, 4].
    """
    compared = []

    def select(
        boxes: Array,
        scores: Array,
        *,
        level_sizes: Sequence[int],
        image_size: Array | None,
        score_threshold: float,
        pre_nms: int,
        quality: Array | None = None,
        **rest: Any,
    ) -> PaddedDetections:
        settings.update(rest)
        boxes = boxes if image_size is None else clip(boxes, image_size)
        counts = ((boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1]))[..., None]
        counts &= scores > score_threshold
        if pre_nms < 100 * rest["max_detections"]:  # a larger number changes nothing among the best
            ends = list(itertools.accumulate(level_sizes))
            pairs = [scores[:, end - size : end].reshape(1, -1) for size, end in zip(level_sizes, ends, strict=True)]
            # By its index, since LiteRT's converter makes a sort of a top_k whose indices are not used.
            last = [jax.lax.top_k(level, min(pre_nms, level.shape[1]))[1][:, -1:] for level in pairs]
            least = [jnp.take_along_axis(level, at, 1)[..., None] for level, at in zip(pairs, last, strict=True)]
            least = [jnp.broadcast_to(one, (1, size, 1)) for one, size in zip(least, level_sizes, strict=True)]
            counts &= scores >= jnp.concatenate(least, 1)
        scores = jnp.where(counts, scores if quality is None else scores * quality[..., None], 0.0)
        compared.extend((boxes, scores))
        return PaddedDetections(boxes, scores, boxes, scores)  # `decode` only passes it on

    model.detector.decode(output(model, portable_maps(model, images)), image_size, select=select)
    return compared[0], jnp.swapaxes(compared[1], 1, 2), clip(compared[0], image_size)


def nms_settings(model: Model) -> dict[str, Any]:
    """The settings `iou_threshold` and `max_detections` of a detector's NMS."""
    settings: dict[str, Any] = {}
    jax.eval_shape(functools.partial(candidates, model, settings), *inputs(model, raw=False))
    return settings


def inputs(model: Model, *, raw: bool) -> list[jax.ShapeDtypeStruct]:
    """The shapes of an exported function's inputs.

    Raises:
      UserError: a two-stage detector.
    """
    if model.detector.head is None:
        raise UserError(f"export: {model.detector.name} has two stages: only detectors of one stage can be exported")
    image = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.uint8)
    return [image] if raw else [image, jax.ShapeDtypeStruct((1, 2), jnp.int32)]
