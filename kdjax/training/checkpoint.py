"""Checkpoints through Orbax: atomic, verified by a hash of every leaf, with a fall-back to the step before."""

import contextlib
import hashlib
import logging
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

log = logging.getLogger(__name__)


class Checkpoints:
    """Saves and restores trees of arrays, with a JSON note, in a directory.

    Orbax writes atomically but does not notice a flipped bit, so the note holds a hash of every leaf, which is checked
    when a step is read; a step that cannot be trusted is passed over for the one before it.
    """

    def __init__(self, directory: Path, *, keep: int):
        # Orbax logs a warning for every option left at its default on a CPU; its errors arrive as exceptions anyway.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    def latest(self) -> int | None:
        """The newest step on disk, or None."""
        return self.manager.latest_step()

    def save(self, step: int, tree, note: dict) -> None:
        """Writes in the background; `tree` is copied to the host first, so its buffers may be donated afterwards."""
        if self.manager.latest_step() == step:
            return
        arrays = flat(tree)
        note = note | {"sha256": {name: digest(value) for name, value in arrays.items()}}
        self.manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), note=ocp.args.JsonSave(note))
        )

    def note(self) -> dict | None:
        """The note of the newest step whose note can be read, without its arrays; None if there is no step.

        Raises:
          ValueError: there are steps, but no note can be read.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        for step in steps:
            with contextlib.suppress(Exception):  # damaged; `restore` passes it over and says so
                return self.manager.restore(step, args=ocp.args.Composite(note=ocp.args.JsonRestore())).note
        if steps:
            raise ValueError(f"no checkpoint in {self.manager.directory} can be used: none has a note that can be read")
        return None

    def restore(self, like) -> tuple[object, dict] | None:
        """The newest trustworthy step as a tree like `like`, with its note; None if the directory holds no step.

        Raises:
          ValueError: there are steps, but none can be trusted, or they hold arrays of other names or shapes.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        problems = []
        for step in steps:
            try:
                tree, note = self._read(step, like)
            except Exception as error:  # whatever Orbax raises for a damaged file means the same to us
                problems.append(f"step {step}: {type(error).__name__}: {error}".splitlines()[0][:200])
                log.warning("checkpoint passed over: %s", problems[-1])
                continue
            for later in steps[: steps.index(step)]:
                self.manager.delete(later)
            return tree, note
        if problems:
            raise ValueError(f"no checkpoint in {self.manager.directory} can be used: {'; '.join(problems)}")
        return None

    def _read(self, step, like):
        wanted = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in flat(like, copy=False).items()}
        restored = self.manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted), note=ocp.args.JsonRestore())
        )
        for name, value in restored.state.items():
            if digest(value) != restored.note["sha256"][name]:
                raise ValueError(f"the array {name} does not have the hash it was saved with")
        leaves = [restored.state[name] for name in flat(like, copy=False)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), restored.note

    def close(self) -> None:
        """Waits until everything is on disk."""
        self.manager.wait_until_finished()
        self.manager.close()


def arrays(directory: Path, prefix: str, *, step: int | None = None) -> tuple[dict, dict]:
    """Arrays of one step, without a tree to fit them into; nothing in the directory is changed.

    Args:
      directory: of `Checkpoints`.
      prefix: which arrays, by the beginning of their names.
      step: which one; None is the newest that can be trusted.

    Returns:
      The note, and name without the prefix -> array.

    Raises:
      ValueError: there is no such step that can be trusted.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(Path(directory).absolute(), options=options) as manager:
        for at in sorted(manager.all_steps(), reverse=True) if step is None else [step]:
            with contextlib.suppress(Exception):  # whatever Orbax raises for a damaged file means the same to us
                both = ocp.args.Composite(state=ocp.args.StandardRestore(), note=ocp.args.JsonRestore())
                restored = manager.restore(at, args=both)
                named = {name: np.asarray(value) for name, value in restored.state.items()}
                if all(digest(value) == restored.note["sha256"][name] for name, value in named.items()):
                    chosen = {name: value for name, value in named.items() if name.startswith(prefix)}
                    return restored.note, {name.removeprefix(prefix): value for name, value in chosen.items()}
    if step is None:
        raise ValueError(f"no checkpoint in {directory} can be used.")
    raise ValueError(f"the checkpoint {step} in {directory} cannot be used.")


def flat(tree, *, copy: bool = True) -> dict:
    """The leaves by their path, "student/params/..."; on the host unless `copy` is False."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.array(leaf) if copy else leaf
        for path, leaf in leaves
    }


def fingerprint(tree) -> str:
    """The hash of all leaves of a tree and of their paths."""
    return hashlib.sha256(str({name: digest(value) for name, value in flat(tree).items()}).encode()).hexdigest()


def digest(value) -> str:
    """The hash of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
