"""Where the time of a run goes, over kills and restarts."""

import json

import pytest

from kdjax.training import goodput
from kdjax.training.goodput import Clock


@pytest.fixture
def clock_at(monkeypatch):
    """Sets the time."""
    now = [0.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, float(seconds))


def test_one_kind_at_a_time(clock_at):
    clock_at(0)
    clock = Clock()
    clock_at(2)
    with clock.during("evaluate"):
        clock_at(5)
        with clock.during("compile"):
            clock_at(9)
        clock_at(10)
    clock_at(11)
    assert {kind: value for kind, value in clock.total().items() if value} == {
        "start": 3.0,
        "evaluate": 4.0,
        "compile": 4.0,
    }


def test_what_a_kill_loses_is_counted_over_restarts(clock_at, tmp_path):
    """Saved at 10 and 20, killed at 26: the second process starts from 20."""
    clock_at(0)
    first = Clock()
    clock_at(3)
    first.open(tmp_path, 0)
    with first.during("step"):
        for step, at in ((10, 13.0), (20, 23.0)):
            clock_at(at)
            with first.during("save"):
                clock_at(at + 1)
            first.mark(step)
        clock_at(30)
        first.write(26)
    second = Clock()
    clock_at(31)
    second.open(tmp_path, 20)
    with second.during("step"):
        clock_at(36)
        second.write(30)
    assert second.total() == {"start": 4, "compile": 0, "data": 0, "step": 24, "save": 2, "evaluate": 0, "lost": 6}
    third = Clock()
    third.open(tmp_path, 30)  # it ended there: nothing more is lost
    assert third.total() == second.total() and "lost 16.7 %" in third.told() and "(3 starts)" in third.told()
    assert json.loads((tmp_path / "time.json").read_text())["seconds"]["lost"] == 6


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "a damaged `time.json`", "survived: the time of earlier starts is not counted"
)
def test_a_damaged_file_is_left_out(tmp_path, clock_at):
    for text in ("{", '{"processes": [3]}', '{"processes": [{"step": 1, "seconds": {}, "marks": {}}]}', "[]"):
        (tmp_path / "time.json").write_text(text)
        clock = Clock()
        clock.open(tmp_path, 0)
        assert clock.earlier == []
