"""The lines of metrics.jsonl as series over the steps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdjax.report.charts import Series
from kdjax.report.format import MODELS

Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl
# Of charts, by the name of a value.
TITLES = {
    "lr": "learning rate",
    "images_per_s": "images per second",
    "grad_norm": "gradient norm",
    "wait_share": "fraction of time spent waiting for data",
    "total": "total loss",
}


def read(rows: Rows, kind: str) -> dict[str, Series]:
    """{name: (steps, values)} of all numbers; a resumed run repeats steps, and the last value of a step counts.

    Args:
      rows: lines of metrics.jsonl.
      kind: "train" or "eval".

    Example:
      >>> steps, values = read([{"step": 5, "kind": "train", "lr": 0.1}, {"step": 5, "kind": "train", "lr": 0.2}],
      ...                      "train")["lr"]
      >>> float(steps[0]), float(values[0])
      (5.0, 0.2)
    """
    numbers: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.get("kind") != kind:
            continue
        for name, value in row.items():
            if name in ("step", "kind", "time") or isinstance(value, bool):
                continue
            if value is None or isinstance(value, int | float):
                numbers.setdefault(name, {})[int(row["step"])] = math.nan if value is None else float(value)
    series = {}
    for name, values in numbers.items():
        steps = sorted(values)
        series[name] = np.array(steps, float), np.array([values[step] for step in steps], float)
    return series


def by_model(series: Mapping[str, Series]) -> dict[str, dict[str, Series]]:
    """{name of a loss: {model: series}} in the order of the log; the student is last, so that it is drawn on top."""
    split: dict[str, dict[str, Series]] = {}
    for name, line in series.items():
        model, _, rest = name.partition("/")
        if model in MODELS and rest:
            split.setdefault(rest, {})[model] = line
    return {name: {m: lines[m] for m in MODELS if m in lines} for name, lines in split.items()}


def under(series: Mapping[str, Series], kind: str) -> dict[str, Series]:
    """The series of a kind without its name: "weight/mkd/feature" under "weight" is "mkd/feature"."""
    return {name.removeprefix(f"{kind}/"): line for name, line in series.items() if name.startswith(f"{kind}/")}


def last(line: Series | None) -> float | None:
    """The last finite value of a series; None without one.

    Example:
      >>> last((np.array([1.0, 2.0]), np.array([3.0, np.nan])))
      3.0
    """
    values = np.zeros(0) if line is None else line[1][np.isfinite(line[1])]
    return float(values[-1]) if len(values) else None
