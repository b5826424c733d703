"""CSPDarknet, YOLOX's backbone: cross-stage partial layers of 1x1 and 3x3 convolutions after a space-to-depth stem.

Reference: Ge et al., YOLOX: Exceeding YOLO Series in 2021, arXiv 2107.08430. Module names follow mmdetection 3.3.0.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.detectors.layers import SPP, BatchNorm, ConvNorm, CSPLayer, MakeConv, Quantiser, SeparableConv

Array = jax.Array

EPS = 1e-3  # of every norm of YOLOX
conv_norm = functools.partial(ConvNorm, norm=functools.partial(BatchNorm, eps=EPS, momentum=0.03))

# Channels in and out, blocks, identity of stages 1 to 4 at widen = deepen = 1.
_STAGES = ((64, 128, 3, True), (128, 256, 9, True), (256, 512, 9, True), (512, 1024, 3, False))


class Focus(nnx.Module):
    """Space to depth (2x2 cells become one with four times the channels), then a 3x3 convolution."""

    def __init__(self, inputs: int, outputs: int, *, conv: MakeConv) -> None:
        self.conv = conv(4 * inputs, outputs, 3)

    def __call__(self, x: Array, train: bool) -> Array:
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.conv(jnp.concatenate(corners, -1), train)


class Block(nnx.Module):
    """1x1 convolution and 3x3 convolution, with an optional residual connection."""

    def __init__(self, channels: int, *, identity: bool, depthwise: bool, conv: MakeConv) -> None:
        self.sum = Quantiser() if identity else None
        self.conv1 = conv(channels, channels, 1)
        self.conv2 = conv3x3(depthwise, conv)(channels, channels, 3)

    def __call__(self, x: Array, train: bool) -> Array:
        y = self.conv2(self.conv1(x, train), train)
        return y if self.sum is None else self.sum(y + x, train)


def conv3x3(depthwise: bool, conv: MakeConv) -> Callable[..., ConvNorm | SeparableConv]:
    """What makes the 3x3 convolutions of a network; `conv`: see `layers.MakeConv`."""
    return functools.partial(SeparableConv, conv=conv) if depthwise else conv


def csp_layer(inputs: int, outputs: int, *, blocks: int, identity: bool, depthwise: bool, conv: MakeConv) -> CSPLayer:
    """A cross-stage partial layer of YOLOX, in backbone and neck."""
    block = functools.partial(Block, identity=identity, depthwise=depthwise, conv=conv)
    return CSPLayer(inputs, outputs, blocks=blocks, block=block, conv=conv)


class CSPDarknet(nnx.Module):
    """f32[B, H, W, 3] -> maps at strides 8, 16 and 32 with `channels` channels; `conv`: see `layers.MakeConv`."""

    def __init__(self, *, widen: float, deepen: float, depthwise: bool, conv: MakeConv = conv_norm) -> None:
        self.stem = Focus(3, int(64 * widen), conv=conv)
        self.channels = tuple(int(stage[1] * widen) for stage in _STAGES[1:])
        for index, (inputs, outputs, blocks, identity) in enumerate(_STAGES, 1):
            inputs, outputs = int(inputs * widen), int(outputs * widen)
            layers: list[nnx.Module] = [conv3x3(depthwise, conv)(inputs, outputs, 3, stride=2)]
            if index == 4:
                layers.append(SPP(outputs, outputs, conv=conv))
            blocks = max(round(blocks * deepen), 1)
            form = {"blocks": blocks, "identity": identity, "depthwise": depthwise, "conv": conv}
            layers.append(csp_layer(outputs, outputs, **form))
            setattr(self, f"stage{index}", nnx.List(layers))

    def __call__(self, x: Array, train: bool) -> tuple[Array, Array, Array]:
        x = self.stem(x, train)
        maps = []
        for index in range(1, 5):
            for layer in getattr(self, f"stage{index}"):
                x = layer(x, train)
            maps.append(x)
        return tuple(maps[1:])
