"""The page of several runs side by side: results, curves over each other, classes, and settings that differ."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from kdjax.report import pages
from kdjax.report.charts import Series, chart_grid, line_chart, stroke
from kdjax.report.format import abbreviated, difference, is_defined, percent, signed
from kdjax.report.live import duration
from kdjax.report.series import TITLES, Rows, by_model, read, under

Run = Mapping[str, Any]  # an entry of compare.json, see `kdjax.commands.compare`
LONGEST = 60  # characters of a setting in the table
_BORDERS = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "double"}


def page(runs: Sequence[Run], logs: Mapping[str, Rows], settings: Mapping[str, Sequence[Any]]) -> str:
    """compare.html.

    Args:
      runs: of compare.json.
      logs: the lines of metrics.jsonl of each run, by its name.
      settings: those that differ, with the values in the order of the runs.

    Returns:
      HTML without references to other files.
    """
    names = [run["name"] for run in runs]
    marks = {name: stroke(place)[0] for place, name in enumerate(names)}
    trained = {name: read(rows, "train") for name, rows in logs.items()}
    tested = {name: read(rows, "eval") for name, rows in logs.items()}
    key = _legend(names)
    found = [
        ("Results", pages.table(results(runs), marks=marks) + _notes(runs)),
        ("AP over training", _with(key, _ap_charts(names, trained, tested))),
        ("Losses and terms of the student", _with(key, _loss_charts(names, trained))),
        ("Speed and schedule", _with(key, _other_charts(names, trained))),
        ("AP by class", _classes(runs, marks)),
        ("Settings that differ", _settings(names, settings, marks)),
    ]
    lead = f'<p class="verdict">{escape(summary(runs))}</p>{key}'
    return pages.page(f"{len(runs)} runs", lead, [(name, body) for name, body in found if body])


def summary(runs: Sequence[Run]) -> str:
    """The runs in words.

    Args:
      runs: of compare.json.

    Returns:
      One to three sentences; the first says so if their APs are not comparable.

    Example:
      >>> run = {"name": "a", "finished": True, "data": "1", "metrics": {"AP": 0.41}}
      >>> summary([run, run | {"name": "b", "metrics": {"AP": 0.4}}])
      'a has the highest AP, 41.0; b is next with 40.0.'
    """
    ap = {run["name"]: run["metrics"]["AP"] for run in runs if is_defined((run["metrics"] or {}).get("AP"))}
    best = sorted(ap, key=lambda name: -ap[name])
    if not best:
        text = "None of the runs has an AP yet."
    elif len(best) == 1:
        text = f"{best[0]} has AP {percent(ap[best[0]])}; the others have none yet."
    else:
        equal = [name for name in best if percent(ap[name]) == percent(ap[best[0]])]
        text = f"{' and '.join(equal)} {'have' if equal[1:] else 'has'} the highest AP, {percent(ap[best[0]])}"
        after = best[len(equal) :]
        text += f"; {after[0]} is next with {percent(ap[after[0]])}." if after else "."
    if len({run["data"] for run in runs}) > 1:
        text = f"The runs do not have the same images, boxes and classes: their APs are not comparable. {text}"
    running = [run["name"] for run in runs if not run["finished"]]
    if running:
        text += f" Not finished: {', '.join(running)}."
    return text


def results(runs: Sequence[Run]) -> list[list[str]]:
    """The table of results, the first row being the heading.

    Args:
      runs: of compare.json.
    """
    lines = [["run", "state", "student", "methods", "AP", "AP50", "gain in AP", "time", "parameters"]]
    for run in runs:
        metrics = run["metrics"] or {}
        state = (
            "finished"
            if run["finished"]
            else f"step {run['step']:,} of {run['steps']:,}".replace(" ", "\N{NO-BREAK SPACE}")
        )
        gain = (run["gain"] or {}).get("AP")
        cells = [
            run["student"],
            " + ".join(run["methods"]) or "–",
            percent(metrics.get("AP")),
            percent(metrics.get("AP50")),
        ]
        time = duration(run["seconds"]) if run["seconds"] else "–"
        lines.append([run["name"], state, *cells, signed(gain), time, abbreviated(metrics.get("params"))])
    return lines


def _notes(runs: Sequence[Run]) -> str:
    text = "AP and AP50 of the student in percent; gain: student minus twin, in percentage points, from a single run; "
    text += "time: of the whole run so far, with compilation and evaluations."
    for run in runs:
        if not run["finished"] and run["metrics"]:
            images = f"the first {run['limit']}" if run["limit"] else "all"
            text += f" {run['name']}: metrics after step {run['evaluated']:,}, on {images} validation images."
    return f'<p class="small">{escape(text)}</p>'


def _legend(names: Sequence[str]) -> str:
    key = ""
    for place, name in enumerate(names):
        colour, dashes = stroke(place)
        style = f"background:none;height:0;border-top:3px {_BORDERS[dashes]} var(--{colour})"
        key += f'<li><i class="stroke" style="{style}"></i>{escape(name)}</li>'
    return f'<ul class="legend">{key}</ul>'


def _with(key: str, charts: str) -> str:
    return key + charts if charts else ""


def _ap_charts(
    names: Sequence[str], trained: Mapping[str, Mapping[str, Series]], tested: Mapping[str, Mapping[str, Series]]
) -> str:
    charts = []
    for metric in ("AP", "AP50", "AP75"):
        lines = {name: _in_percent(tested[name].get(f"student/{metric}")) for name in names}
        charts.append(_chart(lines, names, title=metric, unit="%", log=False))
    seconds = {name: trained[name].get("seconds") for name in names}
    longest = max((float(np.nansum(line[1])) for line in seconds.values() if line), default=0.0)
    unit, size = next(
        pair for pair in (("hour", 3600), ("minute", 60), ("second", 1)) if longest >= 5 * pair[1] or pair[1] == 1
    )
    lines = {}
    for name, line in seconds.items():
        ap = _in_percent(tested[name].get("student/AP"))
        if line and ap:
            passed = np.nancumsum(line[1]) / size
            lines[name] = (np.interp(ap[0], line[0], passed), ap[1])
    charts.append(_chart(lines, names, title=f"AP over {unit}s of training", unit="%", log=False, across=unit))
    return chart_grid(charts)


def _loss_charts(names: Sequence[str], trained: Mapping[str, Mapping[str, Series]]) -> str:
    """Charts of what two runs or more have."""
    split = {name: by_model(series) for name, series in trained.items()}
    found = dict.fromkeys(loss for of_run in split.values() for loss, lines in of_run.items() if "student" in lines)
    charts = []
    for loss in found:
        lines = {name: split[name].get(loss, {}).get("student") for name in names}
        if sum(line is not None for line in lines.values()) > 1:
            charts.append(_chart(lines, names, title=TITLES.get(loss, loss)))
    shares = {name: under(series, "share") for name, series in trained.items()}
    for method in dict.fromkeys(method for of_run in shares.values() for method in of_run):
        lines = {name: shares[name].get(method) for name in names}
        lines = {name: (line[0], 100 * line[1]) for name, line in lines.items() if line}
        if len(lines) > 1:
            charts.append(_chart(lines, names, title=f"share of the gradient of {method}", unit="%", log=False))
    return chart_grid(charts)


def _other_charts(names: Sequence[str], trained: Mapping[str, Mapping[str, Series]]) -> str:
    charts = []
    for value in ("images_per_s", "wait_share", "lr"):
        lines = {name: trained[name].get(value) for name in names}
        charts.append(_chart(lines, names, title=TITLES[value], log=False))
    return chart_grid(charts)


def _chart(lines: Mapping[str, Series | None], names: Sequence[str], **options: Any) -> str:
    present = {name: line for name, line in lines.items() if line is not None}
    return line_chart(present, runs=names, **options) if present else ""


def _in_percent(line: Series | None) -> Series | None:
    return None if line is None else (line[0][line[1] >= 0], 100 * line[1][line[1] >= 0])


def _classes(runs: Sequence[Run], marks: Mapping[str, str]) -> str:
    having = [run for run in runs if run["per_class"]]
    if not having:
        return ""
    first, *others = having
    names = dict.fromkeys(name for run in having for name in run["per_class"])

    def spread(name: str) -> float:
        values = [run["per_class"].get(name) for run in having]
        defined = [value for value in values if is_defined(value)]
        return max(defined) - min(defined) if defined else -1.0

    table = [["class", first["name"], *(word for run in others for word in (run["name"], "difference"))]]
    for name in sorted(names, key=lambda name: -spread(name)):
        base = first["per_class"].get(name)
        cells = [percent(base)]
        for run in others:
            value = run["per_class"].get(name)
            cells += [percent(value), signed(difference(value, base))]
        table.append([name, *cells])
    missing = [run["name"] for run in runs if not run["per_class"]]
    about = f"AP of the student in percent; differences to {first['name']}, in percentage points."
    about += " The classes with the largest differences come first." if others else ""
    about += f" Not there before the end of a run: {', '.join(missing)}." if missing else ""
    return pages.table(table, marks=marks) + f'<p class="small">{escape(about)}</p>'


def _settings(names: Sequence[str], settings: Mapping[str, Sequence[Any]], marks: Mapping[str, str]) -> str:
    if not settings:
        return "<p>None: the runs have the same settings, data, versions and devices.</p>"
    table = [["setting", *names]]
    for setting, values in settings.items():
        table.append([setting, *(shown(value) for value in values)])
    return pages.table(table, marks=marks)


def shown(value: object) -> str:
    """A setting as text; "–" where a run has none.

    Example:
      >>> shown(None), shown("adamw"), shown([1, 2]), shown(True)
      ('–', 'adamw', '[1, 2]', 'true')
    """
    text = "–" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
