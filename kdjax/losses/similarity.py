"""Structural similarity (SSIM) of feature maps."""

from typing import Literal

import jax.numpy as jnp
import numpy as np

from kdjax.errors import UserError
from kdjax.losses import common
from kdjax.structs import AnyArray, Array


def fitting_window(window: int, size: tuple[int, int]) -> int:
    """The largest odd number that is at most `window` and at most each side of the map.

    Example:
      >>> fitting_window(11, (20, 6)), fitting_window(11, (1, 9))
      (5, 1)
    """
    side = min(window, *size)
    return side - 1 + side % 2


def ssim(
    student: AnyArray,
    teacher: AnyArray,
    *,
    window: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    k1: float = 0.01,
    k2: float = 0.03,
    exponents: tuple[float, float, float] = (1.0, 1.0, 1.0),
    padding: Literal["same", "valid"] = "same",
    eps: float = 0.0,
) -> Array:
    """Structural similarity of two maps around each cell, channel by channel: lum^a con^b str^g.

    With means mu, variances var, deviations sd and covariance cov in a Gaussian window:

        lum = (2 mu_s mu_t + C1) / (mu_s^2 + mu_t^2 + C1)      C1 = (k1 range)^2
        con = (2 sd_s sd_t + C2) / (var_s + var_t + C2)        C2 = (k2 range)^2
        str = (cov + C2/2) / (sd_s sd_t + C2/2)

    For unit exponents the product con str is (2 cov + C2) / (var_s + var_t + C2), without a square root. Variances
    below 0 (rounding) count as 0, and so does a `str` below 0 under an exponent other than 1.

    Args:
      student: f32[B, H, W, C], in 0 .. `data_range` (see `min_max`). Other maps are allowed, but C1 and C2 then have
        no meaning, and where means have opposite signs lum is negative: with a structure that is negative too the
        product is positive, so that x and -x count as alike.
      teacher: f32[B, H, W, C].
      window: side of the window in cells, odd.
      sigma: standard deviation of the Gaussian in cells.
      data_range: difference of the largest and the smallest possible value.
      k1, k2: of the two constants.
      exponents: a, b, g of luminance, contrast and structure; 0 leaves a factor out.
      padding: "same" reflects the maps at their border, "valid" keeps the windows that lie inside.
      eps: added to the denominator of the product for unit exponents; kornia's is 1e-12, which is 1.1e-5 of the
        denominator where both maps are 0, and less elsewhere.

    Returns:
      f32[B, H, W, C] ("valid": H - window + 1 and W - window + 1), -1 .. 1; 1 at equality. Rounding leads out of that
      range where a map is large and locally flat.

    Scope: window.
    Peers: kornia's `ssim` ("same"), pytorch-msssim and scikit-image ("valid").
    Reference: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004, Eqs. 6-13.

    Raises:
      UserError: shapes differ, `window` is even or larger than the map, or `padding` is unknown.

    Example:
      >>> x = jnp.arange(9.0).reshape(1, 3, 3, 1) / 8
      >>> [round(float(ssim(x, y, window=3).mean()), 2) for y in (x, 1 - x)]
      [1.0, -0.87]
    """
    student, teacher = common.float32_pair(student, teacher, "ssim", "B H W C")
    height, width = student.shape[1:3]
    common.check_choice("ssim", ("same", "valid"), padding=padding)
    if window % 2 == 0 or window < 1 or window > min(height, width):
        raise UserError(f"ssim: window must be odd and fit the map of {height} x {width} cells, not {window}")
    rows, columns = (_gaussian_matrix(size, window, sigma, padding) for size in (height, width))

    def local_mean(x: AnyArray) -> Array:
        return common.along_sides(x, rows, columns)

    c1, c2 = (k1 * data_range) ** 2, (k2 * data_range) ** 2
    mean_s, mean_t = local_mean(student), local_mean(teacher)
    var_s = local_mean(student * student) - mean_s * mean_s
    var_t = local_mean(teacher * teacher) - mean_t * mean_t
    cov = local_mean(student * teacher) - mean_s * mean_t
    var_s, var_t = jnp.maximum(var_s, 0), jnp.maximum(var_t, 0)
    energy = mean_s * mean_s + mean_t * mean_t + c1
    if tuple(exponents) == (1, 1, 1):
        return (2 * mean_s * mean_t + c1) * (2 * cov + c2) / (energy * (var_s + var_t + c2) + eps)
    luminance = (2 * mean_s * mean_t + c1) / energy
    deviations = common.safe_sqrt(var_s) * common.safe_sqrt(var_t)
    contrast = (2 * deviations + c2) / (var_s + var_t + c2)
    structure = (cov + c2 / 2) / (deviations + c2 / 2)
    factors = zip((luminance, contrast, structure), exponents, strict=True)
    return jnp.prod(jnp.stack([common.power(factor, exponent, smallest=1e-6) for factor, exponent in factors]), 0)


def structural_dissimilarity(
    student: AnyArray,
    teacher: AnyArray,
    *,
    window: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    k1: float = 0.01,
    k2: float = 0.03,
    exponents: tuple[float, float, float] = (1.0, 1.0, 1.0),
    padding: Literal["same", "valid"] = "same",
    eps: float = 0.0,
) -> Array:
    """Structural dissimilarity: (1 - SSIM) / 2, in a window that is reduced to fit the map.

    Args:
      student: f32[B, H, W, C] in 0 .. `data_range`, from `min_max`; for other maps see `ssim`.
      teacher: f32[B, H, W, C].
      window: largest side of the window; it is reduced to the largest odd number that is at most H and W. If that is 1,
        the loss is 0.
      sigma, data_range, k1, k2, exponents, padding, eps: as in `ssim`.

    Returns:
      f32[B, H, W, C] in 0 .. 1 (what rounding leads out of that is cut off), zero at equality. Its mean is the loss of
      one level.

    Scope: window.
    Peers: kornia's `ssim_loss` (with `eps=1e-12`), which the authors' early code calls.
    Reference: de Rijk et al., "Structural Knowledge Distillation for Object Detection", 2022.

    Example:
      >>> float(structural_dissimilarity(jnp.zeros((1, 3, 3, 1)), jnp.ones((1, 3, 3, 1))).mean().round(3))
      0.5
    """
    student, teacher = common.float32_pair(student, teacher, "structural_dissimilarity", "B H W C")
    fitting = fitting_window(window, (student.shape[1], student.shape[2]))
    if fitting == 1:
        return jnp.zeros_like(student)
    similarity = ssim(
        student,
        teacher,
        window=fitting,
        sigma=sigma,
        data_range=data_range,
        k1=k1,
        k2=k2,
        exponents=exponents,
        padding=padding,
        eps=eps,
    )
    return jnp.clip((1 - similarity) / 2, 0, 1)


def _gaussian_matrix(size: int, window: int, sigma: float, padding: str) -> np.ndarray:
    """The Gaussian average along an axis of `size` cells as a matrix that includes the reflection at the border."""
    offsets = np.arange(window) - window // 2
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    weights /= weights.sum()
    centres = np.arange(size) if padding == "same" else np.arange(window // 2, size - window // 2)
    matrix = np.zeros((len(centres), size))
    for row, centre in enumerate(centres):
        cells = np.abs(centre + offsets)  # reflected at cell 0, then at the last cell
        np.add.at(matrix[row], np.where(cells < size, cells, 2 * (size - 1) - cells), weights)
    return matrix.astype(np.float32)
