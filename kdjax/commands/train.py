"""`kdjax train`: trains a student detector, with a teacher or alone."""

import sys

from absl import logging

from kdjax.commands import settings
from kdjax.errors import UserError


def run(*, config: str, workdir: str | None, multihost: bool, overrides: list[str]) -> int:
    """Trains, evaluates and reports; the same command resumes an interrupted run.

    Args:
      config: NAME[:ARGUMENT] or FILE.py[:ARGUMENT].
      workdir: the folder of the run; only a dry run (`--config.data.check=True`) needs none.
      multihost: several hosts run the same command (jax.distributed).
      overrides: "--config.a.b=value".

    Returns:
      Exit code: 0; 143 if the run was stopped and its state saved, 130 after Ctrl-C.

    Raises:
      UserError: before any training, for an argument, setting, file or model that cannot be used; later only if
        prepared data cannot be read any more.
      FloatingPointError: a loss or gradient is not finite.
    """
    logging.set_verbosity(logging.WARNING)  # the progress messages of the libraries; kdjax shows a bar
    made = settings.read(config, overrides)
    if not (workdir or made.data.check):
        raise UserError("--workdir is missing, as in --workdir=runs/quickstart")
    import jax

    if multihost:
        jax.distributed.initialize()
    from kdjax.training import loop
    from kdjax.training.run import run as train

    try:
        train(made, workdir)
    except loop.Stopped as stop:
        print(stop, file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("kdjax train: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0
