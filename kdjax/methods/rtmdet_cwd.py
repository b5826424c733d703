"""The public recipe for RTMDet: channel-wise distillation of normalised neck convolutions.

Reference: mmyolo's RTMDet distillation recipe of March 2023 (CWD, Shu et al. 2021, on features standardised as in PKD,
Cao et al. 2022); the anchor that MKD is measured against (docs/methods.md).
"""

import jax.numpy as jnp

from kdjax.losses import distribution, feature
from kdjax.methods import api


def make(
    *,
    weight: float = 1.0,
    student: str = "neck_conv",
    teacher: str = "neck_conv",
    temperature: float = 1.0,
    start: int = 0,
    stop: int = 0,
    warmup: int = 0,
    decay: int = 0,
) -> api.Method:
    """L = weight * sum over levels of CWD(BN(A S), BN(T)): 1x1 adapter without bias, norms without affine.

    Args:
      weight: of the sum over levels, 1 in the recipe.
      student, teacher: taps; the last neck convolutions before their norm and activation.
      temperature: tau of the softmax over space.
      start, stop, warmup, decay: schedule in steps, see `api.weight_schedule`; the recipe stops at epoch 280 of 300.
    """

    def init(key, student_spec, teacher_spec):
        pairs = api.pair(student_spec, teacher_spec, student, teacher)
        return api.init_adapters(key, pairs, bias=False, always=True)

    def normalized(x):
        return feature.standardize(x, eps=0.0, variance_eps=1e-5)

    def apply(params, context):
        pairs = api.adapt(params, api.pair(context.student, context.teacher, student, teacher))
        levels = [
            jnp.mean(distribution.channel_kl(normalized(s), normalized(t), temperature=temperature))
            for _, s, t in pairs
        ]
        return {"cwd": sum(levels)}

    return api.Method(
        init, apply, api.weight_schedule({"cwd": weight}, start=start, stop=stop, warmup=warmup, decay=decay)
    )
