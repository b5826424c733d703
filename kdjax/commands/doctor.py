"""`kdjax doctor`: checks a run before it is started."""

from absl import logging

from kdjax.commands import settings
from kdjax.doctor import examine
from kdjax.doctor.findings import ERROR, OK, WARNING

WIDTH = 20  # characters of the column of subjects


def run(*, config: str, overrides: list[str]) -> int:
    """Checks the run that `kdjax train` would start with the same arguments, and prints the findings.

    Args:
      config: NAME[:ARGUMENT] or FILE.py[:ARGUMENT].
      overrides: "--config.a.b=value".

    Returns:
      Exit code: 0, or 1 if there is an error.

    Raises:
      UserError: there is no such config or setting.
    """
    logging.set_verbosity(logging.WARNING)
    counts = dict.fromkeys((ERROR, WARNING, OK), 0)
    for finding in examine.examine(settings.read(config, overrides)):
        counts[finding.level] += 1
        print(f"{finding.level:>7}  {finding.subject:<{WIDTH}}  {finding.message}", flush=True)
    print(f"{counts[ERROR]} errors, {counts[WARNING]} warnings, {counts[OK]} ok")
    return 1 if counts[ERROR] else 0
