"""RoIAlign: features of one size from boxes of any size, each on the pyramid level that matches its size."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kdjax import nn, shapes
from kdjax.structs import AnyArray, Array


def roi_levels(boxes: AnyArray, count: int, *, finest: float = 56.0) -> Array:
    """The pyramid level of each box: floor(log2(sqrt(w h) / finest)), within 0 .. count - 1.

    Args:
      boxes: f32[..., 4], `x1 y1 x2 y2` in pixels; one without area is on level 0.
      count: number of levels.
      finest: smallest side in pixels of boxes on level 0; the next level starts at twice as much. With 14 times the
        finest stride (56 for a stride of 4) a box is 14 to 28 cells wide on its level.

    Returns:
      i32[...].

    Scope: each box on its own.

    Peers: mmdetection's `SingleRoIExtractor` (`finest_scale`); Detectron2's `assign_boxes_to_levels` with
      finest = 14 times the finest stride.

    Reference: Lin et al., Feature Pyramid Networks, CVPR 2017, equation 1.

    Example:
      >>> import numpy as np
      >>> roi_levels(np.array([[0.0, 0, 100, 100], [0, 0, 120, 120], [0, 0, 999, 999]]), 3).tolist()
      [0, 1, 2]
    """
    shapes.check("roi_levels", boxes=(boxes, "... 4"))
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0.0)
    octave = jnp.floor(jnp.log2(jnp.sqrt(sides[..., 0] * sides[..., 1]) / finest + 1e-6))
    return jnp.clip(octave, 0, count - 1).astype(jnp.int32)


class _Sampling(NamedTuple):
    """What is static of a call of `roi_align`."""

    hw: tuple[tuple[int, int], ...]  # of the maps, in cells
    strides: tuple[float, ...]
    size: int
    ratio: int
    most: int
    aligned: bool


class _Side(NamedTuple):
    """The cells of a map that the samples of each region touch along one side."""

    first: Array  # i32[B, R]
    count: Array  # i32[B, R]; 0: none
    weights: Array  # f32[B, R, size, n], of the n cells of the longest map in each cell of the result


# A pass of the loop over regions takes so many of each image, and so many cells of each at a time.
_REGIONS, _CELLS = 16, 128


def _samples(
    low: AnyArray, high: AnyArray, cells: AnyArray, *, size: int, ratio: int, most: int
) -> tuple[Array, Array, Array]:
    """Map cells (i32[..., size, 2 S]), weights and whether they count, for S points in each of `size` cells of a side.

    A point has the two cells around it. A point more than one cell outside the map has the value 0.
    """
    width = (high - low) / size
    many = jnp.full_like(width, ratio) if ratio else jnp.clip(jnp.ceil(width), 0, most)
    point = jnp.arange(ratio or most)
    at = (point + 0.5) / jnp.maximum(many, 1)[..., None]
    at = low[..., None, None] + (jnp.arange(size)[:, None] + at[..., None, :]) * width[..., None, None]
    last = cells[..., None, None] - 1
    counts = (point < many[..., None])[..., None, :] & (at >= -1) & (at <= last + 1)
    at = jnp.clip(at, 0, last)
    before = jnp.floor(at).astype(jnp.int32)
    after = jnp.minimum(before + 1, last)
    share = jnp.where(counts, 1 / jnp.maximum(many, 1)[..., None, None], 0)
    rest = at - before
    weights = jnp.concatenate([share * (1 - rest), share * rest], -1)
    return jnp.concatenate([before, after], -1), weights, jnp.concatenate([counts, counts], -1)


def _sides(boxes: Array, level: Array, how: _Sampling) -> tuple[_Side, _Side]:
    """The rows and the columns of cells that regions are made of."""
    heights, widths = np.array(how.hw).T
    corners = boxes / jnp.asarray(np.asarray(how.strides, np.float32))[level][..., None] - (0.5 if how.aligned else 0.0)
    low, high = corners[..., :2], corners[..., 2:]
    if not how.aligned:
        high = jnp.maximum(high, low + 1)
    found = []
    for axis, lengths in ((1, heights), (0, widths)):
        cells, weights, counts = _samples(
            low[..., axis], high[..., axis], jnp.asarray(lengths)[level], size=how.size, ratio=how.ratio, most=how.most
        )
        place = jnp.arange(max(lengths))
        same = cells[..., None] == place
        touched = jnp.any(same & counts[..., None], (-3, -2))
        first, last = jnp.argmax(touched, -1), len(place) - 1 - jnp.argmax(touched[..., ::-1], -1)
        count = jnp.where(jnp.any(touched, -1), last - first + 1, 0)
        dense = jnp.sum(jnp.where(same, weights[..., None], 0), -2)
        found.append(_Side(first.astype(jnp.int32), count.astype(jnp.int32), dense))
    return found[0], found[1]


def _block(number: Array, rows: _Side, columns: _Side, level: Array, how: _Sampling) -> tuple[Array, Array, Array]:
    """Cells number * _CELLS and on of each region: row and column on their map, and index into the joined maps."""
    heights, widths = np.array(how.hw).T
    starts = np.cumsum([0, *(heights * widths)[:-1]])
    start, width = (jnp.asarray(values)[level][..., None] for values in (starts, widths))
    cell = number * _CELLS + jnp.arange(_CELLS)
    across = jnp.maximum(columns.count, 1)[..., None]
    inside = cell < (rows.count * columns.count)[..., None]
    row = jnp.where(inside, rows.first[..., None] + cell // across, -1)
    column = jnp.where(inside, columns.first[..., None] + cell % across, -1)
    return row, column, jnp.where(inside, start + row * width + column, 0)


def _take(weights: Array, index: Array) -> Array:
    """f32[B, R, size, n], i32[B, R, c] -> f32[B, R, size, c]; 0 where the index is -1."""
    taken = jnp.take_along_axis(weights, jnp.maximum(index, 0)[..., None, :], -1)
    return jnp.where(index[..., None, :] >= 0, taken, 0)


def _count_blocks(rows: _Side, columns: _Side) -> Array:
    return (jnp.max(rows.count * columns.count) + _CELLS - 1) // _CELLS


def _passes(x: Array) -> Array:
    """[B, R, ...] -> [R / _REGIONS, B, _REGIONS, ...], zeros added at the end."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % _REGIONS)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, _REGIONS, *x.shape[2:]), 1, 0)


def _joined(x: Array, count: int) -> Array:
    """The inverse of `_passes`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :count]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _align(flat: Array, boxes: Array, level: Array, how: _Sampling) -> Array:
    """`roi_align` of joined maps f32[B, N, C] -> f32[B, R, size * size, C]."""

    def some(_: None, regions: tuple[Array, Array]) -> tuple[None, Array]:
        rows, columns = _sides(*regions, how)

        def add(number: Array, total: Array) -> Array:
            row, column, index = _block(number, rows, columns, regions[1], how)
            weights = _take(rows.weights, row)[:, :, :, None] * _take(columns.weights, column)[:, :, None]
            cells = jax.vmap(lambda cells, index: cells[index])(flat, index).astype(jnp.float32)
            return total + jnp.einsum("brkc,brcd->brkd", weights.reshape(*total.shape[:3], -1), cells)

        shape = (*regions[1].shape, how.size**2, flat.shape[-1])
        return None, lax.fori_loop(0, _count_blocks(rows, columns), add, jnp.zeros(shape, jnp.float32))

    _, found = lax.scan(some, None, (_passes(boxes), _passes(level)))
    return _joined(found, boxes.shape[1])


def _align_forward(flat: Any, boxes: Any, level: Any, how: _Sampling) -> tuple[Array, Any]:  # noqa: ANN401
    saved = (flat.value, boxes.value, level.value, () if boxes.perturbed else None)
    return _align(*saved[:3], how), saved


def _align_backward(how: _Sampling, saved: Any, gradient: Array) -> tuple[Array, Array, None]:  # noqa: ANN401
    flat, boxes, level, of_boxes = saved

    def some(of_maps: Array, regions: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        boxes, level, gradient = regions

        def weights(boxes: Array) -> tuple[Array, Array]:
            rows, columns = _sides(boxes, level, how)
            return rows.weights, columns.weights

        rows, columns = _sides(boxes, level, how)

        def add(number: Array, state: tuple[Array, tuple[Array, Array]]) -> tuple[Array, tuple[Array, Array]]:
            of_maps, of_weights = state
            row, column, index = _block(number, rows, columns, level, how)

            def product(of_rows: Array, of_columns: Array, cells: Array) -> Array:
                both = _take(of_rows, row)[:, :, :, None] * _take(of_columns, column)[:, :, None]
                return jnp.einsum("brkc,brcd->brkd", both.reshape(*gradient.shape[:3], -1), cells)

            if of_boxes is None:
                cells = jnp.zeros((*index.shape, flat.shape[-1]), jnp.float32)  # the product is linear in them
                one = jax.linear_transpose(functools.partial(product, rows.weights, columns.weights), cells)
                (of_cells,) = one(gradient)
            else:
                cells = jax.vmap(lambda cells, index: cells[index])(flat, index).astype(jnp.float32)
                *more, of_cells = jax.vjp(product, rows.weights, columns.weights, cells)[1](gradient)
                of_weights = (of_weights[0] + more[0], of_weights[1] + more[1])
            return jax.vmap(lambda maps, index, cells: maps.at[index].add(cells))(of_maps, index, of_cells), of_weights

        none = (jnp.zeros_like(rows.weights), jnp.zeros_like(columns.weights)) if of_boxes is not None else ()
        of_maps, of_weights = lax.fori_loop(0, _count_blocks(rows, columns), add, (of_maps, none))
        return of_maps, jnp.zeros_like(boxes) if of_boxes is None else jax.vjp(weights, boxes)[1](of_weights)[0]

    start = jnp.zeros(flat.shape, jnp.float32)
    of_maps, found = lax.scan(some, start, (_passes(boxes), _passes(level), _passes(gradient)))
    return of_maps.astype(flat.dtype), _joined(found, boxes.shape[1]), None


_align.defvjp(_align_forward, _align_backward, symbolic_zeros=True)


def roi_align(
    maps: Sequence[AnyArray],
    boxes: AnyArray,
    level: AnyArray,
    *,
    strides: Sequence[float],
    size: int = 7,
    sampling_ratio: int = 2,
    max_samples: int = 8,
    aligned: bool = True,
) -> Array:
    """Divides every box into size x size cells and averages bilinear samples of a map in each.

    Args:
      maps: L of f32[B, H, W, C], fine to coarse, with the same C.
      boxes: f32[B, R, 4], `x1 y1 x2 y2` in pixels of the network input.
      level: i32[B, R], the map of each box, 0 .. L - 1.
      strides: of the maps, in pixels.
      size: cells along each side of the result.
      sampling_ratio: number of evenly spaced samples along each side of a cell. 0: its length in map cells, rounded up,
        but at most `max_samples`, because shapes are static.
      max_samples: largest number of samples for `sampling_ratio=0`.
      aligned: whether pixel centres are at half coordinates, as on the maps. Without it (torchvision's default) boxes
        are shifted by half a cell to the lower right and are at least one map cell wide.

    Returns:
      f32[B, R, size, size, C]. Samples more than one cell outside a map are zero. The gradient reaches maps and boxes
      (in reverse mode only).

    A result is a weighted sum of the map cells between the outermost samples. The sum is taken for 16 boxes of each
    image at a time, and for 128 cells of each, so that next to maps and result only B * 16 * 128 * C numbers are held.

    Scope: each box on its own.

    Peers: torchvision's `roi_align` and mmcv's `RoIAlign`; with sampling_ratio=0 as long as `max_samples` suffices.

    Reference: He et al., Mask R-CNN, ICCV 2017, section 3.

    Example:
      >>> import numpy as np
      >>> ramp = np.broadcast_to(np.arange(8.0)[:, None], (1, 8, 8, 1))  # the column, at the centres of the cells
      >>> box, level = np.array([[[8.0, 8, 40, 40]]]), np.zeros((1, 1), int)
      >>> roi_align([ramp], box, level, strides=[8], size=2)[0, 0, 0, :, 0].tolist()
      [1.5, 3.5]
    """
    shapes.check("roi_align", boxes=(boxes, "B R 4"), level=(level, "B R"))
    if other := nn.replacement("roi_align"):
        return other(maps, boxes, level, strides=strides, size=size, sampling_ratio=sampling_ratio, aligned=aligned)
    hw = tuple((m.shape[1], m.shape[2]) for m in maps)
    how = _Sampling(hw, tuple(map(float, strides)), size, sampling_ratio, max_samples, aligned)
    flat = jnp.concatenate([jnp.asarray(m).reshape(m.shape[0], -1, m.shape[3]) for m in maps], 1)
    boxes, level = jnp.asarray(boxes, jnp.float32), jnp.asarray(level, jnp.int32)
    # Boxes of similar size follow each other, so that those of one pass are done at about the same time.
    cells = jnp.prod(jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0), -1) / jnp.asarray(how.strides)[level] ** 2
    order = jnp.argsort(lax.stop_gradient(cells), 1)
    sorted_boxes = jnp.take_along_axis(boxes, order[..., None], 1)
    # pyright loses the type of functions with a `custom_vjp`.
    found = cast(Array, _align(flat, sorted_boxes, jnp.take_along_axis(level, order, 1), how))
    found = jnp.take_along_axis(found, jnp.argsort(order, 1)[..., None, None], 1)
    return found.reshape(*level.shape, size, size, -1)


def crop_masks(masks: AnyArray, boxes: AnyArray, index: AnyArray, *, stride: float, size: int) -> Array:
    """The part of a mask in each box, in size x size cells: RoIAlign with as many samples as a cell is wide.

    Args:
      masks: f32[B, M, h, w] or bool, share of each pixel or block of pixels that an object covers, 0 .. 1.
      boxes: f32[B, R, 4], `x1 y1 x2 y2` in pixels of the network input; clipped to the masks.
      index: i32[B, R], the mask of each box, 0 .. M - 1.
      stride: of the masks, in pixels.
      size: cells along each side of the result.

    Returns:
      f32[B, R, size, size], 0 .. 1. Masks are read for 16 boxes of each image at a time.

    Scope: each box on its own.

    Peers: mmdetection 3.3.0 BitmapMasks.crop_and_resize, before its threshold of 0.5 (masks of stride 1).

    Reference: He et al., Mask R-CNN, ICCV 2017, section 3.

    Example:
      >>> import numpy as np
      >>> masks = np.zeros((1, 1, 8, 8), bool)
      >>> masks[0, 0, :, 4:] = True
      >>> crop_masks(masks, np.array([[[3.0, 0, 7, 4]]]), np.array([[0]]), stride=1, size=2)[0, 0].tolist()
      [[0.5, 1.0], [0.5, 1.0]]
    """
    shapes.check("crop_masks", masks=(masks, "B M H W"), boxes=(boxes, "B R 4"), index=(index, "B R"))
    hw = (masks.shape[2], masks.shape[3])
    how = _Sampling((hw,), (float(stride),), size, 0, -(-max(hw) // size), True)
    wide = jnp.array([hw[1], hw[0]] * 2, jnp.float32) * stride
    masks, index = jnp.asarray(masks), jnp.asarray(index, jnp.int32)

    def some(_: None, regions: tuple[Array, Array]) -> tuple[None, Array]:
        boxes, index = regions
        rows, columns = _sides(boxes, jnp.zeros(index.shape, jnp.int32), how)
        own = jax.vmap(lambda masks, index: masks[index])(masks, index).astype(jnp.float32)
        parts = (rows.weights, own, columns.weights)
        # Exact, because the result is compared with a threshold.
        return None, jnp.einsum("brih,brhw,brjw->brij", *parts, precision=lax.Precision.HIGHEST)

    _, found = lax.scan(some, None, (_passes(jnp.clip(boxes, 0, wide)), _passes(index)))
    return _joined(found, boxes.shape[1])
