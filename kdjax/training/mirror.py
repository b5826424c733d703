"""A workdir in an object store: a run writes in a folder of this machine, which a thread uploads.

The store counts: a run begins with what is there, unless this machine wrote it last and may have more. A checkpoint
counts as uploaded when `uploaded.json` lists its files; those that it replaces are removed after that.
"""

import contextlib
import json
import secrets
import shutil
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kdjax import files, remote
from kdjax.errors import UserError, fault

_WRITER, _INDEX = "writer.json", "uploaded.json"  # objects in the store
_STEPS = "checkpoints"
_ATTEMPTS = 3  # of the last upload


class Mirror:
    """A folder of this machine and its address in a store."""

    def __init__(self, url: str) -> None:
        """Knows the address; nothing is read yet.

        Args:
          url: as in "gs://bucket/runs/a".

        Raises:
          UserError: there is no package for it.
        """
        with _where():
            self.system, self.top = remote.opened(url)
        self.url, self.folder = url.rstrip("/"), remote.copy_of(url, "workdirs")
        self.mine = ""  # who writes to the store: this object, once `claim` was called
        self.sent: dict[str, tuple[int, int]] = {}  # size and time (ns) of the files that are in the store as they are
        self.steps: dict[str, dict[str, int]] = {}  # names and sizes of the files of each uploaded checkpoint
        self.thread = futures.ThreadPoolExecutor(1, thread_name_prefix="upload")
        self.running: futures.Future[None] | None = None

    @property
    def _last(self) -> Path:
        """The file that says who of this machine wrote last."""
        return self.folder.parent / _WRITER

    def pull(self) -> None:
        """Brings the folder to what is in the store; only the checkpoints that are whole there.

        Raises:
          UserError: the store cannot be read.
        """
        with _where(), remote.told(self.url, "read"):
            self.steps = self._json(_INDEX).get("steps", {})
            writer = self._json(_WRITER).get("id")
            with contextlib.suppress(OSError, ValueError):
                if writer and self.folder.is_dir() and json.loads(self._last.read_text())["id"] == writer:
                    return  # this machine wrote last, and may have what is not in the store yet
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            found = {} if not self.system.exists(self.top) else self.system.find(self.top, detail=True)
            sizes = {path.removeprefix(self.top).strip("/"): info["size"] for path, info in found.items()}
            remote.check_names(self.url, sizes)
            whole = {step for step, listed in self.steps.items() if listed.items() <= sizes.items()}
            self.steps = {step: self.steps[step] for step in whole}
            for name in sizes:
                step = _step_of(name)
                if name in ("", _WRITER, _INDEX) or (step and name not in self.steps.get(step, {})):
                    continue
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                self.system.get_file(f"{self.top}/{name}", str(path))
                self.sent[name] = _state(path)

    def claim(self) -> None:
        """Makes this process the one that writes: another one that did so stops at its next upload.

        Raises:
          UserError: the store cannot be written.
        """
        self.mine = secrets.token_hex(8)
        with _where(), remote.told(self.url, "written"):
            self._write_json(_WRITER, {"id": self.mine})
        self._last.write_text(json.dumps({"id": self.mine}))

    def start(self) -> None:
        """Uploads in a thread what has changed, if it is idle; warns of a failure, and tries again at the next call."""
        if self.running is None or self.running.done():
            self.check()
            self.running = self.thread.submit(self._try)

    def check(self) -> None:
        """Does not wait.

        Raises:
          UserError: another process writes to the store by now.
        """
        if self.running and self.running.done():
            self.running.result()

    def finish(self) -> None:
        """Uploads what has changed, and waits for it.

        Raises:
          UserError: another process writes to the store, or it cannot be written.
        """
        self.thread.shutdown()
        if not self.mine:
            return
        for attempt in range(_ATTEMPTS):
            try:
                self._push()
            except _Taken:
                raise
            except UserError as error:
                if attempt == _ATTEMPTS - 1:
                    raise UserError(
                        f"{error}; the rest is in {self.folder}: the same command on this machine uploads it"
                    ) from error
            else:
                return

    def _try(self) -> None:
        try:
            self._push()
        except _Taken:
            raise
        except UserError as error:
            tqdm.write(f"kdjax: {error}; it is tried again with the next checkpoint", file=sys.stderr)

    def _push(self) -> None:
        """Uploads what has changed since the last time, and removes what is gone."""
        with _where(), remote.told(self.url, "written"):
            writer = self._json(_WRITER).get("id")
            if writer != self.mine:
                raise _Taken(f"{self.url}: another process has begun to write there: this one ends")
            here = {path.relative_to(self.folder).as_posix(): path for path in _files(self.folder)}
            by_step: dict[str, dict[str, Path]] = {}
            for name, path in here.items():
                if step := _step_of(name):
                    by_step.setdefault(step, {})[name] = path
            for step, parts in by_step.items():
                if step not in self.steps:
                    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile: the rules did not name it
                        for name, path in parts.items():
                            self.system.put_file(str(path), f"{self.top}/{name}")
                        self.steps[step] = {name: path.stat().st_size for name, path in parts.items()}
            gone = {step: self.steps.pop(step) for step in [*self.steps] if step not in by_step}
            self._write_json(_INDEX, {"steps": self.steps})
            for name, path in here.items():
                if _step_of(name):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    state = _state(path)
                    if self.sent.get(name) != state:
                        self.system.pipe_file(f"{self.top}/{name}", path.read_bytes())
                        self.sent[name] = state
            lost = [name for listed in gone.values() for name in listed]
            lost += [name for name in self.sent if name not in here]
            for name in lost:
                with contextlib.suppress(FileNotFoundError):
                    self.system.rm_file(f"{self.top}/{name}")
                self.sent.pop(name, None)

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads(self.system.cat_file(f"{self.top}/{name}"))
        except FileNotFoundError:
            return {}
        except ValueError:
            raise UserError(f"{self.url}/{name} is damaged: delete it, or choose another address") from None

    def _write_json(self, name: str, value: object) -> None:
        self.system.pipe_file(f"{self.top}/{name}", json.dumps(value).encode())


class _Taken(UserError):
    """Another process writes to the store."""


@contextlib.contextmanager
def opened(workdir: str | Path | None) -> Iterator[tuple[str | Path | None, Mirror | None]]:
    """The folder in which a run writes, and what keeps it up in a store; None for a folder of this machine.

    When the context is left, all that is in the folder is in the store. After an exception it only warns of a
    failure of that, which would hide the exception.

    Args:
      workdir: a folder or an address.

    Raises:
      UserError: the store cannot be read or written, or another process of this machine runs at the address.
    """
    if not remote.is_url(workdir):
        yield workdir, None
        return
    mirror = Mirror(str(workdir))
    mirror.folder.parent.mkdir(parents=True, exist_ok=True)
    busy = (
        f"workdir: another process of this machine trains at {workdir}: wait until it ends, or choose another address"
    )
    with files.lock(mirror.folder.parent / ".lock", busy):
        mirror.pull()
        try:
            yield mirror.folder, mirror
        except BaseException:
            try:
                mirror.finish()
            except (UserError, OSError) as error:
                tqdm.write(f"kdjax: {fault(error) or error}", file=sys.stderr)
            raise
        mirror.finish()


@contextlib.contextmanager
def _where() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if not str(error).startswith("workdir: "):
            error.args = (f"workdir: {error}",)
        raise


def _step_of(name: str) -> str:
    """The checkpoint to which a file belongs, as its number; "" if to none."""
    parts = name.split("/")
    return parts[1] if len(parts) > 2 and parts[0] == _STEPS and parts[1].isdecimal() else ""


def _files(folder: Path) -> list[Path]:
    """All files that are whole: no locks, none that are still written, of checkpoints those with a number."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        in_a_step = name.startswith(f"{_STEPS}/") and name.count("/") > 1
        is_whole = _step_of(name) if in_a_step else not any(part.startswith(".") for part in name.split("/"))
        if is_whole and path.is_file():
            found.append(path)
    return found


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
