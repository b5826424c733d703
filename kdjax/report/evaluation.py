"""The page of an evaluation, with the metrics, curves, errors and images of one model or of two side by side."""

import itertools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from kdjax.report import drawing, run_report

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
    lead = f"AP {_points(results['model']['metrics']['AP'])}"
    if "other" in results:
        lead += f"; the other, {results['other']['path']}, has {_points(results['other']['metrics']['AP'])}"
        title += f", against {results['other']['path']}"
    label = {k: i for i, k in enumerate(sorted(entry["id"] for entry in data.truth["categories"]))}
    examples = [_example(data, kept, image_id, image, label) for image_id, image in _chosen(data, kept)]
    what = "the two models differ most" if "other" in results else "there are most false and missed"
    note = f"Images where {what}; detections from the best score of their class on, but for those in crowd regions."
    sections = [
        ("Metrics", run_report.metrics_table(metrics)),
        ("AP by class", run_report.bars(by_class, heading="class")),
        ("Thresholds", "".join(_threshold_table(results, name) for name in results)),
        ("Precision and recall", _curves(results, names)),
        ("Kinds of error", _error_table(results)),
        ("Confusion", "".join(_confusion_table(results, name, names) for name in results)),
        ("Images", run_report.image_rows(examples, names, threshold=0.0, note=note)),
    ]
    return run_report.page(title, f'<p class="verdict">{escape(lead)}.</p>', sections)


def _points(value: float | None) -> str:
    return "–" if value is None or value < 0 else f"{100 * value:.1f}"


def _html_table(rows: Sequence[Sequence[str]], *, caption: str = "") -> str:
    head, *body = [[escape(cell) for cell in row] for row in rows]
    text = "<thead><tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in head) + "</tr></thead><tbody>"
    for first, *rest in body:
        text += f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
    heading = f"<h3>{escape(caption)}</h3>" if caption else ""
    long = ' long" tabindex="0" role="region" aria-label="table' if len(body) > run_report.MAX_BARS + 1 else ""
    return f'{heading}<div class="scroll{long}"><table>{text}</tbody></table></div>'


def _threshold_table(results: Mapping[str, Mapping], name: str) -> str:
    rows = [["class", "objects", "best score", "precision", "recall", "F1"]]
    for label, entry in results[name]["classes"].items():
        best = entry["threshold"] or {}
        score = f"{best['score']:.3f}" if best else "–"
        parts = [_points(best.get(key)) for key in ("precision", "recall", "F1")]
        rows.append([label, str(entry["objects"]), score, *parts])
    about = "The score from which on precision and recall are best together (largest F1), at an IoU of .5."
    return _html_table(rows, caption=name if len(results) > 1 else "") + f'<p class="small">{about}</p>'


def _curves(results: Mapping[str, Mapping], names: list[str]) -> str:
    """Precision over recall; of many classes those with most objects."""
    of = results["model"]["classes"]
    shown = sorted((k for k in names if of[k]["objects"]), key=lambda k: -of[k]["objects"])[: run_report.MAX_BARS]
    recall = np.arange(101.0)
    charts = []
    for k in shown:
        lines = {name: (recall, 100 * np.array(one["classes"][k]["precision"])) for name, one in results.items()}
        lines = dict(reversed(lines.items()))  # the model on top
        charts.append(
            run_report.line_chart(lines, title=k, unit="precision over recall, %", log=False, across="recall")
        )
    return f'<p class="small">At an IoU of .5.</p><div class="charts">{"".join(charts)}</div>'


def _error_table(results: Mapping[str, Mapping]) -> str:
    meanings = {
        "class": "IoU of at least .5 with an object of another class",
        "place": "IoU of .1 to .5 with an object of its class",
        "class and place": "IoU of .1 to .5 with an object of another class",
        "double": "an object that a better detection has found",
        "background": "no object there",
        "missed": "an object that nothing is about",
    }
    rows = [["kind", "what it is", *(word for name in results for word in (f"{name} costs", f"{name} times"))]]
    for kind, meaning in meanings.items():
        entries = [one["errors"][kind] for one in results.values()]
        rows.append([kind, meaning, *itertools.chain(*((_points(e["AP50"]), str(e["count"])) for e in entries))])
    about = (
        "Costs: points of AP50 that would be won if all errors of the kind were mended, over all detections (TIDE, "
        "Bolya et al. 2020). Times: how often, among detections from the best score of their class on."
    )
    return _html_table(rows) + f'<p class="small">{about}</p>'


def _confusion_table(results: Mapping[str, Mapping], name: str, names: list[str]) -> str:
    matrix = results[name]["confusion"]
    columns = [*names, "missed"]
    keep = range(len(names))
    if len(names) > run_report.MAX_BARS:  # of many classes those that are confused with others
        wrong = [sum(row) - row[i] for i, row in enumerate(matrix[:-1])]
        keep = sorted(sorted(keep, key=lambda i: -wrong[i])[: run_report.MAX_BARS])
    at = [*keep, len(names)]
    rows = [["object is … found as", *(columns[j] for j in at)]]
    for i in at:
        row = names[i] if i < len(names) else "no object"
        rows.append([row, *("" if i == j == len(names) else str(matrix[i][j]) for j in at)])
    return _html_table(rows, caption=name if len(results) > 1 else "")


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
        hit, seen = drawing.match(*_boxes(objects), *_boxes(found[image_id]), scores)
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


def _example(data: _Data, kept: Mapping[str, Sequence], image_id: int, image: np.ndarray, label: Mapping) -> dict:
    """An image as `report.drawing.panels` takes it."""

    def of(rows: Sequence[Mapping]) -> dict:
        rows = [row for row in rows if row["image_id"] == image_id and not row.get("iscrowd")]
        boxes, ids = _boxes(rows)
        labels = np.array([label[k] for k in ids.tolist()], np.int64)
        return {"boxes": boxes, "labels": labels, "scores": np.array([row.get("score", 1.0) for row in rows])}

    name = next(entry["file_name"] for entry in data.truth["images"] if entry["id"] == image_id)
    return {"image": image, "name": name, "truth": of(data.truth["annotations"])} | {k: of(v) for k, v in kept.items()}
