"""The programs of a run and the memory that its largest one needs."""

import os
from pathlib import Path

import jax

from kdjax.doctor.findings import FAULT, FINE, LOOK, Finding
from kdjax.training import sharding
from kdjax.training.setup import Setup

# Where Linux tells the memory that is left, and the limit of a container.
MEMORY, GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")


def check_memory(setup: Setup, batch: dict) -> list[Finding]:
    """How many programs the run compiles, and the memory that its largest one needs on each device."""
    step = setup.steps["student"].lower(
        setup.states["student"], setup.variables, sharding.shard_batch(setup.mesh, batch)
    )
    analysis = step.compile().memory_analysis()
    states = sum(leaf.nbytes for leaf in jax.tree.leaves((setup.states, setup.variables)))
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes  # the state is written where it was
    need = (analysis.temp_size_in_bytes + new + states) / 2**30
    have = available() / 2**30
    said = f"a step needs about {need:.2f} GiB of the {have:.1f} GiB of a device"
    if need > have:
        found = Finding(FAULT, "memory", f"{said}: lower config.batch_size or config.data.image_size")
    else:
        found = Finding(LOOK if need > 0.8 * have else FINE, "memory", said)
    programs = len(setup.steps) + len(set(map(id, setup.predict.values())))
    return [found, Finding(FINE, "programs", f"{programs} for the whole run")]


def available() -> int:
    """Bytes of memory of the first device: an accelerator's own, or its share of what this machine can give."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return limit
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if MEMORY.exists():
        lines = dict(line.split(":") for line in MEMORY.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    if GROUP.exists() and (limit := GROUP.read_text().strip()).isdigit():
        free = min(free, int(limit))
    return free // jax.local_device_count()
