"""LD: localization distillation, of box edges as distributions over bins.

    kl_i = 1/4 sum over edges of tau^2/(n+1) sum over bins of p (log p - log q), p and q softmaxes at tau of n + 1 bins
    main:    L = main_weight * sum_{i positive} w_i kl_i / W,   w_i = stop_gradient(max_k sigmoid(z_ik^S))
    region:  L = region_weight / 4 * sum_i u_i kl_i / W,        W = max(sum_{i positive} w_i, 1)
    classes: L = class_weight * sum over levels of (sum_{i positive} t^2/K KL(softmax(z^T/t) || softmax(z^S/t))
                 / max(positives of the level, 1)),             t = class_temperature
    u_i (valuable region) = the largest IoU of anchor i with an object whose DIoU lies in [gamma a, a), else 0; a = mean
    plus deviation of the IoU of the object's candidates, its nearest anchors of each level (as in ATSS)

Paper: Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022.
Taps: box_reg with bins (f32[B, H, W, A*4*(n+1)], heads such as GFL's; heads with one number per edge are refused) and
    cls_logits; the same priors, bins and classes on both sides. It needs boxes and the student's assignment.
Open: the original's LD terms are sums over the batch of a device, so their weight grows with the batch; here they are
    divided by W, as the detector's own box losses are, and the published weights have to be tuned again.
    normalizer="sum" is the original. Anchors are squares around the priors, anchor_scale strides wide.
Proof: main: kd/ld_* (mmdetection's whole step, through this method): largest relative error 3.3e-7; the divergences:
    kd/logit_* (the authors' code and mmdetection): 1.2e-6; region: none, compared with a slow loop.
Status: proven
"""

from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.boxes import assign
from kdjax.distill import method, taps
from kdjax.errors import UserError
from kdjax.losses import divergence, regions
from kdjax.structs import Array, DetectorOutput


def make(
    *,
    weight: float = 1.0,
    main_weight: float = 0.25,
    region_weight: float = 0.25,
    class_weight: float = 10.0,
    temperature: float = 10.0,
    class_temperature: float = 2.0,
    gamma: float = 0.25,
    anchor_scale: float = 8.0,
    candidates: int = 9,
    normalizer: Literal["weights", "sum"] = "weights",
) -> method.Method:
    """Divergence of the edge distributions on positives and in the valuable region, and of the classes on positives.

    Args:
      weight: of all terms.
      main_weight: of the edge term on positive priors, 0.25 in the paper (RetinaNet 5).
      region_weight: of the edge term in the valuable region, 0.25 in the paper.
      class_weight: of the class term on positive priors, 10 in the paper.
      temperature: tau > 0 of the edges, 10 in the paper.
      class_temperature: > 0, of the classes; 2, with RetinaNet 8 in the paper.
      gamma: lower bound of the region as a share of a, 0 .. 1; 0.25 in the paper's code.
      anchor_scale: side of the square anchors that the region is measured with, in strides; 8 for GFL.
      candidates: number of nearest anchors per level from which a is computed; 9 in the paper.
      normalizer: "weights" divides main and region by W; "sum" does not.

    Raises:
      UserError: unknown `normalizer`, a temperature not above 0, or `gamma` outside 0 .. 1.
    """
    method.check_choice("ld: normalizer", normalizer, ("weights", "sum"))
    method.check("ld: temperature", temperature, temperature > 0, "above 0")
    method.check("ld: class_temperature", class_temperature, class_temperature > 0, "above 0")
    method.check("ld: gamma", gamma, 0 <= gamma <= 1, "within 0 .. 1")
    weights = {"main": weight * main_weight, "region": weight * region_weight / 4, "classes": weight * class_weight}

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        del key
        bins = [cast(method.PairedRows, side.rows).distribution.shape[-1] for side in (student_spec, teacher_spec)]
        if bins[0] != bins[1]:
            raise UserError(
                f"the distributions of box edges have {bins[0]} bins (student) and {bins[1]} (teacher): their numbers "
                "must be equal"
            )
        return {}

    def region(context: method.Context, sizes: tuple[int, ...]) -> Array:
        location = context.student_rows.location
        centres, half = location[:, :2], location[:, 2:] * anchor_scale / 2
        anchors = jnp.concatenate([centres - half, centres + half], -1)
        boxes, valid = context.targets.boxes, context.targets.valid
        *_, threshold = assign.atss_candidates(anchors, boxes, level_sizes=sizes, topk=candidates)
        return regions.valuable_region(anchors, boxes, valid, threshold, gamma=gamma)

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        del params
        rows, assignment = (context.student_rows, context.teacher_rows), context.assignment
        sizes, class_logits = rows[0].level_sizes, [side.logits for side in rows]
        by_edge = [side.distribution for side in rows]
        kl = jnp.mean(divergence.softmax_kl(*by_edge, temperature=temperature, class_reduction="mean"), -1)
        confidence = jax.lax.stop_gradient(jnp.max(jax.nn.sigmoid(class_logits[0]), -1))
        confidence = jnp.where(assignment.positive, confidence, 0.0)
        total = jnp.maximum(jnp.sum(confidence), 1.0) if normalizer == "weights" else 1.0
        terms: dict[str, Array] = {"main": jnp.sum(confidence * kl) / total}
        if weights["region"]:
            valuable = jnp.where(assignment.ignore, 0.0, region(context, sizes))
            terms["region"] = jnp.sum(valuable * kl) / total
        if weights["classes"]:
            soft = divergence.softmax_kl(*class_logits, temperature=class_temperature, class_reduction="mean")
            levels = (jnp.split(x, np.cumsum(sizes)[:-1], 1) for x in (soft, assignment.positive))
            terms["classes"] = method.sum_over_levels(
                method.mean_over_positives(*level) for level in zip(*levels, strict=True)
            )
        return {name: value for name, value in terms.items() if weights[name]}

    names = ("rows.logits", "rows.distribution")
    reads = taps.Reads((*names, "rows.location", "targets", "assignment"), names)
    why = "LD compares box edges as distributions over bins, and regions have one number for each"
    grid = "LD compares the distances of the edges from one prior, and each query counts them from a box of its own"
    return method.Method(init, apply, weights, reads, one_stage=why, grid=grid)
