"""Finds the smallest entries of rows, for batches that are split over devices."""

import jax
import jax.numpy as jnp

from kdjax.structs import AnyArray, Array


def k_smallest(values: AnyArray, k: int) -> tuple[Array, Array]:
    """The k smallest entries of each row in ascending order, equal ones in the order of their indices.

    On a batch that is split over devices `lax.top_k` gathers all rows on every device; these reductions do not.

    Args:
      values: f32[..., N]; inf marks missing entries.
      k: number of entries, at most N. The time grows with k.

    Returns:
      (entries f32[..., k], indices i32[..., k]).

    Scope: each row on its own.

    Example:
      >>> import numpy as np
      >>> smallest, index = k_smallest(np.array([[5.0, 1.0, 3.0, 1.0]]), 3)
      >>> smallest.tolist(), index.tolist()
      ([[1.0, 1.0, 3.0]], [[1, 3, 2]])
    """
    block, size = 16, values.shape[-1]
    if size <= block * k:
        # Entries that were taken become inf, so missing ones must be smaller.
        largest = jnp.finfo(jnp.float32).max

        def take_one(left: AnyArray, _: None) -> tuple[Array, tuple[Array, Array]]:
            lowest = jnp.min(left, axis=-1, keepdims=True)
            index = jnp.min(jnp.where(left == lowest, jnp.arange(size), size), axis=-1, keepdims=True)
            return jnp.where(jnp.arange(size) == index, jnp.inf, left), (lowest[..., 0], index[..., 0])

        _, (lowest, index) = jax.lax.scan(take_one, jnp.minimum(values, largest), length=k)
        lowest, index = jnp.moveaxis(lowest, 0, -1), jnp.moveaxis(index, 0, -1)
        return jnp.where(lowest == largest, jnp.inf, lowest), index

    # The k smallest entries are in the k blocks with the smallest minima.
    rows = values.shape[:-1]
    padded = jnp.pad(values, [(0, 0)] * len(rows) + [(0, -size % block)], constant_values=jnp.inf)
    blocks = padded.reshape(*rows, -1, block)
    _, best = k_smallest(jnp.min(blocks, axis=-1), k)
    best = jnp.sort(best, axis=-1)
    candidates = jnp.take_along_axis(blocks, best[..., None], axis=-2).reshape(*rows, -1)
    lowest, index = k_smallest(candidates, k)
    return lowest, jnp.take_along_axis(best, index // block, axis=-1) * block + index % block
