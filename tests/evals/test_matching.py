"""Matching of detections with objects."""

import numpy as np

from kdjax.evals.matching import match


def test_match_is_greedy_by_score_and_within_a_class():
    truth = np.array([[0, 0, 10, 10], [100, 0, 110, 10], [200, 0, 210, 10.0]])
    boxes = np.array([[0, 0, 10, 9], [0, 0, 10, 10], [100, 0, 110, 10], [200, 0, 210, 4], [5, 5, 5, 5.0]])
    scores = np.array([0.9, 0.8, 0.7, 0.9, 0.9])
    correct, detected = match(truth, np.array([0, 1, 0]), boxes, np.array([0, 0, 0, 0, 0]), scores)
    assert correct.tolist() == [True, False, False, False, False] and detected.tolist() == [True, False, False]
    for n, m in ((0, 2), (2, 0), (0, 0)):
        correct, detected = match(truth[:n], np.zeros(n), boxes[:m], np.zeros(m), scores[:m])
        assert (len(correct), len(detected), correct.any(), detected.any()) == (m, n, False, False)


def test_match_agrees_with_a_slow_loop():
    draws = np.random.default_rng(3)
    for _ in range(20):
        n, m = draws.integers(1, 8, 2)
        truth, boxes = (np.sort(draws.uniform(0, 9, (k, 2, 2)), axis=1).reshape(k, 4) for k in (n, m))
        labels, own, scores = draws.integers(0, 2, n), draws.integers(0, 2, m), draws.random(m)
        found = set()
        for i in sorted(range(m), key=lambda i: -scores[i]):
            best, choice = 0.3, None
            for j in set(range(n)) - found:
                low, high = np.maximum(boxes[i, :2], truth[j, :2]), np.minimum(boxes[i, 2:], truth[j, 2:])
                shared = np.prod(np.maximum(high - low, 0))
                union = sum(np.prod(b[2:] - b[:2]) for b in (boxes[i], truth[j])) - shared
                if own[i] == labels[j] and shared / union >= best:
                    best, choice = shared / union, j
            found |= {choice} - {None}
        assert set(np.flatnonzero(match(truth, labels, boxes, own, scores, iou_threshold=0.3)[1])) == found
