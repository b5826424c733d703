"""Checks of the compiled update: its memory, and the number of programs."""

import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from kdjax import sharding
from kdjax.distill.teachers import RECORDED
from kdjax.doctor.findings import ERROR, OK, WARNING, Finding
from kdjax.training.setup import Setup, placed
from kdjax.training.step import SOUND

# Linux: available memory of the machine, and the limit of a container.
MEMORY, GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")


def check_memory(setup: Setup, batch: Mapping[str, np.ndarray]) -> list[Finding]:
    """Compares the memory that the update of the student needs on each device with what is available.

    Args:
      setup: of the run.
      batch: a training batch.
    """
    given = placed(setup, batch)
    flagged = given | {SOUND: sharding.spec_of_flag(setup.mesh)}  # as the run calls it
    step = setup.steps["student"].lower(setup.states["student"], setup.variables, flagged)
    analysis = step.compile().memory_analysis()
    # Updates, predictions, and the teachers ahead of the student's update.
    programs = len(setup.steps) + 1 + bool(setup.unlabelled)
    programs += sum(one.detects + bool(one.observer) for one in setup.teachers if not one.on_host)
    compiled = Finding(OK, "programs", f"the run compiles {programs} programs")
    if analysis is None:
        return [Finding(WARNING, "memory", "XLA does not say how much a step needs on this platform"), compiled]
    states = sharding.bytes_of_device((setup.states, setup.variables, given.get(RECORDED)))
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes  # the state is updated in place
    need = (analysis.temp_size_in_bytes + new + states) / 2**30
    have = available() / 2**30
    message = f"a step needs about {need:.2f} GiB of the {have:.1f} GiB of a device"
    if need > have:
        split = ", or set config.sharding='fsdp'" * (setup.mesh.size > 1 and setup.layout.kind == "replicated")
        finding = Finding(ERROR, "memory", f"{message}: lower config.batch_size or config.data.image_size{split}")
    else:
        finding = Finding(WARNING if need > 0.8 * have else OK, "memory", message)
    return [finding, compiled]


def available() -> int:
    """Bytes of memory of the first device: an accelerator's own, or a CPU device's share of the available memory."""
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
