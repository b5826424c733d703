"""The layers that detectors are made of, as NNX modules over `kdjax.nn`.

A variable declares how it is drawn (`draw`, read by `kdjax.detectors.api.pure`); constructors only run abstractly.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax import nn

Array = jax.Array

# Of every norm: what is added to the variance, and a batch's share in the running statistics.
EPS, MOMENTUM = 1e-5, 0.1
FOCAL_BIAS = -math.log((1 - 0.01) / 0.01)  # every class starts at a probability of 0.01


def uniform_fan_in(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform within 1 / sqrt(fan in): PyTorch's default for a convolution (Kaiming with a = sqrt 5)."""
    bound = 1.0 / np.sqrt(np.prod(shape[:-1]))
    return rng.uniform(-bound, bound, shape)


def normal_fan_out(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal with variance 2 / fan out (He initialisation of a convolution before ReLU, seen from its output)."""
    return rng.normal(0.0, np.sqrt(2.0 / (shape[0] * shape[1] * shape[3])), shape)


def uniform_fans(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform within sqrt(6 / (fan in + fan out)) (Xavier initialisation)."""
    bound = np.sqrt(6.0 / (shape[0] * shape[1] * (shape[2] + shape[3])))
    return rng.uniform(-bound, bound, shape)


def normal(std: float) -> Callable:
    """Normal with mean 0 and the given standard deviation."""
    return lambda rng, shape: rng.normal(0.0, std, shape)


def constant(value: float) -> Callable:
    """The same value everywhere."""
    return lambda rng, shape: np.full(shape, value)


class Conv(nnx.Module):
    """Convolution with "same" padding; groups = channels if `depthwise`. A bias exists where its `draw` is given."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        depthwise: bool = False,
        draw: Callable = uniform_fan_in,
        bias: Callable | None = None,
    ):
        self.stride, self.groups = stride, inputs if depthwise else 1
        self.kernel = nnx.Param(jnp.zeros((size, size, inputs // self.groups, outputs)), draw=draw)
        self.bias = None if bias is None else nnx.Param(jnp.zeros(outputs), draw=bias)

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...].astype(x.dtype)  # the maps decide the precision, parameters are float32
        bias = None if self.bias is None else self.bias[...].astype(x.dtype)
        return nn.conv2d(x, kernel, bias, stride=self.stride, groups=self.groups)


class BatchNorm(nnx.Module):
    """Batch norm with PyTorch's running statistics: new = 0.9 old + 0.1 batch, where the variance is unbiased.

    `scale` is what its scale starts at; without `learned`, no gradient reaches scale and bias.
    """

    def __init__(self, channels: int, *, scale: float = 1.0, learned: bool = True):
        self.learned = learned
        self.scale = nnx.Param(jnp.zeros(channels), draw=constant(scale))
        self.bias = nnx.Param(jnp.zeros(channels), draw=constant(0.0))
        self.mean = nnx.BatchStat(jnp.zeros(channels), draw=constant(0.0))
        self.var = nnx.BatchStat(jnp.zeros(channels), draw=constant(1.0))

    def __call__(self, x: Array, train: bool) -> Array:
        mean, var = self.mean[...], self.var[...]
        if train:
            moments = nn.batch_moments(x)
            n = x.size // x.shape[-1]
            seen = (moments[0], moments[1] * (n / max(n - 1, 1)))
            # The running estimates are no path for gradients. (`set_value`, because `mean[...] = x` asks for shardings,
            # which doubled the time of tracing.)
            self.mean.set_value((1 - MOMENTUM) * mean + MOMENTUM * jax.lax.stop_gradient(seen[0]))
            self.var.set_value((1 - MOMENTUM) * var + MOMENTUM * jax.lax.stop_gradient(seen[1]))
            mean, var = moments
        scale, bias = self.scale[...], self.bias[...]
        if not self.learned:
            scale, bias = jax.lax.stop_gradient((scale, bias))
        return nn.batch_norm(x, scale, bias, mean, var, eps=EPS)


class GroupNorm(nnx.Module):
    """Group norm; it has no running statistics."""

    def __init__(self, channels: int, groups: int):
        self.groups = groups
        self.scale = nnx.Param(jnp.zeros(channels), draw=constant(1.0))
        self.bias = nnx.Param(jnp.zeros(channels), draw=constant(0.0))

    def __call__(self, x: Array) -> Array:
        return nn.group_norm(x, self.scale[...], self.bias[...], groups=self.groups, eps=EPS)


class Scale(nnx.Module):
    """Multiplies by one learned number."""

    def __init__(self):
        self.factor = nnx.Param(jnp.zeros(()), draw=constant(1.0))

    def __call__(self, x: Array) -> Array:
        return x * self.factor[...]


class ConvNorm(nnx.Module):
    """Convolution without bias, batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1, depthwise: bool = False):
        self.conv = Conv(inputs, outputs, size, stride=stride, depthwise=depthwise)
        self.bn = BatchNorm(outputs)

    def __call__(self, x: Array, train: bool) -> Array:
        return self.taps(x, train)[0]

    def taps(self, x: Array, train: bool) -> tuple[Array, Array]:
        """Returns the output, and the convolution's own output before norm and activation."""
        y = self.conv(x)
        return jax.nn.silu(self.bn(y, train)), y
