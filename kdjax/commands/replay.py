"""`kdjax replay`: repeats a step that went wrong, and says what began it."""

from absl import logging

from kdjax.training import blackbox, diagnosis


def run(*, folder: str) -> int:
    """Repeats a step from the inputs that a run kept, and prints what began it.

    Args:
      folder: WORKDIR/blackbox/step-N.

    Returns:
      Exit code: 0; 1 if the step does not repeat to the bit.

    Raises:
      UserError: the folder is no such folder or damaged, or the data and weights of the run are not there any more.
    """
    logging.set_verbosity(logging.WARNING)
    found, lines = diagnosis.replay_folder(folder, blackbox.read(folder))
    print("\n".join(lines))
    return int(any(one.differs for one in found))
