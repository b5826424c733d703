"""Checkpoints with Orbax: written atomically, verified by hashes, with a fallback to the step before."""

import contextlib
import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from kdjax import sharding
from kdjax.errors import UserError, fault
from kdjax.files import sealed
from kdjax.structs import PyTree
from kdjax.weights.checkpoint import SEAL, check_note, digest, flat

log = logging.getLogger(__name__)


class Checkpoints:
    """Saves and restores trees of arrays, with a JSON note, in a directory.

    Orbax writes atomically but does not detect corrupted bytes. So the note also holds a hash of each array and of
    itself, which are verified when a step is read. A step that fails is skipped for the one before it. The first step
    that is saved is read back at once.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        """Opens the directory, and creates it if needed.

        Args:
          directory: one subfolder per step.
          keep: number of newest steps to keep.
        """
        # Orbax logs a warning for each default option on a CPU; its errors are exceptions anyway.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.directory = Path(directory).absolute()
        self.proven = False  # a step of this directory has been read
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    def latest(self) -> int | None:
        """The newest step on disk, or None."""
        return self.manager.latest_step()

    def save(self, step: int, tree: PyTree, note: dict[str, Any]) -> None:
        """Writes a step in the background; the first one is waited for and read back.

        Args:
          step: number of updates so far.
          tree: nested arrays; copied to the host before this returns, so that its buffers may be donated. Arrays that
            are split over devices are written whole, so that any number of devices can read them.
          note: JSON-able.

        Raises:
          UserError: the first step cannot be read back.
          OSError: the disk is full, or this or an earlier step could not be written.
        """
        if self.manager.latest_step() == step:
            return
        arrays = flat(sharding.gather(tree))
        self.wait()  # for the step before, as Orbax does
        self._check_room(sum(value.nbytes for value in arrays.values()))
        note = sealed(note | {"sha256": {name: digest(value) for name, value in arrays.items()}}, SEAL)
        self.manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), note=ocp.args.JsonSave(note))
        )
        if not self.proven:
            self.wait()
            try:
                self._read(step, tree)
            except Exception as error:  # as in `restore`
                if fault(error):
                    raise
                raise UserError(
                    f"workdir: {self.directory}: step {step} was just written, but cannot be read back "
                    f"({_why(error)}): choose another folder"
                ) from error
            self.proven = True

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
        steps = sorted(self.manager.all_steps(), reverse=True)
        for step in steps:
            with contextlib.suppress(Exception):  # damaged; `restore` skips it with a warning
                restored: Any = self.manager.restore(step, args=ocp.args.Composite(note=ocp.args.JsonRestore()))
                check_note(restored.note)
                return restored.note
        if steps:
            raise UserError(f"no checkpoint in {self.directory} can be used: their metadata cannot be read")
        return None

    def restore(self, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The newest step that passes verification; newer ones are deleted.

        Args:
          like: a tree with the structure, shapes and dtypes of the saved one.

        Returns:
          The tree with NumPy arrays, and its note.

        Raises:
          UserError: no step passes: each is damaged, or has arrays of other names or shapes.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        problems = []
        for step in steps:
            try:
                tree, note = self._read(step, like)
            except Exception as error:  # Orbax raises many kinds of exceptions for damaged files
                problems.append(f"step {step} ({_why(error)})")
                continue
            if problems:
                told = f"{'; '.join(problems)}: training continues from step {step}"
                log.warning("%s: a checkpoint cannot be read and is deleted: %s", self.directory, told)
            for later in steps[: steps.index(step)]:
                self.manager.delete(later)
            self.proven = True
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
        """Waits until all writes are finished."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits until all writes are finished, and closes the directory."""
        try:
            self.manager.wait_until_finished()
        finally:
            self.manager.close()


def _why(error: Exception) -> str:
    """An exception in one line; those of libraries with their class, without which many say nothing."""
    own = isinstance(error, UserError) or type(error) is ValueError
    text = str(error) if own else f"{type(error).__name__}: {error}"
    return (text.splitlines() or [""])[0][:200]
