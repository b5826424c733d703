"""Images with detections for tests of pages."""

import numpy as np

from kdjax.report import drawing
from kdjax.report.format import MODELS
from kdjax.structs import Detections


def examples(count=2, shape=(40, 60), models=MODELS, seed=0):
    draws = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        corner = draws.uniform(0, 20, (3, 2))
        boxes, labels = np.concatenate([corner, corner + 15], axis=1), draws.integers(0, 2, 3)
        image = draws.integers(0, 256, (*shape, 3), np.uint8)
        detections = Detections(boxes + 1, np.array([0.9, 0.5, 0.1]), labels)
        made.append(drawing.Example(image, boxes, labels, dict.fromkeys(models, detections)))
    return made
