"""ResNet 18, 34, 50 and 101 and ResNeXt 50 and 101, the backbones of the detectors with a feature pyramid.

Reference: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, table 1; Xie et al., Aggregated Residual
Transformations for Deep Neural Networks, CVPR 2017, table 1. Module names follow mmdetection 3.3.0, torchvision and
timm, which agree on them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax.detectors.layers import Activation, BatchNorm, Conv, Quantiser, conv_norm, max_pool, normal_fan_out

Array = jax.Array

STRIDES = (4, 8, 16, 32)  # of the four stages
# Blocks of the stages; depths from 50 on have bottlenecks.
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
STYLES = ("pytorch", "caffe")
# Mean and deviation of the colours: RGB as torchvision's weights want them, BGR without deviation as Caffe's.
_RGB_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
_RGB_STD = np.array([58.395, 57.12, 57.375], np.float32)
BGR_MEAN = (103.53, 116.28, 123.675)


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions beside the identity (or a 1x1 convolution where the shape changes).

    `norms`: whether the norms use the statistics of the batch.
    """

    def __init__(self, inputs: int, channels: int, *, stride: int, style: str, learned: bool, **of_groups: int) -> None:
        del style, of_groups  # the first convolution has the stride in both; nothing is grouped
        self.conv1 = Conv(inputs, channels, 3, stride=stride, draw=normal_fan_out, ranges=0)
        self.bn1 = BatchNorm(channels, learned=learned)
        self.conv2 = Conv(channels, channels, 3, draw=normal_fan_out, ranges=0)
        self.bn2 = BatchNorm(channels, scale=0.0, learned=learned)
        self.downsample = _shortcut(inputs, channels, stride, learned)
        self.relu1, self.normed, self.relu2 = Activation(jax.nn.relu), Quantiser(), Activation(jax.nn.relu)

    def __call__(self, x: Array, train: bool, norms: bool) -> Array:
        y = self.relu1(conv_norm(self.conv1, self.bn1, x, norms), train)
        y = self.normed(conv_norm(self.conv2, self.bn2, y, norms), train)
        return self.relu2(y + _passed(self.downsample, x, train, norms), train)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolution, the last to four times the channels, beside the identity as in `BasicBlock`.

    The stride is that of the 3x3 convolution in style "pytorch", of the first 1x1 in style "caffe". With several
    groups (ResNeXt), the 3x3 convolution has `width` channels in all.
    """

    def __init__(
        self, inputs: int, channels: int, *, stride: int, style: str, learned: bool, groups: int, width: int
    ) -> None:
        first, second = (1, stride) if style == "pytorch" else (stride, 1)
        self.conv1 = Conv(inputs, width, 1, stride=first, draw=normal_fan_out, ranges=0)
        self.bn1 = BatchNorm(width, learned=learned)
        self.conv2 = Conv(width, width, 3, stride=second, groups=groups, draw=normal_fan_out, ranges=0)
        self.bn2 = BatchNorm(width, learned=learned)
        self.conv3 = Conv(width, 4 * channels, 1, draw=normal_fan_out, ranges=0)
        self.bn3 = BatchNorm(4 * channels, scale=0.0, learned=learned)
        self.downsample = _shortcut(inputs, 4 * channels, stride, learned)
        self.relu1, self.relu2, self.relu3 = (Activation(jax.nn.relu) for _ in range(3))
        self.normed = Quantiser()

    def __call__(self, x: Array, train: bool, norms: bool) -> Array:
        y = self.relu1(conv_norm(self.conv1, self.bn1, x, norms), train)
        y = self.relu2(conv_norm(self.conv2, self.bn2, y, norms), train)
        y = self.normed(conv_norm(self.conv3, self.bn3, y, norms), train)
        return self.relu3(y + _passed(self.downsample, x, train, norms), train)


def _shortcut(inputs: int, outputs: int, stride: int, learned: bool) -> nnx.List[Any] | None:
    if stride == 1 and inputs == outputs:
        return None
    conv = Conv(inputs, outputs, 1, stride=stride, draw=normal_fan_out, ranges=0)
    return nnx.List([conv, BatchNorm(outputs, learned=learned), Quantiser()])


def _passed(shortcut: nnx.List[Any] | None, x: Array, train: bool, norms: bool) -> Array:
    if shortcut is None:
        return x
    conv, norm, rounded = shortcut
    return rounded(conv_norm(conv, norm, x, norms), train)


class ResNet(nnx.Module):
    """f32[B, H, W, 3] -> the maps of the four stages, at strides 4, 8, 16 and 32 with `channels` channels.

    `frozen_stages`: -1 freezes nothing, 0 the stem, n the stem and n stages: no gradient, running statistics. With
    `norm_eval` all norms use their running statistics; with `frozen_norm` no gradient reaches their scales and biases.
    With `groups` > 1 it is a ResNeXt, whose groups have `group_width` channels in the first stage.
    """

    def __init__(
        self,
        depth: int,
        *,
        base_channels: int,
        style: str,
        frozen_stages: int,
        norm_eval: bool,
        frozen_norm: bool,
        groups: int = 1,
        group_width: int = 4,
    ) -> None:
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        block, expansion = (BasicBlock, 1) if depth < 50 else (Bottleneck, 4)
        self.conv1 = Conv(3, base_channels, 7, stride=2, draw=normal_fan_out, ranges=0)
        self.bn1 = BatchNorm(base_channels, learned=not frozen_norm)
        self.relu1 = Activation(jax.nn.relu)
        self.channels = tuple(expansion * base_channels * 2**i for i in range(4))
        inputs = base_channels
        for i, count in enumerate(_BLOCKS[depth]):
            blocks = []
            for j in range(count):
                stride, channels = 2 if i and not j else 1, base_channels * 2**i
                width = channels if groups == 1 else math.floor(channels * group_width / base_channels) * groups
                form = {"stride": stride, "style": style, "learned": not frozen_norm}
                blocks.append(block(inputs, channels, groups=groups, width=width, **form))
                inputs = self.channels[i]
            setattr(self, f"layer{i + 1}", nnx.List(blocks))

    def __call__(self, x: Array, train: bool) -> tuple[Array, Array, Array, Array]:
        def fixed(stage: int, x: Array) -> Array:
            return jax.lax.stop_gradient(x) if stage <= self.frozen_stages else x

        norms = train and not self.norm_eval
        x = self.relu1(conv_norm(self.conv1, self.bn1, x, norms and self.frozen_stages < 0), train)
        x = fixed(0, max_pool(x, 3, stride=2, padding=1))
        maps = []
        for stage in range(1, 5):
            for block in getattr(self, f"layer{stage}"):
                x = block(x, train, norms and stage > self.frozen_stages)
            x = fixed(stage, x)
            maps.append(x)
        return tuple(maps)


def is_frozen(path: str, frozen_stages: int) -> bool:
    """Whether the parameter at a detector's path, such as "backbone/layer1/0/conv1/kernel", belongs to a frozen part.

    Example:
      >>> [is_frozen(f"backbone/{part}", 1) for part in ("conv1/kernel", "layer1/0/bn1/scale", "layer2/0/bn1/scale")]
      [True, True, False]
    """
    parts = [("backbone/conv1/", "backbone/bn1/"), *((f"backbone/layer{i}/",) for i in range(1, 5))]
    return any(path.startswith(part) for part in parts[: frozen_stages + 1])


def preprocess(images: Array, *, style: str, bgr_mean: tuple[float, float, float] = BGR_MEAN) -> Array:
    """u8[B, H, W, 3] RGB -> f32[B, H, W, 3] normalised as the weights of a style expect.

    "pytorch": RGB minus ImageNet's mean, divided by its standard deviation. "caffe": BGR minus `bgr_mean`.
    """
    images = images.astype(jnp.float32)
    if style == "pytorch":
        return (images - _RGB_MEAN) / _RGB_STD
    return images[..., ::-1] - jnp.array(bgr_mean)
