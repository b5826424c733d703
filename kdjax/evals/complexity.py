"""Size of a detector: parameters and floating-point operations, counted as mmengine does."""

import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from kdjax import nn
from kdjax.structs import Array, DetectorOutput, PaddedDetections, PyTree


class Network(Protocol):
    """The network of a detector: pure functions of parameters, statistics and images."""

    @property
    def shapes(self) -> tuple[PyTree, PyTree]:
        """Parameters and statistics as trees of `jax.ShapeDtypeStruct`."""
        ...

    @property
    def apply(self) -> Callable[..., tuple[DetectorOutput, PyTree]]:
        """(params, stats, images, *, train) -> output and new statistics."""
        ...

    @property
    def decode(self) -> Callable[..., PaddedDetections]:
        """(output, image_size) -> detections."""
        ...


def parameters(params: PyTree) -> int:
    """Counts the trained parameters; shared ones count once, and running statistics do not count.

    Args:
      params: tree of arrays or of `jax.ShapeDtypeStruct`s.

    Returns:
      The number of parameters.

    Peers: mmengine's `get_model_complexity_info`.

    Example:
      >>> parameters({"kernel": jnp.zeros((3, 3, 2, 4)), "bias": jnp.zeros(4)})
      76
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def flops(detector: Network, hw: tuple[int, int]) -> int:
    """Counts the operations of one image through a detector in evaluation mode; nothing is computed.

    A multiply-add of a convolution counts as one (`kdjax.nn.count` has the whole rule). Decoding is not counted, but
    the second stage on all proposals is, and the mask head on all detections.

    Args:
      detector: a `kdjax.detectors.api.Detector`.
      hw: height and width of the network input in pixels.

    Returns:
      The number of operations.

    Peers: mmengine's `get_model_complexity_info`, equal for RTMDet tiny, s, m, l and x.
    """

    def forward(params: PyTree, stats: PyTree, x: Array) -> PyTree:
        output, _ = detector.apply(params, stats, x, train=False)
        return output if output.at is None else detector.decode(output, jnp.array([hw]))

    return nn.count(forward, *detector.shapes, jax.ShapeDtypeStruct((1, *hw, 3), jnp.float32))["flops"]
