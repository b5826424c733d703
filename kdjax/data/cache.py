"""A folder that is written once per content and used again while nothing has changed."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import filelock
from absl import logging

from kdjax import files
from kdjax.errors import UserError


def root(cache: str = "") -> Path:
    """The folder of prepared data: `cache`/data, or data/ of `kdjax.files.cache_root()` where `cache` is empty."""
    return (Path(cache).expanduser() if cache else files.cache_root()) / "data"


def prepared(directory: Path, name: str, fingerprint: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """The folder `directory`/name-hash(fingerprint), written by `write(folder)` if it does not exist yet.

    The folder is written under another name and renamed when it is complete. Processes that want the same folder wait
    for the first one. If that one is killed, its lock is released, and the next one removes what it left and writes.

    Args:
      directory: created if it does not exist.
      name: start of the folder's name.
      fingerprint: what the content depends on, as a value that json can hold.
      write: fills an empty folder.

    Returns:
      The complete folder.

    Raises:
      UserError: `directory` cannot be written. What `write` raises is passed on.
    """
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
    target = directory / f"{name}-{digest}"
    if target.is_dir():
        return target
    partial = directory / f".{target.name}.partial"
    lock = filelock.FileLock(directory / f".{target.name}.lock")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            logging.warning("Waiting for another process that prepares %s.", target)
            lock.acquire()
    except OSError as error:
        raise UserError(f"cache: cannot write to {directory} ({error.strerror}): choose another folder") from None
    try:
        if not target.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                write(partial)
                os.rename(partial, target)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    finally:
        lock.release()
    return target
