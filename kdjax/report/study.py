"""Results of several runs as a table and a chart: gains over the twin with their intervals and verdicts over seeds."""

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kdjax.report import verdict

METRICS = ("AP", "AP50")
OF_MASKS = "mask_AP"  # in the results of detectors with masks
KEPT = (*METRICS, OF_MASKS, "params", "flops")  # of the results of a run, what tables need
AT_EQUAL_TIME = "AP at equal time"  # student minus the twin that was trained for as long
Row = dict[str, Any]


def gain(run: Mapping[str, Any], metric: str, twin: str = "twin") -> float:
    """Gain of the student over a twin in points of a metric."""
    return round(100 * (run["student"][metric] - run[twin][metric]), 3)


def summarize(name: str, runs: Mapping[int, Mapping[str, Any]], failures: Mapping[int, str]) -> Row:
    """A row of the table, over the seeds that are finished.

    Args:
      name: of the row.
      runs: by seed, results of "student", "twin" and "teacher", which may be None; "at_equal_time": those of the twin
        that was trained for as long, and "time": the relative time of a step.
      failures: by seed, why there is no result.

    Returns:
      "name", "seeds" and "failed"; in points, for each metric its "gains", their mean and its standard error as "gain",
      for AP their "interval" and "verdict", at equal time too; the APs of "teacher", "twin" and "student".
    """
    row: Row = {"name": name, "seeds": sorted(runs), "failed": dict(failures)}
    if not runs:
        return row
    ordered = [runs[seed] for seed in row["seeds"]]
    gains = {metric: [gain(run, metric) for run in ordered] for metric in METRICS}
    if all("at_equal_time" in run for run in ordered):
        gains[AT_EQUAL_TIME] = [gain(run, "AP", "at_equal_time") for run in ordered]
        times = [run["time"] for run in ordered]  # one measurement on each machine
        row["time"] = {"ratio": round(statistics.mean(time["ratio"] for time in times), 3)}
        row["time"]["times"] = sorted({time["times"] for time in times})
    if all(OF_MASKS in run[model] for run in ordered for model in ("twin", "student")):
        gains[OF_MASKS] = [gain(run, OF_MASKS) for run in ordered]
        for model in ("twin", "student"):
            row[f"{model} {OF_MASKS}"] = mean_and_error([100 * run[model][OF_MASKS] for run in ordered])
    for metric, values in gains.items():
        row[f"gains {metric}"], row[f"gain {metric}"] = values, mean_and_error(values)
        if metric in ("AP", AT_EQUAL_TIME):
            ends = verdict.interval(values)
            row[f"interval {metric}"] = None if ends is None else [round(end, 3) for end in ends]
            row[f"verdict {metric}"] = verdict.verdict(values)
    for model in ("teacher", "twin", "student"):
        row[model] = mean_and_error([100 * run[model]["AP"] for run in ordered]) if ordered[0].get(model) else None
    row["params"], row["flops"] = (ordered[0]["student"][key] for key in ("params", "flops"))
    return row


def study_table(rows: Sequence[Row]) -> str:
    """A Markdown table with one row per variant; the columns of times, tuning, sizes and masks only where some are."""
    header, *lines = cells(rows)
    return table(header, lines)


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The cells of `study_table`, the first row being the heading."""
    parts = [_gains, _times, _tuning, _sizes, _masks]
    headings = {part: [*next(filter(None, map(part, rows)), {})] for part in parts}
    lines = []
    for row in rows:
        values = [cell for part, names in headings.items() for cell in part(row).values() or ["–"] * len(names)]
        lines.append([row["name"], *values, str(len(row["seeds"])), _notes(row)])
    return [["", *(name for names in headings.values() for name in names), "seeds", "note"], *lines]


def by_chance(rows: Sequence[Row]) -> str:
    """The sentence on verdicts by chance below a table."""
    return verdict.by_chance(sum(len(row["seeds"]) >= verdict.LEAST for row in rows))


def _gains(row: Row) -> dict[str, str]:
    """Cells by heading; empty where a row has none."""
    if not row["seeds"]:
        return {}
    return {
        "gain in AP": f"{row['gain AP'][0]:+.2f}",
        "95 % interval": verdict.shown(row["interval AP"]),
        "by seed": ", ".join(f"{value:+.2f}" for value in row["gains AP"]),
        "verdict": row["verdict AP"],
        "gain in AP50 ± standard error": shown(row["gain AP50"], "+"),
        "AP": shown(row["student"]),
        "twin": shown(row["twin"]),
        "teacher": f"{row['teacher'][0]:.2f}" if row["teacher"] else "–",
    }


def _times(row: Row) -> dict[str, str]:
    if "time" not in row:
        return {}
    return {
        "time of a step": f"{row['time']['ratio']:.2f}",
        "longer twin": "× " + ", ".join(f"{times:g}" for times in row["time"]["times"]),
        "gain at equal time": f"{row[f'gain {AT_EQUAL_TIME}'][0]:+.2f}",
        "its 95 % interval": verdict.shown(row[f"interval {AT_EQUAL_TIME}"]),
        "its verdict": row[f"verdict {AT_EQUAL_TIME}"],
    }


def _tuning(row: Row) -> dict[str, str]:
    return {"tuned": row["tuned"]} if row.get("tuned") else {}


def _sizes(row: Row) -> dict[str, str]:
    if "latency_ms" not in row:
        return {}
    return {
        "parameters": str(row["params"]),
        "MFLOPs": f"{row['flops'] / 1e6:.1f}",
        "latency in ms": f"{row['latency_ms']:.1f}",
    }


def _masks(row: Row) -> dict[str, str]:
    if f"gain {OF_MASKS}" not in row:
        return {}
    return {
        "gain in mask AP": shown(row[f"gain {OF_MASKS}"], "+"),
        "mask AP": shown(row[f"student {OF_MASKS}"]),
        "twin's mask AP": shown(row[f"twin {OF_MASKS}"]),
    }


def _notes(row: Row) -> str:
    reasons: dict[str, list[str]] = {}
    for seed, why in row["failed"].items():
        reasons.setdefault(why, []).append(str(seed))
    return "; ".join(f"seed {', '.join(seeds)} failed: {why}" for why, seeds in reasons.items())


def draw(rows: Sequence[Row], title: str) -> Figure:
    """Mean gains as bars with their 95 % intervals, every seed as a dot; colours are those of the verdicts."""
    colours = {verdict.HELPS: "tab:green", verdict.HURTS: "tab:red", verdict.NOT_SHOWN: "tab:gray"}
    rows = [row for row in rows if row["seeds"]][::-1]
    figure = Figure((8, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for at, row in enumerate(rows):
        mean, ends = row["gain AP"][0], row["interval AP"]
        error = ends and (ends[1] - ends[0]) / 2
        axes.barh(at, mean, color=colours[row["verdict AP"]], alpha=0.5, xerr=error, capsize=3)
        axes.plot(row["gains AP"], [at] * len(row["gains AP"]), "k.", markersize=4)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.axvline(0, color="black", linewidth=0.8)
    about = "green: helps, red: hurts, grey: not shown"
    axes.set(xlabel=f"gain over the twin, AP points (bar: mean, 95 % interval; dots: seeds)\n{about}", title=title)
    axes.grid(axis="x", alpha=0.3)
    return figure


def facts(environment: dict[str, str]) -> dict[str, str]:
    """The entries of an environment that tables quote."""
    return {name: environment[name] for name in ("commit", "python", "jax", "flax", "devices")}


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """The mean and its standard error; a single value has no error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return round(statistics.mean(values), 3), None if error is None else round(error, 3)


def shown(mean_and_error: tuple[float, float | None], sign: str = "") -> str:
    """Formats what `mean_and_error` returns."""
    mean, error = mean_and_error
    return f"{mean:{sign}.2f}" + ("" if error is None else f" ± {error:.2f}")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def publish(command: str, parts: list[str], summary: dict[str, Any], log: Path | None) -> None:
    """Appends the parts and one line of JSON, under the command, to the log if there is one; prints both."""
    parts = [*parts[:-1], f"{time.strftime('%Y-%m-%d')}; {parts[-1]}"]
    if log:
        with log.open("a", encoding="utf-8", errors="replace") as file:
            file.write("\n" + "\n\n".join([f"`{command}`", *parts, f"    {json.dumps(summary)}"]) + "\n")
    print("\n" + "\n\n".join(parts))
    print(json.dumps(summary))
