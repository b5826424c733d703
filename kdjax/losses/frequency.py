"""Distance of feature maps after a random mask over the student's frequencies (MKD)."""

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import shapes
from kdjax.errors import UserError
from kdjax.losses import common
from kdjax.structs import AnyArray, Array


def frequency_mask(
    key: AnyArray, shape: tuple[int, int, int], zeta: float, *, hermitian: bool = True, keep_dc: bool = False
) -> Array:
    """Draws binary masks over the frequencies of a map: M = 1[R >= zeta], R uniform in [0, 1).

    Bins are unshifted, as in `jnp.fft.fft2`: [0, 0] is the channel mean. With `hermitian` the bins u and -u share one
    draw (that of the smaller index), so the masked map is exactly real, and each bin is still kept with probability
    1 - zeta. Without it each bin has its own draw.

    Args:
      key: PRNG key of this step and level.
      shape: (B, H, W) of the map.
      zeta: probability that a bin is dropped, 0 .. 1; 0 keeps all, 1 drops all.
      hermitian: see above.
      keep_dc: whether the bin [0, 0], the channel mean, is always kept.

    Returns:
      f32[B, H, W, 1] of 0 and 1: one mask per image, shared by its channels.

    Scope: image.
    Peers: no public implementation.
    Reference: MKD Eq. 2, which does not state the symmetry.

    Raises:
      UserError: zeta is outside 0 .. 1.

    Example:
      >>> frequency_mask(jax.random.key(0), (1, 2, 2), 0.0).ravel().tolist()
      [1.0, 1.0, 1.0, 1.0]
    """
    if not 0 <= zeta <= 1:
        raise UserError(f"frequency_mask: zeta must be in 0 .. 1, not {zeta}")
    batch, height, width = shape
    draw = jax.random.uniform(key, (batch, height * width))
    if hermitian:
        index = np.arange(height * width).reshape(height, width)
        opposite = index[np.ix_(-np.arange(height) % height, -np.arange(width) % width)]
        draw = draw[:, np.minimum(index, opposite).ravel()]
    mask = (draw >= zeta).astype(jnp.float32).reshape(batch, height, width, 1)
    return mask.at[:, 0, 0].set(1.0) if keep_dc else mask


def apply_frequency_mask(x: AnyArray, mask: AnyArray) -> Array:
    """Filters every channel of a map: Re IDFT(mask . DFT(x)) over (H, W).

    Because of the real part, a mask that is not Hermitian acts like (mask(u) + mask(-u)) / 2. That symmetric mask is
    applied, to half of the spectrum.

    Args:
      x: f32[B, H, W, C], any range.
      mask: f32[B or 1, H, W, 1 or C], real weights of the unshifted bins; no gradient flows to it.

    Returns:
      f32[B, H, W, C], real; equal to x for a mask of ones.

    Scope: image and channel.
    Peers: `torch.fft.ifft2(torch.fft.fft2(x) * mask).real`.
    Reference: MKD Eqs. 2-3.

    Example:
      >>> x = jnp.array([1.0, 3.0]).reshape(1, 1, 2, 1)
      >>> apply_frequency_mask(x, jnp.array([1.0, 0.0]).reshape(1, 1, 2, 1)).ravel().tolist()  # the mean alone
      [2.0, 2.0]
    """
    shapes.check("apply_frequency_mask", x=(x, "B H W C"))
    x, mask = jnp.asarray(x, jnp.float32), jax.lax.stop_gradient(jnp.asarray(mask, jnp.float32))
    height, width = x.shape[1:3]
    if mask.ndim != 4 or mask.shape[1:3] != (height, width):
        raise UserError(
            f"apply_frequency_mask: mask must have the shape [B or 1, {height}, {width}, 1 or C], not {mask.shape}"
        )
    opposite = mask[:, -np.arange(height) % height][:, :, -np.arange(width) % width]
    half = (0.5 * (mask + opposite))[:, :, : width // 2 + 1]
    return jnp.fft.irfft2(half * jnp.fft.rfft2(x, axes=(1, 2)), s=(height, width), axes=(1, 2))


def frequency_masked(student: AnyArray, teacher: AnyArray, mask: AnyArray) -> Array:
    """Squared difference of the masked student and the teacher: (Re IDFT(M . DFT(student)) - teacher)^2.

    Args:
      student: f32[B, H, W, C], any range.
      teacher: f32[B, H, W, C].
      mask: f32[B or 1, H, W, 1 or C] from `frequency_mask`.

    Returns:
      f32[B, H, W, C], >= 0. Not zero at equality: with a Hermitian mask the mean is then zeta * mean(teacher^2) in
      expectation. zeta = 0 is the plain squared difference.

    Scope: image and channel.
    Peers: no public implementation.
    Reference: MKD Eq. 4.

    Example:
      >>> x = jnp.array([1.0, 3.0]).reshape(1, 1, 2, 1)
      >>> frequency_masked(x, x, jnp.zeros((1, 1, 2, 1))).ravel().tolist()
      [1.0, 9.0]
    """
    student, teacher = common.float32_pair(student, teacher, "frequency_masked", "B H W C")
    return jnp.square(apply_frequency_mask(student, mask) - teacher)
