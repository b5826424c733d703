"""RM: rank mimicking, the order in which the teacher scores the priors of one object.

    p = softmax_{i in P_j}(s_i^T / theta),  q = softmax_{i in P_j}(s_i^S / theta),  s_i = sigmoid(z_i[y_j])
    L = weight / max(M, 1) * sum_j KL(p || q),  P_j the positive priors of object j, M the objects that have some

Paper: Li et al., "Knowledge Distillation for Object Detection via Rank Mimicking and Prediction-guided Feature
    Imitation", AAAI 2022.
Taps: cls_logits (dense heads with sigmoid scores, the same priors and classes on both sides). It needs the student's
    assignment; with an IoU in the score also the decoded boxes.
Open: the public codes disagree. One sorts the scores of both sides first, which loses the pairing and does not penalise
    a reversed ranking: not followed. One averages over the objects of each image, then over images: per_image=True; the
    default is the mean over the objects of the batch. Some apply a softmax over classes first or add a term on
    negatives: not here. The ranked quantity is the class score; quality="cls*iou", its product with the localisation
    quality, is reported to be best. The student's assignment is used for both sides, also with assigners that depend on
    the predictions.
Proof: none: no public original (unofficial ports that contradict each other).
Status: formula
"""

from typing import Literal

import jax.numpy as jnp

from kdjax.boxes import iou
from kdjax.distill import method, taps
from kdjax.losses import classification, divergence
from kdjax.structs import Array, Assignment, DetectorOutput


def make(
    *,
    weight: float = 4.0,
    theta: float = 1.0,
    quality: Literal["cls", "iou", "cls*iou"] = "cls",
    per_image: bool = False,
) -> method.Method:
    """KL divergence of the softmax over the positive priors of every object.

    Args:
      weight: of the term; 4 for RetinaNet.
      theta: temperature > 0 of both softmaxes, 1 in the paper; values below 1 sharpen distributions, which are nearly
        flat for scores in 0 .. 1.
      quality: what is ranked: "cls", the score of the object's class; "iou", the IoU of the decoded box with the
        object; "cls*iou", their product.
      per_image: takes the mean over the objects of each image, then over images, instead of over all objects.

    Raises:
      UserError: unknown `quality`, or `theta` not above 0.
    """
    method.check_choice("rm: quality", quality, ("cls", "iou", "cls*iou"))
    method.check("rm: theta", theta, theta > 0, "above 0")

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        del key, student_spec, teacher_spec
        return {}

    def scores(rows: method.PairedRows, assignment: Assignment) -> Array:
        if quality == "iou":
            return iou.box_iou(rows.boxes, assignment.boxes)
        score = classification.label_score(rows.logits, assignment.labels)
        return score if quality == "cls" else score * iou.box_iou(rows.boxes, assignment.boxes)

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        del params
        assignment = context.assignment
        student_scores = scores(context.student_rows, assignment)
        teacher_scores = scores(context.teacher_rows, assignment)
        owner, positive, boxes = assignment.matched, assignment.positive, context.targets.valid.shape[1]
        by_object = divergence.rank_kl(student_scores, teacher_scores, owner, positive, boxes=boxes, theta=theta)
        ranked = jnp.sum(divergence.has_positives(owner, positive, boxes=boxes), 1)
        if per_image:
            return {"rank": jnp.mean(jnp.sum(by_object, 1) / jnp.maximum(ranked, 1))}
        return {"rank": jnp.sum(by_object) / jnp.maximum(jnp.sum(ranked), 1)}

    names = ("rows.logits", *(() if quality == "cls" else ("rows.boxes",)))
    reads = taps.Reads((*names, "assignment", "targets"), names)
    why = "RM ranks all priors of one object, and a second stage looks at a few regions, drawn at random"
    grid = "RM ranks all priors of one object, and one query alone has it"
    return method.Method(init, apply, {"rank": weight}, reads, one_stage=why, grid=grid)
