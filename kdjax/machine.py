"""Memory of this machine, as far as this process may use it: of a container or a job, its own limit."""

import ctypes
import math
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

# Linux: memory of the machine, the control groups of this process, and where their files are.
MEMORY, GROUPS, FILES = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# By version of control groups: the limit, what is used, and the part of it that can be taken back at once.
_NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
# Options of glibc's mallopt: no mmap for large blocks (M_MMAP_MAX), no trimming (M_TRIM_THRESHOLD).
_MALLOC = {-4: 0, -1: -1}


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed, as long as the process lives.

    Call it when JAX is imported and has not looked for devices yet.

    On the CPU, XLA allocates and frees the memory of a whole step in each step. By default glibc returns that memory to
    the system, and the page faults of fresh memory take up to half of the time of a run. Large blocks are kept only if
    the main thread allocates them, so on a CPU JAX is asked to run programs in the thread that calls them.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in _MALLOC.items():
            libc.mallopt(option, value)
    if "jax" in sys.modules:  # else nothing is computed
        sys.modules["jax"].config.update("jax_cpu_enable_async_dispatch", False)


def memory() -> float:
    """Bytes that this process may have; inf where it cannot be told."""
    whole = _meminfo().get("MemTotal", math.inf)
    if whole == math.inf and hasattr(os, "sysconf"):
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *(limit for limit, _ in _limits())])


def free_memory() -> float:
    """Bytes of `memory` that are free, or can be taken back from caches of files."""
    return min([_meminfo().get("MemAvailable", memory()), *(limit - used for limit, used in _limits())])


def _meminfo() -> dict[str, int]:
    try:
        rows = (line.split() for line in MEMORY.read_text().splitlines())
        return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) > 1}
    except (OSError, ValueError):
        return {}


def _limits() -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of each control group of this process that has a limit, and of those above it."""
    try:
        lines = GROUPS.read_text().splitlines()
    except OSError:
        lines = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        limit, usage, inactive = _NAMES[1 if controllers else 2]
        root = FILES / "memory" if controllers else FILES
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(root):
                try:
                    most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
                    parts = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    yield most, used - next((int(value) for name, value in parts if name == inactive), 0)
                except (OSError, ValueError):  # there is none, or it is "max"
                    continue
