"""RoIAlign: features of one size from boxes of any size, each on the pyramid level that matches its size."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import shapes
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
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    octave = jnp.floor(jnp.log2(jnp.sqrt(sides[..., 0] * sides[..., 1]) / finest + 1e-6))
    return jnp.clip(octave, 0, count - 1).astype(jnp.int32)


def _samples(
    low: AnyArray, high: AnyArray, cells: AnyArray, *, size: int, ratio: int, most: int
) -> tuple[Array, Array]:
    """Map cells (i32[..., size, 2 S]) and weights along one side, for S points in each of `size` cells.

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
    return jnp.concatenate([before, after], -1), jnp.concatenate([share * (1 - rest), share * rest], -1)


def roi_align(
    maps: Sequence[AnyArray],
    boxes: AnyArray,
    level: AnyArray,
    *,
    strides: Sequence[int],
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
      f32[B, R, size, size, C]. Samples more than one cell outside a map are zero. The gradient reaches maps and boxes.

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
    heights, widths = np.array([m.shape[1] for m in maps]), np.array([m.shape[2] for m in maps])
    starts = np.cumsum([0, *(heights * widths)[:-1]])
    flat = jnp.concatenate([m.reshape(m.shape[0], -1, m.shape[3]) for m in maps], 1)
    height, width, start, stride = (
        jnp.asarray(values)[level] for values in (heights, widths, starts, np.asarray(strides, np.float32))
    )
    corners = boxes / stride[..., None] - (0.5 if aligned else 0.0)
    low, high = corners[..., :2], corners[..., 2:]
    if not aligned:
        high = jnp.maximum(high, low + 1)
    samples = functools.partial(_samples, size=size, ratio=sampling_ratio, most=max_samples)
    rows, row_weights = samples(low[..., 1], high[..., 1], height)
    columns, column_weights = samples(low[..., 0], high[..., 0], width)

    # [B, R, size, 2 S, size, 2 S]: each row with each column.
    start, width = (x[..., None, None, None, None] for x in (start, width))
    index = start + rows[..., None, None] * width + columns[..., None, None, :, :]
    weights = row_weights[..., None, None] * column_weights[..., None, None, :, :]
    cells = jax.vmap(lambda cells, index: cells[index])(flat, index)
    return jnp.sum(cells * weights[..., None], (3, 5))
