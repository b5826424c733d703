"""`kdjax doctor`: checks a run before it is started."""

from absl import logging

from kdjax.doctor import examine
from kdjax.doctor.findings import ERROR, OK, WARNING
from kdjax.errors import printable
from kdjax.resources import Config

WIDTH = 20  # characters of the column of subjects


def run(*, config: Config) -> int:
    """Checks the run that `kdjax train` would start with the same arguments, and prints the findings.

    Args:
      config: the settings of the run.

    Returns:
      Exit code: 0, or 1 if there is an error.
    """
    logging.set_verbosity(logging.WARNING)
    counts: dict[str, int] = dict.fromkeys((ERROR, WARNING, OK), 0)
    for finding in examine.examine(config):
        counts[finding.level] += 1
        print(f"{finding.level:>7}  {finding.subject:<{WIDTH}}  {printable(finding.message)}", flush=True)
    plural = {level: "" if counts[level] == 1 else "s" for level in counts}
    print(f"{counts[ERROR]} error{plural[ERROR]}, {counts[WARNING]} warning{plural[WARNING]}, {counts[OK]} ok")
    return 1 if counts[ERROR] else 0
