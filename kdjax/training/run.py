"""The one trainer: a run from its config to its report, top to bottom."""

import contextlib
from pathlib import Path

from ml_collections import ConfigDict

from kdjax import data
from kdjax.errors import prefix
from kdjax.report import preview
from kdjax.training import checks, loop, outputs
from kdjax.training import config as settings
from kdjax.training.checkpoint import Checkpoints
from kdjax.training.log import Log
from kdjax.training.provenance import write_config
from kdjax.training.schedule import schedule
from kdjax.training.setup import prepare, prepare_process, resume


class BadInput(Exception):
    """The user's input cannot be used; the message is one sentence: what, where, what would be right."""


def run(config: ConfigDict, workdir: str) -> dict | None:
    """Trains, evaluates and reports; the same call resumes a run that was interrupted.

    Args:
      config: see `kdjax.training.config.base`.
      workdir: gets config.json, metrics.jsonl, tensorboard/, checkpoints/, student/, twin/, detections/,
        per_class.json, results.json and report.html.

    Returns:
      The content of results.json; None for a dry run (`config.data.check`).

    Raises:
      BadInput: before any training; later only if prepared data cannot be read any more.
      FloatingPointError: a loss or gradient is not finite; the message names it.
      loop.Stopped: SIGTERM or SIGINT arrived; the state is saved.
    """
    try:
        checks.check_settings(config)
        if config.data.check:
            with prefix("config.data"):
                dataset = data.open_dataset(config.data)
            print(data.summary(dataset, config.data))
            for what, file in preview.save(dataset, config, schedule(config), workdir).items():
                print(f"{what}: {file}")
            return None
        checks.check_models(config)
        workdir = Path(workdir)
        checks.check_workdir(config, workdir)
        with prefix("config.data"):
            dataset = data.open_dataset(config.data)
        checks.check_truth(dataset)
        prepare_process(config.compile_cache)
        setup = prepare(config, dataset)
        checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
        start, setup = resume(setup, checkpoints)
        if start == 0:
            checks.check_terms(setup, checks.first_batch_with_objects(setup))
    except (ValueError, OSError) as error:
        raise BadInput(settings.sentence(error)) from error
    write_config(config, workdir)
    try:
        with contextlib.closing(checkpoints), Log(workdir, start) as log:
            states = loop.train(setup, start, checkpoints, log)
            return outputs.finish(setup._replace(states=states), workdir, log)
    except data.Damaged as error:
        raise BadInput(str(error)) from error
