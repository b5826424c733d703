"""Teach-DETR: the teacher's detections as further targets, each as far as the teacher is sure of it.

    L = weight * the student's own losses, with the detections of a score s >= score_threshold as objects: what a row
        loses that learns a detection is multiplied by its s, and what one loses that learns none by `unmatched`

Paper: Huang et al., "Teach-DETR: Better Training DETR with Teachers", 2022.
Taps: the teacher's detections, as its evaluation finds them, and the student's own loss: a transformer's queries are
    matched with the detections apart from the objects, in every layer; other students assign by their own rules.
    Students that learn masks are refused: detections teach boxes only.
Open: in the code the GIoU loss is 1 - s GIoU; here, as in the paper, s (1 - GIoU). The code joins the detections of
    several teachers; here there is one. The threshold is not given: 0.3. What the losses are divided by is what the
    student's losses are divided by for so many objects, not a sum of scores. Images without detections teach nothing.
    Denoising queries are made of the objects alone. For students other than transformers the paper has no formula.
Proof: none: our sources have the authors' formulas, but no numbers of their code; with the objects as detections of
    score 1 and `unmatched=1`, the student's losses are doubled.
Status: formula
"""

from kdjax.distill import method, scored, taps
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
    chosen = scored.Choice(score_threshold, max_detections, unmatched).check("teach_detr")

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        del key, teacher_spec
        scored.refuse_masks(student_spec)
        return {}

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        del params
        return {"loss": method.sum_over_levels(context.loss(chosen.targets(context)).values())}

    return method.Method(init, apply, {"loss": weight}, taps.Reads(("targets", "loss"), ("detections",)))
