"""Checkpoints that are damaged are skipped; the first one is read back."""

import contextlib
import errno
import json
import os
import re
import shutil
import sys
import threading
import types
from concurrent import futures

import numpy as np
import pytest

from kdjax.errors import UserError, fault
from kdjax.training import checkpoint
from kdjax.weights.checkpoint import arrays as read_arrays


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs",
    "a checkpoint with a flipped bit",
    "reported and deleted: training continues from the one before",
)
def test_a_damaged_checkpoint_is_skipped(tmp_path, caplog):
    tree = {"a": np.random.default_rng(0).normal(size=100_000), "b": {"c": np.ones(3, np.int32)}}
    store = checkpoint.Checkpoints(tmp_path, keep=3)
    for at in (1, 2):
        store.save(at, {"a": tree["a"] * at, "b": tree["b"]}, {"next_batch": at})
    store.close()
    largest = max((tmp_path / "2").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else -1)
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    largest.write_bytes(damaged)
    store = checkpoint.Checkpoints(tmp_path, keep=3)
    restored, note = store.restore(tree)
    assert note["next_batch"] == 1 and store.latest() == 1
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path))}: a checkpoint cannot be read and is deleted: step 2 \(.+\): training continues "
        "from step 1",
        caplog.messages[-1],
    )
    np.testing.assert_array_equal(restored["a"], tree["a"])
    store.close()


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs",
    "a checkpoint cut short",
    "survived: the one before is used; refused if none is left",
)
@pytest.mark.parametrize("part", ["note", "state"])
def test_a_truncated_checkpoint_is_skipped(tmp_path, part):
    tree = {"a": np.arange(10_000.0)}
    store = checkpoint.Checkpoints(tmp_path, keep=3)
    for at in (1, 2):
        store.save(at, {"a": tree["a"] * at}, {"next_batch": at})
    store.close()
    for at, left in ((2, 1), (1, None)):
        for path in (tmp_path / str(at) / part).rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        store = checkpoint.Checkpoints(tmp_path, keep=3)
        if left:
            assert store.note()["next_batch"] in (1, 2) and store.restore(tree)[1]["next_batch"] == left
        else:
            # Either finds the damage.
            with pytest.raises(UserError, match=r"no checkpoint in .* can be used"):  # noqa: PT012
                store.note()
                store.restore(tree)
        store.close()


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "a checkpoint's note changed by hand", "refused: its note does not match its hash"
)
def test_an_edited_note_is_skipped(tmp_path):
    """As a damaged array is: class names and category ids are believed."""
    tree, note = {"a": np.arange(3.0)}, {"next_batch": 1, "run": {"classes": ["ant", "bee"]}, "category_ids": [1, 2]}
    store = checkpoint.Checkpoints(tmp_path, keep=3)
    store.save(1, tree, note)
    store.close()
    [file] = [path for path in (tmp_path / "1" / "note").iterdir() if b"ant" in path.read_bytes()]
    file.write_text(file.read_text().replace("ant", "bat"))
    assert json.loads(file.read_text())["run"]["classes"] == ["bat", "bee"]
    with pytest.raises(UserError, match="checkpoint 1 cannot be used: it is missing, damaged or incomplete"):
        read_arrays(tmp_path, "", step=1)
    store = checkpoint.Checkpoints(tmp_path, keep=3)
    with pytest.raises(UserError, match="can be used: their metadata cannot be read"):
        store.note()
    with pytest.raises(UserError, match=r"step 1 \(its note does not match its hash\)"):
        store.restore(tree)
    store.close()


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs",
    "a folder from which a checkpoint cannot be read back",
    "refused when one is written: choose another folder",
)
def test_checkpoints_are_read_back(tmp_path, monkeypatch):
    """Orbax takes this name as a pattern, and then writes nothing that can be read; `check_workdir` refuses it."""
    tree = {"a": np.arange(3.0)}
    store = checkpoint.Checkpoints(tmp_path / "run[1]", keep=3)
    store.save(1, tree, {"next_batch": 1})
    futures.wait([store.running])
    with pytest.raises(UserError) as caught:
        store.check()
    store.close()
    told = rf"workdir: {re.escape(str(tmp_path / 'run[1]'))}: step 1 was just written, but cannot be read back \(.*\): "
    assert re.fullmatch(rf"{told}choose another folder", str(caught.value))
    store, reads, read = checkpoint.Checkpoints(tmp_path / "run", keep=3), [], checkpoint.Checkpoints._read
    monkeypatch.setattr(
        checkpoint.Checkpoints, "_read", lambda self, step, like: reads.append(step) or read(self, step, like)
    )
    for step in (1, 2):
        store.save(step, tree, {"next_batch": step})
    store.close()
    assert reads == [1, 2]
    store = checkpoint.Checkpoints(tmp_path / "run", keep=3)
    store.restore(tree)
    store.save(3, tree, {"next_batch": 3})
    store.close()
    assert reads == [1, 2, 2, 3]


@pytest.mark.user_input("The machine", "too little room for a checkpoint", "reported before it is begun: make room")
def test_a_full_disk_is_noticed_before_a_checkpoint_is_begun(tmp_path, monkeypatch):
    store = checkpoint.Checkpoints(tmp_path, keep=3)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=23))
    with pytest.raises(OSError, match="No space left on device") as caught:
        store.save(1, {"a": np.arange(3.0)}, {"next_batch": 1})
    assert fault(caught.value) == f"{tmp_path}: the disk is full: make room"
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    store.save(1, {"a": np.arange(3.0)}, {"next_batch": 1})
    store.close()


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (dict(newest=1), [6]),
        (dict(newest=2), [5, 6]),
        (dict(newest=1, best=2), [2, 4, 6]),
        (dict(newest=1, every=3), [3, 6]),
        (dict(newest=1, hours=1.0), [1, 4, 6]),
        (dict(newest=1, best=1, every=3, hours=1.0), [1, 2, 3, 4, 6]),
    ],
)
def test_rules_say_which_checkpoints_stay(keep, left, tmp_path, monkeypatch):
    """One is saved every 20 minutes; of four the score is known. A new process goes on with the rules."""
    now, scores = [0.0], {1: 0.1, 2: 0.9, 4: 0.8, 6: 0.2}
    monkeypatch.setattr(checkpoint.time, "time", lambda: now[0])
    for steps in (range(1, 4), range(4, 7)):
        with contextlib.closing(checkpoint.Checkpoints(tmp_path, keep=checkpoint.Keep(**keep))) as store:
            for step in steps:
                now[0] = 1200.0 * step
                store.save(step, {"a": np.arange(3.0)}, {"next_batch": step})
                if step in scores:
                    store.score(step, scores[step])
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.is_dir()) == left
    assert sorted(map(int, json.loads((tmp_path / "kept.json").read_text()))) == left


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "a damaged `checkpoints/kept.json`", "survived: the scores in it are forgotten"
)
def test_a_damaged_list_of_checkpoints_is_left_out(tmp_path):
    tree = {"a": np.arange(3.0)}
    with contextlib.closing(checkpoint.Checkpoints(tmp_path, keep=1)) as store:
        store.save(1, tree, {"next_batch": 1})
    (tmp_path / "kept.json").write_text('{"1": 3')
    with contextlib.closing(checkpoint.Checkpoints(tmp_path, keep=1)) as store:
        assert store.entries[1]["time"] == (tmp_path / "1").stat().st_mtime
        assert store.restore(tree)[1]["next_batch"] == 1


def test_training_does_not_wait_for_a_checkpoint_but_hears_that_it_failed(tmp_path, monkeypatch):
    """Arrays and note are copied before: what is written is what was given."""
    tree, write, goes_on = {"a": np.arange(3.0)}, checkpoint.Checkpoints._write, threading.Event()
    store = checkpoint.Checkpoints(tmp_path, keep=3)
    store.save(1, tree, {"next_batch": 1})
    store.wait()

    def slow(self, *rest):
        assert goes_on.wait(20)
        write(self, *rest)

    monkeypatch.setattr(checkpoint.Checkpoints, "_write", slow)
    note = {"next_batch": 2, "loop": [1]}
    store.save(2, tree, note)
    store.check()
    tree["a"] += 1
    note["loop"].append(2)
    assert store.manager.latest_step() == 1
    goes_on.set()
    assert store.latest() == 2
    restored, note = store.restore(tree)
    np.testing.assert_array_equal(restored["a"], np.arange(3.0))
    assert note["loop"] == [1]

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    monkeypatch.setattr(checkpoint.Checkpoints, "_write", full)
    store.save(3, tree, {"next_batch": 3})
    with pytest.raises(OSError, match="No space"):
        store.save(4, tree, {"next_batch": 4})
    store.close()


def test_echoes_of_a_failed_write_are_not_printed(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "__unraisablehook__", printed.append)
    for error in (RuntimeError("Event loop is closed"), RuntimeError("another"), ValueError("Event loop is closed")):
        checkpoint._without_echoes(types.SimpleNamespace(exc_type=type(error), exc_value=error))
    assert [str(one.exc_value) for one in printed] == ["another", "Event loop is closed"]


def test_a_step_that_a_kill_left_half_deleted_is_removed_once_a_newer_one_was_read(tmp_path):
    tree = {"a": np.arange(3.0)}
    with contextlib.closing(checkpoint.Checkpoints(tmp_path, keep=3)) as store:
        for step in (1, 2, 3):
            store.save(step, tree, {"next_batch": step})
    shutil.rmtree(tmp_path / "1" / "state")
    with contextlib.closing(checkpoint.Checkpoints(tmp_path, keep=2)) as store:
        assert store.note()["next_batch"] == 3 and (tmp_path / "1").exists()
        assert store.restore(tree)[1]["next_batch"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "kept.json"]
