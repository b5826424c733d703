"""Stand-ins for the packages wandb and mlflow, with what kdjax calls; and what they and metrics.jsonl hold."""

import json
import types
from collections import namedtuple
from pathlib import Path

import numpy as np

from kdjax.training.log import numbered

# Variables that say where is written and how; the code sets the last two.
ENVIRONMENT = (
    "WANDB_MODE",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
)
Metric = namedtuple("Metric", "key value timestamp step")
Param = namedtuple("Param", "key value")


class MlflowException(Exception):
    error_code = "RESOURCE_DOES_NOT_EXIST"


class Mlflow:
    """Runs by id, of all clients; `broken` is raised by whatever is sent."""

    def __init__(self):
        self.runs, self.experiments, self.broken = {}, {}, None
        self.exceptions = types.ModuleType("mlflow.exceptions")
        self.exceptions.MlflowException = MlflowException
        self.module = types.ModuleType("mlflow")
        self.module.entities = types.SimpleNamespace(Metric=Metric, Param=Param)
        self.module.MlflowClient = lambda tracking_uri: self.at(tracking_uri)
        self.module.exceptions = self.exceptions

    def at(self, uri):
        self.uri = uri
        return self

    def get_experiment_by_name(self, name):
        return self.experiments.get(name)

    def create_experiment(self, name, artifact_location=None):
        self.experiments[name] = types.SimpleNamespace(experiment_id=name, artifact_location=artifact_location)
        return name

    def create_run(self, experiment, run_name):
        self._work()
        key = f"run{len(self.runs)}"
        self.runs[key] = types.SimpleNamespace(
            id=key,
            params={},
            tags={},
            metrics=[],
            images={},
            models=[],
            status="RUNNING",
            name=run_name,
            stage="active",
        )
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=key))

    def get_run(self, key):
        self._work()
        if key not in self.runs:
            raise MlflowException("there is no such run")
        run = self.runs[key]
        info = types.SimpleNamespace(lifecycle_stage=run.stage)
        return types.SimpleNamespace(info=info, data=types.SimpleNamespace(params=dict(run.params)))

    def update_run(self, key, status):
        self._work()
        assert self.runs[key].stage == "active", "mlflow refuses it"
        self.runs[key].status = status

    def set_tag(self, key, name, value):
        self.runs[key].tags[name] = value

    def log_batch(self, key, metrics=(), params=()):
        self._work()
        assert len(params) <= 100 and not {one.key for one in params} & set(self.runs[key].params)
        self.runs[key].params |= dict(params)
        self.runs[key].metrics += metrics

    def log_image(self, key, image, artifact_file):
        self._work()
        assert image.dtype == np.uint8 and image.shape[2] == 3
        self.runs[key].images[artifact_file] = image

    def log_artifacts(self, key, folder, artifact_path):
        self.runs[key].models.append((artifact_path, sorted(path.name for path in Path(folder).iterdir())))

    def set_terminated(self, key, status):
        self.runs[key].status = status

    def _work(self):
        if self.broken:
            raise self.broken


class Wandb:
    """Runs by id; as wandb does, a row whose step is smaller than the last one is dropped."""

    def __init__(self):
        self.runs, self.broken = {}, None
        self.module = types.ModuleType("wandb")
        self.module.init = self.init
        self.module.Settings = lambda **settings: settings
        self.module.Image = lambda image: ("image", image.shape)
        self.module.Artifact = Artifact

    def init(self, *, id, mode, **settings):
        if self.broken:
            raise self.broken
        key = id or f"run{len(self.runs)}"
        resumed = settings["resume"] == "allow" and key in self.runs
        if key not in self.runs:
            self.runs[key] = Run(self, key)
        run = self.runs[key]
        run.resumed, run.settings, run.mode = resumed, settings, mode
        return run


class Run:
    def __init__(self, owner, key):
        self.owner, self.id, self.rows, self.code = owner, key, {}, None
        self.config, self.axes, self.models, self.dropped = Settings(), {}, [], []

    @property
    def step(self):
        return max(self.rows, default=-1) + 1

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, values, step):
        if self.owner.broken:
            raise self.owner.broken
        if step < max(self.rows, default=0):
            self.dropped.append((step, values))
            return
        json.dumps(values)
        self.rows[step] = self.rows.get(step, {}) | values

    def log_artifact(self, artifact):
        self.models.append(artifact)

    def finish(self, exit_code):
        self.code = exit_code


class Settings(dict):
    def update(self, values, allow_val_change):
        assert allow_val_change
        super().update(values)


class Artifact:
    def __init__(self, name, type, metadata):
        self.name, self.type, self.metadata = name, type, metadata

    def add_dir(self, folder, policy):
        assert policy == "immutable"
        self.files = sorted(path.name for path in Path(folder).iterdir())


def logged(folder):
    """Every metric of every line of metrics.jsonl: (step, name, value)."""
    found = [
        (one["step"], name if one["kind"] == "train" else f"eval/{name}", value)
        for _, one in numbered(folder / "metrics.jsonl")
        for name, value in one.items()
        if name not in ("step", "kind", "time")
    ]
    return sorted(found)


def of_wandb(run):
    skipped = ("step", "time", "detections")
    return sorted(
        (one["step"], name, value) for one in run.rows.values() for name, value in one.items() if name not in skipped
    )


def of_mlflow(run):
    return sorted((one.step, one.key, one.value) for one in run.metrics)
