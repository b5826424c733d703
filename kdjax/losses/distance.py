"""Distances between arrays and between feature maps."""

from typing import Literal

import jax.numpy as jnp
import numpy as np

from kdjax import nn, shapes
from kdjax.errors import UserError
from kdjax.losses import common, normalization
from kdjax.structs import AnyArray, Array


def squared(student: AnyArray, teacher: AnyArray) -> Array:
    """Squared difference: (student - teacher)^2.

    Args:
      student: f32[...], any shape and range.
      teacher: f32[...], the same shape.

    Returns:
      f32[...], >= 0, zero exactly where both are equal. Its mean is FitNet's L2 hint.

    Scope: element.
    Peers: mdistiller's `FitNet` is its mean; mmrazor's `L2Loss` its sum divided by B.
    Reference: Romero et al., "FitNets", 2015, Eq. 3; MKD Eq. 6.

    Example:
      >>> squared(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0])).tolist()
      [0.0, 4.0]
    """
    student, teacher = common.float32_pair(student, teacher, "squared")
    return jnp.square(student - teacher)


def l1(student: AnyArray, teacher: AnyArray) -> Array:
    """Absolute difference: |student - teacher|, with slope 0 at 0.

    Args:
      student: f32[...], any shape and range; or a detector's prediction.
      teacher: f32[...], the same shape; or its target.

    Returns:
      f32[...], >= 0, zero exactly where both are equal. Its mean is FitNet's L1 variant.

    Scope: element.
    Peers: `torch.nn.L1Loss(reduction="none")`.

    Example:
      >>> import numpy as np
      >>> l1(np.array([1.0, -3.0]), np.zeros(2)).tolist()
      [1.0, 3.0]
    """
    student, teacher = common.float32_pair(student, teacher, "l1")
    return common.absolute(student - teacher)


def smooth_l1(student: AnyArray, teacher: AnyArray, *, beta: float = 1.0) -> Array:
    """Smooth L1 distance: d^2 / (2 beta) for d = |student - teacher| < beta, else d - beta / 2.

    Args:
      student: f32[...], any shape and range; or a detector's prediction.
      teacher: f32[...], the same shape; or its target.
      beta: d at which the square ends, > 0.

    Returns:
      f32[...], >= 0, zero exactly where both are equal.

    Scope: element.
    Peers: mmdetection's `SmoothL1Loss` with `reduction="none"`.
    Reference: Girshick, "Fast R-CNN", ICCV 2015, Eq. 3 (beta = 1).

    Example:
      >>> import numpy as np
      >>> smooth_l1(np.array([0.5, 3.0]), np.zeros(2)).tolist()
      [0.125, 2.5]
    """
    student, teacher = common.float32_pair(student, teacher, "smooth_l1")
    common.check_positive("smooth_l1", beta=beta)
    distance = jnp.abs(student - teacher)
    return jnp.where(distance < beta, distance**2 / (2 * beta), distance - beta / 2)


def frobenius(
    student: AnyArray, teacher: AnyArray, *, weight: AnyArray | None = None, axis_name: str | None = None
) -> Array:
    """Euclidean norm of the difference over the whole batch: sqrt(sum weight (student - teacher)^2).

    Args:
      student: f32[...], any shape and range.
      teacher: f32[...], the same shape.
      weight: f32[...] >= 0 that broadcasts against both, such as `joint_spatial_attention`; None is 1.
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


def pearson(
    student: AnyArray, teacher: AnyArray, *, eps: float = 1e-6, ddof: int = 0, axis_name: str | None = None
) -> Array:
    """Half the squared difference of the standardised maps: (s^ - t^)^2 / 2, s^ and t^ as in `standardize` (PKD).

    Its mean is 1 - r averaged over channels, r the Pearson correlation of student and teacher over (B, H, W).

    Args:
      student: f32[B, H, W, C], any range.
      teacher: f32[B, H, W, C].
      eps: added to the standard deviations.
      ddof: 0, or 1 for the unbiased deviation of the published code, which multiplies the loss by (m - 1)/m with
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
    student, teacher = common.float32_pair(student, teacher, "pearson", "B H W C")
    student = normalization.standardize(student, eps=eps, ddof=ddof, axis_name=axis_name)
    teacher = normalization.standardize(teacher, eps=eps, ddof=ddof, axis_name=axis_name)
    return 0.5 * jnp.square(student - teacher)


def cosine(student: AnyArray, teacher: AnyArray, *, eps: float = 1e-12) -> Array:
    """One minus the cosine of the angle between two vectors: half the squared distance of s / |s| and t / |t|.

    Args:
      student: f32[..., C], any range.
      teacher: f32[..., C], the same shape.
      eps: smallest length that a vector is divided by.

    Returns:
      f32[...], 0 (same direction) to 2 (opposite); 1/2 where one vector is zero.

    Scope: the last axis.
    Peers: RT-DETRv4's semantic injection (DSI) is its mean over the cells of a map, the teacher's resized to the
      student's by `kdjax.nn.resize_bilinear`.
    Reference: Liao et al., "RT-DETRv4", 2025.

    Example:
      >>> import numpy as np
      >>> cosine(np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([[3.0, 0.0], [4.0, 0.0]])).tolist()
      [0.0, 1.0]
    """
    student, teacher = common.float32_pair(student, teacher, "cosine", "... C")

    def unit(x: Array) -> Array:
        return x / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), eps**2))

    return jnp.sum(jnp.square(unit(student) - unit(teacher)), -1) / 2


def guided_squared(student: AnyArray, teacher: AnyArray, guide: AnyArray) -> Array:
    """Mean squared difference of each cell times a guide: P * mean_c (student - teacher)^2 (PFI).

    Args:
      student: f32[B, H, W, C], any range.
      teacher: f32[B, H, W, C].
      guide: f32[B, H, W, 1], the P of `class_disagreement`, or `unit_mean` of it.

    Returns:
      f32[B, H, W, 1], >= 0, zero where student and teacher agree or the guide is 0. A guide of ones gives the mean
      squared error.

    Scope: cell.
    Peers: mmrazor's fork and SparseML take its mean; PaddleDetection takes a norm.
    Reference: Li et al., "Rank Mimicking and Prediction-guided Feature Imitation", 2022, Eqs. 6-8.

    Example:
      >>> student, teacher, guide = jnp.ones((1, 1, 1, 4)), jnp.zeros((1, 1, 1, 4)), jnp.full((1, 1, 1, 1), 5.0)
      >>> guided_squared(student, teacher, guide).ravel().tolist()
      [5.0]
    """
    student, teacher = common.float32_pair(student, teacher, "guided_squared", "B H W C")
    shapes.check("guided_squared", student=(student, "B H W C"), guide=(guide, "B H W 1"))
    return jnp.multiply(guide, jnp.mean(jnp.square(student - teacher), -1, keepdims=True))


def multiscale(
    student: AnyArray,
    teacher: AnyArray,
    *,
    scales: tuple[int, ...] = (1, 2, 4),
    mode: Literal["pool", "hcl"] = "pool",
    per_scale_mean: bool = False,
) -> Array:
    """Squared differences of average-pooled maps, added up over several scales.

    Mode "pool" has windows of side and stride k; windows that extend past the border average the cells inside the map:

        e[b, c] = 1/(H W) sum_k sum_ij ( pool_k(student)[b, i, j, c] - pool_k(teacher)[b, i, j, c] )^2

    The divisor is that of the unpooled map, as in the paper, so scale k has a weight of about 1/k^2; `per_scale_mean`
    divides each scale by its own number of cells instead.

    Mode "hcl" (ReviewKD's hierarchical context loss) is the mean over the full map plus those over adaptive poolings to
    o x o cells, o = 4, 2, 1, with weights 1/2, 1/4, 1/8, divided by the sum of the weights. An o >= H is left out.

    Args:
      student: f32[B, H, W, C], any range.
      teacher: f32[B, H, W, C].
      scales: window sides k in cells, each >= 1; only for mode "pool".
      mode: "pool" or "hcl".
      per_scale_mean: see above; only for mode "pool".

    Returns:
      f32[B, C], >= 0. With k = 1 among the scales (and in mode "hcl") zero only at equality; without it,
      differences with mean zero in each window are not penalised. Its mean is the loss of one level.

    Scope: image and channel.
    Peers: mode "hcl" is mdistiller's `hcl_loss`; mode "pool" has no public implementation.
    Reference: MKD Eq. 1; Chen et al., "Distilling Knowledge via Knowledge Review", 2021.

    Raises:
      UserError: shapes differ, `scales` is empty or has an entry below 1, or `mode` is unknown.

    Example:
      >>> student, teacher = jnp.ones((1, 2, 2, 1)), jnp.zeros((1, 2, 2, 1))
      >>> multiscale(student, teacher, scales=(1, 2)).tolist()  # 4/4 + 1/4
      [[1.25]]
      >>> multiscale(student, teacher, scales=(1, 2), per_scale_mean=True).tolist()
      [[2.0]]
    """
    student, teacher = common.float32_pair(student, teacher, "multiscale", "B H W C")
    common.check_choice("multiscale", ("pool", "hcl"), mode=mode)
    if mode == "pool" and (not scales or any(int(k) != k or k < 1 for k in scales)):
        raise UserError(f"multiscale: scales must be one or more integers >= 1, not {tuple(scales)}")
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


def adaptive_avg_pool(x: AnyArray, size: tuple[int, int]) -> Array:
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

    shapes.check("adaptive_avg_pool", x=(x, "B H W C"))
    x = jnp.asarray(x, jnp.float32)
    return common.along_sides(x, averaging(x.shape[1], size[0]), averaging(x.shape[2], size[1]))
