"""DKD: decoupled knowledge distillation, with separate terms for the target class and for all others.

    sigmoid heads:  TCKD = KL(Bern(sigmoid(z_y^T)) || Bern(sigmoid(z_y^S)))
    softmax heads:  TCKD = tau^2 KL((p_y, 1 - p_y) of the teacher || of the student),  p = softmax(z / tau)
    both:           NCKD = tau^2 KL(softmax_{k != y}(z^T / tau) || softmax_{k != y}(z^S / tau))
    L = weight * mean over the positive priors of the batch of (target_weight TCKD + other_weight NCKD)
    two stages: the same mean over all regions of the student's assignment, y the background where there is no object

Paper: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022.
Taps: the class logits of regions (two stages on both sides, the same classes) or of priors (dense heads, the same
    priors and classes on both sides). It needs the student's assignment: y is the class of a region or of a positive
    prior. NCKD needs three classes or more, the background included: with fewer it is 0, so set other_weight=0.
Open: the paper's detector is Faster R-CNN, whose regions have softmax scores with a background class: what the
    student's assigner draws goes through both second stages. Dense heads have sigmoid scores and no background class,
    so there only positives have a target, and TCKD compares its sigmoids (our own form); head="softmax" is the paper's
    form on the same priors. mmrazor's port sums over the regions instead of taking their mean. For classification the
    authors increase the weight over the first 20 epochs (`warmup`, in steps).
Proof: the softmax form: kd/logit_* (mdistiller and mmrazor): largest relative error 5.3e-7; the sigmoid form: none, no
    public original.
Status: formula
"""

from typing import Literal

from kdjax.distill import method, taps
from kdjax.losses import divergence
from kdjax.structs import Array, DetectorOutput

DIVERGENCES = {"sigmoid": divergence.decoupled_sigmoid_kl, "softmax": divergence.decoupled_kl}


def make(
    *,
    weight: float = 1.0,
    head: Literal["sigmoid", "softmax"] | None = None,
    target_weight: float = 1.0,
    other_weight: float = 0.25,
    temperature: float = 1.0,
) -> method.Method:
    """Divergence of the target class and divergence among the other classes, on regions or on positive priors.

    Args:
      weight: of both terms.
      head: "sigmoid" or "softmax", what turns the logits into scores; None: "softmax" of regions, "sigmoid" of priors.
      target_weight: of TCKD, 1 in the paper (alpha).
      other_weight: of NCKD, 0.25 for detection, 0.5 to 8 for classification in the paper (beta).
      temperature: tau > 0; 1 for detection, 4 for small classification in the paper.

    Raises:
      UserError: unknown `head`, or temperature not above 0.
    """
    method.check_choice("dkd: head", head, (None, "sigmoid", "softmax"))
    method.check("dkd: temperature", temperature, temperature > 0, "above 0")
    weights = {"target": weight * target_weight, "others": weight * other_weight}

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        del key, teacher_spec
        method.check_head("dkd", head, student_spec)
        return {}

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        del params
        rows, assignment = context.student_rows, context.assignment
        divergences = DIVERGENCES[head or rows.form]
        target, others = divergences(
            rows.logits, context.teacher_rows.logits, assignment.labels, temperature=temperature
        )
        terms, compared = {"target": target, "others": others}, method.compared_rows(rows, assignment)
        return {name: method.mean_over_positives(terms[name], compared) for name in terms if weights[name]}

    return method.Method(init, apply, weights, taps.Reads(("rows.logits", "assignment"), ("rows.logits",)))
