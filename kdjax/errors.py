"""What kdjax raises when the user's input cannot be used, what the machine's faults are called, text of one line."""

import contextlib
import errno
import importlib
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any


class UserError(ValueError):
    """The input cannot be used; the message is one sentence: where, what is wrong, what would be right.

    The command line prints it without a traceback. A bug of kdjax's own is any other exception and keeps its traceback.
    """


@contextlib.contextmanager
def prefix(where: str) -> Iterator[None]:
    """Puts `where` and a colon in front of the message of a `UserError` that is raised inside.

    Example:
      >>> with prefix("config.data"):
      ...     raise UserError("root: there is no folder x")
      Traceback (most recent call last):
      kdjax.errors.UserError: config.data: root: there is no folder x
    """
    try:
        yield
    except UserError as error:
        error.args = (f"{where}: {error}",)
        raise


def imported(package: str, where: str, install: str) -> Any:  # noqa: ANN401 - a module, whose types are not known here
    """An optional package.

    Args:
      package: its name in Python.
      where: what needs it, for the message.
      install: what pip is given to install it.

    Raises:
      UserError: it cannot be imported.

    Example:
      >>> imported("wandb0", "x", "kdjax[wandb]")
      Traceback (most recent call last):
      kdjax.errors.UserError: x: wandb0 cannot be imported (No module named 'wandb0'): pip install 'kdjax[wandb]'
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{where}: {package} cannot be imported ({error}): pip install '{install}'") from None


NAME = 40  # characters of the name of a class in a table or list
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(text: str, most: int | None = None) -> str:
    r"""Text of users as one line of a terminal: control characters, line breaks and lone surrogates are escaped.

    Args:
      text: a name of a file or class, or a line with some.
      most: a longer text is cut to this many characters.

    Example:
      >>> printable("red\nish"), printable("a very long name", most=7)
      ('red\\nish', 'a very…')
    """
    text = _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return text if most is None or len(text) <= most else text[: most - 1] + "…"


def listed(names: Iterable[object], most: int = 6) -> str:
    """Names in one line of a message: each cut to `NAME` characters, and only the first `most`.

    Example:
      >>> listed(range(9), most=2)
      '0, 1, …'
    """
    names = [*names]
    return ", ".join(printable(str(name), NAME) for name in names[:most]) + ", …" * (len(names) > most)


# What nobody expects and every library passes on: errno -> what is wrong, what helps.
_FAULTS = {
    errno.ENOSPC: ("the disk is full", "make room"),
    errno.EDQUOT: ("the disk quota is used up", "make room or raise the quota"),
    errno.EROFS: ("the file system is read-only", "make it writable or choose another folder"),
    errno.EIO: ("the disk fails", "check the disk or choose another folder"),
    errno.ESTALE: ("the network file system lost the file", "mount it again"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many files are open on this machine", "close other programs"),
    errno.ENOMEM: ("the memory is used up", "close other programs"),
}
# Those that a program may expect and handle: they count only where they end the command.
_REFUSALS = {
    errno.EACCES: ("permission is denied", "change the permissions or choose another folder"),
    errno.EPERM: ("permission is denied", "change the permissions or choose another folder"),
}
_MEMORY = re.compile("RESOURCE_EXHAUSTED|out of memory|bad_alloc|Unable to allocate|Insufficient memory", re.IGNORECASE)
_PATH = re.compile(r"""["'](/[^"']+?)/?["']""")


def fault(error: BaseException) -> str | None:
    """The fault of the machine that an exception reports, also inside the exceptions of libraries.

    Args:
      error: what ended a command, or failed to write an output.

    Returns:
      One sentence: where, what is wrong, what helps; None if it is no fault of the machine, but perhaps a bug.

    Example:
      >>> fault(OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl"))
      'runs/a/metrics.jsonl: the disk is full: make room'
      >>> fault(KeyError("a"))
    """
    for one, handled in _linked(error):
        known = _FAULTS if handled else _FAULTS | _REFUSALS
        number = one.errno if isinstance(one, OSError) else None
        if number not in known:
            number = next((k for k in known if os.strerror(k) in str(one)), None)
        if number is not None:
            found = _PATH.search(str(one))
            where = one.filename if isinstance(one, OSError) else None
            where = where or (found and found[1])
            return ": ".join([str(where)] * bool(where) + list(known[number]))
        if isinstance(one, MemoryError) or _MEMORY.search(str(one)):
            said = " ".join((str(one).splitlines() or [""])[0].split())[:160]
            what = "the memory is used up" + f" ({said})" * bool(said)
            return f"{what}: close other programs, or compute with smaller batches, images or models"
    if isinstance(error, FileNotFoundError) and error.filename and not Path(error.filename).parent.exists():
        return f"{error.filename}: its folder does not exist or was removed: restore it or choose another folder"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return None


def _linked(error: BaseException) -> Iterator[tuple[BaseException, bool]]:
    """An exception with all that it was raised from or consists of; True for what was being handled meanwhile."""
    queue, seen = [(error, False)], set()
    while queue:
        one, handled = queue.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one, handled
        queue += [(inner, handled) for inner in getattr(one, "exceptions", ())]
        queue += [(one.__cause__, handled)] if one.__cause__ else []
        queue += [(one.__context__, True)] if one.__context__ else []


_came = threading.Event()  # Ctrl-C, in the body of the outermost `interruptible`


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A context in which Ctrl-C ends what runs with `KeyboardInterrupt`, also where a library makes an error of it.

    C code that calls Python, as matplotlib's does, may raise an exception of its own instead.

    Raises:
      KeyboardInterrupt: instead of any exception after Ctrl-C.
    """
    # Only the main thread can set handlers; a shell may have set SIGINT to be ignored.
    first = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    first = first and threading.current_thread() is threading.main_thread()

    def handle(number: int, frame: FrameType | None) -> None:
        _came.set()
        signal.default_int_handler(number, frame)

    if first:
        _came.clear()
        signal.signal(signal.SIGINT, handle)
    try:
        yield
    except Exception as error:
        if _came.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        if first:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _came.clear()
