"""MKD: multi-scale, frequency-mask and channel-alignment distillation of the neck.

Reference: "Multi-Knowledge Distillation for Real-Time Object Detection on Edge Devices" (ACML 2024), Eqs. 1-6; the open
points of the paper and the readings taken here are in docs/methods.md.
"""

import jax
import jax.numpy as jnp

from kdjax.losses import attention, distribution, feature, frequency
from kdjax.methods import api


def make(
    *,
    weight: float = 1.0,
    student: str = "neck",
    teacher: str = "neck",
    feature_weight: float = 1.0,
    multiscale_weight: float = 1.0,
    frequency_weight: float = 1.0,
    alignment_weight: float = 1.0,
    scales: tuple[int, ...] = (1, 2, 4),
    multiscale_mode: str = "pool",
    per_scale_mean: bool = False,
    zeta: float = 0.5,
    hermitian: bool = True,
    keep_dc: bool = False,
    temperature: float = 1.0,
    attention_weighted: bool = False,
    normalize: str = "none",
    start: int = 0,
    stop: int = 0,
    warmup: int = 0,
    decay: int = 0,
) -> api.Method:
    """L = weight * (L_fea + L_ms + L_fdmd + L_fad), each a mean over levels, on neck maps behind 1x1 adapters.

    Args:
      weight: alpha of the total (Eq. 6), 1 in the paper.
      student, teacher: taps.
      feature_weight: of L_fea = mean (S' - T)^2 (Eq. 6); 0 is the reading in which the total has the three parts alone.
      multiscale_weight: of L_ms, pooled L2 (Eq. 1).
      frequency_weight: of L_fdmd, L2 under a random mask of the student's frequencies (Eqs. 2-4).
      alignment_weight: of L_fad, the KL divergence over space, channel by channel (Eq. 5).
      scales, multiscale_mode, per_scale_mean: see `losses.feature.multiscale`.
      zeta, hermitian, keep_dc: see `losses.frequency.frequency_mask`; hermitian=False is the paper to the letter.
      temperature: tau of L_fad.
      attention_weighted: multiplies the positions of L_fad by the joint spatial attention of FKD (an extension).
      normalize: "none" (to the letter), or "pkd": both features are standardised per channel over the batch first.
      start, stop, warmup, decay: schedule in steps, see `api.weight_schedule`.

    Raises:
      ValueError: unknown `normalize`, or what the losses and the schedule refuse.
    """
    if normalize not in ("none", "pkd"):
        raise ValueError(f"config.methods.mkd.normalize is {normalize!r}; it must be 'none' or 'pkd'")
    weights = {
        "feature": weight * feature_weight,
        "multiscale": weight * multiscale_weight,
        "frequency": weight * frequency_weight,
        "alignment": weight * alignment_weight,
    }

    def init(key, student_spec, teacher_spec):
        return api.init_adapters(key, api.pair(student_spec, teacher_spec, student, teacher))

    def compare(s, t, key):
        if normalize == "pkd":
            s, t = feature.standardize(s), feature.standardize(t)
        mask = frequency.frequency_mask(key, s.shape[:3], zeta, hermitian=hermitian, keep_dc=keep_dc)
        positions = attention.joint_spatial_attention(s, t) if attention_weighted else None
        return {
            "feature": feature.squared(s, t),
            "multiscale": feature.multiscale(
                s, t, scales=tuple(scales), mode=multiscale_mode, per_scale_mean=per_scale_mean
            ),
            "frequency": frequency.frequency_masked(s, t, mask),
            "alignment": distribution.channel_kl(s, t, temperature=temperature, position_weight=positions),
        }

    def apply(params, context):
        pairs = api.adapt(params, api.pair(context.student, context.teacher, student, teacher))
        levels = [compare(s, t, jax.random.fold_in(context.key, stride)) for stride, s, t in pairs]
        return {
            name: api.mean_over_levels([jnp.mean(level[name]) for level in levels]) for name in weights if weights[name]
        }

    schedule = api.weight_schedule(weights, start=start, stop=stop, warmup=warmup, decay=decay)
    return api.Method(init, apply, schedule)
