"""Training batches with what a teacher on the host says about them, computed ahead of the step in a thread.

The device works on one step while the host's teacher predicts on the next batches. A batch is a function of (seed,
step) and the teacher of the batch, so that nothing depends on how far the thread is ahead.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kdjax.data import Batches, Beside

DEPTH = 2  # batches that wait for the step, at most


class Ahead:
    """An iterator over the batches of a loader, each with what the teachers on the host say about it."""

    def __init__(self, batches: Batches | Beside, add: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        """Starts the thread.

        Args:
          batches: of `kdjax.data.train_batches`; closed with this iterator.
          add: batch -> the batch with what is said about it, in NumPy; it is called in the thread.
        """
        self.batches = batches
        self._add = add
        self._ready: queue.Queue[dict[str, Any] | BaseException] = queue.Queue(DEPTH)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="teacher on the host", daemon=True)
        self._thread.start()

    @property
    def decoded(self) -> int:
        """Images that the loader has decoded so far."""
        return self.batches.decoded

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch.

        Raises:
          Whatever the loader or the teacher raised.
        """
        if self._stop.is_set():
            raise StopIteration
        found = self._ready.get()
        if isinstance(found, BaseException):
            self._stop.set()
            raise found
        return found

    def close(self) -> None:
        """Ends the thread after the batch that it works on, and closes the loader."""
        self._stop.set()
        while self._thread.is_alive():
            self._drop()
            self._thread.join(0.05)
        self._drop()
        self.batches.close()

    def _drop(self) -> None:
        """Makes room for what the thread may still want to put."""
        try:
            while True:
                self._ready.get_nowait()
        except queue.Empty:
            pass

    def _work(self) -> None:
        try:
            for batch in self.batches:
                if self._stop.is_set():
                    return
                self._ready.put(self._add(batch))
                if self._stop.is_set():
                    return
            self._ready.put(StopIteration())
        except BaseException as error:  # it belongs to whoever asks for the next batch
            self._ready.put(error)
