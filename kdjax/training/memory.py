"""The memory of a step, as the compiler forecasts it, and the batch size that it allows."""

import functools
import gc
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import jax
import numpy as np
from ml_collections import ConfigDict

from kdjax import data, machine, sharding
from kdjax.errors import UserError
from kdjax.training import checks, compiling, optim
from kdjax.training.config import AUTO, Config
from kdjax.training.setup import Setup, prepare
from kdjax.training.step import Step
from kdjax.training.teachers import unlabelled_rows

SHARE = 0.8  # of the available memory that a step may need; the rest is for the loader and for what forecasts miss
MOST = 256  # images in a batch that is chosen: RTMDet's, from which the learning rate's rule is taken


def forecast(setup: Setup, batch: Mapping[str, np.ndarray]) -> float | None:
    """Bytes that a run needs on each device: its states and the largest of its programs, which is not run.

    Args:
      setup: of the run.
      batch: a training batch of the loader.

    Returns:
      The bytes; inf if the compiler finds no room; None if XLA does not say them on this platform.
    """
    student, needs = setup.states["student"], []
    read = {  # of the states and variables, beside those of the teachers
        "the student's gradients": (Step.read(student), setup.variables),
        "the student's update": Step.changed(student),
    }
    everything = sharding.bytes_of_device((setup.states, setup.variables))
    for program in compiling.of_training(setup, batch, check=False):
        if program.name.startswith("the twin's"):
            continue  # the student's are larger
        try:
            analysis = program.lower().compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return math.inf
        if analysis is None:
            return None
        held = read.get(program.name, setup.variables)
        new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes  # the state is updated in place
        given = max(analysis.argument_size_in_bytes - sharding.bytes_of_device(held), 0)
        needs.append(everything + given + analysis.temp_size_in_bytes + new)
    return max(needs)


def available() -> float:
    """Bytes of memory of the first device: an accelerator's own, or a CPU device's share of the free memory."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit or machine.free_memory() / jax.local_device_count()


def sizes(config: Config) -> list[int]:
    """Batch sizes up to `MOST` that a run may have: powers of two times the devices, ascending.

    With images without labels, their number must be a multiple of the devices too. There is always one.
    """
    devices = sharding.make_mesh().size
    found = [devices * 2**n for n in range(max(MOST // devices, 1).bit_length())]
    if config.data.unlabelled:
        rows = {size: unlabelled_rows(with_size(config, size)) for size in found}
        found = [size for size, count in rows.items() if count and count % devices == 0]
    return found or [devices]  # which `checks.check_settings` refuses


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
    """The config with the largest of `sizes` that fits, and that is not larger than an epoch.

    The programs of the run are compiled for the two smallest sizes. What they need grows linearly with the images, so
    the largest size whose forecast is within `SHARE` of the available memory follows, and is compiled too. If it needs
    more than the forecast, the next smaller one is. Of several hosts the one with the least memory decides.

    Args:
      config: with the smallest of `sizes`, checked.
      dataset: of the run.

    Raises:
      UserError: the smallest batch does not fit, or XLA does not say what a step needs.
    """

    @functools.cache
    def of_size(size: int) -> float:
        return need(with_size(config, size), dataset)

    least, *larger = sizes(config)
    larger = [size for size in larger if size <= dataset.splits["train"].size]
    have = min(sharding.from_every_host(available()))
    if of_size(least) > SHARE * have:
        raise UserError(
            f"config.batch_size='{AUTO}': a step of {least} images needs about {_gib(of_size(least))}, more than "
            f"{SHARE:.0%} of the {_gib(have)} of a device: lower config.data.image_size, or take smaller models"
        )
    fitting = [least]
    if larger:
        for_image = (of_size(larger[0]) - of_size(least)) / (larger[0] - least)
        fitting += [size for size in larger if of_size(least) + for_image * (size - least) <= SHARE * have]
    while of_size(fitting[-1]) > SHARE * have:
        fitting.pop()
    found = with_size(config, fitting[-1])
    checks.check_settings(found)
    if not jax.process_index():
        lr, rule = config.optimizer.lr, f"the linear rule gives {optim.linear_rule(found):.3g}"
        rate = f"config.optimizer.lr stays {lr:.3g} ({rule})" if lr else f"learning rate: {rule}"
        needed = f"{_gib(of_size(found.batch_size))} of the {_gib(have)}"
        print(f"batch size {found.batch_size}: a step needs about {needed} of a device; {rate}")
    return found


def need(config: Config, dataset: data.Dataset) -> float:
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
    return f"{count / 2**30:.2f} GiB"
