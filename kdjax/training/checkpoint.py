"""Checkpoints with Orbax: written atomically, verified by hashes, with a fallback to the step before."""

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from kdjax import sharding
from kdjax.errors import UserError, fault
from kdjax.files import sealed, write_json
from kdjax.structs import PyTree
from kdjax.weights.checkpoint import SEAL, check_note, digest, flat

log = logging.getLogger(__name__)
KEPT = "kept.json"


class Keep(NamedTuple):
    """Which checkpoints stay: those that any of the rules names."""

    newest: int  # number of newest steps
    best: int = 0  # number of steps with the best scores
    every: int = 0  # multiples of this step; 0: none
    hours: float = 0.0  # one of every this many hours; 0: none

    def chosen(self, entries: Mapping[int, Mapping[str, float]]) -> set[int]:
        """The steps that stay.

        Args:
          entries: of each step "time", in seconds, and, if it was evaluated, "score".

        Example:
          >>> scores = {1: 0.1, 2: 0.4, 3: 0.2, 4: 0.3}
          >>> sorted(Keep(1, best=1, every=3).chosen({at: {"time": 0, "score": one} for at, one in scores.items()}))
          [2, 3, 4]
        """
        steps = sorted(entries)
        scored = [step for step in steps if "score" in entries[step]]
        stay = {*steps[-self.newest :], *sorted(scored, key=lambda step: -entries[step]["score"])[: self.best]}
        stay |= {step for step in steps if self.every and step % self.every == 0}
        last = -math.inf
        for step in steps if self.hours else ():
            if entries[step]["time"] >= last + 3600 * self.hours:
                last = entries[step]["time"]
                stay.add(step)
        return stay


class Checkpoints:
    """Saves and restores trees of arrays, with a JSON note, in a directory.

    Orbax writes atomically but does not detect corrupted bytes. So the note also holds a hash of each array and of
    itself, which are verified when a step is read. A step that fails is skipped for the one before it. Each step that
    is saved is read back; older ones are deleted after that. With one process this is done in a thread: training waits
    for the copy of the arrays alone.
    """

    def __init__(self, directory: Path, *, keep: int | Keep, after: Callable[[], None] | None = None) -> None:
        """Opens the directory, and creates it if needed.

        Args:
          directory: one subfolder per step, and `kept.json`: when they were saved, and their scores.
          keep: number of newest steps to keep, or all rules.
          after: is called when a step is written, perhaps in another thread.
        """
        # Orbax logs a warning for each default option on a CPU; its errors are exceptions anyway.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        if sys.unraisablehook is sys.__unraisablehook__:
            sys.unraisablehook = _without_echoes
        self.directory = Path(directory).absolute()
        self.after = after
        self.keep = keep if isinstance(keep, Keep) else Keep(keep)
        self.manager = ocp.CheckpointManager(
            self.directory, options=ocp.CheckpointManagerOptions(max_to_keep=None, cleanup_tmp_directories=True)
        )
        self.entries = {step: self._entry(step) for step in self.manager.all_steps()}
        self.thread = futures.ThreadPoolExecutor(1, thread_name_prefix="save")
        self.running: futures.Future[None] | None = None

    def _entry(self, step: int) -> dict[str, float]:
        """What `kept.json` says of a step; the time of its folder if that file is missing or damaged."""
        try:
            found = json.loads((self.directory / KEPT).read_text())[str(step)]
            return {name: float(found[name]) for name in ("time", "score") if name in found or name == "time"}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            with contextlib.suppress(OSError):
                return {"time": (self.directory / str(step)).stat().st_mtime}
            return {"time": 0.0}

    def latest(self) -> int | None:
        """The newest step on disk, or None; waits for a write.

        Raises:
          As `save`.
        """
        self.wait()
        return self.manager.latest_step()

    def save(self, step: int, tree: PyTree, note: dict[str, Any]) -> None:
        """Writes a step in the background, with one process; waits for the step before.

        Args:
          step: number of updates so far.
          tree: nested arrays; copied to the host before this returns, so that its buffers may be donated. Arrays that
            are split over devices are written whole, so that any number of devices can read them.
          note: JSON-able.

        Raises:
          UserError: this or an earlier step cannot be read back.
          OSError: the disk is full, or this or an earlier step could not be written.
        """
        self.wait()  # one at a time: two copies on the host would be one too many
        if self.manager.latest_step() == step:
            return
        arrays, note = flat(sharding.gather(tree)), json.loads(json.dumps(note))  # the caller may change what is in it
        self._check_room(sum(value.nbytes for value in arrays.values()))
        self.running = self.thread.submit(self._write, step, arrays, note) if jax.process_count() == 1 else None
        if not self.running:  # the hosts write together
            self._write(step, arrays, note)

    def _write(self, step: int, arrays: dict[str, np.ndarray], note: dict[str, Any]) -> None:
        """Writes a step, reads it back, and deletes those that the rules do not name."""
        note = sealed(note | {"sha256": {name: digest(value) for name, value in arrays.items()}}, SEAL)
        self.manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), note=ocp.args.JsonSave(note))
        )
        self.manager.wait_until_finished()
        try:
            self._read(step, arrays)
        except Exception as error:  # as in `restore`
            if fault(error):
                raise
            raise UserError(
                f"workdir: {self.directory}: step {step} was just written, but cannot be read back "
                f"({_why(error)}): choose another folder"
            ) from error
        self.entries[step] = {"time": time.time()}
        self._tidy()
        if self.after:
            self.after()

    def _tidy(self) -> None:
        """Deletes the steps that the rules do not name, and writes the list of the others."""
        stay = sharding.from_every_host(self.keep.chosen(self.entries))[0]  # their clocks may differ
        for step in [step for step in self.entries if step not in stay]:
            self.manager.delete(step)
            del self.entries[step]
        if not jax.process_index():
            write_json(self.directory / KEPT, {str(step): entry for step, entry in sorted(self.entries.items())})

    def score(self, step: int, value: float) -> None:
        """Notes how good a step is, for the rule `Keep.best`; nothing happens if the step was not saved.

        Args:
          step: number of updates.
          value: larger is better.

        Raises:
          As `save`.
        """
        self.wait()
        if step in self.entries:
            self.entries[step]["score"] = float(value)
            self._tidy()

    def _check_room(self, size: int) -> None:
        """Checks the disk first: on a full one each thread of Orbax prints tracebacks, which hide the cause."""
        usage = shutil.disk_usage(self.directory)
        if usage.total and usage.free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory))

    def note(self) -> dict[str, Any] | None:
        """The newest readable note, without reading arrays; None if there is no step.

        Raises:
          UserError: there are steps, but no note is readable.
        """
        self.wait()
        steps = sorted(self.manager.all_steps(), reverse=True)
        for step in steps:
            with contextlib.suppress(Exception):  # damaged; `restore` skips it with a warning
                restored: Any = self.manager.restore(step, args=ocp.args.Composite(note=ocp.args.JsonRestore()))
                check_note(restored.note)
                return restored.note
        if steps:
            raise UserError(f"no checkpoint in {self.directory} can be used: their metadata cannot be read")
        return None

    def restore(self, like: PyTree, *, every: int = 1) -> tuple[PyTree, dict[str, Any]]:
        """The newest step that passes verification; newer ones, which do not, are deleted.

        With one process, so are those that the rules do not name.

        Args:
          like: a tree with the structure, shapes and dtypes of the saved one.
          every: multiples of this step are preferred to all others.

        Returns:
          The tree with NumPy arrays, and its note.

        Raises:
          UserError: no step passes: each is damaged, or has arrays of other names or shapes.
        """
        self.wait()
        steps = sorted(self.manager.all_steps(), key=lambda step: (step % every == 0, step), reverse=True)
        problems, damaged = [], []
        for step in steps:
            try:
                tree, note = self._read(step, like)
            except Exception as error:  # Orbax raises many kinds of exceptions for damaged files
                problems.append(f"step {step} ({_why(error)})")
                damaged.append(step)
                continue
            if problems:
                told = f"{'; '.join(problems)}: training continues from step {step}"
                log.warning("%s: a checkpoint cannot be read and is deleted: %s", self.directory, told)
            for later in damaged:
                self.manager.delete(later)
                self.entries.pop(later, None)
            if jax.process_count() == 1:  # a kill may have left a step half deleted
                self._tidy()
            return tree, note
        raise UserError(f"no checkpoint in {self.directory} can be used: {'; '.join(problems) or 'there is none'}")

    def _read(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        wanted = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in flat(like, copy=False).items()}
        restored: Any = self.manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted), note=ocp.args.JsonRestore())
        )
        check_note(restored.note)
        for name, value in restored.state.items():
            if digest(value) != restored.note["sha256"][name]:
                raise ValueError(f"the array {name} does not match its hash")
        leaves = [restored.state[name] for name in flat(like, copy=False)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), restored.note

    def wait(self) -> None:
        """Waits until all writes are finished.

        Raises:
          As `save`.
        """
        running, self.running = self.running, None
        if running:
            running.result()

    def check(self) -> None:
        """Does not wait.

        Raises:
          As `save`, if a write has failed by now.
        """
        if self.running and self.running.done():
            self.wait()

    def close(self) -> None:
        """Waits until all writes are finished, and closes the directory."""
        try:
            self.wait()
        finally:
            self.thread.shutdown()
            self.manager.close()


def _without_echoes(unraised: Any) -> None:  # noqa: ANN401 - `sys.UnraisableHookArgs`, which is no type at runtime
    """Prints what nobody can catch, but for an echo.

    When a write fails, as on a full disk, TensorStore's threads tell Orbax's loop of the other writes, hundreds of
    them, after it was closed; the failure itself is raised.
    """
    if not (unraised.exc_type is RuntimeError and str(unraised.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(unraised)


def _why(error: Exception) -> str:
    """An exception in one line; those of libraries with their class, without which many say nothing."""
    own = isinstance(error, UserError) or type(error) is ValueError
    text = str(error) if own else f"{type(error).__name__}: {error}"
    return (text.splitlines() or [""])[0][:200]
