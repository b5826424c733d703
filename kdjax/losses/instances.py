"""General instances (GID): the places where student and teacher differ most, and how they relate."""

import jax
import jax.numpy as jnp

from kdjax.boxes import nms
from kdjax.losses import common, logits
from kdjax.structs import Array


def general_instances(
    student_logits: Array,
    teacher_logits: Array,
    student_boxes: Array,
    teacher_boxes: Array,
    *,
    count: int = 10,
    iou_threshold: float = 0.3,
) -> tuple[Array, Array, Array]:
    """The boxes and classes of the priors on which the two nets differ most, after suppression.

    The score of a prior is max_k |sigmoid(teacher) - sigmoid(student)|; its box is the one of the net that is surer of
    that class. The selection has no gradient.

    Args:
      student_logits: f32[B, N, K], class logits.
      teacher_logits: f32[B, N, K].
      student_boxes: f32[B, N, 4], x1 y1 x2 y2 in pixels.
      teacher_boxes: f32[B, N, 4].
      count: how many instances an image.
      iou_threshold: of the suppression.

    Returns:
      (boxes f32[B, count, 4], labels i32[B, count]: the class that differs most, valid bool[B, count]).

    Scope: image.
    Peers: a third-party Detectron2 port; no official code.
    Reference: Dai et al., "General Instance Distillation for Object Detection", 2021, Eqs. 1-2.

    Example:
      >>> teacher, student = jnp.array([[[2.0], [0.0]]]), jnp.zeros((1, 2, 1))
      >>> boxes = jnp.array([[[0.0, 0, 4, 4], [8, 8, 9, 9]]])
      >>> general_instances(student, teacher, boxes + 1, boxes, count=1)[0].tolist()
      [[[0.0, 0.0, 4.0, 4.0]]]
    """
    inputs = (student_logits, teacher_logits, student_boxes, teacher_boxes)
    student_logits, teacher_logits, student_boxes, teacher_boxes = (
        jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for x in inputs
    )
    gap = jax.nn.sigmoid(teacher_logits) - jax.nn.sigmoid(student_logits)
    best = jnp.argmax(jnp.abs(gap), -1, keepdims=True)
    boxes = jnp.where(jnp.take_along_axis(gap, best, -1) > 0, teacher_boxes, student_boxes)
    score = logits.score_gap(student_logits, teacher_logits)
    index, valid = nms.suppress(boxes, score, iou_threshold=iou_threshold, max_detections=count)
    labels = jnp.take_along_axis(best[..., 0], index, 1)
    return jnp.take_along_axis(boxes, index[..., None], 1), labels, valid


def relation(student: Array, teacher: Array, valid: Array, *, eps: float = 1e-6) -> Array:
    """Smooth L1 distance of the pairwise distances among an image's instances, each net's divided by their mean.

    Args:
      student: f32[B, R, D], one feature vector an instance.
      teacher: f32[B, R, D'].
      valid: bool[B, R], False where there is no instance.
      eps: smallest mean distance.

    Returns:
      f32[B], >= 0: the mean over pairs of different instances; 0 with fewer than three. A common scaling or rotation of
      the student's vectors changes nothing.

    Scope: image.
    Peers: a third-party Detectron2 port; no official code.
    Reference: Dai et al., "General Instance Distillation for Object Detection", 2021, Eq. 5.

    Example:
      >>> x = jnp.array([[[0.0], [1.0], [3.0]]])
      >>> relation(4 * x, x, jnp.ones((1, 3), bool)).tolist()
      [0.0]
    """
    pair = valid[:, :, None] & valid[:, None, :] & ~jnp.eye(valid.shape[1], dtype=bool)
    pairs = jnp.maximum(jnp.sum(pair, (1, 2), keepdims=True), 1)

    def distances(x):
        x = jnp.asarray(x, jnp.float32)
        square = jnp.sum(jnp.square(x[:, :, None] - x[:, None, :]), -1)
        distance = jnp.where(pair, common.safe_sqrt(square), 0.0)
        return distance / jnp.maximum(jnp.sum(distance, (1, 2), keepdims=True) / pairs, eps)

    difference = jnp.abs(distances(student) - distances(teacher))
    smooth = jnp.where(difference < 1, 0.5 * jnp.square(difference), difference - 0.5)
    mean = jnp.sum(jnp.where(pair, smooth, 0.0), (1, 2)) / pairs[:, 0, 0]
    return jnp.where(jnp.sum(valid, 1) >= 3, mean, 0.0)
