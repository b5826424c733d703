"""How the hosts of a run find each other."""

import re
import socket

import jax
import pytest

from kdjax.errors import UserError
from kdjax.training import join


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (dict(coordinator="node1"), "--coordinator: node1 must be an address and a port, as in 10.0.0.1:8476"),
        (dict(bind="0.0.0.0"), "--bind: 0.0.0.0 must be an address and a port, as in 10.0.0.1:8476"),
        (dict(coordinator="node1:1", hosts=2, host=2), "--host: 2 must be one of 0 to 1, because there are 2 hosts"),
        (dict(timeout=9), "--host-timeout: 9 must be 10 or more seconds"),
    ],
)
@pytest.mark.user_input("Config and flags", "flags of several hosts that cannot be used", "refused, with what is right")
def test_flags_that_cannot_be_used(flags, said):
    with pytest.raises(UserError) as told:
        join.join(**flags)
    assert str(told.value) == said


@pytest.mark.user_input(
    "Config and flags", "`--multihost` without a scheduler and without flags", "refused, with the flags"
)
def test_hosts_that_nobody_knows(monkeypatch):
    def nothing(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nothing)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(UserError, match=r"--multihost: no scheduler .* give --coordinator=HOST:PORT, --hosts=N and"):
        join.join()


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        (dict(SLURM_STEP_TASKS_PER_NODE="1(x4)"), []),
        (dict(SLURM_STEP_TASKS_PER_NODE="1"), []),
        (dict(SLURM_STEP_TASKS_PER_NODE="8(x4)"), None),
        (dict(SLURM_STEP_TASKS_PER_NODE="1", JAX_LOCAL_DEVICE_IDS="0,1"), None),
        (dict(OMPI_COMM_WORLD_LOCAL_SIZE="1"), []),
        ({}, None),
    ],
)
def test_a_process_that_is_alone_on_its_machine_has_all_devices(environment, devices):
    assert join._devices(environment) == devices


@pytest.mark.parametrize(
    ("coordinator", "listens"),
    [
        ("10.1.2.3:99", "10.1.2.3:99"),
        ("[fe80::1]:99", "[fe80::1]:99"),
        ("localhost:99", "localhost:99"),
        ("node1:99", None),
        ("", None),
    ],
)
def test_where_the_coordinator_listens(coordinator, listens):
    assert join._listens_at(coordinator) == listens


def test_a_port_in_use_is_refused_before_jaxlib_crashes():
    with socket.create_server(("localhost", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        said = f"--coordinator: the coordinator cannot listen at {address} (Address already in use): choose another"
        with pytest.raises(UserError, match=re.escape(said)):
            join.join(coordinator=address, hosts=2, host=0)


@pytest.mark.parametrize(
    ("flags", "environment", "listens"),
    [
        (dict(coordinator="127.0.0.1:0"), {}, "127.0.0.1:0"),
        (dict(coordinator="127.0.0.1:0"), {"JAX_COORDINATOR_BIND_ADDRESS": "127.0.0.2:0"}, "127.0.0.2:0"),
        (dict(coordinator="127.0.0.1:0", bind="127.0.0.3:0"), {"JAX_COORDINATOR_BIND_ADDRESS": "x"}, "127.0.0.3:0"),
        ({}, {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:0"}, "127.0.0.1:0"),
        ({}, {"JAX_COORDINATOR_ADDRESS": "node1:0"}, None),
    ],
)
def test_variables_of_the_environment_count_as_flags(monkeypatch, flags, environment, listens):
    asked = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: asked.update(given))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(join, "_explain_aborts", lambda: None)
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    join.join(**flags)
    assert asked["coordinator_bind_address"] == listens
