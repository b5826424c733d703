"""CSPNeXt, RTMDet's backbone: cross-stage partial layers of 5x5 depthwise blocks with channel attention.

Reference: Lyu et al., RTMDet: An Empirical Study of Designing Real-Time Object Detectors, arXiv 2212.07784, section 3.
Module names follow mmdetection 3.3.0, whose weights fit (`kdjax.weights.from_torch`).
"""

import functools

import jax
from flax import nnx

from kdjax.detectors.layers import SPP, ConvNorm, CSPLayer, MakeConv, Quantiser, SeparableConv

Array = jax.Array

# Channels in and out, blocks, identity of stages 1 to 4 at widen = deepen = 1.
_STAGES = ((64, 128, 3, True), (128, 256, 6, True), (256, 512, 6, True), (512, 1024, 3, False))


class Block(nnx.Module):
    """3x3 convolution (`depthwise`: separable) and 5x5 separable one, with an optional residual connection.

    `conv`: see `layers.MakeConv`.
    """

    def __init__(self, channels: int, *, identity: bool, depthwise: bool = False, conv: MakeConv = ConvNorm) -> None:
        separable = functools.partial(SeparableConv, conv=conv)
        self.sum = Quantiser() if identity else None
        self.conv1 = (separable if depthwise else conv)(channels, channels, 3)
        self.conv2 = separable(channels, channels, 5)

    def __call__(self, x: Array, train: bool) -> Array:
        y = self.conv2(self.conv1(x, train), train)
        return y if self.sum is None else self.sum(y + x, train)


class CSPNeXt(nnx.Module):
    """f32[B, H, W, 3] -> maps at strides 8, 16 and 32 with `channels` channels.

    `depthwise`: the 3x3 convolutions after the stem are separable. `conv`: see `layers.MakeConv`.
    """

    def __init__(
        self,
        *,
        widen: float,
        deepen: float,
        expand_ratio: float = 0.5,
        attention: bool = True,
        depthwise: bool = False,
        conv: MakeConv = ConvNorm,
    ) -> None:
        down = functools.partial(SeparableConv, conv=conv) if depthwise else conv
        first = int(64 * widen)
        half = int(64 * widen // 2)
        self.stem = nnx.List([conv(3, half, 3, stride=2), conv(half, half, 3), conv(half, first, 3)])
        self.channels = tuple(int(stage[1] * widen) for stage in _STAGES[1:])
        for index, (inputs, outputs, blocks, identity) in enumerate(_STAGES, 1):
            inputs, outputs = int(inputs * widen), int(outputs * widen)
            layers: list[nnx.Module] = [down(inputs, outputs, 3, stride=2)]
            if index == 4:
                layers.append(SPP(outputs, outputs, conv=conv))
            layers.append(
                CSPLayer(
                    outputs,
                    outputs,
                    blocks=max(round(blocks * deepen), 1),
                    block=functools.partial(Block, identity=identity, depthwise=depthwise, conv=conv),
                    attention=attention,
                    expand_ratio=expand_ratio,
                    conv=conv,
                )
            )
            setattr(self, f"stage{index}", nnx.List(layers))

    def __call__(self, x: Array, train: bool) -> tuple[Array, Array, Array]:
        maps = []
        for name in ("stem", "stage1", "stage2", "stage3", "stage4"):
            for layer in getattr(self, name):
                x = layer(x, train)
            maps.append(x)
        return tuple(maps[2:])
