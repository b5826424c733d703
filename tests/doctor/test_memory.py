"""Too little memory is named."""

import jax
import jax.numpy as jnp
import pytest

from kdjax import sharding
from kdjax.doctor import memory
from kdjax.training.step import Step
from tests.support.findings import errors


@pytest.mark.user_input(
    "The machine",
    "too little memory for a step",
    "reported by `kdjax doctor`: lower config.batch_size, or let a run find it",
)
def test_too_little_memory_is_named(tiny, monkeypatch):
    setup, batch = tiny
    gradients = jax.jit(lambda state, variables, batch: jnp.sum(jnp.outer(batch["boxes"], batch["boxes"])))
    step = Step(gradients, jax.jit(lambda state, grads, stats, finite: state, donate_argnums=0))
    setup = setup._replace(steps=setup.steps | {"student": step})
    assert not errors(memory.check_memory(setup, batch))
    monkeypatch.setattr(memory, "available", lambda: 2**20)
    [told] = errors(memory.check_memory(setup, batch)).values()
    assert told.endswith(": lower config.batch_size (or set it to 'auto') or config.data.image_size")
    for kind in sharding.KINDS:
        several = setup._replace(layout=sharding.Layout(sharding.mesh_of(jax.devices()[:2]), kind), teachers=())
        several = several._replace(states=several.layout.put(jax.device_get(setup.states)))
        several = several._replace(variables=several.layout.put(jax.device_get(setup.variables)))
        [of_two] = errors(memory.check_memory(several, batch)).values()
        assert of_two.endswith(", or set config.sharding='fsdp'") == (kind == "replicated")
