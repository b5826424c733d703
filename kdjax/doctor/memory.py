"""Checks of the compiled update: its memory, and the number of programs."""

from collections.abc import Mapping

import numpy as np

from kdjax.doctor.findings import ERROR, OK, WARNING, Finding
from kdjax.training.memory import SHARE, available, forecast
from kdjax.training.setup import Setup


def check_memory(setup: Setup, batch: Mapping[str, np.ndarray]) -> list[Finding]:
    """Compares the memory that the update of the student needs on each device with what is available.

    Args:
      setup: of the run.
      batch: a training batch.
    """
    need = forecast(setup, batch)
    # Gradients, updates, predictions, and the teachers ahead of the student's step.
    programs = 2 * len(setup.steps) + 1 + bool(setup.unlabelled)
    programs += sum(one.detects + bool(one.observer) for one in setup.teachers if not one.on_host)
    compiled = Finding(OK, "programs", f"the run compiles {programs} programs")
    if need is None:
        return [Finding(WARNING, "memory", "XLA does not say how much a step needs on this platform"), compiled]
    need, have = need / 2**30, available() / 2**30
    message = f"a step needs about {need:.2f} GiB of the {have:.1f} GiB of a device"
    if need > have:
        split = ", or set config.sharding='fsdp'" * (setup.mesh.size > 1 and setup.layout.kind == "replicated")
        advice = f"lower config.batch_size (or set it to 'auto') or config.data.image_size{split}"
        finding = Finding(ERROR, "memory", f"{message}: {advice}")
    else:
        finding = Finding(WARNING if need > SHARE * have else OK, "memory", message)
    return [finding, compiled]
