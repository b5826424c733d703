"""Seeded arrays, and ways to call a function: compiled quickly, or with its batch split over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DEVICES = 8

# `jax.jit` that compiles in half of the time: for programs that run once.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# `jax.jit` whose code is emitted as for users, not as tests/conftest.py chooses: for bounds of a few roundings.
users_jit = functools.partial(
    jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True} if jax.__version__.startswith("0.10.") else {}
)


def arrays(*shapes: tuple[int, ...], seed: int = 0) -> list[jax.Array]:
    """Normal float32 arrays of these shapes."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def maps(seed: int, shape=(2, 4, 5, 3), dtype=jnp.float32, scale: float = 1.0):
    """Student and teacher: two seeded normal arrays, related like a trained pair (half of the signal is shared)."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=shape)
    return tuple(jnp.asarray(scale * (0.5 * shared + rng.normal(size=shape)), dtype) for _ in range(2))


def on_shards(function, *arrays):
    """`function(*arrays)` jitted, with the first axis of every array split over eight devices."""
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.jit(function)(*(jax.device_put(a, sharding) for a in arrays))


def on_pmap(function, *arrays):
    """`function(*arrays, axis_name="data")` under pmap, the first axis of every array split over eight devices."""
    split = [a.reshape(DEVICES, a.shape[0] // DEVICES, *a.shape[1:]) for a in arrays]
    out = jax.pmap(functools.partial(function, axis_name="data"), axis_name="data")(*split)
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), out)


def assert_finite(function, student, *rest):
    """Value and gradient with respect to the student are finite; the value is float32."""
    value, gradient = jax.jit(jax.value_and_grad(lambda s, *rest: jnp.sum(function(s, *rest))))(student, *rest)
    assert value.dtype == jnp.float32 and np.isfinite(value)
    assert np.all(np.isfinite(np.asarray(gradient, np.float32)))
    return float(value), gradient
