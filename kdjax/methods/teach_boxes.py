"""Teach-Boxes: scored boxes as further targets of any student, and their scores as soft labels.

    targets: L = target_weight * the student's own losses, with the detections of a score s >= score_threshold as
        objects: what a row loses that learns a detection is multiplied by its s, and what one loses that learns none by
        `unmatched`
    soft:    L = soft_weight * sum_i e_i / max(number of rows that learn a detection, 1), over these rows, with the
        class c and the score s of their detection, and t_k = s where k = c and 0 elsewhere
        sigmoid scores:  e = sum_k BCE(z_k, t_k)
        softmax scores:  e = -s log softmax(z)_c - (1 - s) log softmax(z)_background

Paper: after Huang et al., "Teach-DETR: Better Training DETR with Teachers", 2022.
Taps: the teacher's detections: as its evaluation finds them, or a file (docs/teachers.md); the student's own loss and
    the logits of its rows, which its own assigner gives to the detections. Students that learn masks are refused:
    detections teach boxes only.
Open: the first term is that of teach_detr, which is made for transformers; for other students the paper has no formula,
    and none for soft labels. The two terms differ where a detection is not sure: the first learns its class less, the
    second learns a lower score. A score that consists of two (of class and objectness or centreness) is the soft label
    of the class. Images without detections teach nothing.
Proof: none: the terms are those of teach_detr and of hinton's soft labels, with another choice of rows.
Status: formula
"""

import jax.numpy as jnp

from kdjax.distill import method, scored, taps
from kdjax.losses import classification
from kdjax.structs import Array, DetectorOutput


def make(
    *,
    weight: float = 1.0,
    target_weight: float = 1.0,
    soft_weight: float = 1.0,
    score_threshold: float = 0.3,
    max_detections: int = 100,
    unmatched: float = 0.5,
) -> method.Method:
    """The student's own losses for scored boxes, and their scores as soft labels of the rows that learn them.

    Args:
      weight: of both terms.
      target_weight: of the student's own losses.
      soft_weight: of the soft labels.
      score_threshold: detections below are left out, 0 .. 1.
      max_detections: of an image, the best ones, 1 .. 100.
      unmatched: factor of the losses of rows that learn no detection, >= 0; 0 leaves the background to the objects.

    Raises:
      UserError: an option out of its range.
    """
    chosen = scored.Choice(score_threshold, max_detections, unmatched).check("teach_boxes")
    weights = {"targets": weight * target_weight, "soft": weight * soft_weight}

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        del key, teacher_spec
        scored.refuse_masks(student_spec)
        return {}

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        del params
        targets = chosen.targets(context)
        assert targets.weights is not None
        terms = {}
        if weights["targets"]:
            terms["targets"] = method.sum_over_levels(context.loss(targets).values())
        if weights["soft"]:
            rows, assignment = context.learned(targets)
            owner = jnp.maximum(assignment.matched, 0)
            score = jnp.take_along_axis(targets.weights[:, :-1], owner, 1)
            by_row = _of_softmax if rows.form == "softmax" else _of_sigmoid
            values = by_row(rows.logits, assignment.labels, score)
            terms["soft"] = method.mean_over_positives(values, assignment.positive)
        return terms

    reads = ("targets", "loss", *(("rows.logits",) if weights["soft"] else ()))
    return method.Method(init, apply, weights, taps.Reads(reads, ("detections",)))


def _of_sigmoid(logits: Array, labels: Array, score: Array) -> Array:
    """Cross-entropy of each row f32[B, N] against its score at its class and 0 elsewhere."""
    target = jnp.where(labels[..., None] == jnp.arange(logits.shape[-1]), score[..., None], 0.0)
    return jnp.sum(classification.soft_binary_cross_entropy(logits, target), -1)


def _of_softmax(logits: Array, labels: Array, score: Array) -> Array:
    """Cross-entropy of each row f32[B, N] against its score at its class and the rest of it at the background."""
    nothing = jnp.full_like(labels, logits.shape[-1] - 1)
    sure, unsure = (classification.cross_entropy(logits, of) for of in (labels, nothing))
    return score * sure + (1 - score) * unsure
