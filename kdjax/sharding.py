"""How arrays lie on devices: batches are split over the axis `data`, all else is on every device."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SPLIT, WHOLE = PartitionSpec("data"), PartitionSpec()


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices along the one axis `data`; None: all devices of all hosts."""
    return Mesh(np.array(jax.devices() if devices is None else devices), ("data",))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The tree on every device of the mesh; arrays that lie on these devices already stay as they are."""
    devices = set(mesh.devices.flat)

    def put(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices:
            return leaf
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = leaf.addressable_data(0)
        return jax.device_put(leaf, NamedSharding(mesh, WHOLE))

    return jax.tree.map(put, tree)


def split(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array that every host has, with its rows split over the mesh; a whole number of rows a device."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, SPLIT), lambda index: array[index])


def gather(tree: Any) -> Any:
    """The tree as NumPy arrays on every host."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)):
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)
