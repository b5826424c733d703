"""The blocks that fuse the levels in D-FINE's encoder.

Reference: Wang et al., YOLOv9, ECCV 2024, section 4.2 (GELAN), with the blocks of RepVGG; Wang et al., YOLOv10, NeurIPS
2024, section 3.2 (downsampling of channels and space apart); Peng et al., D-FINE, ICLR 2025, section 5.1.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.detectors.hybrid_encoder import CSPRep, Fusion
from kdjax.detectors.layers import ConvNorm

Array = jax.Array


class Down(nnx.Module):
    """A 1x1 convolution, then a depthwise 3x3 one of stride 2, both with norm and without activation."""

    def __init__(self, channels: int) -> None:
        self.conv1 = ConvNorm(channels, channels, 1, activation=None)
        self.conv2 = ConvNorm(channels, channels, 3, stride=2, depthwise=True, activation=None)

    def __call__(self, x: Array, train: bool) -> Array:
        return self.conv2(self.conv1(x, train), train)


class GELAN(nnx.Module):
    """Two halves a, b of a 1x1 convolution; c = 3x3(CSPRep(b)), d = 3x3(CSPRep(c)); a 1x1 convolution of a, b, c, d."""

    def __init__(self, inputs: int, outputs: int, middle: int, *, blocks: int) -> None:
        self.conv1 = ConvNorm(inputs, inputs, 1)
        self.csp_rep1 = CSPRep(inputs // 2, middle, blocks=blocks)
        self.conv2 = ConvNorm(middle, middle, 3)
        self.csp_rep2 = CSPRep(middle, middle, blocks=blocks)
        self.conv3 = ConvNorm(middle, middle, 3)
        self.conv4 = ConvNorm(inputs + 2 * middle, outputs, 1)

    def __call__(self, x: Array, train: bool) -> Array:
        halves = self.conv1(x, train)
        one = self.conv2(self.csp_rep1(jnp.split(halves, 2, -1)[1], train), train)
        two = self.conv3(self.csp_rep2(one, train), train)
        return self.conv4(jnp.concatenate([halves, one, two], -1), train)


def gelan_fusion(expansion: float, blocks: int) -> Fusion:
    """The fusion of D-FINE; `expansion`: width of the inner parts, as a share of half the maps' channels."""
    return Fusion(
        lateral=lambda channels: ConvNorm(channels, channels, 1, activation=None),
        down=Down,
        block=lambda inputs, channels: GELAN(inputs, channels, round(expansion * channels // 2), blocks=blocks),
    )
