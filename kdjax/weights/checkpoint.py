"""Reads checkpoints without the run: arrays by name, and the hashes that verify them."""

import contextlib
import hashlib
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax.errors import UserError
from kdjax.files import altered
from kdjax.structs import AnyArray, PyTree


def arrays(directory: Path, prefix: str, *, step: int | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Arrays of one step, without a tree to fit them into; nothing in the directory is changed.

    Args:
      directory: of `Checkpoints`.
      prefix: which arrays, by the beginning of their names.
      step: which one; None: the newest that is intact.

    Returns:
      The note, and name without the prefix -> array.

    Raises:
      UserError: there is no such step, or it is damaged.
    """
    import orbax.checkpoint as ocp  # takes a second to import

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(Path(directory).absolute(), options=options) as manager:
        for at in sorted(manager.all_steps(), reverse=True) if step is None else [step]:
            with contextlib.suppress(Exception):  # Orbax raises many kinds of errors for a damaged file
                both = ocp.args.Composite(state=ocp.args.StandardRestore(), note=ocp.args.JsonRestore())
                restored = manager.restore(at, args=both)
                check_note(restored.note)
                named = {name: np.asarray(value) for name, value in restored.state.items()}
                if all(digest(value) == restored.note["sha256"][name] for name, value in named.items()):
                    chosen = {name: value for name, value in named.items() if name.startswith(prefix)}
                    return restored.note, {name.removeprefix(prefix): value for name, value in chosen.items()}
    if step is None:
        raise UserError(f"{directory}: no checkpoint can be used: all are damaged or incomplete")
    raise UserError(f"{directory}: checkpoint {step} cannot be used: it is missing, damaged or incomplete")


SEAL = "note_sha256"


def check_note(note: dict[str, Any]) -> None:
    """Checks the hash of a note.

    Raises:
      ValueError: it was changed.
    """
    if SEAL in note and altered(note, SEAL):  # older versions wrote none
        raise ValueError("its note does not match its hash")


def flat(tree: PyTree, *, copy: bool = True) -> dict[str, Any]:
    """The leaves by their path, "student/params/..."; on the host unless `copy` is False."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.array(leaf) if copy else leaf
        for path, leaf in leaves
    }


def fingerprint(tree: PyTree) -> str:
    """The hash of all leaves of a tree and of their paths."""
    return hashlib.sha256(str({name: digest(value) for name, value in flat(tree).items()}).encode()).hexdigest()


def digest(value: AnyArray) -> str:
    """The hash of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
