"""Towers over the levels of RTMDet and RTMDet-Ins, whose levels may share convolutions but never batch norms."""

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.detectors.layers import (
    MOMENTUM,
    Activation,
    BatchNorm,
    Conv,
    ConvNorm,
    SeparableConv,
    constant,
    conv_norm,
    normal,
)

Array = jax.Array

STRIDES = (8, 16, 32)  # of the levels, in pixels


class TowerConv(nnx.Module):
    """A 3x3 convolution (`own_conv=False`: another level's is used), this level's batch norm and its activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        own_conv: bool = True,
        momentum: float = MOMENTUM,
        activation: Callable[[Array], Array] = jax.nn.silu,
    ) -> None:
        self.conv = Conv(inputs, outputs, 3, draw=normal(0.01), ranges=0) if own_conv else None
        self.bn = BatchNorm(outputs, momentum=momentum)
        self.activation = Activation(activation)


# The convolutions of a tower, level first.
Tower = nnx.List[nnx.List[TowerConv]] | nnx.List[nnx.List[SeparableConv]]


def tower(
    inputs: int,
    channels: int,
    *,
    convs: int,
    share_conv: bool,
    momentum: float = MOMENTUM,
    activation: Callable[[Array], Array] = jax.nn.silu,
) -> Tower:
    """A tower over the levels, whose convolutions are shared if `share_conv`; its norms never are."""
    form = {"momentum": momentum, "activation": activation}
    return nnx.List(
        [
            nnx.List(
                [
                    TowerConv(channels if i else inputs, channels, own_conv=level == 0 or not share_conv, **form)
                    for i in range(convs)
                ]
            )
            for level in range(len(STRIDES))
        ]
    )


def separable_tower(
    inputs: int, channels: int, *, convs: int, activation: Callable[[Array], Array] = jax.nn.silu
) -> Tower:
    """A tower of depthwise separable convolutions, of which the levels share nothing."""
    conv = functools.partial(ConvNorm, draw=normal(0.01), activation=activation)
    return nnx.List(
        [
            nnx.List([SeparableConv(channels if i else inputs, channels, 3, conv=conv) for i in range(convs)])
            for _ in STRIDES
        ]
    )


def predictors(channels: int, outputs: int, bias: float) -> nnx.List[Conv]:
    """The 1x1 convolutions after a tower, one for each level."""
    return nnx.List([Conv(channels, outputs, 1, draw=normal(0.01), bias=constant(bias)) for _ in STRIDES])


# The outputs of a tower's convolutions before their activation (conv, then level), and the predictions.
Branch = tuple[tuple[tuple[Array, ...], ...], tuple[Array, ...]]


def run_tower(
    convs: Tower,
    predict: nnx.List[Conv],
    maps: tuple[Array, ...],
    start: int,
    train: bool,
    finish: Callable[[int, Array], Array] = lambda level, y: y,
) -> Branch:
    """Runs a tower on all levels from conv `start` on (0-based; the maps are activated first if start > 0).

    `finish(level, prediction)` gives what is returned of a level's prediction.
    """
    taps, predictions = [], []
    for level, x in enumerate(maps):
        if start:
            activation = _activation(convs[level][start - 1])
            x = activation(activation.before(x, train), train)
        taps.append([])
        for i in range(start, len(convs[level])):
            layer = convs[level][i]
            if isinstance(layer, SeparableConv):
                taps[level].append(layer.normed(x, train))
            else:
                conv = layer.conv if layer.conv is not None else cast(TowerConv, convs[0][i]).conv
                taps[level].append(layer.activation.before(conv_norm(cast(Conv, conv), layer.bn, x, train), train))
            x = _activation(layer)(taps[level][-1], train)
        # Losses and boxes are computed in float32.
        predictions.append(finish(level, predict[level](x, train).astype(jnp.float32)))
    return tuple(zip(*taps, strict=True)), tuple(predictions)


def _activation(layer: TowerConv | SeparableConv) -> Activation:
    return layer.pointwise_conv.activation if isinstance(layer, SeparableConv) else layer.activation
