"""Checkpoints with Orbax: written atomically, verified by hashes, with a fallback to the step before."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from kdjax.errors import UserError
from kdjax.structs import PyTree
from kdjax.weights.checkpoint import digest, flat

log = logging.getLogger(__name__)


class Checkpoints:
    """Saves and restores trees of arrays, with a JSON note, in a directory.

    Orbax writes atomically but does not detect corrupted bytes. So the note also holds a hash of each array, which is
    verified when a step is read. A step that fails is skipped for the one before it.
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
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    def latest(self) -> int | None:
        """The newest step on disk, or None."""
        return self.manager.latest_step()

    def save(self, step: int, tree: PyTree, note: dict[str, Any]) -> None:
        """Writes a step in the background.

        Args:
          step: number of updates so far.
          tree: nested arrays; copied to the host before this returns, so that its buffers may be donated.
          note: JSON-able.
        """
        if self.manager.latest_step() == step:
            return
        arrays = flat(tree)
        note = note | {"sha256": {name: digest(value) for name, value in arrays.items()}}
        self.manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), note=ocp.args.JsonSave(note))
        )

    def note(self) -> dict[str, Any] | None:
        """The newest readable note, without reading arrays; None if there is no step.

        Raises:
          UserError: there are steps, but no note is readable.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        for step in steps:
            with contextlib.suppress(Exception):  # damaged; `restore` skips it with a warning
                restored: Any = self.manager.restore(step, args=ocp.args.Composite(note=ocp.args.JsonRestore()))
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
                problems.append(f"step {step}: {type(error).__name__}: {error}".splitlines()[0][:200])
                log.warning("checkpoint skipped: %s", problems[-1])
                continue
            for later in steps[: steps.index(step)]:
                self.manager.delete(later)
            return tree, note
        raise UserError(f"no checkpoint in {self.directory} can be used: {'; '.join(problems) or 'there is none'}")

    def _read(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        wanted = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in flat(like, copy=False).items()}
        restored: Any = self.manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted), note=ocp.args.JsonRestore())
        )
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
        self.manager.wait_until_finished()
        self.manager.close()
