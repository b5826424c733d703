"""`kdjax doctor`: whether a run is set up right, before hours are spent on it."""

from absl import logging

from kdjax.commands import settings
from kdjax.doctor import examine
from kdjax.doctor.findings import FAULT, FINE, LOOK

SIGNS = {FINE: " fine  ", LOOK: " look  ", FAULT: " FAULT "}
WIDTH = 20  # of the column that says what was looked at


def run(*, config: str, overrides: list[str]) -> int:
    """Examines the run that `kdjax train` would start with the same flags, and prints what was found.

    Args:
      config: NAME[:ARGUMENT] or FILE.py[:ARGUMENT].
      overrides: "--config.a.b=value".

    Returns:
      Exit code: 0, or 1 if there is a fault.

    Raises:
      UserError: there is no such config or setting.
    """
    logging.set_verbosity(logging.WARNING)
    levels = []
    for finding in examine.examine(settings.read(config, overrides)):
        levels.append(finding.level)
        print(f"{SIGNS[finding.level]}{finding.what:<{WIDTH}}  {finding.said}", flush=True)
    faults, looks, fine = (levels.count(level) for level in (FAULT, LOOK, FINE))
    print(f"{faults} faults, {looks} to look at, {fine} fine")
    return 1 if faults else 0
