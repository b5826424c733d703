"""Priors, the points or anchors of an image for which a dense detector predicts. NumPy: they depend on shapes only."""

import math
from collections.abc import Sequence

import numpy as np


def grid_priors(hw: tuple[int, int], strides: Sequence[int], *, offset: float = 0.0) -> np.ndarray:
    """Point priors of all levels: cell (i, j) of the map with stride s is the point `((j + offset) s, (i + offset) s)`.

    Args:
      hw: height and width of the network input in pixels; a map has `ceil(h / s)` x `ceil(w / s)` cells.
      strides: strides of the levels, fine to coarse, in pixels.
      offset: position of the point in its cell, 0 (top left corner) to 1, in cells.

    Returns:
      f32[N, 4], `x, y, stride, stride` in pixels; levels in order, row-major inside a level.

    Peers: mmdetection's `MlvlPointGenerator` with strides; RTMDet's offset is 0.

    Example:
      >>> grid_priors((16, 24), [8, 16]).tolist()[-4:]
      [[8.0, 8.0, 8.0, 8.0], [16.0, 8.0, 8.0, 8.0], [0.0, 0.0, 16.0, 16.0], [16.0, 0.0, 16.0, 16.0]]
    """
    levels = []
    for stride in strides:
        rows, columns = (math.ceil(side / stride) for side in hw)
        y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
        points = [(x + offset) * stride, (y + offset) * stride, np.full_like(x, stride), np.full_like(x, stride)]
        levels.append(np.stack(points, axis=-1).reshape(-1, 4))
    return np.concatenate(levels).astype(np.float32)


def octave_scales(base: float, per_octave: int) -> tuple[float, ...]:
    """Scales of anchors that divide an octave evenly: `base 2^(i / per_octave)`.

    Args:
      base: the smallest, in strides.
      per_octave: number of scales per octave.

    Returns:
      The scales, in strides.

    Peers: `octave_base_scale` and `scales_per_octave` of mmdetection's `AnchorGenerator`.

    Reference: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, section 4.

    Example:
      >>> octave_scales(4, 2)
      (4.0, 5.656854249492381)
    """
    return tuple(float(base * 2 ** (i / per_octave)) for i in range(per_octave))


def grid_anchors(
    hw: tuple[int, int], strides: Sequence[int], *, ratios: Sequence[float], scales: Sequence[float]
) -> np.ndarray:
    """Anchors of all levels: around each point of `grid_priors` boxes of area `(scale stride)^2` and h / w = ratio.

    Args:
      hw: height and width of the network input in pixels.
      strides: strides of the levels, fine to coarse, in pixels.
      ratios: heights divided by widths.
      scales: sides of the square anchors, in strides.

    Returns:
      f32[N, 4], `x1 y1 x2 y2` in pixels; levels in order, row-major inside a level, then by ratio, then by scale.

    Peers: mmdetection's `AnchorGenerator` with centre offset 0.

    Example:
      >>> grid_anchors((8, 16), [8], ratios=[1.0], scales=[2.0]).tolist()
      [[-8.0, -8.0, 8.0, 8.0], [0.0, -8.0, 16.0, 8.0]]
    """
    points = grid_priors(hw, strides).astype(np.float64)
    root = np.sqrt(np.asarray(ratios, np.float64))
    sizes = np.stack([np.outer(1 / root, scales).ravel(), np.outer(root, scales).ravel()], axis=-1)
    half = points[:, None, 2:] * sizes / 2
    centres = points[:, None, :2]
    return np.concatenate([centres - half, centres + half], axis=-1).reshape(-1, 4).astype(np.float32)
