"""Hinton: soft labels, with the class scores of the teacher as targets.

    softmax heads:  e = tau^2 KL(softmax(z^T / tau) || softmax(z^S / tau)),  L = weight * sum e / number of rows
    sigmoid heads:  e = tau^2 sum_k KL(Bern(sigmoid(z_k^T / tau)) || Bern(sigmoid(z_k^S / tau))),
                    L = weight * sum e / max(number of positive priors, 1)

Paper: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
Taps: the class logits of regions (two stages on both sides, the same classes) or of priors (dense heads, the same
    priors and classes on both sides). It needs the student's assignment.
Open: the paper has softmax classifiers; in detectors these classify the regions of two-stage detectors, here all that
    the student's assigner draws. Dense heads have sigmoid scores: the sum over the classes is taken (mmdetection's
    losses take the mean: class_reduction="mean", K times smaller). The priors are the positives, or with priors="all"
    all that the assigner does not ignore.
Proof: the softmax form: kd/logit_* (mdistiller, mmrazor, mmdetection): largest relative error 1.2e-6; the sigmoid form:
    none, no public original.
Status: formula
"""

from typing import Literal

import jax.numpy as jnp

from kdjax.distill import method, taps
from kdjax.losses import divergence
from kdjax.structs import Array, DetectorOutput


def make(
    *,
    weight: float = 1.0,
    head: Literal["sigmoid", "softmax"] | None = None,
    priors: Literal["positive", "all"] | None = None,
    temperature: float = 1.0,
    class_reduction: Literal["sum", "mean"] = "sum",
) -> method.Method:
    """KL divergence of the class scores, row by row.

    Args:
      weight: of the term; in classification 0.9 with 0.1 of the task's loss is usual.
      head: "sigmoid" or "softmax", what turns the logits into scores; None: "softmax" of regions, "sigmoid" of priors.
      priors: "positive", those of the student's assignment, or "all", those that it does not ignore; None: all regions,
        but positive priors alone.
      temperature: tau > 0.
      class_reduction: "sum" or "mean" over the classes.

    Raises:
      UserError: unknown `head`, `priors` or `class_reduction`, or temperature not above 0.
    """
    method.check_choice("hinton: head", head, (None, "sigmoid", "softmax"))
    method.check_choice("hinton: priors", priors, (None, "positive", "all"))
    method.check_choice("hinton: class_reduction", class_reduction, ("sum", "mean"))
    method.check("hinton: temperature", temperature, temperature > 0, "above 0")

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        del key, teacher_spec
        method.check_head("hinton", head, student_spec)
        return {}

    def row_divergence(s: Array, t: Array, form: str) -> Array:
        if form == "softmax":
            return divergence.softmax_kl(s, t, temperature=temperature, class_reduction=class_reduction)
        by_class = divergence.sigmoid_kl(s, t, temperature=temperature)
        return jnp.sum(by_class, -1) if class_reduction == "sum" else jnp.mean(by_class, -1)

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        del params
        rows, assignment = context.student_rows, context.assignment
        form = head or rows.form
        of_choice = {"positive": assignment.positive, "all": ~assignment.ignore}
        compared = of_choice[priors] if priors else method.compared_rows(rows, assignment)
        counted = compared if form == "softmax" else assignment.positive
        by_row = row_divergence(rows.logits, context.teacher_rows.logits, form)
        total = jnp.sum(jnp.where(compared, by_row, 0.0))
        return {"classes": total / jnp.maximum(jnp.sum(counted), 1)}

    return method.Method(init, apply, {"classes": weight}, taps.Reads(("rows.logits", "assignment"), ("rows.logits",)))
