"""The parts of a page: tables, bars, images, and the page around them.

A page is one file without scripts and without references to other files. It follows the reader's light or dark setting
and fits wide and narrow screens. The functions return HTML and escape all text.
"""

import base64
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image

from kdjax.report import drawing
from kdjax.report.format import PAIRS, abbreviated, compared, difference, heading, is_defined, percent, sign, signed

METRICS = {
    "AP": "mean over IoU 0.50 to 0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "small objects, under 32² pixels",
    "APm": "medium objects",
    "APl": "large objects, over 96² pixels",
    "AR1": "recall with 1 detection per image",
    "AR10": "recall with 10 detections",
    "AR100": "recall with 100 detections",
    "ARs": "recall, small objects",
    "ARm": "recall, medium objects",
    "ARl": "recall, large objects",
}
MAX_BARS = 30  # classes that are drawn as bars; more are written as numbers
WORDS = 32  # characters of a cell; longer ones are broken into lines
IMAGE_BYTES = 2_000_000  # of all images of a page together, as base64


def page(title: str, lead: str, sections: Sequence[tuple[str, str]], *, reload: int = 0) -> str:
    """A whole page.

    Args:
      title: text.
      lead: HTML below the title.
      sections: heading (text) and HTML of each.
      reload: seconds after which a browser reads the file again; 0: never.

    Returns:
      HTML. Its content policy forbids scripts and everything that is not in the file itself.

    Example:
      >>> page("a < b", "", [("One", "<p>1</p>")]).count("a &lt; b")
      2
    """
    title = escape(title)
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#s{i}">{escape(name)}</a>' for i, (name, _) in enumerate(sections))
    body = "".join(
        f'<section id="s{i}"><h2>{escape(name)}</h2>{html}</section>' for i, (name, html) in enumerate(sections)
    )
    again = f'<meta http-equiv="refresh" content="{reload}">' if reload else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"{again}<title>{title}</title><style>\n{style}</style></head>\n"
        f"<body><header><h1>{title}</h1>{lead}<nav>{links}</nav></header>\n<main>{body}</main></body></html>\n"
    )


def table(rows: Sequence[Sequence[str]], *, caption: str = "", marks: Mapping[str, str] = MappingProxyType({})) -> str:
    """A table of text; the first row and the first column are headings.

    Args:
      rows: the cells.
      caption: a heading above the table.
      marks: headings that get a mark of a colour, and its name in style.css.

    Returns:
      HTML; a long table scrolls.

    Example:
      >>> "<td>16</td>" in table([["class", "objects"], ["cell", "16"]])
      True
    """

    def mark(cell: str) -> str:
        return f'<i class="dot" style="background:var(--{marks[cell]})"></i>' if cell in marks else ""

    head, *body = rows
    text = "<thead><tr>" + "".join(f'<th scope="col">{mark(cell)}{escape(cell)}</th>' for cell in head)
    text += "</tr></thead><tbody>"
    for first, *rest in body:
        cells = (f"<td{' class=words' * (len(cell) > WORDS)}>{escape(cell)}</td>" for cell in rest)
        text += f'<tr><th scope="row">{mark(first)}{_breakable(first)}</th>{"".join(cells)}</tr>'
    above = f"<h3>{escape(caption)}</h3>" if caption else ""
    long = ' long" tabindex="0" role="region" aria-label="table' if len(body) > MAX_BARS + 1 else ""
    return f'{above}<div class="scroll{long}"><table>{text}</tbody></table></div>'


def metrics_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """COCO's 12 metrics, parameters and FLOPs: a column for each model, and the difference of a pair of `PAIRS`.

    Args:
      results: model -> metrics as fractions (-1 where undefined), with `params` and `flops`.

    Returns:
      HTML; "" without models.

    Example:
      >>> "<td>41.2</td>" in metrics_table({"student": {"AP": 0.412}})
      True
    """
    if not results:
        return ""
    pair = compared(results)
    head = "".join(f'<th scope="col"><i class="dot {name}"></i>{name}</th>' for name in results)
    lines = []
    masks = {f"mask_{key}": meaning for key, meaning in METRICS.items()}
    shown = METRICS | {key: text for key, text in masks.items() if any(key in one for one in results.values())}
    for key, meaning in shown.items():
        values = {name: metrics.get(key) for name, metrics in results.items()}
        cells = "".join(f"<td>{percent(value)}</td>" for value in values.values())
        gain = _gain(values, pair) if pair else ""
        lines.append(f'<tr><th scope="row">{key.replace("_", " ")} <small>{meaning}</small></th>{cells}{gain}</tr>')
    for key, label, meaning in (("params", "Parameters", "trainable"), ("flops", "FLOPs", "multiply-adds per image")):
        if not any(is_defined(metrics.get(key)) for metrics in results.values()):
            continue
        cells = "".join(f"<td>{abbreviated(metrics.get(key))}</td>" for metrics in results.values())
        blank = "<td></td>" if pair else ""
        lines.append(f'<tr><th scope="row">{label} <small>{meaning}</small></th>{cells}{blank}</tr>')
    head += f'<th scope="col">{heading(pair)}</th>' if pair else ""
    text = "COCO metrics in percent. “–” means undefined: there are no objects of that kind. " + _size(results)
    if pair == PAIRS[0]:
        text += (
            " Gain is student minus twin in percentage points, from a single run; repeat it with several seeds to see "
            "how much the gain varies."
        )
    return (
        '<div class="beside"><div class="scroll"><table class="metrics"><thead><tr><th scope="col">metric</th>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div><p class=small>{text}</p></div>"
    )


def bars(rows: Mapping[str, Mapping[str, float]], *, first: str) -> str:
    """A table with a bar for each model in each row, and the difference of a pair of `PAIRS`.

    More than `MAX_BARS` rows have columns of numbers in place of bars.

    Args:
      rows: name of the row -> {model: AP as a fraction, or -1 where undefined}; all rows have the same models.
      first: heading of the first column.

    Returns:
      HTML.

    Example:
      >>> "width:50.0%" in bars({"cell": {"student": 0.5}}, first="class")
      True
    """
    models = list(next(iter(rows.values()), {}))
    pair = compared(models)
    wide = len(rows) <= MAX_BARS
    lines = []
    for name, values in rows.items():
        if wide:
            group = "".join(
                f'<span class="bar">{_bar(model, values[model])}'
                f'<b><span class="hidden">{model} </span>{percent(values[model])}</b></span>'
                for model in models
            )
            cells = f'<td class="bars">{group}</td>'
        else:
            cells = "".join(f"<td>{percent(values[model])}</td>" for model in models)
        gain = _gain(values, pair) if pair else ""
        lines.append(f'<tr><th scope="row">{_breakable(str(name))}</th>{cells}{gain}</tr>')
    if wide:
        head = f'<th scope="col">AP of {", ".join(models)}</th>'
    else:
        head = "".join(f'<th scope="col"><i class="dot {model}"></i>{model}</th>' for model in models)
    head += f'<th scope="col">{heading(pair)}</th>' if pair else ""
    long = "" if wide else ' long" tabindex="0" role="region" aria-label="AP by ' + escape(first)
    return (
        f'<div class="scroll{long}"><table class="{"wide" if wide else ""}"><thead><tr>'
        f'<th scope="col">{escape(first)}</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def image_rows(
    examples: Sequence[drawing.Example], class_names: Sequence[str], *, threshold: float = 0.3, note: str = ""
) -> str:
    """Images with ground truth and detections side by side, a legend, and counts.

    Args:
      examples: the images.
      class_names: K names.
      threshold: minimum score of a detection that is drawn and counted.
      note: which images and detections these are; by default the threshold.

    Returns:
      HTML; "" without examples.

    Example:
      >>> from kdjax.structs import Detections
      >>> box, label = np.array([[8.0, 8, 30, 30]]), np.array([0])
      >>> detections = {"student": Detections(box, np.array([0.9]), label)}
      >>> example = drawing.Example(np.zeros((40, 80, 3), np.uint8), box, label, detections)
      >>> 'alt="student: 1 correct, 0 false, 0 missed"' in image_rows([example], ["cell"])
      True
    """
    if not examples:
        return ""
    drawn = [drawing.panels(example, class_names, threshold=threshold) for example in examples]
    uris = iter(_data_uris([panel.image for panels in drawn for panel in panels]))
    text, total = [], {}
    for i, (example, panels) in enumerate(zip(examples, drawn, strict=True)):
        cells = []
        for panel in panels:
            counts = drawing.summary(panel)
            about = f"{panel.name}: {counts}"
            if panel.name == drawing.TRUTH and panel.correct:
                numbers = Counter(example.labels.tolist())
                about += f" ({', '.join(f'{n} {_class(k, class_names)}' for k, n in sorted(numbers.items()))})"
            height, width = panel.image.shape[:2]
            cells.append(
                f'<div><p><i class="dot {"truth" if panel.name == drawing.TRUTH else panel.name}"></i>'
                f"<b>{panel.name}</b> <small>{counts}</small></p>"
                f'<img src="{next(uris)}" width="{width}" height="{height}" alt="{escape(about, quote=True)}"></div>'
            )
            total[panel.name] = np.add(total.get(panel.name, 0), panel[2:])
        label = example.name or f"image {i + 1}"
        text.append(
            f'<figure class="images"><div class="row n{len(panels)}">{"".join(cells)}</div>'
            f"<figcaption><small>{escape(label)}</small></figcaption></figure>"
        )
    labels = sorted({k for example in examples for k in example.labels.tolist()})
    key = "".join(
        f'<li><i class="dot" style="background:rgb{drawing.class_color(k)}"></i>{escape(_class(k, class_names))}</li>'
        for k in labels[:MAX_BARS]
    )
    key = f'<ul class="legend"><li>Ground truth:</li>{key}</ul>' if key else ""
    counts = "; ".join(
        f"{name} {correct} correct, {false} false"
        for name, (correct, false, _) in total.items()
        if name != drawing.TRUTH
    )
    counts = f" Detections of the {total[drawing.TRUTH][0]} objects in these images: {counts}." if counts else ""
    legend = (
        '<ul class="legend"><li><i class="box correct">✓</i>correct: IoU of at least 0.5 with an object of the same '
        'class</li><li><i class="box false">✗</i>false: no such object, or already detected</li>'
        '<li><i class="box missed"></i>missed object</li></ul>'
    )
    return (
        f"{legend if len(total) > 1 else ''}{key}{''.join(text)}"
        f'<p class="small">{escape(note) or f"Detections with a score of at least {threshold:g}."}{counts}</p>'
    )


def _size(results: Mapping[str, Mapping[str, float]]) -> str:
    """The size of the student relative to its teacher."""
    teacher, student = results.get("teacher"), results.get("student")
    if not teacher or not student:
        return ""
    parts = [
        f"{100 * student[key] / teacher[key]:.0f} % of the teacher’s {name}"
        for key, name in (("params", "parameters"), ("flops", "FLOPs"))
        if is_defined(student.get(key)) and is_defined(teacher.get(key)) and teacher[key]
    ]
    return f"The student has {' and '.join(parts)}." if parts else ""


def _breakable(name: str) -> str:
    """A name as HTML that is broken after its dots, lines and strokes, if at all."""
    return re.sub(r"([._/])", r"\1<wbr>", escape(name))


def _bar(model: str, value: float | None) -> str:
    return f'<i class="{model}" style="width:{min(100 * value, 100):.1f}%"></i>' if is_defined(value) else ""


def _gain(values: Mapping[str, float | None], pair: tuple[str, str]) -> str:
    gain = difference(values.get(pair[0]), values.get(pair[1]))
    return f'<td class="{sign(gain)}">{signed(gain)}</td>'


def _class(label: int, class_names: Sequence[str]) -> str:
    """The full name, with the number if the images show that in its place."""
    name = str(class_names[label]) if 0 <= label < len(class_names) else f"class {label}"
    return name if drawing.class_name(label, class_names) != f"class {label}" else f"{name} (class {label})"


def _data_uris(images: Sequence[np.ndarray]) -> list[str]:
    """JPEG data URIs in the best quality at which all together have at most IMAGE_BYTES."""
    for quality in (88, 75, 60, 40, 20):
        uris = []
        for image in images:
            out = io.BytesIO()
            Image.fromarray(image).save(out, "JPEG", quality=quality, subsampling=0)
            uris.append("data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode())
        if sum(map(len, uris)) <= IMAGE_BYTES:
            break
    return uris
