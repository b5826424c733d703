"""RTMDet's CWD: mmyolo's recipe for RTMDet, channel-wise distillation of normalised neck convolutions.

    L = weight * sum over levels of tau^2/(B C) sum_bc KL(softmax_hw N(T)/tau || softmax_hw N(A(S))/tau)
    N(x) = (x - mean) / sqrt(var + 1e-5) per channel over (B, H, W),  A a 1x1 convolution without bias

Paper: mmyolo's RTMDet distillation recipe, March 2023: CWD (Shu et al., 2021) on features standardised as in PKD (Cao
  et al., 2022).
Taps: neck_conv (RTMDet: the last convolution of each level of the neck before its norm and activation). Needs nothing
  else. The teacher is the next larger RTMDet.
Open: none. The recipe stops at epoch 280 of 300: set `stop` in steps; by default the method runs to the end. The norms
  have neither affine parameters nor running statistics, so they standardise with the biased variance of the batch. MKD
  is compared with this recipe.
Proof: kd/cwd_* (the divergence): largest relative error 1.8e-6; kd/pkd_* (the standardisation, with PKD's constants):
  1.2e-6. The recipe as a whole has not been compared.
Status: formula
"""

import jax.numpy as jnp

from kdjax.distill import adapters, method, taps
from kdjax.losses import divergence, normalization
from kdjax.structs import Array, DetectorOutput


def make(
    *,
    weight: float = 1.0,
    student: str = "neck_conv",
    teacher: str = "neck_conv",
    temperature: float = 1.0,
) -> method.Method:
    """Channel-wise divergence over space of normalised maps.

    Args:
      weight: of the sum over levels, 1 in the recipe.
      student, teacher: taps; the last neck convolutions before their norm and activation.
      temperature: tau of the softmax over space.
    """

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        pairs = taps.pair(student_spec, teacher_spec, student, teacher)
        return adapters.init_adapters(key, pairs, bias=False, always=True)

    def normalized(x: Array) -> Array:
        return normalization.standardize(x, eps=0.0, variance_eps=1e-5)

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        pairs = adapters.adapt(params, taps.pair(context.student, context.teacher, student, teacher))
        levels = [
            jnp.mean(divergence.channel_kl(normalized(s), normalized(t), temperature=temperature)) for _, s, t in pairs
        ]
        return {"cwd": method.sum_over_levels(levels)}

    return method.Method(init, apply, {"cwd": weight}, taps.Reads((student,), (teacher,)))
