"""Box coders convert between the numbers that a network regresses and boxes in pixels."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kdjax.structs import AnyArray, Array

REGION_STDS = (0.1, 0.1, 0.2, 0.2)  # of the deltas of regions (`kdjax.structs.Regions`)
LARGEST_LOG_SCALE = math.log(1000 / 16)  # keeps the exponential finite


def distance_to_boxes(points: AnyArray, distances: AnyArray) -> Array:
    """Boxes from their four distances to a point: `(x - l, y - t, x + r, y + b)`.

    Args:
      points: f32[..., 2], `x y` in pixels; leading axes broadcast against those of `distances`.
      distances: f32[..., 4], `l t r b` in pixels. Negative values are allowed; boxes may then be inverted.

    Returns:
      f32[..., 4], `x1 y1 x2 y2` in pixels, not clipped (see `clip`).

    Scope: each box on its own.

    Peers: mmdetection's `DistancePointBBoxCoder.decode`.

    Reference: Tian et al., FCOS, ICCV 2019, equation 1.

    Example:
      >>> import numpy as np
      >>> distance_to_boxes(np.array([5.0, 5.0]), np.array([1.0, 2.0, 3.0, 4.0])).tolist()
      [4.0, 3.0, 8.0, 9.0]
    """
    return jnp.concatenate([points - distances[..., :2], points + distances[..., 2:]], axis=-1)


def boxes_to_distance(
    points: AnyArray, boxes: AnyArray, *, max_distance: float | None = None, eps: float = 0.1
) -> Array:
    """Distances of a point to a box's sides, the inverse of `distance_to_boxes`: `(x - x1, y - y1, x2 - x, y2 - y)`.

    Args:
      points: f32[..., 2], `x y` in pixels; leading axes broadcast against those of `boxes`.
      boxes: f32[..., 4], `x1 y1 x2 y2` in pixels.
      max_distance: if set, distances are clipped to `0 .. max_distance - eps`, in the unit of the inputs (detectors
        with a binned regression divide points and boxes by the stride and pass the number of bins).
      eps: keeps a clipped distance below the last bin.

    Returns:
      f32[..., 4], `l t r b`; negative where the point is outside the box and `max_distance` is None.

    Scope: each box on its own.

    Peers: mmdetection's `DistancePointBBoxCoder.encode`.

    Reference: Tian et al., FCOS, ICCV 2019, equation 1; the clipping is that of Li et al., Generalized Focal
      Loss, NeurIPS 2020.

    Example:
      >>> import numpy as np
      >>> boxes_to_distance(np.array([5.0, 5.0]), np.array([4.0, 3.0, 8.0, 9.0])).tolist()
      [1.0, 2.0, 3.0, 4.0]
    """
    distances = jnp.concatenate([points - boxes[..., :2], boxes[..., 2:] - points], axis=-1)
    return distances if max_distance is None else jnp.clip(distances, 0, max_distance - eps)


def cells_to_boxes(priors: AnyArray, regressed: AnyArray) -> Array:
    """Boxes from centre and size in cells: centre `point + stride (dx, dy)`, size `stride exp(w, h)`.

    Args:
      priors: f32[N, 4], `x y stride_w stride_h` in pixels.
      regressed: f32[..., N, 4], `dx dy` in strides and the logarithms of width and height in strides.

    Returns:
      f32[..., N, 4], `x1 y1 x2 y2` in pixels, not clipped (see `clip`).

    Scope: each box on its own.

    Peers: mmdetection's `YOLOXHead._bbox_decode`, whose points are the top left corners of the cells.

    Reference: Ge et al., YOLOX, arXiv:2107.08430, section 2.1.

    Example:
      >>> import numpy as np
      >>> cells_to_boxes(np.array([[8.0, 0, 8, 8]]), np.array([[0.5, 1.0, 0.0, 0.0]])).tolist()
      [[8.0, 4.0, 16.0, 12.0]]
    """
    centre = priors[:, :2] + regressed[..., :2] * priors[:, 2:]
    half = jnp.exp(regressed[..., 2:]) * priors[:, 2:] / 2
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def boxes_to_cells(priors: AnyArray, boxes: AnyArray, *, eps: float = 1e-8) -> Array:
    """Centre and size of boxes in cells, the inverse of `cells_to_boxes`.

    Args:
      priors: f32[N, 4], `x y stride_w stride_h` in pixels.
      boxes: f32[..., N, 4], `x1 y1 x2 y2` in pixels.
      eps: added to width and height in strides, so that empty boxes have finite logarithms.

    Returns:
      f32[..., N, 4], see `cells_to_boxes`.

    Scope: each box on its own.

    Peers: mmdetection's `YOLOXHead._get_l1_target`.

    Reference: Ge et al., YOLOX, arXiv:2107.08430, section 2.1.

    Example:
      >>> import numpy as np
      >>> boxes_to_cells(np.array([[8.0, 0, 8, 8]]), np.array([[8.0, 4, 16, 12]])).tolist()
      [[0.5, 1.0, 0.0, 0.0]]
    """
    centre, size = _centre_and_size(boxes)
    return jnp.concatenate([(centre - priors[:, :2]) / priors[:, 2:], jnp.log(size / priors[:, 2:] + eps)], axis=-1)


def expected_distance(logits: AnyArray) -> Array:
    """Expected values of the distributions of the four distances: `sum_i i softmax(logits)_i`.

    Args:
      logits: f32[..., 4 (n + 1)], the bins 0 .. n of the left side, then of the top, right and bottom one.

    Returns:
      f32[..., 4], 0 .. n, in the unit of the bins (strides).

    Scope: each box on its own.

    Peers: mmdetection's `Integral`.

    Reference: Li et al., Generalized Focal Loss, NeurIPS 2020, equation 5.

    Example:
      >>> import numpy as np
      >>> expected_distance(np.array([0.0, 9, 0, 9, 9, 0, 9, 9])).round(2).tolist()
      [1.0, 1.0, 0.0, 0.5]
    """
    probs = jax.nn.softmax(logits.reshape(*logits.shape[:-1], 4, -1), axis=-1)
    return jnp.sum(probs * jnp.arange(probs.shape[-1], dtype=probs.dtype), axis=-1)


def centreness(distances: AnyArray) -> Array:
    """Centreness of a point in its box: `sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))`.

    Args:
      distances: f32[..., 4], `l t r b` of the point to the sides, any unit.

    Returns:
      f32[...], 1 at the centre, 0 on the border and outside.

    Scope: each box on its own.

    Peers: mmdetection's centerness targets of FCOS and ATSS.

    Reference: Tian et al., FCOS, ICCV 2019, equation 3.

    Example:
      >>> import numpy as np
      >>> centreness(np.array([[2.0, 2, 2, 2], [1, 3, 4, 3], [-1, 1, 1, 1]])).tolist()
      [1.0, 0.5, 0.0]
    """
    low = jnp.minimum(distances[..., :2], distances[..., 2:])
    high = jnp.maximum(distances[..., :2], distances[..., 2:])
    inside = jnp.all(low > 0, axis=-1)
    ratio = jnp.prod(low / jnp.where(high > 0, high, 1), axis=-1)
    return jnp.where(inside, jnp.sqrt(jnp.where(inside, ratio, 1)), 0)


def _centre_and_size(boxes: AnyArray) -> tuple[AnyArray, AnyArray]:
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def _float32(values: Sequence[float]) -> Array:
    return jnp.asarray(values, jnp.float32)


def boxes_to_deltas(
    anchors: AnyArray, boxes: AnyArray, *, means: Sequence[float] = (0, 0, 0, 0), stds: Sequence[float] = (1, 1, 1, 1)
) -> Array:
    """Boxes relative to their anchors: shift of the centre in sides of the anchor, and logarithm of the scale.

        ((x - x_a) / w_a, (y - y_a) / h_a, log(w / w_a), log(h / h_a)), minus `means`, divided by `stds`

    Args:
      anchors: f32[..., 4], `x1 y1 x2 y2` in pixels, with area; leading axes broadcast against those of `boxes`.
      boxes: f32[..., 4], the same.
      means: means of the four numbers.
      stds: standard deviations of the four numbers.

    Returns:
      f32[..., 4].

    Scope: each box on its own.

    Peers: mmdetection's `DeltaXYWHBBoxCoder.encode`.

    Reference: Girshick et al., Rich feature hierarchies, CVPR 2014, appendix C.

    Example:
      >>> import numpy as np
      >>> boxes_to_deltas(np.array([0.0, 0, 2, 2]), np.array([1.0, 0, 3, 2])).tolist()
      [0.5, 0.0, 0.0, 0.0]
    """
    (centre_a, size_a), (centre, size) = _centre_and_size(anchors), _centre_and_size(boxes)
    deltas = jnp.concatenate([(centre - centre_a) / size_a, jnp.log(size / size_a)], axis=-1)
    return (deltas - _float32(means)) / _float32(stds)


def deltas_to_boxes(
    anchors: AnyArray,
    deltas: AnyArray,
    *,
    means: Sequence[float] = (0, 0, 0, 0),
    stds: Sequence[float] = (1, 1, 1, 1),
    max_shift: float | None = None,
) -> Array:
    """Boxes from deltas, the inverse of `boxes_to_deltas`; log scales are clipped to -log(1000 / 16) .. log(1000 / 16).

    Args:
      anchors: f32[..., 4], `x1 y1 x2 y2` in pixels; leading axes broadcast against those of `deltas`.
      deltas: f32[..., 4].
      means: means of the four numbers.
      stds: standard deviations of the four numbers.
      max_shift: if set, centres move by at most this number of pixels along each axis, and only positive log scales are
        clipped (YOLOF).

    Returns:
      f32[..., 4], `x1 y1 x2 y2` in pixels, not clipped (see `clip`).

    Scope: each box on its own.

    Peers: mmdetection's `DeltaXYWHBBoxCoder.decode`.

    Reference: Girshick et al., Rich feature hierarchies, CVPR 2014, appendix C.

    Example:
      >>> import numpy as np
      >>> deltas_to_boxes(np.array([0.0, 0, 2, 2]), np.array([0.5, 0, 0, 0])).tolist()
      [1.0, 0.0, 3.0, 2.0]
    """
    centre_a, size_a = _centre_and_size(anchors)
    deltas = deltas * _float32(stds) + _float32(means)
    shift, log_scale = deltas[..., :2] * size_a, deltas[..., 2:]
    if max_shift is None:
        log_scale = jnp.clip(log_scale, -LARGEST_LOG_SCALE, LARGEST_LOG_SCALE)
    else:
        shift, log_scale = jnp.clip(shift, -max_shift, max_shift), jnp.minimum(log_scale, LARGEST_LOG_SCALE)
    centre, half = centre_a + shift, size_a * jnp.exp(log_scale) / 2
    return jnp.concatenate([centre - half, centre + half], axis=-1)
