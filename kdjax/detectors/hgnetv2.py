"""HGNetv2 B0, B2, B4 and B5, the backbones of D-FINE.

Reference: PaddleDetection's PP-HGNetV2 (without a paper), as Peng et al., D-FINE, ICLR 2025, have it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.detectors.layers import BatchNorm, ConvNorm, constant, max_pool

Array = jax.Array


class Stage(NamedTuple):
    """Sizes of one stage."""

    middle: int  # channels of the layers of a block
    outputs: int
    blocks: int
    layers: int  # of a block


class AffineReLU(nnx.Module):
    """ReLU, times one learned number, plus another; the methods are those of `layers.Activation`."""

    def __init__(self) -> None:
        self.factor = nnx.Param(jnp.zeros(1), draw=constant(1.0))
        self.bias = nnx.Param(jnp.zeros(1), draw=constant(0.0))

    def before(self, x: Array, train: bool) -> Array:
        """x: nothing is rounded."""
        del train
        return x

    def __call__(self, x: Array, train: bool) -> Array:
        del train
        return jax.nn.relu(x) * self.factor[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


MakeConv = Callable[..., ConvNorm]  # with the arguments of `ConvNorm`; without `activation` the backbone's own


def _conv_of(affine: bool, learned: bool) -> MakeConv:
    norm = functools.partial(BatchNorm, learned=learned)

    def conv(*sizes: int, **form: object) -> ConvNorm:
        own = {"norm": norm, "activation": AffineReLU() if affine else jax.nn.relu}
        return ConvNorm(*sizes, **own | form)

    return conv


class LightConv(nnx.Module):
    """A 1x1 convolution without activation, then a depthwise 5x5 one."""

    def __init__(self, inputs: int, outputs: int, *, conv: MakeConv) -> None:
        self.conv1 = conv(inputs, outputs, 1, activation=None)
        self.conv2 = conv(outputs, outputs, 5, depthwise=True)

    def __call__(self, x: Array, train: bool) -> Array:
        return self.conv2(self.conv1(x, train), train)


class Block(nnx.Module):
    """A chain of layers; its input and the outputs of all of them are joined, and two 1x1 convolutions mix them."""

    def __init__(self, inputs: int, stage: Stage, *, light: bool, residual: bool, conv: MakeConv) -> None:
        self.residual = residual

        def layer(inputs: int) -> ConvNorm | LightConv:
            return LightConv(inputs, stage.middle, conv=conv) if light else conv(inputs, stage.middle, 3)

        self.layers = nnx.List([layer(stage.middle if i else inputs) for i in range(stage.layers)])
        joined, half = inputs + stage.layers * stage.middle, stage.outputs // 2
        self.aggregation = nnx.List([conv(joined, half, 1), conv(half, stage.outputs, 1)])

    def __call__(self, x: Array, train: bool) -> Array:
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(outputs[-1], train))
        y = jnp.concatenate(outputs, -1)
        for conv in self.aggregation:
            y = conv(y, train)
        return x + y if self.residual else y


class Downsampled(nnx.Module):
    """Blocks behind a depthwise convolution of stride 2, if `down`; all but the first have a shortcut."""

    def __init__(self, inputs: int, stage: Stage, *, down: bool, light: bool, conv: MakeConv) -> None:
        self.downsample = conv(inputs, inputs, 3, stride=2, depthwise=True, activation=None) if down else None
        first = Block(inputs, stage, light=light, residual=False, conv=conv)
        others = [Block(stage.outputs, stage, light=light, residual=True, conv=conv) for _ in range(1, stage.blocks)]
        self.blocks = nnx.List([first, *others])

    def __call__(self, x: Array, train: bool) -> Array:
        if self.downsample is not None:
            x = self.downsample(x, train)
        for block in self.blocks:
            x = block(x, train)
        return x


class Stem(nnx.Module):
    """f32[B, H, W, 3] -> f32[B, H / 4, W / 4, C]. Before 2x2 windows maps get zeros at their right and bottom."""

    def __init__(self, middle: int, outputs: int, *, conv: MakeConv) -> None:
        self.stem1 = conv(3, middle, 3, stride=2)
        self.stem2a = conv(middle, middle // 2, 2, padding=0)
        self.stem2b = conv(middle // 2, middle, 2, padding=0)
        self.stem3 = conv(2 * middle, middle, 3, stride=2)
        self.stem4 = conv(middle, outputs, 1)

    def __call__(self, x: Array, train: bool) -> Array:
        x = _padded(self.stem1(x, train))
        y = self.stem2b(_padded(self.stem2a(x, train)), train)
        x = self.stem3(jnp.concatenate((max_pool(x, 2), y), -1), train)
        return self.stem4(x, train)


def _padded(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))


class HGNetv2(nnx.Module):
    """f32[B, H, W, 3] -> the maps of the last `levels` stages, of which the last has stride 32.

    `stem`: channels inside the stem, and after it; `stages`: four; `affine`: whether a learned scale and shift follow
    each activation. With `frozen_stem` no gradient reaches the stem, and its norms use their running statistics. With
    `frozen_norm` all norms do, and no gradient reaches their scales and biases.
    """

    def __init__(
        self,
        stem: tuple[int, int],
        stages: Sequence[Stage],
        *,
        affine: bool,
        levels: int,
        frozen_stem: bool,
        frozen_norm: bool,
    ) -> None:
        self.levels, self.frozen_stem, self.frozen_norm = levels, frozen_stem, frozen_norm
        conv = _conv_of(affine, not frozen_norm)
        self.embedder = Stem(*stem, conv=conv)
        inputs = (stem[1], *(stage.outputs for stage in stages))
        self.stages = nnx.List(
            [Downsampled(inputs[i], stage, down=i > 0, light=i > 1, conv=conv) for i, stage in enumerate(stages)]
        )

    def __call__(self, x: Array, train: bool) -> tuple[Array, ...]:
        train = train and not self.frozen_norm
        x = self.embedder(x, train and not self.frozen_stem)
        x = jax.lax.stop_gradient(x) if self.frozen_stem else x
        maps = []
        for stage in self.stages:
            x = stage(x, train)
            maps.append(x)
        return tuple(maps[-self.levels :])


def is_frozen(path: str, frozen_stem: bool) -> bool:
    """Whether the parameter at a detector's path belongs to a frozen part.

    Example:
      >>> [is_frozen(f"backbone/{part}", True) for part in ("embedder/stem1/conv/kernel", "stages/0/x")]
      [True, False]
    """
    return frozen_stem and path.startswith("backbone/embedder/")
