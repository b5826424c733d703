"""What the page of a run says at its top while the run goes on."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from kdjax.report import pages
from kdjax.report.drawing import Example
from kdjax.report.format import compact
from kdjax.report.series import Rows, by_model, last, read, under

RELOAD = 30  # seconds after which a browser reads the page of a run that goes on again
THRESHOLDS = (0.3, 0.2, 0.1, 0.05)  # of scores that are drawn


class Progress(NamedTuple):
    """How far a run is."""

    step: int
    steps: int
    left: float | None  # seconds to the last step; None if that is not known yet
    written: str  # when the page is written, in words
    due: str = ""  # when the next page is expected; "" if that is not known
    ended: str = ""  # why the run does not go on, as a sentence without a full stop; "" while it does
    about: str = ""  # a sentence on the metrics and images


def lead(progress: Progress, rows: Rows) -> str:
    """The top of the page: how far the run is, how fast, and how long it needs.

    Args:
      progress: of the run.
      rows: lines of metrics.jsonl.

    Returns:
      HTML.

    Example:
      >>> 'value="40" max="100"' in lead(Progress(40, 100, 90.0, "12:00"), [])
      True
    """
    step, steps = progress.step, progress.steps
    if progress.ended:
        state, words = "Not running", progress.ended
        more = f"Written at {progress.written}; the page does not reload itself any more."
    else:
        state, words = "Running", f"step {step:,} of {steps:,}"
        if step == steps:
            words = f"all {steps:,} steps are done, and the final evaluation is under way"
        elif progress.left is not None:
            words += f", {duration(progress.left)} to the last step"
        more = f"Written at {progress.written}; the page reloads itself every {RELOAD} seconds"
        if progress.due:
            more += f", and is written anew at about {progress.due}: if it is not, the run was killed or hangs"
        more += "."
    return (
        f'<p class="verdict"><b>{state}</b>: {escape(words)}.</p>'
        f'<progress value="{step}" max="{steps}" aria-label="steps">{100 * step // max(steps, 1)} %</progress>'
        f'<p class="small">{escape(" ".join(filter(None, (more, progress.about))))}</p>{_speed(progress, rows)}'
    )


def terms(rows: Rows) -> str:
    """A table of the terms of distillation as they are now.

    Args:
      rows: lines of metrics.jsonl.

    Returns:
      HTML; "" without terms.

    Example:
      >>> rows = [{"step": 1, "kind": "train", "student/cwd/neck": 4.0, "weight/cwd/neck": 2.0, "share/cwd": 0.25}]
      >>> "<td>25.0 %</td>" in terms(rows)
      True
    """
    series = read(rows, "train")
    values = {name: last(lines.get("student")) for name, lines in by_model(series).items() if "/" in name}
    weights, shares, cosines = (under(series, kind) for kind in ("weight", "share", "conflict"))
    if not values:
        return ""
    head = ["term", "value", "weight", "weighted"]
    measured = bool(shares)
    table = [head + ["share of the gradient", "cosine"] * measured]
    for name, value in values.items():
        weight, method = last(weights.get(name)), name.rpartition("/")[0]
        both = value * weight if value is not None and weight is not None else None
        cells = ["–" if number is None else compact(number) for number in (value, weight, both)]
        share, cosine = last(shares.get(method)), last(cosines.get(method))
        of_method = ["–" if share is None else f"{100 * share:.1f} %", "–" if cosine is None else f"{cosine:+.2f}"]
        table.append([name, *cells, *of_method * measured])
    text = "Means since the line of the log before. "
    if measured:
        text += (
            "Share of the gradient: of the whole method, at the parameters of the student’s neck, with the weights in "
            "use; cosine: with the gradient of the detection losses, negative where both pull in other directions."
        )
    else:
        text += "Shares of the gradient are measured with config.auto_weight.log=True or a weight that is auto."
    return f'{pages.table(table)}<p class="small">{escape(text)}</p>'


def threshold(examples: Sequence[Example]) -> float:
    """The lowest score that is drawn: early in a run the student has none of 0.3.

    Args:
      examples: the images.

    Returns:
      The highest of `THRESHOLDS` from which on the student has as many detections as there are objects, or the lowest.
    """
    objects = sum(len(example.labels) for example in examples)
    scores = [example.detections["student"].scores for example in examples if "student" in example.detections]
    return next((t for t in THRESHOLDS if sum((one >= t).sum() for one in scores) >= objects), THRESHOLDS[-1])


def duration(seconds: float) -> str:
    """A time in words.

    Example:
      >>> duration(50), duration(600), duration(9000), duration(400_000)
      ('less than 1 minute', '10 minutes', '2.5 hours', '4.6 days')
    """
    if seconds < 60:
        return "less than 1 minute"
    for unit, size in (("days", 86_400), ("hours", 3600)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    minutes = round(seconds / 60)
    return f"{minutes} minute{'s' * (minutes > 1)}"


def _speed(progress: Progress, rows: Rows) -> str:
    """Tiles with the newest throughput and share of time waiting."""
    series = read(rows, "train")
    speed, waited = last(series.get("images_per_s")), last(series.get("wait_share"))
    tiles = [
        (f"{100 * progress.step // max(progress.steps, 1)} %", "done", f"{progress.step:,} of {progress.steps:,} steps")
    ]
    if speed is not None:
        tiles.append((compact(round(speed, 1)), "throughput", "images per second"))
    if waited is not None:
        tiles.append((f"{100 * waited:.1f} %", "waiting", "of the time, for training images"))
    text = "".join(
        f'<div class="tile"><span>{name}</span><b>{escape(value)}</b><small>{about}</small></div>'
        for value, name, about in tiles
    )
    return f'<div class="tiles now">{text}</div>'
