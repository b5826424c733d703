"""Makes batches ahead of time, in threads or in worker processes.

Grain prefetches the batches. It is imported where it is used, because it imports jax; worker processes only decode and
augment, and import neither.
"""

import concurrent.futures
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import cv2

from kdjax.data.build import Arrays, Builder, stack

if TYPE_CHECKING:
    import grain

Attach = Callable[[list[Any], Arrays], dict[str, Any]]


class Batches:
    """Iterator over the batches that `builder` makes of the plans of a Grain data set.

    Every worker process makes the same part of every batch. `together` neighbouring rows stay in one worker because
    they share what the builder keeps in memory; without workers, more than one such row means a single thread.

    Grain's own worker processes are not used: they leave shared memory behind, or end slowly, when an iterator is
    closed early.
    """

    decoded: int  # number of images that were decoded for the batches returned so far

    def __init__(
        self,
        plans: "grain.MapDataset[Any]",
        builder: Builder,
        *,
        workers: int,
        together: int = 1,
        attach: Attach | None = None,
    ) -> None:
        """Starts the worker processes and threads.

        Args:
          plans: element k lists the rows of batch k.
          builder: makes rows.
          workers: number of processes; 0 makes the batches in threads of this one.
          together: rows that stay in one worker.
          attach: (plan, batch) -> what the batch is to be; called in the threads of this process, ahead of time.
        """
        import grain

        self.decoded = 0
        self._builder = builder
        self._pools = [
            concurrent.futures.ProcessPoolExecutor(
                1,
                mp_context=multiprocessing.get_context("spawn"),  # a fork would copy the trainer's threads and devices
                initializer=_start_worker,
                initargs=(builder,),
            )
            for _ in range(workers)
        ]
        make, threads = functools.partial(_build_here, builder), 2 if together == 1 else 1
        if workers:
            # The threads only wait; with three, no worker waits until another has finished its part of a batch.
            make, threads = functools.partial(_build_in_workers, self._pools, together), 3
        if attach:
            make = functools.partial(_attached, make, attach)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
        self._batches = iter(plans.map(make).to_iter_dataset(options))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Any]:
        try:
            batch, decoded = next(self._batches)
        except StopIteration:
            self._end_workers()
            raise
        self.decoded += decoded
        return batch

    def close(self) -> None:
        """Ends the threads and worker processes; may be called more than once."""
        self._batches.close()
        self._end_workers()

    def _end_workers(self) -> None:
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)
        self._builder.images.close()


class Beside:
    """Iterator over the batches of one `Batches`, each with a batch of another one inside."""

    def __init__(self, batches: Batches, other: Batches, name: str, fields: Sequence[str]) -> None:
        """Takes both over: `close` ends them.

        Args:
          batches: what is iterated over.
          other: whose batch k is put into batch k.
          name: under which it is there.
          fields: that are kept of it.
        """
        self._both, self._name, self._fields = (batches, other), name, tuple(fields)

    @property
    def decoded(self) -> int:
        """Number of images that were decoded for the batches returned so far."""
        return sum(one.decoded for one in self._both)

    def __iter__(self) -> "Beside":
        return self

    def __next__(self) -> dict[str, Any]:
        batch, other = next(self._both[0]), next(self._both[1])
        return batch | {self._name: {field: other[field] for field in self._fields}}

    def close(self) -> None:
        """Ends the threads and worker processes of both."""
        for one in self._both:
            one.close()


def _attached(
    make: Callable[[list[Any]], tuple[Arrays, int]], attach: Attach, plan: list[Any]
) -> tuple[dict[str, Any], int]:
    """The batch of a plan with what is attached to it, and the number of images that were decoded for it."""
    batch, decoded = make(plan)
    return attach(plan, batch), decoded


def _build_here(builder: Builder, plan: list[Any]) -> tuple[Arrays, int]:
    """The batch of a plan, and the number of images that were decoded for it."""
    return stack(builder(plan)), builder.images.newly_decoded()


def _build_in_workers(
    pools: list[concurrent.futures.ProcessPoolExecutor], together: int, plan: list[Any]
) -> tuple[Arrays, int]:
    """`_build_here`; every worker makes a part of the rows."""
    count = -(-len(plan) // together)
    bounds = [min(count * i // len(pools) * together, len(plan)) for i in range(len(pools) + 1)]
    futures = [pool.submit(_build_part, plan[a:b]) for pool, a, b in zip(pools, bounds, bounds[1:], strict=False)]
    parts = [future.result() for future in futures]
    return stack([row for rows, _ in parts for row in rows]), sum(decoded for _, decoded in parts)


_builder: Builder | None = None  # of this worker process


def _start_worker(builder: Builder) -> None:
    global _builder
    _builder = builder
    os.environ["JAX_PLATFORMS"] = "cpu"  # should anything here ever initialise jax, then not on the accelerator
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()  # Ctrl-C, or a signal to the whole group, is for the trainer
    cv2.setNumThreads(1)
    # A trainer that is killed cannot end its workers.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _build_part(plan: list[Any]) -> tuple[list[Arrays], int]:
    assert _builder is not None
    return _builder(plan), _builder.images.newly_decoded()
