"""Batch, group and layer normalisation as functions of their parameters and statistics."""

import jax.numpy as jnp
from jax import lax

from kdjax.errors import UserError
from kdjax.nn.flops import record
from kdjax.nn.portability import is_portable
from kdjax.structs import Array


def batch_moments(x: Array) -> tuple[Array, Array]:
    """Returns mean and biased variance of each channel over all other axes.

        mean = sum x / n,  var = sum (x - mean)^2 / n,  in float32 for every dtype of x

    Args:
      x: f32[..., C].

    Returns:
      (mean f32[C], variance f32[C] >= 0).

    Scope: the global batch, all cells: under `jax.jit` over a mesh the sums run over all devices.

    Example:
      >>> import jax.numpy as jnp
      >>> [float(v[0]) for v in batch_moments(jnp.array([[1.0], [3.0]]))]
      [2.0, 1.0]
    """
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    return mean, jnp.mean(jnp.square(x - mean), axes)


def batch_norm(x: Array, scale: Array, bias: Array, mean: Array, var: Array, *, eps: float = 1e-5) -> Array:
    """Normalises each channel with the statistics that are passed.

        y = (x - mean) / sqrt(var + eps) * scale + bias

    Args:
      x: f32[..., C].
      scale, bias, mean, var: f32[C]; var >= 0.
      eps: added to the variance.

    Returns:
      Array of x's shape and dtype.

    Scope: that of the statistics.

    Peers: torch.nn.BatchNorm2d.

    Example:
      >>> import jax.numpy as jnp
      >>> one, zero = jnp.ones(1), jnp.zeros(1)
      >>> float(batch_norm(jnp.array([[3.0]]), 2 * one, one, one, 4 * one, eps=0.0)[0, 0])
      3.0
    """
    record("norm", 2 * x.size)
    if is_portable():  # other runtimes fold this form, one product and one sum, into the convolution before it
        factor = lax.rsqrt(var + eps) * scale
        return (x * factor + (bias - mean * factor)).astype(x.dtype)
    return ((x - mean) * (lax.rsqrt(var + eps) * scale) + bias).astype(x.dtype)


def group_norm(x: Array, scale: Array, bias: Array, *, groups: int, eps: float = 1e-5) -> Array:
    """Normalises groups of neighbouring channels of each map with their own mean and biased variance.

        y = (x - mean) / sqrt(var + eps) * scale + bias,  statistics in float32 for every dtype of x

    Args:
      x: f32[B, H, W, C].
      scale, bias: f32[C].
      groups: G, divides C; channels 0 .. C/G - 1 are the first group.
      eps: added to the variance.

    Returns:
      Array of x's shape and dtype.

    Raises:
      UserError: the number of channels is not a multiple of `groups`.

    Scope: one map, the channels of a group.

    Peers: torch.nn.GroupNorm.

    Reference: Wu and He, Group Normalization, ECCV 2018, equation 7.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([1.0, 3.0, 10.0, 30.0]).reshape(1, 1, 1, 4)
      >>> group_norm(x, jnp.ones(4), jnp.zeros(4), groups=2, eps=0.0).ravel().tolist()
      [-1.0, 1.0, -1.0, 1.0]
    """
    channels = x.shape[-1]
    if channels % groups:
        raise UserError(f"group_norm: groups must divide the {channels} channels of x, but is {groups}")
    # mmengine counts 5 for norms that compute their statistics.
    record("norm", 5 * x.size)
    grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, channels // groups)
    centred = grouped - jnp.mean(grouped, (1, 2, 4), keepdims=True)
    variance = jnp.mean(jnp.square(centred), (1, 2, 4), keepdims=True)
    normed = (centred * lax.rsqrt(variance + eps)).reshape(x.shape)
    return (normed * scale + bias).astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array, *, eps: float = 1e-5) -> Array:
    """Normalises the last axis with its own mean and biased variance.

        y = (x - mean) / sqrt(var + eps) * scale + bias,  statistics in float32 for every dtype of x

    Args:
      x: f32[..., C].
      scale, bias: f32[C].
      eps: added to the variance.

    Returns:
      Array of x's shape and dtype.

    Scope: one place.

    Peers: torch.nn.LayerNorm(C).

    Reference: Ba et al., Layer Normalization, arXiv 1607.06450, equation 4.

    Example:
      >>> import jax.numpy as jnp
      >>> layer_norm(jnp.array([[1.0, 3.0]]), jnp.ones(2), jnp.zeros(2), eps=0.0).tolist()
      [[-1.0, 1.0]]
    """
    # mmengine counts 5 for norms that compute their statistics.
    record("norm", 5 * x.size)
    centred = x.astype(jnp.float32)
    centred = centred - jnp.mean(centred, -1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), -1, keepdims=True)
    return (centred * lax.rsqrt(variance + eps) * scale + bias).astype(x.dtype)
