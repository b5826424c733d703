"""Detectors that compute with 8 bits, without training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax.detectors import build, layers
from kdjax.detectors.api import Detector, flatten, pure, switched, unflatten
from kdjax.structs import DetectorOutput
from tests.support.models import lively


class Tiny(nnx.Module):
    """A map of stride 8 with each kind of layer that int8 treats in its own way."""

    def __init__(self) -> None:
        self.image, self.sum = layers.Quantiser(), layers.Quantiser()
        kinds = zip((3, 8, 8), layers.ACTIVATIONS.values(), strict=True)
        self.down = nnx.List([layers.ConvNorm(n, 8, 3, stride=2, activation=kind) for n, kind in kinds])
        self.depthwise = layers.SeparableConv(8, 8, 3)
        self.csp = layers.CSPLayer(8, 8, blocks=1, block=lambda n: layers.ConvNorm(n, n, 1), attention=True)
        self.cls, self.reg = (layers.Conv(8, n, 1, draw=layers.normal(1), bias=layers.normal(1)) for n in (3, 4))

    def __call__(self, x: Any, train: bool) -> DetectorOutput:
        x = self.image(x, train)
        for conv in self.down:
            x = conv(x, train)
        x = self.sum(x + self.depthwise(x, train), train)
        x = layers.max_pool(self.csp(x, train), 3, padding=1)
        return DetectorOutput(
            strides=(8,), neck=(x,), cls_logits=(self.cls(x, train),), box_reg=(jnp.exp(self.reg(x, train)),)
        )


def tiny() -> Detector:
    """A detector of one level with this network, whose boxes and assignments are those of RTMDet."""
    module = pure(layers.for_int8(Tiny))

    def apply(params: Any, stats: Any, x: Any, *, train: bool) -> Any:
        return module.call(params, stats, Tiny.__call__, x, train)

    own = {"strides": (8,), "shapes": module.shapes, "init": module.init, "apply": apply, "options": {"int8": True}}
    return dataclasses.replace(build("rtmdet_pico", 3), **own)


def observed(detector: Detector, images: np.ndarray, *, seed: int = 0, calm: bool = False) -> tuple[dict, dict]:
    """(params, stats) of a detector with the option int8: lively weights, norms and ranges of these images, rounded.

    Args:
      detector: with this option.
      images: u8[B, H, W, 3].
      seed: of the weights.
      calm: norms with small scales and biases of 1, so that layers are nearly linear: in a deep network of random
        weights, the last bit of some pixels changes everything.
    """
    params, before = detector.init(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    params = flatten(lively(params, seed))
    for path, value in sorted(params.items()):
        if path.endswith(("/scale", "/bias")):  # also negative factors of norms
            params[path] = (value + rng.normal(size=value.shape, scale=0.3)).astype(np.float32)
        if calm and path.endswith("/scale"):
            params[path], shift = 0.2 * params[path], path.removesuffix("scale") + "bias"
            params[shift] = np.ones_like(params[shift])
    params = unflatten(params)
    run = jax.jit(lambda params, stats, x: detector.apply(params, stats, x, train=True)[1])
    x = detector.preprocess(images)
    # The first batch sets the ranges. The norms are to have the statistics of that batch: old + m (batch - old) was
    # found with an unknown m, which a second run tells.
    first = run(params, before, x)
    before, after, again = (flatten(stats) for stats in (before, first, run(params, first, x)))
    for path in after:
        if path.endswith(("/mean", "/var")):
            old, new, third = (np.asarray(stats[path]) for stats in (before, after, again))
            if np.array_equal(old, new):  # a norm that keeps its statistics
                continue
            place = np.abs(new - old).argmax()
            kept = (third - new)[place] / (new - old)[place]
            after[path] = (new - kept * old) / (1 - kept)
    return params, switched(unflatten(after), np.float32(1))
