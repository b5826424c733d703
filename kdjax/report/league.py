"""The table of merged studies: methods by data sets, as Markdown and as a page with charts."""

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from kdjax.report import charts, pages, study

TITLE = "Methods over data sets"
CELL = "Mean gain over the twin in AP points, in brackets its 95 % interval, the verdict, and the number of seeds."
_SHOWN = ("steps", "batch_size", "optimizer.lr", "data.image_size")  # settings in the table of runs
Column = Mapping[str, Any]  # of league.json: title, data, student, teacher, settings and rows


def markdown(columns: Sequence[Column], versions: Sequence[str]) -> str:
    """league.md.

    Args:
      columns: of league.json.
      versions: that made the studies.
    """
    head, *body = overview(columns)
    parts = [f"# {TITLE}", CELL, study.table(head, body), chance(columns)]
    for column in columns:
        parts += [f"## {column['title']}", study.study_table(column["rows"])]
    return "\n\n".join([*parts, f"Versions: {'; '.join(versions)}"]) + "\n"


def page(columns: Sequence[Column], versions: Sequence[str]) -> str:
    """league.html.

    Args:
      columns: of league.json.
      versions: that made the studies.
    """
    drawn = [chart(column) for column in columns]
    settings = []
    for column in columns:
        chosen = [str(column["settings"].get(name, "–")) for name in _SHOWN]
        settings.append([column["title"], *chosen, column["data"]["fingerprint"][:8]])
    sections = [
        ("Gains", pages.table(overview(columns)) + f'<p class="small">{escape(CELL)}</p>'),
        ("Charts", charts.chart_grid(drawn)),
        *((column["title"], pages.table(study.cells(column["rows"]))) for column in columns),
        ("Runs", pages.table([["", *_SHOWN, "data"], *settings]) + _listed(versions)),
    ]
    return pages.page(TITLE, f"<p>{escape(chance(columns))}</p>", [entry for entry in sections if entry[1]])


def overview(columns: Sequence[Column]) -> list[list[str]]:
    """The cells of methods by data sets, the first row being the heading; the largest mean gain comes first."""
    rows: dict[str, dict[str, Any]] = {}
    for column in columns:
        for row in column["rows"]:
            rows.setdefault(row["name"], {})[column["title"]] = row

    def rank(name: str) -> tuple[float, str]:
        gains = [row["gain AP"][0] for row in rows[name].values() if row["seeds"]]
        return (-statistics.mean(gains) if gains else math.inf), name

    titles = [column["title"] for column in columns]
    lines = [[name, *(cell(rows[name].get(title)) for title in titles)] for name in sorted(rows, key=rank)]
    return [["", *titles], *lines]


def cell(row: Mapping[str, Any] | None) -> str:
    """What a method did on a data set."""
    if row is None:
        return "–"
    if not row["seeds"]:
        return "failed"
    ends = row["interval AP"]
    between = f" [{ends[0]:+.2f}, {ends[1]:+.2f}]" if ends else ""
    return f"{row['gain AP'][0]:+.2f}{between} {row['verdict AP']}, {len(row['seeds'])}"


def chance(columns: Sequence[Column]) -> str:
    """The sentence on verdicts by chance."""
    return study.by_chance([row for column in columns for row in column["rows"]])


def chart(column: Column) -> str:
    """The gains of a column with their intervals."""
    rows = [
        charts.Interval(row["name"], row["gains AP"], row["gain AP"][0], row["interval AP"], row["verdict AP"])
        for row in column["rows"]
        if row["seeds"]
    ]
    return charts.interval_chart(rows, title=column["title"], across="gain over the twin, AP points")


def _listed(versions: Sequence[str]) -> str:
    return f"<p class=small>Versions: {escape('; '.join(versions))}</p>"
