"""An assigner as a slow loop, for the tests of the boxes and of the detector that uses it."""

import math

import numpy as np

from kdjax.structs import Targets


def slow_sim_ota(probs, boxes, points, targets: Targets, row: int, topk=10):
    """YOLOX's assigner on one image in float64: matched box and IoU of every prior."""
    truth, labels = (np.asarray(x[row])[targets.valid[row]] for x in (targets.boxes, targets.labels))
    truth, probs = np.float64(truth), np.clip(np.float64(probs), 1e-9, 1 - 1e-9)
    padded_height, padded_width = targets.pad_size[row]
    matched, quality = np.full(len(points), -1), np.zeros(len(points))
    cost, overlap, candidates = {}, {}, []
    for n, (x, y, stride, _) in enumerate(points):
        in_box = [x1 < x < x2 and y1 < y < y2 for x1, y1, x2, y2 in truth]
        away = [max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) for x1, y1, x2, y2 in truth]
        central = [distance < 2.5 * stride for distance in away]
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
            cost[m, n] = entropy - 3 * math.log(v + 1e-7) + (0 if in_box[m] and central[m] else 1e5)
    takers = {}
    for m in range(len(truth) if candidates else 0):
        best = sorted((overlap[m, n] for n in candidates), reverse=True)[:topk]
        for n in sorted(candidates, key=lambda n, m=m: cost[m, n])[: max(int(sum(best)), 1)]:
            takers.setdefault(n, []).append(m)
    for n, boxes_of in takers.items():
        m = boxes_of[0] if len(boxes_of) == 1 else min(range(len(truth)), key=lambda m, n=n: cost[m, n])
        matched[n], quality[n] = m, overlap[m, n]
    return matched, quality
