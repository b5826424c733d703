"""Yao 2025: resampled features with spatial attention, decoupled logits, one-to-many alignment; read from the abstract.

    X = resample(S'),  Y = Gen(sigmoid(Conv7x7([mean_c X ; max_c X])) X),  Gen = Conv3x3, ReLU, Conv3x3
    features:       L = feature_weight * mean over levels of mean (Y - T)^2
    target, others: L = logit_weight * mean of (target_weight TCKD + other_weight NCKD) over positive priors, or over
                    all regions of the student's assignment, as in dkd
    many:           L = many_weight * mean over levels i of sum_{|i-j| <= reach} o_ij mean (FAM_ij(S_i) - T_j)^2,
                    FAM_ij = Conv3x3(ReLU(Conv1x1(S_i resized to level j))),  o_ij ~ 2^-|i-j|, summing to 1 over j

Paper: Yao et al., "An Improved Knowledge Distillation Algorithm and Its Application to Object Detection", 2025. Only
    its abstract is public: it names the parts, no formula and no number. All formulas are ours.
Taps: neck (any detector), and for the logits those of priors (dense heads, the same priors and classes on both sides)
    or of regions (two stages on both sides, the same classes), with the student's assignment. S' is the student's map,
    after a 1x1 convolution where the channels differ.
Open: everything. Resampling: cells masked at random as in MGD (resample="mask"), average pooling and interpolation back
    ("interp"), or "none". The attention is applied to the student's side, before the generator, so that it cannot
    shrink both sides of the loss: spatial_attention=False leaves it out. foreground=True weights cells by the teacher's
    spatial attention. Target and non-target classes are read as DKD, one-to-many as a level compared with its
    neighbours. A weight of 0 switches a part off.
Proof: none: no public original.
Status: experimental
"""

from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from kdjax import nn
from kdjax.distill import adapters, method, taps
from kdjax.losses import attention, distance, divergence, reconstruction
from kdjax.structs import Array, DetectorOutput

DIVERGENCES = {"sigmoid": divergence.decoupled_sigmoid_kl, "softmax": divergence.decoupled_kl}


def make(
    *,
    weight: float = 1.0,
    student: str = "neck",
    teacher: str = "neck",
    feature_weight: float = 1.0,
    logit_weight: float = 1.0,
    many_weight: float = 1.0,
    resample: Literal["mask", "interp", "none"] = "mask",
    drop: float = 0.65,
    factor: int = 2,
    spatial_attention: bool = True,
    foreground: bool = False,
    head: Literal["sigmoid", "softmax"] | None = None,
    target_weight: float = 1.0,
    other_weight: float = 0.25,
    temperature: float = 1.0,
    reach: int = 1,
) -> method.Method:
    """Reconstructed features, decoupled class scores, and every level compared with its neighbours.

    Args:
      weight: of all terms.
      student, teacher: taps of the features.
      feature_weight, logit_weight, many_weight: of the three parts; 0 switches a part off.
      resample: "mask", "interp" or "none", what is done to the student's features first.
      drop: share of the cells that "mask" zeroes, 0 .. 1; 0.65, or 0.45 for two-stage detectors, in MGD.
      factor: window >= 1 of the pooling of "interp", in cells; 1 changes nothing.
      spatial_attention: whether the resampled features are weighted by a learned map.
      foreground: weights the cells of the feature part by FGD's spatial attention of the teacher (mean 1).
      head: "sigmoid" or "softmax", what turns the class logits into scores; None: "softmax" of regions, "sigmoid" of
        priors.
      target_weight, other_weight: of the two terms of the logits, as in dkd.
      temperature: tau > 0 of the logits.
      reach: largest distance of the two levels of a pair, in levels, >= 0.

    Raises:
      UserError: unknown `resample` or `head`, or a number out of its range.
    """
    method.check_choice("yao: resample", resample, ("mask", "interp", "none"))
    method.check_choice("yao: head", head, (None, "sigmoid", "softmax"))
    method.check("yao: drop", drop, 0 <= drop <= 1, "within 0 .. 1")
    method.check("yao: factor", factor, factor >= 1, "at least 1")
    method.check("yao: temperature", temperature, temperature > 0, "above 0")
    method.check("yao: reach", reach, reach >= 0, "at least 0")
    weights = {
        "features": weight * feature_weight,
        "target": weight * logit_weight * target_weight,
        "others": weight * logit_weight * other_weight,
        "many": weight * many_weight,
    }

    def neighbours(pairs: list[taps.Pair]) -> Iterator[tuple[int, Array, int, Array, float]]:
        """Every pair of levels (student i, teacher j) that is compared, with its weight o_ij."""
        for i, pair in enumerate(pairs):
            near = {j: 2.0 ** -abs(i - j) for j in range(len(pairs)) if abs(i - j) <= reach}
            for j, share in near.items():
                yield pair.stride, pair.student, pairs[j].stride, pairs[j].teacher, share / sum(near.values())

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        method.check_head("yao", head, student_spec)
        pairs = taps.pair(student_spec, teacher_spec, student, teacher)
        params = {}
        if weights["features"]:
            params = {
                "adapters": adapters.init_adapters(key, pairs),
                "generators": adapters.init_generators(key, pairs),
            }
            if spatial_attention:
                params["attention"] = {
                    str(pair.stride): nn.init_conv2d(
                        jax.random.fold_in(jax.random.fold_in(key, 1), pair.stride), 7, 2, 1
                    )
                    for pair in pairs
                }
        if weights["many"]:
            params["many"] = {}
            for i, s, j, t, _ in neighbours(pairs):
                first, second = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 2), 1000 * i + j))
                params["many"][f"{i}-{j}"] = {
                    "first": nn.init_conv2d(first, 1, s.shape[-1], t.shape[-1]),
                    "second": nn.init_conv2d(second, 3, t.shape[-1], t.shape[-1]),
                }
        return params

    def resampled(x: Array, key: Array) -> Array:
        if resample == "mask":
            return x * reconstruction.keep_mask(jax.random.uniform(key, (*x.shape[:3], 1)), drop)
        if resample == "interp":
            return nn.resize_bilinear(nn.avg_pool(x, int(factor)), taps.map_size(x))
        return x

    def rebuilt(params: method.Params, pair: taps.Pair, key: Array) -> Array:
        """The feature part of one level."""
        stride, s, t = pair
        x = resampled(s, jax.random.fold_in(key, stride))
        if spatial_attention:
            summary = jnp.concatenate([jnp.mean(x, -1, keepdims=True), jnp.max(x, -1, keepdims=True)], -1)
            x = x * jax.nn.sigmoid(nn.conv2d(summary, **params["attention"][str(stride)]))
        error = distance.squared(reconstruction.reconstruct(x, params["generators"][str(stride)]), t)
        return jnp.mean(error * attention.spatial_attention(t) if foreground else error)

    def aligned(params: method.Params, s: Array, t: Array) -> Array:
        """The term of one pair of levels; FAM has the form of the generator, with a 1x1 convolution first."""
        s = nn.resize_bilinear(s.astype(jnp.float32), taps.map_size(t)) if s.shape[1:3] != t.shape[1:3] else s
        return jnp.mean(distance.squared(reconstruction.reconstruct(s, params), t))

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        pairs = taps.pair(context.student, context.teacher, student, teacher)
        terms = {}
        if weights["features"]:
            adapted = adapters.adapt(params["adapters"], pairs)
            terms["features"] = method.mean_over_levels([rebuilt(params, pair, context.key) for pair in adapted])
        if weights["target"] or weights["others"]:
            rows, labels = context.student_rows, context.assignment.labels
            divergences = DIVERGENCES[head or rows.form]
            target, others = divergences(rows.logits, context.teacher_rows.logits, labels, temperature=temperature)
            compared = method.compared_rows(rows, context.assignment)
            terms["target"] = method.mean_over_positives(target, compared)
            terms["others"] = method.mean_over_positives(others, compared)
        if weights["many"]:
            total = method.sum_over_levels(
                share * aligned(params["many"][f"{i}-{j}"], s, t) for i, s, j, t, share in neighbours(pairs)
            )
            terms["many"] = total / len(pairs)
        return {name: value for name, value in terms.items() if weights[name]}

    rows = ("rows.logits",) if weights["target"] or weights["others"] else ()
    reads = taps.Reads((student, *rows, *(("assignment",) if rows else ())), (teacher, *rows))
    return method.Method(init, apply, weights, reads)
