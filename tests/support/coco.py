"""COCO rows as arrays."""

import numpy as np

from kdjax.evals.matching import Truth, truth_by_image
from kdjax.structs import Detections


def by_image(ground_truth: dict, rows: list[dict]) -> tuple[dict[int, Truth], dict[int, Detections]]:
    """Objects and detections of each image, in float64, so that they equal the rows to the bit."""
    labels = {k: i for i, k in enumerate(sorted(category["id"] for category in ground_truth["categories"]))}
    truth = truth_by_image(ground_truth)
    detections = {}
    for image_id in truth:
        own = [row for row in rows if row["image_id"] == image_id]
        boxes = np.array([row["bbox"] for row in own], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        scores = np.array([row["score"] for row in own], np.float64)
        detections[image_id] = Detections(boxes, scores, np.array([labels[row["category_id"]] for row in own], int))
    return truth, detections
