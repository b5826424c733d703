"""How arrays are distributed over devices; no other file of the package mentions shardings.

Batches are split over the axis `data`; states and variables have a copy on each device.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any  # nested dicts, lists and tuples of arrays
Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm] - jax declares the class as a variable
SPLIT, WHOLE = PartitionSpec("data"), PartitionSpec()


def make_mesh() -> Mesh:
    """All devices of all hosts along one axis `data`, over which the rows of a batch are split."""
    return mesh_of(jax.devices())


def mesh_of(devices: Sequence[Device]) -> Mesh:
    """Some devices along one axis `data`."""
    return Mesh(np.array(devices), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of states and variables: a copy on each device."""
    return NamedSharding(mesh, WHOLE)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: rows split over all devices."""
    return NamedSharding(mesh, SPLIT)


def shard_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Puts the rows of this host on its devices, as a part of the global batch.

    Args:
      mesh: of `make_mesh`.
      batch: arrays, or trees of them, with the rows of this host.

    Returns:
      The global arrays by name.
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda value: jax.make_array_from_process_local_data(sharding, value), dict(batch))


def split(array: np.ndarray | jax.Array, mesh: Mesh) -> jax.Array:
    """Splits the rows of an array that every host has over the mesh, whose size divides their number."""
    if isinstance(array, jax.Array) and mesh.size == 1 and array.sharding.device_set == set(mesh.devices.flat):
        return array
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, batch_sharding(mesh), lambda index: array[index])


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts a tree on every device of the mesh; arrays that are on exactly these devices stay as they are."""
    devices = set(mesh.devices.flat)

    def put(leaf: jax.Array | np.ndarray | float) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices:
            return leaf
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = leaf.addressable_data(0)
        return jax.device_put(leaf, replicated(mesh))

    return jax.tree.map(put, tree)


def gather(tree: PyTree) -> PyTree:
    """The tree as NumPy arrays on every host."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)):
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)
