"""CSPNeXt, RTMDet's backbone: cross-stage partial layers of 5x5 depthwise blocks with channel attention.

Reference: Lyu et al., RTMDet: An Empirical Study of Designing Real-Time Object Detectors, arXiv 2212.07784, section 3.
Module names follow mmdetection 3.3.0, whose weights fit (`kdjax.detectors.convert`).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax import nn
from kdjax.detectors.layers import Conv, ConvNorm, constant

Array = jax.Array

# Channels in and out, blocks, identity of stages 1 to 4 at widen = deepen = 1.
_STAGES = ((64, 128, 3, True), (128, 256, 6, True), (256, 512, 6, True), (512, 1024, 3, False))


class SeparableConv(nnx.Module):
    """5x5 depthwise convolution, then 1x1, each with norm and activation."""

    def __init__(self, channels: int):
        self.depthwise_conv = ConvNorm(channels, channels, 5, depthwise=True)
        self.pointwise_conv = ConvNorm(channels, channels, 1)

    def __call__(self, x: Array, train: bool) -> Array:
        return self.pointwise_conv(self.depthwise_conv(x, train), train)


class Block(nnx.Module):
    """3x3 convolution, 5x5 separable convolution, and the identity if asked for."""

    def __init__(self, channels: int, *, identity: bool):
        self.identity = identity
        self.conv1 = ConvNorm(channels, channels, 3)
        self.conv2 = SeparableConv(channels)

    def __call__(self, x: Array, train: bool) -> Array:
        y = self.conv2(self.conv1(x, train), train)
        return y + x if self.identity else y


class ChannelAttention(nnx.Module):
    """Scales every channel by hard_sigmoid(linear(mean over the map))."""

    def __init__(self, channels: int):
        self.fc = Conv(channels, channels, 1, bias=constant(0.0))

    def __call__(self, x: Array) -> Array:
        return x * jax.nn.hard_sigmoid(self.fc(nn.global_average_pool(x)))


class CSPLayer(nnx.Module):
    """Half of the channels go through the blocks, half past them; joined, attended to if asked for, and mixed."""

    def __init__(
        self, inputs: int, outputs: int, *, blocks: int, identity: bool, attention: bool, expand_ratio: float = 0.5
    ):
        middle = int(outputs * expand_ratio)
        self.main_conv = ConvNorm(inputs, middle, 1)
        self.short_conv = ConvNorm(inputs, middle, 1)
        self.final_conv = ConvNorm(2 * middle, outputs, 1)
        self.blocks = nnx.List([Block(middle, identity=identity) for _ in range(blocks)])
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

    def __init__(self, inputs: int, outputs: int):
        self.conv1 = ConvNorm(inputs, inputs // 2, 1)
        self.conv2 = ConvNorm(inputs // 2 * 4, outputs, 1)

    def __call__(self, x: Array, train: bool) -> Array:
        pyramid = [self.conv1(x, train)]
        for _ in range(3):  # windows of 5 over windows of 5 are windows of 9, then of 13
            pyramid.append(nn.max_pool(pyramid[-1], 5, padding=2))
        return self.conv2(jnp.concatenate(pyramid, -1), train)


class CSPNeXt(nnx.Module):
    """f32[B, H, W, 3] -> maps at strides 8, 16 and 32 with `channels` channels."""

    def __init__(self, *, widen: float, deepen: float, expand_ratio: float = 0.5, attention: bool = True):
        first = int(64 * widen)
        half = int(64 * widen // 2)
        self.stem = nnx.List([ConvNorm(3, half, 3, stride=2), ConvNorm(half, half, 3), ConvNorm(half, first, 3)])
        self.channels = tuple(int(stage[1] * widen) for stage in _STAGES[1:])
        for index, (inputs, outputs, blocks, identity) in enumerate(_STAGES, 1):
            inputs, outputs = int(inputs * widen), int(outputs * widen)
            layers = [ConvNorm(inputs, outputs, 3, stride=2)]
            if index == 4:
                layers.append(SPP(outputs, outputs))
            layers.append(
                CSPLayer(
                    outputs,
                    outputs,
                    blocks=max(round(blocks * deepen), 1),
                    identity=identity,
                    attention=attention,
                    expand_ratio=expand_ratio,
                )
            )
            setattr(self, f"stage{index}", nnx.List(layers))

    def __call__(self, x: Array, train: bool) -> tuple[Array, Array, Array]:
        maps = []
        for stage in (self.stem, self.stage1, self.stage2, self.stage3, self.stage4):
            for layer in stage:
                x = layer(x, train)
            maps.append(x)
        return tuple(maps[2:])
