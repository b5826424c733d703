"""`kdjax cache`: writes what a teacher says about the training batches of a run, before it is started."""

from pathlib import Path

from absl import logging

from kdjax.data import shards
from kdjax.errors import UserError, prefix
from kdjax.resources import Config
from kdjax.training import checks, replay


def run(*, config: Config) -> int:
    """Checks the files of `config.teacher.cache` that are there, and writes those that the run lacks.

    Args:
      config: the settings of the run.

    Returns:
      Exit code: 0.

    Raises:
      UserError: the run could not start, the teacher cannot be cached, the cache does not fit the run or is damaged, or
        the disk cannot hold it.
    """
    logging.set_verbosity(logging.WARNING)
    if not any(chosen.cache for chosen in (config.teacher, *config.teachers.values())):
        raise UserError(
            "config.teacher.cache is missing: set the folder to write, as in --config.teacher.cache=caches/a, or with "
            "several teachers --config.teachers.NAME.cache=caches/a"
        )
    setup = checks.checked(config)
    for teacher in setup.teachers:
        cache = teacher.settings(config).cache
        if not cache:
            continue
        with prefix(f"{teacher.setting}.cache"):
            before = shards.find(Path(cache).expanduser().absolute())
            if before:
                before.verified()
        found = replay.write(setup, teacher)
        listed = found.listed().values()
        entries, size = sum(one["entries"] for one in listed), sum(one["bytes"] for one in listed)
        print(f"{found.folder}: {entries:,} entries, {size:,} bytes, {found.kind}: complete for this run")
    return 0
