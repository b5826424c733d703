"""The metrics of a run over its steps, on disk."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from tensorboardX import SummaryWriter


class Log:
    """Writes metrics.jsonl (one object per line, appended) and TensorBoard files; only on the first host."""

    def __init__(self, workdir: Path, step: int) -> None:
        """Opens the files.

        Args:
          workdir: the folder of the run.
          step: of the last update before this process; 0 for a new run.
        """
        self.is_first_host = jax.process_index() == 0
        self.path = workdir / "metrics.jsonl"
        if self.is_first_host:
            # A killed process may leave an incomplete last line: remove it before appending.
            lines = self.path.read_bytes() if self.path.exists() else b""
            if not lines.endswith(b"\n"):
                self.path.write_bytes(lines[: lines.rfind(b"\n") + 1])
            self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step or None)

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_first_host:
            self.board.close()

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Appends one line.

        Args:
          step: number of updates so far.
          kind: "train" or "eval".
          values: metrics by name.
        """
        if not self.is_first_host:
            return
        row = {"step": step, "kind": kind, "time": round(time.time(), 1)} | dict(values)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name if kind == "train" else f"eval/{name}", value, step)

    def rows(self) -> list[dict[str, Any]]:
        """All lines. Steps after the last checkpoint of a killed process appear twice."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]
