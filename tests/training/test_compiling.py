"""Programs that are compiled before they are needed: side by side, once, and found on the disk by the next process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import compile_cache
from kdjax.training import compiling
from kdjax.training.compiling import Program, compile_all


@pytest.fixture
def written():
    """Programs are written to the disk however fast they are compiled."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0.0)
    yield
    jax.config.update(name, before)


def programs(*networks):
    """Small programs, and what was called in which order."""
    told = []

    def program(i, network):
        def lower():
            told.append(f"program {i}")
            return jax.jit(lambda x: jnp.sin(x) * i + np.float32(len(networks))).lower(jnp.ones(i + 2))

        return Program(f"program {i}", network, lower)

    return [program(i, network) for i, network in enumerate(networks)], told


def test_programs_are_lowered_in_order_and_the_second_time_read_from_the_disk(written):
    made, told = programs("student", "student", "teacher")
    compile_all(made)
    jax.clear_caches()
    done = compile_all(made)
    names = [f"program {i}" for i in range(3)]
    assert told == names * 2 and [one.name for one in done] == names
    assert all(one.cached and one.seconds > 0 for one in done)


def test_a_new_program_is_not_called_cached(written):
    value = float(np.random.default_rng().uniform())  # no other process had it
    lower = lambda: jax.jit(lambda x: x * value).lower(jnp.ones(3))  # noqa: E731
    [done] = compile_all([Program("new", "student", lower)])
    assert not done.cached


def test_on_a_gpu_programs_of_one_network_follow_each_other(monkeypatch):
    """XLA finds what it has tuned for the first of them when it compiles the next."""
    begun, together = [], []

    def compile_one(lowered):
        begun.append(lowered)
        together.append({name for name in begun if name[0] == lowered[0]})
        if lowered == ("student", 0):
            jax.block_until_ready(jnp.ones(1000))
        begun.remove(lowered)
        return 0.0, False

    monkeypatch.setattr(compiling, "_compile", compile_one)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    made = [("student", 0), ("student", 1), ("teacher", 0), ("student", 2)]
    compile_all([Program(str(name), name[0], lambda name=name: name) for name in made])
    assert len(together) == 4 and all(len(names) == 1 for names in together)


def test_a_program_that_cannot_be_compiled_ends_the_run():
    def lower():
        raise ValueError("too large")

    with pytest.raises(ValueError, match="too large"):
        compile_all([*programs("student")[0], Program("update", "student", lower)])


def test_the_bar_names_what_is_being_compiled(monkeypatch):
    shown = []
    monkeypatch.setattr(compiling.tqdm, "set_postfix_str", lambda bar, text: shown.append((bar.n, text)))
    compile_all(programs("student", "teacher")[0])
    assert shown[0] == (0, "tracing program 0")
    assert shown[1][1].startswith("tracing program 1")


def test_without_a_bar_the_same_is_compiled(monkeypatch):
    """As on all hosts but the first."""
    monkeypatch.setattr(compiling, "_bar", lambda total: compiling.tqdm(total=total, disable=True))
    assert [one.name for one in compile_all(programs("student")[0])] == ["program 0"]


def test_each_card_and_version_has_its_own_cache(monkeypatch, tmp_path):
    set_to = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: set_to.__setitem__(name, value))
    monkeypatch.setenv("KDJAX_CACHE", str(tmp_path))
    assert compile_cache.enable() == tmp_path / "jax"
    assert compile_cache.enable(str(tmp_path / "own")) == tmp_path / "own"

    class Card:
        device_kind = "NVIDIA H200"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Card()])
    folder = compile_cache.enable()
    assert folder.parent == tmp_path / "jax" and folder.name.endswith("-nvidia-h200")
    assert set_to["jax_compilation_cache_dir"] == str(folder)
