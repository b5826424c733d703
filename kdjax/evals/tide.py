"""Detection error analysis (TIDE): score thresholds, confusion matrix, and the cost of each kind of error.

Everything is at an IoU of 0.5, with COCO's rules for crowd regions (detections in a crowd region of their class do not
count) and for the number of detections (the best 100 per image and class). Images are given as {image id: objects} and
{image id: detections}. If the objects have masks (`truth_by_image(..., masks=True)`), IoU and area are those of masks.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kdjax.evals.matching import Truth, covered, match_overlaps, overlaps
from kdjax.structs import Detections

DEFAULT_THRESHOLD = 0.3  # score threshold if no detection is correct
IOU = 0.5  # minimum IoU of a correct detection
BACKGROUND_IOU = 0.1  # maximum IoU of a background error
MAX_DETECTIONS = 100  # per image and class
KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
CORRECT = -1
_CLASSIFICATION, _LOCALIZATION, _BOTH, _DUPLICATE, _BACKGROUND, _MISSED = range(len(KINDS))


class Outcomes(NamedTuple):
    """The outcomes of n detections and m objects, image by image."""

    labels: np.ndarray  # i64[n]
    scores: np.ndarray  # f64[n]
    kinds: np.ndarray  # i64[n], CORRECT or the position in KINDS
    targets: np.ndarray  # i64[n], the object of a classification or localization error, else -1
    object_labels: np.ndarray  # i64[m]
    detected: np.ndarray  # bool[m]
    num_classes: int


def outcomes(truth: Mapping[int, Truth], detections: Mapping[int, Detections], num_classes: int) -> Outcomes:
    """Classifies every detection as correct or as a kind of error, and every object as detected or not.

    Correct detections are COCO's: in descending order of score, each detection takes the free object of its class with
    the largest IoU of at least 0.5. Any other has the first kind that applies: *localization*, an object of its class
    with an IoU of 0.1 to 0.5; *classification*, an object of another class with an IoU of at least 0.5; *duplicate*, an
    object of its class that a detection with a higher score has taken; *background*, no object with an IoU above 0.1;
    else *both*.

    Args:
      truth: image id -> objects, see `kdjax.evals.matching.truth_by_image`.
      detections: image id -> detections, for each image of `truth`.
      num_classes: K.

    Returns:
      Outcomes, without detections in crowd regions.

    Reference: Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020, section 2.

    Example:
      >>> truth = {1: Truth(np.array([[0, 0, 40, 40.0]]), np.array([0]), np.array([False]))}
      >>> boxes = np.array([[0, 0, 40, 40], [0, 0, 40, 10.0]])
      >>> result = outcomes(truth, {1: Detections(boxes, np.array([0.9, 0.8]), np.array([0, 0]))}, 1)
      >>> bool(result.kinds[0] == CORRECT), KINDS[result.kinds[1]], result.detected.tolist()
      (True, 'localization', [True])
    """
    parts, objects = [], 0
    for image_id, image in truth.items():
        found, iou, labels, correct, detected = _matched(image, detections[image_id])
        same_class = found.labels[:, None] == labels[None, :]
        same, other = np.where(same_class, iou, 0.0), np.where(same_class, 0.0, iou)
        best_same, best_other = (side.max(1, initial=0.0) for side in (same, other))
        conditions = [
            (correct, CORRECT),
            ((best_same >= BACKGROUND_IOU) & (best_same < IOU), _LOCALIZATION),
            (best_other >= IOU, _CLASSIFICATION),
            (best_same >= IOU, _DUPLICATE),
            (best_other <= BACKGROUND_IOU, _BACKGROUND),
        ]
        kinds = np.select([where for where, _ in conditions], [kind for _, kind in conditions], _BOTH)
        targets = np.full(len(kinds), -1)
        for kind, side in ((_LOCALIZATION, same), (_CLASSIFICATION, other)):
            chosen = kinds == kind
            targets[chosen] = objects + side[chosen].argmax(1) if chosen.any() else 0
        counts = correct | ~_in_crowd(image, found)
        scores = np.asarray(found.scores, np.float64)
        parts.append((found.labels[counts], scores[counts], kinds[counts], targets[counts], labels, detected))
        objects += len(labels)
    labels, scores, kinds, targets, object_labels, detected = map(np.concatenate, zip(*parts, strict=True))
    return Outcomes(labels, scores, kinds, targets, object_labels, detected, num_classes)


def best_thresholds(outcomes: Outcomes, *, precision: float | None = None) -> list[dict[str, float] | None]:
    """The score threshold of each class with the largest F1, or the lowest one with a precision.

    Args:
      outcomes: from `outcomes`.
      precision: at least this share of the detections is correct, 0 .. 1; None: the largest F1.

    Returns:
      For each class {score, precision, recall, F1} of the detections with at least this score; None if no detection of
      the class is correct, or no threshold has the precision.
    """
    best = []
    for label in range(outcomes.num_classes):
        of_class = outcomes.labels == label
        objects = int((outcomes.object_labels == label).sum())
        best.append(_best_threshold(outcomes.scores[of_class], outcomes.kinds[of_class], objects, precision))
    return best


def _best_threshold(
    scores: np.ndarray, kinds: np.ndarray, objects: int, precision: float | None = None
) -> dict[str, float] | None:
    order = np.argsort(-scores, kind="stable")
    scores, true = scores[order], np.cumsum(kinds[order] == CORRECT)
    if not len(true) or not true[-1]:
        return None
    count = np.arange(1, len(true) + 1)
    f1 = 2 * true / (count + objects)
    value = f1 if precision is None else np.where((true > 0) & (true >= precision * count), count, 0)
    value[:-1][scores[:-1] == scores[1:]] = 0  # a threshold cannot separate equal scores
    at = int(np.argmax(value))
    if not value[at]:
        return None
    metrics = {"score": scores[at], "precision": true[at] / (at + 1), "recall": true[at] / objects, "F1": f1[at]}
    return {name: float(value) for name, value in metrics.items()}


def above_threshold(
    truth: Mapping[int, Truth],
    detections: Mapping[int, Detections],
    thresholds: Sequence[Mapping[str, float] | None],
) -> dict[int, Detections]:
    """The detections with at least the best score threshold of their class.

    A class without a threshold takes that of all classes together, or `DEFAULT_THRESHOLD`.

    Args:
      truth: image id -> objects.
      detections: image id -> detections.
      thresholds: from `best_thresholds`.
    """
    common = DEFAULT_THRESHOLD
    if None in thresholds:
        result = outcomes(truth, detections, len(thresholds))
        together = _best_threshold(result.scores, result.kinds, len(result.object_labels))
        common = together["score"] if together else DEFAULT_THRESHOLD
    minimum = np.array([one["score"] if one else common for one in thresholds], np.float64)
    return {image_id: found[found.scores >= minimum[found.labels]] for image_id, found in detections.items()}


def without_crowd(truth: Mapping[int, Truth], detections: Mapping[int, Detections]) -> dict[int, Detections]:
    """The detections that count: without those in a crowd region of their class, unless they are correct."""
    result = {}
    for image_id, image in truth.items():
        found, _, _, correct, _ = _matched(image, detections[image_id])
        result[image_id] = found[correct | ~_in_crowd(image, found)]
    return result


def confusion(truth: Mapping[int, Truth], detections: Mapping[int, Detections], num_classes: int) -> np.ndarray:
    """The confusion matrix of the classes.

    Objects are first matched with detections of their class (as in `outcomes`), then the remaining ones of all classes,
    best score first, largest IoU of at least 0.5.

    Args:
      truth: image id -> objects.
      detections: image id -> detections, all of which count: see `above_threshold`.
      num_classes: K.

    Returns:
      i64[K + 1, K + 1]: rows are objects, columns detections; the last row is background (false positives), the last
      column the missed objects.
    """
    matrix = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for image_id, image in truth.items():
        found, iou, labels, correct, detected = _matched(image, detections[image_id])
        np.add.at(matrix, (labels[detected], labels[detected]), 1)
        rest = ~correct & ~_in_crowd(image, found)
        for row, label in zip(iou[rest], found.labels[rest], strict=True):
            row = np.where(detected, -1.0, row)
            best = int(row.argmax()) if len(row) else 0
            if len(row) and row[best] >= IOU:
                detected[best] = True
                matrix[labels[best], label] += 1
            else:
                matrix[num_classes, label] += 1
        np.add.at(matrix[:, num_classes], labels[~detected], 1)
    return matrix


def error_counts(outcomes: Outcomes) -> dict[str, int]:
    """The number of errors of each kind.

    Missed objects are those without a correct detection and without a classification or localization error.
    """
    number = np.bincount(outcomes.kinds[outcomes.kinds != CORRECT], minlength=len(KINDS))
    number[_MISSED] = _missed(outcomes).sum()
    return dict(zip(KINDS, number.tolist(), strict=True))


def ap_cost(outcomes: Outcomes) -> dict[str, float]:
    """The gain in AP50 if all errors of one kind were corrected.

    Corrected means: of *classification* and *localization* errors the best detection of each undetected object becomes
    correct and the others are removed; *duplicate*, *background* and *both* are removed; *missed* objects are not
    required. The costs do not add up to 1 - AP50.

    Args:
      outcomes: from `outcomes`.

    Returns:
      {kind: fraction}, >= 0, and "AP50".

    Scope: the whole data set; the mean over classes with objects.

    Peers: tidecv's main errors, implemented from the paper's section 2; not compared with tidecv itself.
    """
    all_detections, all_objects = np.ones(len(outcomes.kinds), bool), np.ones(len(outcomes.detected), bool)
    base = _mean_ap(outcomes, outcomes.labels, outcomes.kinds == CORRECT, all_detections, all_objects)
    result = {"AP50": base}
    for kind, name in enumerate(KINDS):
        labels, correct, stay = outcomes.labels.copy(), outcomes.kinds == CORRECT, outcomes.kinds != kind
        required = all_objects
        if kind in (_CLASSIFICATION, _LOCALIZATION):
            free = np.flatnonzero((outcomes.kinds == kind) & ~np.append(outcomes.detected, True)[outcomes.targets])
            order = free[np.argsort(-outcomes.scores[free], kind="stable")]
            _, first = np.unique(outcomes.targets[order], return_index=True)
            corrected = order[first]
            labels[corrected] = outcomes.object_labels[outcomes.targets[corrected]]
            correct[corrected] = stay[corrected] = True
        if kind == _MISSED:
            required = ~_missed(outcomes)
        result[name] = _mean_ap(outcomes, labels, correct, stay, required) - base
    return result


def _missed(outcomes: Outcomes) -> np.ndarray:
    missed = ~outcomes.detected
    missed[outcomes.targets[outcomes.targets >= 0]] = False
    return missed


def _mean_ap(
    outcomes: Outcomes, labels: np.ndarray, correct: np.ndarray, stay: np.ndarray, required: np.ndarray
) -> float:
    averages = []
    for label in np.unique(outcomes.object_labels):
        of_class = (labels == label) & stay
        objects = int((required & (outcomes.object_labels == label)).sum())
        averages.append(_average_precision(outcomes.scores[of_class], correct[of_class], objects) if objects else 0.0)
    return float(np.mean(averages)) if averages else -1.0


def _average_precision(scores: np.ndarray, correct: np.ndarray, objects: int) -> float:
    """COCO's: the maximum precision at equal or higher recall, averaged over the recalls 0, 0.01 .. 1."""
    true = np.cumsum(correct[np.argsort(-scores, kind="stable")])
    precision = true / np.arange(1, len(true) + 1)
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return float(best[np.searchsorted(true / objects, np.linspace(0, 1, 101))].mean())


def _matched(image: Truth, detections: Detections) -> tuple[Detections, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The best detections of each class, their IoU with the objects, without crowd regions; their labels; `match`."""
    found = detections[np.argsort(-detections.scores, kind="stable")]
    rank = np.zeros(len(found), int)
    for label in np.unique(found.labels):
        of_class = found.labels == label
        rank[of_class] = np.arange(of_class.sum())
    found = found[rank < MAX_DETECTIONS]
    objects = _some(image, ~image.crowd)
    iou, labels = overlaps(objects, found), objects.labels
    return found, iou, labels, *match_overlaps(iou, labels, found.labels, found.scores, iou_threshold=IOU)


def _some(image: Truth, chosen: np.ndarray) -> Truth:
    """Some objects of an image."""
    masks = None if image.masks is None else tuple(image.masks[i] for i in np.flatnonzero(chosen))
    return Truth(image.boxes[chosen], image.labels[chosen], image.crowd[chosen], masks)


def _in_crowd(image: Truth, detections: Detections) -> np.ndarray:
    """bool[n]: which detections have at least half of their area in a crowd region of their class."""
    crowd = _some(image, image.crowd)
    return ((covered(crowd, detections) >= IOU) & (detections.labels[:, None] == crowd.labels[None, :])).any(1)
