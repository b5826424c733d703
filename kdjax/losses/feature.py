"""Distances between feature maps: plain (FitNet), pooled at several scales (MKD, ReviewKD), standardised (PKD).

Maps are NHWC; the student's has been adapted to the teacher's channels and size before.
"""

import jax.numpy as jnp
import numpy as np

from kdjax import nn
from kdjax.losses import common
from kdjax.structs import Array


def squared(student: Array, teacher: Array) -> Array:
    """Squared difference: (student - teacher)^2.

    Args:
      student: f32[...], any shape and range.
      teacher: f32[...], the same shape.

    Returns:
      f32[...], >= 0, zero exactly where both are equal. Its mean is FitNet's L2 hint.

    Scope: element.
    Peers: mmrazor `L2Loss` is the sum divided by B; mdistiller `FitNet` is the mean.
    Reference: Romero et al., "FitNets", 2015, Eq. 3; MKD Eq. 6.

    Example:
      >>> squared(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0])).tolist()
      [0.0, 4.0]
    """
    student, teacher = common.float32_pair(student, teacher, "squared")
    return jnp.square(student - teacher)


def absolute(student: Array, teacher: Array) -> Array:
    """Absolute difference: |student - teacher|.

    Args:
      student: f32[...], any shape and range.
      teacher: f32[...], the same shape.

    Returns:
      f32[...], >= 0, zero exactly where both are equal. Its mean is FitNet's L1 variant.

    Scope: element.
    Peers: `torch.nn.L1Loss(reduction="none")`.
    Reference: methods.md 3.13.

    Example:
      >>> absolute(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0])).tolist()
      [0.0, 2.0]
    """
    student, teacher = common.float32_pair(student, teacher, "absolute")
    return common.absolute(student - teacher)


def unit_norm(x: Array, *, eps: float = 1e-12) -> Array:
    """Scales every image to unit Euclidean norm over (H, W, C): x / max(|x|, eps).

    Args:
      x: f32[B, ...], any range.
      eps: smallest divisor.

    Returns:
      f32[B, ...]; an image of zeros stays zero, with a finite gradient.

    Scope: image.
    Peers: mmrazor `L2Loss(normalize=True)`.

    Example:
      >>> unit_norm(jnp.array([[0.0, 4.0], [0.0, 0.0]])).tolist()
      [[0.0, 1.0], [0.0, 0.0]]
    """
    x = jnp.asarray(x, jnp.float32)
    square = jnp.sum(jnp.square(x), tuple(range(1, x.ndim)), keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, eps**2))


def multiscale(
    student: Array,
    teacher: Array,
    *,
    scales: tuple[int, ...] = (1, 2, 4),
    mode: str = "pool",
    per_scale_mean: bool = False,
) -> Array:
    """Squared differences of average-pooled maps, added up over several scales.

    mode "pool", window = stride = k, border windows averaged over the cells that they have:

        e[b, c] = 1/(H W) sum_k sum_ij ( pool_k(student)[b, i, j, c] - pool_k(teacher)[b, i, j, c] )^2

    The divisor is that of the unpooled map, as printed, so scale k counts about 1/k^2; `per_scale_mean` divides every
    scale by its own number of cells instead.

    mode "hcl" (ReviewKD's hierarchical context loss): the mean of the full map plus those of adaptive poolings to
    o x o cells, o = 4, 2, 1, with weights 1/2, 1/4, 1/8; an o >= H is left out; divided by the sum of the weights used.

    Args:
      student: f32[B, H, W, C], any range.
      teacher: f32[B, H, W, C].
      scales: window sides k in cells, each >= 1; only for mode "pool".
      mode: "pool" or "hcl".
      per_scale_mean: see above; only for mode "pool".

    Returns:
      f32[B, C], >= 0. With k = 1 among the scales (and in mode "hcl") zero only at equality; without it differences
      whose windows have mean zero cost nothing. Its mean is the loss of one level.

    Scope: image and channel.
    Peers: mode "hcl" is mdistiller's `hcl_loss`; mode "pool" has no public original (formula only).
    Reference: MKD Eq. 1; Chen et al., "Distilling Knowledge via Knowledge Review", 2021.

    Raises:
      ValueError: shapes differ, no scale or one below 1, unknown mode.

    Example:
      >>> student, teacher = jnp.ones((1, 2, 2, 1)), jnp.zeros((1, 2, 2, 1))
      >>> multiscale(student, teacher, scales=(1, 2)).tolist()  # 4/4 + 1/4
      [[1.25]]
      >>> multiscale(student, teacher, scales=(1, 2), per_scale_mean=True).tolist()
      [[2.0]]
    """
    student, teacher = common.float32_pair(student, teacher, "multiscale")
    if mode not in ("pool", "hcl"):
        raise ValueError(f"multiscale has the modes 'pool' and 'hcl', not {mode!r}")
    if mode == "pool" and (not scales or any(int(k) != k or k < 1 for k in scales)):
        raise ValueError(f"multiscale needs window sides of at least 1 cell, not scales={tuple(scales)}")
    difference = student - teacher  # pooling is linear: one map is pooled, not two
    height, width = difference.shape[1:3]
    if mode == "hcl":
        total, weights = jnp.mean(jnp.square(difference), (1, 2)), 1.0
        for outputs, weight in ((4, 0.5), (2, 0.25), (1, 0.125)):
            if outputs < height:
                pooled = adaptive_avg_pool(difference, (outputs, outputs))
                total, weights = total + weight * jnp.mean(jnp.square(pooled), (1, 2)), weights + weight
        return total / weights
    total = jnp.zeros((difference.shape[0], difference.shape[3]), jnp.float32)
    for k in scales:
        pooled = difference if k == 1 else nn.avg_pool(difference, int(k))
        cells = pooled.shape[1] * pooled.shape[2] if per_scale_mean else height * width
        total = total + jnp.sum(jnp.square(pooled), (1, 2)) / cells
    return total


def adaptive_avg_pool(x: Array, size: tuple[int, int]) -> Array:
    """Average pooling to a given number of cells; cell i of o covers floor(i H / o) .. ceil((i + 1) H / o) - 1.

    Args:
      x: f32[B, H, W, C].
      size: rows and columns of the result, each >= 1. More than H or W repeats cells.

    Returns:
      f32[B, size[0], size[1], C].

    Scope: window.
    Peers: `torch.nn.functional.adaptive_avg_pool2d`.

    Example:
      >>> adaptive_avg_pool(jnp.arange(3.0).reshape(1, 3, 1, 1), (2, 1)).ravel().tolist()
      [0.5, 1.5]
    """

    def averaging(cells: int, outputs: int) -> np.ndarray:
        matrix = np.zeros((outputs, cells), np.float32)
        for i in range(outputs):
            start, stop = i * cells // outputs, -(-(i + 1) * cells // outputs)
            matrix[i, start:stop] = 1 / (stop - start)
        return matrix

    x = jnp.asarray(x, jnp.float32)
    return common.along_sides(x, averaging(x.shape[1], size[0]), averaging(x.shape[2], size[1]))


def standardize(
    x: Array,
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
      axes: the axes that a statistic runs over; the default gives one mean and deviation a channel.
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


def pearson(student: Array, teacher: Array, *, eps: float = 1e-6, ddof: int = 0, axis_name: str | None = None) -> Array:
    """Half the squared difference of the standardised maps: (s^ - t^)^2 / 2, s^ and t^ as in `standardize`.

    Its mean is 1 - r averaged over channels, r the Pearson correlation of student and teacher over (B, H, W).

    Args:
      student: f32[B, H, W, C], any range.
      teacher: f32[B, H, W, C].
      eps: added to the standard deviations.
      ddof: 0, or 1 for the unbiased deviation of the published codes, which multiplies the loss by (m - 1)/m with
        m = B H W.
      axis_name: see `standardize`.

    Returns:
      f32[B, H, W, C], >= 0; the mean lies in [0, 2] and is zero if each channel of the student is a positive affine map
      of the teacher's. A constant channel contributes 1/2.

    Scope: global batch.
    Peers: mmrazor's and CrossKD's `PKDLoss` with ddof=1.
    Reference: Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
      Coefficient", 2022, Eqs. 2-3.

    Example:
      >>> x = jnp.array([1.0, 2.0, 4.0]).reshape(3, 1, 1, 1)
      >>> [round(float(pearson(y, x).mean()), 3) for y in (3 * x + 1, -x)]
      [0.0, 2.0]
    """
    student, teacher = common.float32_pair(student, teacher, "pearson")
    student = standardize(student, eps=eps, ddof=ddof, axis_name=axis_name)
    teacher = standardize(teacher, eps=eps, ddof=ddof, axis_name=axis_name)
    return 0.5 * jnp.square(student - teacher)


def frobenius(student: Array, teacher: Array, *, weight: Array | None = None, axis_name: str | None = None) -> Array:
    """Norm of the whole batch's difference, not squared: sqrt(sum weight (student - teacher)^2).

    Args:
      student: f32[...], any shape and range.
      teacher: f32[...], the same shape.
      weight: f32[...] >= 0 that broadcasts against both, such as `attention.joint_spatial_attention`; None is 1.
      axis_name: under `pmap` or `shard_map`, the mapped axis that splits the batch.

    Returns:
      f32[], >= 0; zero, with gradient zero, at equality. It grows with the square root of the batch.

    Scope: global batch.
    Peers: the terms of mmrazor's FKD port.
    Reference: Zhang and Ma, "Improve Object Detection with Feature-based Knowledge Distillation", 2021, Eqs. 2-5.

    Example:
      >>> frobenius(jnp.array([3.0, 4.0]), jnp.zeros(2)).tolist()
      5.0
    """
    student, teacher = common.float32_pair(student, teacher, "frobenius")
    square = jnp.square(student - teacher)
    if weight is not None:
        square = square * weight
    total = common.sum_over(square, tuple(range(square.ndim)), axis_name).reshape(())
    return jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1.0)), 0.0)
