"""The memory of a step, as the compiler forecasts it, and the batch size that it allows."""

import functools
import gc
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import jax
import numpy as np
from ml_collections import ConfigDict

from kdjax import data, sharding
from kdjax.distill.teachers import RECORDED
from kdjax.errors import UserError
from kdjax.training import checks, optim
from kdjax.training.config import AUTO, Config
from kdjax.training.setup import Setup, placed, prepare
from kdjax.training.step import SOUND
from kdjax.training.teachers import unlabelled_rows

# Linux: available memory of the machine, and the limit of a container.
MEMORY, GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
SHARE = 0.8  # of the available memory that a step may need; the rest is for the loader and for what forecasts miss
MOST = 256  # images in a batch that is chosen: RTMDet's, from which the learning rate's rule is taken


def forecast(setup: Setup, batch: Mapping[str, np.ndarray]) -> int | None:
    """Bytes that the compiled update of the student needs on each device, with all states; nothing is executed.

    Args:
      setup: of the run.
      batch: a training batch of the loader.

    Returns:
      The bytes; None if XLA does not say them on this platform.
    """
    given = placed(setup, batch)
    flagged = given | {SOUND: sharding.spec_of_flag(setup.mesh)}  # as the run calls it
    step = setup.steps["student"].lower(setup.states["student"], setup.variables, flagged)
    analysis = step.compile().memory_analysis()
    if analysis is None:
        return None
    states = sharding.bytes_of_device((setup.states, setup.variables, given.get(RECORDED)))
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes  # the state is updated in place
    return analysis.temp_size_in_bytes + new + states


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


def smallest(config: Config) -> Config:
    """The config with the smallest batch: one image a device, or a few where each image without labels needs more."""
    devices = sharding.make_mesh().size
    for doubled in range(8):
        chosen = with_size(config, devices * 2**doubled)
        rows = unlabelled_rows(chosen)
        if rows % devices == 0 and (rows or not config.data.unlabelled):
            return chosen
    return with_size(config, devices)  # `checks.check_settings` refuses it


def with_size(config: Config, size: int) -> Config:
    """A copy of the config with another batch size."""
    chosen = cast("ConfigDict", config).copy_and_resolve_references()
    with chosen.ignore_type():
        chosen.batch_size = size
    return cast("Config", chosen)


def of_run(workdir: str | Path | None) -> int | None:
    """The batch size of the run in a folder; None if there is no run, or its config.json cannot be read."""
    try:
        size = json.loads((Path(workdir or "") / "config.json").read_text(encoding="utf-8"))["config"]["batch_size"]
    except (OSError, ValueError, TypeError, KeyError):
        return None  # `checks.check_workdir` names a damaged one
    return size if type(size) is int and size > 0 else None


def fill(config: Config, dataset: data.Dataset) -> Config:
    """The config with the largest batch that fits: a power of two times the smallest, at most `MOST` and one epoch.

    The step is compiled for the smallest batch and twice that; what it needs grows linearly with the images, so the
    largest size whose forecast is within `SHARE` of the available memory follows, and is compiled too. If that needs
    more than the forecast, it is halved. Of several hosts the one with the least memory decides.

    Args:
      config: of `smallest`, checked.
      dataset: of the run.

    Raises:
      UserError: the smallest batch does not fit, or XLA does not say what a step needs.
    """

    @functools.cache
    def of_size(size: int) -> int:
        return need(with_size(config, size), dataset)

    least, have = config.batch_size, min(sharding.from_every_host(available()))
    limit, most = SHARE * have, min(MOST, dataset.splits["train"].size)
    if of_size(least) > limit:
        raise UserError(
            f"config.batch_size='{AUTO}': a step of {least} images needs about {_gib(of_size(least))}, more than "
            f"{SHARE:.0%} of the {_gib(have)} of a device: lower config.data.image_size, or take smaller models"
        )
    chosen = least
    if 2 * least <= most:
        for_image = (of_size(2 * least) - of_size(least)) / least
        while 2 * chosen <= most and of_size(least) + for_image * (2 * chosen - least) <= limit:
            chosen *= 2
    while of_size(chosen) > limit:
        chosen //= 2
    found = with_size(config, chosen)
    if not jax.process_index():
        lr, rule = config.optimizer.lr, f"the linear rule gives {optim.linear_rule(found):.3g}"
        rate = f"config.optimizer.lr stays {lr:.3g} ({rule})" if lr else f"learning rate: {rule}"
        print(
            f"batch size {chosen}: a step needs about {_gib(of_size(chosen))} of the {_gib(have)} of a device; {rate}"
        )
    return found


def need(config: Config, dataset: data.Dataset) -> int:
    """`forecast` of a run.

    Args:
      config: of the run.
      dataset: of the run.

    Raises:
      UserError: XLA does not say it on this platform.
    """
    if not jax.process_index():
        print(f"config.batch_size='{AUTO}': compiling a step of {config.batch_size} images", flush=True)
    setup = prepare(config, dataset)
    found = forecast(setup, checks.first_batch_with_objects(setup))
    del setup
    gc.collect()  # the states of one size leave the devices before those of the next come
    if found is None:
        raise UserError(
            f"config.batch_size='{AUTO}': XLA does not say how much memory a step needs on this platform: give a number"
        )
    return found


def _gib(count: float) -> str:
    return f"{count / 2**30:.3g} GiB"
