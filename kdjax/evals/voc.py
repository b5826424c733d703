"""PASCAL VOC's average precision: the area under the curve, and the 11 points of 2007."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def average_precision(recall: np.ndarray, precision: np.ndarray) -> tuple[float, float]:
    """Area under the curve of the best precision at no less recall, and its mean at the recalls 0, 0.1 .. 1.

        p(r) = max precision[i] over recall[i] >= r;   area = integral of p(r) over 0 .. 1
        points = 1/11 sum p(k/10), k = 0 .. 10

    Args:
      recall: f64[n] in 0 .. 1, not falling.
      precision: f64[n] in 0 .. 1, of the first 1 .. n detections.

    Returns:
      Area (VOC since 2010) and 11-point mean (VOC 2007), fractions; both 0 if there is no detection.

    Reference: Everingham et al. 2010, section 4.2; the devkits of 2007 and 2012.

    Example:
      >>> area, points = average_precision(np.array([0.5, 0.5]), np.array([1.0, 0.5]))
      >>> area, round(points, 4)
      (0.5, 0.5455)
    """
    recall, precision = np.asarray(recall, np.float64), np.asarray(precision, np.float64)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    area = float(np.sum(np.diff(recall, prepend=0.0) * best))
    # A recall of exactly k/10 counts, whatever its last bit.
    first = np.searchsorted(recall, np.linspace(0, 1, 11) - 1e-9)
    return area, float(np.append(best, 0.0)[first].mean())


def voc_metrics(
    ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], *, iou_threshold: float = 0.5
) -> dict[str, float]:
    """VOC's metrics of detections: means over the classes of `average_precision`.

    Detections of a class, best score first, each look at the object of the class with the largest IoU in their image:
    under the threshold they are false, at a difficult object they do not count, at an object for the first time they
    are true, and after that false. Difficult objects are not asked for.

    Args:
      ground_truth: COCO instances `images`, `annotations`, `categories`; difficult objects are those with `iscrowd`.
      detections: COCO results `image_id`, `category_id`, `bbox` (x y w h px), `score`.
      iou_threshold: smallest IoU of a true detection.

    Returns:
      {"AP50": area, "AP50_11point": 11-point mean}, fractions ("50" stands for the threshold); -1 where no class has an
      object.

    Scope: the whole data set; classes without objects are left out.

    Peers: the devkit's VOCevaldet.m. Its boxes hold their last pixel; `kdjax.data` reads them as x1-1 y1-1 x2 y2, so
    that plain areas are the devkit's.

    Example:
      >>> box = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 40, 40]}
      >>> truth = {"images": [{"id": 1}], "categories": [{"id": 3, "name": "cat"}], "annotations": [box]}
      >>> voc_metrics(truth, [{**box, "score": 0.9}])
      {'AP50': 1.0, 'AP50_11point': 1.0}
    """
    objects: dict[tuple, list] = {}
    for row in ground_truth["annotations"]:
        objects.setdefault((row["category_id"], row["image_id"]), []).append(row)
    found: dict[int, list] = {}
    for row in detections:
        found.setdefault(row["category_id"], []).append(row)
    every = []
    for category in (entry["id"] for entry in ground_truth["categories"]):
        mine = {image: rows for (of, image), rows in objects.items() if of == category}
        wanted = sum(not row.get("iscrowd", 0) for rows in mine.values() for row in rows)
        if wanted:
            hits = _hits(mine, found.get(category, []), iou_threshold)
            true = np.cumsum(hits)
            every.append(average_precision(true / wanted, true / np.arange(1, len(hits) + 1)))
    area, points = np.mean(every, axis=0).tolist() if every else (-1.0, -1.0)
    name = f"AP{round(100 * iou_threshold)}"
    return {name: area, f"{name}_11point": points}


def _hits(objects: dict[int, list], detections: Sequence[Mapping], iou_threshold: float) -> np.ndarray:
    """Whether each detection of a class that counts is true: f64[n] of 0 and 1, the best score first."""
    boxes = {image: np.array([row["bbox"] for row in rows], np.float64) for image, rows in objects.items()}
    difficult = {image: [bool(row.get("iscrowd", 0)) for row in rows] for image, rows in objects.items()}
    taken = {image: np.zeros(len(rows), bool) for image, rows in objects.items()}
    hits = []
    for i in np.argsort([-row["score"] for row in detections], kind="stable"):
        image, hit = detections[i]["image_id"], False
        if image in boxes:
            iou = _iou(np.array(detections[i]["bbox"], np.float64), boxes[image])
            best = int(np.argmax(iou))
            if iou[best] >= iou_threshold:
                if difficult[image][best]:
                    continue
                hit = not taken[image][best]
                taken[image][best] = True
        hits.append(hit)
    return np.array(hits, np.float64)


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU f64[n] of one box x y w h with others f64[n, 4]."""
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[:2] + box[2:], others[:, :2] + others[:, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    return shared / (box[2] * box[3] + others[:, 2:].prod(-1) - shared)
