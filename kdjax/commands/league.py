"""`kdjax league`: merges studies of several folders, machines or data sets into one table.

    kdjax league runs/scenes runs/bccd other_machine/study.json --out=runs/league

A column is a setting: the same data, student, teacher and settings of the run. A row is a method as its study names it.
Seeds of the same row and column are united; the same seed twice must have the same result and counts once. OUT gets
league.json, league.md and league.html, which depend on the studies alone.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax import files
from kdjax.commands import arguments, study_record, study_tuning
from kdjax.commands.study_runs import unreadable
from kdjax.errors import UserError
from kdjax.report import league as report
from kdjax.report import study as of_study

OUTPUTS = ("league.json", "league.md", "league.html")


@dataclasses.dataclass
class Cell:
    """A row of a column."""

    methods: dict[str, Any]
    tuned: dict[str, Any] | None
    runs: dict[int, Any] = dataclasses.field(default_factory=dict)
    paths: dict[int, Path] = dataclasses.field(default_factory=dict)  # of the studies that the runs are from
    failed: dict[int, str] = dataclasses.field(default_factory=dict)
    path: Path = Path()  # of the first study


@dataclasses.dataclass
class Column:
    """The same data, student, teacher and settings."""

    data: dict[str, str]
    student: str
    teacher: dict[str, str] | None
    settings: dict[str, Any]
    cells: dict[str, Cell] = dataclasses.field(default_factory=dict)
    twins: dict[int, tuple[Any, Path]] = dataclasses.field(default_factory=dict)


def run(*, paths: Sequence[str], out: str) -> int:
    """Merges studies.

    Args:
      paths: workdirs of studies, or their study.json.
      out: a folder for `OUTPUTS`.

    Returns:
      Exit code: 0.

    Raises:
      UserError: a path is not a study or is damaged, two studies contradict each other, or the folder cannot be
        written.
    """
    found = [Path(path) / study_record.FILE if Path(path).is_dir() else Path(path) for path in paths]
    for path, given in zip(found, paths, strict=True):
        if not path.is_file():
            raise UserError(f"{given}: there is no {study_record.FILE}: name the workdir of a finished study")
    columns, versions = merge({path: study_record.read(path) for path in found})
    folder = arguments.make_folder(out, outputs=OUTPUTS)
    content = {"columns": [summary(title, column) for title, column in titled(columns).items()], "versions": versions}
    failed: list[str] = []
    with files.attempt(failed):
        files.write_json(folder / "league.json", content, indent=1)
    text = report.markdown(content["columns"], versions)
    with files.attempt(failed):
        files.write_text(folder / "league.md", text)
    with files.attempt(failed):
        files.write_text(folder / "league.html", report.page(content["columns"], versions))
    files.finish(failed)
    print(f"{text}\n{folder / 'league.html'}")
    return 0


def merge(studies: Mapping[Path, Mapping[str, Any]]) -> tuple[list[Column], list[str]]:
    """The columns of all studies, and the versions that made them.

    Args:
      studies: of `study_record.read`, by path.

    Raises:
      UserError: two studies contradict each other, or one is damaged.
    """
    columns: dict[str, Column] = {}
    versions = set()
    for path, named in sorted(studies.items(), key=lambda entry: json.dumps(entry[1], sort_keys=True)):
        with unreadable(path):
            for study in named.values():
                versions.add(", ".join(f"{name} {value}" for name, value in study["versions"].items() if value))
                for row in study["rows"]:
                    add(columns, path, row)
    return list(columns.values()), sorted(versions)


def add(columns: dict[str, Column], path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row of a study to its column.

    Raises:
      UserError: it contradicts what is there.
    """
    if not row["runs"] and not row["failed"]:
        return
    teacher = row["teacher"] and row["teacher"]["sha256"]
    key = json.dumps([row["data"]["fingerprint"], row["student"], teacher, row["settings"]], sort_keys=True)
    if key not in columns:
        columns[key] = Column(row["data"], row["student"], row["teacher"], row["settings"])
    column = columns[key]
    cell = column.cells.setdefault(row["what"], Cell(row["methods"], row["tuned"], path=path))
    if differ := [
        f"{name} is {cell.methods.get(name)!r} and {row['methods'].get(name)!r}"
        for name in {**cell.methods, **row["methods"]}
        if cell.methods.get(name) != row["methods"].get(name)
    ]:
        raise UserError(
            f"{cell.path} and {path}: {row['what']} on {column.data['name']} has other options in each "
            f"({'; '.join(differ[:3])}): merge one of them"
        )
    for text, result in row["runs"].items():
        seed = int(text)
        twin, of_twin = column.twins.setdefault(seed, (result["twin"], path))
        if twin != result["twin"]:
            raise UserError(
                f"{of_twin} and {path}: the twins of seed {seed} on {column.data['name']} differ (AP {twin['AP']:.4f} "
                f"and {result['twin']['AP']:.4f}): studies on different machines need seeds of their own (--first)"
            )
        same = cell.runs.setdefault(seed, result)
        first = cell.paths.setdefault(seed, path)
        if without_times(same) != without_times(result):
            raise UserError(
                f"{first} and {path}: seed {seed} of {row['what']} on {column.data['name']} has other results in each "
                f"(AP {same['student']['AP']:.4f} and {result['student']['AP']:.4f}): merge one of them"
            )
        if "at_equal_time" in result:
            cell.runs[seed] = same | {name: result[name] for name in ("at_equal_time", "time")}
    for text, why in row["failed"].items():
        cell.failed.setdefault(int(text), why)


def without_times(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result without what depends on how fast the machine was."""
    return {name: value for name, value in result.items() if name not in ("time", "at_equal_time", "seconds")}


def titled(columns: Sequence[Column]) -> dict[str, Column]:
    """The columns by title, in alphabetical order; a title says as much as tells its column from the others."""
    plain = collections.defaultdict(list)
    for column in columns:
        teacher = f"from {column.teacher['name']}" if column.teacher else "without teacher"
        plain[f"{column.data['name']}: {column.student} {teacher}"].append(column)
    found = {}
    for title, same in plain.items():
        facts = [
            {"data": one.data["fingerprint"][:8], "teacher": (one.teacher or {"sha256": ""})["sha256"][:8]}
            | one.settings
            for one in same
        ]
        names = dict.fromkeys(name for one in facts for name in one)
        differ = [name for name in names if len({json.dumps(one.get(name)) for one in facts}) > 1]
        for column, one in zip(same, facts, strict=True):
            more = ", ".join(f"{name}={one.get(name)}" for name in differ)
            found[f"{title} ({more})" if len(same) > 1 else title] = column
    return dict(sorted(found.items()))


def summary(title: str, column: Column) -> dict[str, Any]:
    """A column of league.json: its facts, and the rows with the largest gain first."""
    rows = []
    for name, cell in column.cells.items():
        failed = {seed: why for seed, why in cell.failed.items() if seed not in cell.runs}
        runs = dict(sorted(cell.runs.items()))
        if any("at_equal_time" not in one for one in runs.values()):  # of all seeds, or of none
            runs = {seed: without_times(one) for seed, one in runs.items()}
        row = of_study.summarize(name, runs, dict(sorted(failed.items())))
        rows.append(row | {"methods": cell.methods, "tuned": study_tuning.shown(cell.tuned) if cell.tuned else ""})
    rows.sort(key=lambda row: (-row["gain AP"][0] if row["seeds"] else math.inf, row["name"]))
    facts = {"data": column.data, "student": column.student, "teacher": column.teacher, "settings": column.settings}
    return {"title": title, **facts, "rows": rows}
