"""Random predictions and targets for the losses of detectors."""

import numpy as np

ROWS, CLASSES = 16, 5


def some_predictions(seed: int):
    """Solid boxes and others that overlap them, and logits, labels (CLASSES is background) and qualities."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 50, (ROWS, 2))
    target = np.concatenate([start, start + rng.uniform(4, 40, (ROWS, 2))], 1)
    pred = target + rng.uniform(-1.9, 1.9, (ROWS, 4))
    logits = rng.normal(0, 3, (ROWS, CLASSES))
    labels = rng.integers(0, CLASSES + 1, ROWS)
    quality = rng.uniform(0, 1, ROWS)
    return (*tuple(x.astype(np.float32) for x in (pred, target, logits)), labels.astype(np.int32), np.float32(quality))
