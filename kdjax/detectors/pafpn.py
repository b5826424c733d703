"""PAFPN, the neck of RTMDet and YOLOX: a top-down and a bottom-up path, then one convolution per level.

Reference: Liu et al., Path Aggregation Network for Instance Segmentation, CVPR 2018; module names follow mmdetection
3.3.0.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax import nn
from kdjax.detectors.layers import ConvNorm, Quantiser, SeparableConv

Array = jax.Array

# The parts of a neck of three levels in the order in which PyTorch runs them, up to its last convolutions.
RUNS = (
    *(f"neck.{part}.{step}" for step in (0, 1) for part in ("reduce_layers", "top_down_blocks")),
    *(f"neck.{part}.{step}" for step in (0, 1) for part in ("downsamples", "bottom_up_blocks")),
)


class PAFPN(nnx.Module):
    """Maps of `inputs` channels, fine to coarse, each half as large as the last -> as many of `outputs` channels.

    `layer(inputs, outputs)` mixes two concatenated levels, `down(inputs, outputs, size, stride=2)` halves a map;
    the last convolutions, `out(inputs, outputs, size)`, have windows of `size` cells; None: `conv`, which takes the
    arguments of `ConvNorm`.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: int,
        *,
        layer: Callable[[int, int], Callable[[Array, bool], Array]],
        size: int,
        conv: Callable[..., ConvNorm] = ConvNorm,
        down: Callable[..., ConvNorm | SeparableConv] = ConvNorm,
        out: Callable[..., ConvNorm | SeparableConv] | None = None,
    ) -> None:
        pairs = list(itertools.pairwise(inputs))  # finer, coarser
        self.reduce_layers = nnx.List([conv(coarse, fine, 1) for fine, coarse in reversed(pairs)])
        self.top_down_blocks = nnx.List([layer(2 * fine, fine) for fine, _ in reversed(pairs)])
        self.downsamples = nnx.List([down(fine, fine, 3, stride=2) for fine, _ in pairs])
        self.bottom_up_blocks = nnx.List([layer(2 * fine, coarse) for fine, coarse in pairs])
        self.out_convs = nnx.List([(out or conv)(channels, outputs, size) for channels in inputs])
        self.joined_down, self.joined_up = (nnx.List([Quantiser() for _ in pairs]) for _ in range(2))

    def __call__(self, maps: tuple[Array, ...], train: bool) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Returns the maps for the head, and the last convolutions' outputs before norm and activation."""
        *finer, coarse = maps
        reduced = []  # what each level hands up, coarse to fine; the last is the finest level itself
        down = zip(reversed(finer), self.reduce_layers, self.top_down_blocks, self.joined_down, strict=True)
        for fine, squeeze, block, rounded in down:
            reduced.append(squeeze(coarse, train))
            joined = jnp.concatenate((nn.upsample_nearest(reduced[-1]), fine), -1)
            coarse = block(rounded(joined, train), train)
        outs = [coarse]
        up = zip(reversed(reduced), self.downsamples, self.bottom_up_blocks, self.joined_up, strict=True)
        for high, halve, block, rounded in up:
            joined = jnp.concatenate((halve(outs[-1], train), high), -1)
            outs.append(block(rounded(joined, train), train))
        both = [conv.taps(x, train) for conv, x in zip(self.out_convs, outs, strict=True)]
        return tuple(y for y, _ in both), tuple(raw for _, raw in both)
