"""The inputs of a step that went wrong, on disk: WORKDIR/blackbox/step-N, which `kdjax replay` reads."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax import data, files, sharding
from kdjax.errors import UserError
from kdjax.structs import PyTree
from kdjax.training.provenance import environment
from kdjax.training.setup import Setup, run_fingerprint
from kdjax.training.step import UNLABELLED, TrainState
from kdjax.training.teachers import unlabelled_rows
from kdjax.weights.checkpoint import flat

FOLDER = "blackbox"
MOST = 10  # folders of a run; later steps are reported, but not kept
_NOTE, _STATE, _BATCH = "note.json", "state.npz", "batch.npz"


class Recorded(NamedTuple):
    """The inputs of a step, as they were written."""

    step: int  # number of the update, from 1
    state: dict[str, np.ndarray]  # before the step: of the roles that went wrong, "student/params/..."
    batch: dict[str, np.ndarray]  # on the devices, with what the teachers say
    metrics: dict[str, float]  # that the step had, "student/total"
    images: dict[str, list[dict[str, Any]]]  # of the rows of the batch, and of its part without labels
    config: dict[str, Any]
    run: dict[str, Any]  # `setup.run_fingerprint`
    environment: dict[str, str]

    @property
    def roles(self) -> list[str]:
        """Those that went wrong."""
        return list(dict.fromkeys(name.partition("/")[0] for name in self.state))


def write(
    workdir: Path,
    setup: Setup,
    step: int,
    states: Mapping[str, TrainState],
    batch: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> Path | None:
    """Writes the inputs of a step; all hosts call this function.

    Args:
      workdir: the folder of the run.
      setup: of the run.
      step: number of the update, from 1.
      states: before it, of the roles that went wrong.
      batch: of it, on the devices.
      metrics: of it, by name.

    Returns:
      The folder; that of an earlier process if its step had the same metrics, and so the same inputs; a folder of
      another step is replaced. None: `MOST` are there.

    Raises:
      OSError: they cannot be written.
    """
    arrays = {_STATE: flat(sharding.gather(dict(states))), _BATCH: flat(sharding.gather(dict(batch)))}
    folder = workdir / FOLDER / f"step-{step}"
    there = _metrics(folder / _NOTE)
    if there is not None and there == {name: repr(value) for name, value in metrics.items()}:
        return folder
    if there is None and folder.parent.exists() and len([*folder.parent.glob("step-*")]) >= MOST:
        return None
    if jax.process_index():
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    note = {
        "step": step,
        "metrics": dict(metrics),
        "images": _images(setup, step),
        "config": json.loads(setup.config.to_json()),
        "run": run_fingerprint(setup),
        "environment": environment(),
    }
    try:
        with files.named(folder):
            for left in (folder, *folder.parent.glob(".step-*.tmp")):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(temporary).free < sum(a.nbytes for named in arrays.values() for a in named.values()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for name, named in arrays.items():
                # By number, because a name may have a slash; NumPy's format has no bfloat16, so bytes are stored.
                stored = {str(i): np.frombuffer(value.tobytes(), np.uint8) for i, value in enumerate(named.values())}
                np.savez(temporary / name, allow_pickle=False, **stored)
                note[name] = {
                    "sha256": hashlib.sha256((temporary / name).read_bytes()).hexdigest(),
                    "arrays": [[key, value.dtype.name, list(value.shape)] for key, value in named.items()],
                }
            files.write_json(temporary / _NOTE, files.sealed(note), indent=1)
            temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()  # if it is empty
        raise
    return folder


def _metrics(path: Path) -> dict[str, str] | None:
    """The metrics of a note, as text because NaN is not equal to itself; None if there is no whole one."""
    try:
        return {name: repr(float(value)) for name, value in json.loads(path.read_text())["metrics"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _images(setup: Setup, step: int) -> dict[str, list[dict[str, Any]]]:
    """Which images the rows of a batch are made of: the first one, those that Mosaic adds, MixUp's."""
    config, found = setup.config, {}
    sets = {"": (setup.dataset, config.batch_size)}
    if config.data.unlabelled:
        sets[UNLABELLED] = data.without_labels(setup.dataset), unlabelled_rows(config)
    for name, (dataset, size) in sets.items():
        plans = data.train_plans(dataset, config.data, batch_size=size, seed=config.seed)
        records, rows = dataset.splits["train"].records, []
        for row in plans[step - 1]:
            positions = [*row.images, *(row.partner.images if row.partner else ())]
            raw = [records.raw(position) for position in positions]
            rows.append(
                {
                    "entry": plans.entry(row),
                    "image_ids": [int(one["image/id"]) for one in raw],
                    "files": [one["image/filename"].decode(errors="replace") for one in raw],
                }
            )
        found[name] = rows
    return found


def read(folder: str | Path) -> Recorded:
    """Reads what `write` wrote.

    Args:
      folder: WORKDIR/blackbox/step-N.

    Raises:
      UserError: it is not such a folder, or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder: take a folder step-N of the {FOLDER}/ of a run")
    if not (folder / _NOTE).is_file():
        inside = sorted(folder.glob(f"**/step-*/{_NOTE}"))
        hint = f": take {inside[0].parent}" if inside else f": take a folder step-N of the {FOLDER}/ of a run"
        if not inside and (folder / "metrics.jsonl").exists():
            hint = ": no step of this run was kept, because none went wrong"
        raise UserError(f"{folder} does not hold the inputs of a step{hint}")
    try:
        note = json.loads((folder / _NOTE).read_text(encoding="utf-8"))
        damaged = _NOTE if files.altered(note) else ""
        arrays = {}
        for name in (_STATE, _BATCH) if not damaged else ():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != note[name]["sha256"]:
                damaged = name
                break
            arrays[name] = _arrays(folder / name, note[name]["arrays"])
        if not damaged:
            chosen = {key: note[key] for key in ("step", "metrics", "images", "config", "run", "environment")}
            return Recorded(state=arrays[_STATE], batch=arrays[_BATCH], **chosen)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}: it is damaged ({type(error).__name__}): let the run write it again") from None
    raise UserError(f"{folder / damaged}: it does not match its hash: delete the folder, and let the run write it")


def _arrays(path: Path, described: Sequence[Sequence[Any]]) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return {
            name: np.frombuffer(stored[str(i)].tobytes(), jax.numpy.dtype(dtype)).reshape(shape)
            for i, (name, dtype, shape) in enumerate(described)
        }


def filled(like: PyTree, arrays: Mapping[str, np.ndarray], what: str) -> PyTree:
    """A tree with the structure of another one and arrays that were read.

    Args:
      like: a tree with the names, shapes and dtypes of the arrays.
      arrays: by name.
      what: the tree, for the message.

    Raises:
      UserError: names or shapes differ.
    """
    leaves = flat(like, copy=False)
    here = {name: (tuple(leaf.shape), np.dtype(leaf.dtype).name) for name, leaf in leaves.items()}
    there = {name: (value.shape, value.dtype.name) for name, value in arrays.items()}
    if here != there:
        name = next(name for name in [*here, *there] if here.get(name) != there.get(name))
        raise UserError(
            f"{what} of this step has other arrays than that of the run today: {name} was {there.get(name)}, is "
            f"{here.get(name)}: use the versions, weights and data that it was recorded with"
        )
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in leaves])
