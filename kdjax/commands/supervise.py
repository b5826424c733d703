"""`kdjax supervise`: runs a command, and runs it again when it was preempted, killed, or left by a lost host."""

import contextlib
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from kdjax import remote
from kdjax.errors import UserError

RESTART = 75  # `kdjax.training.cluster.RESTART`, whose file would import jax
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PAUSE = 5.0  # s before a restart; doubled with each one in a row without a new checkpoint
LONGEST_PAUSE = 300.0  # s


def run(*, words: Sequence[str], workdir: str, max_restarts: int) -> int:
    """Runs a command until it ends by itself.

    It runs again after exit code 75, and after any signal but Ctrl-C and SIGQUIT (a code from 129 to 192 says the
    same). If this process gets a signal, it forwards it, and does not run the command again.

    Args:
      words: the command.
      workdir: the folder whose checkpoints show progress; "": the --workdir of the command.
      max_restarts: how often the command runs again in a row without a new checkpoint.

    Returns:
      The exit code of the command's last run; 128 + n after signal n.

    Raises:
      UserError: there is no such program or no workdir, or `max_restarts` is negative.
    """
    if max_restarts < 0:
        raise UserError(f"--max-restarts: {max_restarts} must be 0 or more")
    named = workdir or workdir_of(words)
    folder = remote.copy_of(named, "workdirs") if remote.is_url(named) else Path(named).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir: {named} is not a folder")
    reached, wasted = newest(folder), 0
    with Child(words) as child:
        while True:
            code = child.run()
            if child.told or not is_restarted(code):
                return code
            before, reached = reached, newest(folder)
            wasted = 0 if reached > before else wasted + 1
            step = f"the newest checkpoint is of step {reached}" if reached >= 0 else "there is no checkpoint"
            if wasted > max_restarts:
                _say(
                    f"the command ended with code {code} and made no new checkpoint, {wasted} times: given up ({step})"
                )
                return code
            pause = min(PAUSE * 2 ** max(wasted - 1, 0), LONGEST_PAUSE)
            _say(f"the command ended with code {code}; {step}: it runs again in {pause:.0f} s")
            if not child.pause(pause):
                return code


def is_restarted(code: int) -> bool:
    """Whether an exit code says that the command was preempted or lost something, and not that it is wrong.

    Example:
      >>> [code for code in (0, 1, 2, 75, 130, 134, 137, 143, 255) if is_restarted(code)]
      [75, 134, 137, 143]
    """
    return code == RESTART or (128 < code <= 192 and code not in (128 + signal.SIGINT, 128 + signal.SIGQUIT))


def workdir_of(words: Sequence[str]) -> str:
    """The --workdir of a command.

    Raises:
      UserError: it has none.
    """
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name == "--workdir" and (value or following):
            return value or following
    raise UserError("--workdir is missing, and the command has none: name the folder with the checkpoints")


def newest(workdir: Path) -> int:
    """The newest step with a checkpoint; -1 if there is none."""
    with contextlib.suppress(OSError):
        steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()]
        return max(steps, default=-1)
    return -1


class Child:
    """A command that may run several times; a context in which the signals of this process are forwarded to it."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words, self.told = list(words), 0  # the last signal that came
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Runs the command once.

        Returns:
          Its exit code; 128 + n after signal n.
        """
        if self.told:
            return 128 + self.told
        try:
            # In a group of its own: Ctrl-C would reach it twice, and a second one ends a run without saving.
            self.process = subprocess.Popen(self.words, process_group=0)
        except OSError as error:
            raise UserError(f"COMMAND: {self.words[0]} cannot be run: {error.strerror}") from None
        if self.told:  # while it was started
            self.process.send_signal(self.told)
        code = self.process.wait()
        return 128 - code if code < 0 else code

    def pause(self, seconds: float) -> bool:
        """Waits; False as soon as a signal has come."""
        for _ in range(math.ceil(seconds / 0.1)):
            if self.told:
                return False
            time.sleep(0.1)
        return not self.told

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of all signals."""
        self.told = number
        if self.process is not None:
            self.process.send_signal(number)  # does nothing when it has ended

    def __enter__(self) -> "Child":
        # Under nohup SIGHUP is ignored, and the command inherits that.
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        heeded = [number for number in FORWARDED if not (nohup and number == signal.SIGHUP)]
        self.before = {number: signal.signal(number, self.handle) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(f"kdjax supervise: {text}", file=sys.stderr, flush=True)
