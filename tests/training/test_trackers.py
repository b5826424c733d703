"""Weights & Biases and MLflow, by stand-ins; with the packages themselves in test_trackers_real.py."""

import json
import sys

import numpy as np
import pytest

from kdjax.commands import settings as command_settings
from kdjax.errors import UserError
from kdjax.training import checks, config, trackers
from kdjax.training.log import Log, numbered
from tests.support.trackers import ENVIRONMENT, Mlflow, Wandb, logged, of_mlflow, of_wandb

SHEET = np.zeros((4, 6, 3), np.uint8)


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ENVIRONMENT:  # what the code sets is undone after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def wandb(monkeypatch):
    one = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", one.module)
    return one


@pytest.fixture
def mlflow(monkeypatch):
    one = Mlflow()
    monkeypatch.setitem(sys.modules, "mlflow", one.module)
    monkeypatch.setitem(sys.modules, "mlflow.exceptions", one.exceptions)
    return one


def chosen(*names, **changes):
    made = config.base()
    made.log.to = names
    made.log.project = "cells"
    made.update(changes)
    return made


def row(loss, seconds=1.0):
    return {"student/total": loss, "lr": 0.1, "seconds": seconds}


def write(folder, made, lines, *, image=0, model=None):
    """A process of a run: lines (step, kind, values), and what comes at its end."""
    folder.mkdir(exist_ok=True)
    with trackers.opened(made, folder) as all_of_them, Log(folder, 0, board=False, trackers=all_of_them) as log:
        for line in lines:
            log.write(*line)
        if image:
            log.image(image, lambda: SHEET)
        if model:
            log.model(model, {"AP": 0.5})


@pytest.fixture
def student(tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"sha256": "abc"}))
    (folder / "model.safetensors").write_text("weights")
    return folder


LINES = [(5, "train", row(2.0)), (5, "eval", {"student/AP": 0.1}), (10, "train", row(1.5)),
         (10, "eval", {"twin/AP": -1.0}), (10, "eval", {"student/AP": 0.2})]  # fmt: skip


def test_both_have_settings_lines_images_and_the_model(wandb, mlflow, tmp_path, student):
    made = chosen("wandb", "mlflow")
    write(tmp_path, made, LINES, image=10, model=student)
    [at_wandb], [at_mlflow] = wandb.runs.values(), mlflow.runs.values()
    assert logged(tmp_path) == of_wandb(at_wandb) == of_mlflow(at_mlflow) and len(logged(tmp_path)) == 9
    assert not at_wandb.dropped and [*at_wandb.rows] == [1, 2, 3, 4, 5]
    assert at_wandb.axes == {"step": None, "*": "step"} and at_wandb.rows[5]["detections"] == ("image", SHEET.shape)
    times = [one["time"] for _, one in numbered(tmp_path / "metrics.jsonl")]
    assert [one["time"] for one in at_wandb.rows.values()] == times
    assert {one.timestamp for one in at_mlflow.metrics} == {round(time * 1000) for time in times}
    assert [*at_mlflow.images] == ["detections/step_00000010.png"]
    flat = config.flat(json.loads(made.to_json()))
    assert at_wandb.config == flat and at_mlflow.params == {name: str(value) for name, value in flat.items()}
    assert flat["optimizer.lr"] == 0.0 and flat["log.project"] == "cells"
    assert at_wandb.settings["project"] == "cells" and [*mlflow.experiments] == ["cells"]
    assert at_wandb.mode == "offline" and at_wandb.settings["dir"] == str(tmp_path)
    assert mlflow.uri == f"sqlite:///{tmp_path}/mlflow/mlflow.db" and (tmp_path / "mlflow").is_dir()
    [artifact], files = at_wandb.models, ["config.json", "model.safetensors"]
    assert (artifact.files, artifact.type, artifact.metadata) == (files, "model", {"AP": 0.5})
    assert at_mlflow.models == [("student", files)]
    assert (at_wandb.code, at_mlflow.status) == (0, "FINISHED")


def test_a_run_that_goes_on_is_the_same_run_without_double_lines(wandb, mlflow, tmp_path, student):
    write(tmp_path, chosen("wandb", "mlflow"), LINES[:2], image=5)
    later = chosen("wandb", "mlflow", log_every=7)
    write(tmp_path, later, LINES[2:], image=10, model=student)
    write(tmp_path, later, LINES[3:], image=10, model=student)  # a finished run is evaluated again
    [at_wandb], [at_mlflow] = wandb.runs.values(), mlflow.runs.values()
    assert of_wandb(at_wandb) == of_mlflow(at_mlflow) == sorted(set(logged(tmp_path))) and len(logged(tmp_path)) == 11
    assert len(at_wandb.models) == len(at_mlflow.models) == 1 and not at_wandb.dropped
    assert [*at_mlflow.images] == ["detections/step_00000005.png", "detections/step_00000010.png"]
    assert sum("detections" in one for one in at_wandb.rows.values()) == 2
    assert at_wandb.config["log_every"] == 7
    assert at_mlflow.params["log_every"] == "20" and at_mlflow.tags == {"changed.log_every": "7"}


def test_of_steps_that_are_repeated_only_what_differs_is_sent(wandb, mlflow, tmp_path):
    """After a kill, the losses are the same to the bit, and times are not; after a rollback, losses differ."""
    made = chosen("wandb", "mlflow")
    write(tmp_path, made, [(5, "train", row(2.0)), (10, "train", row(1.5))])
    again = [(10, "train", row(1.5, seconds=3.0)), (15, "train", row(1.0)), (15, "eval", {"student/AP": 0.5})]
    write(tmp_path, made, again)
    [at_wandb], [at_mlflow] = wandb.runs.values(), mlflow.runs.values()
    assert of_wandb(at_wandb) == of_mlflow(at_mlflow) == sorted({*logged(tmp_path)}) and len(logged(tmp_path)) == 13
    assert at_wandb.rows[3].keys() == {"step", "time", "seconds"}
    # A rollback in the process: steps come again, and with values of others.
    write(tmp_path, made, [(20, "train", row(0.5)), *again[1:], (20, "train", row(0.25)), (20, "train", row(0.25))])
    assert of_wandb(at_wandb) == of_mlflow(at_mlflow) == sorted({*logged(tmp_path)})
    assert [*at_wandb.rows] == [1, 2, 3, 4, 5, 6, 9] and at_wandb.rows[9].keys() == {"step", "time", "student/total"}


def test_a_run_that_was_without_them_is_sent_whole(wandb, mlflow, tmp_path):
    write(tmp_path, chosen(), LINES[:3])
    assert not wandb.runs and not (tmp_path / trackers.STATE).exists()
    write(tmp_path, chosen("wandb", "mlflow"), LINES[3:])
    [at_wandb], [at_mlflow] = wandb.runs.values(), mlflow.runs.values()
    assert logged(tmp_path) == of_wandb(at_wandb) == of_mlflow(at_mlflow)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
@pytest.mark.user_input(
    "The machine", "the server of Weights & Biases or MLflow is away in a run", "reported once; the run goes on"
)
def test_a_tool_that_fails_is_warned_of_once_and_gets_the_rest_later(
    request, name, tmp_path, capsys, monkeypatch, student
):
    tool, now = request.getfixturevalue(name), [0.0]
    monkeypatch.setattr(trackers.time, "monotonic", lambda: now[0])
    made, values = chosen(name), {"wandb": of_wandb, "mlflow": of_mlflow}[name]
    with trackers.opened(made, tmp_path) as all_of_them, Log(tmp_path, 0, board=False, trackers=all_of_them) as log:
        log.write(*LINES[0])
        tool.broken = ConnectionError("the server is away")
        log.write(*LINES[1])
        log.write(*LINES[2])
        [run] = tool.runs.values()
        tool.broken = None
        log.write(*LINES[3])  # not at once: a server that does not answer would cost time at every line
        assert len(values(run)) == 3
        now[0] += 301
        log.write(*LINES[4])
        assert values(run) == logged(tmp_path)
        tool.broken = ConnectionError("the server is away")
        log.image(10, lambda: SHEET)
        log.write(15, "train", row(0.5))
        tool.broken = None
    assert values(run) == logged(tmp_path)
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"kdjax: {name} failed (the server is away): the training goes on, and metrics.jsonl has everything; what "
        f"{name} lacks is sent when it works again, or by the same command later"
    ]
    with trackers.opened(made, tmp_path) as all_of_them, Log(tmp_path, 0, board=False, trackers=all_of_them) as log:
        tool.broken = RuntimeError("away\nagain")
        log.write(20, "train", row(0.25))
        log.model(student, {})
    assert f"{name} failed (RuntimeError: away again)" in capsys.readouterr().err
    assert values(run) != logged(tmp_path)
    tool.broken = None
    write(tmp_path, made, [])
    assert values(run) == logged(tmp_path) and len(tool.runs) == 1


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
@pytest.mark.user_input(
    "Config and flags",
    "a run that Weights & Biases or MLflow cannot begin",
    "refused: check its settings and the network",
)
def test_a_new_run_is_refused_and_one_that_goes_on_is_not(request, name, tmp_path, capsys):
    tool = request.getfixturevalue(name)
    tool.broken = ConnectionError("the server is away")
    with pytest.raises(UserError, match=f"^config.log.to: {name} cannot begin a run at .*\\(the server is away\\): "):
        write(tmp_path, chosen(name), LINES)
    assert not (tmp_path / "metrics.jsonl").exists()
    tool.broken = None
    write(tmp_path, chosen(name), LINES[:1])
    tool.broken = ConnectionError("the server is away")
    write(tmp_path, chosen(name), LINES[1:])
    assert "the training goes on" in capsys.readouterr().err
    tool.broken = None
    write(tmp_path, chosen(name), [])
    [run] = tool.runs.values()
    assert {"wandb": of_wandb, "mlflow": of_mlflow}[name](run) == logged(tmp_path)


def test_a_run_that_was_deleted_in_mlflow_is_sent_again(mlflow, tmp_path):
    made = chosen("mlflow")
    write(tmp_path, made, LINES[:2])
    [first] = mlflow.runs.values()
    first.stage = "deleted"
    write(tmp_path, made, LINES[2:])
    assert len(mlflow.runs) == 2 and of_mlflow(mlflow.runs["run1"]) == logged(tmp_path)


def test_where_one_cannot_begin_the_others_are_ended(wandb, mlflow, tmp_path):
    mlflow.broken = ConnectionError("the server is away")
    with pytest.raises(UserError, match="mlflow cannot begin a run"):
        write(tmp_path, chosen("wandb", "mlflow"), LINES)
    [at_wandb] = wandb.runs.values()
    assert at_wandb.code == 1


def test_a_run_that_is_gone_or_at_another_place_is_sent_again(wandb, mlflow, tmp_path, monkeypatch):
    made = chosen("wandb", "mlflow")
    write(tmp_path, made, LINES[:2])
    mlflow.runs.clear()
    monkeypatch.setenv("WANDB_MODE", "online")
    write(tmp_path, made, LINES[2:])
    [at_mlflow], at_wandb = mlflow.runs.values(), wandb.runs["run1"]
    assert of_mlflow(at_mlflow) == of_wandb(at_wandb) == logged(tmp_path)
    assert at_wandb.settings["resume"] == "allow" and at_wandb.mode == "online"
    write(tmp_path, made, [(15, "train", row(0.5))])
    assert of_wandb(at_wandb) == logged(tmp_path) and len(wandb.runs) == 2
    wandb.runs.pop("run1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    write(tmp_path, made, [])
    assert of_wandb(wandb.runs["run1"]) == of_mlflow(mlflow.runs["run1"]) == logged(tmp_path)
    assert mlflow.uri == "http://elsewhere"


def test_a_workdir_that_was_moved_has_its_artefacts_where_it_is(mlflow, tmp_path):
    write(tmp_path / "a", chosen("mlflow"), LINES[:2])
    (tmp_path / "a").rename(tmp_path / "b")
    write(tmp_path / "b", chosen("mlflow"), LINES[2:])
    places = {name: one.artifact_location for name, one in mlflow.experiments.items()}
    assert places == {
        "cells": f"file://{tmp_path}/a/mlflow/artifacts",
        f"cells, {tmp_path}/b": f"file://{tmp_path}/b/mlflow/artifacts",
    }
    assert of_mlflow(mlflow.runs["run1"]) == logged(tmp_path / "b")


@pytest.mark.parametrize(("error", "code", "status"), [(KeyboardInterrupt, 143, "KILLED"), (KeyError, 1, "FAILED")])
def test_how_a_run_ended_is_told(wandb, mlflow, tmp_path, error, code, status):
    with (
        pytest.raises(error),
        trackers.opened(chosen("wandb", "mlflow"), tmp_path, stops=(KeyboardInterrupt,)),
    ):
        raise error
    [at_wandb], [at_mlflow] = wandb.runs.values(), mlflow.runs.values()
    assert (at_wandb.code, at_mlflow.status) == (code, status)


def test_other_hosts_send_nothing(wandb, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.jax, "process_index", lambda: 1)
    with trackers.opened(chosen("wandb"), tmp_path) as none:
        assert not none
    assert not wandb.runs and not [*tmp_path.iterdir()]


@pytest.mark.user_input("Config and flags", "a logger that is unknown or not installed", "refused: how to install it")
def test_loggers_are_checked_before_anything(monkeypatch):
    with pytest.raises(UserError, match=r"there is no logger 'wandbb' \(did you mean wandb\?\): they are jsonl, tens"):
        checks.check_settings(chosen("wandbb"))
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)  # import fails
        with pytest.raises(UserError, match=rf"config.log.to: {name} cannot be imported .*pip install 'kdjax\[{name}"):
            checks.check_settings(chosen(name))
    monkeypatch.setitem(sys.modules, "mlflow", Mlflow().module)
    unnamed = chosen("mlflow")
    unnamed.log.project = ""
    with pytest.raises(UserError, match=r"config.log.project: it is empty: mlflow needs a name"):
        checks.check_settings(unnamed)
    wrong = chosen()
    with wrong.unlocked():
        wrong.log.to = (1,)
    with pytest.raises(UserError, match=r"config.log.to must be a tuple of texts, not \(1,\)"):
        config.check_values(wrong)


def test_the_command_line_takes_names_between_commas():
    made = command_settings.read("quickstart", ["--config.log.to=wandb, jsonl", "--config.log.project=cells"])
    assert (made.log.to, made.log.project) == (("wandb", "jsonl"), "cells")
    assert command_settings.read("quickstart", ["--config.log.to=('mlflow',)"]).log.to == ("mlflow",)
    assert command_settings.read("quickstart", ["--config.log.to="]).log.to == ()
    assert command_settings.read("quickstart").log.to == ("jsonl", "tensorboard")


def test_without_tensorboard_none_is_written(tmp_path):
    with Log(tmp_path, 0, board=False) as log:
        log.write(1, "train", row(1.0))
    assert not (tmp_path / "tensorboard").exists() and len(numbered(tmp_path / "metrics.jsonl")) == 1
