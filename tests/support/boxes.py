"""Random boxes, predictions and truth; overlaps and SimOTA as slow loops."""

import math

import numpy as np

from kdjax.boxes import coding, priors
from kdjax.structs import Targets

HW, CLASSES, ROWS = (64, 96), 4, 6
GRID = priors.grid_priors(HW, (8, 16, 32))


def some_boxes(seed: int, count: int = 12, side: float = 100.0) -> np.ndarray:
    """Boxes with x1 <= x2 and y1 <= y2; some without area, some equal to the one before them."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, side, (count, 2, 2))
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    boxes[::5, 2] = boxes[::5, 0]
    boxes[3::4] = boxes[2::4][: len(boxes[3::4])]
    return boxes.astype(np.float32)


def area(box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def slow_iou(a, b, mode: str = "iou") -> float:
    """One overlap in float64."""
    a, b = np.float64(a), np.float64(b)
    overlap = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = area(a) + area(b) - overlap
    hull = [min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])]
    if mode == "iof":
        return overlap / max(area(a), 1e-6)
    if mode == "iou":
        return overlap / max(union, 1e-6)
    if mode == "giou":
        return overlap / max(union, 1e-6) - (area(hull) - max(union, 1e-6)) / max(area(hull), 1e-6)
    value = overlap / (union + 1e-6)
    centres = ((a[:2] + a[2:]) - (b[:2] + b[2:])) / 2
    diou = value - np.sum(centres**2) / ((hull[2] - hull[0]) ** 2 + (hull[3] - hull[1]) ** 2 + 1e-6)
    if mode == "diou":
        return diou
    angles = [np.arctan((x[2] - x[0]) / (x[3] - x[1] + 1e-6)) for x in (a, b)]
    v = 4 / np.pi**2 * (angles[0] - angles[1]) ** 2
    alpha = v / (1 - value + v) if value > 0.5 and v > 0 else 0
    return np.clip(diou - alpha * v, -1, 1)


def some_batch(seed: int, batch: int = 3):
    """Predictions near the truth and images of 0 .. ROWS boxes, among them tiny and equal ones."""
    rng = np.random.default_rng(seed)
    height, width = HW
    counts = rng.integers(0, ROWS + 1, batch)
    centres = rng.uniform(0, 1, (batch, ROWS, 2)) * [width, height]
    sizes = np.exp(rng.uniform(np.log(3), np.log(60), (batch, ROWS, 2)))
    boxes = np.clip(np.concatenate([centres - sizes / 2, centres + sizes / 2], -1), 0, [width, height] * 2)
    boxes[:, 2] = np.where(rng.random((batch, 1)) < 0.3, boxes[:, 1], boxes[:, 2])  # the same place twice
    valid = np.arange(ROWS) < counts[:, None]
    labels = rng.integers(0, CLASSES, (batch, ROWS))
    pad = np.stack([rng.integers(40, height + 1, batch), rng.integers(40, width + 1, batch)], -1)
    targets = Targets(
        boxes=np.where(valid[..., None], boxes, 0).astype(np.float32),
        labels=np.where(valid, labels, 0).astype(np.int32),
        valid=valid,
        image_size=pad.astype(np.int32),
        pad_size=pad.astype(np.int32),
    )
    logits = rng.normal(-1, 2, (batch, len(GRID), CLASSES)).astype(np.float32)
    distances = np.exp(rng.normal(2.5, 0.8, (batch, len(GRID), 4))).astype(np.float32)
    return logits, np.asarray(coding.distance_to_boxes(GRID[:, :2], distances)), targets


def slow_sim_ota(
    probs, boxes, points, targets: Targets, row: int, *, topk=10, radius=2.5, iou_weight=3.0, class_weight=1.0
):
    """YOLOX's assigner on one image in float64: matched box and IoU of every prior."""
    truth, labels = (np.asarray(x[row])[targets.valid[row]] for x in (targets.boxes, targets.labels))
    truth, probs = np.float64(truth), np.clip(np.float64(probs), 1e-9, 1 - 1e-9)
    padded_height, padded_width = targets.pad_size[row]
    matched, quality = np.full(len(points), -1), np.zeros(len(points))
    cost, overlap, candidates = {}, {}, []
    for n, (x, y, stride, _) in enumerate(points):
        in_box = [x1 < x < x2 and y1 < y < y2 for x1, y1, x2, y2 in truth]
        away = [max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) for x1, y1, x2, y2 in truth]
        central = [distance < radius * stride for distance in away]
        in_padding = x // stride * stride < padded_width and y // stride * stride < padded_height
        if not in_padding or not any(in_box + central):
            continue
        candidates.append(n)
        for m, (box, label) in enumerate(zip(truth, labels, strict=True)):
            a = np.float64(boxes[n])
            both = max(min(a[2], box[2]) - max(a[0], box[0]), 0) * max(min(a[3], box[3]) - max(a[1], box[1]), 0)
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (a, box)]
            v = overlap[m, n] = both / max(sum(areas) - both, 1e-6)
            entropy = -sum(math.log(p if k == label else 1 - p) for k, p in enumerate(probs[n]))
            cost[m, n] = (
                class_weight * entropy - iou_weight * math.log(v + 1e-7) + (0 if in_box[m] and central[m] else 1e5)
            )
    takers = {}
    for m in range(len(truth) if candidates else 0):
        best = sorted((overlap[m, n] for n in candidates), reverse=True)[:topk]
        for n in sorted(candidates, key=lambda n, m=m: cost[m, n])[: max(int(sum(best)), 1)]:
            takers.setdefault(n, []).append(m)
    for n, boxes_of in takers.items():
        m = boxes_of[0] if len(boxes_of) == 1 else min(range(len(truth)), key=lambda m, n=n: cost[m, n])
        matched[n], quality[n] = m, overlap[m, n]
    return matched, quality
