"""A run from its config to its results, top to bottom."""

import contextlib
from pathlib import Path
from typing import Any, cast

from ml_collections import ConfigDict

from kdjax import data
from kdjax.errors import prefix
from kdjax.report import preview
from kdjax.training import checks, loop, outputs, provenance
from kdjax.training.checkpoint import Checkpoints
from kdjax.training.config import Config
from kdjax.training.log import Log
from kdjax.training.schedule import schedule
from kdjax.training.setup import prepare, prepare_process, resume


def run(config: Config, workdir: str | Path | None) -> dict[str, Any] | None:
    """Trains, evaluates and reports; the same call resumes an interrupted run.

    Args:
      config: the settings; `kdjax.training.config.base` lists them.
      workdir: the folder for config.json, metrics.jsonl, tensorboard/, checkpoints/, student/, twin/, detections/,
        per_class.json, results.json and report.html; may be None for a dry run.

    Returns:
      The content of results.json; None after a dry run (`config.data.check`).

    Raises:
      UserError: a setting, file or model cannot be used; raised before any training, or when prepared data becomes
        unreadable.
      FloatingPointError: a loss or gradient is not finite; the message names it.
      kdjax.training.loop.Stopped: the process received SIGTERM or SIGINT; the state is saved.
    """
    checks.check_settings(config)
    if config.data.check:
        dry_run(config, workdir)
        return None
    checks.check_models(config)
    folder = checks.check_workdir(config, workdir)
    with prefix("config.data"):
        dataset = data.open_dataset(config.data)
    checks.check_truth(dataset)
    prepare_process(config.compile_cache)
    setup = prepare(config, dataset)
    with contextlib.closing(Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep)) as checkpoints:
        start, setup = resume(setup, checkpoints)
        if start == 0:
            checks.check_terms(setup, checks.first_batch_with_objects(setup))
        provenance.write_config(config, folder)
        with Log(folder, start) as log:
            states = loop.train(setup, start, checkpoints, log)
            return outputs.finish(setup._replace(states=states), folder, log)


def dry_run(config: Config, workdir: str | Path | None) -> None:
    """Prints a summary of the data, and draws training batches and the schedule.

    Args:
      config: the settings.
      workdir: the folder for the images; None: a folder of the cache.
    """
    with prefix("config.data"):
        dataset = data.open_dataset(config.data)
    print(data.summary(dataset, config.data))
    for description, file in preview.save(dataset, cast(ConfigDict, config), schedule(config), workdir).items():
        print(f"{description}: {file}")
