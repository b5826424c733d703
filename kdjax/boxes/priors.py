"""Priors: the places of an image at which a dense detector predicts. NumPy, because they depend on shapes alone."""

import math
from collections.abc import Sequence

import numpy as np


def grid_priors(hw: tuple[int, int], strides: Sequence[int], *, offset: float = 0.0) -> np.ndarray:
    """Point priors of all levels: cell (i, j) of the map with stride s is the point `((j + offset) s, (i + offset) s)`.

    Args:
      hw: height and width of the network input in pixels; a map has `ceil(h / s)` x `ceil(w / s)` cells.
      strides: strides of the levels, fine to coarse, in pixels.
      offset: place of the point inside its cell, 0 (top left corner) to 1, in cells.

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
