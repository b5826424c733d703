"""Non-maximum suppression with a fixed number of results."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kdjax.boxes.convert import clip
from kdjax.structs import Array, PaddedDetections


def suppress(
    boxes: Array, scores: Array, labels: Array | None = None, *, iou_threshold: float, max_detections: int
) -> tuple[Array, Array]:
    """Greedy suppression: take the best box, drop what overlaps it by more than the threshold, repeat.

    Args:
      boxes: f32[B, C, 4], candidates, `x1 y1 x2 y2` in pixels.
      scores: f32[B, C]; -inf marks what is no candidate.
      labels: i32[B, C]: only boxes of one label suppress each other. None: all do.
      iou_threshold: an IoU above it suppresses.
      max_detections: D, the number of boxes to keep.

    Returns:
      (i32[B, D] indices into the candidates, best score first, equal scores in the order of the candidates;
      bool[B, D] whether there is such a box). Where there is none, the index is 0.

    Scope: each image on its own.

    Peers: torchvision's `nms` and mmcv's `batched_nms` (which moves the classes apart instead of comparing labels).

    Example:
      >>> import numpy as np
      >>> boxes = np.array([[[0.0, 0, 4, 4], [0, 0, 4, 3.5], [9, 9, 12, 12]]])
      >>> index, valid = suppress(boxes, np.array([[0.5, 0.9, 0.1]]), iou_threshold=0.65, max_detections=3)
      >>> index.tolist(), valid.tolist()
      ([[1, 2, 0]], [[True, True, False]])
    """
    x1, y1, x2, y2 = (boxes[..., i] for i in range(4))
    area = (x2 - x1) * (y2 - y1)

    def unfinished(state):
        step, scores, _, _ = state
        return (step < max_detections) & jnp.any(scores > -jnp.inf)

    def take_best(state):
        step, scores, kept, valid = state
        best = jnp.argmax(scores, axis=1, keepdims=True).astype(jnp.int32)

        def of_best(values):
            return jnp.take_along_axis(values, best, axis=1)

        width = jnp.minimum(x2, of_best(x2)) - jnp.maximum(x1, of_best(x1))
        height = jnp.minimum(y2, of_best(y2)) - jnp.maximum(y1, of_best(y1))
        overlap = jnp.maximum(width, 0) * jnp.maximum(height, 0)
        union = area + of_best(area) - overlap
        drop = overlap / jnp.where(union > 0, union, 1) > iou_threshold
        if labels is not None:
            drop &= labels == of_best(labels)
        drop |= jnp.arange(scores.shape[1]) == best
        found = of_best(scores) > -jnp.inf
        kept = jax.lax.dynamic_update_slice(kept, jnp.where(found, best, 0), (0, step))
        valid = jax.lax.dynamic_update_slice(valid, found, (0, step))
        return step + 1, jnp.where(drop, -jnp.inf, scores), kept, valid

    places = (scores.shape[0], max_detections)
    state = (jnp.int32(0), scores, jnp.zeros(places, jnp.int32), jnp.zeros(places, bool))
    _, _, kept, valid = jax.lax.while_loop(unfinished, take_best, state)
    return kept, valid


def select(
    boxes: Array,
    scores: Array,
    *,
    level_sizes: Sequence[int],
    image_size: Array | None,
    score_threshold: float,
    iou_threshold: float,
    pre_nms: int,
    max_detections: int,
    class_agnostic: bool = False,
    quality: Array | None = None,
) -> PaddedDetections:
    """Detections among dense predictions: per level the best (prior, class) pairs, then suppression over all levels.

    Args:
      boxes: f32[B, N, 4], one box a prior, `x1 y1 x2 y2` in pixels.
      scores: f32[B, N, K], probabilities in 0 .. 1.
      level_sizes: number of priors of each level; their sum is N.
      image_size: i32[B, 2], height and width in pixels to which boxes are clipped; None: no clipping.
      score_threshold: pairs count only if they score more.
      iou_threshold: a box is dropped if its IoU with a better one is above it.
      pre_nms: how many pairs of a level go on.
      max_detections: D, the number of places for detections of an image.
      class_agnostic: suppress over classes as well.
      quality: f32[B, N], 0 .. 1; the scores of the pairs that go on are multiplied by it. None: they are not.

    Returns:
      PaddedDetections, best first, with boxes of zero width or height (after clipping) left out.

    Scope: each image on its own.

    Peers: mmdetection's dense heads (`filter_scores_and_topk`, then `batched_nms`).

    Raises:
      ValueError: if the levels do not add up to N.

    Example:
      >>> import numpy as np
      >>> boxes = np.array([[[0.0, 0, 8, 8], [0, 0, 8, 7], [8, 8, 20, 20]]])
      >>> found = select(boxes, np.array([[[0.8], [0.9], [0.5]]]), level_sizes=(3,), image_size=np.array([[16, 16]]),
      ...                score_threshold=0.1, iou_threshold=0.5, pre_nms=10, max_detections=3)
      >>> found.boxes[0, :2].tolist(), found.valid.tolist()
      ([[0.0, 0.0, 8.0, 7.0], [8.0, 8.0, 16.0, 16.0]], [[True, True, False]])
    """
    batch, num_priors, num_classes = scores.shape
    if sum(level_sizes) != num_priors:
        raise ValueError(
            f"level_sizes {tuple(level_sizes)} add up to {sum(level_sizes)}, but there are {num_priors} priors"
        )
    boxes, scores = jnp.asarray(boxes).astype(jnp.float32), jnp.asarray(scores).astype(jnp.float32)
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
    boxes = jnp.take_along_axis(boxes, prior[..., None], axis=1)

    has_area = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    goes_on = has_area & (scores > score_threshold)
    if quality is not None:
        scores = scores * jnp.take_along_axis(jnp.asarray(quality), prior, axis=1)
    scores = jnp.where(goes_on, scores, -jnp.inf)
    kept, valid = suppress(
        boxes,
        scores,
        None if class_agnostic else labels,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
    )
    return PaddedDetections(
        boxes=jnp.where(valid[..., None], jnp.take_along_axis(boxes, kept[..., None], axis=1), 0),
        scores=jnp.where(valid, jnp.take_along_axis(scores, kept, axis=1), 0),
        labels=jnp.where(valid, jnp.take_along_axis(labels, kept, axis=1), 0),
        valid=valid,
    )
