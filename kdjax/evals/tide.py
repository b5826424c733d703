"""What goes wrong: best thresholds, the confusion of classes, and what each kind of error costs.

Everything is at an IoU of 0.5, with COCO's rules for crowd regions (what lies in one of its class does not count) and
for the number of detections (100 an image and class).
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdjax.evals.matching import box_iou, match

USUAL = 0.3  # score from which a detection counts where nothing says more
IOU, TOUCH = 0.5, 0.1  # of a hit; under this a detection has nothing to do with an object
MAX_DETECTIONS = 100
KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
HIT = -1
_CLASS, _PLACE, _BOTH, _DOUBLE, _BACKGROUND, _MISSED = range(len(KINDS))


class Outcomes(NamedTuple):
    """What became of n detections and of m objects; those of one image stand together, images by ascending id."""

    labels: np.ndarray  # i64[n], position of the category among those by ascending id
    scores: np.ndarray  # f64[n]
    kinds: np.ndarray  # i64[n], HIT or the position in KINDS
    targets: np.ndarray  # i64[n], for the kinds class and place the object that is meant, else -1
    object_labels: np.ndarray  # i64[m]
    found: np.ndarray  # bool[m]
    num_classes: int


class _Image(NamedTuple):
    boxes: np.ndarray  # f64[m, 4], x1 y1 x2 y2 of the objects
    labels: np.ndarray  # i64[m]
    crowd: np.ndarray  # bool[m]
    found_boxes: np.ndarray  # f64[n, 4], of the detections, best score first
    found_labels: np.ndarray  # i64[n]
    scores: np.ndarray  # f64[n]
    rows: list  # n detections as they were given


def outcomes(ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> Outcomes:
    """Says of every detection whether it is a hit or which kind of error, and of every object whether it was found.

    Hits are COCO's: by score, each detection takes the free object of its class with the largest IoU of at least 0.5.
    Of the others, the first that fits: *place*, an object of its class with an IoU of 0.1 to 0.5; *class*, an object of
    another class with an IoU of at least 0.5; *double*, an object of its class that a better detection took;
    *background*, no object with an IoU over 0.1; else *class and place*.

    Args:
      ground_truth: COCO instances, see `kdjax.evals.coco.curves`.
      detections: COCO results with `bbox`.

    Returns:
      Outcomes; detections in crowd regions are left out.

    Reference: Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020, section 2.

    Example:
      >>> box = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 40, 40]}
      >>> truth = {"images": [{"id": 1}], "categories": [{"id": 3, "name": "cat"}], "annotations": [box]}
      >>> seen = outcomes(truth, [{**box, "score": 0.9}, {**box, "bbox": [0, 0, 40, 10], "score": 0.8}])
      >>> [KINDS[kind] if kind != HIT else "hit" for kind in seen.kinds], seen.found.tolist()
      (['hit', 'localization'], [True])
    """
    parts, objects = [], 0
    for image in _images(ground_truth, detections):
        real = ~image.crowd
        iou = box_iou(image.found_boxes, image.boxes[real])
        same = image.found_labels[:, None] == image.labels[real][None, :]
        hit, found = match(
            image.boxes[real],
            image.labels[real],
            image.found_boxes,
            image.found_labels,
            image.scores,
            iou_threshold=IOU,
        )
        own, other = np.where(same, iou, 0.0), np.where(same, 0.0, iou)
        best_own, best_other = (side.max(1, initial=0.0) for side in (own, other))
        kinds = np.select(
            [hit, (best_own >= TOUCH) & (best_own < IOU), best_other >= IOU, best_own >= IOU, best_other <= TOUCH],
            [HIT, _PLACE, _CLASS, _DOUBLE, _BACKGROUND],
            _BOTH,
        )
        targets = np.full(len(kinds), -1)
        for kind, side in ((_PLACE, own), (_CLASS, other)):
            chosen = kinds == kind
            targets[chosen] = objects + side[chosen].argmax(1) if chosen.any() else 0
        counts = hit | ~_in_crowd(image)
        parts.append(
            (
                image.found_labels[counts],
                image.scores[counts],
                kinds[counts],
                targets[counts],
                image.labels[real],
                found,
            )
        )
        objects += int(real.sum())
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Outcomes(*columns, len(ground_truth["categories"]))


def best_thresholds(seen: Outcomes) -> list[dict[str, float] | None]:
    """For each class the score at which precision and recall are best together (largest F1).

    Args:
      seen: from `outcomes`.

    Returns:
      For each class {score, precision, recall, F1}, detections from this score on; None if nothing is ever found.
    """
    best = []
    for label in range(seen.num_classes):
        mine = seen.labels == label
        best.append(_best_threshold(seen.scores[mine], seen.kinds[mine], int((seen.object_labels == label).sum())))
    return best


def _best_threshold(scores: np.ndarray, kinds: np.ndarray, wanted: int) -> dict[str, float] | None:
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(kinds[order] == HIT)
    if not len(hits) or not hits[-1]:
        return None
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + wanted)
    f1[:-1][scores[:-1] == scores[1:]] = 0  # equal scores come in together
    at = int(np.argmax(f1))
    metrics = {"score": scores[at], "precision": hits[at] / (at + 1), "recall": hits[at] / wanted, "F1": f1[at]}
    return {name: float(value) for name, value in metrics.items()}


def keep(
    ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], best: Sequence[Mapping | None]
) -> list[Mapping[str, Any]]:
    """The detections that score at least the best threshold of their class.

    A class of which nothing is ever found has none: that of all classes together counts, or `USUAL` if that is none.
    """
    ids = sorted(category["id"] for category in ground_truth["categories"])
    common = USUAL
    if None in best:
        seen = outcomes(ground_truth, detections)
        together = _best_threshold(seen.scores, seen.kinds, len(seen.object_labels))
        common = together["score"] if together else USUAL
    least = {k: one["score"] if one else common for k, one in zip(ids, best, strict=True)}
    return [row for row in detections if row["score"] >= least[row["category_id"]]]


def counted(ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The detections that count: without those in a crowd region of their class that hit nothing else."""
    rows = []
    for image in _images(ground_truth, detections):
        real = ~image.crowd
        found = (image.found_boxes, image.found_labels, image.scores)
        hit, _ = match(image.boxes[real], image.labels[real], *found, iou_threshold=IOU)
        rows += itertools.compress(image.rows, hit | ~_in_crowd(image))
    return rows


def confusion(ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Counts what objects were taken for.

    Objects are first paired with detections of their class (as in `outcomes`), then what is left of both with each
    other, best score first, largest IoU of at least 0.5.

    Args:
      ground_truth: COCO instances.
      detections: COCO results with `bbox`, all of which count: see `keep`.

    Returns:
      i64[K + 1, K + 1]: rows are objects, columns detections, by ascending category id; the last row is background
      (false detections), the last column what was missed.
    """
    count = len(ground_truth["categories"])
    matrix = np.zeros((count + 1, count + 1), np.int64)
    for image in _images(ground_truth, detections):
        real = ~image.crowd
        boxes, labels = image.boxes[real], image.labels[real]
        found = (image.found_boxes, image.found_labels, image.scores)
        hit, seen = match(boxes, labels, *found, iou_threshold=IOU)
        np.add.at(matrix, (labels[seen], labels[seen]), 1)
        left = ~hit & ~_in_crowd(image)
        iou = box_iou(image.found_boxes[left], boxes)
        for row, label in zip(iou, image.found_labels[left], strict=True):
            row = np.where(seen, -1.0, row)
            best = int(row.argmax()) if len(row) else 0
            if len(row) and row[best] >= IOU:
                seen[best] = True
                matrix[labels[best], label] += 1
            else:
                matrix[count, label] += 1
        np.add.at(matrix, (labels[~seen], count), 1)
    return matrix


def counts(seen: Outcomes) -> dict[str, int]:
    """How often each kind of error occurs; missed are objects that no hit and no error of class or place is about."""
    number = np.bincount(seen.kinds[seen.kinds != HIT], minlength=len(KINDS))
    number[_MISSED] = _missed(seen).sum()
    return dict(zip(KINDS, number.tolist(), strict=True))


def losses(seen: Outcomes) -> dict[str, float]:
    """What each kind of error costs: AP50 if all of one kind were mended, minus AP50.

    Mended is: *class* and *place*, the best detection of an object that no hit has becomes a hit, the others go;
    *double*, *background*, *class and place* go; *missed* objects are not asked for. The parts do not add up to what is
    missing to 1.

    Args:
      seen: from `outcomes`.

    Returns:
      {kind: fraction}, >= 0, and "AP50".

    Scope: the whole data set; the mean over classes with objects.

    Peers: tidecv's main errors, written from the paper's section 2; tidecv itself was not run.
    """
    base = _mean_ap(
        seen, seen.labels, seen.kinds == HIT, np.ones(len(seen.kinds), bool), np.ones(len(seen.found), bool)
    )
    result = {"AP50": base}
    for kind, name in enumerate(KINDS):
        labels, hits, stay = seen.labels.copy(), seen.kinds == HIT, seen.kinds != kind
        asked = np.ones(len(seen.found), bool)
        if kind in (_CLASS, _PLACE):
            free = np.flatnonzero((seen.kinds == kind) & ~np.append(seen.found, True)[seen.targets])
            order = free[np.argsort(-seen.scores[free], kind="stable")]
            _, first = np.unique(seen.targets[order], return_index=True)
            mended = order[first]
            labels[mended] = seen.object_labels[seen.targets[mended]]
            hits[mended] = stay[mended] = True
        if kind == _MISSED:
            asked = ~_missed(seen)
        result[name] = _mean_ap(seen, labels, hits, stay, asked) - base
    return result


def _missed(seen: Outcomes) -> np.ndarray:
    missed = ~seen.found
    missed[seen.targets[seen.targets >= 0]] = False
    return missed


def _mean_ap(seen: Outcomes, labels: np.ndarray, hits: np.ndarray, stay: np.ndarray, asked: np.ndarray) -> float:
    every = []
    for label in np.unique(seen.object_labels):
        mine = (labels == label) & stay
        wanted = int((asked & (seen.object_labels == label)).sum())
        every.append(_average_precision(seen.scores[mine], hits[mine], wanted) if wanted else 0.0)
    return float(np.mean(every)) if every else -1.0


def _average_precision(scores: np.ndarray, hits: np.ndarray, wanted: int) -> float:
    """COCO's: the best precision at no less recall, at the recalls 0, 0.01 .. 1."""
    true = np.cumsum(hits[np.argsort(-scores, kind="stable")])
    precision = true / np.arange(1, len(true) + 1)
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return float(best[np.searchsorted(true / wanted, np.linspace(0, 1, 101))].mean())


def _in_crowd(image: _Image) -> np.ndarray:
    """bool[n]: which detections lie by half or more in a crowd region of their class."""
    crowd = image.boxes[image.crowd]
    low = np.maximum(image.found_boxes[:, None, :2], crowd[None, :, :2])
    high = np.minimum(image.found_boxes[:, None, 2:], crowd[None, :, 2:])
    area = (image.found_boxes[:, 2:] - image.found_boxes[:, :2]).prod(-1)
    share = np.clip(high - low, 0, None).prod(-1) / np.maximum(area, 1e-12)[:, None]
    return ((share >= IOU) & (image.found_labels[:, None] == image.labels[image.crowd][None, :])).any(1)


def _images(ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> list[_Image]:
    """Every image by ascending id, of its detections the best of each class."""
    label = {k: i for i, k in enumerate(sorted(category["id"] for category in ground_truth["categories"]))}
    objects: dict[int, list] = {image["id"]: [] for image in ground_truth["images"]}
    found: dict[int, list] = {image["id"]: [] for image in ground_truth["images"]}
    for row in ground_truth["annotations"]:
        objects[row["image_id"]].append(row)
    for row in detections:
        found[row["image_id"]].append(row)
    made = []
    for image in sorted(objects):
        rows = sorted(found[image], key=lambda row: -row["score"])
        taken = np.zeros(len(label), int)
        best = []
        for row in rows:
            taken[label[row["category_id"]]] += 1
            if taken[label[row["category_id"]]] <= MAX_DETECTIONS:
                best.append(row)
        columns = []
        for some in (objects[image], best):
            boxes = np.array([row["bbox"] for row in some], np.float64).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            columns += [boxes, np.array([label[row["category_id"]] for row in some], np.int64)]
        crowd = np.array([bool(row.get("iscrowd", 0)) for row in objects[image]], bool)
        scores = np.array([row["score"] for row in best], np.float64)
        made.append(_Image(columns[0], columns[1], crowd, columns[2], columns[3], scores, best))
    return made
