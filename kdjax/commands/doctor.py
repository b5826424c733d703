"""`kdjax doctor`: whether a run is set up right, before hours are spent on it."""

import os
import sys

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from kdjax.doctor import examine
from kdjax.doctor.findings import FAULT, FINE, LOOK
from kdjax.train import config as settings

SIGNS = {FINE: " fine  ", LOOK: " look  ", FAULT: " FAULT "}
WIDTH = 20  # of the column that says what was looked at


def run(*, config: str, changes: list[str]) -> int:
    """Examines the run that `train.py` would start with the same flags, and prints what was found.

    Args:
      config: FILE[:ARGUMENT].
      changes: any --config.a.b=value.

    Returns:
      Exit code: 0, or 1 if there is a fault.

    Raises:
      ValueError: there is no such config or setting.
    """
    logging.set_verbosity(logging.WARNING)
    levels = []
    for finding in examine.examine(read_config(config, changes)):
        levels.append(finding.level)
        print(f"{SIGNS[finding.level]}{finding.what:<{WIDTH}}  {finding.said}", flush=True)
    faults, looks, fine = (levels.count(level) for level in (FAULT, LOOK, FINE))
    print(f"{faults} faults, {looks} to look at, {fine} fine")
    return 1 if faults else 0


def read_config(config: str, changes: list[str]) -> ConfigDict:
    """The config that train.py would have.

    Raises:
      ValueError: one sentence on what is wrong.
    """
    if os.getcwd() not in sys.path:  # configs import each other from where the command runs, as train.py's do
        sys.path.append(os.getcwd())
    values, arguments = flags.FlagValues(), ["kdjax doctor", f"--config={config}", *changes]
    holder = config_flags.DEFINE_config_file(
        "config", None, "", flag_values=values, sys_argv=arguments, lock_config=False, accept_new_attributes=True
    )
    rest = settings.parse(values, arguments)[1:]
    if rest:
        raise ValueError(f"{rest[0]!r} is no flag; settings are changed with --config.a.b=value")
    try:
        holder.value.to_dict()  # a file that could not be read shows itself at the first access
        return holder.value
    except OSError as error:
        raise ValueError(f"--config: {str(error).strip().splitlines()[-1].strip()}") from None
