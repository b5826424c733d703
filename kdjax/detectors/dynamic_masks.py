"""Masks from small networks whose parameters are predictions: each object has one of its own.

Reference: Tian et al., Conditional Convolutions for Instance Segmentation, ECCV 2020. RTMDet-Ins uses them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.structs import Array

CHANNELS = 8  # of the two hidden maps of a network


def sizes(prototypes: int) -> tuple[int, ...]:
    """How many parameters each part of a small network has: the weights of its three layers, then their biases."""
    return (prototypes + 2) * CHANNELS, CHANNELS * CHANNELS, CHANNELS, CHANNELS, CHANNELS, 1


def mask_logits(kernels: Array, points: Array, prototypes: Array, *, stride: int) -> Array:
    """Masks of objects: three 1x1 convolutions with ReLU between them, with parameters that each object has of its own.

    They read the cell's place relative to the object's, (x_object - x_cell) / (8 stride) and the same in y, and the
    prototypes.

    Args:
      kernels: f32[B, n, P], the parameters: weights (outputs, inputs) of the three layers, then their biases.
      points: f32[B, n, 4], x, y, stride, stride of the objects' cells in pixels.
      prototypes: f32[B, h, w, C].
      stride: of the prototypes, in pixels.

    Returns:
      f32[B, n, h, w], logits.

    Scope: each object on its own.

    Peers: mmdetection 3.3.0 RTMDetInsHead.

    Reference: Tian et al., Conditional Convolutions for Instance Segmentation, ECCV 2020, section 3.2.
    """
    (batch, count), (height, width, channels) = kernels.shape[:2], prototypes.shape[1:]
    ends = np.cumsum(sizes(channels))[:-1]
    first, second, third, first_bias, second_bias, third_bias = jnp.split(kernels, ends, -1)
    first = first.reshape(batch, count, CHANNELS, channels + 2)
    second = second.reshape(batch, count, CHANNELS, CHANNELS)
    columns, rows = (stride * jnp.arange(n, dtype=jnp.float32) for n in (width, height))
    reach = 8 * points[..., 2, None]
    x = (points[..., 0, None] - columns) / reach  # [B, n, w]
    y = (points[..., 1, None] - rows) / reach
    # The layers are linear in each input: what depends on a row or a column alone is computed for it alone.
    of_x = first[..., 0, None] * x[:, :, None]  # [B, n, 8, w]
    of_y = first[..., 1, None] * y[:, :, None] + first_bias[..., None]
    maps = jnp.einsum("bnoc,bhwc->bnohw", first[..., 2:], prototypes)
    maps = jax.nn.relu(maps + of_x[..., None, :] + of_y[..., None])
    maps = jnp.einsum("bnoi,bnihw->bnohw", second, maps) + second_bias[..., None, None]
    return jnp.einsum("bni,bnihw->bnhw", third, jax.nn.relu(maps)) + third_bias[..., None]


def doubled(maps: Array) -> Array:
    """f32[B, n, h, w] -> f32[B, n, 2 h, 2 w], as `nn.resize_bilinear` does it."""
    for axis in (2, 3):
        padded = jnp.pad(maps, [(0, 0)] * axis + [(1, 1)] + [(0, 0)] * (3 - axis), mode="edge")
        before, after = (jax.lax.slice_in_dim(padded, i, i + maps.shape[axis], axis=axis) for i in (0, 2))
        pair = jnp.stack([0.25 * before + 0.75 * maps, 0.75 * maps + 0.25 * after], axis + 1)
        maps = pair.reshape(*(side * (1 + (i == axis)) for i, side in enumerate(maps.shape)))
    return maps
