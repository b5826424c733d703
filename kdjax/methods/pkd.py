"""PKD: Pearson correlation of the neck's maps, channel by channel.

    s^ = (s - mean) / (std + 1e-6) per channel over (B, H, W), t^ likewise
    L = weight * sum over levels of mean_bhwc (s^ - t^)^2 / 2        = weight * sum over levels of mean_c (1 - r_c)

Paper: Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
  NeurIPS 2022, Eqs. 2-3.
Taps: neck (any detector). Needs nothing else; of the teacher only backbone and neck run. A 1x1 adapter where channels
  differ; a student's map of another size is resized bilinearly to the teacher's.
Open: the loss equals 1 - r with the biased standard deviation; both published codes take the unbiased one, which
  multiplies the loss by (m - 1)/m, m = B H W (`ddof=1`). The codes compute mean and deviation on each device's part of
  the batch; here they are those of the whole batch. No adapter is published for unequal channels.
Proof: kd/pkd_* (mmrazor's PKDLoss, ddof=1): largest relative error 1.2e-6.
Status: proven
"""

from typing import Literal

import jax.numpy as jnp

from kdjax.distill import adapters, method, taps
from kdjax.losses import distance
from kdjax.structs import Array, DetectorOutput


def make(
    *,
    weight: float = 10.0,
    student: str = "neck",
    teacher: str = "neck",
    ddof: Literal[0, 1] = 0,
) -> method.Method:
    """Squared difference of standardised maps.

    Args:
      weight: of the sum over levels; 10 for one-stage teachers, 6 for two-stage ones (AP varies by 0.3 from 3 to 13).
      student, teacher: taps.
      ddof: 0 for the biased standard deviation, 1 for the unbiased one of the published codes.

    Raises:
      UserError: `ddof` is neither 0 nor 1.
    """
    method.check_choice("pkd: ddof", ddof, (0, 1))

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        return adapters.init_adapters(key, taps.pair(student_spec, teacher_spec, student, teacher))

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        pairs = adapters.adapt(params, taps.pair(context.student, context.teacher, student, teacher))
        return {"correlation": method.sum_over_levels(jnp.mean(distance.pearson(s, t, ddof=ddof)) for _, s, t in pairs)}

    return method.Method(init, apply, {"correlation": weight}, taps.Reads((student,), (teacher,)))
