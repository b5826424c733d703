"""The functions that are exported: from the pixels of one image to the head's maps, detections, or what NMS reads.

Other runtimes need the normalisation as a convolution (`nn.portable`), and have NMS as an operator or not at all.
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
from kdjax.detectors.api import is_rounded, switched
from kdjax.errors import UserError
from kdjax.inference.model import Model
from kdjax.structs import Array, DetectorOutput, PaddedDetections

INPUTS = ("image", "image_size")
DETECTIONS = ("boxes", "scores", "labels", "valid", "masks")
_PREDICTIONS = ("cls_logits", "box_reg", "quality", "kernels")


def check(model: Model, *, raw: bool, nms: bool = True, batch: int = 1) -> None:
    """Checks that a format can hold what is asked for.

    Args:
      model: from `kdjax.inference.load`.
      raw: the head's maps instead of detections.
      nms: whether NMS can be in the file.
      batch: number of images; 0: any.

    Raises:
      UserError: it cannot.
    """
    what, two_stages = f"{model.path}: {model.detector.name}", model.detector.propose is not None
    queries = model.detector.head is None and not two_stages
    if not batch and (two_stages or queries):
        why = "its second stage" if two_stages else "its choice of queries"
        raise UserError(
            f"{what} cannot be written for any number of images, because of {why}: name one, as in --batch=1"
        )
    if raw and two_stages:
        raise UserError(f"{what} has two stages, and the second has no maps: export it without --raw")
    if raw and queries:
        raise UserError(f"{what} predicts queries, which are no maps: export it without --raw")
    if not raw and not nms and queries:
        raise UserError(f"{what} chooses its queries by a sort, which a LiteRT file cannot hold: use another format")
    if not raw and not nms and (two_stages or model.detector.masks):
        why = "second stage is" if two_stages else "masks are"
        raise UserError(
            f"{what}: its {why} computed behind an NMS, which a LiteRT file cannot hold: use another format"
            + ("" if two_stages else ", or --raw")
        )


def in_dtype(model: Model, dtype: str) -> Model:
    """The model as a file of a dtype computes it: one that was trained for int8 has a float network, too.

    Args:
      model: from `kdjax.inference.load`.
      dtype: "float32", or "int8" of a detector with the option int8.

    Raises:
      UserError: for "int8", its values were never rounded in training.
    """
    params, stats = model.variables
    if dtype == "int8" and not is_rounded(stats):
        raise UserError(
            f"{model.path}: {model.detector.name} has the option int8, but was not trained with rounded values yet: "
            "train it beyond the share config.int8_start of the steps, or export it with --dtype=float32"
        )
    return model if dtype == "int8" else dataclasses.replace(model, variables=(params, switched(stats, jnp.zeros(()))))


def network(model: Model, images: Array) -> DetectorOutput:
    """The detector's output for images u8[B, H, W, 3].

    In portable mode the normalisation is a convolution, which takes other runtimes a tenth of the time.
    """
    if nn.is_portable():
        kernel, offset = affine(model)
        x = nn.conv2d(images.astype(jnp.float32), jnp.asarray(kernel)[None, None], jnp.asarray(offset))
    else:
        x = model.detector.preprocess(images)
    return model.detector.apply(*model.variables, x, train=False)[0]


def maps(model: Model, images: Array) -> tuple[Array, ...]:
    """The head's maps of images u8[B, H, W, 3]: class logits fine to coarse, then box regressions, and so on."""
    return tuple(named_maps(network(model, images)).values())


def named_maps(found: DetectorOutput) -> dict[str, Array]:
    """The maps that detections are computed from, by name."""
    levels = {
        f"{what}_{stride}": level
        for what in _PREDICTIONS
        for stride, level in zip(found.strides, getattr(found, what), strict=False)
    }
    return levels if found.prototypes is None else levels | {"prototypes": found.prototypes}


def spec(model: Model) -> DetectorOutput:
    """The shapes of the detector's output for one image."""
    x = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32)
    return jax.eval_shape(functools.partial(model.detector.apply, train=False), *model.variables, x)[0]


def map_names(model: Model) -> list[str]:
    """The names of `maps`, in their order."""
    return list(named_maps(spec(model)))


def output(model: Model, found: Iterable[Array]) -> DetectorOutput:
    """The inverse of `maps`: the detector's output with the predictions alone."""
    shapes, levels = spec(model), iter(found)
    parts: dict[str, Any] = {what: tuple(next(levels) for _ in getattr(shapes, what)) for what in _PREDICTIONS}
    prototypes = None if shapes.prototypes is None else next(levels)
    return DetectorOutput(strides=shapes.strides, anchors=shapes.anchors, prototypes=prototypes, **parts)


def affine(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """The preprocessing of a detector, an affine function of the colour: kernel f32[3 in, 3 out] and offset f32[3]."""
    colours = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)
    with jax.ensure_compile_time_eval():  # also while something is traced
        offset, *pure = np.asarray(model.detector.preprocess(cast(Array, colours[None, None])))[0, 0]
    return (np.array(pure) - offset) / 255, offset


def decoded(model: Model, images: Array, image_size: Array) -> PaddedDetections:
    """The detections of images u8[B, H, W, 3]."""
    return model.detector.decode(network(model, images), image_size)


def detections(model: Model, images: Array, image_size: Array) -> tuple[Array, ...]:
    """The detections of images u8[B, H, W, 3]: `boxes`, `scores`, `labels`, `valid` and, if there are any, `masks`."""
    found = decoded(model, images, image_size)._asdict()
    return tuple(found[name] for name in detection_names(model))


def detection_names(model: Model) -> list[str]:
    """The names of `detections`, in their order."""
    return [name for name in DETECTIONS if name != "masks" or model.detector.masks]


def most(model: Model) -> int:
    """The largest number of detections of an image."""
    found = jax.eval_shape(functools.partial(detections, model), *inputs(model, raw=False))
    return found[0].shape[1]


def candidates(model: Model, settings: dict[str, Any], found: DetectorOutput, image_size: Array) -> tuple[Array, Array]:
    """The inputs of the NMS from which a detector's detections come; without NMS, what the best are taken of.

    Args:
      model: from `kdjax.inference.load`.
      settings: is filled with the settings `iou_threshold` and `max_detections` of the NMS.
      found: of `network`, for one image.
      image_size: i32[1, 2].

    Returns:
      Boxes f32[1, N, 4], or f32[1, N, K, 4], one for each class, not clipped if NMS compares them so; scores
      f32[1, N, K], 0 for candidates that are left out.
    """
    compared = []

    def select(boxes: Array, scores: Array, **given: Any) -> tuple[PaddedDetections, Array]:
        settings.update({name: given[name] for name in ("iou_threshold", "max_detections")})
        compared.extend(dense(boxes, scores, **given))
        rows = jnp.zeros((1, given["max_detections"]), jnp.int32)  # `decode` goes on with them, the compiler does not
        return PaddedDetections(jnp.zeros((*rows.shape, 4)), rows.astype(jnp.float32), rows, rows > 0), rows

    def best(boxes: Array, scores: Array, *, score_threshold: float, max_detections: int) -> PaddedDetections:
        compared.extend((boxes, jnp.where(scores > score_threshold, scores, 0.0)))
        rows = jnp.zeros((1, max_detections), jnp.int32)
        return PaddedDetections(jnp.zeros((*rows.shape, 4)), rows.astype(jnp.float32), rows, rows > 0)

    with nn.replaced(select_rows=select, best_pairs=best):
        model.detector.decode(found, image_size)
    return compared[0], compared[1]


def dense(
    boxes: Array,
    scores: Array,
    *,
    level_sizes: Sequence[int],
    image_size: Array | None,
    score_threshold: float,
    pre_nms: int,
    max_detections: int,
    iou_threshold: float,
    quality: Array | None,
) -> tuple[Array, Array]:
    """What `kdjax.boxes.select_rows` gives to NMS, from its arguments, but as arrays of all priors.

    Returns:
      The boxes, clipped if there is an `image_size`; scores f32[B, N, K], 0 for candidates that are left out.
    """
    del iou_threshold
    of_class, batch = boxes.ndim == 4, boxes.shape[0]
    if image_size is not None:  # without reshaping, which jax2onnx cancels although the sizes are of other shapes
        of_row = jnp.broadcast_to(image_size[:, None], (batch, boxes.shape[1], 2)) if of_class else image_size
        boxes = clip(boxes, of_row)
    counts = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    counts = (counts if of_class else counts[..., None]) & (scores > score_threshold)
    if pre_nms < 100 * max_detections:  # a larger number changes nothing among the best
        ends = list(itertools.accumulate(level_sizes))
        pairs = [scores[:, end - size : end].reshape(batch, -1) for size, end in zip(level_sizes, ends, strict=True)]
        # By its index, since LiteRT's converter makes a sort of a top_k whose indices are not used.
        last = [jax.lax.top_k(level, min(pre_nms, level.shape[1]))[1][:, -1:] for level in pairs]
        least = [jnp.take_along_axis(level, at, 1)[..., None] for level, at in zip(pairs, last, strict=True)]
        least = [jnp.broadcast_to(one, (batch, size, 1)) for one, size in zip(least, level_sizes, strict=True)]
        counts &= scores >= jnp.concatenate(least, 1)
    return boxes, jnp.where(counts, scores if quality is None else scores * quality[..., None], 0.0)


def nms_settings(model: Model) -> dict[str, Any]:
    """The settings `iou_threshold` and `max_detections` of a detector's NMS."""
    settings: dict[str, Any] = {}
    jax.eval_shape(functools.partial(candidates, model, settings), spec(model), inputs(model, raw=False)[1])
    return settings


def inputs(model: Model, *, raw: bool, batch: int | str = 1) -> list[jax.ShapeDtypeStruct]:
    """The shapes of an exported function's inputs; `batch` is a number of images, or jax2onnx's name of an open one."""
    image = jax.ShapeDtypeStruct((cast(int, batch), *model.image_size, 3), jnp.uint8)
    return [image] if raw else [image, jax.ShapeDtypeStruct((cast(int, batch), 2), jnp.int32)]
