"""Weights & Biases (offline) and MLflow (a local store) themselves: what they hold is what metrics.jsonl has."""

import contextlib
import importlib.util
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from kdjax.training import config as settings
from kdjax.training import trackers
from kdjax.training.log import Log, numbered
from kdjax.training.run import run
from tests.support.runs import killed_after, random_teacher, stopped_in_step, tiny_config
from tests.support.trackers import ENVIRONMENT, logged

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # of these packages
]


def needs(name):
    absent = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(absent, reason=f"{name} is not installed: pip install 'kdjax[{name}]'")


@pytest.fixture(autouse=True)
def _nothing_is_sent(monkeypatch):
    for name in ENVIRONMENT:  # what the code sets is undone after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY", "WANDB_SILENT"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def records(path):
    """The records of a file of wandb: blocks of 32 KiB with pieces of records, as in LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    content, place, parts = path.read_bytes(), 7, []
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # the end of a block is too short for a piece
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record
    assert not parts


def name_of(item):
    """Of a value; a value that is in others has all their names."""
    return item.key or "/".join(item.nested_key)


class Offline:
    """What all files of a run hold."""

    def __init__(self, workdir):
        self.ids, self.rows, self.config, self.artifacts, self.codes, self.axes = set(), [], {}, [], [], {}
        self.files = sorted((workdir / "wandb").glob("offline-run-*/*.wandb"))
        for path in self.files:
            for record in records(path):
                kind = record.WhichOneof("record_type")
                if kind == "run":
                    self.ids.add((record.run.run_id, record.run.project))
                    updates = record.run.config.update
                elif kind == "history":
                    items = {name_of(i): json.loads(i.value_json) for i in record.history.item}
                    self.rows.append((record.history.step.num, items))
                elif kind == "config":
                    updates = record.config.update
                elif kind == "artifact":
                    self.artifacts.append(record.artifact)
                elif kind == "exit":
                    self.codes.append(record.exit.exit_code)
                elif kind == "metric":
                    self.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
                if kind in ("run", "config"):
                    self.config |= {name_of(i): json.loads(i.value_json) for i in updates}

    def values(self):
        skipped = {"step", "time"}
        return sorted(
            (row["step"], name, value)
            for _, row in self.rows
            for name, value in row.items()
            if name not in skipped and not name.startswith(("_", "detections"))
        )


class Store:
    """What MLflow's local store has of the one run."""

    def __init__(self, workdir):
        import mlflow

        client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{workdir}/mlflow/mlflow.db")
        [experiment] = [one for one in client.search_experiments() if one.name != "Default"]
        [self.run] = client.search_runs([experiment.experiment_id])
        self.experiment, self.client = experiment.name, client
        key = self.run.info.run_id
        metrics = [one for name in self.run.data.metrics for one in client.get_metric_history(key, name)]
        self.values = sorted((one.step, one.key, one.value) for one in metrics)
        self.moments = {(one.step, one.timestamp) for one in metrics}
        self.artifacts = workdir / "mlflow" / "artifacts" / key / "artifacts"


def once(workdir):
    """Each (step, name, value) of metrics.jsonl, once."""
    return sorted({*logged(workdir)})


def check_wandb(workdir, config, *, processes):
    found = Offline(workdir)
    assert found.values() == once(workdir)
    assert len(found.files) == processes and [project for _, project in found.ids] == ["tiny"]
    steps = [number for number, _ in found.rows]
    assert steps == sorted(set(steps)) and set(steps) <= {n for n, _ in numbered(workdir / "metrics.jsonl")}
    flat = settings.flat(json.loads(config.to_json()))
    assert {name: found.config[name] for name in flat} == flat
    assert found.axes["*"] == "step"
    sheets = {row["step"]: row["detections/path"] for _, row in found.rows if "detections/path" in row}
    for sheet in sheets.values():
        [file] = (workdir / "wandb").glob(f"offline-run-*/files/{sheet}")
        assert np.asarray(Image.open(file)).std() > 5
    model = [one for one in found.artifacts if one.type == "model"]
    return found, sheets, model


def check_mlflow(workdir, config):
    found = Store(workdir)
    assert found.values == once(workdir) and found.experiment == "tiny"
    assert found.moments <= {(one["step"], round(one["time"] * 1000)) for _, one in numbered(workdir / "metrics.jsonl")}
    flat = settings.flat(json.loads(config.to_json()))
    assert found.run.data.params == {name: str(value) for name, value in flat.items()}
    sheets = {int(path.stem[5:]): np.asarray(Image.open(path)) for path in (found.artifacts / "detections").iterdir()}
    assert all(sheet.std() > 5 for sheet in sheets.values())
    return found, sheets


def same_files(one, other):
    names = ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in one.iterdir()) == names
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    teacher = random_teacher(tmp_path_factory.mktemp("small"))
    config = tiny_config(folder, teacher=teacher, method="cwd", batch_size=4, eval__every=10)
    config.log.to, config.log.project = ("wandb", "mlflow"), "tiny"
    return config


@needs("wandb")
@needs("mlflow")
def test_a_run_that_is_stopped_and_goes_on_is_held_whole(made, folder):
    workdir = folder / "tracked"
    with stopped_in_step(12):
        run(made, workdir)
    assert Store(workdir).run.info.status == "KILLED" and Offline(workdir).codes == [143]
    run(made, workdir)
    found, sheets, models = check_wandb(workdir, made, processes=2)
    assert sorted(sheets) == [10, 20] and found.codes == [143, 0]
    [artifact] = models
    assert {entry.path for entry in artifact.manifest.contents} == {"README.md", "config.json", "model.safetensors"}
    store, drawn = check_mlflow(workdir, made)
    assert sorted(drawn) == [10, 20] and store.run.info.status == "FINISHED"
    assert same_files(store.artifacts / "student", workdir / "student")
    names = {name for _, name, _ in once(workdir)}
    assert {"lr", "student/cwd/cwd", "eval/student/AP", "eval/twin/AP50", "eval/teacher/AP"} <= names
    assert not (workdir / "tensorboard").exists()
    # Evaluating the finished run again adds lines of equal values.
    lines = len(numbered(workdir / "metrics.jsonl"))
    run(made, workdir)
    assert len(numbered(workdir / "metrics.jsonl")) > lines
    assert Store(workdir).values == Offline(workdir).values() == once(workdir)
    assert len(Offline(workdir).artifacts) == len(found.artifacts)


@needs("mlflow")
def test_a_store_that_fails_loses_no_line(made, folder, monkeypatch, capsys):
    """A run that was killed and whose store failed in the middle, and one process later."""
    import mlflow

    workdir, config = folder / "failing", made.copy_and_resolve_references()
    config.log.to = ("mlflow", "tensorboard")
    with killed_after(10):
        run(config, workdir)
    send = mlflow.MlflowClient.log_batch

    def fails(self, key, metrics=(), **others):
        if any(one.step >= 15 for one in metrics):
            raise mlflow.exceptions.MlflowException("the server is away")
        return send(self, key, metrics=metrics, **others)

    with monkeypatch.context() as patched:
        patched.setattr(mlflow.MlflowClient, "log_batch", fails)
        run(config, workdir)
    assert capsys.readouterr().err.count("mlflow failed (MlflowException: the server is away)") == 1
    assert (workdir / "results.json").exists() and max(step for step, *_ in once(workdir)) == 20
    assert max(step for step, *_ in Store(workdir).values) == 10
    run(config, workdir)
    store, drawn = check_mlflow(workdir, config)
    assert store.run.info.status == "FINISHED" and 20 in drawn and list((workdir / "tensorboard").iterdir())
    assert same_files(store.artifacts / "student", workdir / "student")


@contextlib.contextmanager
def mlflow_server(folder, port):
    """MLflow's own server on this machine, until the context is left."""
    command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
    command += [f"--backend-store-uri=sqlite:///{folder}/db.sqlite", f"--artifacts-destination={folder}/artifacts"]
    with (folder / "log").open("a") as log:
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=os.environ | paths)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            time.sleep(0.5)
        else:
            raise AssertionError((folder / "log").read_text())
        yield
    finally:
        process.terminate()
        process.wait()


@needs("mlflow")
def test_a_server_that_is_away_gets_the_rest_when_it_is_back(tmp_path, monkeypatch, capsys):
    import mlflow

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text('{"sha256": "abc"}')
    config = settings.base()
    config.log.to = ("mlflow",)
    with contextlib.ExitStack() as stack:
        with mlflow_server(tmp_path, port):
            all_of_them = stack.enter_context(trackers.opened(config, tmp_path))
            log = stack.enter_context(Log(tmp_path, 0, board=False, trackers=all_of_them))
            log.write(1, "train", {"lr": 0.5, "seconds": 1.0})
        begun = time.monotonic()
        log.write(2, "train", {"lr": 0.25, "seconds": 1.0})
        assert time.monotonic() - begun < 60
        begun = time.monotonic()
        log.write(3, "train", {"lr": 0.125, "seconds": 1.0})
        assert time.monotonic() - begun < 1  # it is not asked again
        assert capsys.readouterr().err.count("the training goes on") == 1
        with mlflow_server(tmp_path, port):
            log.model(tmp_path / "student", {})
            stack.close()
            client = mlflow.MlflowClient()
            key = json.loads((tmp_path / trackers.STATE).read_text())["mlflow"]["id"]
            values = [(one.step, one.value) for one in client.get_metric_history(key, "lr")]
            assert values == [(1, 0.5), (2, 0.25), (3, 0.125)]
            assert client.get_run(key).info.status == "FINISHED"
            assert [one.path for one in client.list_artifacts(key, "student")] == ["student/config.json"]


@needs("wandb")
def test_wandb_reads_a_key_and_refuses_without(made, folder, monkeypatch):
    """`WANDB_MODE=online` without a key and without a server: a sentence, before anything is compiled."""
    config = made.copy_and_resolve_references()
    config.log.to = ("wandb",)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(folder / "none"))
    with pytest.raises(trackers.UserError, match=r"config.log.to: wandb cannot begin a run at http://127.0.0.1:9"):
        trackers.Trackers(config, folder)
