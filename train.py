"""Trains a student detector, with a teacher or alone: `python train.py --config=configs/NAME.py --workdir=DIR`."""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A file of configs/; --config.a.b=value changes a setting.",
    lock_config=False,  # options of a detector are no keys of the defaults; other unknown keys are refused at start
    accept_new_attributes=True,
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps all it writes; run again to resume.")
MULTIHOST = flags.DEFINE_bool("multihost", False, "Several hosts: the same command on each (jax.distributed).")


def main(argv):
    logging.set_verbosity(logging.WARNING)  # the libraries' own progress; ours is a bar
    if len(argv) > 1:
        fail(f"{argv[1]!r} is no flag; settings are changed with --config.a.b=value")
    try:
        # A file that could not be read shows itself at the first access.
        config = CONFIG.value and CONFIG.value.to_dict()
    except OSError as error:
        fail(f"--config: {str(error).strip().splitlines()[-1].strip()}")
    if config is None or not (WORKDIR.value or CONFIG.value.data.check):
        fail("--config and --workdir are needed, as in --config=configs/quickstart.py --workdir=runs/quickstart")
    import jax

    if MULTIHOST.value:
        jax.distributed.initialize()
    from kdjax.train import loop, run

    try:
        run.run(CONFIG.value, WORKDIR.value)
    except loop.Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(143)
    except KeyboardInterrupt:
        print("train.py: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (run.BadInput, FloatingPointError) as error:
        if os.environ.get("KDJAX_TRACEBACK"):
            raise
        fail(error)


def parse(argv):
    """Reads the flags, and with them the config file."""
    from kdjax.train import config

    try:
        return config.parse(flags.FLAGS, argv)
    except ValueError as error:
        if os.environ.get("KDJAX_TRACEBACK"):
            raise
        fail(error)


def fail(error):
    print(f"train.py: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
