"""Normalisation of arrays before they are compared."""

from typing import Literal

import jax
import jax.numpy as jnp

from kdjax import shapes
from kdjax.losses import common
from kdjax.structs import AnyArray, Array


def unit_norm(x: AnyArray, *, eps: float = 1e-12) -> Array:
    """Scales each image to unit Euclidean norm over (H, W, C): x / max(|x|, eps).

    Args:
      x: f32[B, ...], any range.
      eps: smallest divisor.

    Returns:
      f32[B, ...]; an image of zeros stays zero, with a finite gradient.

    Scope: image.
    Peers: mmrazor's `L2Loss(normalize=True)`.

    Example:
      >>> unit_norm(jnp.array([[0.0, 4.0], [0.0, 0.0]])).tolist()
      [[0.0, 1.0], [0.0, 0.0]]
    """
    x = jnp.asarray(x, jnp.float32)
    square = jnp.sum(jnp.square(x), tuple(range(1, x.ndim)), keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, eps**2))


def unit_mean(x: AnyArray, *, axis_name: str | None = None, eps: float = 1e-12) -> Array:
    """Scales a nonnegative array to mean 1 over the whole batch: x / max(mean x, eps).

    Args:
      x: f32[B, ...], >= 0.
      axis_name: under `pmap` or `shard_map`, the mapped axis that splits the batch.
      eps: smallest divisor.

    Returns:
      f32[B, ...]; zeros stay zeros.

    Scope: global batch.

    Example:
      >>> unit_mean(jnp.array([1.0, 3.0])).tolist()
      [0.5, 1.5]
    """
    x = jnp.asarray(x, jnp.float32)
    axes = tuple(range(x.ndim))
    mean = common.sum_over(x, axes, axis_name) / common.count_over(x, axes, axis_name)
    return x / jnp.maximum(mean, eps)


def standardize(
    x: AnyArray,
    *,
    axes: tuple[int, ...] = (0, 1, 2),
    eps: float = 1e-6,
    variance_eps: float = 0.0,
    ddof: int = 0,
    axis_name: str | None = None,
) -> Array:
    """Mean 0 and standard deviation 1 over `axes`: (x - mean) / (sqrt(var + variance_eps) + eps).

    `eps=1e-6` is PKD's normalisation; `eps=0, variance_eps=1e-5` is batch norm without affine. The gradient flows
    through mean and deviation.

    Args:
      x: f32[B, H, W, C], any range; bfloat16 is computed in float32.
      axes: the axes of a statistic; the default gives one mean and deviation per channel.
      eps: added to the deviation.
      variance_eps: added to the variance.
      ddof: 0 for the biased variance, 1 for the unbiased one (divisor count - 1, at least 1).
      axis_name: under `pmap` or `shard_map`, the mapped axis that splits the batch: sums run over its devices too.

    Returns:
      f32[B, H, W, C]; a constant channel gives 0, with a finite gradient.

    Scope: global batch with the default axes.
    Peers: `torch.nn.BatchNorm2d(affine=False)` in training mode; `norm` of mmrazor's PKDLoss with ddof=1.
    Reference: Cao et al., "PKD", 2022, Eq. 2.

    Example:
      >>> standardize(jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)).ravel().round(3).tolist()
      [-1.0, 1.0]
    """
    _, centred, variance = common.moments(x, axes=axes, ddof=ddof, axis_name=axis_name)
    return centred / (common.safe_sqrt(variance + variance_eps) + eps)


def match_statistics(
    student: AnyArray, teacher: AnyArray, *, eps: float = 1e-6, ddof: int = 1, axis_name: str | None = None
) -> Array:
    """Gives each channel of the student's map the mean and standard deviation of the teacher's channel (CrossKD).

        (student - mean_s) / (std_s + eps) * std_t + mean_t

    The gradient flows through the student's statistics. In CrossKD the result enters the rest of the teacher's head
    (`Detector.head`), and the predictions there are compared with the teacher's own by `modulated_bce`, `giou` or
    `softmax_kl`.

    Args:
      student: f32[B, H, W, C], output of a tower convolution before the activation.
      teacher: f32[B, H, W, C], the same tap of the teacher.
      eps: added to the student's standard deviation.
      ddof: 1 for the unbiased deviation, as in the published code, or 0.
      axis_name: under `pmap` or `shard_map`, the mapped axis that splits the batch.

    Returns:
      f32[B, H, W, C]; the teacher's map itself (up to eps) if the student's is a positive affine map of it.

    Scope: global batch.
    Peers: CrossKD's `align_scale`. The published code passes the maps before the activation, but the ReLU works in
      place, so it aligns relu(student) with relu(teacher).
    Reference: Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", 2024, section 3.2.

    Example:
      >>> import numpy as np
      >>> teacher = np.array([1.0, 2.0, 6.0]).reshape(3, 1, 1, 1)
      >>> [round(float(v), 3) for v in match_statistics(5 * teacher - 3, teacher).ravel()]
      [1.0, 2.0, 6.0]
    """
    student, teacher = common.float32_pair(student, teacher, "match_statistics", "B H W C")
    _, centred, variance = common.moments(student, ddof=ddof, axis_name=axis_name)
    mean, _, teacher_variance = common.moments(teacher, ddof=ddof, axis_name=axis_name)
    scale = common.safe_sqrt(teacher_variance) / (common.safe_sqrt(variance) + eps)
    return centred * scale + mean


def min_max(
    x: AnyArray,
    *,
    scope: Literal["image", "channel", "batch"] = "image",
    eps: float = 1e-6,
    axis_name: str | None = None,
) -> Array:
    """Rescales to 0 .. 1: (x - min) / (max - min); 0 where max - min < eps.

    Args:
      x: f32[B, H, W, C], any range.
      scope: what minimum and maximum run over: "image" (H, W and C jointly, which keeps the relative magnitudes of the
        channels), "channel" (H and W), or "batch" (everything).
      eps: a smaller range counts as constant; then value and gradient are 0.
      axis_name: under `pmap` or `shard_map`, the mapped axis that splits the batch; matters to the scope "batch" only.

    Returns:
      f32[B, H, W, C] in 0 .. 1. The gradient flows through minimum and maximum.

    Scope: as chosen.
    Peers: none known. The paper does not state the axes.
    Reference: de Rijk et al., "Structural Knowledge Distillation for Object Detection", 2022.

    Raises:
      UserError: unknown `scope`.

    Example:
      >>> min_max(jnp.array([2.0, 3.0, 4.0]).reshape(1, 1, 3, 1)).ravel().tolist()
      [0.0, 0.5, 1.0]
    """
    axes = {"image": (1, 2, 3), "channel": (1, 2), "batch": (0, 1, 2, 3)}
    common.check_choice("min_max", tuple(axes), scope=scope)
    shapes.check("min_max", x=(x, "B H W C"))
    x = jnp.asarray(x, jnp.float32)
    low, high = jnp.min(x, axes[scope], keepdims=True), jnp.max(x, axes[scope], keepdims=True)
    if scope == "batch" and axis_name is not None:
        low, high = (jax.lax.all_gather(v, axis_name) for v in (low, high))  # `pmin` has no gradient
        low, high = jnp.min(low, 0), jnp.max(high, 0)
    extent = high - low
    return jnp.where(extent < eps, 0.0, (x - low) / jnp.where(extent < eps, 1.0, extent))
