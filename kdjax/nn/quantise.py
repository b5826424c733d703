"""Fake quantisation: float values rounded to those that 8 bits can hold, with gradients that pass the rounding.

Maps are asymmetric, with one range for all channels, kernels symmetric, with one scale for each output channel: what
runtimes for int8 compute with.

Reference: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
CVPR 2018, sections 2.1 and 3.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.nn.portability import is_portable, replacement
from kdjax.structs import AnyArray, Array

LEVELS = 255  # steps between the least and the largest value of a map
MOST = 127  # the largest quantised weight; -128 is not used, so that a scale may be negated
TINY = 1e-8  # the smallest scale


def affine(low: AnyArray, high: AnyArray) -> tuple[Any, Any]:
    """Scale and zero point of the 8 bits of a range, in which 0 is a value of its own.

        scale = (max(high, 0) - min(low, 0)) / 255,  zero = round(-min(low, 0) / scale)

    Args:
      low, high: f32[], the range; of NumPy or JAX.

    Returns:
      (scale f32[] > 0, zero f32[], a whole number in 0 .. 255), of the same.

    Peers: torch.ao.quantization's MinMaxObserver with quint8, for the scale and the zero point.

    Example:
      >>> [float(v) for v in affine(jnp.float32(-1.0), jnp.float32(254.0))]
      [1.0, 1.0]
    """
    of = _library(low)
    low, high = of.minimum(low, np.float32(0)), of.maximum(high, np.float32(0))
    scale = of.maximum((high - low) / np.float32(LEVELS), np.float32(TINY))
    return scale, of.round(-low / scale)


def _library(x: AnyArray) -> Any:  # noqa: ANN401 - a module
    return np if isinstance(x, np.ndarray | np.generic) else jnp


def fake_quantise(x: Array, scale: Array | float, zero: Array | float) -> Array:
    """Rounds a map to the 256 values (q - zero) scale with q in 0 .. 255.

        y = (clip(round(x / scale) + zero, 0, 255) - zero) scale,  dy/dx = 1 where nothing is clipped, else 0

    Halves are rounded to even numbers. Scale and zero point have no gradient.

    Args:
      x: f32[...] or bf16.
      scale: f32[] > 0.
      zero: f32[], a whole number in 0 .. 255.

    Returns:
      Array of x's shape and dtype; computed in float32.

    Peers: torch.fake_quantize_per_tensor_affine; ONNX's QuantizeLinear and DequantizeLinear.

    Example:
      >>> fake_quantise(jnp.array([-9.0, 0.1, 0.3, 300.0]), 0.5, 2.0).tolist()
      [-1.0, 0.0, 0.5, 126.5]
    """
    if is_portable():
        return (replacement("fake_quantise") or _rounded)(x, scale, zero)
    return _fake_quantise(x, jnp.asarray(scale, jnp.float32), jnp.asarray(zero, jnp.float32))


def _rounded(x: Array, scale: Array | float, zero: Array | float) -> Array:
    steps = jnp.clip(jnp.round(x.astype(jnp.float32) / scale) + zero, 0, LEVELS)
    return ((steps - zero) * scale).astype(x.dtype)


@jax.custom_vjp
def _fake_quantise(x: Array, scale: Array, zero: Array) -> Array:
    return _rounded(x, scale, zero)


def _forward(x: Array, scale: Array, zero: Array) -> tuple[Array, Array]:
    steps = jnp.round(x.astype(jnp.float32) / scale) + zero
    return _rounded(x, scale, zero), (steps >= 0) & (steps <= LEVELS)


def _backward(inside: Array, gradient: Array) -> tuple[Array, Array, Array]:
    return jnp.where(inside, gradient, 0), jnp.zeros(()), jnp.zeros(())


_fake_quantise.defvjp(_forward, _backward)


def kernel_scale(kernel: AnyArray) -> Any:  # noqa: ANN401 - of the library of the kernel
    """The scale of each output channel of a kernel, f32[O] > 0: the largest absolute weight / 127.

    Args:
      kernel: f32[..., O], of NumPy or JAX.

    Example:
      >>> kernel_scale(jnp.array([[-254.0, 0.0], [127.0, 1.27]])).tolist()
      [2.0, 0.009999999776482582]
    """
    of = _library(kernel)
    largest = of.max(of.abs(kernel), tuple(range(kernel.ndim - 1)))
    return of.maximum(largest / np.float32(MOST), np.float32(TINY))


def fake_quantise_kernel(kernel: AnyArray) -> Any:  # noqa: ANN401 - of the library of the kernel
    """Rounds a kernel to q scale with whole q in -127 .. 127 and the scale of each output channel.

        y = round(w / scale) scale,  scale = max |w| / 127,  dy/dw = 1

    This commutes with a product by one factor for each output channel, such as that of a batch norm that is folded into
    the kernel.

    Args:
      kernel: f32[..., O], of NumPy or JAX.

    Returns:
      f32[..., O], of the same.

    Peers: torch.fake_quantize_per_channel_affine with qint8, -127 .. 127 and zero point 0.

    Example:
      >>> fake_quantise_kernel(jnp.array([[-254.0], [100.9], [0.9]])).ravel().tolist()
      [-254.0, 100.0, 0.0]
    """
    return _rounded_kernel(kernel) if _library(kernel) is np else _fake_quantise_kernel(kernel)


def _rounded_kernel(kernel: AnyArray) -> Any:  # noqa: ANN401
    scale = kernel_scale(kernel)
    return _library(kernel).round(kernel / scale) * scale


_fake_quantise_kernel = jax.custom_vjp(_rounded_kernel)
_fake_quantise_kernel.defvjp(lambda kernel: (_rounded_kernel(kernel), None), lambda _, gradient: (gradient,))
