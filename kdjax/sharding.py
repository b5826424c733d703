"""How arrays are distributed over devices; no other file of the package mentions shardings.

Batches are split over the axis `data`. States and variables have a copy on each device, or are split too (`Layout`).
"""

import contextlib
import functools
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any  # nested dicts, lists and tuples of arrays
Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm] - jax declares the class as a variable
SPLIT, WHOLE = PartitionSpec("data"), PartitionSpec()
KINDS = ("replicated", "fsdp")  # of config.sharding
SMALLEST = 1024  # elements of an array, below which splitting it saves less than its messages cost
STATISTICS = "stats"  # the part of a path below which arrays stay whole


def make_mesh() -> Mesh:
    """All devices of all hosts along one axis `data`, over which the rows of a batch are split."""
    return mesh_of(jax.devices())


def mesh_of(devices: Sequence[Device]) -> Mesh:
    """Some devices along one axis `data`."""
    return Mesh(np.array(devices), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on each device."""
    return NamedSharding(mesh, WHOLE)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: rows split over all devices."""
    return NamedSharding(mesh, SPLIT)


def state_shardings(tree: PyTree, mesh: Mesh, kind: str) -> PyTree:
    """The shardings of states and variables, leaf by leaf.

    With "replicated" each device has a copy of every leaf. With "fsdp" (fully sharded data parallel) a leaf is split
    along its largest axis that the number of devices divides; among axes of equal size along the last. It stays whole,
    with a copy on each device, if

    - it has fewer than `SMALLEST` elements, such as biases, scales of norms, counters and keys,
    - or the number of devices divides none of its axes,
    - or `stats` is a part of its path: running statistics are small, and every device computes all of them.

    A parameter, its moments and its moving average have one shape, and so one sharding.

    Args:
      tree: of arrays or of `jax.ShapeDtypeStruct`.
      mesh: of `make_mesh`.
      kind: one of `KINDS`.

    Returns:
      The tree with a `NamedSharding` for each leaf.

    Example:
      >>> shapes = {"kernel": np.zeros((3, 3, 16, 32)), "bias": np.zeros(32)}
      >>> found = state_shardings(shapes, make_mesh(), "replicated")
      >>> [one.is_fully_replicated for one in found.values()]
      [True, True]
    """

    def of_leaf(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        if kind == "replicated" or mesh.size == 1 or math.prod(leaf.shape) < SMALLEST:
            return replicated(mesh)
        if STATISTICS in jax.tree_util.keystr(path, simple=True, separator="/").split("/"):
            return replicated(mesh)
        size, axis = max(
            ((size, axis) for axis, size in enumerate(leaf.shape) if size % mesh.size == 0), default=(0, 0)
        )
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data")) if size else replicated(mesh)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


class Layout(NamedTuple):
    """Where the states and variables of a run lie: its devices, and `config.sharding`.

    With "fsdp" a step gathers the parameters and the teacher's variables where it begins (`whole`), computes with the
    rows of its batch as it does with copies, and adds up on each device the gradients of the parts that it holds
    (`parts`). The optimiser and the moving average then work on these parts.
    """

    mesh: Mesh
    kind: str = "replicated"  # one of `KINDS`

    def shardings(self, tree: PyTree) -> PyTree:
        """`state_shardings` of a tree."""
        return state_shardings(tree, self.mesh, self.kind)

    def put(self, tree: PyTree) -> PyTree:
        """Puts a tree that every host has on the devices."""
        return jax.device_put(tree, self.shardings(tree))

    def whole(self, tree: PyTree) -> PyTree:
        """Inside a program: the tree with a copy of every leaf on each device."""
        if self.kind == "replicated":
            return tree
        return jax.lax.with_sharding_constraint(tree, replicated(self.mesh))

    def gathering(self, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """A function of trees that lie as `put` distributes them and, last, a batch: it gets copies of the trees."""

        @functools.wraps(function)
        def gathered(*trees_and_batch: PyTree) -> PyTree:
            *trees, batch = trees_and_batch
            return function(*map(self.whole, trees), batch)

        return gathered

    def parts(self, tree: PyTree) -> PyTree:
        """Inside a program: the tree as `put` distributes it."""
        if self.kind == "replicated":
            return tree
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))


def bytes_of_device(tree: PyTree) -> int:
    """Bytes of a tree of arrays on the device that has most of it."""

    def of_leaf(leaf: jax.Array | np.ndarray) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.Array) else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(of_leaf, jax.tree.leaves(tree)))


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


def spec_of_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes, types and shardings of what `shard_batch` returns for a batch, without moving it."""

    def spec(value: np.ndarray) -> jax.ShapeDtypeStruct:
        shape = (len(value) * jax.process_count(), *value.shape[1:])
        return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(value.dtype), sharding=batch_sharding(mesh))

    return jax.tree.map(spec, dict(batch))


def spec_of_rows(mesh: Mesh, tree: PyTree) -> PyTree:
    """The shapes and types of global arrays, with the sharding of a batch."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding(mesh)), tree)


def spec_of_flag(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The shape and type of a f32[] with a copy on each device."""
    return jax.ShapeDtypeStruct((), np.float32, sharding=replicated(mesh))


def on_host() -> contextlib.AbstractContextManager[None]:
    """A context in which what is computed outside of any program is computed on the CPU, where that is possible.

    Each new shape of such an operation is a program, which an accelerator takes long to compile.
    """
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return contextlib.nullcontext()


def rows_of_host(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of this host of a global batch that every host has."""
    host, hosts = jax.process_index(), jax.process_count()
    return jax.tree.map(lambda rows: rows[host * len(rows) // hosts : (host + 1) * len(rows) // hosts], dict(batch))


def split(array: np.ndarray | jax.Array, mesh: Mesh) -> jax.Array:
    """Splits the rows of an array that every host has over the mesh, whose size divides their number."""
    if isinstance(array, jax.Array) and mesh.size == 1 and array.sharding.device_set == set(mesh.devices.flat):
        return array
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, batch_sharding(mesh), lambda index: array[index])


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts a tree on every device of the mesh; arrays with a copy on exactly these devices stay as they are.

    If leaves are split over the devices of several hosts, all these hosts call this function.
    """
    devices = set(mesh.devices.flat)

    def put(leaf: jax.Array | np.ndarray | float) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.is_fully_replicated and leaf.sharding.device_set == devices:
            return leaf
        return jax.device_put(_on_this_host(leaf), replicated(mesh))

    return jax.tree.map(put, tree)


def gather(tree: PyTree) -> PyTree:
    """The tree as NumPy arrays on every host; leaves that all of them have already are not sent.

    If leaves are split over the devices of several hosts, all these hosts call this function.
    """
    return jax.device_get(jax.tree.map(_on_this_host, tree))


def _on_this_host(leaf: Any) -> Any:  # noqa: ANN401 - an array or a number
    """A leaf of which this host has all; sent by the others if parts of it are theirs."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if leaf.is_fully_replicated:
        return leaf.addressable_data(0)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(leaf, tiled=True)


def from_every_host(value: Any) -> list[Any]:  # noqa: ANN401 - whatever can be pickled
    """What every host has, in the order of the hosts; all of them call this function."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    own = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(own.size, np.int32))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: own.size] = own
    everyones = multihost_utils.process_allgather(padded)
    return [pickle.loads(one[:size].tobytes()) for one, size in zip(everyones, sizes, strict=True)]
