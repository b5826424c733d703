"""Non-maximum suppression (NMS) with a fixed number of results."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kdjax import nn, shapes
from kdjax.boxes.convert import clip
from kdjax.errors import UserError
from kdjax.structs import AnyArray, Array, PaddedDetections

State = tuple[Array, AnyArray, Array, Array]  # step, scores left, indices kept, valid


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
    x1, y1, x2, y2 = (boxes[..., i] for i in range(4))
    area = (x2 - x1) * (y2 - y1)

    def unfinished(state: State) -> Array:
        step, scores, _, _ = state
        return (step < max_detections) & jnp.any(scores > -jnp.inf)

    def take_best(state: State) -> State:
        step, scores, kept, valid = state
        best = jnp.argmax(scores, axis=1, keepdims=True).astype(jnp.int32)

        def of_best(values: AnyArray) -> Array:
            return jnp.take_along_axis(values, best, axis=1)

        width = jnp.minimum(x2, of_best(x2)) - jnp.maximum(x1, of_best(x1))
        height = jnp.minimum(y2, of_best(y2)) - jnp.maximum(y1, of_best(y1))
        overlap = jnp.maximum(width, 0) * jnp.maximum(height, 0)
        union = area + of_best(area) - overlap
        drop = overlap / jnp.where(union > 0, union, 1) > iou_threshold
        if labels is not None:
            drop &= labels == of_best(labels)
        drop |= jnp.arange(scores.shape[1]) == best
        exists = of_best(scores) > -jnp.inf
        kept = jax.lax.dynamic_update_slice(kept, jnp.where(exists, best, 0), (0, step))
        valid = jax.lax.dynamic_update_slice(valid, exists, (0, step))
        return step + 1, jnp.where(drop, -jnp.inf, scores), kept, valid

    places = (scores.shape[0], max_detections)
    state = (jnp.int32(0), scores, jnp.zeros(places, jnp.int32), jnp.zeros(places, bool))
    _, _, kept, valid = jax.lax.while_loop(unfinished, take_best, state)
    return kept, valid


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

    best_scores, best_pairs, start = [], [], 0
    for size in level_sizes:
        pairs = scores[:, start : start + size].reshape(batch, size * num_classes)
        count = min(pre_nms, size * num_classes)
        best, index = jax.lax.top_k(pairs, count)
        best_scores.append(best)
        best_pairs.append(index + start * num_classes)
        start += size
    scores, pairs = jnp.concatenate(best_scores, axis=1), jnp.concatenate(best_pairs, axis=1)
    prior, labels = pairs // num_classes, pairs % num_classes
    boxes = jnp.take_along_axis(boxes, (pairs if of_class else prior)[..., None], axis=1)

    has_area = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    enters = has_area & (scores > score_threshold)
    if quality is not None:
        scores = scores * jnp.take_along_axis(jnp.asarray(quality), prior, axis=1)
    scores = jnp.where(enters, scores, -jnp.inf)
    kept, valid = greedy_nms(
        boxes,
        scores,
        labels,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
    )
    found = PaddedDetections(
        boxes=jnp.where(valid[..., None], jnp.take_along_axis(boxes, kept[..., None], axis=1), 0),
        scores=jnp.where(valid, jnp.take_along_axis(scores, kept, axis=1), 0),
        labels=jnp.where(valid, jnp.take_along_axis(labels, kept, axis=1), 0),
        valid=valid,
    )
    return found, jnp.where(valid, jnp.take_along_axis(prior, kept, axis=1), 0)


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
