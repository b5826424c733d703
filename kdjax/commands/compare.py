"""`kdjax compare`: several runs, finished or not, on one page: results, curves, classes, and settings that differ.

    kdjax compare runs/mkd runs/cwd --out=runs/compared

OUT gets compare.json and compare.html. The runs are only read.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax import files, remote
from kdjax.commands import arguments
from kdjax.commands.study_runs import unreadable
from kdjax.errors import UserError
from kdjax.report import compare as report
from kdjax.training import log

OUTPUTS = ("compare.json", "compare.html")
_FACTS = ("data", "kdjax", "commit", "python", "jax", "jaxlib", "flax", "optax", "devices")  # of config.json


def run(*, paths: Sequence[str], out: str) -> int:
    """Compares runs.

    Args:
      paths: their workdirs, two or more.
      out: a folder for `OUTPUTS`.

    Returns:
      Exit code: 0.

    Raises:
      UserError: there is one run only, a folder is not that of a run or is damaged, or the output cannot be written.
    """
    folders = [Path(path).expanduser() for path in paths]
    where: dict[Path, str] = {}
    for folder, path in zip(folders, paths, strict=True):
        check_run(folder, path)
        if folder.resolve() in where:
            raise UserError(f"{path}: it is the same run as {where[folder.resolve()]}: name each run once")
        where[folder.resolve()] = path
    if len(folders) < 2:
        raise UserError(f"{paths[0]}: it is the only run: name two or more to compare")
    logs, runs, configs = {}, [], []
    for folder, name in zip(folders, names_of(folders), strict=True):
        logs[name], damaged = log.read(folder / "metrics.jsonl")
        if damaged:
            print(f"note: {folder / 'metrics.jsonl'}: {damaged} damaged lines are left out", file=sys.stderr)
        entry, config = read(folder, name, logs[name])
        runs.append(entry)
        configs.append(config)
    settings = differences(configs)
    target = arguments.make_folder(out, outputs=OUTPUTS)
    failed: list[str] = []
    with files.attempt(failed):
        files.write_json(target / "compare.json", {"runs": runs, "settings": settings}, indent=1)
    with files.attempt(failed):
        files.write_text(target / "compare.html", report.page(runs, logs, settings))
    files.finish(failed)
    print(f"{arguments.aligned(report.results(runs))}\n\n{report.summary(runs)}\n{target / 'compare.html'}")
    return 0


def check_run(folder: Path, path: str) -> None:
    """Checks that a folder is the workdir of a run.

    Args:
      folder: the folder.
      path: as the user named it.

    Raises:
      UserError: it is not.
    """
    if remote.is_url(path):
        raise UserError(f"{path}: runs in object stores are not read: copy it to this machine")
    if not folder.is_dir():
        raise UserError(f"{path}: there is no such folder: name the workdir of a run")
    if not (folder / "metrics.jsonl").is_file() or not (folder / "config.json").is_file():
        inside = next((one for one in (folder.parent, folder.parent.parent) if (one / "metrics.jsonl").is_file()), None)
        hint = (
            f"its run is {inside}" if inside else "name the workdir of `kdjax train`, after its first line of metrics"
        )
        raise UserError(f"{path}: it is not the folder of a run (metrics.jsonl and config.json): {hint}")


def names_of(folders: Sequence[Path]) -> list[str]:
    """A short name for each run: as many of the last parts of its path as tell it from the others.

    Args:
      folders: all different.

    Example:
      >>> names_of([Path("runs/a/cwd"), Path("runs/b/cwd"), Path("runs/b/mkd")])
      ['a/cwd', 'b/cwd', 'mkd']
    """
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for own in parts:
        count = next(n for n in range(1, len(own) + 1) if sum(other[-n:] == own[-n:] for other in parts) == 1)
        names.append("/".join(own[-count:]))
    return names


def read(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run as it is in compare.json, and its settings with the facts of its process.

    Args:
      folder: of the run.
      name: of the run.
      rows: the lines of its metrics.jsonl.

    Returns:
      `name`, `path`, `finished`, `step` of `steps`, `student` (its detector), `methods`, `metrics` of the student
      (COCO's as fractions, -1 where undefined, with `params` and `flops` once the run is finished; None before the
      first evaluation), `evaluated` (their step) and `limit` (of their images; 0: all), `twin`, `teacher` and `gain`
      likewise or None, `seconds`, `per_class` ({class: AP of the student}), `data` (its fingerprint); and
      {setting: value}.

    Raises:
      UserError: a file of the run is damaged.
    """
    with unreadable(folder / "config.json"):
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config, process = content["config"], content["runs"][-1]
        steps, limit = int(config["steps"]), int(config["eval"]["limit"])
        groups = [config["methods"], *(one["methods"] for one in config.get("teachers", {}).values())]
        student = config["student"]["detector"] or config["student"]["weights"]
        facts = {fact: process.get(fact) for fact in _FACTS}
    step = max((row["step"] for row in rows), default=0)
    entry: dict[str, Any] = {
        "name": name,
        "path": str(folder),
        "finished": False,
        "step": step,
        "steps": steps,
        "student": student,
        "methods": [method for group in groups for method in group],
    }
    entry |= _measured(rows) | {"limit": limit}
    found = folder / "results.json"
    if found.is_file() and step >= steps:
        entry |= _results(found) | {"finished": True, "evaluated": steps, "limit": 0}
    entry |= {"seconds": _seconds(folder, rows), "per_class": {}, "data": facts["data"]}
    if entry["finished"] and (folder / "per_class.json").is_file():
        with unreadable(folder / "per_class.json"):
            classes = json.loads((folder / "per_class.json").read_text(encoding="utf-8"))["student"]
            entry["per_class"] = {str(label): float(ap) for label, ap in classes.items()}
    return entry, flat(config, "config") | facts


def _measured(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The newest evaluation in a log."""
    models: dict[str, Any] = {"metrics": None, "twin": None, "teacher": None, "gain": None, "evaluated": None}
    evaluated = [row for row in rows if row["kind"] == "eval" and "student/AP" in row]
    if not evaluated:
        return models
    row = evaluated[-1]
    values: dict[str, dict[str, float]] = {"student": {}, "twin": {}}
    for key, value in row.items():
        role, _, metric = key.partition("/")
        if role in values and metric:
            values[role][metric] = value
    models |= {"metrics": values["student"], "twin": values["twin"] or None, "evaluated": row["step"]}
    return models | {"gain": _gain(values["student"], values["twin"])}


def _gain(student: Mapping[str, float], twin: Mapping[str, float]) -> dict[str, float] | None:
    both = [name for name in student if twin.get(name, -1) >= 0 and student[name] >= 0]
    return {name: student[name] - twin[name] for name in both} if twin else None


def _results(path: Path) -> dict[str, Any]:
    with unreadable(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        if files.altered(found):
            raise UserError(f"{path}: it was changed (its SHA-256 differs): delete it, and let the run evaluate again")
        found["student"]["AP"]
        gain = (
            {name: found["gain"][name] for name in found["gain"] if found["gain"][name] != -1}
            if found["gain"]
            else None
        )
        return {"metrics": found["student"], "twin": found["twin"], "teacher": found["teacher"], "gain": gain}


def _seconds(folder: Path, rows: Sequence[Mapping[str, Any]]) -> float:
    """What the run took so far; of one without time.json, the time of its steps."""
    path = folder / "time.json"
    if path.is_file():
        with unreadable(path):
            return float(sum(json.loads(path.read_text(encoding="utf-8"))["seconds"].values()))
    return float(sum({row["step"]: row["seconds"] for row in rows if row["kind"] == "train"}.values()))


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, with their values; None where a run has no such setting.

    Args:
      configs: {setting: value} of each run.

    Example:
      >>> differences([{"steps": 1, "seed": 0}, {"steps": 2, "seed": 0}])
      {'steps': [1, 2]}
    """
    names = dict.fromkeys(name for config in configs for name in config)
    table = {name: [config.get(name) for config in configs] for name in names}
    return {name: values for name, values in table.items() if any(value != values[0] for value in values)}


def flat(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The leaves of nested settings by their dotted names.

    Example:
      >>> flat({"a": {"b": 1}, "c": {}}, "config")
      {'config.a.b': 1, 'config.c': {}}
    """
    found: dict[str, Any] = {}
    for name, value in tree.items():
        within = isinstance(value, dict) and value
        found |= flat(value, f"{where}.{name}") if within else {f"{where}.{name}": value}
    return found
