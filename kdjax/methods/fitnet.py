"""FitNet: the plain L2 or L1 distance of the neck's maps.

    L = weight * mean over levels of mean_bhwc (A(S) - T)^2        or |A(S) - T|

Paper: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, Eq. 3.
Taps: neck (any detector), or any other map. Needs nothing else; A is a 1x1 convolution where channels differ.
Open: the paper has a single hint layer; here the mean over levels is taken. Toolboxes use the L1 distance as well
  (`distance="l1"`), and sums over H, W and C divided by B instead of the mean (`reduction="sum"`), which gives each
  level about four times the weight of the next coarser one. The weight depends on the reduction: 1 for the mean; for
  the single hint layer of classifiers 100 is usual.
Proof: kd/feature_misc_* (mmrazor's L2Loss, the sum over one level): largest relative error 6e-7. No reference file has
  the L1 distance.
Status: proven
"""

from typing import Literal

import jax.numpy as jnp

from kdjax.distill import adapters, method, taps
from kdjax.losses import distance
from kdjax.structs import Array, DetectorOutput

DISTANCES = {"l2": distance.squared, "l1": distance.l1}


def make(
    *,
    weight: float = 1.0,
    student: str = "neck",
    teacher: str = "neck",
    distance: Literal["l2", "l1"] = "l2",
    reduction: Literal["mean", "sum"] = "mean",
) -> method.Method:
    """Plain distance of two maps.

    Args:
      weight: of the mean over levels; 1.
      student, teacher: taps.
      distance: "l2", squared differences, or "l1", absolute ones.
      reduction: of a level: "mean", or "sum" over H, W and C divided by B.

    Raises:
      UserError: unknown distance or reduction.
    """
    method.check_choice("fitnet: distance", distance, tuple(DISTANCES))
    method.check_choice("fitnet: reduction", reduction, ("mean", "sum"))

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        return adapters.init_adapters(key, taps.pair(student_spec, teacher_spec, student, teacher))

    def compare(s: Array, t: Array) -> Array:
        loss = DISTANCES[distance](s, t)
        return jnp.mean(loss) if reduction == "mean" else jnp.sum(loss) / len(loss)

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        pairs = adapters.adapt(params, taps.pair(context.student, context.teacher, student, teacher))
        return {"feature": method.mean_over_levels([compare(s, t) for _, s, t in pairs])}

    return method.Method(init, apply, {"feature": weight}, taps.Reads((student,), (teacher,)))
