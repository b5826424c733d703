"""How arrays lie on devices: nothing else in the package names a sharding."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of states and variables: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: rows over all devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def make_mesh() -> Mesh:
    """All devices of all hosts along the one axis `data`, over which batches are spread."""
    return Mesh(np.array(jax.devices()), ("data",))


def shard_batch(mesh: Mesh, batch: dict) -> dict:
    """This host's rows of a batch, spread over all devices of all hosts."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
