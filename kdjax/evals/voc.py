"""PASCAL VOC's average precision: the area under the curve, and the 11 points of 2007."""

from collections.abc import Mapping

import numpy as np

from kdjax.evals.matching import Truth, box_iou
from kdjax.structs import Detections


def average_precision(recall: np.ndarray, precision: np.ndarray) -> tuple[float, float]:
    """Area under the curve of the maximum precision at equal or higher recall, and its mean at 0, 0.1 .. 1.

        p(r) = max precision[i] over recall[i] >= r;   area = integral of p(r) over 0 .. 1
        points = 1/11 sum p(k/10), k = 0 .. 10

    Args:
      recall: f64[n] in 0 .. 1, non-decreasing.
      precision: f64[n] in 0 .. 1, of the first 1 .. n detections.

    Returns:
      Area (VOC since 2010) and 11-point mean (VOC 2007), fractions; both 0 without detections.

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
    truth: Mapping[int, Truth],
    detections: Mapping[int, Detections],
    num_classes: int,
    *,
    iou_threshold: float = 0.5,
) -> dict[str, float]:
    """VOC's metrics of detections: means over the classes of `average_precision`.

    In descending order of score, each detection of a class is compared with the object of the class with the largest
    IoU in its image: below the threshold it is a false positive, with a difficult object it does not count, with a new
    object it is a true positive, and with an object that is already detected a false positive. Difficult objects are
    not required.

    Args:
      truth: image id -> objects, see `kdjax.evals.matching.truth_by_image`; `crowd` marks the difficult ones.
      detections: image id -> detections, for each image of `truth`.
      num_classes: K.
      iou_threshold: minimum IoU of a true positive.

    Returns:
      {"AP50": area, "AP50_11point": 11-point mean}, fractions ("50" stands for the threshold); -1 if no class has an
      object.

    Scope: the whole data set; classes without objects are left out.

    Peers: the devkit's VOCevaldet.m. Its boxes include their last pixel; `kdjax.data` reads them as x1-1 y1-1 x2 y2, so
    that plain areas are the devkit's.

    Example:
      >>> truth = {1: Truth(np.array([[0, 0, 40, 40.0]]), np.array([0]), np.array([False]))}
      >>> voc_metrics(truth, {1: Detections(truth[1].boxes, np.array([0.9]), np.array([0]))}, 1)
      {'AP50': 1.0, 'AP50_11point': 1.0}
    """
    averages = []
    for label in range(num_classes):
        objects = {
            k: (one.boxes[rows], one.crowd[rows]) for k, one in truth.items() if (rows := one.labels == label).any()
        }
        required = sum(int((~difficult).sum()) for _, difficult in objects.values())
        if required:
            true = _true(objects, {k: one[one.labels == label] for k, one in detections.items()}, iou_threshold)
            count = np.cumsum(true)
            averages.append(average_precision(count / required, count / np.arange(1, len(true) + 1)))
    area, points = np.mean(averages, axis=0).tolist() if averages else (-1.0, -1.0)
    name = f"AP{round(100 * iou_threshold)}"
    return {name: area, f"{name}_11point": points}


def _true(
    objects: Mapping[int, tuple[np.ndarray, np.ndarray]], detections: Mapping[int, Detections], iou_threshold: float
) -> np.ndarray:
    """True positives of a class: f64[n] of 0 and 1, best score first, without detections that do not count."""
    taken = {image_id: np.zeros(len(boxes), bool) for image_id, (boxes, _) in objects.items()}
    rows = [
        (image_id, box, score)
        for image_id, one in detections.items()
        for box, score in zip(one.boxes, one.scores, strict=True)
    ]
    result = []
    for i in np.argsort([-score for *_, score in rows], kind="stable"):
        image_id, box, _ = rows[i]
        true = False
        if image_id in objects:
            boxes, difficult = objects[image_id]
            iou = box_iou(box[None], boxes)[0]
            best = int(np.argmax(iou))
            if iou[best] >= iou_threshold:
                if difficult[best]:
                    continue
                true = not taken[image_id][best]
                taken[image_id][best] = True
        result.append(true)
    return np.array(result, np.float64)
