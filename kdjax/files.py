"""Writing files atomically, one writer at a time, and the folder of everything that kdjax caches."""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
from absl import logging

from kdjax.errors import UserError, fault

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}  # Lustre, some NFS and FUSE
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.\d+\.tmp")  # of `write_bytes`
_STALE = 0.5  # s; the lock of a process that was killed is taken over within some attempts


def head(path: Path, what: str) -> bytes:
    """The first bytes of a file.

    Args:
      path: the file.
      what: what it must hold, for messages: "weights".

    Raises:
      UserError: it is empty, compressed, or one of the things that are often downloaded instead.
    """
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        raise UserError(f"{path}: the file is empty")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: it is a pointer of git-lfs, not the {what}: download them with `git lfs pull`")
    if re.match(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|!--|html|head|body|\?xml|error)", start, re.IGNORECASE):
        raise UserError(f"{path}: it is an HTML or XML page, not {what}: download the file itself, not its page")
    packed = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)
    if packed:
        raise UserError(f"{path}: it is compressed with {packed}: unpack it")
    return start


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new one, never a part.

    The content goes to a temporary file in the same folder, which then replaces the old one.
    """
    path = Path(path)
    key = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]  # a name may have all the bytes that it can
    temporary = path.with_name(f".{key}.{os.getpid()}.tmp")
    try:
        with named(path):
            temporary.write_bytes(content)
            temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def remove_temporary(folder: str | Path) -> None:
    """Removes the temporary files of `write_bytes` that killed processes have left in a folder and those below it.

    Args:
      folder: nobody else writes in it.
    """
    for path in Path(folder).rglob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Gives an `OSError` that is raised inside the name of the file that is written; writing itself names none."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of text in UTF-8; a lone surrogate, which json allows in a string, becomes "?"."""
    write_bytes(path, text.encode("utf-8", errors="replace"))


def write_json(path: str | Path, value: Mapping[str, Any] | Sequence[Any], *, indent: int | None = None) -> None:
    """`write_bytes` of a value as json, with a newline at the end."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def sealed(content: Mapping[str, Any], key: str = "sha256") -> dict[str, Any]:
    """A json object with a hash of all its other entries under `key`, so that a change is noticed when it is read."""
    text = json.dumps({name: value for name, value in content.items() if name != key}, sort_keys=True)
    return {**content, key: hashlib.sha256(text.encode()).hexdigest()}


def altered(content: Mapping[str, Any], key: str = "sha256") -> bool:
    """Whether what `sealed` returned was changed, its hash included."""
    return content.get(key) != sealed(content, key)[key]


def check_outputs(where: str, folder: str | Path, *, files: Sequence[str] = (), folders: Sequence[str] = ()) -> None:
    """Checks, before anything is computed, that outputs can be written.

    Args:
      where: the flag that names the folder.
      folder: an existing folder.
      files: what will be written in it, as in "student/config.json".
      folders: what will be made in it.

    Raises:
      UserError: the folder cannot be written; a folder is in the place of a file, or a file in that of a folder.
    """
    folder = Path(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{where}: {folder} is not writable: change its permissions or choose another folder")
    for path in (folder / name for name in files):
        if path.is_dir():
            raise UserError(f"{where}: {path} is a folder, where a file is to be written: move it away")
    for path in (folder / name for name in folders):
        if (path.exists() or path.is_symlink()) and not path.is_dir():
            raise UserError(f"{where}: {path} is not a folder, where one is to be made: move it away")
        if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
            raise UserError(f"{where}: {path} is not writable: change its permissions or choose another folder")


@contextlib.contextmanager
def attempt(failed: list[str]) -> Iterator[None]:
    """Runs the body, which writes one of several outputs; a fault of the machine does not lose the others.

    Args:
      failed: gets the fault in one sentence.
    """
    try:
        yield
    except Exception as error:
        text = fault(error)
        if text is None:
            raise
        failed.append(text)


def finish(failed: Sequence[str]) -> None:
    """Ends a command some of whose outputs could not be written.

    Raises:
      UserError: if there are any; the first three are named.
    """
    if failed:
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise UserError(f"{'; '.join(failed[:3])}{more}; the other results are written: run the same command again")


@contextlib.contextmanager
def lock(path: str | Path, busy: str, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock while the body runs: one process at a time has it, on any host that shares the file system.

    The lock of a process that ends or is killed is free again. Where the file system has no locks, a file with the
    number and host of the process stands for the lock; if that process was killed on another host, the file must be
    deleted by hand, and the message says so.

    Args:
      path: the file of the lock; it stays.
      busy: the message if another process has the lock, as in 'workdir: another process trains in runs/x'.
      wait: log `busy` as a warning and wait, instead of refusing.

    Raises:
      UserError: another process has the lock, and `wait` is False.
      OSError: the file cannot be created.
    """
    held: filelock.BaseFileLock = filelock.FileLock(path, fallback_to_soft=False)
    try:
        _acquire(held, busy, wait)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        marker = f"{path}.owner"
        held = filelock.SoftFileLock(marker)
        _acquire(held, f"{busy} (if no such process runs any more, delete {marker})", wait)
    try:
        yield
    finally:
        held.release()


def _acquire(held: filelock.BaseFileLock, busy: str, wait: bool) -> None:
    try:
        held.acquire(timeout=_STALE)
    except filelock.Timeout:
        if not wait:
            raise UserError(busy) from None
        logging.warning("%s", busy)
        held.acquire()


def cache_root() -> Path:
    """The folder of prepared data and compiled programs: $KDJAX_CACHE, else ~/.cache/kdjax."""
    return Path(os.environ.get("KDJAX_CACHE") or Path.home() / ".cache" / "kdjax").expanduser()
