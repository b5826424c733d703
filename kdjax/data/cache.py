"""A folder that is written once per content and found again while nothing has changed."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from absl import logging


def root(cache: str = "") -> Path:
    """Where prepared data is kept: the config's folder, else KDJAX_CACHE, else ~/.cache/kdjax."""
    return Path(cache or os.environ.get("KDJAX_CACHE") or Path.home() / ".cache" / "kdjax").expanduser() / "data"


def prepared(directory: Path, name: str, fingerprint: object, write: Callable[[Path], None]) -> Path:
    """The folder `directory`/name-hash(fingerprint), written by `write(folder)` if it is not there yet.

    A folder appears under its name only when it is complete: it is written beside and renamed. Processes that want the
    same folder wait for the first; what a killed one left behind is removed by the next that writes.

    Raises:
      ValueError: `directory` cannot be written; and what `write` raises.
    """
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
    target = directory / f"{name}-{digest}"
    if target.is_dir():
        return target
    partial = directory / f".{target.name}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / f".{target.name}.lock", "w")
    except OSError as error:
        raise ValueError(
            f"prepared data cannot be kept in {directory} ({error.strerror}); config.data.cache names another folder."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.warning("Waiting for another process that prepares %s.", target)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                write(partial)
                os.rename(partial, target)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return target
