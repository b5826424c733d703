"""The layers of the detectors, as NNX modules over `kdjax.nn`.

A variable declares its initial value (`draw`, read by `kdjax.detectors.api.pure`); constructors only run abstractly.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax import nn
from kdjax.nn.flops import record

Array = jax.Array

# Defaults of norms: the constant added to the variance, and the weight of a batch in the running statistics.
EPS, MOMENTUM = 1e-5, 0.1
FOCAL_BIAS = -math.log((1 - 0.01) / 0.01)  # every class starts at a probability of 0.01


Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]  # (rng, shape) -> initial value
Padding = Literal["same"] | int  # zeros on each side, in cells


def uniform_fan_in(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform within 1 / sqrt(fan in): PyTorch's default for a convolution (Kaiming with a = sqrt 5)."""
    bound = 1.0 / np.sqrt(np.prod(shape[:-1]))
    return rng.uniform(-bound, bound, shape)


def normal_fan_out(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal with variance 2 / fan out (He initialisation, fan-out mode)."""
    return rng.normal(0.0, np.sqrt(2.0 / (shape[0] * shape[1] * shape[3])), shape)


def uniform_fans(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform within sqrt(6 / (fan in + fan out)) (Xavier initialisation)."""
    bound = np.sqrt(6.0 / (np.prod(shape[:-2]) * (shape[-2] + shape[-1])))
    return rng.uniform(-bound, bound, shape)


def normal(std: float) -> Draw:
    """Normal with mean 0 and the given standard deviation."""
    return lambda rng, shape: rng.normal(0.0, std, shape)


def constant(value: float) -> Draw:
    """The same value everywhere."""
    return lambda rng, shape: np.full(shape, value)


def max_pool(x: Array, window: int, *, stride: int = 1, padding: int = 0) -> Array:
    """`nn.max_pool`; in portable mode, the only form that jax2onnx converts: NNX's, with "SAME" or "VALID" padding."""
    if not nn.is_portable():
        return nn.max_pool(x, window, stride=stride, padding=padding)
    same = stride == 1 and 2 * padding == window - 1
    if not same:
        pads = (padding, padding)
        x = jnp.pad(x, ((0, 0), pads, pads, (0, 0)), constant_values=jnp.finfo(x.dtype).min)
    sides = {"window_shape": (window, window), "strides": (stride, stride)}
    return nnx.max_pool(x, **sides, padding="SAME" if same else "VALID")


def _without_gradient(x: Array) -> Array:
    """`stop_gradient`, but in portable mode the identity, because jax2onnx cannot convert it on a parameter."""
    return x if nn.is_portable() else jax.lax.stop_gradient(x)


class Conv(nnx.Module):
    """Convolution; groups = channels if `depthwise`. A bias exists where its `draw` is given.

    `padding`, `in_loop`: see `nn.conv2d`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        padding: Padding = "same",
        depthwise: bool = False,
        groups: int = 1,
        in_loop: bool = False,
        draw: Draw = uniform_fan_in,
        bias: Draw | None = None,
    ) -> None:
        self.stride, self.padding, self.groups = stride, padding, inputs if depthwise else groups
        self.in_loop = in_loop
        self.kernel = nnx.Param(jnp.zeros((size, size, inputs // self.groups, outputs)), draw=draw)
        self.bias = None if bias is None else nnx.Param(jnp.zeros(outputs), draw=bias)

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...].astype(x.dtype)  # the maps decide the precision, parameters are float32
        bias = None if self.bias is None else self.bias[...].astype(x.dtype)
        form = {"stride": self.stride, "padding": self.padding, "groups": self.groups, "in_loop": self.in_loop}
        return nn.conv2d(x, kernel, bias, **form)


class Linear(nnx.Module):
    """A linear layer with bias (at first 0) on the last axis; one operation per multiply-add is counted."""

    def __init__(self, inputs: int, outputs: int, *, draw: Draw, bias: Draw | None = None) -> None:
        self.kernel = nnx.Param(jnp.zeros((inputs, outputs)), draw=draw)
        self.bias = nnx.Param(jnp.zeros(outputs), draw=bias or constant(0.0))

    def __call__(self, x: Array) -> Array:
        y = x @ self.kernel[...].astype(x.dtype)
        record("linear", y.size * x.shape[-1])
        return y + self.bias[...].astype(x.dtype)


class BatchNorm(nnx.Module):
    """Batch norm with PyTorch's running statistics: new = (1 - m) old + m batch, where the variance is unbiased.

    m is the `momentum`, `eps` is added to the variance, `scale` is the initial scale; without `learned`, no
    gradient reaches scale and bias.
    """

    def __init__(
        self, channels: int, *, scale: float = 1.0, learned: bool = True, eps: float = EPS, momentum: float = MOMENTUM
    ) -> None:
        self.learned, self.eps, self.momentum = learned, eps, momentum
        self.scale = nnx.Param(jnp.zeros(channels), draw=constant(scale))
        self.bias = nnx.Param(jnp.zeros(channels), draw=constant(0.0))
        self.mean = nnx.BatchStat(jnp.zeros(channels), draw=constant(0.0))
        self.var = nnx.BatchStat(jnp.zeros(channels), draw=constant(1.0))

    def __call__(self, x: Array, train: bool) -> Array:
        mean, var = self.mean[...], self.var[...]
        if train:
            moments = nn.batch_moments(x)
            n = x.size // x.shape[-1]
            unbiased = (moments[0], moments[1] * (n / max(n - 1, 1)))
            # No gradient flows through the running estimates. (`set_value`, because `mean[...] = x` looks up shardings,
            # which doubled the time of tracing.)
            self.mean.set_value((1 - self.momentum) * mean + self.momentum * jax.lax.stop_gradient(unbiased[0]))
            self.var.set_value((1 - self.momentum) * var + self.momentum * jax.lax.stop_gradient(unbiased[1]))
            mean, var = moments
        scale, bias = self.scale[...], self.bias[...]
        if not self.learned:
            scale, bias = _without_gradient(scale), _without_gradient(bias)
        return nn.batch_norm(x, scale, bias, mean, var, eps=self.eps)


class GroupNorm(nnx.Module):
    """Group norm; it has no running statistics."""

    def __init__(self, channels: int, groups: int) -> None:
        self.groups = groups
        self.scale = nnx.Param(jnp.zeros(channels), draw=constant(1.0))
        self.bias = nnx.Param(jnp.zeros(channels), draw=constant(0.0))

    def __call__(self, x: Array) -> Array:
        return nn.group_norm(x, self.scale[...], self.bias[...], groups=self.groups, eps=EPS)


class LayerNorm(nnx.Module):
    """Normalises the last axis; it has no running statistics."""

    def __init__(self, channels: int) -> None:
        self.scale = nnx.Param(jnp.zeros(channels), draw=constant(1.0))
        self.bias = nnx.Param(jnp.zeros(channels), draw=constant(0.0))

    def __call__(self, x: Array) -> Array:
        return nn.layer_norm(x, self.scale[...], self.bias[...], eps=EPS)


class Scale(nnx.Module):
    """Multiplies by one learned number."""

    def __init__(self) -> None:
        self.factor = nnx.Param(jnp.zeros(()), draw=constant(1.0))

    def __call__(self, x: Array) -> Array:
        return x * self.factor[...]


class ConvNorm(nnx.Module):
    """Convolution without bias, batch norm (`norm(channels)` makes it), activation (None: none)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        padding: Padding = "same",
        depthwise: bool = False,
        norm: Callable[[int], BatchNorm] = BatchNorm,
        activation: Callable[[Array], Array] | None = jax.nn.silu,
        draw: Draw = uniform_fan_in,
    ) -> None:
        self.activation = activation or (lambda x: x)
        self.conv = Conv(inputs, outputs, size, stride=stride, padding=padding, depthwise=depthwise, draw=draw)
        self.bn = norm(outputs)

    def __call__(self, x: Array, train: bool) -> Array:
        return self.taps(x, train)[0]

    def taps(self, x: Array, train: bool) -> tuple[Array, Array]:
        """Returns the output, and the convolution's own output before norm and activation."""
        y = self.conv(x)
        return self.activation(self.bn(y, train)), y

    def normed(self, x: Array, train: bool) -> Array:
        """Returns the output before the activation."""
        return self.bn(self.conv(x), train)


# The layers below are built of convolutions with norm that `conv` makes, with the arguments of `ConvNorm`.
MakeConv = Callable[..., ConvNorm]


class SeparableConv(nnx.Module):
    """Depthwise convolution, then 1x1, each with norm and activation."""

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1, conv: MakeConv = ConvNorm) -> None:
        self.depthwise_conv = conv(inputs, inputs, size, stride=stride, depthwise=True)
        self.pointwise_conv = conv(inputs, outputs, 1)

    def __call__(self, x: Array, train: bool) -> Array:
        return self.pointwise_conv(self.depthwise_conv(x, train), train)

    def taps(self, x: Array, train: bool) -> tuple[Array, Array]:
        """Returns the output, and the 1x1 convolution's own output before norm and activation."""
        return self.pointwise_conv.taps(self.depthwise_conv(x, train), train)

    def normed(self, x: Array, train: bool) -> Array:
        """Returns the output before the last activation."""
        return self.pointwise_conv.normed(self.depthwise_conv(x, train), train)


class ChannelAttention(nnx.Module):
    """Scales every channel by hard_sigmoid(linear(mean over the map))."""

    def __init__(self, channels: int) -> None:
        self.fc = Conv(channels, channels, 1, bias=constant(0.0))

    def __call__(self, x: Array) -> Array:
        return x * jax.nn.hard_sigmoid(self.fc(nn.global_average_pool(x)))


class CSPLayer(nnx.Module):
    """Two 1x1 convolutions, blocks on the first; both are joined, scaled by optional channel attention, and mixed.

    `block(channels)` makes a block; each of the two has `expand_ratio` times the channels of the output.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        blocks: int,
        block: Callable[[int], Callable[[Array, bool], Array]],
        attention: bool = False,
        expand_ratio: float = 0.5,
        conv: MakeConv = ConvNorm,
    ) -> None:
        middle = int(outputs * expand_ratio)
        self.main_conv = conv(inputs, middle, 1)
        self.short_conv = conv(inputs, middle, 1)
        self.final_conv = conv(2 * middle, outputs, 1)
        self.blocks = nnx.List([block(middle) for _ in range(blocks)])
        self.attention = ChannelAttention(2 * middle) if attention else None

    def __call__(self, x: Array, train: bool) -> Array:
        short = self.short_conv(x, train)
        main = self.main_conv(x, train)
        for block in self.blocks:
            main = block(main, train)
        joined = jnp.concatenate((main, short), -1)
        if self.attention is not None:
            joined = self.attention(joined)
        return self.final_conv(joined, train)


class SPP(nnx.Module):
    """Spatial pyramid pooling: the map beside its largest values over windows of 5, 9 and 13 cells."""

    def __init__(self, inputs: int, outputs: int, *, conv: MakeConv = ConvNorm) -> None:
        self.conv1 = conv(inputs, inputs // 2, 1)
        self.conv2 = conv(inputs // 2 * 4, outputs, 1)

    def __call__(self, x: Array, train: bool) -> Array:
        pyramid = [self.conv1(x, train)]
        for _ in range(3):  # windows of 5 over windows of 5 are windows of 9, then of 13
            pyramid.append(max_pool(pyramid[-1], 5, padding=2))
        return self.conv2(jnp.concatenate(pyramid, -1), train)
