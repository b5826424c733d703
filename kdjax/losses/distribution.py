"""Feature maps compared as distributions over space (channel-wise distillation, CWD; MKD's feature alignment)."""

import jax
import jax.numpy as jnp

from kdjax.losses import common
from kdjax.structs import Array


def channel_kl(
    student: Array, teacher: Array, *, temperature: float = 1.0, position_weight: Array | None = None
) -> Array:
    """KL divergence of the teacher's and the student's softmax over space, channel by channel.

        p = softmax_hw(teacher / tau),  q = softmax_hw(student / tau),  e[b, c] = tau^2 sum_hw p (log p - log q)

    Args:
      student: f32[B, H, W, C], any range.
      teacher: f32[B, H, W, C].
      temperature: tau > 0.
      position_weight: f32[B, H, W, 1], multiplies the terms of the sum over space (such as
        `attention.joint_spatial_attention`); None is 1 everywhere. With weights the sum may be negative.

    Returns:
      f32[B, C], >= 0 without weights; zero if the two differ by a constant in each image and channel. Its mean is the
      loss of one level, tau^2/(B C) sum KL.

    Scope: image and channel.
    Peers: mmrazor's `ChannelWiseDivergence`, TorchDistiller; mmdetection-distiller leaves out the teacher's entropy.
    Reference: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", 2021, Eqs. 3-4; MKD Eq. 5.

    Raises:
      ValueError: shapes differ, or the temperature is not above 0.

    Example:
      >>> x = jnp.arange(4.0).reshape(1, 2, 2, 1)
      >>> [round(float(channel_kl(y, x)[0, 0]), 4) for y in (x + 5, 2 * x)]
      [0.0, 0.2122]
    """
    student, teacher = common.float32_pair(student, teacher, "channel_kl")
    if temperature <= 0:
        raise ValueError(f"channel_kl needs a temperature above 0, not {temperature}")
    log_p = jax.nn.log_softmax(teacher / temperature, (1, 2))
    log_q = jax.nn.log_softmax(student / temperature, (1, 2))
    divergence = jnp.exp(log_p) * (log_p - log_q)
    if position_weight is not None:
        divergence = divergence * position_weight
    return temperature**2 * jnp.sum(divergence, (1, 2))
