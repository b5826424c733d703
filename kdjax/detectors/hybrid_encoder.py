"""The hybrid encoder of RT-DETR and D-FINE: attention on the coarsest map, then fusion of the levels both ways.

Reference: Zhao et al., DETRs Beat YOLOs on Real-time Object Detection, CVPR 2024, section 4.2 (AIFI and CCFF).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax import nn
from kdjax.detectors.layers import ConvNorm
from kdjax.detectors.transformer import EncoderLayer, sine_embedding

Array = jax.Array


class RepBlock(nnx.Module):
    """SiLU of the sum of a 3x3 and a 1x1 convolution, each with norm, without a shortcut.

    Reference: Ding et al., RepVGG, CVPR 2021, section 3.2.
    """

    def __init__(self, channels: int) -> None:
        self.conv1 = ConvNorm(channels, channels, 3, activation=None)
        self.conv2 = ConvNorm(channels, channels, 1, activation=None)

    def __call__(self, x: Array, train: bool) -> Array:
        return jax.nn.silu(self.conv1(x, train) + self.conv2(x, train))


class CSPRep(nnx.Module):
    """conv3(blocks(conv1 x) + conv2 x) with 1x1 convolutions to `expansion` times the outputs; no conv3 if it is 1."""

    def __init__(self, inputs: int, outputs: int, *, blocks: int = 3, expansion: float = 1.0) -> None:
        middle = int(outputs * expansion)
        self.conv1 = ConvNorm(inputs, middle, 1)
        self.conv2 = ConvNorm(inputs, middle, 1)
        self.bottlenecks = nnx.List([RepBlock(middle) for _ in range(blocks)])
        self.conv3 = ConvNorm(middle, outputs, 1) if middle != outputs else None

    def __call__(self, x: Array, train: bool) -> Array:
        y = self.conv1(x, train)
        for block in self.bottlenecks:
            y = block(y, train)
        y = y + self.conv2(x, train)
        return y if self.conv3 is None else self.conv3(y, train)


Layer = Callable[..., Any]  # makes a module (x, train) -> x


class Fusion(NamedTuple):
    """What the levels are fused with, by the number of channels C of the maps."""

    lateral: Layer  # (C) -> module on maps that go down to the next finer level
    down: Layer  # (C) -> module that halves the sides
    block: Layer  # (2 C, C) -> module on two levels side by side


def csp_fusion(expansion: float) -> Fusion:
    """The fusion of RT-DETR."""
    return Fusion(
        lateral=lambda channels: ConvNorm(channels, channels, 1),
        down=lambda channels: ConvNorm(channels, channels, 3, stride=2),
        block=lambda inputs, channels: CSPRep(inputs, channels, expansion=expansion),
    )


class Encoded(NamedTuple):
    """What the encoder computes, maps f32[B, H, W, C], fine to coarse unless said otherwise."""

    projected: tuple[Array, ...]  # of the backbone, with the channels of the encoder
    attended: Array  # the coarsest one after attention
    merged: tuple[Array, ...]  # on the way down, coarse to fine, from the second coarsest on
    maps: tuple[Array, ...]  # the result


class HybridEncoder(nnx.Module):
    """The maps of a backbone, fine to coarse, with `inputs` channels -> maps with `channels` channels."""

    def __init__(self, inputs: Sequence[int], channels: int, *, heads: int, hidden: int, fusion: Fusion) -> None:
        steps = len(inputs) - 1
        self.input_proj = nnx.List([ConvNorm(width, channels, 1, activation=None) for width in inputs])
        self.aifi = EncoderLayer(channels, heads, hidden)
        self.lateral_convs = nnx.List([fusion.lateral(channels) for _ in range(steps)])
        self.fpn_blocks = nnx.List([fusion.block(2 * channels, channels) for _ in range(steps)])
        self.downsample_convs = nnx.List([fusion.down(channels) for _ in range(steps)])
        self.pan_blocks = nnx.List([fusion.block(2 * channels, channels) for _ in range(steps)])

    def __call__(self, maps: tuple[Array, ...], train: bool) -> Encoded:
        projected = tuple(project(x, train) for project, x in zip(self.input_proj, maps, strict=True))
        coarsest = projected[-1]
        batch, height, width, channels = coarsest.shape
        position = jnp.asarray(sine_embedding((height, width), channels), coarsest.dtype)
        attended = self.aifi(coarsest.reshape(batch, -1, channels), position).reshape(coarsest.shape)

        y, laterals, merged = attended, [], []
        for lateral, block, finer in zip(self.lateral_convs, self.fpn_blocks, projected[-2::-1], strict=True):
            laterals.append(lateral(y, train))
            y = block(jnp.concatenate([nn.upsample_nearest(laterals[-1]), finer], -1), train)
            merged.append(y)
        result = [y]
        for down, block, coarser in zip(self.downsample_convs, self.pan_blocks, laterals[::-1], strict=True):
            y = block(jnp.concatenate([down(y, train), coarser], -1), train)
            result.append(y)
        return Encoded(projected, attended, tuple(merged), tuple(result))
