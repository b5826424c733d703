"""The page of a run while it goes on."""

import errno
import os
import re
import signal
import threading
import types

import pytest

from kdjax import sharding
from kdjax.report import live as of_report
from kdjax.training import config as settings
from kdjax.training import live, outputs
from kdjax.training.goodput import Clock
from kdjax.training.run import Stopped, run
from tests.detectors.test_guide import folder as guide  # noqa: F401 - a fixture
from tests.support.pages import Page
from tests.support.runs import tiny_config

STEPS = 10
REFRESH = f'http-equiv="refresh" content="{of_report.RELOAD}"'


@pytest.fixture
def written(monkeypatch):
    """The pages that a run writes, in their order."""
    texts = []
    write = outputs.run_report.write_report

    def noting(path, **given):
        write(path, **given)
        texts.append(path.read_text(encoding="utf-8"))

    monkeypatch.setattr(outputs.run_report, "write_report", noting)
    return texts


@pytest.fixture
def config(guide):  # noqa: F811
    """A run of the guide's detector, which is compiled quickly."""
    made = tiny_config(guide, teacher=None, batch_size=4, steps=STEPS, log_every=1, eval__every=5, eval__limit=6,
                       student__detector="dots_s", student__options__channels=8)  # fmt: skip
    made.data.update(dict(scenes_train=8, scenes_val=8))
    made.data.augment.update(dict(mosaic=False, mixup=0.0))
    made.data.stage2.start = 0
    made.optimizer.warmup = 1
    return made


def state_of(text):
    return re.search(r'<p class="verdict">(.*?)</p>', text)[1].replace("<b>", "").replace("</b>", "")


def test_a_run_shows_how_far_it_is_and_ends_with_its_report(config, tmp_path, written, monkeypatch, capsys):
    tmp_path = tmp_path / "run"
    shard_batch, calls = sharding.shard_batch, iter(range(1, 1000))

    def stopping(*given):
        if next(calls) == 8:
            signal.raise_signal(signal.SIGTERM)
        return shard_batch(*given)

    with monkeypatch.context() as patched:
        patched.setattr(sharding, "shard_batch", stopping)
        with pytest.raises(Stopped, match="step 8 of "):
            run(config, tmp_path)
    assert state_of(written[0]) == f"Running: step 0 of {STEPS}."
    stopped = written[-1]
    assert state_of(stopped).startswith(f"Not running: stopped at step 8 of {STEPS}; the state is saved")
    assert REFRESH in written[0] and REFRESH not in stopped
    page = Page(stopped)
    assert "Metrics and images: after step 5, on the first 6 validation images." in page.text
    panels = [attrs["alt"].partition(":")[0] for attrs in page.all("img")]
    assert panels == ["ground truth", "student"] * (len(panels) // 2) and 2 <= len(panels) <= 2 * live.EXAMPLES
    assert "images per second" in page.text and "of the time, for training images" in page.text
    assert any(attrs.get("aria-label", "").startswith("Chart of AP:") for attrs in page.all("svg"))
    assert len([row for row in page.rows if row and row[0].startswith("AP50")]) == 1

    written.clear()
    run(config, tmp_path)
    final = (tmp_path / "report.html").read_text()
    assert state_of(written[0]) == f"Running: step 8 of {STEPS}."
    assert state_of(written[-2]).startswith(
        f"Running: all {STEPS} steps are done, and the final evaluation is under way"
    )
    assert written[-1] == final and "The detector reaches AP" in state_of(final)
    assert REFRESH in written[-2] and "refresh" not in final and "<progress" not in final
    assert not list(tmp_path.glob("*.tmp")) and "page of the run cannot be written" not in capsys.readouterr().err


@pytest.mark.user_input(
    "The machine", "a page of a run that cannot be written while it trains", "reported once, and the run goes on"
)
def test_a_page_that_cannot_be_written_does_not_end_the_run(config, tmp_path, monkeypatch, capsys):
    tmp_path = tmp_path / "run"
    write = outputs.run_report.write_report

    def full(path, *, progress, **given):
        if progress:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, **given)

    monkeypatch.setattr(outputs.run_report, "write_report", full)
    results = run(config, tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if "page of the run cannot be written" in line]
    path = tmp_path / "report.html"
    assert len(lines) == 1 and lines[0].strip().endswith(
        f"kdjax: the page of the run cannot be written yet: {path}: the disk is full: make room; the run goes on"
    )
    assert "The detector reaches AP" in path.read_text() and results["student"]


# ------------------------------------------------------------------------------------------------- without a run


class Clocked:
    """Stands for `outputs.write_report`: notes what it is asked for."""

    def __init__(self):
        self.given = []

    def __call__(self, setup, path, results, evaluations, rows, **more):
        self.given.append((results, evaluations, rows, more["progress"]))


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """Makes a `Live` of a run without models, and what it has written."""
    config = settings.base()
    config.update(dict(steps=100))
    config.eval.update(dict(every=10, limit=7))
    noted = Clocked()
    monkeypatch.setattr(outputs, "write_report", noted)
    monkeypatch.setattr(outputs, "notes", lambda *_, **__: [])
    monkeypatch.setattr(live, "model", lambda setup, role: (None, ({}, {})))

    def made(start=0, **changes):
        config.eval.update(changes)
        setup = types.SimpleNamespace(config=config, states={"student": None})
        return live.Live(setup, tmp_path, Clock(), start), noted

    return made


def evaluation(ap):
    return {"student": outputs.Evaluation({"AP": ap}, {"a": ap}, {1: "unused"}, list(range(9)))}


def done(one):
    one.running.result(timeout=10)


def test_what_the_pages_say(alone, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(live.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(live.time, "time", lambda: 1.7e9 + now[0])
    one, noted = alone(start=20)
    with one:
        done(one)
        now[0] += 60
        one.write(30, evaluation(0.25))
        done(one)
        one.at(34)
    start, at30, end = (given[-1] for given in noted.given)
    assert (start.step, start.left, start.due, start.about) == (20, None, "", "")
    assert (at30.step, at30.steps, at30.left) == (30, 100, 6 * 70)
    clock = [int(part) for part in re.findall(r"\d+", at30.written)][3:5], [int(x) for x in at30.due[-5:].split(":")]
    assert (60 * clock[1][0] + clock[1][1] - 60 * clock[0][0] - clock[0][1]) % 1440 == 1, "a minute later"
    assert at30.about == "Metrics and images: after step 30, on the first 7 validation images."
    assert (end.step, end.ended) == (100, "")
    results, evaluations, _, _ = noted.given[1]
    assert results == {"student": {"AP": 0.25, "params": 0}}
    assert evaluations["student"].examples == [0, 1, 2, 3] and evaluations["student"].detections == {}


@pytest.mark.parametrize(
    ("error", "words"),
    [(ValueError("a\nb"), "a\\nb"), (KeyboardInterrupt(), "interrupted: the same command continues")],
)
def test_what_ends_a_run_is_on_its_page(alone, error, words):
    one, noted = alone()

    def runs():
        with one:
            one.at(13)
            raise error

    with pytest.raises(type(error)):
        runs()
    progress = noted.given[-1][-1]
    assert progress.step == 13 and progress.ended.startswith(words)


def test_steps_never_wait_for_a_page(alone, monkeypatch):
    one, noted = alone()
    held, write = threading.Event(), outputs.write_report

    def slow(*given, **more):
        held.wait(10)
        write(*given, **more)

    monkeypatch.setattr(outputs, "write_report", slow)
    with one:
        for step in (10, 20, 30):
            one.write(step, evaluation(0.1))  # the page of the start is still being written
        held.set()
    assert [given[-1].step for given in noted.given] == [0, 100]


def test_runs_without_evaluations_have_no_page_before_their_end(alone, monkeypatch):
    for changes, first in ((dict(every=0), 0), (dict(every=10), 1)):
        monkeypatch.setattr(live.jax, "process_index", lambda first=first: first)
        one, noted = alone(**changes)
        with one:
            one.write(10, evaluation(0.1))
        assert noted.given == []
