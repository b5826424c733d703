"""Where two models predict differently."""

from typing import Literal

import jax
import jax.numpy as jnp

from kdjax import shapes
from kdjax.boxes import nms
from kdjax.losses import common
from kdjax.structs import AnyArray, Array


def score_gap(student: AnyArray, teacher: AnyArray) -> Array:
    """Largest difference of the scores over the classes of each prior: max_k |sigmoid(teacher) - sigmoid(student)|.

    Args:
      student: f32[..., K], logits.
      teacher: f32[..., K].

    Returns:
      f32[...] in 0 .. 1: the weight of BCKD's box term (with stopped gradient), and GID's score of an instance.

    Scope: prior.
    Peers: BCKD; GID.
    Reference: Yang et al., "Bridging Cross-task Protocol Inconsistency", 2023, Eq. 6.

    Example:
      >>> score_gap(jnp.array([0.0, 50.0]), jnp.array([0.0, -50.0])).tolist()
      1.0
    """
    student, teacher = common.float32_pair(student, teacher, "score_gap")
    return jnp.max(jnp.abs(jax.nn.sigmoid(teacher) - jax.nn.sigmoid(student)), -1)


def class_disagreement(student: AnyArray, teacher: AnyArray, *, space: Literal["logits", "probs"] = "logits") -> Array:
    """Mean squared difference of the class predictions in each cell: P = mean_{a,k} (p_s - p_t)^2.

    Args:
      student: f32[B, H, W, A*K], class logits.
      teacher: f32[B, H, W, A*K].
      space: "logits", or "probs" for their sigmoids (P is then about 1e-6 in the background).

    Returns:
      f32[B, H, W, 1], >= 0, zero where the predictions agree. Gradients flow through it, as in the published
      implementations of PFI.

    Scope: cell.
    Peers: logits as in mmrazor's RetinaNet fork; probabilities as in SparseML and PaddleDetection.
    Reference: Li et al., "Rank Mimicking and Prediction-guided Feature Imitation", 2022, Eq. 7.

    Raises:
      UserError: shapes differ, or `space` is unknown.

    Example:
      >>> class_disagreement(jnp.array([1.0, 3.0]).reshape(1, 1, 1, 2), jnp.zeros((1, 1, 1, 2))).ravel().tolist()
      [5.0]
    """
    student, teacher = common.float32_pair(student, teacher, "class_disagreement", "B H W K")
    common.check_choice("class_disagreement", ("logits", "probs"), space=space)
    if space == "probs":
        student, teacher = jax.nn.sigmoid(student), jax.nn.sigmoid(teacher)
    return jnp.mean(jnp.square(student - teacher), -1, keepdims=True)


def general_instances(
    student_logits: AnyArray,
    teacher_logits: AnyArray,
    student_boxes: AnyArray,
    teacher_boxes: AnyArray,
    *,
    count: int = 10,
    iou_threshold: float = 0.3,
    softmax: bool = False,
    valid: AnyArray | None = None,
) -> tuple[Array, Array, Array]:
    """Boxes and classes of the priors on which the two models differ most, after NMS (GID's general instances).

    The score of a prior is max_k |sigmoid(teacher) - sigmoid(student)|, or of their softmaxes; its box is that of the
    model with the higher score for that class. No gradient flows through the selection.

    Args:
      student_logits: f32[B, N, K], class logits.
      teacher_logits: f32[B, N, K].
      student_boxes: f32[B, N, 4], x1 y1 x2 y2 in pixels.
      teacher_boxes: f32[B, N, 4].
      count: number of instances per image.
      iou_threshold: of the NMS.
      softmax: the logits, f32[B, N, K + 1], are those of a softmax with the background last, which is no instance.
      valid: bool[B, N], rows that can be instances; None: all.

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
    shapes.check(
        "general_instances",
        student_logits=(student_logits, "B N K"),
        teacher_logits=(teacher_logits, "B N K"),
        student_boxes=(student_boxes, "B N 4"),
        teacher_boxes=(teacher_boxes, "B N 4"),
    )
    inputs = (student_logits, teacher_logits, student_boxes, teacher_boxes)
    student_logits, teacher_logits, student_boxes, teacher_boxes = (
        jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for x in inputs
    )
    scores = (lambda logits: jax.nn.softmax(logits)[..., :-1]) if softmax else jax.nn.sigmoid
    gap = scores(teacher_logits) - scores(student_logits)
    best = jnp.argmax(jnp.abs(gap), -1, keepdims=True)
    boxes = jnp.where(jnp.take_along_axis(gap, best, -1) > 0, teacher_boxes, student_boxes)
    score = jnp.max(jnp.abs(gap), -1)
    score = score if valid is None else jnp.where(valid, score, -jnp.inf)
    index, valid = nms.greedy_nms(boxes, score, iou_threshold=iou_threshold, max_detections=count)
    labels = jnp.take_along_axis(best[..., 0], index, 1)
    return jnp.take_along_axis(boxes, index[..., None], 1), labels, valid
