"""Shared by the modules of this folder: the type of a check, and functions that read and compare reference files.

Every other module here has a list `CHECKS` of pairs (pattern of a file's path relative to the replayed folder, function
of the file's path that yields checks). `tests.golden_replay` imports all modules of the folder.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Check(NamedTuple):
    """One line of the table: passed if `error <= tolerance`, skipped if `skip` gives a reason, failed otherwise."""

    name: str
    error: float | None = None
    tolerance: float | None = None
    skip: str | None = None
    message: str | None = None  # why there is no error to compare: the check failed

    @property
    def verdict(self) -> str:
        if self.skip is not None:
            return "skipped"
        # NaN compares false and fails.
        done = self.error is not None and self.tolerance is not None and self.message is None
        return "passed" if done and self.error <= self.tolerance else "failed"


Checks = Iterator[Check]

LATER_TWO_STAGE = "not in kdjax yet: two-stage detectors"
LATER_TRANSFORMERS = "not in kdjax yet: transformers"
NOT_PART = "not part of kdjax"
# Programs that run once: most of their time is the compiler's.
QUICK = {"xla_backend_optimization_level": 0}


class UnknownCase(ValueError):
    """A case or a parameter for which there is no check."""


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a reference file, and its `meta`."""
    # Opened here, because `np.load` leaves the file open if it is broken.
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files if key != "meta"}
        return arrays, json.loads(str(file["meta"]))


def below(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose key begins with `prefix/`, under the rest of their keys."""
    return {key[len(prefix) + 1 :]: value for key, value in arrays.items() if key.startswith(prefix + "/")}


def nhwc(x: np.ndarray) -> np.ndarray:
    """PyTorch's maps in the layout of kdjax."""
    return x.transpose(0, 2, 3, 1)


def maps_of(arrays: dict[str, np.ndarray], prefix: str) -> tuple[np.ndarray, ...]:
    """The maps of all levels below a key."""
    found = below(arrays, prefix)
    return tuple(nhwc(found[str(level)]) for level in range(len(found)))


def relative_error(got: Any, want: Any) -> float:
    """`max |got - want| / max |want|`, the measure of the reference's README; absolute where `want` is all zero.

    Infinite if the shapes differ or if only one of the two is finite somewhere.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise ValueError(f"shape {got.shape} instead of {want.shape}")
    if want.size == 0:
        return 0.0
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        return float("inf")
    return float(np.abs(got - want).max() / (np.abs(want).max() or 1.0))


def mismatches(got: Any, want: Any) -> float:
    """How many entries differ; to be compared with the tolerance 0 (or the number that is allowed)."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        raise ValueError(f"shape {got.shape} instead of {want.shape}")
    return float(np.sum(got != want))


def failure(name: str, error: Exception) -> Check:
    """The line of a check that raised."""
    return Check(name, message=f"{type(error).__name__}: {error}".splitlines()[0])


def each_case(path: Path, replay: Callable[[str, dict[str, Any], dict[str, np.ndarray]], Checks]) -> Checks:
    """Replay the cases of a loss or op file; a case that raises is one failed check, and the others go on.

    Args:
      path: the `.npz` file.
      replay: function of (description of the case, its parameters, its arrays) that yields checks; the name of the
        case is put before theirs. Raises `UnknownCase` for a case that it does not implement.
    """
    arrays, meta = load(path)
    cases = meta["cases"]
    unlisted = sorted({key.split("/")[0] for key in arrays} - set(cases))
    if unlisted:
        yield Check("cases", message=f"arrays of {', '.join(unlisted)}, which meta does not list")
    for case, entry in cases.items():
        try:
            checks = list(replay(entry["what"], entry["params"], below(arrays, case)))
            if not checks:
                raise UnknownCase(f"no check for {entry['what']!r}")
        except Exception as error:  # every failure is a line of the table
            checks = [failure(entry["what"].split(";")[0], error)]
        yield from (check._replace(name=f"{case} {check.name}") for check in checks)


def skip_file(reason: str, what: str = "whole file") -> Callable[[Path], Checks]:
    """A check that skips a whole file, or the part of it that `what` names."""

    def skip(path: Path) -> Checks:
        del path
        yield Check(what, skip=reason)

    return skip
