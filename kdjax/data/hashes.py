"""SHA-256 of files: of those that data is prepared from, and of what was prepared and is read back.

The hash of a source file is computed again only if the file may have changed. Trusted is the file system: a file whose
size, inode, time of modification and time of change (of its inode) are those of the last time has the content of the
last time. The time of change cannot be set back, so another image with the size and time of the old one is noticed.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kdjax import files
from kdjax.errors import UserError

Known = Mapping[str, tuple[list[int] | None, str]]  # by name: state of the file, hash; None: the state is too young

Json = Any  # the content of a json file

_SEAL = "sha256.json"
_YOUNG = 2 * 10**9  # ns; a file that changed so shortly before may change again without a new time


def of_file(path: str | Path) -> str:
    """SHA-256 of a file's content.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def of_bytes(content: bytes) -> str:
    """SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()


def changed(path: str | Path) -> UserError:
    """What to raise if a source file is not any more what was hashed."""
    return UserError(f"{path}: has changed while the data is prepared: run the same command again")


def together(digests: Iterable[str]) -> str:
    """One hash of several, in their order."""
    return of_bytes("\n".join(digests).encode())


def of_files(paths: Mapping[str, str], known: Known, title: str) -> Known:
    """The hashes of files, in the order of `paths`.

    Args:
      paths: by a name of each.
      known: from an earlier call, or from `recall`.
      title: of the progress bar.

    Raises:
      UserError: a file cannot be read.
    """
    now = time.time_ns()
    states = {name: _state(path) for name, path in paths.items()}
    unsure = [name for name in paths if name not in known or known[name][0] != states[name]]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        computed = pool.map(lambda name: of_file(paths[name]), unsure)
        bar = tqdm(computed, title, len(unsure), unit="file", disable=None if unsure else True)
        fresh = dict(zip(unsure, bar, strict=True))
    return {
        name: (state if state[2] < now - _YOUNG else None, fresh.get(name) or known[name][1])
        for name, state in states.items()
    }


def _state(path: str) -> list[int]:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def recall(memory: Path) -> Known:
    """The hashes that `save` wrote; none if the file is missing or damaged."""
    try:
        head, _, body = memory.read_bytes().partition(b"\n")
    except OSError:
        return {}
    if head != of_bytes(body).encode():
        return {}
    return {name: (state, known) for name, (state, known) in json.loads(body).items()}


def save(memory: Path, known: Known) -> None:
    """Writes hashes for `recall`, with a hash of their own. A folder that cannot be written remembers nothing."""
    body = json.dumps(known).encode()
    with contextlib.suppress(OSError):
        files.write_bytes(memory, of_bytes(body).encode() + b"\n" + body)


def seal(folder: Path) -> None:
    """Writes the hashes of all files of a prepared folder, apart from the records, which have their own inside."""
    beside = [path for path in sorted(folder.rglob("*")) if path.is_file() and "array_record" not in path.name]
    listed = {path.relative_to(folder).as_posix(): of_file(path) for path in beside}
    (folder / _SEAL).write_text(json.dumps(listed))


def sealed(folder: Path) -> dict[str, str]:
    """The hashes that `seal` wrote, by path in the folder.

    Raises:
      UserError: they are damaged or missing.
    """
    path = folder / _SEAL
    try:
        listed = json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise damaged(path, folder) from None
    if not isinstance(listed, dict):
        raise damaged(path, folder)
    return listed


def read_json(path: Path) -> Json:
    """The content of a json of a sealed folder.

    Raises:
      UserError: it is missing, or is not what was written.
    """
    try:
        content = path.read_bytes()
    except OSError:
        raise damaged(path, path.parent) from None
    if of_bytes(content) != sealed(path.parent).get(path.name):
        raise damaged(path, path.parent)
    return json.loads(content)


def checked(path: Path) -> Json:
    """`read_json`, after a check of what lies in the subfolders: features of the records and names of the classes."""
    for name, expected in sealed(path.parent).items():
        other = path.parent / name
        if other.parent != path.parent and not (other.is_file() and of_file(other) == expected):
            raise damaged(other, path.parent)
    return read_json(path)


def damaged(path: Path | str, folder: Path) -> UserError:
    """What to raise if something in a prepared folder cannot be used."""
    return UserError(f"{path}: prepared data is damaged or missing: delete {folder} to have it prepared again")
