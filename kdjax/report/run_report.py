"""The report of a run: one html file that holds everything, with its verdict first.

The page needs no network, no script and no other file, follows the reader's light or dark setting and is laid out for
wide and narrow screens. `write_report` puts it together; the parts (`verdict`, `metrics_table`, `bars`, `line_chart`,
`image_rows`, `page`) are pure functions from metrics to html that other pages can use. All text is escaped here.
"""

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from kdjax.files import write_text
from kdjax.report import drawing

MODELS = drawing.MODELS
PAIRS = (("student", "twin"), drawing.EVALUATED[::-1])  # of which the difference is told, the first minus the second
METRICS = {
    "AP": "mean over IoU .50 to .95",
    "AP50": "IoU .50",
    "AP75": "IoU .75",
    "APs": "small objects, under 32² pixels",
    "APm": "medium objects",
    "APl": "large objects, over 96² pixels",
    "AR1": "recall, 1 detection an image",
    "AR10": "recall, 10 detections",
    "AR100": "recall, 100 detections",
    "ARs": "recall, small objects",
    "ARm": "recall, medium objects",
    "ARl": "recall, large objects",
}
SIZES = {"APs": "small", "APm": "medium", "APl": "large"}
MAX_BARS = 30  # classes; more are told by numbers alone
MAX_POINTS = 240  # of a curve
IMAGE_BYTES = 2_000_000  # of all images together, as base64

Series = tuple[np.ndarray, np.ndarray]  # steps f64[n], values f64[n]


def write_report(
    path: str | Path,
    *,
    title: str,
    results: Mapping[str, Mapping[str, float] | None],
    rows: Sequence[Mapping],
    per_class: Mapping[str, Mapping[str, float]],
    examples: Sequence[dict],
    classes: Sequence[str],
    config_text: str,
    notes: Sequence[str],
) -> None:
    """Writes the report of a run as one html file, in one piece (a reader sees the old file or the new one).

    Args:
      path: the file.
      title: what was run, in a few words.
      results: `teacher`, `twin`, `student`, each None or COCO's 12 metrics as fractions (-1 where undefined) with
        `params` and `flops`; further keys, such as `gain`, are computed here and not read.
      rows: lines of metrics.jsonl: `step`, `kind` ("train" or "eval") and values by name, those of a model under
        "student/NAME" or "twin/NAME"; lines of one step add up, and of a repeated value the last counts.
      per_class: for each model, AP by class as fractions.
      examples: images, as `drawing.panels` takes them; an optional `name` says which image it is.
      classes: K names.
      config_text: the resolved config.
      notes: facts about the run; "name: value" goes into a table.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = Path(folder, "report.html")
      ...     write_report(file, title="tiny", results={"student": {"AP": 0.5}}, rows=[], per_class={}, examples=[],
      ...                  classes=["cell"], config_text="", notes=[])
      ...     "reaches AP 50.0" in file.read_text(encoding="utf-8")
      True
    """
    models = [name for name in MODELS if results.get(name)]
    results = {name: results[name] for name in models}
    sections = [
        ("Metrics", metrics_table(results)),
        ("AP over training", _ap_curves(rows, results)),
        ("Losses", _loss_curves(rows)),
        ("AP by class and size", _class_and_size(results, per_class)),
        ("Images", image_rows(examples, classes)),
        ("The run", _facts(notes, config_text)),
    ]
    lead = f'<p class="verdict">{escape(verdict(results))}</p>{_tiles(results)}'
    text = page(title, lead, [(name, body) for name, body in sections if body])
    write_text(path, text)


def verdict(results: Mapping[str, Mapping[str, float] | None]) -> str:
    """Says in plain words, from the metrics alone, what the run shows and what it does not.

    Args:
      results: as for `write_report`.

    Returns:
      One or two sentences.

    Example:
      >>> verdict({"teacher": {"AP": 0.48}, "twin": {"AP": 0.389}, "student": {"AP": 0.412}})
      'The distilled student reaches AP 41.2, 2.3 points above the same student trained alone (38.9); the teacher has \
48.0, so distillation closed 25 % of the gap.'
    """
    results = {name: results[name] for name in MODELS if results.get(name)}
    ap = {name: 100 * metrics["AP"] for name, metrics in results.items() if _defined(metrics.get("AP"))}
    if "student" not in ap:
        return "AP of the student is undefined: there was nothing to evaluate it on."
    student, twin, teacher = ap["student"], ap.get("twin"), ap.get("teacher")
    if "twin" not in results and "teacher" not in results:
        return f"The detector, trained without a teacher, reaches AP {student:.1f}."
    text = f"The distilled student reaches AP {student:.1f}"
    if twin is None:
        beside = "" if teacher is None else f"; the teacher has {teacher:.1f}"
        return (
            f"{text}{beside}. The same student was not trained alone (no twin), so this run does not say what "
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
        return text + ", not more than the student alone, so it had no lead to pass on."
    if gain > gap:
        return text + ", less than its student."
    # Of a gap within the noise of an evaluation a share says nothing.
    return text + (
        f", so distillation closed {100 * gain / gap:.0f} % of the gap." if gain >= 0.05 and gap >= 1 else "."
    )


def metrics_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """The table of COCO's 12 metrics, parameters and FLOPs: a column a model, and the gain of the student on its twin.

    Args:
      results: model -> metrics, as for `write_report`; models that are not there have no column.

    Returns:
      html.

    Example:
      >>> "<td>41.2</td>" in metrics_table({"student": {"AP": 0.412}})
      True
    """
    if not results:
        return ""
    pair = _pair(results)
    head = "".join(f'<th scope="col"><i class="dot {name}"></i>{name}</th>' for name in results)
    lines = []
    for key, meaning in METRICS.items():
        values = {name: metrics.get(key) for name, metrics in results.items()}
        cells = "".join(f"<td>{_points(value)}</td>" for value in values.values())
        gain = _gain(values, pair) if pair else ""
        lines.append(f'<tr><th scope="row">{key} <small>{meaning}</small></th>{cells}{gain}</tr>')
    for key, label, meaning in (
        ("params", "Parameters", "trainable"),
        ("flops", "FLOPs", "multiply-adds for one image"),
    ):
        cells = "".join(f"<td>{_human(metrics.get(key))}</td>" for metrics in results.values())
        blank = "<td></td>" if pair else ""
        lines.append(f'<tr><th scope="row">{label} <small>{meaning}</small></th>{cells}{blank}</tr>')
    head += f'<th scope="col">{_word(pair)}</th>' if pair else ""
    text = "COCO’s metrics in points, 0 to 100. “–” is undefined: there is no object of that kind. "
    text += _saving(results)
    if pair == PAIRS[0]:
        text += (
            " The gain is student minus twin. It comes from one run: how far such a difference varies by chance, only "
            "runs with several seeds can tell."
        )
    return (
        '<div class="beside"><div class="scroll"><table class="metrics"><thead><tr><th scope="col">figure</th>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div><p class=small>{text}</p></div>"
    )


def bars(rows: Mapping[str, Mapping[str, float]], *, heading: str) -> str:
    """A table with a group of bars a row: one bar a model, and the gain of the student on its twin.

    Beyond `MAX_BARS` rows the bars give way to columns of numbers.

    Args:
      rows: name of the row -> {model: fraction, or -1 where undefined}; all rows have the same models.
      heading: what the rows are.

    Returns:
      html.

    Example:
      >>> "width:50.0%" in bars({"cell": {"student": 0.5}}, heading="class")
      True
    """
    models = list(next(iter(rows.values()), {}))
    pair = _pair(models)
    wide = len(rows) <= MAX_BARS
    lines = []
    for name, values in rows.items():
        if wide:
            group = "".join(
                f'<span class="bar">{_bar(model, values[model])}'
                f'<b><span class="hidden">{model} </span>{_points(values[model])}</b></span>'
                for model in models
            )
            cells = f'<td class="bars">{group}</td>'
        else:
            cells = "".join(f"<td>{_points(values[model])}</td>" for model in models)
        gain = _gain(values, pair) if pair else ""
        lines.append(f'<tr><th scope="row">{escape(str(name))}</th>{cells}{gain}</tr>')
    if wide:
        head = f'<th scope="col">AP of {", ".join(models)}</th>'
    else:
        head = "".join(f'<th scope="col"><i class="dot {model}"></i>{model}</th>' for model in models)
    head += f'<th scope="col">{_word(pair)}</th>' if pair else ""
    long = "" if wide else ' long" tabindex="0" role="region" aria-label="AP by ' + escape(heading)
    return (
        f'<div class="scroll{long}"><table class="{"wide" if wide else ""}"><thead><tr>'
        f'<th scope="col">{escape(heading)}</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def line_chart(
    lines: Mapping[str, Series],
    *,
    title: str,
    level: tuple[str, float] | None = None,
    log: bool | None = None,
    note: str = "",
    unit: str = "",
    across: str = "step",
) -> str:
    """A chart of values over steps.

    More than `MAX_POINTS` points are drawn as means of equal runs of points, with a band from the least to the
    largest. Values that are not finite are left out, marked by crosses at the foot and counted.

    Args:
      lines: name -> (steps f64[n], values f64[n]), steps ascending; models (`images`) have their colours.
      title: what is drawn.
      level: name and value of a horizontal line.
      log: whether the scale is logarithmic; None makes it so where all values are positive and span two decades.
      note: a sentence under the title.
      unit: words after the title that say what the numbers are.
      across: what a step is.

    Returns:
      html with an inline SVG; "" if there is no value at all.

    Example:
      >>> chart = line_chart({"student": (np.arange(3.0), np.array([3.0, 2.0, 1.0]))}, title="loss")
      >>> "student from 3 at step 0 to 1 at step 2" in chart
      True
    """
    good = {name: _finite(*line) for name, line in lines.items()}
    good = {name: line for name, line in good.items() if len(line[0])}
    bad = np.unique(np.concatenate([steps[~np.isfinite(values)] for steps, values in lines.values()] or [[]]))
    if not good and not len(bad):
        return ""
    values = np.concatenate([line[1] for line in good.values()] or [[]])
    if log is None:
        log = bool(len(values)) and values.min() > 0 and values.max() >= 100 * values.min()
    told = [
        f"{name} from {_short(line[1][0])} at {across} {line[0][0]:.0f} "
        f"to {_short(line[1][-1])} at {across} {line[0][-1]:.0f}"
        for name, line in good.items()
    ]
    if level is not None:
        told.append(f"{level[0]} at {_short(level[1])}")
    if len(bad):
        told.append(f"{len(bad)} steps with values that are not finite, the first at step {bad[0]:.0f}")
        note += f" Not finite at {len(bad)} step{'s' * (len(bad) > 1)}, first at {bad[0]:.0f} (crosses)."
    svg = _draw_lines(good, log=log, level=level, bad=bad[:: 1 + len(bad) // 50], salt=title)
    about = escape(f"Chart of {title}: {'; '.join(told)}.", quote=True)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{about}" ', 1)
    note = f"<br><small>{escape(note.strip())}</small>" if note else ""
    unit = ", ".join(filter(None, (unit, "log scale" if log else "")))
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> <small>{escape(unit)}</small>'
        f"{note}</figcaption>{svg}</figure>"
    )


def image_rows(examples: Sequence[dict], classes: Sequence[str], *, threshold: float = 0.3, note: str = "") -> str:
    """Images with ground truth and detections side by side, with a legend and their counts.

    Args:
      examples: as `drawing.panels` takes them; an optional `name` says which image it is.
      classes: K names.
      threshold: smallest score of a detection that is drawn and counted.
      note: which detections these are; by default a sentence with the threshold.

    Returns:
      html; "" without examples.

    Example:
      >>> truth = {"boxes": [[8, 8, 30, 30]], "labels": [0]}
      >>> example = {"image": np.zeros((40, 80, 3), np.uint8), "truth": truth, "student": {**truth, "scores": [0.9]}}
      >>> 'alt="student: 1 found, 0 false, 0 missed"' in image_rows([example], ["cell"])
      True
    """
    if not examples:
        return ""
    drawn = [drawing.panels(example, classes, threshold=threshold) for example in examples]
    uris = iter(_data_uris([panel.image for panels in drawn for panel in panels]))
    html, total = [], {}
    for i, (example, panels) in enumerate(zip(examples, drawn, strict=True)):
        cells = []
        for panel in panels:
            name, counts = ("ground truth" if panel.name == "truth" else panel.name), drawing.summary(panel)
            about = f"{name}: {counts}"
            if panel.name == "truth" and panel.found:
                numbers = Counter(np.asarray(example["truth"]["labels"], int).reshape(-1).tolist())
                about += f" ({', '.join(f'{n} {_class(k, classes)}' for k, n in sorted(numbers.items()))})"
            height, width = panel.image.shape[:2]
            cells.append(
                f'<div><p><i class="dot {panel.name}"></i><b>{name}</b> <small>{counts}</small></p>'
                f'<img src="{next(uris)}" width="{width}" height="{height}" alt="{escape(about, quote=True)}"></div>'
            )
            total[panel.name] = np.add(total.get(panel.name, 0), panel[2:])
        label = str(example.get("name") or f"image {i + 1}")
        html.append(
            f'<figure class="images"><div class="row n{len(panels)}">{"".join(cells)}</div>'
            f"<figcaption><small>{escape(label)}</small></figcaption></figure>"
        )
    seen = sorted({int(k) for e in examples for k in np.asarray(e["truth"]["labels"]).reshape(-1)})
    key = "".join(
        f'<li><i class="dot" style="background:rgb{drawing.class_color(k)}"></i>{escape(_class(k, classes))}</li>'
        for k in seen[:MAX_BARS]
    )
    key = f'<ul class="legend"><li>Ground truth:</li>{key}</ul>' if key else ""
    counts = "; ".join(
        f"the {name} finds {found}, with {false} false" for name, (found, false, _) in total.items() if name != "truth"
    )
    counts = f" Of {total['truth'][0]} objects in these images {counts}." if counts else ""
    legend = (
        '<ul class="legend"><li><i class="box hit">✓</i>found: IoU at least .5 with an object of the same class</li>'
        '<li><i class="box false">✗</i>false: no such object</li><li><i class="box missed"></i>missed object</li></ul>'
    )
    return (
        f"{legend if len(total) > 1 else ''}{key}{''.join(html)}"
        f'<p class="small">{escape(note) or f"Detections with a score of at least {threshold:g}."}{counts}</p>'
    )


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page.

    Args:
      title: text.
      lead: html that stands under the title.
      sections: heading (text) and html of each.

    Returns:
      html. Its content policy forbids scripts and everything that is not in the file itself.

    Example:
      >>> page("a < b", "", [("One", "<p>1</p>")]).count("a &lt; b")
      2
    """
    title = escape(title)
    links = "".join(f'<a href="#s{i}">{escape(name)}</a>' for i, (name, _) in enumerate(sections))
    body = "".join(
        f'<section id="s{i}"><h2>{escape(name)}</h2>{html}</section>' for i, (name, html) in enumerate(sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{_STYLE}</style></head>\n"
        f"<body><header><h1>{title}</h1>{lead}<nav>{links}</nav></header>\n<main>{body}</main></body></html>\n"
    )


# ------------------------------------------------------------------------------------------------- parts of the report


def _tiles(results: Mapping[str, Mapping[str, float]]) -> str:
    tiles = [
        f'<div class="tile {name}"><span>{name}</span><b>{_points(metrics.get("AP"))}</b>'
        f"<small>AP · {_human(metrics.get('params'))} parameters</small></div>"
        for name, metrics in results.items()
    ]
    if "twin" in results and "student" in results:
        gain = _difference(results["student"].get("AP"), results["twin"].get("AP"))
        tiles.append(
            f'<div class="tile"><span>gain</span><b class="{_sign(gain)}">{_signed(gain)}</b>'
            "<small>points, student over twin</small></div>"
        )
    explained = ""
    if len(tiles) > 1:
        words = {"teacher": "the big model", "twin": "the small model trained alone, on the same images"}
        words["student"] = "the small model" + ", trained to imitate the teacher as well" * ("teacher" in results)
        explained = "; ".join(f"<b>{name}</b>: {words[name]}" for name in results)
        explained = f'<p class="small">{explained}. AP: average precision, COCO’s main figure, in points of 100.</p>'
    return f'<div class="tiles">{"".join(tiles)}</div>{explained}'


def _saving(results: Mapping[str, Mapping[str, float]]) -> str:
    teacher, student = results.get("teacher"), results.get("student")
    if not teacher or not student:
        return ""
    parts = [
        f"{100 * student[key] / teacher[key]:.0f} % of the teacher’s {name}"
        for key, name in (("params", "parameters"), ("flops", "FLOPs"))
        if _defined(student.get(key)) and _defined(teacher.get(key)) and teacher[key]
    ]
    return f"The student has {' and '.join(parts)}." if parts else ""


def _read(rows: Sequence[Mapping], kind: str) -> dict[str, Series]:
    """name -> (steps, values) of all numbers; the last value of a step counts, since a killed run repeats steps."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.get("kind") != kind:
            continue
        for name, value in row.items():
            if name in ("step", "kind", "time") or isinstance(value, bool):
                continue
            if value is None or isinstance(value, int | float):
                found.setdefault(name, {})[int(row["step"])] = math.nan if value is None else float(value)
    series = {}
    for name, values in found.items():
        steps = sorted(values)
        series[name] = np.array(steps, float), np.array([values[step] for step in steps], float)
    return series


def _by_model(series: Mapping[str, Series]) -> dict[str, dict[str, Series]]:
    """loss name -> {model: series}, in the order of the log, the student's line last and so on top."""
    split: dict[str, dict[str, Series]] = {}
    for name, line in series.items():
        model, _, rest = name.partition("/")
        if model in MODELS and rest:
            split.setdefault(rest, {})[model] = line
    return {name: {m: lines[m] for m in MODELS if m in lines} for name, lines in split.items()}


def _ap_curves(rows: Sequence[Mapping], results: Mapping[str, Mapping[str, float]]) -> str:
    series = _by_model(_read(rows, "eval"))
    charts = []
    for key in ("AP", "AP50", "AP75"):
        lines = {
            model: (steps[values >= 0], 100 * values[values >= 0])
            for model, (steps, values) in series.get(key, {}).items()
            if model != "teacher"
        }
        teacher = results.get("teacher", {}).get(key)
        level = ("teacher", 100 * teacher) if _defined(teacher) else None
        charts.append(line_chart(lines, title=key, unit="points", level=level, log=False) if lines else "")
    return _charts(charts)


def _loss_curves(rows: Sequence[Mapping]) -> str:
    series = _read(rows, "train")
    by_model = _by_model(series)
    weights = {name.removeprefix("weight/"): line for name, line in series.items() if name.startswith("weight/")}

    def weight(name: str) -> str:
        values = weights.get(name, ([], []))[1]
        values = values[np.isfinite(values)] if len(values) else values
        if not len(values):
            return ""
        low, high = values.min(), values.max()
        return f"Weight in the total: {_short(low)}" + (f" to {_short(high)}." if high > low else ".")

    detection = [name for name in by_model if name.startswith("loss")]
    terms = [name for name in by_model if "/" in name]
    other = [name for name in by_model if name not in detection + terms]
    html = []
    if detection:
        charts = [line_chart(by_model[name], title=name) for name in detection]
        html.append("<h3>Detection losses</h3>" + _charts(charts))
    if terms:
        charts = [line_chart(by_model[name], title=name, note=weight(name)) for name in terms]
        html.append("<h3>Distillation terms, before their weights</h3>" + _charts(charts))
    notes = {"total": "The student’s holds the distillation terms too."} if terms else {}
    titles = {"lr": "learning rate", "images_per_s": "images a second", "grad_norm": "norm of the gradient"}
    titles |= {"wait_share": "share of time spent waiting for data", "total": "total loss"}
    charts = [line_chart(by_model[name], title=titles.get(name, name), note=notes.get(name, "")) for name in other]
    charts += [
        line_chart({"run": line}, title=titles.get(name, name), log=False)
        for name, line in series.items()
        if "/" not in name
    ]
    if any(charts):
        html.append("<h3>Learning rate and the rest</h3>" + _charts(charts))
    return "".join(html)


def _charts(charts: Sequence[str]) -> str:
    charts = [chart for chart in charts if chart]
    if not charts:
        return ""
    text = "".join(charts)
    names = [name for name in MODELS if f'class="line {name}"' in text]
    key = "".join(f'<li><i class="stroke {name}"></i>{name}</li>' for name in names)
    return (f'<ul class="legend">{key}</ul>' if len(names) > 1 else "") + f'<div class="charts">{text}</div>'


def _class_and_size(results: Mapping[str, Mapping], per_class: Mapping[str, Mapping[str, float]]) -> str:
    models = [name for name in MODELS if per_class.get(name)]
    names = list(dict.fromkeys(name for model in models for name in per_class[model]))
    rows = {name: {model: per_class[model].get(name, -1) for model in models} for name in names}
    order, text = "Best first.", ""
    if "twin" in models and "student" in models:
        order = "Largest gain first."
        rows = _sorted(rows, lambda values: _difference(values["student"], values["twin"]))
    elif models:
        rows = _sorted(rows, lambda values: values[models[-1]] if _defined(values[models[-1]]) else None)
    legend = "".join(f'<li><i class="dot {name}"></i>{name}</li>' for name in (models or results))
    legend = f'<ul class="legend">{legend}</ul>' if len(models or results) > 1 else ""
    if rows:
        text += f"<h3>By class</h3>{legend}{bars(rows, heading='class')}<p class=small>{order}</p>"
    sizes = {label: {model: metrics.get(key, -1) for model, metrics in results.items()} for key, label in SIZES.items()}
    if any(_defined(value) for values in sizes.values() for value in values.values()):
        text += f"<h3>By size of the object</h3>{legend}{bars(sizes, heading='size')}"
        text += '<p class="small">Small: under 32² pixels of area; large: over 96²; in the original images.</p>'
    return text


def _sorted(rows: dict, key) -> dict:
    """Largest first; undefined last; equals stay in order."""
    values = {name: key(row) for name, row in rows.items()}
    return {n: rows[n] for n in sorted(rows, key=lambda n: math.inf if values[n] is None else -values[n])}


def _facts(notes: Sequence[str], config_text: str) -> str:
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


# ---------------------------------------------------------------------------------------------------------- drawing

# Colours that stand for a name: the page's style gives each its colour in light and dark.
_COLORS = {"ink": "#010101", "muted": "#020202", "grid": "#030303", "bad": "#040404"}
_COLORS |= {"teacher": "#0a0a01", "twin": "#0a0a02", "student": "#0a0a03", "run": "#0a0a04"}
_COLORS |= {"other": "#0a0a05", "model": "#0a0a06"}
_STROKES = {"teacher": ("--", 1.4), "twin": ("-", 1.1), "student": ("-", 1.6)}
_STROKES |= {"other": _STROKES["twin"], "model": _STROKES["student"]}


def _draw_lines(lines: Mapping[str, Series], *, log: bool, level, bad: np.ndarray, salt: str) -> str:
    settings = {
        "svg.fonttype": "none",  # text stays text: the reader's own font shows every script
        "svg.hashsalt": salt,
        "font.size": 8.5,
        "axes.unicode_minus": True,
        "path.simplify": True,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(3.9, 2.3), dpi=72)
        figure.subplots_adjust(left=0.125, right=0.95, top=0.955, bottom=0.125)
        axes = figure.add_subplot()
        for name, (steps, values) in lines.items():
            color = _COLORS.get(name, _COLORS["run"])
            style, width = _STROKES.get(name, ("-", 1.4))
            at, mean, low, high = _thin(steps, values)
            if len(at) < len(steps):
                axes.fill_between(at, low, high, color=color, alpha=0.16, linewidth=0)
            marker = "o" if len(at) <= 25 else None
            axes.plot(at, mean, style, color=color, linewidth=width, marker=marker, markersize=2.6, gid=f"line {name}")
        if level is not None:
            style, width = _STROKES.get(level[0], ("--", 1.2))
            color = _COLORS.get(level[0], _COLORS["muted"])
            axes.axhline(level[1], linestyle=style, linewidth=width, color=color, gid=f"line {level[0]}")
        if len(bad):
            across = axes.get_xaxis_transform()
            axes.plot(bad, np.full(len(bad), 0.03), "x", color=_COLORS["bad"], markersize=4, transform=across)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
            axes.yaxis.set_minor_locator(NullLocator())
        elif lines:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        else:
            axes.yaxis.set_major_locator(FixedLocator([]))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _human(step) if abs(step) >= 1e4 else f"{step:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.grid(axis="y", color=_COLORS["grid"], linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_COLORS["muted"], length=2, width=0.6, pad=2)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(_COLORS["muted"])
        out = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=metadata)
    svg = out.getvalue()
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r'\s*<!--.*?-->|\s*<metadata>.*?</metadata>|(?<=<svg) xmlns:xlink="[^"]*"', "", svg, flags=re.S)
    svg = re.sub(r'(?<=<svg )[^>]*?(viewBox="[^"]*")[^>]*', r"\1", svg, count=1)
    # Ids would repeat from chart to chart: lines keep theirs as a class, and only what is referred to keeps an id.
    svg = re.sub(r' id="(line \w+)"', r' class="\1"', svg)
    used = set(re.findall(r'(?:#)([\w-]+)(?=[")])', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = svg.replace("xlink:href", "href")
    for name, color in _COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return re.sub(r"\n\s*", "\n", svg).strip()


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """(step, mean, least, largest) of equal runs of points, at most MAX_POINTS."""
    if len(steps) <= MAX_POINTS:
        return steps, values, values, values
    runs = np.array_split(np.arange(len(steps)), MAX_POINTS)
    return tuple(
        np.array([function(array[run]) for run in runs])
        for function, array in ((np.mean, steps), (np.mean, values), (np.min, values), (np.max, values))
    )


def _finite(steps: np.ndarray, values: np.ndarray) -> Series:
    keep = np.isfinite(values)
    return steps[keep], values[keep]


def _data_uris(images: Sequence[np.ndarray]) -> list[str]:
    """JPEG data URIs in the best quality at which all of them together stay within IMAGE_BYTES."""
    for quality in (88, 75, 60, 40, 20):
        uris = []
        for image in images:
            out = io.BytesIO()
            Image.fromarray(image).save(out, "JPEG", quality=quality, subsampling=0)
            uris.append("data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode())
        if sum(map(len, uris)) <= IMAGE_BYTES:
            break
    return uris


# ---------------------------------------------------------------------------------------------------------- numbers


def _defined(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value >= 0


def _difference(student: float | None, twin: float | None) -> float | None:
    return student - twin if _defined(student) and _defined(twin) else None


def _points(value: float | None) -> str:
    return f"{100 * value:.1f}" if _defined(value) else "–"


def _bar(model: str, value: float | None) -> str:
    return f'<i class="{model}" style="width:{min(100 * value, 100):.1f}%"></i>' if _defined(value) else ""


def _sign(gain: float | None) -> str:
    return "" if gain is None or abs(gain) < 0.0005 else "good" if gain > 0 else "bad"


def _signed(gain: float | None) -> str:
    if gain is None:
        return "–"
    return {"good": "+", "bad": "−", "": ""}[_sign(gain)] + f"{abs(100 * gain):.1f}"


def _pair(models: Sequence[str] | Mapping) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if set(pair) <= set(models)), None)


def _word(pair: tuple[str, str]) -> str:
    return "gain" if pair == PAIRS[0] else "difference"


def _gain(values: Mapping[str, float | None], pair: tuple[str, str]) -> str:
    gain = _difference(values.get(pair[0]), values.get(pair[1]))
    return f'<td class="{_sign(gain)}">{_signed(gain)}</td>'


def _human(number: float | None) -> str:
    """Three digits and a letter: 4.87M, 8.09G."""
    if not _defined(number):
        return "–"
    for letter, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size * 0.9995:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _short(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2g}".split("e") if "e" in f"{value:.2g}" else (f"{value:.2g}", "0")
        return f"{mantissa}e{int(exponent)}".removesuffix("e0")
    return f"{value:.4g}"


def _class(label: int, classes: Sequence[str]) -> str:
    """The full name; with the number, where the images show the number in its place."""
    name = str(classes[label]) if 0 <= label < len(classes) else f"class {label}"
    return name if drawing.class_name(label, classes) != f"class {label}" else f"{name} (class {label})"


_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--card:#f5f6f8;--ink:#16181d;--muted:#59606c;--grid:#dde1e7;
--teacher:#7a3fc4;--twin:#b36200;--student:#0068b8;--run:#4a5260;--good:#12794a;--bad:#c22f2f}
@media (prefers-color-scheme:dark){:root{--paper:#14161a;--card:#1e2127;--ink:#e8eaee;--muted:#a0a8b5;--grid:#363b45;
--teacher:#bb94f7;--twin:#f0a43a;--student:#5ab6f7;--run:#b4bcc8;--good:#55d491;--bad:#ff8080}}
:root{--other:var(--twin);--model:var(--student)}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:1.5rem clamp(1rem,3vw,2.5rem) 4rem;max-width:1320px;background:var(--paper);
color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{margin:.2em 0 .4em;font-size:clamp(1.4rem,3.2vw,2rem);line-height:1.2;overflow-wrap:anywhere}
h2{margin:2.6rem 0 .8rem;padding-bottom:.3rem;border-bottom:1px solid var(--grid);font-size:1.35rem}
h3{margin:1.6rem 0 .5rem;font-size:1.05rem}
small,.small{color:var(--muted);font-size:.85rem;font-weight:normal}
.small{max-width:75ch}
.verdict{max-width:60ch;margin:0 0 1.2rem;font-size:clamp(1.1rem,2.2vw,1.3rem);line-height:1.45}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;margin-top:1rem;font-size:.9rem}
a{color:var(--student)}
.tiles{display:flex;flex-wrap:wrap;gap:.8rem}
.tile{flex:1 1 9.5rem;max-width:15rem;padding:.7rem .9rem;border-radius:.5rem;border-top:4px solid var(--grid);
background:var(--card)}
.tile.teacher{border-color:var(--teacher)}.tile.twin{border-color:var(--twin)}
.tile.student{border-color:var(--student)}
.tile>span,.tile>small,.tile>b{display:block}
.tile>b{font-size:2rem;line-height:1.2;font-variant-numeric:tabular-nums}
.good{color:var(--good)}.bad{color:var(--bad)}
.scroll{overflow-x:auto}
.long{width:fit-content;max-width:100%;max-height:34rem;overflow-y:auto;border:1px solid var(--grid);
border-radius:.4rem}
.long thead th{position:sticky;top:0;background:var(--paper)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.32rem .8rem;border-bottom:1px solid var(--grid);text-align:right;vertical-align:middle}
th:first-child{padding-left:.2rem;text-align:left}
thead th{white-space:nowrap;font-size:.9rem}
tbody th{min-width:5.5rem;font-weight:600;overflow-wrap:anywhere}
.metrics tbody tr:first-child td{font-weight:600}
.beside{display:flex;flex-wrap:wrap;align-items:flex-start;gap:0 2.5rem}
.beside>p{flex:1 1 20rem;margin:.8rem 0 .4rem}
table.wide{width:100%;max-width:56rem}
table.wide th:first-child{width:28%}
table.wide th:nth-child(2){text-align:left}
.bars{width:60%}
.bar{display:flex;align-items:center;height:.95rem}
.bar>i{flex:none;height:.62rem;min-width:1px;border-radius:0 2px 2px 0}
.bar>b{margin-left:.4rem;font-size:.75rem;font-weight:normal;color:var(--muted)}
.bars{padding-right:3rem}
i.teacher{background:var(--teacher)}i.twin,i.other{background:var(--twin)}
i.student,i.model{background:var(--student)}
i.truth{display:none}
.facts th,.facts td{text-align:left;vertical-align:top;overflow-wrap:anywhere}
.dot{display:inline-block;width:.7rem;height:.7rem;margin-right:.4rem;border-radius:2px}
.stroke{display:inline-block;width:1.6rem;height:3px;margin-right:.4rem;vertical-align:middle}
.stroke.teacher{background:repeating-linear-gradient(90deg,var(--teacher) 0 6px,transparent 6px 9px)}
.stroke.twin,.stroke.other{height:2px}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:.3rem 0 .6rem;padding:0;list-style:none;font-size:.85rem}
.box{display:inline-block;width:2rem;height:1.4rem;margin-right:.4rem;border-radius:3px;outline:2px solid;
outline-offset:-4px;text-align:center;font-style:normal;font-size:.75rem;line-height:1.4rem;vertical-align:middle;
background:#3a3f47}
.box.hit{color:rgb(46,204,113)}.box.false{color:rgb(255,71,71)}.box.missed{color:rgb(255,205,40);outline-style:dashed}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));gap:1rem 1.5rem}
figure{margin:0;min-width:0}
.chart figcaption{line-height:1.3;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto;overflow:visible;color:var(--ink)}
svg text{font-family:inherit!important}
.images{margin:0 0 1.2rem}
.row{display:grid;grid-template-columns:repeat(4,1fr);gap:.6rem}
.row.n1{grid-template-columns:minmax(0,22rem)}
.row.n2{grid-template-columns:repeat(2,minmax(0,26rem))}
.row.n3{grid-template-columns:repeat(3,minmax(0,26rem))}
.row p{margin:0 0 .2rem;font-size:.85rem;line-height:1.3}
.row small{display:block}
img{display:block;width:100%;height:auto;border-radius:2px}
pre{padding:.8rem;overflow-x:auto;border-radius:.4rem;background:var(--card);font-size:.8rem}
summary{margin:1rem 0 .4rem;cursor:pointer}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.row>div{display:flex;flex-direction:column;justify-content:flex-end}
@media (max-width:640px){.row,.row.n2,.row.n3{grid-template-columns:repeat(2,minmax(0,1fr))}
th,td{padding:.32rem .35rem;font-size:.85rem}thead th{font-size:.8rem}tbody th small{display:block;font-size:.75rem}
.metrics .dot{display:none}table.wide thead th{white-space:normal}.bars{padding-right:2.2rem;width:60%}}
"""
