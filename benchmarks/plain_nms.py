"""The choice of detections in its plain form, which sorts all candidates.

It is the reference of the tests, and what `detections.py` compares `kdjax.boxes.nms` with.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kdjax.boxes.convert import clip
from kdjax.structs import AnyArray, Array, PaddedDetections

State = tuple[Array, AnyArray, Array, Array]  # step, scores left, indices kept, valid


def greedy_nms(
    boxes: AnyArray, scores: AnyArray, labels: AnyArray | None = None, *, iou_threshold: float, max_detections: int
) -> tuple[Array, Array]:
    """As `kdjax.boxes.nms.greedy_nms`: a step over all candidates for each detection."""
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
    """As `kdjax.boxes.nms.select_rows`: the best pairs of each level, sorted, then NMS."""
    batch, _, classes = scores.shape
    of_class = boxes.ndim == 4
    boxes = jnp.asarray(boxes, jnp.float32).reshape(batch, -1, 4)
    if image_size is not None:
        boxes = clip(boxes, image_size)
    best_scores, best_pairs, start = [], [], 0
    for size in level_sizes:
        pairs = jnp.asarray(scores, jnp.float32)[:, start : start + size].reshape(batch, size * classes)
        best, index = jax.lax.top_k(pairs, min(pre_nms, size * classes))
        best_scores.append(best)
        best_pairs.append(index + start * classes)
        start += size
    scores, pairs = jnp.concatenate(best_scores, axis=1), jnp.concatenate(best_pairs, axis=1)
    prior, labels = pairs // classes, pairs % classes
    boxes = jnp.take_along_axis(boxes, (pairs if of_class else prior)[..., None], axis=1)
    has_area = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    enters = has_area & (scores > score_threshold)
    if quality is not None:
        scores = scores * jnp.take_along_axis(jnp.asarray(quality), prior, axis=1)
    scores = jnp.where(enters, scores, -jnp.inf)
    kept, valid = greedy_nms(boxes, scores, labels, iou_threshold=iou_threshold, max_detections=max_detections)
    found = PaddedDetections(
        boxes=jnp.where(valid[..., None], jnp.take_along_axis(boxes, kept[..., None], axis=1), 0),
        scores=jnp.where(valid, jnp.take_along_axis(scores, kept, axis=1), 0),
        labels=jnp.where(valid, jnp.take_along_axis(labels, kept, axis=1), 0),
        valid=valid,
    )
    return found, jnp.where(valid, jnp.take_along_axis(prior, kept, axis=1), 0)
