"""Deformable attention: a weighted sum of samples of maps at points that the query itself chooses."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.nn.portability import is_portable
from kdjax.structs import Array

Shapes = Sequence[tuple[int, int]]  # height and width of the map of each level, in cells


def sample_points(reference: Array, offsets: Array, *, shapes: Shapes, points: Sequence[int]) -> Array:
    """Where queries sample the maps.

        (x, y) = reference centre + offset / P_l * reference size / 2,  P_l the number of points of the level

    or, around points, (x, y) = reference + offset / (width, height) of the level.

    Args:
      reference: f32[B, Q, 1 or L, 4], boxes cx cy w h as shares of the sides of the image, or f32[B, Q, 1 or L, 2],
        points x y; one for all levels, or one for each.
      offsets: f32[B, Q, heads, P, 2], x y, for the points of all levels in level order.
      shapes: height and width of the L levels, in cells.
      points: the number of points of each level; P is their sum.

    Returns:
      f32[B, Q, heads, P, 2], x y as shares of the sides of the image.

    Peers: transformers 5.24 RTDetr-, RTDetrV2- and DFineMultiscaleDeformableAttention.

    Reference: Zhu et al., Deformable DETR, ICLR 2021, equation 3 and section A.4.
    """
    level = np.repeat(np.arange(len(points)), points)
    here = reference[:, :, level] if reference.shape[2] > 1 else reference
    here = here[:, :, None]
    if reference.shape[-1] == 2:
        return here + offsets / np.array(shapes, np.float32)[level][:, ::-1]
    share = (0.5 / np.array(points, np.float32))[level][:, None]
    return here[..., :2] + offsets * share * here[..., 2:]


def deformable_attention(
    memory: Array,
    locations: Array,
    weights: Array,
    *,
    shapes: Shapes,
    points: Sequence[int],
    discrete: bool = False,
) -> Array:
    """Sums bilinear samples of maps, each with its weight.

        out_q = sum over levels l and their points p of weight_qp * map_l(x_qp, y_qp)

    A map's cell i has its centre at (i + 0.5) / width; outside, maps are 0. The levels are summed in turn, and the
    backward pass samples again (`jax.checkpoint`), so that no more than the samples of one corner of one level are
    held. The gradient of the maps is a sum of scattered terms, whose order GPUs do not fix.

    Args:
      memory: f32[B, N, heads, c], the maps of all levels, row by row, in level order.
      locations: f32[B, Q, heads, P, 2], x y as shares of the sides, of the points of all levels in level order.
      weights: f32[B, Q, heads, P].
      shapes: height and width of the levels, in cells; N is the sum of their products.
      points: the number of points of each level; P is their sum.
      discrete: take the one cell at trunc(x * width + 0.5), moved inside the map, instead of the four around the
        point; locations then get no gradient.

    Returns:
      [B, Q, heads * c], the dtype of the maps.

    Scope: each query on its own.

    Peers: transformers 5.24, `MultiScaleDeformableAttention` and `multi_scale_deformable_attention_v2`.

    Reference: Zhu et al., Deformable DETR, ICLR 2021, equation 3; `discrete`: Lv et al., RT-DETRv2, arXiv 2407.17140,
      section 3.

    Example:
      >>> maps = jnp.arange(4.0).reshape(1, 4, 1, 1)  # a map of 2 x 2 cells, 0 1 above 2 3
      >>> where = jnp.array([0.5, 0.5]).reshape(1, 1, 1, 1, 2)
      >>> float(deformable_attention(maps, where, jnp.ones((1, 1, 1, 1)), shapes=[(2, 2)], points=[1])[0, 0, 0])
      1.5
    """
    sample = _nearest if discrete else _bilinear
    if not is_portable():  # it would remember the primitives of a converter
        sample = jax.checkpoint(sample, static_argnums=(3,))
    total, cell, point = jnp.zeros((), memory.dtype), 0, 0
    for shape, count in zip(shapes, points, strict=True):
        cells, here = shape[0] * shape[1], slice(point, point + count)
        total += sample(
            memory[:, cell : cell + cells], locations[..., here, :], weights[..., here], (shape[0], shape[1])
        )
        cell, point = cell + cells, point + count
    return total.reshape(*total.shape[:2], -1)


def _bilinear(memory: Array, locations: Array, weights: Array, shape: tuple[int, int]) -> Array:
    """One level: [B, H W, heads, c], [B, Q, heads, p, 2], [B, Q, heads, p] -> [B, Q, heads, c]."""
    sides = np.array(shape[::-1], np.float32)
    place = locations * sides - 0.5
    low = jax.lax.stop_gradient(jnp.floor(place))
    share = place - low
    total = jnp.zeros((), memory.dtype)
    for column, row in ((0, 0), (1, 0), (0, 1), (1, 1)):
        at = low + np.array([column, row], np.float32)
        inside = jnp.all((at >= 0) & (at < sides), -1)
        near = (share if column else 1 - share)[..., 0] * (share if row else 1 - share)[..., 1]
        total += _gathered(memory, at, jnp.where(inside, near * weights, 0.0), shape)
    return total


def _nearest(memory: Array, locations: Array, weights: Array, shape: tuple[int, int]) -> Array:
    at = jnp.trunc(jax.lax.stop_gradient(locations) * np.array(shape[::-1], np.float32) + 0.5)
    return _gathered(memory, at, weights, shape)


def _gathered(memory: Array, at: Array, weights: Array, shape: tuple[int, int]) -> Array:
    """The sum over points of the cells at (column, row), moved inside the map, times their weights."""
    column, row = (jnp.clip(at[..., i], 0, side - 1).astype(jnp.int32) for i, side in enumerate(shape[::-1]))
    values = _cells(memory, row * shape[1] + column)
    return jnp.sum(values * weights[..., None].astype(values.dtype), -2)


def _cells(memory: Array, index: Array) -> Array:
    """[B, N, heads, c] at i32[B, Q, heads, p] -> [B, Q, heads, p, c]."""
    if is_portable():  # one index instead of three, which converters to other formats understand
        batch, count, heads, channels = memory.shape
        first = (np.arange(batch) * count)[:, None, None, None]
        flat = (first + index) * heads + np.arange(heads)[:, None]
        return jnp.take(memory.reshape(-1, channels), flat, axis=0)
    take = jax.vmap(lambda cells, i: cells.at[i].get(mode="promise_in_bounds"), (1, 1), 1)  # over the heads
    return jax.vmap(take)(memory, index)
