"""The log of a run that was killed, damaged, or whose disk is full."""

import errno
import os
from pathlib import Path

import pytest
from tensorboardX.record_writer import RecordWriter

from kdjax.errors import fault
from kdjax.training.log import Log


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "a `metrics.jsonl` that ends in half a line", "survived: the half is removed"
)
def test_an_incomplete_line_is_removed(tmp_path):
    with Log(tmp_path, 0) as log:
        assert log.rows() == []
        log.write(1, "eval", {"lr": 0.5})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "ki')
    with Log(tmp_path, 1) as log:
        log.write(2, "eval", {"lr": 0.25})
        assert [(row["step"], row["lr"]) for row in log.rows()] == [(1, 0.5), (2, 0.25)]


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs",
    "damaged lines in `metrics.jsonl`",
    "reported: 9 damaged lines are left out of the report",
)
def test_damaged_lines_are_left_out_and_counted(tmp_path, capsys):
    """One changed byte, of json, of a key, or of UTF-8, must not cost the report."""
    sound = b'{"step": 1, "kind": "train", "time": 1.0, "seconds": 2.0}\n'
    spoilt = [
        sound.replace(b"{", b"[", 1),
        sound.replace(b'"step"', b'"stop"'),
        sound.replace(b"train", b"tr\xffin"),
        sound.replace(b"train", b"trajn"),
        sound.replace(b"seconds", b"secomds"),
        sound.replace(b"2.0", b'"2"'),
        sound.replace(b"2.0", b"9" * 400),
        b"[" * 100_000 + b"\n",
        b"3\n",
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([sound, *spoilt, sound]))
    with Log(tmp_path, 0) as log:
        assert [row["step"] for row in log.rows()] == [1, 1] and log.damaged == len(spoilt)
    path = tmp_path / "metrics.jsonl"
    assert capsys.readouterr().err.strip() == f"kdjax: {path}: 9 damaged lines are left out of the report"


@pytest.mark.user_input(
    "The machine",
    "a full disk while TensorBoard's files are written",
    "reported: no more of them are written; the run goes on",
)
def test_a_full_disk_ends_the_boards_files_only(tmp_path, capsys, monkeypatch):
    """Not the run, which would have waited for the thread of a `SummaryWriter` without end."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Log(tmp_path, 0) as log:
        log.write(1, "train", {"lr": 0.5, "seconds": 1.0})
        monkeypatch.setattr(RecordWriter, "flush", full)
        for step in range(2, 40):
            log.write(step, "train", {"lr": 0.5, "seconds": 1.0})
        assert len(log.rows()) == 39
    told = capsys.readouterr().err.splitlines()
    assert told == ["kdjax: no more TensorBoard files are written: the disk is full: make room"]


@pytest.mark.user_input(
    "The machine",
    "a full disk while metrics are written",
    "reported with the file: make room; no part of a line is left",
)
def test_a_full_disk_names_the_metrics_and_leaves_no_part_of_a_line(tmp_path, monkeypatch):
    with Log(tmp_path, 0) as log:
        log.write(1, "eval", {"AP": 0.5})
        opened = Path.open

        def half(self, mode="r", *rest, **options):
            file = opened(self, mode, *rest, **options)
            if self == log.path and mode == "a":
                write = file.write

                def partly(text):
                    write(text[:9])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

                monkeypatch.setattr(file, "write", partly, raising=False)
            return file

        monkeypatch.setattr(Path, "open", half)
        with pytest.raises(OSError, match="No space") as caught:
            log.write(2, "eval", {"AP": 0.6})
        monkeypatch.undo()
        assert fault(caught.value) == f"{tmp_path / 'metrics.jsonl'}: the disk is full: make room"
        log.write(3, "eval", {"AP": 0.7})
        assert [row["step"] for row in log.rows()] == [1, 3] and not log.damaged


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs",
    "a digit of `metrics.jsonl` that was changed, and lines that were removed",
    "reported: 1 damaged lines are left out of the report, and 3 lines are missing",
)
def test_changed_and_missing_lines_are_noticed(tmp_path, capsys):
    """Each line has a number and a checksum; how many there were is known to the checkpoint."""
    path = tmp_path / "metrics.jsonl"
    with Log(tmp_path, 0) as log:
        for step in range(1, 7):
            log.write(step, "train", {"lr": 0.25 * step, "seconds": 1.0})
        assert [row["lr"] for row in log.rows()] == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5] and log.lines == 6
        assert log.rows()[0].keys() == {"step", "kind", "time", "lr", "seconds"}
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[2].replace('"lr": 0.75', '"lr": 0.85') + lines[4])
    with Log(tmp_path, 6, 6) as log:
        log.write(7, "train", {"lr": 1.75, "seconds": 1.0})
        assert [row["lr"] for row in log.rows()] == [0.25, 1.25, 1.75]
        assert (log.lines, log.damaged, log.missing) == (7, 1, 3)
    told = "1 damaged lines are left out of the report, and 3 lines are missing in the report"
    assert capsys.readouterr().err.strip() == f"kdjax: {path}: {told}"
    path.unlink()
    with Log(tmp_path, 7, 7) as log:
        assert log.rows() == [] and log.missing == 7
    path.write_text('{"step": 1, "kind": "eval", "time": 1.0}\n')  # as older versions wrote it
    with Log(tmp_path, 1) as log:
        assert len(log.rows()) == 1 and not (log.damaged or log.missing)
