"""Attention maps of FGD and FKD, which say where and in which channels a map is strong, and losses with them."""

import jax
import jax.numpy as jnp

from kdjax import shapes
from kdjax.losses import common
from kdjax.structs import AnyArray, Array


def spatial_attention(x: AnyArray, *, temperature: float = 0.5) -> Array:
    """Softmax over space of the mean magnitude, times the number of cells: H W softmax_hw(mean_c |x| / temperature).

    Args:
      x: f32[B, H, W, C], any range.
      temperature: > 0; small values sharpen.

    Returns:
      f32[B, H, W, 1], >= 0, mean over space exactly 1.

    Scope: image.
    Peers: FGD's `get_attention`.
    Reference: Yang et al., "Focal and Global Knowledge Distillation for Detectors", 2022, Eqs. 4 and 6.

    Example:
      >>> spatial_attention(jnp.ones((1, 1, 2, 3))).ravel().tolist()
      [1.0, 1.0]
    """
    shapes.check("spatial_attention", x=(x, "B H W C"))
    common.check_positive("spatial_attention", temperature=temperature)
    x = jnp.asarray(x, jnp.float32)
    strength = jnp.mean(jnp.abs(x), 3, keepdims=True)
    return x.shape[1] * x.shape[2] * jax.nn.softmax(strength / temperature, (1, 2))


def channel_attention(x: AnyArray, *, temperature: float = 0.5) -> Array:
    """Softmax over channels of the mean magnitude, times their number: C softmax_c(mean_hw |x| / temperature).

    Args:
      x: f32[B, H, W, C], any range.
      temperature: > 0; small values sharpen.

    Returns:
      f32[B, 1, 1, C], >= 0, mean over channels exactly 1.

    Scope: image.
    Peers: FGD's `get_attention`.
    Reference: Yang et al., "Focal and Global Knowledge Distillation for Detectors", 2022, Eqs. 5 and 7.

    Example:
      >>> channel_attention(jnp.ones((1, 2, 2, 3))).ravel().tolist()
      [1.0, 1.0, 1.0]
    """
    shapes.check("channel_attention", x=(x, "B H W C"))
    common.check_positive("channel_attention", temperature=temperature)
    x = jnp.asarray(x, jnp.float32)
    strength = jnp.mean(jnp.abs(x), (1, 2), keepdims=True)
    return x.shape[3] * jax.nn.softmax(strength / temperature, 3)


def joint_spatial_attention(
    student: AnyArray, teacher: AnyArray, *, temperature: float = 0.5, paper: bool = False
) -> Array:
    """FKD's spatial mask: the mean of the two spatial attention maps; no gradient flows through it.

    Args:
      student: f32[B, H, W, C], any range; the channels may differ from the teacher's.
      teacher: f32[B, H, W, C'].
      temperature: of both softmaxes, > 0.
      paper: softmax of the summed magnitudes, as in the paper's equation, instead of the mean of two softmaxes.

    Returns:
      f32[B, H, W, 1], >= 0, mean over space exactly 1.

    Scope: image.
    Peers: mmrazor's FKD port (`paper=False`).
    Reference: Zhang and Ma, "Improve Object Detection with Feature-based Knowledge Distillation", 2021, Eq. 3.

    Example:
      >>> joint_spatial_attention(jnp.ones((1, 1, 2, 3)), jnp.ones((1, 1, 2, 5))).ravel().tolist()
      [1.0, 1.0]
    """
    shapes.check("joint_spatial_attention", student=(student, "B H W C"), teacher=(teacher, "B H W D"))
    common.check_positive("joint_spatial_attention", temperature=temperature)
    if paper:
        student, teacher = jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)
        strength = jnp.mean(jnp.abs(student), 3, keepdims=True) + jnp.mean(jnp.abs(teacher), 3, keepdims=True)
        mask = strength.shape[1] * strength.shape[2] * jax.nn.softmax(strength / temperature, (1, 2))
    else:
        student_map = spatial_attention(student, temperature=temperature)
        mask = 0.5 * (student_map + spatial_attention(teacher, temperature=temperature))
    return jax.lax.stop_gradient(mask)


def attention_weighted(student: AnyArray, teacher: AnyArray, *, temperature: float = 0.5) -> Array:
    """Squared difference weighted by the teacher's attention: As(teacher) Ac(teacher) (student - teacher)^2.

    FGD's focal term is its product with the masks of `focal_masks`, summed and divided by B.

    Args:
      student: f32[B, H, W, C], any range.
      teacher: f32[B, H, W, C].
      temperature: of both attentions, > 0.

    Returns:
      f32[B, H, W, C], >= 0, zero at equality. No gradient flows into the attention maps.

    Scope: image.
    Peers: FGD's `get_fea_loss`.
    Reference: Yang et al., "Focal and Global Knowledge Distillation for Detectors", 2022, Eq. 8.

    Example:
      >>> attention_weighted(jnp.full((1, 1, 2, 1), 3.0), jnp.ones((1, 1, 2, 1))).ravel().tolist()
      [4.0, 4.0]
    """
    student, teacher = common.float32_pair(student, teacher, "attention_weighted", "B H W C")
    weight = spatial_attention(teacher, temperature=temperature) * channel_attention(teacher, temperature=temperature)
    return jax.lax.stop_gradient(weight) * jnp.square(student - teacher)


def attention_difference(student: AnyArray, teacher: AnyArray, *, temperature: float = 0.5) -> Array:
    """L1 distance of the attention maps: sum_hw |As(student) - As(teacher)| + sum_c |Ac(student) - Ac(teacher)|.

    Args:
      student: f32[B, H, W, C], any range.
      teacher: f32[B, H, W, C].
      temperature: of the attentions, > 0.

    Returns:
      f32[B], 0 .. 2 (H W + C), zero if the attention maps agree.

    Scope: image.
    Peers: FGD's `get_mask_loss`.
    Reference: Yang et al., "Focal and Global Knowledge Distillation for Detectors", 2022, Eq. 9.

    Example:
      >>> attention_difference(jnp.zeros((1, 1, 2, 1)), jnp.ones((1, 1, 2, 1))).tolist()
      [0.0]
    """
    student, teacher = common.float32_pair(student, teacher, "attention_difference", "B H W C")
    distance = jnp.zeros(student.shape[0], jnp.float32)
    for attention in (spatial_attention, channel_attention):
        difference = attention(student, temperature=temperature) - attention(teacher, temperature=temperature)
        distance = distance + jnp.sum(common.absolute(difference), (1, 2, 3))
    return distance
