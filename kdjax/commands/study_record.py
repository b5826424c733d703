"""What a study leaves in study.json: the results of each seed, with all that decided them; `kdjax league` reads it."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax import files, resources
from kdjax.commands.study_layout import flags_of, folder_of, read_config, twin_folder
from kdjax.commands.study_runs import start_of, unreadable
from kdjax.commands.study_variants import Options, Variant
from kdjax.errors import UserError
from kdjax.report.study import KEPT
from kdjax.resources import Config
from kdjax.training import config as training
from kdjax.training import log
from kdjax.training.auto_weight import AUTO

FILE = "study.json"  # in the folder of the study
FORMAT = 1
# Settings that say where the data is, whose content the fingerprint tells, or that are told elsewhere in a row.
_TOLD = re.compile(
    r"seed|twin|methods\..*|teachers(\..*)?|(teacher|student)\.weights|auto_weight\..*|"
    r"data\.(source|classes|limit|scenes_\w+|\w+_(split|annotations|images))"
)


def write(options: Options, content: Mapping[str, Any]) -> None:
    """Writes a study into study.json beside those that other commands made in the folder, as of further seeds."""
    path = options.workdir / FILE
    others = read(path) if path.exists() else {}
    files.write_json(
        path, files.sealed({"format": FORMAT, "studies": others | {content["command"]: content}}), indent=1
    )


def read(path: Path) -> dict[str, Any]:
    """The studies that a study.json holds, by command.

    Raises:
      UserError: it is not one, or was damaged or changed.
    """
    with unreadable(path):
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or "studies" not in content:
            raise UserError(f"{path}: it is not the study.json of a study")
        if content.get("format") != FORMAT:
            raise UserError(f"{path}: another version of kdjax wrote it: run its study again")
        if files.altered(content):
            raise UserError(f"{path}: it was changed after it was written (its SHA-256 differs): run its study again")
        return dict(content["studies"])


def row(
    options: Options,
    variant: Variant,
    runs: Mapping[int, Mapping[str, Any]],
    failures: Mapping[int, str],
    tuned: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """A row of study.json.

    Args:
      options: arguments of the command.
      variant: the row.
      runs: results of "student", "twin" and "teacher" by seed, "at_equal_time" of the longer twin, and "time".
      failures: why a seed has none.
      tuned: the entry of tuned.json, if there was a tuning.
    """
    config = read_config(flags_of(options, variant, options.first))
    return {
        "name": variant.name,
        "what": what(options, variant, tuned),
        "data": data_of(options, variant, config, runs),
        "student": named(config.student.detector, config.student.options),
        "teacher": model_of(config.teacher) if variant.methods else None,
        "settings": settings_of(config) if variant.methods else without_teacher(settings_of(config)),
        "methods": methods_of(config),
        "tuned": tuned,
        "runs": {str(seed): kept(options, variant, seed, run) for seed, run in runs.items()},
        "failed": {str(seed): why for seed, why in failures.items()},
    }


def what(options: Options, variant: Variant, tuned: Mapping[str, Any] | None) -> str:
    """The name of a row among others with the same data, student and teacher: what the command says of its methods."""
    changed = [flag.removeprefix("--config.methods.") for flag in options.flags if flag.startswith("--config.methods.")]
    parts = [variant.what or variant.name, *changed, *(["tuned"] if tuned else [])]
    return ", ".join(parts)


def data_of(options: Options, variant: Variant, config: Config, runs: Mapping[int, object]) -> dict[str, str]:
    """Name and fingerprint of the data of a row; the fingerprint is that of a finished run, or of the twin."""
    root = Path(config.data.root.rpartition("://")[2]).expanduser().absolute()
    root = root.parent if root.suffix in (".yaml", ".yml") else root
    name = config.data.source if config.data.source == "scenes" else root.name
    folders = [*(folder_of(options, variant, seed) for seed in runs), twin_folder(options, variant, options.first)]
    return {"name": name, "fingerprint": start_of(folders[0]).get("data", "")}


def named(detector: str, options: Mapping[str, Any]) -> str:
    """A detector with the options that are not its defaults."""
    chosen = ", ".join(f"{name}={value}" for name, value in options.items())
    return f"{detector} ({chosen})" if chosen else detector


def model_of(teacher: Config) -> dict[str, str]:
    """Name and hash of a teacher's weights; where they lie does not matter."""
    path = resources.model_path(teacher.weights).expanduser() if teacher.weights else None
    detector, digest = teacher.detector, ""
    if path and (path / "config.json").is_file():
        with unreadable(path / "config.json"):
            note = json.loads((path / "config.json").read_text())
            detector, digest = note["detector"], note["sha256"]
    elif path and path.is_file():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        detector = detector or path.stem
    return {"name": named(detector, teacher.options), "sha256": digest}


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that decide a result, apart from what else a row of study.json tells."""
    values: dict[str, Any] = json.loads(json.dumps(training.flat(config.to_dict())))
    found = {key: value for key, value in values.items() if not training.is_free(key) and not _TOLD.fullmatch(key)}
    if config.student.weights:
        found["student.weights"] = model_of(config.student)["sha256"]
    return dict(sorted(found.items()))


def without_teacher(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a student without a teacher."""
    return {key: value for key, value in settings.items() if not key.startswith("teacher.")}


def methods_of(config: Config) -> dict[str, Any]:
    """The options of the methods of a run, and of weights that set themselves."""
    found = training.flat(config.methods.to_dict())
    if AUTO in found.values():
        found |= {f"auto_weight.{key}": value for key, value in config.auto_weight.to_dict().items()}
    return dict(sorted(json.loads(json.dumps(found)).items()))


def kept(options: Options, variant: Variant, seed: int, run: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of the results of a seed."""
    found: dict[str, Any] = {
        model: {key: value for key, value in run[model].items() if key in KEPT}
        for model in ("student", "twin", "teacher", "at_equal_time")
        if run.get(model)
    }
    if "time" in run:
        found["time"] = run["time"]
    rows, _ = log.read(folder_of(options, variant, seed) / "metrics.jsonl")
    seconds = sum({one["step"]: one["seconds"] for one in rows if one["kind"] == "train"}.values())
    return found | {"seconds": round(seconds, 1)}


def seconds_of(rows: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of training of the students of all rows."""
    return round(sum(run["seconds"] for one in rows for run in one["runs"].values()), 1)
