"""The runs of a study: each is a command of its own; finished ones are read from their folders."""

import contextlib
import functools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kdjax import data, files
from kdjax.commands import settings
from kdjax.errors import UserError, prefix
from kdjax.report import study as report


class Failed(Exception):
    """A run that ended with an error; the message is its last sentence."""


def train(flags: list[str], workdir: Path) -> dict[str, Any]:
    """The results of a run. A finished run is read; otherwise it is trained, from its last checkpoint on.

    Args:
      flags: of `kdjax train`, without its folder.
      workdir: the folder of the run.

    Returns:
      The content of results.json.

    Raises:
      Failed: the run ended with an error.
      UserError: the folder has a run with other flags or on other data.
      SystemExit: the run was stopped, and so is the study.
    """
    results = workdir / "results.json"
    if not results.exists():
        call([sys.executable, "-m", "kdjax", "train", *flags, f"--workdir={workdir}"])
    elif _without_cache(flags_of(workdir)) != _without_cache(flags):
        raise UserError(f"{workdir} has a run with other flags ({' '.join(flags_of(workdir))}): choose another folder")
    elif (before := start_of(workdir).get("data")) and before != data_of(*flags):
        raise UserError(f"{workdir} has a run on other images, boxes or classes than now: choose another folder")
    with unreadable(results):
        found = json.loads(results.read_text())
        found["student"]["AP"]
        if files.altered(found):
            raise UserError(
                f"{results}: it was changed (its SHA-256 differs): delete it, and let the run evaluate again"
            )
        return found


def _without_cache(flags: list[str]) -> list[str]:
    """The flags without the folder of the teacher's cache: where that lies does not change a run."""
    return [flag for flag in flags if not flag.startswith("--config.teacher.cache=")]


def call(command: list[str]) -> None:
    """Runs a command and copies its stderr. SIGTERM to this process stops it; if it was stopped, this process exits.

    Args:
      command: program and arguments.

    Raises:
      Failed: it ended with an error.
      SystemExit: it was stopped.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    written = b""
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr
        try:
            while chunk := process.stderr.read1(65536):  # pyright: ignore[reportAttributeAccessIssue]
                sys.stderr.buffer.write(chunk)
                sys.stderr.flush()
                written = (written + chunk)[-65536:]
            code = process.wait()
        except BaseException:
            process.terminate()  # it saves its state
            process.communicate()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if code in (130, 143, -signal.SIGTERM, -signal.SIGINT):
        print("stopped; the same command continues from there", file=sys.stderr)
        sys.exit(143)
    if code:
        raise Failed(f"killed by signal {-code}" if code < 0 else last_sentence(written.decode(errors="replace")))


def last_sentence(text: str) -> str:
    """The error that a command printed, or else its last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    own = [line.removeprefix("kdjax: ") for line in lines if line.startswith("kdjax: ")]
    return (own or lines or ["no message"])[-1]


@contextlib.contextmanager
def unreadable(file: Path) -> Iterator[None]:
    """Turns what goes wrong with a damaged json into a sentence.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: it is damaged or incomplete ({error!r})") from None


@functools.cache
def data_of(config: str, *overrides: str) -> str:
    """The fingerprint of the data that the flags of a run name, as it is now."""
    chosen = settings.read(config.removeprefix("--config="), overrides)
    with prefix("config.data"):
        return data.open_dataset(chosen.data).fingerprint


def start_of(workdir: Path) -> dict[str, Any]:
    """Versions, command and data of a run when it was started first."""
    with unreadable(workdir / "config.json"):
        return dict(json.loads((workdir / "config.json").read_text())["runs"][0])


def flags_of(workdir: Path) -> list[str]:
    """The flags that a run was started with, without its folder."""
    with unreadable(workdir / "config.json"):
        command = start_of(workdir)["command"]
    return [flag for flag in command if flag.startswith("--") and not flag.startswith("--workdir=")]


def facts_of(workdirs: Iterable[Path]) -> dict[str, str]:
    """Versions, commit and devices of runs; where these differ, all of them."""
    found: dict[str, dict[str, None]] = {}
    for workdir in workdirs:
        with unreadable(workdir / "config.json"):
            for name, value in report.facts(start_of(workdir)).items():
                found.setdefault(name, {})[value] = None
    return {name: " and ".join(filter(None, values)) for name, values in found.items()}
