"""The page of `kdjax evaluate`: metrics, curves, errors and images of one model, or of two side by side."""

import itertools
from collections.abc import Callable, Container, Iterator, Mapping
from html import escape
from typing import Any

import numpy as np

from kdjax.evals.matching import Truth, masks_by_image, match, truth_by_image
from kdjax.report import drawing, pages
from kdjax.report.charts import chart_grid, line_chart
from kdjax.report.format import percent
from kdjax.structs import Detections

EXAMPLES = 8  # images on the page

Result = Mapping[str, Any]  # of a model, as in evaluation.json
Stream = Callable[[Container[int]], Iterator[tuple[int, np.ndarray]]]


def page(
    results: Mapping[str, Result],
    *,
    data: str,
    truth: Mapping[str, Any],
    stream: Stream,
    kept: Mapping[str, Mapping[int, Detections]],
) -> str:
    """The evaluation as one HTML file without references to other files.

    Args:
      results: "model", and perhaps "other", as `kdjax evaluate` writes them to evaluation.json.
      data: name of the data set.
      truth: COCO instances.
      stream: yields (image id, u8[h, w, 3] RGB) of the images with the ids that it is called with.
      kept: for each of `results` {image id: its detections above the threshold of their class}.

    Returns:
      HTML.
    """
    names = list(next(iter(results.values()))["classes"])
    metrics = {name: one["metrics"] | {k: one[k] for k in ("params", "flops")} for name, one in results.items()}
    order = ("other", "model") if "other" in results else ("model",)
    metrics = {name: metrics[name] for name in order}
    by_class = {k: {name: results[name]["classes"][k]["AP"] for name in order} for k in names}
    title = f"{results['model']['path']} on {data}"
    lead = f"AP {percent(results['model']['metrics']['AP'])}"
    if "other" in results:
        lead += f"; {results['other']['path']}: AP {percent(results['other']['metrics']['AP'])}"
        title += f", compared with {results['other']['path']}"
    objects = truth_by_image(truth)
    files = {image["id"]: image["file_name"] for image in truth["images"]}
    masks = masks_by_image(truth) if any("mask_errors" in one for one in results.values()) else {}
    examples = []
    for image_id, image in _chosen(objects, kept, stream):
        real = ~objects[image_id].crowd
        boxes, labels = objects[image_id].boxes[real], objects[image_id].labels[real]
        detections = {name: kept[name][image_id] for name in order}
        own = [mask for mask, shown in zip(masks[image_id], real, strict=True) if shown] if masks else ()
        examples.append(drawing.Example(image, boxes, labels, detections, files[image_id], own))
    which = "largest difference between the models" if "other" in results else "most errors"
    note = f"The images with the {which}. Detections above the score threshold of their class, without crowd regions."
    masked = []
    if all("mask_errors" in one for one in results.values()):
        masked.append(("Error analysis of masks", _error_table(results, "mask_errors")))
    sections = [
        ("Metrics", pages.metrics_table(metrics)),
        ("AP by class", pages.bars(by_class, first="class")),
        ("Thresholds", "".join(_threshold_table(results, name) for name in results)),
        ("Precision and recall", _curves(results, names)),
        ("Error analysis", _error_table(results)),
        *masked,
        ("Confusion matrix", "".join(_confusion_table(results, name, names) for name in results)),
        ("Images", pages.image_rows(examples, names, threshold=0.0, note=note)),
    ]
    return pages.page(title, f'<p class="verdict">{escape(lead)}.</p>', sections)


def _threshold_table(results: Mapping[str, Result], name: str) -> str:
    rows = [["class", "objects", "threshold", "precision", "recall", "F1"]]
    for label, entry in results[name]["classes"].items():
        best = entry["threshold"] or {}
        score = f"{best['score']:.3f}" if best else "–"
        parts = [percent(best.get(key)) for key in ("precision", "recall", "F1")]
        rows.append([label, str(entry["objects"]), score, *parts])
    about = "Score threshold with the largest F1 at IoU 0.5; precision, recall and F1 in percent."
    return pages.table(rows, caption=name if len(results) > 1 else "") + f'<p class="small">{about}</p>'


def _curves(results: Mapping[str, Result], names: list[str]) -> str:
    """Precision over recall of the classes with most objects."""
    classes = results["model"]["classes"]
    shown = sorted((k for k in names if classes[k]["objects"]), key=lambda k: -classes[k]["objects"])[: pages.MAX_BARS]
    recall = np.arange(101.0)
    charts = []
    for k in shown:
        lines = {name: (recall, 100 * np.array(one["classes"][k]["precision"])) for name, one in results.items()}
        lines = dict(reversed(lines.items()))  # the model on top
        charts.append(line_chart(lines, title=k, unit="precision over recall, %", log=False, across="recall"))
    return f'<p class="small">At IoU 0.5.</p>{chart_grid(charts)}'


def _error_table(results: Mapping[str, Result], key: str = "errors") -> str:
    meanings = {
        "classification": "IoU of at least 0.5 with an object of another class",
        "localization": "IoU of 0.1 to 0.5 with an object of its class",
        "both": "IoU of 0.1 to 0.5 with an object of another class",
        "duplicate": "an object that a detection with a higher score has matched",
        "background": "IoU of at most 0.1 with every object",
        "missed": "an object without a correct, misclassified or mislocalized detection",
    }
    rows = [["error", "definition", *(word for name in results for word in (f"{name}: AP50 cost", f"{name}: count"))]]
    for kind, meaning in meanings.items():
        entries = [one[key][kind] for one in results.values()]
        rows.append([kind, meaning, *itertools.chain(*((percent(e["AP50"]), str(e["count"])) for e in entries))])
    about = (
        "AP50 cost: gain in AP50, in percentage points, if all errors of this kind were corrected (TIDE, Bolya et al. "
        "2020), over all detections. Count: number of errors among detections above the threshold of their class."
    )
    return pages.table(rows) + f'<p class="small">{about}</p>'


def _confusion_table(results: Mapping[str, Result], name: str, names: list[str]) -> str:
    matrix = results[name]["confusion"]
    columns = [*names, "missed"]
    keep = range(len(names))
    if len(names) > pages.MAX_BARS:  # the classes that are confused most
        wrong = [sum(row) - row[i] for i, row in enumerate(matrix[:-1])]
        keep = sorted(sorted(keep, key=lambda i: -wrong[i])[: pages.MAX_BARS])
    at = [*keep, len(names)]
    rows = [["object \\ detected as", *(columns[j] for j in at)]]
    for i in at:
        row = names[i] if i < len(names) else "background"
        rows.append([row, *("" if i == j == len(names) else str(matrix[i][j]) for j in at)])
    return pages.table(rows, caption=name if len(results) > 1 else "")


def _chosen(
    truth: Mapping[int, Truth], kept: Mapping[str, Mapping[int, Detections]], stream: Stream
) -> list[tuple[int, np.ndarray]]:
    """The most informative images: largest difference between the models, or most errors."""
    matches = {name: {k: _matches(truth[k], one[k]) for k in truth} for name, one in kept.items()}
    if len(matches) > 1:
        model, other = matches["model"], matches["other"]
        weight = {k: (model[k][0] != other[k][0]).sum() + abs(model[k][1] - other[k][1]) for k in truth}
    else:
        weight = {k: (~detected).sum() + false for k, (detected, false) in matches["model"].items()}
    best = sorted(weight, key=lambda k: -weight[k])[:EXAMPLES]
    images = dict(stream(best))
    return [(image_id, images[image_id]) for image_id in best]


def _matches(truth: Truth, found: Detections) -> tuple[np.ndarray, int]:
    """Which objects of an image are detected, and the number of false detections."""
    real = ~truth.crowd
    correct, detected = match(truth.boxes[real], truth.labels[real], found.boxes, found.labels, found.scores)
    return detected, int((~correct).sum())
