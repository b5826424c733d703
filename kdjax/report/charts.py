"""Line charts and charts of intervals as inline SVG, drawn by matplotlib."""

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from kdjax.report.format import MODELS, PAIRS, abbreviated, compact

MAX_POINTS = 240  # of a curve
LONGEST = 28  # characters of the name of a row
COLOURS = 8  # of runs that are compared: --run0 .. --run7 of style.css
DASHES = ("-", "--", ":", "-.")  # of the first 8 runs, the next 8, ...; then they repeat

Series = tuple[np.ndarray, np.ndarray]  # steps f64[n], values f64[n]


class Interval(NamedTuple):
    """A row of `interval_chart`."""

    name: str
    values: Sequence[float]  # of which it is the mean
    mean: float
    ends: Sequence[float] | None  # of its interval
    verdict: str


def line_chart(
    lines: Mapping[str, Series],
    *,
    title: str,
    level: tuple[str, float] | None = None,
    log: bool | None = None,
    note: str = "",
    unit: str = "",
    across: str = "step",
    runs: Sequence[str] = (),
) -> str:
    """A chart of values over steps.

    More than `MAX_POINTS` points are drawn as means over equal parts of the line, with a band from the minimum to the
    maximum. Non-finite values are marked by crosses at the bottom and counted.

    Args:
      lines: name -> (steps f64[n], values f64[n]), steps ascending; models have a fixed colour.
      title: the heading.
      level: name and value of a dashed horizontal line.
      log: whether the scale is logarithmic; None: if all values are positive and span two decades.
      note: a sentence below the heading.
      unit: text after the heading, such as the unit of the values.
      across: name of the horizontal axis.
      runs: names of lines that are runs, each with a colour and dashes by its place here; others are models.

    Returns:
      HTML with an inline SVG; "" without values.

    Example:
      >>> chart = line_chart({"student": (np.arange(3.0), np.array([3.0, 2.0, 1.0]))}, title="loss")
      >>> "student from 3 at step 0 to 1 at step 2" in chart
      True
    """
    finite = {name: _finite(*line) for name, line in lines.items()}
    finite = {name: line for name, line in finite.items() if len(line[0])}
    bad = np.unique(np.concatenate([steps[~np.isfinite(values)] for steps, values in lines.values()] or [[]]))
    if not finite and not len(bad):
        return ""
    values = np.concatenate([line[1] for line in finite.values()] or [[]])
    if log is None:
        log = bool(len(values) and values.min() > 0 and values.max() >= 100 * values.min())
    parts = [
        f"{name} from {compact(line[1][0])} at {across} {line[0][0]:.0f} "
        f"to {compact(line[1][-1])} at {across} {line[0][-1]:.0f}"
        for name, line in finite.items()
    ]
    if level is not None:
        parts.append(f"{level[0]} at {compact(level[1])}")
    if len(bad):
        parts.append(f"non-finite values at {len(bad)} steps, first at step {bad[0]:.0f}")
        note += f" Non-finite at {len(bad)} step{'s' * (len(bad) > 1)}, first at step {bad[0]:.0f} (crosses)."
    svg = _draw_lines(finite, log=log, level=level, bad=bad[:: 1 + len(bad) // 50], salt=title, runs=runs)
    about = escape(f"Chart of {title}: {'; '.join(parts)}.", quote=True)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{about}" ', 1)
    note = f"<br><small>{escape(note.strip())}</small>" if note else ""
    unit = ", ".join(filter(None, (unit, "log scale" if log else "")))
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> <small>{escape(unit)}</small>'
        f"{note}</figcaption>{svg}</figure>"
    )


def interval_chart(rows: Sequence[Interval], *, title: str, across: str) -> str:
    """A chart of means with their intervals, one below the other, and a line at 0.

    Args:
      rows: from above to below.
      title: the heading.
      across: name of the horizontal axis.

    Returns:
      HTML with an inline SVG; "" without rows.

    Example:
      >>> rows = [Interval("mkd", [1.0], 1.0, (0.5, 1.5), "helps")]
      >>> "mkd +1.00, helps" in interval_chart(rows, title="a", across="AP")
      True
    """
    if not rows:
        return ""
    colours = {"helps": _COLORS["good"], "hurts": _COLORS["bad"]}
    with matplotlib.rc_context(_settings(title)):
        figure = Figure(figsize=(4.6, 0.6 + 0.24 * len(rows)), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        for at, row in enumerate(rows):
            colour = colours.get(row.verdict, _COLORS["muted"])
            axes.plot(row.values, [at] * len(row.values), "|", color=colour, markersize=6, alpha=0.6)
            if row.ends:
                axes.plot(row.ends, [at, at], "-", color=colour, linewidth=2)
            axes.plot([row.mean], [at], "o", color=colour, markersize=5)
        names = [row.name if len(row.name) <= LONGEST else f"{row.name[: LONGEST - 1]}…" for row in rows]
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.axvline(0, color=_COLORS["ink"], linewidth=0.8)
        axes.set_xlabel(across, color=_COLORS["muted"])
        _frame(axes, grid="x")
        svg = _svg(figure)
    about = escape(f"Chart of {title}: {'; '.join(f'{r.name} {r.mean:+.2f}, {r.verdict}' for r in rows)}.", quote=True)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{about}" ', 1)
    return f'<figure class="chart"><figcaption><b>{escape(title)}</b></figcaption>{svg}</figure>'


def chart_grid(charts: Sequence[str]) -> str:
    """Charts side by side, with a legend if their lines are of several models.

    Args:
      charts: from `line_chart`; empty ones are left out.

    Returns:
      HTML; "" without charts.
    """
    charts = [chart for chart in charts if chart]
    if not charts:
        return ""
    text = "".join(charts)
    names = [name for name in (*MODELS, *reversed(PAIRS[1])) if f'class="line {name}"' in text]
    key = "".join(f'<li><i class="stroke {name}"></i>{name}</li>' for name in names)
    return (f'<ul class="legend">{key}</ul>' if len(names) > 1 else "") + f'<div class="charts">{text}</div>'


# Placeholders: `_draw_lines` replaces them by variables of style.css, which differ in light and dark mode.
_COLORS = {"ink": "#010101", "muted": "#020202", "grid": "#030303", "bad": "#040404", "good": "#050505"}
_COLORS |= {"teacher": "#0a0a01", "twin": "#0a0a02", "student": "#0a0a03", "run": "#0a0a04"}
_COLORS |= {"other": "#0a0a05", "model": "#0a0a06"}
_COLORS |= {f"run{i}": f"#0a0b{i:02d}" for i in range(COLOURS)}
_STROKES = {"teacher": ("--", 1.4), "twin": ("-", 1.1), "student": ("-", 1.6)}
_STROKES |= {"other": _STROKES["twin"], "model": _STROKES["student"]}


def stroke(place: int) -> tuple[str, str]:
    """The colour, as the name of a variable of style.css, and matplotlib's dashes of the run at a place.

    Example:
      >>> stroke(9)
      ('run1', '--')
    """
    return f"run{place % COLOURS}", DASHES[place // COLOURS % len(DASHES)]


def _frame(axes: Axes, *, grid: Literal["x", "y"]) -> None:
    """Leaves of the frame the line at the bottom, and adds a grid across an axis."""
    axes.grid(axis=grid, color=_COLORS["grid"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_COLORS["muted"], length=2, width=0.6, pad=2)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_COLORS["muted"])


def _draw_lines(
    lines: Mapping[str, Series],
    *,
    log: bool,
    level: tuple[str, float] | None,
    bad: np.ndarray,
    salt: str,
    runs: Sequence[str],
) -> str:
    with matplotlib.rc_context(_settings(salt)):
        figure = Figure(figsize=(3.9, 2.3), dpi=72)
        figure.subplots_adjust(left=0.125, right=0.95, top=0.955, bottom=0.125)
        axes = figure.add_subplot()
        for name, (steps, values) in lines.items():
            color, (style, width) = _COLORS.get(name, _COLORS["run"]), _STROKES.get(name, ("-", 1.4))
            kind = name
            if name in runs:
                kind, style = stroke(runs.index(name))
                color, width = _COLORS[kind], 1.4
            at, mean, low, high = _thin(steps, values)
            if len(at) < len(steps):
                axes.fill_between(at, low, high, color=color, alpha=0.16, linewidth=0)
            marker = "o" if len(at) <= 25 else None
            axes.plot(at, mean, style, color=color, linewidth=width, marker=marker, markersize=2.6, gid=f"line {kind}")
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
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda step, _: abbreviated(step) if abs(step) >= 1e4 else f"{step:g}")
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        _frame(axes, grid="y")
        return _svg(figure)


def _settings(salt: str) -> dict[Any, Any]:  # matplotlib has a type of its own for the names
    return {
        "svg.fonttype": "none",  # keeps text as text, which the reader's fonts can show in any script
        "svg.hashsalt": salt,
        "font.size": 8.5,
        "axes.unicode_minus": True,
        "path.simplify": True,
    }


def _svg(figure: Figure) -> str:
    """A figure as inline SVG in the colours of the page; the settings must still be those of `_settings`."""
    out = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(out, format="svg", transparent=True, metadata=metadata)
    svg = out.getvalue()
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r'\s*<!--.*?-->|\s*<metadata>.*?</metadata>|(?<=<svg) xmlns:xlink="[^"]*"', "", svg, flags=re.S)
    svg = re.sub(r'(?<=<svg )[^>]*?(viewBox="[^"]*")[^>]*', r"\1", svg, count=1)
    # Ids would repeat in the next chart: lines get a class instead, and only ids that are referred to stay.
    svg = re.sub(r' id="(line \w+)"', r' class="\1"', svg)
    used = set(re.findall(r'(?:#)([\w-]+)(?=[")])', svg))
    svg = re.sub(r' id="([^"]*)"', lambda hit: hit[0] if hit[1] in used else "", svg)
    svg = svg.replace("xlink:href", "href")
    for name, color in _COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return re.sub(r"\n\s*", "\n", svg).strip()


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """(step, mean, minimum, maximum) of at most MAX_POINTS equal parts of a line."""
    if len(steps) <= MAX_POINTS:
        return steps, values, values, values
    parts = np.array_split(np.arange(len(steps)), MAX_POINTS)
    return tuple(
        np.array([function(array[part]) for part in parts])
        for function, array in ((np.mean, steps), (np.mean, values), (np.min, values), (np.max, values))
    )


def _finite(steps: np.ndarray, values: np.ndarray) -> Series:
    keep = np.isfinite(values)
    return steps[keep], values[keep]
