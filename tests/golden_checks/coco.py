"""`coco/*/`: COCO's metrics for boxes and masks, against pycocotools."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.evals.coco import class_metrics, curves, metrics
from tests.golden_checks.api import Check, Checks, UnknownCase, failure

TOLERANCE = 1e-9
ROUNDED = 5e-11  # the recalls are written with ten decimals
# Whose metrics `expected.json` holds beside them, and what they depend on.
ABOUT = {"pycocotools", "seed"}
COUNTS = {"n_gt", "n_dt", "n_crowd", "n_by_area"}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def with_boxes(folder: Path) -> list[dict]:
    """Masks and boxes of the same detections in one: pycocotools then counts the area of the box."""
    masks, boxes = read(folder / "dt_segm.json"), read(folder / "dt_bbox.json")
    return [{**box, **mask} for mask, box in zip(masks, boxes, strict=True)]


def with_one_score(folder: Path) -> list[dict]:
    return [{**row, "score": 0.5} for row in read(folder / "dt_bbox.json")]


def difference(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise ValueError(f"shape {got.shape} instead of {want.shape}")
    return float(np.abs(got - want).max()) if want.size else 0.0


def check_metrics(folder: Path, part: str, want: dict[str, Any]) -> Checks:
    truth = read(folder / "gt.json")
    if part == "bbox":
        got = curves(truth, read(folder / "dt_bbox.json"))
    elif part == "bbox_class_agnostic":
        got = curves(truth, read(folder / "dt_bbox.json"), use_categories=False)
    elif part == "bbox_score_all_equal":
        got = curves(truth, with_one_score(folder))
    elif part == "segm":
        got = curves(truth, read(folder / "dt_segm.json"), iou_type="segm")
    elif part == "segm_when_results_also_carry_bbox":
        got = curves(truth, with_boxes(folder), iou_type="segm")
    else:
        raise UnknownCase(f"no check for {part!r}")
    for key, value in want.items():
        if key == "stats":
            yield Check(f"{part} stats", difference(list(metrics(got).values()), value), TOLERANCE)
        elif key == "per_category":
            ids = [str(identity) for identity in got.category_ids]
            if set(ids) != set(value):
                raise ValueError(f"categories {', '.join(ids)} instead of {', '.join(value)}")
            means, halves = class_metrics(got).values(), class_metrics(got, threshold=0.5).values()
            rows = [[value[i]["AP"], value[i]["AP50"]] for i in ids]
            got_rows = [[mean, half] for mean, half in zip(means, halves, strict=True)]
            yield Check(f"{part} per category", difference(got_rows, rows), TOLERANCE)
        elif key == "recall_all_maxdet":
            yield Check(f"{part} recall", difference(got.recall[:, :, 0, -1], value), TOLERANCE + ROUNDED)
        else:
            raise UnknownCase(f"no check for {key!r}")


def expected(path: Path) -> Checks:
    """All metrics of a folder."""
    for part, want in read(path).items():
        if part in ABOUT | COUNTS:
            continue
        try:
            yield from check_metrics(path.parent, part, want)
        except Exception as error:  # the other parts go on
            yield failure(part, error)


def ground_truth(path: Path) -> Checks:
    """That the objects are those of which the metrics speak."""
    rows, want = read(path)["annotations"], read(path.parent / "expected.json")
    areas = np.array([row["area"] for row in rows])
    sizes = [np.sum(areas < 32**2), np.sum((areas >= 32**2) & (areas < 96**2)), np.sum(areas >= 96**2)]
    yield Check("number of objects", difference(len(rows), want["n_gt"]), 0)
    yield Check("number of crowds", difference(sum(row["iscrowd"] for row in rows), want["n_crowd"]), 0)
    yield Check("objects by size", difference(sizes, want["n_by_area"]), 0)


def detections(path: Path) -> Checks:
    """That the detections are those of which the metrics speak."""
    yield Check("number of detections", difference(len(read(path)), read(path.parent / "expected.json")["n_dt"]), 0)


CHECKS = [
    ("coco/*/expected.json", expected),
    ("coco/*/gt.json", ground_truth),
    ("coco/*/dt_bbox.json", detections),
    ("coco/*/dt_segm.json", detections),
]
