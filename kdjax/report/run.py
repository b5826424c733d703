"""The report of a training run: one HTML file that begins with the result in words."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from types import MappingProxyType

import numpy as np

from kdjax.files import write_text
from kdjax.report import drawing, live, pages
from kdjax.report.charts import chart_grid, line_chart
from kdjax.report.format import MODELS, abbreviated, compact, difference, is_defined, percent, sign, signed
from kdjax.report.series import TITLES, Rows, by_model, last, read, under

_Rows = dict[str, dict[str, float]]  # name -> {model: AP}

SHADES = ("#8a8f98", "#b07aa1", "#4e79a7", "#59a14f", "#edc948", "#76b7b2", "#e15759")  # of kinds of time
SIZES = {"APs": "small", "APm": "medium", "APl": "large"}


def write_report(
    path: str | Path,
    *,
    title: str,
    results: Mapping[str, Mapping[str, float] | None],
    rows: Rows,
    per_class: Mapping[str, Mapping[str, float]],
    examples: Sequence[drawing.Example],
    class_names: Sequence[str],
    config_text: str,
    notes: Sequence[str],
    seconds: Mapping[str, float] = MappingProxyType({}),
    meanings: Mapping[str, str] = MappingProxyType({}),
    progress: live.Progress | None = None,
) -> None:
    """Writes the report of a run as one HTML file, atomically.

    Args:
      path: the file.
      title: the heading.
      results: `teacher`, `twin`, `student`, each None or COCO's 12 metrics as fractions (-1 where undefined) with
        `params` and `flops`; other keys are not read.
      rows: lines of metrics.jsonl: `step`, `kind` ("train" or "eval") and values by name, those of a model under
        "student/NAME" or "twin/NAME"; the last value of a step counts.
      per_class: model -> {class: AP as a fraction}.
      examples: images with the detections of the models.
      class_names: K names.
      config_text: the resolved config.
      notes: sentences on the run; those of the form "name: value" become a table.
      seconds: where its time went, by kind.
      meanings: of the kinds, in words.
      progress: how far the run is, if it has not ended: the page says so in place of the result, and reloads itself.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = Path(folder, "report.html")
      ...     write_report(file, title="tiny", results={"student": {"AP": 0.5}}, rows=[], per_class={}, examples=[],
      ...                  class_names=["cell"], config_text="", notes=[])
      ...     "reaches AP 50.0" in file.read_text(encoding="utf-8")
      True
    """
    present = _present(results)
    threshold = live.threshold(examples) if progress else live.THRESHOLDS[0]
    images = ("Images", pages.image_rows(examples, class_names, threshold=threshold))
    first, then = ([("Terms", live.terms(rows)), images], []) if progress else ([], [images])
    sections = [
        ("Metrics", pages.metrics_table(present)),
        ("AP over training", _ap_curves(rows, present)),
        *first,
        ("Losses", _loss_curves(rows)),
        ("AP by class and size", _class_and_size(present, per_class)),
        *then,
        ("Time", _time(seconds, meanings)),
        ("Run details", _run_details(notes, config_text)),
    ]
    told = live.lead(progress, rows) if progress else f'<p class="verdict">{escape(verdict(present))}</p>'
    reload = live.RELOAD if progress and not progress.ended else 0
    found = [(name, body) for name, body in sections if body]
    text = pages.page(title, told + (_tiles(present) if present else ""), found, reload=reload)
    write_text(path, text)


def verdict(results: Mapping[str, Mapping[str, float] | None]) -> str:
    """The result of a run in words, from its metrics alone.

    Args:
      results: as for `write_report`.

    Returns:
      One or two sentences.

    Example:
      >>> verdict({"teacher": {"AP": 0.48}, "twin": {"AP": 0.389}, "student": {"AP": 0.412}})
      'The distilled student reaches AP 41.2, 2.3 points above the same student trained alone (38.9); the teacher has \
48.0, so distillation closed 25 % of the gap.'
    """
    present = _present(results)
    ap = {name: 100 * metrics["AP"] for name, metrics in present.items() if is_defined(metrics.get("AP"))}
    if "student" not in ap:
        return "The student’s AP is undefined: the evaluation data has no objects."
    student, twin, teacher = ap["student"], ap.get("twin"), ap.get("teacher")
    if "twin" not in present and "teacher" not in present:
        return f"The detector reaches AP {student:.1f}; there is no other AP to compare it with."
    text = f"The distilled student reaches AP {student:.1f}"
    if twin is None:
        beside = "" if teacher is None else f"; the teacher has {teacher:.1f}"
        return (
            f"{text}{beside}. The same student was not trained alone (no twin), so this run does not show what "
            "distillation added."
        )
    gain = student - twin
    alone = f"the same student trained alone ({twin:.1f})"
    if abs(gain) < 0.05:
        text += f", level with {alone}: in this run distillation made no difference"
    elif gain < 0:
        text += f", {-gain:.1f} points below {alone}: in this run distillation did not help"
    else:
        text += f", {gain:.1f} points above {alone}"
    if teacher is None:
        return text + "."
    text += f"; the teacher has {teacher:.1f}"
    gap = teacher - twin
    if gap < 0.05:
        return text + ", no more than the student trained alone: there was no gap to close."
    if gain > gap:
        return text + ", less than the student."
    # A share of a gap within the noise of an evaluation means nothing.
    return text + (
        f", so distillation closed {100 * gain / gap:.0f} % of the gap." if gain >= 0.05 and gap >= 1 else "."
    )


def _present(results: Mapping[str, Mapping[str, float] | None]) -> dict[str, Mapping[str, float]]:
    """The results of the models that the run has, in the order of `MODELS`."""
    return {name: metrics for name in MODELS if (metrics := results.get(name))}


def _tiles(results: Mapping[str, Mapping[str, float]]) -> str:
    tiles = [
        f'<div class="tile {name}"><span>{name}</span><b>{percent(metrics.get("AP"))}</b>'
        f"<small>AP · {abbreviated(metrics.get('params'))} parameters</small></div>"
        for name, metrics in results.items()
    ]
    if "twin" in results and "student" in results:
        gain = difference(results["student"].get("AP"), results["twin"].get("AP"))
        tiles.append(
            f'<div class="tile"><span>gain</span><b class="{sign(gain)}">{signed(gain)}</b>'
            "<small>percentage points, student minus twin</small></div>"
        )
    explained = ""
    if len(tiles) > 1:
        words = {"teacher": "the big model", "twin": "the small model trained without the teacher, on the same batches"}
        words["student"] = "the small model" + " distilled from the teacher" * ("teacher" in results)
        explained = "; ".join(f"<b>{name}</b>: {words[name]}" for name in results)
        explained = f'<p class="small">{explained}. AP: average precision, COCO’s main metric, in percent.</p>'
    return f'<div class="tiles">{"".join(tiles)}</div>{explained}'


def _ap_curves(rows: Rows, results: Mapping[str, Mapping[str, float]]) -> str:
    series = by_model(read(rows, "eval"))
    charts = []
    for key in ("AP", "AP50", "AP75"):
        lines = {
            model: (steps[values >= 0], 100 * values[values >= 0])
            for model, (steps, values) in series.get(key, {}).items()
            if model != "teacher"
        }
        teacher = results.get("teacher", {}).get(key)
        level = ("teacher", 100 * teacher) if is_defined(teacher) else None
        charts.append(line_chart(lines, title=key, unit="%", level=level, log=False) if lines else "")
    return chart_grid(charts)


def _loss_curves(rows: Rows) -> str:
    series = read(rows, "train")
    split = by_model(series)
    weights = under(series, "weight")

    def weight(name: str) -> str:
        values = weights[name][1] if name in weights else np.zeros(0)
        values = values[np.isfinite(values)]
        if not len(values):
            return ""
        low, high = values.min(), values.max()
        return f"Weight: {compact(low)}" + (f" to {compact(high)}." if high > low else ".")

    detection = [name for name in split if name.startswith("loss")]
    terms = [name for name in split if "/" in name]
    other = [name for name in split if name not in detection + terms]
    text = []
    if detection:
        charts = [line_chart(split[name], title=name) for name in detection]
        text.append("<h3>Detection losses</h3>" + chart_grid(charts))
    if terms:
        charts = [line_chart(split[name], title=name, note=weight(name)) for name in terms]
        text.append("<h3>Distillation terms, unweighted</h3>" + chart_grid(charts))
    if shares := under(series, "share"):
        cosines = under(series, "conflict")
        charts = []
        for name, (steps, values) in shares.items():
            cosine = last(cosines.get(name))
            note = "" if cosine is None else f"Cosine with the gradient of the detection losses: {cosine:+.2f} at last."
            charts.append(line_chart({"run": (steps, 100 * values)}, title=name, unit="%", log=False, note=note))
        text.append("<h3>Shares of the gradient at the student’s neck</h3>" + chart_grid(charts))
    notes = {"total": "For the student this includes the distillation terms."} if terms else {}
    charts = [line_chart(split[name], title=TITLES.get(name, name), note=notes.get(name, "")) for name in other]
    charts += [
        line_chart({"run": line}, title=TITLES.get(name, name), log=False)
        for name, line in series.items()
        if "/" not in name
    ]
    if any(charts):
        text.append("<h3>Learning rate and other values</h3>" + chart_grid(charts))
    return "".join(text)


def _class_and_size(results: Mapping[str, Mapping[str, float]], per_class: Mapping[str, Mapping[str, float]]) -> str:
    models = [name for name in MODELS if per_class.get(name)]
    names = list(dict.fromkeys(name for model in models for name in per_class[model]))
    rows = {name: {model: per_class[model].get(name, -1) for model in models} for name in names}
    order, text = "Best first.", ""
    if "twin" in models and "student" in models:
        order = "Largest gain first."
        rows = _sorted(rows, lambda values: difference(values["student"], values["twin"]))
    elif models:
        rows = _sorted(rows, lambda values: values[models[-1]] if is_defined(values[models[-1]]) else None)
    legend = "".join(f'<li><i class="dot {name}"></i>{name}</li>' for name in (models or results))
    legend = f'<ul class="legend">{legend}</ul>' if len(models or results) > 1 else ""
    if rows:
        text += f"<h3>By class</h3>{legend}{pages.bars(rows, first='class')}<p class=small>{order}</p>"
    sizes = {label: {model: metrics.get(key, -1) for model, metrics in results.items()} for key, label in SIZES.items()}
    if any(is_defined(value) for values in sizes.values() for value in values.values()):
        text += f"<h3>By object size</h3>{legend}{pages.bars(sizes, first='size')}"
        text += '<p class="small">Small: area under 32² pixels; large: over 96² pixels; in the original images.</p>'
    return text


def _sorted(rows: _Rows, key: Callable[[Mapping[str, float]], float | None]) -> _Rows:
    """Largest first, undefined last, stable."""

    def rank(name: str) -> float:
        value = key(rows[name])
        return math.inf if value is None else -value

    return {name: rows[name] for name in sorted(rows, key=rank)}


def _time(seconds: Mapping[str, float], meanings: Mapping[str, str]) -> str:
    total = sum(seconds.values())
    if not total:
        return ""
    parts = [(kind, value, SHADES[i % len(SHADES)]) for i, (kind, value) in enumerate(seconds.items()) if value > 0]
    bar = "".join(
        f'<i style="width:{100 * value / total:.2f}%;background:{shade}" title="{escape(kind)}"></i>'
        for kind, value, shade in parts
    )
    rows = "".join(
        f'<tr><th scope="row"><i class="dot" style="background:{shade}"></i>{escape(kind)} '
        f"<small>{escape(meanings.get(kind, ''))}</small></th><td>{value:.1f} s</td>"
        f"<td>{100 * value / total:.1f} %</td></tr>"
        for kind, value, shade in parts
    )
    head = f'<th scope="col">{total / 60:.1f} minutes</th><th scope="col">time</th><th scope="col">share</th>'
    return (
        f'<div class="stack" role="img" aria-label="shares of the time">{bar}</div><div class="scroll">'
        f'<table class="metrics"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _run_details(notes: Sequence[str], config_text: str) -> str:
    facts, sentences = [], []
    for note in notes:
        name, mark, value = str(note).partition(": ")
        if mark and len(name) <= 30:
            facts.append(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>')
        else:
            sentences.append(f"<li>{escape(str(note))}</li>")
    text = f"<ul>{''.join(sentences)}</ul>" if sentences else ""
    if facts:
        text += f'<div class="scroll"><table class="facts"><tbody>{"".join(facts)}</tbody></table></div>'
    if config_text:
        text += f"<details><summary>Resolved config</summary><pre>{escape(config_text)}</pre></details>"
    return text
