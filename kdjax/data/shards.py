"""Arrays of numbered entries on disk: what a teacher said about the rows of training batches.

A folder holds `cache.json`, which says what the entries are, ArrayRecord files of up to `shard` entries each, and
`index.json`, which lists the complete ones with their size and hash. A file is written under another name and renamed
when it is complete, so that writing continues with the first file that is missing; other processes read meanwhile. A
record is the number of its entry and the bytes of its arrays, one after the other.

Arrays of float32 may be stored shorter (`DTYPES`); all others are stored as they are:

- bfloat16: rounded to the nearest; the error is at most 2^-8 of the value.
- int8: of each channel (the last axis; a vector is one channel) the least value and the step, a 255th of its range, and
  for each number its steps above the least; the error is at most half a step, and the rounding of float32.
- sparse: of the logits of rows (`LOGITS`) the `PAIRS` best of all rows and classes, exactly; all others become one
  logit with their mean score. A score, the sigmoid, is off by less than the least that is kept. All else is as float32.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdjax import files
from kdjax.data import hashes
from kdjax.errors import UserError

FORMAT = 1
DTYPES = ("float32", "bfloat16", "int8", "sparse")
LOGITS = "rows/logits"  # the array of which sparse keeps the best
PAIRS = 1000  # of a row and a class, that sparse keeps of an entry
ENTRIES, BYTES = 1024, 2**28  # of a file, at most
_NOTE, _INDEX = "cache.json", "index.json"
_NUMBER = np.dtype("<i8")  # of the entry, at the beginning of a record
_OPEN = 256  # files that are open at a time
_BLOCK, _HEADERS = 2**16, 128  # bytes of ArrayRecord's blocks, whose number in a file is whole; and beside a record


class Leaf(NamedTuple):
    """One array of every entry."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Missing(NamedTuple):
    """A file that is to be written: its first entry and how many it has."""

    first: int
    count: int


def stored_bytes(leaf: Leaf, kind: str) -> int:
    """The bytes that an array takes in a record; `kind` is one of `DTYPES`."""
    count = math.prod(leaf.shape)
    if _sparse(leaf, kind):
        return 8 * PAIRS + 4
    if not _shortened(leaf, kind):
        return count * np.dtype(leaf.dtype).itemsize
    return 2 * count if kind == "bfloat16" else count + 8 * _channels(leaf)


def encode(value: np.ndarray, leaf: Leaf, kind: str) -> bytes:
    """The stored bytes of an array.

    Raises:
      UserError: a value of a channel is not finite, so that it has no steps or no order.
    """
    if _sparse(leaf, kind):
        return _best(value.reshape(-1), leaf)
    if not _shortened(leaf, kind):
        return np.ascontiguousarray(value).tobytes()
    if kind == "bfloat16":
        bits = np.ascontiguousarray(value).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(value), np.uint32(0x7FC0), rounded).astype(np.uint16).tobytes()
    columns = value.reshape(-1, _channels(leaf))
    least, most = columns.min(0), columns.max(0)
    if not (np.isfinite(least).all() and np.isfinite(most).all()):
        raise UserError(f"{leaf.name}: it is not finite: it cannot be stored as int8")
    step = ((most.astype(np.float64) - least) / 255).astype(np.float32)
    above = (columns.astype(np.float64) - least) / np.where(step > 0, step, 1)
    return b"".join((least.tobytes(), step.tobytes(), np.clip(np.rint(above), 0, 255).astype(np.uint8).tobytes()))


def decode(stored: memoryview, leaf: Leaf, kind: str) -> np.ndarray:
    """The array of some stored bytes: what `encode` was given, within the bound of `kind`."""
    if _sparse(leaf, kind):
        numbers = np.frombuffer(stored, np.float32)
        array = np.full(math.prod(leaf.shape), numbers[0])
        array[numbers[1 : PAIRS + 1].view(np.uint32)] = numbers[PAIRS + 1 :]
        return array.reshape(leaf.shape)
    if not _shortened(leaf, kind):
        return np.frombuffer(stored, leaf.dtype).reshape(leaf.shape)
    if kind == "bfloat16":
        return (np.frombuffer(stored, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(leaf.shape)
    channels = _channels(leaf)
    least, step = np.frombuffer(stored[: 8 * channels], np.float32).reshape(2, channels)
    above = np.frombuffer(stored[8 * channels :], np.uint8).reshape(-1, channels)
    return (least + above * step).reshape(leaf.shape)


def _best(logits: np.ndarray, leaf: Leaf) -> bytes:
    """The logit of the others, the places of the best logits, and these, of logits f32[n]."""
    if not np.isfinite(logits).all():
        raise UserError(f"{leaf.name}: it is not finite: it cannot be stored as sparse")
    places = np.sort(np.argpartition(-logits, PAIRS - 1)[:PAIRS])
    others = np.delete(logits, places).astype(np.float64)
    # log(mean sigmoid / (1 - mean sigmoid)), where no exponential overflows.
    on, off = (np.logaddexp.reduce(-np.logaddexp(0, sign * others)) for sign in (-1, 1))
    parts = (np.float32(on - off), places.astype(np.uint32), logits[places])
    return b"".join(np.asarray(part).tobytes() for part in parts)


def _sparse(leaf: Leaf, kind: str) -> bool:
    """Whether only the best of an array are stored: logits that are more than those and their places."""
    return kind == "sparse" and leaf.name == LOGITS and math.prod(leaf.shape) > 2 * PAIRS + 1


def _shortened(leaf: Leaf, kind: str) -> bool:
    return kind in ("bfloat16", "int8") and leaf.dtype == "float32" and bool(leaf.shape)


def _channels(leaf: Leaf) -> int:
    return leaf.shape[-1] if len(leaf.shape) > 1 else 1


@dataclasses.dataclass(frozen=True)
class Shards:
    """The entries of a folder: reading by number, and writing file by file.

    Attributes:
      folder: of the cache.
      leaves: the arrays of an entry, in their order in a record.
      kind: how they are stored, one of `DTYPES`.
      shard: entries of a file.
      span: the last file before a multiple of this number of entries ends there; 0: there are no such places.
      facts: what the entries depend on, by name; values that json can hold.
      origin: how they were computed; not compared.
    """

    folder: Path
    leaves: tuple[Leaf, ...]
    kind: str
    shard: int
    span: int
    facts: Mapping[str, Any]
    origin: Mapping[str, Any]

    @property
    def entry_bytes(self) -> int:
        """The bytes of a record."""
        return _NUMBER.itemsize + sum(stored_bytes(leaf, self.kind) for leaf in self.leaves)

    def missing(self, needed: Iterable[range]) -> list[Missing]:
        """The files that are to be written, so that there are these entries.

        Raises:
          UserError: a file has another size than when it was written.
        """
        listed, missing = self.listed(), []
        for one in needed:
            for start in range(self._file_of(one.start)[0], one.stop, self.shard):
                path, count = self.path(start), min(start + self.shard, one.stop) - start
                known = listed.get(path.name, {"entries": 0})
                if known["entries"] < count or not path.exists():
                    missing.append(Missing(start, count))
                elif path.stat().st_size != known["bytes"]:
                    raise self._damaged(path)
        return missing

    def _file_of(self, entry: int) -> tuple[int, int]:
        """The first entry of the file of an entry, and the place of the entry in it."""
        begin, place = divmod(entry, self.span) if self.span else (0, entry)
        part, index = divmod(place, self.shard)
        return begin * self.span + part * self.shard, index

    def path(self, first: int) -> Path:
        """The file that begins with an entry."""
        return self.folder / f"entries-{first:010d}.array_record"

    def listed(self) -> dict[str, Any]:
        """The complete files by name: {"entries", "bytes", "sha256", "seconds"}; older ones have no seconds.

        Raises:
          UserError: the list is damaged.
        """
        path = self.folder / _INDEX
        return _read(path)["files"] if path.exists() else {}

    def verified(self) -> None:
        """Compares all files with their hashes.

        Raises:
          UserError: one is damaged.
        """
        for name, known in self.listed().items():
            path = self.folder / name
            if path.exists() and hashes.of_file(path) != known["sha256"]:
                raise self._damaged(path)

    def _damaged(self, path: Path) -> UserError:
        return UserError(f"{path}: it is damaged: delete this file, and the same command writes it again")

    def writer(self, one: Missing) -> "Writer":
        """Writes one file; used as a context, which seals the file if all entries were given."""
        return Writer(self, one)

    def read(self, entries: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Arrays of some entries.

        Args:
          entries: i64[B].
          names: of the arrays.

        Returns:
          Array [B, ...] by name.

        Raises:
          UserError: a file is damaged.
        """
        places: dict[int, list[tuple[int, int]]] = {}
        for row, entry in enumerate(entries.tolist()):
            first, index = self._file_of(entry)
            places.setdefault(first, []).append((row, index))
        found = {
            leaf.name: np.empty((len(entries), *leaf.shape), leaf.dtype) for leaf in self.leaves if leaf.name in names
        }
        for first, rows in places.items():
            path = self.path(first)
            try:
                records = _reader(str(path)).read([index for _, index in rows])
            except Exception:  # array_record raises many exception types
                raise self._damaged(path) from None
            for (row, index), record in zip(rows, records, strict=True):
                if len(record) != self.entry_bytes or np.frombuffer(record[:8], _NUMBER)[0] != first + index:
                    raise self._damaged(path)
                view, at = memoryview(record), _NUMBER.itemsize
                for leaf in self.leaves:
                    end = at + stored_bytes(leaf, self.kind)
                    if leaf.name in found:
                        found[leaf.name][row] = decode(view[at:end], leaf, self.kind)
                    at = end
        return found


def _array_record() -> Any:  # noqa: ANN401 - a compiled module without types
    return importlib.import_module("array_record.python.array_record_module")


@functools.lru_cache(_OPEN)
def _reader(path: str) -> Any:  # noqa: ANN401 - array_record has no types
    return _array_record().ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=2**15)


class Writer:
    """One file of `Shards`; entries are given in their order."""

    def __init__(self, shards: Shards, one: Missing) -> None:
        self._shards, self._one, self._given, self._since = shards, one, 0, 0.0
        self._partial = shards.folder / f".{shards.path(one.first).name}.partial"
        self._file = _array_record().ArrayRecordWriter(str(self._partial), "group_size:1,uncompressed")

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Appends the next entry.

        Args:
          arrays: by name, of the shapes and dtypes of the leaves.
        """
        shards = self._shards
        if not self._given:  # what comes before it compiles programs and starts workers
            self._since = time.perf_counter()
        parts = [np.array(self._one.first + self._given, _NUMBER).tobytes()]
        for leaf in shards.leaves:
            value = arrays[leaf.name]
            assert (value.shape, str(value.dtype)) == (leaf.shape, leaf.dtype), leaf
            parts.append(encode(value, leaf, shards.kind))
        self._file.write(b"".join(parts))
        self._given += 1

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            with contextlib.suppress(Exception):  # the first error counts
                self._file.close()
            return
        self._file.close()
        assert self._given == self._one.count, "not all entries of the file were given"
        target = self._shards.path(self._one.first)
        known = {
            "entries": self._one.count,
            "bytes": self._partial.stat().st_size,
            "sha256": hashes.of_file(self._partial),
            "seconds": round(time.perf_counter() - self._since, 3),  # from its first entry on
        }
        os.replace(self._partial, target)
        listed = self._shards.listed() | {target.name: known}
        files.write_json(self._shards.folder / _INDEX, files.sealed({"files": listed}))
        _reader.cache_clear()  # one may have read the file that was replaced


def file_entries(entry_bytes: int, together: int) -> int:
    """How many entries a file gets: a multiple of `together`, at most `ENTRIES` and about `BYTES` if that is more."""
    return max(min(ENTRIES, BYTES // entry_bytes) // together, 1) * together


def forecast(entry_bytes: int, missing: Sequence[Missing]) -> int:
    """The bytes on disk of files that are to be written."""
    blocks = [math.ceil(one.count * (entry_bytes + _HEADERS) * 1.001 / _BLOCK) + 2 for one in missing]
    return sum(blocks) * _BLOCK


def room(folder: Path) -> int:
    """The free bytes of the disk on which a folder is, or is to be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def make_folder(folder: Path) -> None:
    """Makes the folder of a cache, if it does not exist.

    Raises:
      UserError: it cannot be written, or holds something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be created ({error.strerror}): choose another folder") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} is not writable: change its permissions or choose another folder")
    others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if others and _NOTE not in others:
        raise UserError(f"{folder} holds other files ({others[0]}): choose a new folder")


def create(shards: Shards) -> Shards:
    """Writes what an empty folder will hold."""
    note = dataclasses.asdict(shards) | {"format": FORMAT}
    del note["folder"]
    files.write_json(shards.folder / _NOTE, files.sealed(json.loads(json.dumps(note))))
    return shards


def find(folder: Path) -> Shards | None:
    """What a folder holds; None if there is no cache.

    Raises:
      UserError: it is damaged, or another version of kdjax wrote it.
    """
    path = folder / _NOTE
    if not path.exists():
        return None
    note = _read(path)
    note.pop("sha256")
    if note.pop("format") != FORMAT:
        raise UserError(f"{path}: another version of kdjax wrote it: choose another folder, or delete {folder}")
    leaves = tuple(Leaf(name, tuple(shape), dtype) for name, shape, dtype in note.pop("leaves"))
    return Shards(folder=folder, leaves=leaves, **note)


def _read(path: Path) -> dict[str, Any]:
    """A sealed json of a cache."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or files.altered(content):
        raise UserError(f"{path}: it is damaged or was changed: delete {path.parent}, and it is written again")
    return content
