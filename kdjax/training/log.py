"""The metrics of a run over its steps, on disk."""

import contextlib
import json
import math
import os
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from tqdm import tqdm

from kdjax import files, sharding
from kdjax.errors import fault

if TYPE_CHECKING:
    from tensorboardX import record_writer

    from kdjax.training.trackers import Trackers


class Log:
    """Writes metrics.jsonl (one object per line, appended) and TensorBoard files, and tells trackers.

    All of it on the first host only. Each line has its number and a checksum, so that damaged and missing ones are
    noticed. If a TensorBoard file cannot be written, one warning says so, and the run goes on without it.
    """

    def __init__(
        self,
        workdir: Path,
        step: int,
        lines: int = 0,
        *,
        board: bool = True,
        trackers: "Trackers | None" = None,
    ) -> None:
        """Opens the files.

        Args:
          workdir: the folder of the run.
          step: of the last update before this process; 0 for a new run.
          lines: how many were written until then, as far as the checkpoint of that step knows.
          board: whether TensorBoard files are written.
          trackers: get the lines too, and images and the model.
        """
        self.is_first_host = jax.process_index() == 0
        self.path = workdir / "metrics.jsonl"
        self.lines = lines  # written so far, by all processes of the run
        self.damaged = 0  # lines that `rows` skipped
        self.missing = 0  # and that were not there
        self.board: record_writer.RecordWriter | None = None
        self.trackers = trackers
        if self.is_first_host:
            self._cut()
            numbers = [number for _, number in _numbered(self.path) if number]
            self.lines = max(lines, len(_lines(self.path)), *numbers)
        if self.is_first_host and board:
            # Here, because tensorboardX imports torch where it is installed, which takes longer than all of kdjax.
            from tensorboardX.record_writer import RecordWriter

            with self._board_may_fail():
                (workdir / "tensorboard").mkdir(exist_ok=True)
                # Not `SummaryWriter`: its thread dies of a full disk, and then the run waits for it without end.
                name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
                self.board = RecordWriter(str(workdir / "tensorboard" / name))
                self._event(file_version="brain.Event:2")
                if step:  # later steps of a killed process are hidden
                    self._event(step=step, session_log={"status": "START"})

    def _event(self, **fields: Any) -> None:
        from tensorboardX.proto import event_pb2

        assert self.board is not None
        event: Any = event_pb2  # its classes are made when it is imported
        self.board.write(event.Event(wall_time=time.time(), **fields).SerializeToString())

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
        row = {"step": step, "kind": kind, "time": round(time.time(), 1)} | dict(values) | {_NUMBER: self.lines + 1}
        try:
            with files.named(self.path), self.path.open("a") as file:
                file.write(json.dumps(row | {_SUM: _checksum(row)}) + "\n")
        except OSError:
            with contextlib.suppress(OSError):
                self._cut()  # a part of the line, if another one follows
            raise
        self.lines += 1
        if self.board:
            from tensorboardX.summary import scalar

            with self._board_may_fail():
                for name, value in values.items():
                    summary = scalar(name if kind == "train" else f"eval/{name}", value)
                    self._event(step=step, summary=summary)
                self.board.flush()
        if self.trackers:
            del row[_NUMBER]
            self.trackers.line(self.lines, row)

    def image(self, step: int, draw: Callable[[], np.ndarray | None]) -> None:
        """Sends a sheet of detections to the trackers, if there are any.

        Args:
          step: number of updates so far; the last line has the metrics of these detections.
          draw: returns u8[H, W, 3] RGB, or None; called only where it is needed.
        """
        if self.trackers and (sheet := draw()) is not None:
            self.trackers.image(self.lines, step, sheet)

    def model(self, folder: Path, metrics: Mapping[str, float]) -> None:
        """Sends the final student to the trackers, if there are any.

        Args:
          folder: of its weights, config.json and model card.
          metrics: of it, by name.
        """
        if self.trackers:
            self.trackers.model(folder, metrics)

    def has(self, step: int, kind: str) -> bool:
        """Whether a line of a kind was written for a step; asked of the first host, all hosts call this function."""
        found = self.is_first_host and any(row["step"] == step and row["kind"] == kind for row in self.rows())
        return bool(sharding.from_every_host(found)[0])

    def rows(self) -> list[dict[str, Any]]:
        """All lines that are sound. Steps after the last checkpoint of a killed process appear twice.

        A warning says how many lines are damaged or missing; `damaged` and `missing` hold the numbers.
        """
        rows = [row for row, _ in _numbered(self.path)]
        self.damaged = sum(row is None for row in rows)
        self.missing = max(self.lines - len(rows), 0)
        told = [f"{self.damaged} damaged lines are left out of the report"] if self.damaged else []
        told += [f"{self.missing} lines are missing in the report"] if self.missing else []
        if told:
            _warn(f"{self.path}: {', and '.join(told)}")
        return [row for row in rows if row is not None]


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a metrics.jsonl that are sound, and the number of those that are not; none if there is no file."""
    rows = [row for row, _ in _numbered(path)]
    return [row for row in rows if row is not None], sum(row is None for row in rows)


def numbered(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The sound lines of a metrics.jsonl with their numbers, from 1, in order; those of older versions count."""
    found = enumerate(_numbered(path), start=1)
    return [(number or place, row) for place, (row, number) in found if row is not None]


def _lines(path: Path) -> list[bytes]:
    content = path.read_bytes() if path.exists() else b""
    return [line for line in content.split(b"\n") if line]


def _numbered(path: Path) -> list[tuple[dict[str, Any] | None, int]]:
    """The lines with their numbers; (None, 0) if one is damaged. Older versions wrote no numbers and checksums."""
    found, older = [], True
    for line in _lines(path):
        row = _row(line)
        number = 0
        if row is not None and (_SUM in row or not older):
            known, number = row.pop(_SUM, None), row.get(_NUMBER, 0)
            row, older = (row if known == _checksum(row) else None), False
        if row is not None:
            row.pop(_NUMBER, None)
        found.append((row, number if row is not None else 0))
    return found


_NUMBER, _SUM = "line", "crc32"


def _checksum(row: Mapping[str, Any]) -> int:
    """Of a line without its checksum; reading and writing json again gives the same text."""
    return zlib.crc32(json.dumps(row).encode())


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
