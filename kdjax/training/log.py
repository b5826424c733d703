"""The metrics of a run over its steps."""

import json
import time
from pathlib import Path

import jax
from tensorboardX import SummaryWriter


class Log:
    """metrics.jsonl (appended, one object a line) and TensorBoard; only on the first host."""

    def __init__(self, workdir: Path, step: int):
        self.first = jax.process_index() == 0
        self.path = workdir / "metrics.jsonl"
        if self.first:
            # What a killed process left half-written would spoil the line that is appended to it.
            lines = self.path.read_bytes() if self.path.exists() else b""
            if not lines.endswith(b"\n"):
                self.path.write_bytes(lines[: lines.rfind(b"\n") + 1])
            self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step or None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.first:
            self.board.close()

    def write(self, step: int, kind: str, values: dict) -> None:
        if not self.first:
            return
        row = {"step": step, "kind": kind, "time": round(time.time(), 1)} | values
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name if kind == "train" else f"eval/{name}", value, step)

    def rows(self) -> list[dict]:
        """All lines; steps that a killed process had gone beyond its last checkpoint are there twice."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]
