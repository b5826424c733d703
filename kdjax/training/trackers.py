"""Weights & Biases and MLflow, beside metrics.jsonl, which stays the record of a run (docs/loggers.md).

Each gets the settings, every line of metrics.jsonl once, sheets of detections and the final student. `trackers.json` in
the workdir holds the id of the run there and how far it has come: a run that goes on continues it, and first sends what
it lacks. What fails there never ends the training.
"""

import contextlib
import difflib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from kdjax import files
from kdjax.errors import UserError, fault, imported
from kdjax.training import log
from kdjax.training.config import Config, flat

NAMES = ("jsonl", "tensorboard", "wandb", "mlflow")  # of config.log.to
STATE = "trackers.json"
_RETRY = 300.0  # s after a failure, before anything is sent again; more after an attempt that took long
_PATIENCE = 20  # times as long as an attempt took
_STOPPED = 143  # code of a run that was stopped
_OF_A_REQUEST = 100  # parameters that MLflow takes at once
_LONGEST = 6000  # characters of a parameter of MLflow

Json = dict[str, Any]


class Tool(Protocol):
    """What a run is at Weights & Biases or MLflow."""

    id: str  # of the run there
    known: bool  # whether the run was there already
    first: int  # lines below this number are there already, as far as the tool itself knows

    def line(self, number: int, step: int, when: float, values: Mapping[str, float]) -> None:
        """Sends some metrics of one line of metrics.jsonl, which was written at `when` (s since 1970)."""

    def image(self, number: int, step: int, image: np.ndarray) -> None:
        """Sends a sheet of detections, u8[H, W, 3]; `number`: the line of the metrics that belong to it."""

    def model(self, folder: Path, metrics: Mapping[str, float]) -> None:
        """Sends the folder of the final student."""

    def close(self, code: int) -> None:
        """Ends the run there; code 0: finished, 143: stopped, to go on later, else failed."""


def check(config: Config) -> None:
    """Checks `config.log`, and that the packages of the loggers can be imported.

    Raises:
      UserError: an unknown logger, one that is not installed, or no name of the project.
    """
    for name in config.log.to:
        if name not in NAMES:
            close = difflib.get_close_matches(name, NAMES, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UserError(f"config.log.to: there is no logger {name!r}{hint}: they are {', '.join(NAMES)}")
    for name in _chosen(config):
        if not config.log.project:
            raise UserError(f"config.log.project: it is empty: {name} needs a name")
        imported(name, "config.log.to", f"kdjax[{name}]")


def _chosen(config: Config) -> list[str]:
    return [name for name in ("wandb", "mlflow") if name in config.log.to]


@contextlib.contextmanager
def opened(config: Config, folder: Path, *, stops: tuple[type[BaseException], ...] = ()) -> Iterator["Trackers"]:
    """The trackers of a run, which know at the end how it went.

    Args:
      config: of the run.
      folder: the workdir.
      stops: exceptions after which the run is to go on later; others are failures.

    Raises:
      UserError: a run that is not known there yet cannot be begun.
    """
    trackers = Trackers(config, folder)
    try:
        yield trackers
    except BaseException as error:
        trackers.close(_STOPPED if isinstance(error, stops) else 1)
        raise
    trackers.close(0)


class Trackers:
    """The chosen ones of Weights & Biases and MLflow; on the first host alone, and it may be none."""

    def __init__(self, config: Config, folder: Path) -> None:
        """Begins or continues the run with each of them, and sends the lines that it lacks.

        Args:
          config: of the run.
          folder: the workdir.

        Raises:
          UserError: a run that is not known there yet cannot be begun; one that goes on warns and is tried again later.
        """
        chosen = [] if jax.process_index() else _chosen(config)
        makers: dict[str, Callable[..., Tool]] = {"wandb": _Wandb, "mlflow": _Mlflow}
        places = {"wandb": _place_of_wandb, "mlflow": _place_of_mlflow}
        self.all: list[_Sender] = []
        try:
            for name in chosen:
                self.all.append(_Sender(name, makers[name], places[name](folder), config, folder))
        except BaseException:
            self.close(1)
            raise

    def __bool__(self) -> bool:
        return bool(self.all)

    def line(self, number: int, row: Mapping[str, Any]) -> None:
        """Sends a line of metrics.jsonl.

        Args:
          number: of the line, from 1.
          row: `step`, `kind`, `time` and the metrics by name.
        """
        for one in self.all:
            one.line(number, row)

    def image(self, number: int, step: int, sheet: np.ndarray) -> None:
        """Sends a sheet of detections, once for a step.

        Args:
          number: of the line with the metrics that belong to it.
          step: number of updates so far.
          sheet: u8[H, W, 3] RGB.
        """
        for one in self.all:
            one.image(number, step, sheet)

    def model(self, folder: Path, metrics: Mapping[str, float]) -> None:
        """Sends the final student, once.

        Args:
          folder: of its weights, config.json and model card.
          metrics: of it, by name.
        """
        for one in self.all:
            one.model(folder, metrics)

    def close(self, code: int) -> None:
        """Ends the run there; code 0: finished, 143: stopped, to go on later, else failed."""
        for one in self.all:
            one.close(code)


class _Sender:
    """One tool and what it lacks; what fails is warned of once, and tried again later."""

    def __init__(self, name: str, make: Callable[..., Tool], place: str, config: Config, folder: Path) -> None:
        self.name, self.make, self.config, self.folder = name, make, config, folder
        found = _read(folder / STATE).get(name, {})
        # Elsewhere the run is another one, which lacks everything.
        is_here = isinstance(found, dict) and found.get("where") == place
        self.state: Json = found if is_here else {"where": place}
        self.tool: Tool | None = None
        self.waiting: list[tuple[Callable[[Tool], None], Json]] = []  # what to call, and what is known then
        self.step, self.values = -1, {}  # the highest step, and its metrics by name
        self.warned, self.later = False, 0.0
        is_new = "id" not in self.state
        self._read_lines(there=self.state.get("lines", 0))
        self._send(refuse=is_new)

    def _read_lines(self, there: int) -> None:
        """Notes the lines of metrics.jsonl; the tool has those up to the number `there`."""
        known: dict[int, dict[str, float]] = {}
        for number, row in log.numbered(self.folder / "metrics.jsonl"):
            self._note_line(number, row, known.setdefault(row["step"], {}), there=number <= there)
        self.step = max(known, default=-1)
        self.values = known.get(self.step, {})

    def line(self, number: int, row: Mapping[str, Any]) -> None:
        if row["step"] > self.step:
            self.step, self.values = row["step"], {}
        repeats = row["step"] < self.step
        self._note_line(number, row, self._earlier(row["step"], number) if repeats else self.values)
        self._send()

    def _earlier(self, step: int, number: int) -> dict[str, float]:
        """The metrics of a step in the lines before a number."""
        found = {}
        for other, row in log.numbered(self.folder / "metrics.jsonl"):
            if other < number and row["step"] == step:
                found |= _metrics(row)
        return found

    def _note_line(self, number: int, row: Mapping[str, Any], known: dict[str, float], *, there: bool = False) -> None:
        """Notes what is new in a line: steps that are repeated after a kill have their values already, but for times.

        Args:
          number: of the line.
          row: the line.
          known: metrics of its step in the lines before; gets those of this one.
          there: the tool has it.
        """
        step, when, values = row["step"], float(row["time"]), _metrics(row)
        new = {name: value for name, value in values.items() if known.get(name) != value}
        known |= new

        def call(tool: Tool) -> None:
            if new and number >= tool.first:
                tool.line(number, step, when, new)

        if not there:
            self.waiting.append((call, {"lines": number}))

    def image(self, number: int, step: int, sheet: np.ndarray) -> None:
        if step > self.state.get("images", -1):
            self.waiting.append((lambda tool: tool.image(number, step, sheet), {"images": step}))
        self._send()

    def model(self, folder: Path, metrics: Mapping[str, float]) -> None:
        digest = json.loads((folder / "config.json").read_text())["sha256"]
        if digest != self.state.get("model"):
            self.waiting.append((lambda tool: tool.model(folder, metrics), {"model": digest}))
        self._send(now=True)

    def close(self, code: int) -> None:
        self._send(now=bool(self.waiting))
        with self._may_fail():
            if self.tool is not None:
                self.tool.close(code)

    def _send(self, *, refuse: bool = False, now: bool = False) -> None:
        """Sends what waits, unless something failed a short time ago.

        Args:
          refuse: a run that cannot be begun is an error.
          now: do not wait after a failure.
        """
        if time.monotonic() < self.later and not now:
            return
        with self._may_fail(refuse=refuse):
            if self.tool is None:
                tool = self.make(self.config, self.folder, self.state)
                if not tool.known and self.state.get("lines"):  # it was deleted there, or never came
                    self._again()
                self.tool = tool
                self._note({"id": tool.id})
            while self.waiting:
                call, after = self.waiting[0]
                call(self.tool)
                self.waiting.pop(0)
                self._note(after)

    def _again(self) -> None:
        """Notes all lines again, for a run that has none of them."""
        self.state, others = {"where": self.state["where"]}, [one for one in self.waiting if "lines" not in one[1]]
        self.waiting = []
        self._read_lines(there=0)
        self.waiting += others

    def _note(self, known: Mapping[str, Any]) -> None:
        self.state |= known
        path = self.folder / STATE
        files.write_json(path, _read(path) | {self.name: self.state}, indent=1)

    @contextlib.contextmanager
    def _may_fail(self, *, refuse: bool = False) -> Iterator[None]:
        """Whatever the package of a tool raises, its own classes included, is a warning, or a sentence at the start."""
        begun = time.monotonic()
        try:
            yield
        except Exception as error:
            why = fault(error) if isinstance(error, OSError) else None
            why = why or " ".join(f"{type(error).__name__}: {error}".split())[:200]
            now = time.monotonic()
            self.later = now + max(_RETRY, _PATIENCE * (now - begun))
            if refuse:
                raise UserError(
                    f"config.log.to: {self.name} cannot begin a run at {self.state['where']} ({why}): check its "
                    "settings and the network, or leave it out"
                ) from error
            if not self.warned:
                self.warned = True
                tqdm.write(
                    f"kdjax: {self.name} failed ({why}): the training goes on, and metrics.jsonl has everything; what "
                    f"{self.name} lacks is sent when it works again, or by the same command later",
                    file=sys.stderr,
                )


def _read(path: Path) -> Json:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line of metrics.jsonl, by the names that TensorBoard has."""
    found = {name: float(value) for name, value in row.items() if name not in ("step", "kind", "time")}
    return found if row["kind"] == "train" else {f"eval/{name}": value for name, value in found.items()}


def _settings(config: Config) -> dict[str, Any]:
    """All settings as plain values, by "optimizer.lr"."""
    return flat(json.loads(config.to_json()))


def _place_of_wandb(folder: Path) -> str:
    mode = os.environ.get("WANDB_MODE") or "offline"
    return mode if mode != "online" else os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


class _Wandb:
    """Weights & Biases: a line is a row whose `_step` is its number; curves are drawn over the column `step`."""

    def __init__(self, config: Config, folder: Path, state: Json) -> None:
        import wandb  # pyright: ignore[reportMissingImports] - an extra

        self.package = wandb
        mode = os.environ.get("WANDB_MODE") or "offline"
        self.run = wandb.init(
            project=config.log.project,
            name=folder.name,
            id=state.get("id"),
            dir=str(folder),
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(console="off"),
        )
        self.id = self.run.id
        # Offline, a process writes a file of its own, with the run's id.
        self.known = "id" in state and (self.run.resumed or mode != "online")
        self.first = self.run.step if self.run.resumed else 0
        self.run.config.update(_settings(config), allow_val_change=True)
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def line(self, number: int, step: int, when: float, values: Mapping[str, float]) -> None:
        self.run.log({**values, "step": step, "time": when}, step=number)

    def image(self, number: int, step: int, image: np.ndarray) -> None:
        self.run.log({"detections": self.package.Image(image), "step": step}, step=number)

    def model(self, folder: Path, metrics: Mapping[str, float]) -> None:
        made = self.package.Artifact(f"student-{self.id}", type="model", metadata=dict(metrics))
        made.add_dir(str(folder), policy="immutable")  # not copied to the user's home
        self.run.log_artifact(made)

    def close(self, code: int) -> None:
        self.run.finish(exit_code=code)


def _place_of_mlflow(folder: Path) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.absolute() / 'mlflow' / 'mlflow.db'}"


class _Mlflow:
    """MLflow: a metric of a line is written with the line's time, so that writing it again changes nothing."""

    known: bool
    first = 0

    def __init__(self, config: Config, folder: Path, state: Json) -> None:
        import mlflow  # pyright: ignore[reportMissingImports] - an extra

        # Its own defaults would stop the training for minutes when the server is away.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self.entities: Any = mlflow.entities
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            (folder / "mlflow").mkdir(exist_ok=True)
        self.client: Any = mlflow.MlflowClient(tracking_uri=_place_of_mlflow(folder))
        self.id = state.get("id", "")
        self.known = bool(self.id) and self._continues()
        if not self.known:
            self.id = self.client.create_run(self._experiment(config, folder), run_name=folder.name).info.run_id
        self._parameters(_settings(config))

    def _continues(self) -> bool:
        """Whether the run is there; then it runs again."""
        from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports] - an extra

        try:
            if self.client.get_run(self.id).info.lifecycle_stage != "active":  # deleted in its interface
                return False
            self.client.update_run(self.id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def _experiment(self, config: Config, folder: Path) -> str:
        name, is_local = config.log.project, not os.environ.get("MLFLOW_TRACKING_URI")
        place = (folder.absolute() / "mlflow" / "artifacts").as_uri() if is_local else None
        found = self.client.get_experiment_by_name(name)
        if place and found is not None and found.artifact_location != place:  # the workdir was moved
            name = f"{name}, {folder.absolute()}"
            found = self.client.get_experiment_by_name(name)
        return self.client.create_experiment(name, artifact_location=place) if found is None else found.experiment_id

    def _parameters(self, values: Mapping[str, Any]) -> None:
        """Settings are parameters; those that have changed since the run began, which those cannot, are tags too."""
        texts = {_key(name): str(value)[:_LONGEST] for name, value in values.items()}
        before = self.client.get_run(self.id).data.params
        new = [self.entities.Param(name, text) for name, text in texts.items() if name not in before]
        for at in range(0, len(new), _OF_A_REQUEST):
            self.client.log_batch(self.id, params=new[at : at + _OF_A_REQUEST])
        for name, text in texts.items():
            if before.get(name, text) != text:
                self.client.set_tag(self.id, f"changed.{name}", text)

    def line(self, number: int, step: int, when: float, values: Mapping[str, float]) -> None:
        moment = round(when * 1000)
        metrics = [self.entities.Metric(_key(name), value, moment, step) for name, value in values.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def image(self, number: int, step: int, image: np.ndarray) -> None:
        self.client.log_image(self.id, image, artifact_file=f"detections/step_{step:08d}.png")

    def model(self, folder: Path, metrics: Mapping[str, float]) -> None:
        self.client.log_artifacts(self.id, str(folder), artifact_path="student")

    def close(self, code: int) -> None:
        self.client.set_terminated(self.id, {0: "FINISHED", _STOPPED: "KILLED"}.get(code, "FAILED"))


def _key(name: str) -> str:
    """A name that MLflow accepts: letters, digits and _ - . / : and spaces."""
    return re.sub(r"[^\w\-./: ]", "_", name, flags=re.ASCII)
