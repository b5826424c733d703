"""Where the time of a run goes: start, compilation, data, steps, saves, evaluations, and what restarts lose."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdjax.files import write_json

FILE = "time.json"
KINDS = {
    "start": "reading settings, data and models, and the checks before training",
    "compile": "compiling programs, or reading them from the cache",
    "data": "waiting for batches",
    "step": "updates, and everything else in the loop",
    "save": "waiting for checkpoints; most of their work is done beside the steps",
    "evaluate": "evaluations during training and after it, and the report",
    "lost": "steps that were done again after a kill, with their data, saves and evaluations",
}
MARKS = 20  # checkpoints of a process of which the file knows when they were saved


class Clock:
    """Seconds of this process by kind, one kind at a time; and those of earlier processes of the run, from a file.

    The file is written at each line of the log, so that a kill loses the time since the last one.
    """

    def __init__(self) -> None:
        """Starts, with the kind "start"."""
        self.path: Path | None = None
        self.earlier: list[dict[str, Any]] = []
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.marks: dict[str, dict[str, float]] = {}
        self.kind, self.since = "start", time.perf_counter()

    def switch(self, kind: str) -> str:
        """Counts from now on for another kind.

        Args:
          kind: one of `KINDS`.

        Returns:
          The kind before.
        """
        now, before = time.perf_counter(), self.kind
        self.seconds[before] += now - self.since
        self.kind, self.since = kind, now
        return before

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Counts what runs inside for a kind, and then goes on with the one before."""
        before = self.switch(kind)
        try:
            yield
        finally:
            self.switch(before)

    def open(self, folder: Path, step: int) -> None:
        """Reads what earlier processes of the run took, and what of it is lost, because this one starts before it.

        Args:
          folder: of the run.
          step: of the checkpoint that this process starts from.
        """
        self.path = folder / FILE
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            found = json.loads(self.path.read_text(encoding="utf-8"))["processes"]
            self.earlier = [_after_restart(one, step) for one in found]
        self.mark(step)

    def mark(self, step: int) -> None:
        """Notes the time at which a step was saved: what comes later is lost if the process is killed before the next.

        Args:
          step: number of updates.
        """
        self.switch(self.kind)
        self.marks[str(step)] = dict(self.seconds)
        self.marks = dict([*self.marks.items()][-MARKS:])

    def write(self, step: int) -> None:
        """Writes the file.

        Args:
          step: number of updates so far.

        Raises:
          OSError: it cannot be written.
        """
        assert self.path is not None, "`open` comes first"
        self.switch(self.kind)
        this = {"step": step, "seconds": self.seconds, "marks": self.marks}
        write_json(self.path, {"seconds": self.total(), "processes": [*self.earlier, this]}, indent=1)

    def total(self) -> dict[str, float]:
        """Seconds by kind of all processes of the run so far."""
        self.switch(self.kind)
        of_all = [self.seconds, *(one["seconds"] for one in self.earlier)]
        return {kind: sum(seconds[kind] for seconds in of_all) for kind in KINDS}

    def told(self) -> str:
        """A line on the whole run."""
        starts = len(self.earlier) + 1
        return told(self.total()) + (f" ({starts} starts)" if starts > 1 else "")


def _after_restart(process: Mapping[str, Any], step: int) -> dict[str, Any]:
    """What a process took, when another one starts from a step that it may have passed."""
    seconds = {kind: float(process["seconds"][kind]) for kind in KINDS}
    marks = {str(int(at)): {kind: float(one[kind]) for kind in KINDS} for at, one in process["marks"].items()}
    reached = int(process["step"])
    known = [at for at in marks if int(at) <= step]
    if reached > step and known:
        mark = marks[max(known, key=int)]
        for kind in ("data", "step", "save", "evaluate"):
            lost = max(seconds[kind] - mark[kind], 0.0)
            seconds[kind] -= lost
            seconds["lost"] += lost
        reached = step
    return {"step": reached, "seconds": seconds, "marks": marks}


def told(seconds: Mapping[str, float]) -> str:
    """Seconds by kind as a line.

    Example:
      >>> told({"start": 3.0, "compile": 0.0, "step": 87.0, "lost": 30.0})
      'time: 2.0 min: start 2.5 %, step 72.5 %, lost 25.0 %'
    """
    total = sum(seconds.values())
    parts = ", ".join(f"{kind} {100 * value / total:.1f} %" for kind, value in seconds.items() if value > 0)
    return f"time: {total / 60:.1f} min: {parts}" if total else "time: none"
