"""Results of several runs as a table and a chart: gains over the twin, means and standard errors over seeds."""

import json
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

METRICS = ("AP", "AP50")
OF_MASKS = "mask_AP"  # in the results of detectors with masks
Row = dict[str, Any]


def gain(run: Mapping[str, Any], metric: str) -> float:
    """Gain of the student over the twin in points of a metric."""
    return round(100 * (run["student"][metric] - run["twin"][metric]), 3)


def summarize(name: str, runs: Mapping[int, Mapping[str, Any]], failures: dict[int, str]) -> Row:
    """A row of the table: means with their standard errors in points, over the seeds that are finished."""
    row: Row = {"name": name, "seeds": sorted(runs), "failed": failures}
    if runs:
        for metric in METRICS:
            row[f"gains {metric}"] = [gain(run, metric) for run in runs.values()]
            row[f"gain {metric}"] = mean_and_error(row[f"gains {metric}"])
        for model in ("teacher", "twin", "student"):
            row[model] = mean_and_error([100 * run[model]["AP"] for run in runs.values()])
        if all(OF_MASKS in run[model] for run in runs.values() for model in ("twin", "student")):
            row[f"gains {OF_MASKS}"] = [gain(run, OF_MASKS) for run in runs.values()]
            for model in ("twin", "student"):
                row[f"{model} {OF_MASKS}"] = mean_and_error([100 * run[model][OF_MASKS] for run in runs.values()])
        row["params"], row["flops"] = (next(iter(runs.values()))["student"][key] for key in ("params", "flops"))
    return row


def study_table(rows: list[Row]) -> str:
    """A Markdown table with one row per variant."""
    header = ["", "gain in AP ± standard error", "by seed", "gain in AP50", "AP", "twin", "teacher", "seeds"]
    sizes = any("latency_ms" in row for row in rows)
    header += ["parameters", "MFLOPs", "latency in ms"] if sizes else []
    masks = any(f"gains {OF_MASKS}" in row for row in rows)
    header += ["gain in mask AP", "mask AP", "twin's mask AP"] if masks else []
    lines = []
    for row in rows:
        if row["seeds"]:
            gains, of_50 = row["gains AP"], row["gains AP50"]
            notes = [] if row["gain AP"][0] > 0 else ["does not help here"]
            cells = [
                with_error(gains, "+"),
                ", ".join(f"{value:+.2f}" for value in gains),
                with_error(of_50, "+"),
            ]
            cells += [shown(row["student"]), shown(row["twin"]), f"{row['teacher'][0]:.2f}", str(len(gains))]
            if sizes:
                cells += [str(row["params"]), f"{row['flops'] / 1e6:.1f}", f"{row['latency_ms']:.1f}"]
            if f"gains {OF_MASKS}" in row:
                of_models = [shown(row[f"{model} {OF_MASKS}"]) for model in ("student", "twin")]
                cells += [with_error(row[f"gains {OF_MASKS}"], "+"), *of_models]
            elif masks:
                cells += ["–"] * 3
        else:
            notes, cells = [], ["–"] * 6 + ["0"] + ["–"] * (3 * sizes + 3 * masks)
        reasons: dict[str, list[str]] = {}
        for seed, why in row["failed"].items():
            reasons.setdefault(why, []).append(str(seed))
        notes += [f"seed {', '.join(seeds)} failed: {why}" for why, seeds in reasons.items()]
        lines.append([row["name"], *cells, "; ".join(notes)])
    return table([*header, "note"], lines)


def draw(rows: list[Row], title: str) -> Figure:
    """Mean gains with their standard errors as bars, every seed as a dot."""
    rows = [row for row in rows if row["seeds"]][::-1]
    figure = Figure((8, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for at, row in enumerate(rows):
        mean, error = row["gain AP"]
        axes.barh(at, mean, color="tab:green" if mean > 0 else "tab:red", alpha=0.5, xerr=error, capsize=3)
        axes.plot(row["gains AP"], [at] * len(row["gains AP"]), "k.", markersize=4)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="gain over the twin, AP points (bar: mean and standard error; dots: seeds)", title=title)
    axes.grid(axis="x", alpha=0.3)
    return figure


def facts(environment: dict[str, str]) -> dict[str, str]:
    """The entries of an environment that tables quote."""
    return {name: environment[name] for name in ("commit", "python", "jax", "flax", "devices")}


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """The mean and its standard error; a single value has no error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return round(statistics.mean(values), 3), None if error is None else round(error, 3)


def with_error(values: list[float], sign: str = "") -> str:
    """The mean with its standard error, such as "1.20 ± 0.15"."""
    return shown(mean_and_error(values), sign)


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
