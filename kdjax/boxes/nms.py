"""Non-maximum suppression (NMS) with a fixed number of results."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import nn, shapes
from kdjax.boxes import greedy
from kdjax.boxes.convert import clip
from kdjax.errors import UserError
from kdjax.structs import AnyArray, Array, PaddedDetections

FEW = 32  # detections, up to which a step for each costs less than a sort


def greedy_nms(
    boxes: AnyArray, scores: AnyArray, labels: AnyArray | None = None, *, iou_threshold: float, max_detections: int
) -> tuple[Array, Array]:
    """Greedy NMS: takes the box with the best score, drops those that overlap it by more than the threshold, repeats.

    Args:
      boxes: f32[B, C, 4], candidates, `x1 y1 x2 y2` in pixels.
      scores: f32[B, C]; -inf marks rows that are not candidates.
      labels: i32[B, C]: a box drops only boxes of the same label. None: of all.
      iou_threshold: boxes with an IoU above it are dropped, 0 .. 1.
      max_detections: D, the largest number of boxes to keep.

    Returns:
      (indices i32[B, D] into the candidates, best score first, equal scores in the order of the candidates;
      valid bool[B, D]). Where `valid` is False, the index is 0.

    Scope: each image on its own.

    Peers: torchvision's `nms` and mmcv's `batched_nms` (which moves the classes apart instead of comparing labels).

    Example:
      >>> import numpy as np
      >>> boxes = np.array([[[0.0, 0, 4, 4], [0, 0, 4, 3.5], [9, 9, 12, 12]]])
      >>> index, valid = greedy_nms(boxes, np.array([[0.5, 0.9, 0.1]]), iou_threshold=0.65, max_detections=3)
      >>> index.tolist(), valid.tolist()
      ([[1, 2, 0]], [[True, True, False]])
    """
    shapes.check("greedy_nms", boxes=(boxes, "B C 4"), scores=(scores, "B C"))
    if other := nn.replacement("greedy_nms"):
        return other(boxes, scores, labels, iou_threshold=iou_threshold, max_detections=max_detections)
    if max_detections <= FEW:
        return greedy.one_by_one(boxes, scores, labels, iou_threshold=iou_threshold, max_detections=max_detections)
    boxes, scores = jnp.asarray(boxes, jnp.float32), jnp.asarray(scores)

    def candidates(rows: Array) -> greedy.Candidates:
        of_rows = jnp.zeros_like(rows) if labels is None else jnp.take_along_axis(jnp.asarray(labels), rows, axis=1)
        return greedy.Candidates(
            jnp.take_along_axis(boxes, rows[..., None], axis=1), of_rows, jnp.ones_like(rows, bool)
        )

    scores = jnp.where(scores == 0, 0.0, scores)  # equal zeros are taken in their order, also those with a sign
    return greedy.in_chunks(scores[..., None], candidates, iou_threshold=iou_threshold, max_detections=max_detections)


def select_detections(
    boxes: AnyArray,
    scores: AnyArray,
    *,
    level_sizes: Sequence[int],
    image_size: AnyArray | None,
    score_threshold: float,
    iou_threshold: float,
    pre_nms: int,
    max_detections: int,
    quality: AnyArray | None = None,
) -> PaddedDetections:
    """Selects detections among dense predictions: the best (prior, class) pairs of each level, then NMS over all.

    Args:
      boxes: f32[B, N, 4], the box of each prior, `x1 y1 x2 y2` in pixels; or f32[B, N, K, 4], one for each class.
      scores: f32[B, N, K], probabilities in 0 .. 1.
      level_sizes: number of priors of each level; their sum is N.
      image_size: i32[B, 2], height and width in pixels to which boxes are clipped; None: no clipping.
      score_threshold: pairs with a score at or below it are dropped.
      iou_threshold: a box is dropped if its IoU with a better one of its class is above it.
      pre_nms: largest number of pairs of a level that enter NMS.
      max_detections: D, the largest number of detections per image.
      quality: f32[B, N], 0 .. 1; multiplies the scores of the pairs that enter NMS. None: 1.

    Returns:
      PaddedDetections, best first, with boxes of zero width or height (after clipping) left out.

    Scope: each image on its own.

    Peers: mmdetection's dense heads (`filter_scores_and_topk`, then `batched_nms`).

    Raises:
      UserError: the levels do not add up to N, or a shape is wrong.

    Example:
      >>> import numpy as np
      >>> boxes = np.array([[[0.0, 0, 8, 8], [0, 0, 8, 7], [8, 8, 20, 20]]])
      >>> scores, size = np.array([[[0.8], [0.9], [0.5]]]), np.array([[16, 16]])
      >>> options = dict(score_threshold=0.1, iou_threshold=0.5, pre_nms=10, max_detections=3)
      >>> found = select_detections(boxes, scores, level_sizes=(3,), image_size=size, **options)
      >>> found.boxes[0, :2].tolist(), found.valid.tolist()
      ([[0.0, 0.0, 8.0, 7.0], [8.0, 8.0, 16.0, 16.0]], [[True, True, False]])
    """
    found, _ = select_rows(
        boxes,
        scores,
        level_sizes=level_sizes,
        image_size=image_size,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        pre_nms=pre_nms,
        max_detections=max_detections,
        quality=quality,
    )
    return found


def select_rows(
    boxes: AnyArray,
    scores: AnyArray,
    *,
    level_sizes: Sequence[int],
    image_size: AnyArray | None,
    score_threshold: float,
    iou_threshold: float,
    pre_nms: int,
    max_detections: int,
    quality: AnyArray | None = None,
) -> tuple[PaddedDetections, Array]:
    """`select_detections`, and the prior of each detection, i32[B, D] in 0 .. N-1 (0 where it is not valid)."""
    of_class = boxes.ndim == 4
    layout = "B N K 4" if of_class else "B N 4"
    shapes.check("select_detections", boxes=(boxes, layout), scores=(scores, "B N K"))
    batch, num_priors, num_classes = scores.shape
    if sum(level_sizes) != num_priors:
        raise UserError(
            f"select_detections: level_sizes must add up to the {num_priors} priors, not {sum(level_sizes)}"
        )
    if other := nn.replacement("select_rows"):
        return other(
            boxes,
            scores,
            level_sizes=level_sizes,
            image_size=image_size,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            pre_nms=pre_nms,
            max_detections=max_detections,
            quality=quality,
        )
    boxes, scores = jnp.asarray(boxes).astype(jnp.float32), jnp.asarray(scores).astype(jnp.float32)
    boxes = boxes.reshape(batch, -1, 4)
    if image_size is not None:
        boxes = clip(boxes, image_size)

    def candidates(pairs: Array) -> greedy.Candidates:
        prior, label = pairs // num_classes, pairs % num_classes
        found = jnp.take_along_axis(boxes, (pairs if of_class else prior)[..., None], axis=1)
        has_area = (found[..., 2] > found[..., 0]) & (found[..., 3] > found[..., 1])
        return greedy.Candidates(found, label, has_area)

    settings: dict[str, Any] = dict(iou_threshold=iou_threshold, max_detections=max_detections)
    if quality is None:
        pairs, valid = greedy.in_chunks(
            scores, candidates, score_threshold=score_threshold, level_sizes=level_sizes, pre_nms=pre_nms, **settings
        )
        kept_scores = jnp.take_along_axis(scores.reshape(batch, -1), pairs, axis=1)
    else:  # another order than that of the scores
        of_levels = jnp.split(scores, np.cumsum(level_sizes)[:-1], axis=1)
        best, pairs = zip(
            *(jax.lax.top_k(x.reshape(batch, -1), min(pre_nms, x.shape[1] * num_classes)) for x in of_levels),
            strict=True,
        )
        starts = np.cumsum([0, *level_sizes[:-1]]) * num_classes
        best = jnp.concatenate(best, axis=1)
        pairs = jnp.concatenate([x + start for x, start in zip(pairs, starts, strict=True)], axis=1)
        entering = candidates(pairs)
        enters = entering.enters & (best > score_threshold)
        best = best * jnp.take_along_axis(jnp.asarray(quality), pairs // num_classes, axis=1)
        kept, valid = greedy_nms(entering.boxes, jnp.where(enters, best, -jnp.inf), entering.labels, **settings)
        kept_scores, pairs = (jnp.take_along_axis(x, kept, axis=1) for x in (best, pairs))
    kept = candidates(pairs)
    found = PaddedDetections(
        boxes=jnp.where(valid[..., None], kept.boxes, 0),
        scores=jnp.where(valid, kept_scores, 0),
        labels=jnp.where(valid, kept.labels, 0),
        valid=valid,
    )
    return found, jnp.where(valid, pairs // num_classes, 0)


def best_pairs(boxes: AnyArray, scores: AnyArray, *, score_threshold: float, max_detections: int) -> PaddedDetections:
    """The pairs of a row and a class with the best scores, without NMS.

    Args:
      boxes: f32[B, N, 4], `x1 y1 x2 y2` in pixels; they are not clipped.
      scores: f32[B, N, K], probabilities in 0 .. 1.
      score_threshold: pairs with a score at or below it are left out.
      max_detections: D, the largest number of detections per image.

    Returns:
      PaddedDetections, best first, of equal scores the first.

    Scope: each image on its own.

    Example:
      >>> import numpy as np
      >>> boxes, scores = np.array([[[0.0, 0, 8, 8]]]), np.array([[[0.3, 0.9]]])
      >>> found = best_pairs(boxes, scores, score_threshold=0.0, max_detections=3)
      >>> found.labels.tolist(), found.valid.tolist()
      ([[1, 0, 0]], [[True, True, False]])
    """
    shapes.check("best_pairs", boxes=(boxes, "B N 4"), scores=(scores, "B N K"))
    if other := nn.replacement("best_pairs"):
        return other(boxes, scores, score_threshold=score_threshold, max_detections=max_detections)
    batch, rows, classes = scores.shape
    count = min(max_detections, rows * classes)
    best, pairs = jax.lax.top_k(jnp.asarray(scores, jnp.float32).reshape(batch, -1), count)
    best, pairs = (jnp.pad(x, ((0, 0), (0, max_detections - count))) for x in (best, pairs))
    valid = (best > score_threshold) & (jnp.arange(max_detections) < count)
    taken = jnp.take_along_axis(jnp.asarray(boxes, jnp.float32), (pairs // classes)[..., None], axis=1)
    return PaddedDetections(
        boxes=jnp.where(valid[..., None], taken, 0),
        scores=jnp.where(valid, best, 0),
        labels=jnp.where(valid, pairs % classes, 0),
        valid=valid,
    )
