"""How the hosts of a run find each other."""

import contextlib
import ctypes
import os
import re
import signal
import socket
from collections.abc import Mapping
from typing import Any

import jax

from kdjax.errors import UserError
from kdjax.training import cluster
from kdjax.training.cluster import RESTART

JOIN = 300  # s in which all hosts must have started
_UNKNOWN = "no scheduler that jax knows says who the hosts are"


class Alone(Exception):
    """Not all hosts have come."""


def join(
    *,
    coordinator: str = "",
    bind: str = "",
    hosts: int | None = None,
    host: int | None = None,
    timeout: float = cluster.TIMEOUT,
) -> None:
    """Starts `jax.distributed`; what is not said is found by jax (Slurm, Open MPI, Kubernetes, TPUs).

    Args:
      coordinator: "HOST:PORT" of host 0, where its coordinator listens; all hosts reach it there.
      bind: "ADDRESS:PORT" at which it listens; "": that of `coordinator` if it is an address and no name, else all
        addresses of host 0.
      hosts, host: how many there are, and the number of this one, from 0.
      timeout: s without a heartbeat, after which a host counts as lost.

    Raises:
      UserError: a value cannot be used, or something is missing.
      Alone: not all hosts have come in time.
    """
    for flag, value in (("--coordinator", coordinator), ("--bind", bind)):
        if value and not re.fullmatch(r".+:\d+", value):
            raise UserError(f"{flag}: {value} must be an address and a port, as in 10.0.0.1:8476")
    if timeout < 5 * cluster.PULSE:
        raise UserError(f"--host-timeout: {timeout:g} must be {5 * cluster.PULSE:g} or more seconds")
    said = coordinator and hosts is not None and host is not None
    where = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    listens = bind or os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or _listens_at(where)
    if hosts is not None and host is not None and not 0 <= host < hosts:
        raise UserError(f"--host: {host} must be one of 0 to {hosts - 1}, because there are {hosts} hosts")
    if host == 0 and (listens or where):
        _check_port(listens or where, everywhere=not listens)
    # jax would end the process on a SIGTERM of its own counting, and on a lost host after its own timeout
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator or None,
            num_processes=hosts,
            process_id=host,
            local_device_ids=_devices(os.environ),
            cluster_detection_method="deactivate" if said else None,
            initialization_timeout=JOIN,
            heartbeat_timeout_seconds=int(2 * timeout + 60),
            coordinator_bind_address=listens,
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--multihost: {_UNKNOWN} ({error}): give --coordinator=HOST:PORT, --hosts=N and --host=I"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        first = (str(error).splitlines() or [""])[0]
        raise Alone(f"the hosts have not come together within {JOIN} s: {first}") from None
    _explain_aborts()


def _check_port(address: str, *, everywhere: bool) -> None:
    """Refuses a port that another process uses, where jaxlib would crash.

    Args:
      address: "HOST:PORT" at which the coordinator will listen.
      everywhere: at all addresses of this machine, instead of HOST.
    """
    name, _, port = address.rpartition(":")
    name = "" if everywhere else name.strip("[]")
    try:
        with socket.create_server((name, int(port)), family=socket.AF_INET6 if ":" in name else socket.AF_INET):
            pass
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise UserError(
            f"--coordinator: the coordinator cannot listen at {address} ({why}): choose another port"
        ) from None


def _devices(environment: Mapping[str, str]) -> list[int] | None:
    """The devices of this process as jax takes them: [] are all of the machine, None as jax chooses.

    Under Slurm and Open MPI jax gives each process one GPU, also where only one process runs on a machine.
    """
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or ""
    alone = re.fullmatch(r"1(\(x\d+\))?", tasks) and not environment.get("JAX_LOCAL_DEVICE_IDS")
    return [] if alone else None


def _listens_at(coordinator: str) -> str | None:
    """An address that was given as such is the one to listen at; a name may stand for another one, as in a cluster."""
    host = coordinator.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return coordinator
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, host)
            return coordinator
    return None


_handlers: list[Any] = []  # what C may call must not be collected


def _explain_aborts() -> None:
    """Says what happened where jaxlib aborts the process: as soon as the process of host 0 is gone.

    jaxlib takes no function of Python for that (0.10: std::bad_cast). A thread of its own, without Python's lock,
    raises SIGABRT; a handler in C form, unlike one of the module `signal`, runs before the process ends.
    """
    from jax._src.distributed import global_state

    address, host = global_state.coordinator_address, global_state.process_id
    if os.name != "posix" or host == 0 or not address:
        return
    name, _, port = address.rpartition(":")

    def handle(number: int) -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((name.strip("[]"), int(port)), timeout=2).close()
            return  # it is there: the process aborts for another reason
        told = (
            f"\nkdjax: host 0 ({address}), which coordinates the others, is gone: this host leaves with code {RESTART}"
        )
        os.write(2, f"{told}; the same command on all hosts continues from the last checkpoint\n".encode())
        os._exit(RESTART)

    function = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    _handlers.append(function)
    ctypes.CDLL(None).signal(ctypes.c_int(signal.SIGABRT), function)
