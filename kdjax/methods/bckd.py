"""BCKD: sigmoid scores as soft targets, and boxes weighted by how much the scores differ.

    w_ik = |sigmoid(z_ik^T) - sigmoid(z_ik^S)|,  l_i = 0 on ignored priors else 1,  P = max(positives of the batch, 1)
    classes: L = class_weight * sum_ik l_i w_ik BCE(z_ik^S, sigmoid(z_ik^T)) / P
    boxes:   L = box_weight * sum_i l_i stop_gradient(max_k w_ik) (1 - GIoU(box_i^S, box_i^T)) / P

Paper: Yang et al., "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection", ICCV 2023.
Taps: cls_logits and the decoded boxes (dense heads with sigmoid scores, the same priors and classes on both sides). It
    needs the student's assignment.
Open: the paper has the IoU in the box term, its code GIoU (the default; overlap="iou" is the paper). The code leaves
    out levels without any positive, probably by accident; per_level_gate=True does the same. The weight of the class
    term is not detached, as in the code.
Proof: the class term: kd/logit_github_* (the authors' code): largest relative error 2.1e-7; the box term: its GIoU
    alone, loss/det_box_* (mmdetection).
Status: proven
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.distill import method, taps
from kdjax.losses import box, classification, disagreement
from kdjax.structs import Array, DetectorOutput


def make(
    *,
    weight: float = 1.0,
    class_weight: float = 1.0,
    box_weight: float = 4.0,
    overlap: Literal["giou", "iou"] = "giou",
    per_level_gate: bool = False,
) -> method.Method:
    """Modulated cross-entropy of the scores, and overlap of the boxes weighted by the difference of the scores.

    Args:
      weight: of both terms.
      class_weight: of the class term, 1 in the paper.
      box_weight: of the box term, 4 in the paper.
      overlap: of the boxes, "giou" or "iou".
      per_level_gate: only levels with a positive prior in the batch count, in both terms.

    Raises:
      UserError: unknown `overlap`.
    """
    method.check_choice("bckd: overlap", overlap, ("giou", "iou"))
    weights = {"classes": weight * class_weight, "boxes": weight * box_weight}

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        del key, student_spec, teacher_spec
        return {}

    def box_loss(of_student: Array, of_teacher: Array) -> Array:
        if overlap == "giou":
            return box.giou(of_student, of_teacher)
        return box.iou(of_student, of_teacher, form="linear")

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        del params
        s, t = context.student_rows.logits, context.teacher_rows.logits
        positive = context.assignment.positive
        scored = ~context.assignment.ignore
        if per_level_gate:
            ends = np.cumsum(context.student_rows.level_sizes)[:-1]
            gates = [jnp.full(level.shape[1], jnp.any(level)) for level in jnp.split(positive, ends, 1)]
            scored = scored & jnp.concatenate(gates)
        terms = {}
        if weights["classes"]:
            terms["classes"] = jnp.sum(classification.modulated_bce(s, t), -1)
        if weights["boxes"]:
            apart = box_loss(context.student_rows.boxes, context.teacher_rows.boxes)
            terms["boxes"] = jax.lax.stop_gradient(disagreement.score_gap(s, t)) * apart
        positives = jnp.maximum(jnp.sum(positive), 1)
        return {name: jnp.sum(jnp.where(scored, value, 0.0)) / positives for name, value in terms.items()}

    names = ("rows.logits", *(("rows.boxes",) if weights["boxes"] else ()))
    why = "BCKD is made for the sigmoid scores of dense heads, and regions have softmax scores"
    return method.Method(init, apply, weights, taps.Reads((*names, "assignment"), names), one_stage=why)
