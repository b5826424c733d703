"""Boxes by the distances of their edges from a reference box, and distributions of these distances (D-FINE).

All boxes here are `cx cy w h` in any unit that both of them share. A distance is counted outwards from the edge of the
reference, in units of its side divided by `scale`: (0, 0, 0, 0) is the reference itself.
"""

import jax
import jax.numpy as jnp

from kdjax.boxes import convert
from kdjax.structs import AnyArray, Array


def edge_bins(number: int, *, up: AnyArray | float = 0.5, scale: AnyArray | float = 4.0) -> Array:
    """The distances that the bins stand for, W(0) .. W(n): dense around 0, sparse far away.

    With s = (up scale + 1)^(2 / (n - 2)) and the middle m = n / 2:

        W(m) = 0,  W(m + i) = -W(m - i) = s^i - 1 for 0 < i < m,  W(n) = -W(0) = 2 up scale

    Args:
      number: n, even, >= 4; there are n + 1 bins.
      up: position of the last bin but one, as a share of `scale`.
      scale: of the distances.

    Returns:
      f32[n + 1], increasing.

    Peers: D-FINE's and transformers' `weighting_function`.

    Reference: Peng et al., D-FINE, ICLR 2025, section 4.1.

    Example:
      >>> [round(x, 4) for x in edge_bins(8, scale=6.0).tolist()]
      [-6.0, -3.0, -1.5198, -0.5874, 0.0, 0.5874, 1.5198, 3.0, 6.0]
    """
    bound = jnp.abs(up * jnp.asarray(scale, jnp.float32))
    inner = (bound + 1) ** (2 / (number - 2) * jnp.arange(1, number // 2, dtype=jnp.float32)) - 1
    right = jnp.append(inner, 2 * bound)
    return jnp.concatenate([-right[::-1], jnp.zeros(1), right])


def edge_distance(reference: AnyArray, boxes: AnyArray, *, scale: AnyArray | float = 4.0) -> Array:
    """Distances of the edges of boxes from those of a reference, the inverse of `edges_to_boxes`.

    Args:
      reference: f32[..., 4], `cx cy w h`.
      boxes: f32[..., 4], the same.
      scale: > 0.

    Returns:
      f32[..., 4], left, top, right, bottom; positive outside the reference.

    Scope: each box on its own.

    Peers: the first half of D-FINE's and transformers' `bbox2distance`.

    Reference: Peng et al., D-FINE, ICLR 2025, section 4.1.

    Example:
      >>> import numpy as np
      >>> edge_distance(np.array([4.0, 4, 4, 4]), np.array([5.0, 4, 4, 2])).tolist()
      [-1.0, -1.0, 1.0, -1.0]
    """
    corners = convert.from_cxcywh(boxes)
    outwards = jnp.concatenate([reference[..., :2] - corners[..., :2], corners[..., 2:] - reference[..., :2]], -1)
    return outwards / (_twice(reference[..., 2:]) / scale + 1e-16) - scale / 2


def edges_to_boxes(reference: AnyArray, distance: AnyArray, *, scale: AnyArray | float = 4.0) -> Array:
    """Boxes from the distances of their edges from a reference.

    Args:
      reference: f32[..., 4], `cx cy w h`.
      distance: f32[..., 4], left, top, right, bottom.
      scale: > 0.

    Returns:
      f32[..., 4], `cx cy w h`, not clipped; sides are negative where the edges have passed each other.

    Scope: each box on its own.

    Peers: D-FINE's and transformers' `distance2bbox`.

    Reference: Peng et al., D-FINE, ICLR 2025, section 4.1.

    Example:
      >>> import numpy as np
      >>> edges_to_boxes(np.array([4.0, 4, 4, 4]), np.array([-1.0, -1, 1, -1])).tolist()
      [5.0, 4.0, 4.0, 2.0]
    """
    outwards = (scale / 2 + distance) * _twice(reference[..., 2:]) / scale
    low, high = reference[..., :2] - outwards[..., :2], reference[..., :2] + outwards[..., 2:]
    return convert.to_cxcywh(jnp.concatenate([low, high], -1))


def expected_edges(logits: AnyArray, bins: AnyArray) -> Array:
    """Expected distances: `sum_i bins_i softmax(logits)_i`.

    Args:
      logits: f32[..., 4, n + 1].
      bins: f32[n + 1], of `edge_bins`.

    Returns:
      f32[..., 4], within the bins.

    Scope: each distance on its own.

    Peers: D-FINE's and transformers' `Integral`.

    Reference: Peng et al., D-FINE, ICLR 2025, section 4.1.

    Example:
      >>> expected_edges(jnp.array([[0.0, 0.0], [0.0, 99.0]]), jnp.array([-1.0, 3.0])).tolist()
      [1.0, 3.0]
    """
    return jnp.sum(jax.nn.softmax(logits, -1) * bins, -1)


def nearest_bins(distance: AnyArray, bins: AnyArray) -> tuple[Array, Array]:
    """The two bins around a distance, by linear interpolation.

    Args:
      distance: f32[...].
      bins: f32[n + 1], increasing.

    Returns:
      left: i32[...], 0 .. n-1, the last bin at or below the distance; the other one is left + 1.
      weight: f32[...], 0 .. 1, of bin left + 1; 1 minus it is the weight of the left one. A distance outside the bins
        belongs to the outermost bin alone.

    Scope: each distance on its own.

    Peers: the second half of D-FINE's and transformers' `bbox2distance`. A distance on a bin may come out on its other
      side, with the same weights of the bins.

    Reference: Peng et al., D-FINE, ICLR 2025, section 4.1.

    Example:
      >>> import numpy as np
      >>> left, weight = nearest_bins(np.array([-9.0, 0.5, 9.0]), np.array([-1.0, 0.0, 2.0]))
      >>> left.tolist(), weight.tolist()
      ([0, 1, 1], [0.0, 0.25, 1.0])
    """
    distance, bins = jnp.asarray(distance), jnp.asarray(bins)
    left = jnp.clip(jnp.sum(distance[..., None] >= bins, -1) - 1, 0, len(bins) - 2)
    low, high = bins[left], bins[left + 1]
    return left, jnp.clip((distance - low) / (high - low), 0, 1)


def _twice(sides: AnyArray) -> AnyArray:
    return jnp.concatenate([sides, sides], -1)
