"""The metrics of a run over its steps, on disk."""

import contextlib
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar
from tqdm import tqdm

from kdjax import files, sharding
from kdjax.errors import fault

_PROTO: Any = event_pb2  # its classes are made when it is imported


class Log:
    """Writes metrics.jsonl (one object per line, appended) and TensorBoard files; only on the first host.

    If a TensorBoard file cannot be written, one warning says so, and the run goes on without it.
    """

    def __init__(self, workdir: Path, step: int) -> None:
        """Opens the files.

        Args:
          workdir: the folder of the run.
          step: of the last update before this process; 0 for a new run.
        """
        self.is_first_host = jax.process_index() == 0
        self.path = workdir / "metrics.jsonl"
        self.damaged = 0  # lines that `rows` skipped
        self.board: RecordWriter | None = None
        if self.is_first_host:
            self._cut()
            with self._board_may_fail():
                (workdir / "tensorboard").mkdir(exist_ok=True)
                # Not `SummaryWriter`: its thread dies of a full disk, and then the run waits for it without end.
                name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
                self.board = RecordWriter(str(workdir / "tensorboard" / name))
                self._event(file_version="brain.Event:2")
                if step:  # later steps of a killed process are hidden
                    start = _PROTO.SessionLog(status=_PROTO.SessionLog.START)
                    self._event(step=step, session_log=start)

    def _event(self, **fields: Any) -> None:
        assert self.board is not None
        self.board.write(_PROTO.Event(wall_time=time.time(), **fields).SerializeToString())

    def _cut(self) -> None:
        """Removes an incomplete last line, which a killed process may leave."""
        lines = self.path.read_bytes() if self.path.exists() else b""
        if lines and not lines.endswith(b"\n"):
            os.truncate(self.path, lines.rfind(b"\n") + 1)

    @contextlib.contextmanager
    def _board_may_fail(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            board, self.board = self.board, None
            if board:
                with contextlib.suppress(OSError):
                    board.close()
            _warn(f"no more TensorBoard files are written: {fault(error)}")

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.board:
            with self._board_may_fail():
                self.board.close()

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Appends one line.

        Args:
          step: number of updates so far.
          kind: "train" or "eval".
          values: metrics by name.

        Raises:
          OSError: metrics.jsonl cannot be written.
        """
        if not self.is_first_host:
            return
        row = {"step": step, "kind": kind, "time": round(time.time(), 1)} | dict(values)
        try:
            with files.named(self.path), self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError:
            with contextlib.suppress(OSError):
                self._cut()  # a part of the line, if another one follows
            raise
        if self.board:
            with self._board_may_fail():
                for name, value in values.items():
                    summary = scalar(name if kind == "train" else f"eval/{name}", value)
                    self._event(step=step, summary=summary)
                self.board.flush()

    def has(self, step: int, kind: str) -> bool:
        """Whether a line of a kind was written for a step; asked of the first host, all hosts call this function."""
        found = self.is_first_host and any(row["step"] == step and row["kind"] == kind for row in self.rows())
        return bool(sharding.from_every_host(found)[0])

    def rows(self) -> list[dict[str, Any]]:
        """All lines that are sound. Steps after the last checkpoint of a killed process appear twice.

        A warning says how many lines are damaged; `damaged` holds the number.
        """
        rows, self.damaged = read(self.path)
        if self.damaged:
            _warn(f"{self.path}: {self.damaged} damaged lines are left out of the report")
        return rows


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a metrics.jsonl that are sound, and the number of those that are not; none if there is no file."""
    content = path.read_bytes() if path.exists() else b""
    rows = [_row(line) for line in content.split(b"\n") if line]
    return [row for row in rows if row is not None], sum(row is None for row in rows)


def _row(line: bytes) -> dict[str, Any] | None:
    """A line of the log; None if it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or row.get("kind") not in ("train", "eval") or not _is_number(row.get("step")):
        return None
    values = {name: value for name, value in row.items() if name != "kind"}
    whole = all(_is_number(value) for value in values.values())
    return row if whole and (row["kind"] == "eval" or "seconds" in row) else None


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (type(value) is int and math.log2(abs(value) + 1) < 64)


def _warn(message: str) -> None:
    tqdm.write(f"kdjax: {message}", file=sys.stderr)
