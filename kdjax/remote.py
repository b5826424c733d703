"""Folders in object stores (gs://, s3://, hf:// and whatever else fsspec knows): addresses, and copies of them here.

A file is downloaded once: what fsspec says of it (size, ETag or time) is kept beside the copy, and compared each time.
"""

import contextlib
import errno
import hashlib
import json
import os
import posixpath
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
from tqdm import tqdm

from kdjax import files
from kdjax.errors import UserError

_EXTRA = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3", "hf": "hub"}  # extras of kdjax, by protocol
_STAMPS = (
    "ETag",
    "etag",
    "md5Hash",
    "generation",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
    "blob_id",
)
_HUB = re.compile(r"hf://((datasets|spaces)/)?[\w.-]+/[\w.-]+(@[^/@]+)?(/.*)?")
_TOGETHER = 64  # files of one request to fsspec, which asks for them side by side
_LIST = "files.json"
_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENAMETOOLONG}


def is_url(path: object) -> bool:
    """Whether a path is an address in an object store.

    Example:
      >>> is_url("s3://bucket/coco"), is_url("runs/a"), is_url(Path("runs/a"))
      (True, False, False)
    """
    return isinstance(path, str) and "://" in path


def copy_of(url: str, kind: str) -> Path:
    """Where the copy of an address lies.

    Args:
      url: the address.
      kind: "downloads" or "workdirs".
    """
    url = url.rstrip("/")
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    return files.cache_root() / kind / key / (posixpath.basename(url) or "bucket")


def opened(url: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it.

    Raises:
      UserError: nobody knows such addresses, or the package for them is missing.
    """
    protocol = url.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(url.rstrip("/"), use_listings_cache=False)
    except ImportError:
        extra = _EXTRA.get(protocol)
        remedy = f"pip install 'kdjax[{extra}]'" if extra else "install fsspec's package for it"
        raise UserError(f"{url}: the package that reads {protocol}:// is not installed: {remedy}") from None
    except ValueError:
        raise UserError(f"{url}: fsspec knows no addresses that begin with {protocol}://, as gs:// and s3://") from None
    return system, path


@contextlib.contextmanager
def told(url: str, what: str) -> Iterator[None]:
    """Turns what the packages of object stores raise into a sentence.

    Args:
      url: for the message.
      what: what was tried: "read".

    Raises:
      UserError: instead of anything that is no fault of this machine.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{url}: there is nothing at this address: check it, and your rights") from None
    except Exception as error:  # each store has its own classes
        if isinstance(error, OSError) and error.errno in _OF_DISKS:
            raise
        text = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"{url} cannot be {what} ({type(error).__name__}: {text}): check the address, the network and your rights"
        ) from error


def local(path: str | Path) -> str | Path:
    """A path of this machine unchanged; of an address the copy, which is brought up to date first.

    Args:
      path: a file or folder, or the address of one.

    Raises:
      UserError: nothing is there, or it cannot be read.
    """
    if not is_url(path):
        return path
    url = str(path)
    if url.startswith("hf://") and not _HUB.fullmatch(url):
        raise UserError(f"{url} is no address of the Hub: it must be hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    copy = copy_of(url, "downloads")
    copy.parent.mkdir(parents=True, exist_ok=True)
    with files.lock(copy.parent / ".lock", f"another process downloads {url}", wait=True), told(url, "read"):
        _update(url, copy)
    return copy


def check_names(url: str, names: Iterable[str]) -> None:
    """Refuses names of objects that would lead out of the folder of their copies.

    Raises:
      UserError: a name has "..", or "." as a part.
    """
    for name in names:
        if {"..", "."} & {*name.split("/")}:
            raise UserError(f"{url}: the name of an object leads out of the folder: {name}")


def _update(url: str, copy: Path) -> None:
    system, top = opened(url)
    system.invalidate_cache()
    found = system.find(top, detail=True)
    if not found:
        raise UserError(f"{url}: there is nothing at this address: check it, and your rights")
    wanted = {name.removeprefix(top).strip("/"): (name, _stamp(info)) for name, info in found.items()}
    check_names(url, wanted)
    known = _known(copy.parent / _LIST)
    have = {key for key, (_, stamp) in wanted.items() if known.get(key) == stamp and (copy / key).is_file()}
    new = [key for key in wanted if key not in have]
    if copy.is_file() != ("" in wanted):  # it was a file and is a folder, or the reverse
        _remove(copy)
    for path in [*copy.rglob("*")] if copy.is_dir() else ():
        if path.is_file() and path.relative_to(copy).as_posix() not in wanted:
            path.unlink()
    stamps = {key: known[key] for key in have}
    size = sum(int(found[wanted[key][0]].get("size") or 0) for key in new)
    with tqdm(total=size, desc=f"download {url}", unit="B", unit_scale=True, disable=not new) as bar:
        for at in range(0, len(new), _TOGETHER):
            some = new[at : at + _TOGETHER]
            parts = [_partial(copy, key) for key in some]
            for part in parts:
                part.parent.mkdir(parents=True, exist_ok=True)
            system.get([wanted[key][0] for key in some], [str(part) for part in parts])
            for key, part in zip(some, parts, strict=True):
                part.replace(copy / key)
                stamps[key] = wanted[key][1]
                bar.update(int(found[wanted[key][0]].get("size") or 0))
            files.write_json(copy.parent / _LIST, stamps)
    files.write_json(copy.parent / _LIST, stamps)


def _partial(copy: Path, key: str) -> Path:
    """Where a file is written before it is whole."""
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = copy / key
    return path.with_name(f".{name}.{os.getpid()}.tmp")


def _stamp(info: dict[str, Any]) -> list[str]:
    """What changes with an object: its size, and the first of `_STAMPS` that its store has."""
    return [str(info.get("size")), *[str(info[name]) for name in _STAMPS if info.get(name)][:1]]


def _known(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
