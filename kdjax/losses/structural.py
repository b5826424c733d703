"""Structural similarity (SSIM) of feature maps: luminance, contrast and structure in a sliding Gaussian window."""

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.losses import common
from kdjax.structs import Array


def min_max(x: Array, *, scope: str = "image", eps: float = 1e-6, axis_name: str | None = None) -> Array:
    """Rescales to 0 .. 1: (x - min) / (max - min); 0 where max - min < eps.

    Args:
      x: f32[B, H, W, C], any range.
      scope: what minimum and maximum run over: "image" (H, W and C jointly, which keeps the relative strength of the
        channels), "channel" (H and W), or "batch" (everything).
      eps: a range below it counts as constant: the value is 0 and so is the gradient.
      axis_name: under `pmap` or `shard_map`, the mapped axis that splits the batch; matters to the scope "batch" only.

    Returns:
      f32[B, H, W, C] in 0 .. 1. The gradient flows through minimum and maximum.

    Scope: as chosen.
    Peers: none known; reading notes of the paper name the rescaling without its axes.
    Reference: de Rijk et al., "Structural Knowledge Distillation for Object Detection", 2022.

    Raises:
      ValueError: unknown scope.

    Example:
      >>> min_max(jnp.array([2.0, 3.0, 4.0]).reshape(1, 1, 3, 1)).ravel().tolist()
      [0.0, 0.5, 1.0]
    """
    axes = {"image": (1, 2, 3), "channel": (1, 2), "batch": (0, 1, 2, 3)}
    if scope not in axes:
        raise ValueError(f"min_max has the scopes {', '.join(axes)}, not {scope!r}")
    x = jnp.asarray(x, jnp.float32)
    low, high = jnp.min(x, axes[scope], keepdims=True), jnp.max(x, axes[scope], keepdims=True)
    if scope == "batch" and axis_name is not None:
        low, high = (jax.lax.all_gather(v, axis_name) for v in (low, high))  # `pmin` has no gradient
        low, high = jnp.min(low, 0), jnp.max(high, 0)
    extent = high - low
    return jnp.where(extent < eps, 0.0, (x - low) / jnp.where(extent < eps, 1.0, extent))


def fitting_window(window: int, size: tuple[int, int]) -> int:
    """The largest odd side that is neither above `window` nor above a side of the map; 1 is too small to be of use.

    Example:
      >>> fitting_window(11, (20, 6)), fitting_window(11, (1, 9))
      (5, 1)
    """
    side = min(window, *size)
    return side - 1 + side % 2


def ssim(
    student: Array,
    teacher: Array,
    *,
    window: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    k1: float = 0.01,
    k2: float = 0.03,
    exponents: tuple[float, float, float] = (1.0, 1.0, 1.0),
    padding: str = "same",
) -> Array:
    """Structural similarity of two maps around every cell, channel by channel: lum^a con^b str^g.

    With means mu, variances var, deviations sd and covariance cov in a Gaussian window:

        lum = (2 mu_s mu_t + C1) / (mu_s^2 + mu_t^2 + C1)      C1 = (k1 range)^2
        con = (2 sd_s sd_t + C2) / (var_s + var_t + C2)        C2 = (k2 range)^2
        str = (cov + C2/2) / (sd_s sd_t + C2/2)

    For unit exponents con and str are one quotient, (2 cov + C2) / (var_s + var_t + C2), without a square root. For
    others variances below 0 (rounding) count as 0, and so does a `str` below 0 under an exponent other than 1.

    Args:
      student: f32[B, H, W, C], meant to lie within `data_range` (see `min_max`); without that C1 and C2 lose their
        meaning and lum may be negative.
      teacher: f32[B, H, W, C].
      window: side of the window in cells, odd.
      sigma: standard deviation of the Gaussian in cells.
      data_range: difference of the largest and the smallest possible value.
      k1, k2: of the two constants.
      exponents: a, b, g of luminance, contrast and structure; 0 leaves a factor out.
      padding: "same" reflects the maps at their border, "valid" keeps the windows that lie inside.

    Returns:
      f32[B, H, W, C] ("valid": H - window + 1 and W - window + 1), -1 .. 1; 1 at equality.

    Scope: window.
    Peers: kornia's `ssim` ("same"), pytorch-msssim and scikit-image ("valid").
    Reference: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004, Eqs. 6-13.

    Raises:
      ValueError: shapes differ, unknown padding, or a window that is even or does not fit the map.

    Example:
      >>> x = jnp.arange(9.0).reshape(1, 3, 3, 1) / 8
      >>> [round(float(ssim(x, y, window=3).mean()), 2) for y in (x, 1 - x)]
      [1.0, -0.87]
    """
    student, teacher = common.float32_pair(student, teacher, "ssim")
    height, width = student.shape[1:3]
    if padding not in ("same", "valid"):
        raise ValueError(f"ssim has the paddings 'same' and 'valid', not {padding!r}")
    if window % 2 == 0 or window < 1 or window > min(height, width):
        raise ValueError(f"ssim needs an odd window that fits the map of {height} x {width} cells, not {window}")
    rows, columns = (_gaussian_matrix(size, window, sigma, padding) for size in (height, width))

    def local_mean(x):
        return common.along_sides(x, rows, columns)

    c1, c2 = (k1 * data_range) ** 2, (k2 * data_range) ** 2
    mean_s, mean_t = local_mean(student), local_mean(teacher)
    var_s = local_mean(student * student) - mean_s * mean_s
    var_t = local_mean(teacher * teacher) - mean_t * mean_t
    cov = local_mean(student * teacher) - mean_s * mean_t
    luminance = (2 * mean_s * mean_t + c1) / (mean_s * mean_s + mean_t * mean_t + c1)
    if tuple(exponents) == (1, 1, 1):
        return luminance * (2 * cov + c2) / (var_s + var_t + c2)
    var_s, var_t = jnp.maximum(var_s, 0), jnp.maximum(var_t, 0)
    deviations = common.safe_sqrt(var_s) * common.safe_sqrt(var_t)
    contrast = (2 * deviations + c2) / (var_s + var_t + c2)
    structure = (cov + c2 / 2) / (deviations + c2 / 2)
    factors = zip((luminance, contrast, structure), exponents, strict=True)
    return jnp.prod(jnp.stack([_power(factor, exponent) for factor, exponent in factors]), 0)


def _gaussian_matrix(size: int, window: int, sigma: float, padding: str) -> np.ndarray:
    """The Gaussian average along an axis of `size` cells as a matrix, the reflected border folded in."""
    offsets = np.arange(window) - window // 2
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    weights /= weights.sum()
    centres = np.arange(size) if padding == "same" else np.arange(window // 2, size - window // 2)
    matrix = np.zeros((len(centres), size))
    for row, centre in enumerate(centres):
        cells = np.abs(centre + offsets)  # reflected at cell 0, then at the last cell
        np.add.at(matrix[row], np.where(cells < size, cells, 2 * (size - 1) - cells), weights)
    return matrix.astype(np.float32)


def _power(base: Array, exponent: float) -> Array:
    """base^exponent with 0 for a base below 0, and a finite slope there."""
    if exponent == 1:
        return base
    if exponent == 0:
        return jnp.ones_like(base)
    positive = base > 1e-6
    return jnp.where(positive, jnp.where(positive, base, 1.0) ** exponent, 0.0)


def structural(student: Array, teacher: Array, *, window: int = 11, **options) -> Array:
    """Structural dissimilarity: (1 - SSIM) / 2, in a window that shrinks to what fits the map.

    Args:
      student: f32[B, H, W, C] in 0 .. 1, from `min_max`.
      teacher: f32[B, H, W, C] in 0 .. 1.
      window: side of the window; the largest odd number is taken that is neither above it nor above H or W. Where that
        is 1 the map is not compared: the loss is 0.
      options: those of `ssim`.

    Returns:
      f32[B, H, W, C] in 0 .. 1, zero at equality. Its mean is the loss of one level.

    Scope: window.
    Peers: kornia's `ssim_loss`; no official code of the paper.
    Reference: de Rijk et al., "Structural Knowledge Distillation for Object Detection", 2022.

    Example:
      >>> float(structural(jnp.zeros((1, 3, 3, 1)), jnp.ones((1, 3, 3, 1))).mean().round(3))  # (1 - C1/(1 + C1)) / 2
      0.5
    """
    student, teacher = common.float32_pair(student, teacher, "structural")
    fitting = fitting_window(window, student.shape[1:3])
    if fitting == 1:
        return jnp.zeros_like(student)
    return jnp.clip((1 - ssim(student, teacher, window=fitting, **options)) / 2, 0, 1)
