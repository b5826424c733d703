"""Memory of this machine, as far as this process may use it: of a container or a job, its own limit."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

# Linux: memory of the machine, the control groups of this process, and where their files are.
MEMORY, GROUPS, FILES = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# By version of control groups: the limit, what is used, and the part of it that can be taken back at once.
_NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


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
