"""CSPNeXt-PAFPN, RTMDet's neck: a top-down and a bottom-up path of CSP layers, then one 3x3 convolution a level.

Reference: as `kdjax.detectors.cspnext`; module names follow mmdetection 3.3.0.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax import nn
from kdjax.detectors.cspnext import CSPLayer
from kdjax.detectors.layers import ConvNorm

Array = jax.Array


class CSPNeXtPAFPN(nnx.Module):
    """Maps of `inputs` channels, fine to coarse, each half as large as the last -> as many of `outputs` channels."""

    def __init__(self, inputs: tuple[int, ...], outputs: int, *, blocks: int, expand_ratio: float = 0.5):
        def layer(channels: int, out: int) -> CSPLayer:
            return CSPLayer(channels, out, blocks=blocks, identity=False, attention=False, expand_ratio=expand_ratio)

        pairs = list(zip(inputs[:-1], inputs[1:], strict=True))  # finer, coarser
        self.reduce_layers = nnx.List([ConvNorm(coarse, fine, 1) for fine, coarse in reversed(pairs)])
        self.top_down_blocks = nnx.List([layer(2 * fine, fine) for fine, _ in reversed(pairs)])
        self.downsamples = nnx.List([ConvNorm(fine, fine, 3, stride=2) for fine, _ in pairs])
        self.bottom_up_blocks = nnx.List([layer(2 * fine, coarse) for fine, coarse in pairs])
        self.out_convs = nnx.List([ConvNorm(channels, outputs, 3) for channels in inputs])

    def __call__(self, maps: tuple[Array, ...], train: bool) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Returns the maps for the head, and the last convolutions' outputs before norm and activation."""
        *finer, coarse = maps
        reduced = []  # what each level hands up, coarse to fine; the last is the finest level itself
        for fine, squeeze, block in zip(reversed(finer), self.reduce_layers, self.top_down_blocks, strict=True):
            reduced.append(squeeze(coarse, train))
            coarse = block(jnp.concatenate((nn.upsample_nearest(reduced[-1]), fine), -1), train)
        outs = [coarse]
        for high, down, block in zip(reversed(reduced), self.downsamples, self.bottom_up_blocks, strict=True):
            outs.append(block(jnp.concatenate((down(outs[-1], train), high), -1), train))
        both = [conv.taps(x, train) for conv, x in zip(self.out_convs, outs, strict=True)]
        return tuple(y for y, _ in both), tuple(raw for _, raw in both)
