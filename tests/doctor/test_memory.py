"""Too little memory is named; the memory of the machine is read."""

import jax
import jax.numpy as jnp
import pytest

from kdjax import sharding
from kdjax.doctor import memory
from tests.support.findings import errors


@pytest.mark.user_input(
    "The machine", "too little memory for a step", "reported by `kdjax doctor`: lower config.batch_size"
)
def test_too_little_memory_is_named(tiny, monkeypatch):
    setup, batch = tiny
    step = jax.jit(lambda state, variables, batch: (state, jnp.sum(jnp.outer(batch["boxes"], batch["boxes"]))))
    setup = setup._replace(steps=setup.steps | {"student": step})
    assert not errors(memory.check_memory(setup, batch))
    monkeypatch.setattr(memory, "available", lambda: 2**20)
    [told] = errors(memory.check_memory(setup, batch)).values()
    assert told.endswith(": lower config.batch_size or config.data.image_size")
    for kind in sharding.KINDS:
        several = setup._replace(layout=sharding.Layout(sharding.mesh_of(jax.devices()[:2]), kind))
        several = several._replace(states=several.layout.put(jax.device_get(setup.states)))
        several = several._replace(variables=several.layout.put(jax.device_get(setup.variables)))
        monkeypatch.setattr(memory, "placed", lambda _, batch: batch)
        [of_two] = errors(memory.check_memory(several, batch)).values()
        assert of_two.endswith(", or set config.sharding='fsdp'") == (kind == "replicated")


def test_memory_is_that_of_the_machine_and_its_container(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUP", tmp_path / "max")
    count = jax.local_device_count()
    assert memory.available() * count > 2**30 * 0.5
    memory.MEMORY.write_text("MemTotal:  9000 kB\nMemFree:  1000 kB\nMemAvailable:  8000 kB\n")
    assert memory.available() == 8000 * 1024 // count
    for limit, wanted in (("max", 8000 * 1024), ("4096000", 4096000), ("99999999999", 8000 * 1024)):
        memory.GROUP.write_text(f"{limit}\n")
        assert memory.available() == wanted // count
