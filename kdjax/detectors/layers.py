"""The layers of the detectors, as NNX modules over `kdjax.nn`.

A variable declares its initial value (`draw`, read by `kdjax.detectors.api.pure`); constructors only run abstractly.
"""

import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from kdjax import nn
from kdjax.errors import UserError
from kdjax.nn.flops import record

Array = jax.Array

# Defaults of norms: the constant added to the variance, and the weight of a batch in the running statistics.
EPS, MOMENTUM = 1e-5, 0.1
FOCAL_BIAS = -math.log((1 - 0.01) / 0.01)  # every class starts at a probability of 0.01
# Of int8: the weight of a batch in the observed ranges, the name of the statistic that is 1 once values are rounded,
# and those of the ranges.
RANGE_MOMENTUM, ON, RANGES = 0.01, "on", ("low", "high")


def hard_swish(x: Array) -> Array:
    """`jax.nn.hard_swish`, in the form of which jax2onnx makes an operator."""
    return x * _hard_sigmoid(x)


def _hard_sigmoid(x: Array) -> Array:
    return jax.nn.hard_sigmoid(x)  # looked up here, because jax2onnx replaces it


ACTIVATIONS = {"silu": jax.nn.silu, "relu": jax.nn.relu, "hard_swish": hard_swish}
# What multiplies x in these, and the scale of its bytes; LiteRT demands that of the sigmoid.
_GATES = {jax.nn.silu: (jax.nn.sigmoid, 1 / 256), hard_swish: (_hard_sigmoid, 1 / 255)}
# What the layers that are being made share if they are for int8: the statistic `ON`.
_on: ContextVar[nnx.BatchStat[Any] | None] = ContextVar("on", default=None)


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


def check_activation(title: str, name: str) -> None:
    """Checks the option `activation` of a detector; `title` is the family's name in messages.

    Raises:
      UserError: there is no such activation.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"activation of {title} must be one of {', '.join(ACTIVATIONS)}, not {name!r}")


def for_int8(construct: Callable[[], nnx.Module]) -> Callable[[], nnx.Module]:
    """The constructor of the same module whose layers learn to compute with 8 bits: see `Quantiser` and `Conv`."""

    def constructed() -> nnx.Module:
        token = _on.set(nnx.BatchStat(jnp.zeros(()), draw=constant(0.0)))
        try:
            return construct()
        finally:
            _on.reset(token)

    return constructed


def _known(x: Array) -> Array | np.ndarray:
    """A variable; in NumPy if its value is known, so that what is computed of it is no operation of a program."""
    return x if isinstance(x, Tracer) else np.asarray(x)


def _rounded(on: nnx.BatchStat[Any], quantise: Callable[[Array], Array], x: Array) -> Array:
    """`quantise(x)` once values are rounded, else x."""
    # A moving average of 0 and 1 is not 0 after the first 1.
    switch = _known(on.get_value()) > 0
    if isinstance(switch, Array):
        return jnp.where(switch, quantise(x), x)
    return quantise(x) if switch else x


class Quantiser(nnx.Module):
    """Rounds a map to the 256 values of bytes; only a layer of `for_int8` does, and any other returns the map.

    In training it observes the least and the largest value of the global batch, of which it keeps a moving average (the
    first batch is taken whole): the range. It rounds where `ON` is not 0.
    """

    def __init__(self) -> None:
        self.on = _on.get()
        if self.on is not None:
            self.low = nnx.BatchStat(jnp.zeros(()), draw=constant(0.0))
            self.high = nnx.BatchStat(jnp.zeros(()), draw=constant(0.0))

    def __call__(self, x: Array, train: bool) -> Array:
        if self.on is None:
            return x
        low, high = self.low.get_value(), self.high.get_value()
        if train:
            rate = jnp.where(low == high, 1.0, RANGE_MOMENTUM)
            found = jax.lax.stop_gradient(x).astype(jnp.float32)
            low = low + rate * (jnp.minimum(jnp.min(found), 0.0) - low)
            high = high + rate * (jnp.maximum(jnp.max(found), 0.0) - high)
            self.low.set_value(low)
            self.high.set_value(high)

        def quantise(x: Array) -> Array:
            return nn.fake_quantise(x, *nn.affine(_known(low), _known(high)))

        return _rounded(self.on, quantise, x)


class Activation(nnx.Module):
    """An activation (None: none), with the ranges that int8 has around it.

    Its input is rounded unless the activation is a ReLU, which runtimes fuse with what is before it, or none. What
    multiplies the input in SiLU and hard-swish is rounded too.
    """

    def __init__(self, function: Callable[[Array], Array] | None) -> None:
        self.function, self.on, self.gate = function, _on.get(), _GATES.get(function) if function else None
        smooth = function is not None and function is not jax.nn.relu
        self.inputs, self.outputs = Quantiser() if smooth else None, Quantiser()

    def before(self, x: Array, train: bool) -> Array:
        """The input of the activation, rounded where int8 rounds it."""
        return x if self.inputs is None else self.inputs(x, train)

    def __call__(self, x: Array, train: bool) -> Array:
        """The activation of what `before` returned."""
        if self.on is not None and self.gate is not None:
            gate, scale = self.gate
            x = x * _rounded(self.on, lambda value: nn.fake_quantise(value, scale, 0.0), gate(x))
        elif self.function is not None:
            x = self.function(x)
        return self.outputs(x, train)


class Conv(nnx.Module):
    """Convolution; groups = channels if `depthwise`. A bias exists where its `draw` is given.

    `padding`, `in_loop`: see `nn.conv2d`. In int8 its kernel is rounded to signed bytes, with a scale for each output
    channel, and its output as a `Quantiser` does: `ranges` is the number of maps that it is called with in turn, each
    of which has a range of its own; 0 where a batch norm follows, whose output is rounded instead.
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
        ranges: int = 1,
    ) -> None:
        self.on, self.outputs = _on.get(), nnx.List([Quantiser() for _ in range(ranges)])
        self.stride, self.padding, self.groups = stride, padding, inputs if depthwise else groups
        self.in_loop = in_loop
        self.kernel = nnx.Param(jnp.zeros((size, size, inputs // self.groups, outputs)), draw=draw)
        self.bias = None if bias is None else nnx.Param(jnp.zeros(outputs), draw=bias)

    def __call__(self, x: Array, train: bool = False, number: int = 0) -> Array:
        """Convolves a map, the one of that number among those that it is called with."""
        y = self.convolve(x, self.rounded(), None if self.bias is None else self.bias[...])
        return self.outputs[number](y, train) if self.outputs else y

    def rounded(self) -> Array:
        """The kernel; in int8 with the values of bytes."""
        if self.on is None:
            return self.kernel[...]
        return _rounded(self.on, lambda kernel: nn.fake_quantise_kernel(_known(kernel)), self.kernel.get_value())

    def convolve(self, x: Array, kernel: Array, bias: Array | None) -> Array:
        """Convolves a map with another kernel and bias."""
        if self.on is not None and (written := nn.replacement("bytes_of_kernel")):
            kernel = written(kernel, depthwise=self.groups > 1)
        kernel = kernel.astype(x.dtype)  # the maps decide the precision, parameters are float32
        bias = None if bias is None else bias.astype(x.dtype)
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


def conv_norm(conv: Conv, norm: BatchNorm, x: Array, train: bool) -> Array:
    """norm(conv(x)).

    In portable mode the norm is folded into a kernel of bytes here, because other runtimes do not fold what is rounded.
    """
    if not (nn.is_portable() and conv.on is not None and float(conv.on.get_value()) > 0):
        return norm(conv(x), train)
    scale, bias, mean, var = (np.asarray(one.get_value()) for one in (norm.scale, norm.bias, norm.mean, norm.var))
    factor = scale / np.sqrt(var + np.float32(norm.eps))
    if conv.bias is not None:
        mean = mean - np.asarray(conv.bias.get_value())
    return conv.convolve(x, cast(Array, conv.rounded() * factor), cast(Array, bias - mean * factor))


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
    """Convolution without bias, batch norm (`norm(channels)` makes it), activation (None: none).

    An activation that is a module has the methods of `Activation`.
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
        norm: Callable[[int], BatchNorm] = BatchNorm,
        activation: Callable[[Array], Array] | None = jax.nn.silu,
        draw: Draw = uniform_fan_in,
    ) -> None:
        module = isinstance(activation, nnx.Module)
        self.activation = cast(Activation, activation) if module else Activation(activation)
        form = {"stride": stride, "padding": padding, "depthwise": depthwise, "draw": draw}
        self.conv = Conv(inputs, outputs, size, ranges=0, **form)
        self.bn = norm(outputs)

    def __call__(self, x: Array, train: bool) -> Array:
        return self.activation(self.normed(x, train), train)

    def taps(self, x: Array, train: bool) -> tuple[Array, Array]:
        """Returns the output, and the convolution's own output before norm and activation."""
        if nn.is_portable():  # where a folded norm leaves no output of the convolution's own
            return self(x, train), self.conv(x)
        y = self.conv(x)
        return self.activation(self.activation.before(self.bn(y, train), train), train), y

    def normed(self, x: Array, train: bool) -> Array:
        """Returns the output before the activation."""
        return self.activation.before(conv_norm(self.conv, self.bn, x, train), train)


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
        self.pooled, self.gate, self.scaled = Quantiser(), Quantiser(), Quantiser()

    def __call__(self, x: Array, train: bool = False) -> Array:
        pooled = self.pooled(nn.global_average_pool(x), train)
        return self.scaled(x * self.gate(jax.nn.hard_sigmoid(self.fc(pooled, train)), train), train)


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
        self.joined = Quantiser()
        self.attention = ChannelAttention(2 * middle) if attention else None

    def __call__(self, x: Array, train: bool) -> Array:
        short = self.short_conv(x, train)
        main = self.main_conv(x, train)
        for block in self.blocks:
            main = block(main, train)
        joined = self.joined(jnp.concatenate((main, short), -1), train)
        if self.attention is not None:
            joined = self.attention(joined, train)
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
