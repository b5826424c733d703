"""A folder that is written once per content and used again while nothing has changed."""

import contextlib
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kdjax import files
from kdjax.errors import UserError, fault


def root(cache: str = "") -> Path:
    """The folder of prepared data: `cache`/data, or data/ of `kdjax.files.cache_root()` where `cache` is empty."""
    return (Path(cache).expanduser() if cache else files.cache_root()) / "data"


def prepared(directory: Path, name: str, fingerprint: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """The folder `directory`/name-hash(fingerprint), written by `write(folder)` if it does not exist yet.

    The folder is written under another name and renamed when it is complete. Processes that want the same folder wait
    for the first one. If that one is killed, the next one removes what it left and writes. On file systems whose locks
    do not reach other hosts, two hosts write their own folders, and the first that is complete is used by both.

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
    lock = files.lock(
        directory / f".{target.name}.lock", f"waiting for another process, which prepares {target}", wait=True
    )
    partial = directory / f".{target.name}.{platform.node()}.partial"
    with contextlib.ExitStack() as held:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock)
            if target.is_dir():
                return target
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        except OSError as error:
            raise UserError(f"cache: cannot write to {directory} ({error.strerror}): choose another folder") from None
        try:
            write(partial)
            try:
                os.rename(partial, target)
            except OSError:
                if not target.is_dir():  # else another host was faster
                    raise
        except UserError:
            raise
        except Exception as error:
            if said := fault(error):
                raise UserError(f"cache: {directory}: {said}, or choose another folder for the cache") from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target
