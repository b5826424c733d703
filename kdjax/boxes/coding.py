"""Box coders: between what a network regresses and boxes in pixels."""

import jax.numpy as jnp

from kdjax.structs import Array


def distance_to_boxes(points: Array, distances: Array) -> Array:
    """Boxes from their four distances to a point: `(x - l, y - t, x + r, y + b)`.

    Args:
      points: f32[..., 2], `x y` in pixels; leading axes broadcast against those of `distances`.
      distances: f32[..., 4], `l t r b` in pixels. Negative ones are allowed: then boxes may be inverted.

    Returns:
      f32[..., 4], `x1 y1 x2 y2` in pixels, not clipped (`convert.clip`).

    Scope: each box on its own.

    Peers: mmdetection's `DistancePointBBoxCoder.decode`.

    Reference: Tian et al., FCOS, ICCV 2019, equation 1.

    Example:
      >>> import numpy as np
      >>> distance_to_boxes(np.array([5.0, 5.0]), np.array([1.0, 2.0, 3.0, 4.0])).tolist()
      [4.0, 3.0, 8.0, 9.0]
    """
    return jnp.concatenate([points - distances[..., :2], points + distances[..., 2:]], axis=-1)


def boxes_to_distance(points: Array, boxes: Array, *, max_distance: float | None = None, eps: float = 0.1) -> Array:
    """Distances of a point to a box's sides, the inverse of `distance_to_boxes`: `(x - x1, y - y1, x2 - x, y2 - y)`.

    Args:
      points: f32[..., 2], `x y` in pixels; leading axes broadcast against those of `boxes`.
      boxes: f32[..., 4], `x1 y1 x2 y2` in pixels.
      max_distance: if given, distances are cut to `0 .. max_distance - eps`, in the unit of the inputs (detectors with
        a binned regression divide both by the stride and give the number of bins).
      eps: what keeps a cut distance below the last bin.

    Returns:
      f32[..., 4], `l t r b`; negative where the point is outside the box and `max_distance` is None.

    Scope: each box on its own.

    Peers: mmdetection's `DistancePointBBoxCoder.encode`.

    Reference: Tian et al., FCOS, ICCV 2019, equation 1; the cut is that of Li et al., Generalized Focal Loss,
      NeurIPS 2020.

    Example:
      >>> import numpy as np
      >>> boxes_to_distance(np.array([5.0, 5.0]), np.array([4.0, 3.0, 8.0, 9.0])).tolist()
      [1.0, 2.0, 3.0, 4.0]
    """
    distances = jnp.concatenate([points - boxes[..., :2], boxes[..., 2:] - points], axis=-1)
    return distances if max_distance is None else jnp.clip(distances, 0, max_distance - eps)
