"""Pooling and resizing of maps."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from kdjax.nn.flops import record
from kdjax.nn.portability import is_portable, replacement
from kdjax.structs import Array


def global_average_pool(x: Array) -> Array:
    """Averages each channel of each map over all cells: f32[B, H, W, C] -> f32[B, 1, 1, C]."""
    record("pool", x.size)
    return jnp.mean(x, (1, 2), keepdims=True)


def max_pool(x: Array, window: int, *, stride: int = 1, padding: int = 0) -> Array:
    """Returns the largest value of each window; cells outside the map count as -inf.

    Args:
      x: f32[B, H, W, C].
      window: side of the window, in cells.
      stride: step of the window.
      padding: cells on each side.

    Returns:
      f32[B, H', W', C] with H' = floor((H + 2 padding - window) / stride) + 1.

    Scope: one map. Where values tie, the gradient goes to one of them.

    Peers: torch.nn.functional.max_pool2d.

    Example:
      >>> import jax.numpy as jnp
      >>> max_pool(jnp.arange(4.0).reshape(1, 2, 2, 1), 3, padding=1)[0, :, :, 0].tolist()
      [[3.0, 3.0], [3.0, 3.0]]
    """
    low = -jnp.inf
    pads = (padding, padding)
    # Rows, then columns: 2 k comparisons per cell instead of k^2.
    x = lax.reduce_window(x, low, lax.max, (1, window, 1, 1), (1, stride, 1, 1), ((0, 0), pads, (0, 0), (0, 0)))
    return lax.reduce_window(x, low, lax.max, (1, 1, window, 1), (1, 1, stride, 1), ((0, 0), (0, 0), pads, (0, 0)))


def avg_pool(x: Array, size: int) -> Array:
    """Averages windows of size x size cells that do not overlap.

    Windows that extend past the border are averaged over the cells inside the map.

    Args:
      x: f32[B, H, W, C].
      size: side and stride of the window, in cells.

    Returns:
      f32[B, ceil(H / size), ceil(W / size), C].

    Scope: one map.

    Peers: torch.nn.functional.avg_pool2d(x, size, ceil_mode=True).

    Example:
      >>> import jax.numpy as jnp
      >>> avg_pool(jnp.arange(9.0).reshape(1, 3, 3, 1), 2)[0, :, :, 0].tolist()
      [[2.0, 3.5], [6.5, 8.0]]
    """
    batch, height, width, channels = x.shape
    rows, columns = math.ceil(height / size), math.ceil(width / size)
    x = jnp.pad(x, ((0, 0), (0, rows * size - height), (0, columns * size - width), (0, 0)))
    sums = x.reshape(batch, rows, size, columns, size, channels).sum((2, 4))
    tall = jnp.minimum(size, height - size * jnp.arange(rows))
    wide = jnp.minimum(size, width - size * jnp.arange(columns))
    return sums / (tall[:, None, None] * wide[None, :, None]).astype(x.dtype)


def upsample_nearest(x: Array, factor: int = 2) -> Array:
    """Repeats each cell factor x factor times: f32[B, H, W, C] -> f32[B, H factor, W factor, C]."""
    batch, height, width, channels = x.shape
    if other := replacement("upsample_nearest"):
        return other(x, factor)
    if is_portable():
        return jax.image.resize(x, (batch, height * factor, width * factor, channels), "nearest")
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, factor, width, factor, channels))
    record("upsample", x.size)
    return x.reshape(batch, height * factor, width * factor, channels)


def resize_bilinear(x: Array, size: tuple[int, int]) -> Array:
    """Resizes maps by bilinear interpolation between cell centres, without antialiasing.

    Output cell i samples the input at (i + 0.5) H / H' - 0.5, clipped to the map.

    Args:
      x: f32[B, H, W, C].
      size: height and width of the result.

    Returns:
      f32[B, H', W', C].

    Scope: one map.

    Peers: torch.nn.functional.interpolate(mode="bilinear", align_corners=False).

    Example:
      >>> import jax.numpy as jnp
      >>> resize_bilinear(jnp.array([0.0, 1.0]).reshape(1, 1, 2, 1), (1, 4))[0, 0, :, 0].tolist()
      [0.0, 0.25, 0.75, 1.0]
    """
    shape = (x.shape[0], *size, x.shape[-1])
    if other := replacement("resize_bilinear"):
        return other(x, size)
    record("upsample", 4 * math.prod(shape))
    return jax.image.resize(x, shape, "linear", antialias=False)
