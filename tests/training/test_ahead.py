"""The thread in which a teacher on the host is ahead of the step."""

import threading
import time

import numpy as np
import pytest

from kdjax.distill.teachers import RECORDED
from kdjax.training.ahead import DEPTH, Ahead


class Loader:
    """Batches 0, 1, 2, ...; it counts those that were taken."""

    def __init__(self, count: int = 1000) -> None:
        self.decoded, self.count, self.closed = 0, count, False

    def __iter__(self):
        return self

    def __next__(self):
        if self.decoded == self.count:
            raise StopIteration
        self.decoded += 1
        return {"image": np.array([self.decoded - 1])}

    def close(self):
        self.closed = True


def threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "teacher on the host"]


def test_batches_come_in_order_with_what_the_teacher_says():
    loader = Loader(5)
    batches = Ahead(loader, lambda batch: batch | {RECORDED: batch["image"] * 10})
    found = list(batches)
    assert [(int(batch["image"][0]), int(batch[RECORDED][0])) for batch in found] == [(k, 10 * k) for k in range(5)]
    assert batches.decoded == 5 and not list(batches)
    batches.close()
    assert loader.closed and not threads()


def test_the_thread_works_while_the_step_runs_but_not_far_ahead():
    loader = Loader()
    batches = Ahead(loader, lambda batch: batch)
    next(batches)
    deadline = time.monotonic() + 10
    while loader.decoded < DEPTH + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert loader.decoded == DEPTH + 2  # one given out, those that wait, one in the hand of the thread
    batches.close()
    assert not threads()


def test_an_error_of_the_teacher_reaches_the_caller_in_its_place():
    def observe(batch):
        if batch["image"][0] == 2:
            raise ValueError("of the teacher")
        return batch

    loader = Loader()
    batches = Ahead(loader, observe)
    assert [int(next(batches)["image"][0]) for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="of the teacher"):
        next(batches)
    batches.close()
    assert loader.closed and not threads()


def test_closing_ends_a_thread_that_waits_or_works():
    entered, leave = threading.Event(), threading.Event()

    def observe(batch):
        entered.set()
        leave.wait(10)
        return batch

    working = Ahead(Loader(), observe)
    entered.wait(10)
    threading.Timer(0.1, leave.set).start()
    working.close()
    waiting = Ahead(Loader(), lambda batch: batch)
    time.sleep(0.1)
    waiting.close()
    waiting.close()
    assert not threads()
