"""Teach-DETR: the teacher's detections as further targets, each as far as the teacher is sure of it.

    L = weight * the student's own losses, with the detections of a score s >= score_threshold as objects: what a row
        loses that learns a detection is multiplied by its s, and what one loses that learns none by `unmatched`

Paper: Huang et al., "Teach-DETR: Better Training DETR with Teachers", 2022.
Taps: the teacher's detections, as its evaluation finds them, and the student's own loss: a transformer's queries are
    matched with the detections apart from the objects, in every layer; other students assign by their own rules.
    Students that learn masks are refused: detections teach boxes only.
Open: in the code the GIoU loss is 1 - s GIoU; here, as in the paper, s (1 - GIoU). The code joins the detections of
    several teachers; here there is one. The threshold is not told: 0.3. What the losses are divided by is what the
    student's losses are divided by for so many objects, not a sum of scores. Images without detections teach nothing.
    Denoising queries are made of the objects alone. For students other than transformers the paper has no formula.
Proof: none: our sources have the authors' formulas, but no numbers of their code; with the objects as detections of
    score 1 and `unmatched=1`, the student's losses are doubled.
Status: formula
"""

import jax.numpy as jnp

from kdjax.distill import method, taps
from kdjax.errors import UserError
from kdjax.structs import Array, DetectorOutput


def make(
    *, weight: float = 1.0, score_threshold: float = 0.3, max_detections: int = 100, unmatched: float = 0.5
) -> method.Method:
    """The student's own losses for the teacher's detections.

    Args:
      weight: of the sum of these losses.
      score_threshold: detections below are left out, 0 .. 1.
      max_detections: of an image, the best ones, 1 .. 100.
      unmatched: factor of the losses of queries or priors that learn no detection, >= 0.

    Raises:
      UserError: an option out of its range.
    """
    method.check("teach_detr: score_threshold", score_threshold, 0 <= score_threshold <= 1, "0 .. 1")
    method.check("teach_detr: max_detections", max_detections, 1 <= max_detections <= 100, "1 .. 100")
    method.check("teach_detr: unmatched", unmatched, unmatched >= 0, "at least 0")

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        del key, teacher_spec
        if student_spec.prototypes is not None or student_spec.masks_at is not None:
            raise UserError("the student learns masks, and the teacher's detections teach boxes only")
        return {}

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        del params
        found = context.teacher.detections
        assert found is not None
        scores, valid = found.scores[:, :max_detections], found.valid[:, :max_detections]
        kept = valid & (scores >= score_threshold)
        background = jnp.where(jnp.any(kept, 1, keepdims=True), jnp.float32(unmatched), 0.0)
        targets = context.targets._replace(
            boxes=jnp.where(kept[..., None], found.boxes[:, :max_detections], 0.0),
            labels=jnp.where(kept, found.labels[:, :max_detections], 0),
            valid=kept,
            instance_masks=None,
            weights=jnp.concatenate([jnp.where(kept, scores, 0.0), background], 1),
        )
        return {"loss": method.sum_over_levels(context.loss(targets).values())}

    return method.Method(init, apply, {"loss": weight}, taps.Reads(("targets", "loss"), ("detections",)))
