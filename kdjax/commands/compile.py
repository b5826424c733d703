"""`kdjax compile`: compiles the programs of a run into the cache, before the run is started."""

from pathlib import Path

import jax
from absl import logging

from kdjax import compile_cache, data, files
from kdjax.commands.arguments import aligned
from kdjax.errors import UserError, prefix
from kdjax.resources import Config
from kdjax.training import checks, compiling
from kdjax.training.setup import prepare, prepare_process


def run(*, config: Config) -> int:
    """Compiles what `kdjax train` would with the same arguments on the same devices, and trains nothing.

    It needs the data, whose classes and boxes give the shapes, the weights of the teachers, and the devices: compiled
    programs serve the kind and number of devices that they were compiled on.

    Args:
      config: the settings of the run.

    Returns:
      Exit code: 0.

    Raises:
      UserError: the run could not start, or the cache is disabled or cannot be written.
    """
    logging.set_verbosity(logging.WARNING)
    if config.compile_cache == "off":
        raise UserError(
            "config.compile_cache is off, so that there is nowhere to keep programs: leave it empty, or set a folder"
        )
    checks.check_settings(config)
    checks.check_models(config)
    folder = _writable(compile_cache.location(config.compile_cache))
    with prefix("config.data"):
        dataset = data.open_dataset(config.data)
    checks.check_truth(dataset, config.data)
    prepare_process(config.compile_cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    setup = prepare(config, dataset)
    batch = checks.first_batch_with_objects(setup)
    programs = compiling.of_training(setup, batch) + compiling.of_evaluation(setup, setup.evaluated)
    done = compiling.compile_all(programs)
    how = {True: "was in the cache", False: "compiled"}
    print(aligned([[one.name, f"{one.seconds:.1f} s", how[one.cached]] for one in done]))
    new = sum(not one.cached for one in done)
    told = f"{new} of {len(done)} programs compiled" if new else f"all {len(done)} programs were in the cache"
    print(f"{folder}: {told}, for {jax.device_count()} x {jax.devices()[0].device_kind}")
    return 0


def _writable(folder: Path) -> Path:
    """The folder of the programs, which is created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"config.compile_cache: {folder} cannot be created ({error.strerror}): choose another folder"
        ) from None
    files.check_outputs("config.compile_cache", folder)
    return folder
