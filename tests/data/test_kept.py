"""Decoded images in memory that processes share: the budget, and one copy."""

import multiprocessing
import pickle

import numpy as np
import pytest

from kdjax.data import kept
from kdjax.data.kept import GIB, Kept, forecast
from kdjax.errors import UserError

SIZES = np.array([(4, 5), (7, 3), (6, 6)], np.int32)
IMAGES = [np.full((*size, 3), 10 * i + 1, np.uint8) for i, size in enumerate(SIZES)]


def test_a_budget_holds_the_first_images():
    assert forecast(SIZES, 1.0) == (3, 3 * (20 + 21 + 36), 3, 3 * 77)
    assert forecast(SIZES, 3 * 41 / GIB) == (2, 3 * 41, 3, 3 * 77)
    assert forecast(SIZES, 3 * 40 / GIB)[:2] == (1, 60) and forecast(SIZES, 0)[:2] == (0, 0)
    assert forecast(SIZES[:0], 1.0) == (0, 0, 0, 0)


def test_an_image_is_kept_as_it_is_and_cannot_be_changed():
    memory = Kept(SIZES, 3 * 41 / GIB)
    assert memory.get(1) is None and 2 not in memory
    assert memory.put(2, IMAGES[2]) is IMAGES[2] and memory.get(2) is None
    other = np.zeros((4, 6, 3), np.uint8)  # not the size that was announced
    assert memory.put(0, other) is other and memory.get(0) is None
    for index in (1, 0):
        for found in (memory.put(index, IMAGES[index]), memory.get(index)):
            assert np.array_equal(found, IMAGES[index])
            with pytest.raises(ValueError, match="read-only"):
                found[0] = 0
    found = memory.get(1)
    memory.close()
    memory.close()
    assert memory.get(1) is None and np.array_equal(found, IMAGES[1])  # who has an image keeps it


def test_nothing_is_kept_without_a_budget():
    memory = Kept(SIZES, 0)
    assert memory.put(0, IMAGES[0]) is IMAGES[0] and memory.get(0) is None
    memory.close()


def _write(memory: Kept) -> None:
    memory.put(0, IMAGES[0])


@pytest.mark.parametrize("in_memory", [True, False])
def test_processes_share_one_copy(in_memory, monkeypatch):
    if not in_memory:  # as on systems without such files
        monkeypatch.delattr(kept.os, "memfd_create", raising=False)
    memory = Kept(SIZES, 1.0)
    if in_memory:
        process = multiprocessing.get_context("spawn").Process(target=_write, args=(memory,))
        process.start()
        process.join()
    else:
        _write(pickle.loads(pickle.dumps(memory)))
    assert np.array_equal(memory.get(0), IMAGES[0]) and memory.get(1) is None
    memory.close()


@pytest.mark.user_input("Config and flags", "config.data.keep beyond the memory", "refused: the sizes of both")
def test_more_than_the_memory_of_the_machine_is_refused():
    kept.check_memory(forecast(SIZES, 1.0))
    huge = np.tile(np.array([[20_000, 20_000]], np.int32), (100_000, 1))
    with pytest.raises(UserError, match=r"^keep: \d+\.\d GiB of decoded images do not fit the \d+\.\d GiB"):
        kept.check_memory(forecast(huge, 1e9))
