"""FPN, the feature pyramid: a top-down path over the stages of a backbone, and coarser levels added to it.

Reference: Lin et al., Feature Pyramid Networks for Object Detection, CVPR 2017, section 3; the levels P6 and P7 are
those of Lin et al., Focal Loss for Dense Object Detection, ICCV 2017 (from the backbone), and of Tian et al., FCOS,
ICCV 2019 (from P5); that of two-stage detectors is every second cell of P5. Module names follow mmdetection 3.3.0.
"""

import jax
from flax import nnx

from kdjax import nn
from kdjax.detectors.layers import Conv, Quantiser, constant, uniform_fans

Array = jax.Array

SOURCES = ("on_input", "on_output")  # of the convolutions of P6 and P7


class PlainConv(nnx.Module):
    """A convolution with bias, without norm or activation, under the name that such a layer has in mmdetection."""

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1) -> None:
        self.conv = Conv(inputs, outputs, size, stride=stride, draw=uniform_fans, bias=constant(0.0))

    def __call__(self, x: Array, train: bool = False) -> Array:
        return self.conv(x, train)


class FPN(nnx.Module):
    """Maps of `inputs` channels, fine to coarse, each half as large as the last -> `levels` maps of `outputs` channels.

    Each further level is a 3x3 convolution of stride 2 on the level before. The input of the first one is the coarsest
    map ("on_input") or its level of the pyramid ("on_output"); with `relu` the inputs of the others are rectified.
    Without `extra_convs` a further level is every second cell of the level before.
    """

    def __init__(
        self, inputs: tuple[int, ...], outputs: int, *, levels: int, extra_convs: str = "", relu: bool = False
    ) -> None:
        self.extra_convs, self.relu, self.levels = extra_convs, relu, levels
        self.lateral_convs = nnx.List([PlainConv(channels, outputs, 1) for channels in inputs])
        self.sums = nnx.List([Quantiser() for _ in inputs[1:]])
        sources = [inputs[-1] if extra_convs == "on_input" else outputs] + [outputs] * levels
        self.fpn_convs = nnx.List(
            [PlainConv(outputs, outputs, 3) for _ in inputs]
            + [PlainConv(c, outputs, 3, stride=2) for c in sources[: levels - len(inputs)] if extra_convs]
        )

    def __call__(self, maps: tuple[Array, ...], train: bool = False) -> tuple[Array, ...]:
        laterals = [conv(x, train) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = self.sums[i - 1](laterals[i - 1] + nn.upsample_nearest(laterals[i]), train)
        outs = [conv(x, train) for conv, x in zip(self.fpn_convs, laterals, strict=False)]
        if not self.extra_convs:
            for _ in range(self.levels - len(maps)):
                outs.append(outs[-1][:, ::2, ::2])
            return tuple(outs)
        x = maps[-1] if self.extra_convs == "on_input" else outs[-1]
        for i in range(len(maps), len(self.fpn_convs)):
            x = jax.nn.relu(x) if self.relu and i > len(maps) else x
            x = self.fpn_convs[i](x, train)
            outs.append(x)
        return tuple(outs)
