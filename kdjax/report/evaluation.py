"""The page of `kdjax evaluate`: metrics, curves, errors and images of one model, or of two side by side."""

import itertools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from kdjax.evals.matching import match
from kdjax.report import drawing, pages
from kdjax.report.charts import chart_grid, line_chart
from kdjax.report.format import percent
from kdjax.structs import Detections

EXAMPLES = 8  # images on the page

Stream = Callable[[Container[int]], Iterator[tuple[int, np.ndarray]]]


class _Data(NamedTuple):
    name: str
    truth: Mapping
    stream: Stream


def page(
    results: Mapping[str, Mapping],
    *,
    data: str,
    truth: Mapping,
    stream: Stream,
    kept: Mapping[str, Sequence[Mapping]],
) -> str:
    """The evaluation as one HTML file without references to other files.

    Args:
      results: "model", and perhaps "other", as `kdjax evaluate` writes them to evaluation.json.
      data: name of the data set.
      truth: COCO instances.
      stream: yields (image id, u8[h, w, 3] RGB) of the images with the ids that it is called with.
      kept: the detections of each that count, at the best thresholds of its classes.

    Returns:
      html.
    """
    data = _Data(data, truth, stream)
    names = list(next(iter(results.values()))["classes"])
    metrics = {name: one["metrics"] | {k: one[k] for k in ("params", "flops")} for name, one in results.items()}
    order = ("other", "model") if "other" in results else ("model",)
    metrics = {name: metrics[name] for name in order}
    by_class = {k: {name: results[name]["classes"][k]["AP"] for name in order} for k in names}
    title = f"{results['model']['path']} on {data.name}"
    lead = f"AP {percent(results['model']['metrics']['AP'])}"
    if "other" in results:
        lead += f"; {results['other']['path']}: AP {percent(results['other']['metrics']['AP'])}"
        title += f", compared with {results['other']['path']}"
    label = {k: i for i, k in enumerate(sorted(entry["id"] for entry in data.truth["categories"]))}
    examples = [_example(data, kept, image_id, image, label) for image_id, image in _chosen(data, kept)]
    which = "largest difference between the models" if "other" in results else "most errors"
    note = f"The images with the {which}. Detections above the score threshold of their class, without crowd regions."
    sections = [
        ("Metrics", pages.metrics_table(metrics)),
        ("AP by class", pages.bars(by_class, first="class")),
        ("Thresholds", "".join(_threshold_table(results, name) for name in results)),
        ("Precision and recall", _curves(results, names)),
        ("Error analysis", _error_table(results)),
        ("Confusion matrix", "".join(_confusion_table(results, name, names) for name in results)),
        ("Images", pages.image_rows(examples, names, threshold=0.0, note=note)),
    ]
    return pages.page(title, f'<p class="verdict">{escape(lead)}.</p>', sections)


def _threshold_table(results: Mapping[str, Mapping], name: str) -> str:
    rows = [["class", "objects", "threshold", "precision", "recall", "F1"]]
    for label, entry in results[name]["classes"].items():
        best = entry["threshold"] or {}
        score = f"{best['score']:.3f}" if best else "–"
        parts = [percent(best.get(key)) for key in ("precision", "recall", "F1")]
        rows.append([label, str(entry["objects"]), score, *parts])
    about = "Score threshold with the largest F1 at IoU 0.5; precision, recall and F1 in percent."
    return pages.table(rows, caption=name if len(results) > 1 else "") + f'<p class="small">{about}</p>'


def _curves(results: Mapping[str, Mapping], names: list[str]) -> str:
    """Precision over recall; of many classes those with most objects."""
    of = results["model"]["classes"]
    shown = sorted((k for k in names if of[k]["objects"]), key=lambda k: -of[k]["objects"])[: pages.MAX_BARS]
    recall = np.arange(101.0)
    charts = []
    for k in shown:
        lines = {name: (recall, 100 * np.array(one["classes"][k]["precision"])) for name, one in results.items()}
        lines = dict(reversed(lines.items()))  # the model on top
        charts.append(line_chart(lines, title=k, unit="precision over recall, %", log=False, across="recall"))
    return f'<p class="small">At IoU 0.5.</p>{chart_grid(charts)}'


def _error_table(results: Mapping[str, Mapping]) -> str:
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
        entries = [one["errors"][kind] for one in results.values()]
        rows.append([kind, meaning, *itertools.chain(*((percent(e["AP50"]), str(e["count"])) for e in entries))])
    about = (
        "AP50 cost: gain in AP50, in percentage points, if all errors of this kind were corrected (TIDE, Bolya et al. "
        "2020), over all detections. Count: number of errors among detections above the threshold of their class."
    )
    return pages.table(rows) + f'<p class="small">{about}</p>'


def _confusion_table(results: Mapping[str, Mapping], name: str, names: list[str]) -> str:
    matrix = results[name]["confusion"]
    columns = [*names, "missed"]
    keep = range(len(names))
    if len(names) > pages.MAX_BARS:  # of many classes those that are confused with others
        wrong = [sum(row) - row[i] for i, row in enumerate(matrix[:-1])]
        keep = sorted(sorted(keep, key=lambda i: -wrong[i])[: pages.MAX_BARS])
    at = [*keep, len(names)]
    rows = [["object \\ detected as", *(columns[j] for j in at)]]
    for i in at:
        row = names[i] if i < len(names) else "background"
        rows.append([row, *("" if i == j == len(names) else str(matrix[i][j]) for j in at)])
    return pages.table(rows, caption=name if len(results) > 1 else "")


def _chosen(data: _Data, kept: Mapping[str, Sequence[Mapping]]) -> list[tuple[int, np.ndarray]]:
    """Images that teach most: where the models differ, or where one goes wrong."""
    marks = {name: _marks(data, rows) for name, rows in kept.items()}
    if len(marks) > 1:
        mine, other = marks["model"], marks["other"]
        weight = {i: (mine[i][0] != other[i][0]).sum() + abs(mine[i][1] - other[i][1]) for i in mine}
    else:
        weight = {i: (~found).sum() + false for i, (found, false) in marks["model"].items()}
    best = sorted(weight, key=lambda i: -weight[i])[:EXAMPLES]
    images = dict(data.stream(best))
    return [(image_id, images[image_id]) for image_id in best]


def _marks(data: _Data, rows: Sequence[Mapping]) -> dict[int, tuple[np.ndarray, int]]:
    """For each image: which objects were found, and the number of false detections."""
    truth, found = _by_image(data, data.truth["annotations"]), _by_image(data, rows)
    marks = {}
    for image_id, objects in truth.items():
        objects = [row for row in objects if not row["iscrowd"]]
        scores = np.array([row["score"] for row in found[image_id]])
        hit, seen = match(*_boxes(objects), *_boxes(found[image_id]), scores)
        marks[image_id] = seen, int((~hit).sum())
    return marks


def _by_image(data: _Data, rows: Sequence[Mapping]) -> dict[int, list]:
    groups: dict[int, list] = {image["id"]: [] for image in data.truth["images"]}
    for row in rows:
        groups[row["image_id"]].append(row)
    return groups


def _boxes(rows: Sequence[Mapping]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes f64[n, 4] x1 y1 x2 y2 and category ids of COCO's rows."""
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes, np.array([row["category_id"] for row in rows], np.int64)


def _example(
    data: _Data, kept: Mapping[str, Sequence], image_id: int, image: np.ndarray, label: Mapping
) -> drawing.Example:
    """An image with its detections."""

    def of(rows: Sequence[Mapping]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = [row for row in rows if row["image_id"] == image_id and not row.get("iscrowd")]
        boxes, ids = _boxes(rows)
        labels = np.array([label[k] for k in ids.tolist()], np.int64)
        return boxes, np.array([row.get("score", 1.0) for row in rows]), labels

    name = next(entry["file_name"] for entry in data.truth["images"] if entry["id"] == image_id)
    boxes, _, labels = of(data.truth["annotations"])
    models = [model for model in ("other", "model") if model in kept]
    return drawing.Example(image, boxes, labels, {model: Detections(*of(kept[model])) for model in models}, name)
