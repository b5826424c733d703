"""Decoded images in memory that all processes of a host share: what fits a budget is decoded once.

Each image has its place from the start, so that processes need not talk to each other: whoever decodes an image first
writes it there. Two that do so at once write the same bytes.
"""

import contextlib
import mmap
import os
import tempfile
from typing import NamedTuple

import numpy as np

from kdjax import machine
from kdjax.errors import UserError

GIB = 2**30


class Forecast(NamedTuple):
    """How much of a split a budget holds."""

    kept: int  # images, the first ones of the split
    bytes: int  # that they take
    images: int  # of the split
    whole: int  # bytes that all of them take

    def __str__(self) -> str:
        if self.kept == self.images:
            return f"all {self.images:,} images stay decoded in memory: {self.bytes / GIB:.2f} GiB"
        return (
            f"{self.kept:,} of {self.images:,} images stay decoded in memory: {self.bytes / GIB:.2f} of the "
            f"{self.whole / GIB:.2f} GiB that all would take"
        )


def forecast(sizes: np.ndarray, budget: float) -> Forecast:
    """What a budget in GiB holds of images of sizes i32[N, 2] (height, width), px.

    Example:
      >>> print(forecast(np.array([[480, 640]] * 2000), 1.0))
      1,165 of 2,000 images stay decoded in memory: 1.00 of the 1.72 GiB that all would take
    """
    ends = np.cumsum(sizes.astype(np.int64).prod(-1) * 3)
    count = int(np.searchsorted(ends, budget * GIB, side="right"))
    return Forecast(count, int(ends[count - 1]) if count else 0, len(ends), int(ends[-1]) if len(ends) else 0)


def check_memory(expected: Forecast) -> None:
    """Checks that the machine can hold what is to be kept.

    Raises:
      UserError: it has less memory, or this process may have less.
    """
    memory = machine.memory()
    if expected.bytes > memory:
        raise UserError(
            f"keep: {expected.bytes / GIB:.1f} GiB of decoded images do not fit the {memory / GIB:.1f} GiB of this "
            "machine's memory: set fewer GiB"
        )


class Kept:
    """The first images of a split that fit a budget; each is written once and read by all processes.

    A pickled copy in another process of this machine shares the memory, until the process that made it calls `close`.
    """

    def __init__(self, sizes: np.ndarray, budget: float) -> None:
        """Takes the address space; memory is used as images are written.

        Args:
          sizes: i32[N, 2] height and width of the images of the split, px.
          budget: GiB.
        """
        self._sizes = sizes[: forecast(sizes, budget).kept]
        self._path, self._file = "", -1
        if len(self._sizes):
            self._file, self._path = _shared_file()
        self._attach()

    def __reduce__(self) -> tuple[object, ...]:
        return _attached, (self._sizes, self._path)

    def __contains__(self, index: int) -> bool:
        """Whether the image has a place."""
        return index < len(self._sizes)

    def get(self, index: int) -> np.ndarray | None:
        """The image u8[h, w, 3] at a position, not writeable; None if it is not there (yet)."""
        memory = self._memory
        if memory is None or index not in self or not memory[index]:
            return None
        return self._place(memory, index)

    def put(self, index: int, image: np.ndarray) -> np.ndarray:
        """Keeps an image if it has a place and the size that was announced; returns what is kept, or the image."""
        memory = self._memory
        if memory is None or index not in self or image.shape != (*self._sizes[index], 3):
            return image
        place = self._place(memory, index)
        place.flags.writeable = True
        place[...] = image
        place.flags.writeable = False
        memory[index] = 1  # after the pixels
        return place

    def close(self) -> None:
        """Gives the memory back, once nobody uses an image of it any more; may be called more than once."""
        self._memory = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            if not self._path.startswith("/proc/"):
                with contextlib.suppress(OSError):  # Windows keeps a file that is in use
                    os.unlink(self._path)

    def _place(self, memory: np.ndarray, index: int) -> np.ndarray:
        place = memory[self._starts[index] : self._starts[index + 1]].reshape(*self._sizes[index], 3)
        place.flags.writeable = False
        return place

    def _attach(self) -> None:
        """Maps the file: a byte an image that says whether it is there, and then the images."""
        bytes_of = self._sizes.astype(np.int64).prod(-1) * 3
        self._starts = len(bytes_of) + np.concatenate([[0], np.cumsum(bytes_of)])
        self._memory: np.ndarray | None = None
        if self._path:
            with open(self._path, "r+b") as file:
                if self._file >= 0:
                    file.truncate(int(self._starts[-1]))
                self._memory = np.frombuffer(mmap.mmap(file.fileno(), int(self._starts[-1])), np.uint8)


def _attached(sizes: np.ndarray, path: str) -> Kept:
    """The memory of another process."""
    found = Kept.__new__(Kept)
    found._sizes, found._path, found._file = sizes, path, -1
    found._attach()
    return found


def _shared_file() -> tuple[int, str]:
    """A file in memory, which ends with the process, where there are such files; else a temporary one."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("kdjax decoded images")
        return file, f"/proc/{os.getpid()}/fd/{file}"
    return tempfile.mkstemp(prefix="kdjax_decoded_")
