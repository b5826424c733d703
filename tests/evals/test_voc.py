"""VOC's average precision on cases worked out by hand, and against a slow implementation of its rules."""

import numpy as np
import pytest

from kdjax.evals import voc
from kdjax.evals.matching import detections_by_image, truth_by_image
from kdjax.evals.voc import average_precision


def truth(*objects, categories=(1,), images=3):
    """Objects (image, category, bbox) or (image, category, bbox, difficult)."""
    rows = [dict(image_id=o[0], category_id=o[1], bbox=o[2], iscrowd=int(any(o[3:]))) for o in objects]
    return {
        "images": [{"id": i} for i in range(images)],
        "categories": [{"id": c, "name": str(c)} for c in categories],
        "annotations": rows,
    }


def voc_metrics(ground_truth, rows, **options):
    objects, detections = truth_by_image(ground_truth), detections_by_image(ground_truth, rows)
    return voc.voc_metrics(objects, detections, len(ground_truth["categories"]), **options)


def found(*rows):
    return [dict(image_id=r[0], category_id=r[1], bbox=r[2], score=r[3]) for r in rows]


A, B, FAR = [0, 0, 10, 10], [20, 0, 10, 10], [50, 50, 10, 10]


@pytest.mark.parametrize(
    ("recall", "precision", "area", "points"),
    [
        ([], [], 0, 0),
        ([1.0], [1.0], 1, 1),
        ([0.5], [1.0], 0.5, 6 / 11),  # recalls 0 .. 0.5
        ([0.0, 0.5], [0.0, 0.5], 0.25, 6 / 11 * 0.5),
        # Three of four objects with a false one before the third: 1 up to 0.5, 3/4 up to 0.75, then nothing.
        ([0.25, 0.5, 0.5, 0.75], [1, 1, 2 / 3, 3 / 4], 0.5 + 0.25 * 0.75, (6 + 2 * 0.75) / 11),
        ([0.1 + 0.2], [1.0], 0.3, 4 / 11),  # 0.30000000000000004 reaches 0.3
        ([3 * 0.1 - 1e-17], [1.0], 0.3, 4 / 11),
    ],
)
def test_average_precision_by_hand(recall, precision, area, points):
    assert average_precision(np.array(recall), np.array(precision)) == pytest.approx((area, points))


@pytest.mark.parametrize(
    ("objects", "detections", "area"),
    [
        ([(0, 1, A)], [], 0),
        ([(0, 1, A)], [(0, 1, A, 0.9)], 1),
        ([(0, 1, A)], [(1, 1, A, 0.9)], 0),  # another image
        ([(0, 1, A)], [(0, 1, FAR, 0.9), (0, 1, A, 0.8)], 0.5),
        ([(0, 1, A)], [(0, 1, A, 0.9), (0, 1, A, 0.8)], 1),  # the second is false, but behind full recall
        ([(0, 1, A), (0, 1, B)], [(0, 1, A, 0.9), (0, 1, A, 0.8), (0, 1, B, 0.7)], 0.5 + 0.5 * 2 / 3),
        (
            [(0, 1, A, True), (1, 1, A)],
            [(0, 1, A, 0.9), (0, 1, A, 0.8), (1, 1, A, 0.7)],
            1,
        ),  # difficult: does not count
        ([(0, 1, A)], [(0, 1, [0, 0, 10, 5], 0.9)], 1),  # an IoU of just the threshold
        ([(0, 1, A)], [(0, 1, [0, 0, 10, 4.9], 0.9)], 0),
        # The largest IoU decides, even if that object is taken and another would do.
        ([(0, 1, A), (0, 1, [0, 0, 10, 9])], [(0, 1, A, 0.9), (0, 1, A, 0.8)], 0.5),
    ],
)
def test_metrics_by_hand(objects, detections, area):
    assert voc_metrics(truth(*objects), found(*detections))["AP50"] == pytest.approx(area)


def test_mean_over_the_classes_that_have_objects():
    objects = truth((0, 1, A), (0, 2, B), (1, 3, A, True), categories=(1, 2, 3, 4))
    metrics = voc_metrics(objects, found((0, 1, A, 0.9), (0, 3, A, 0.9)))
    assert metrics == {"AP50": 0.5, "AP50_11point": 0.5}
    assert voc_metrics(truth((0, 1, A, True)), []) == {"AP50": -1, "AP50_11point": -1}
    assert list(voc_metrics(truth((0, 1, A)), [], iou_threshold=0.75)) == ["AP75", "AP75_11point"]


def test_metrics_equal_a_slow_implementation():
    rng = np.random.default_rng(0)

    def boxes(count):
        corner, side = rng.integers(0, 12, (count, 2)), rng.integers(4, 12, (count, 2))
        return np.concatenate([corner, side], 1).tolist()

    objects = [(int(rng.integers(3)), 1, box, bool(rng.random() < 0.2)) for box in boxes(14)]
    detections = [(int(rng.integers(3)), 1, box, score) for box, score in zip(boxes(40), rng.random(40), strict=True)]

    def overlap(a, b):
        cells = [{(x, y) for x in range(o[0], o[0] + o[2]) for y in range(o[1], o[1] + o[3])} for o in (a, b)]
        return len(cells[0] & cells[1]) / len(cells[0] | cells[1])

    taken, true, curve = set(), 0, []
    for image, _, box, _ in sorted(detections, key=lambda d: -d[3]):
        near = [(overlap(box, o[2]), -k) for k, o in enumerate(objects) if o[0] == image]
        best, k = max(near)
        if best >= 0.5 and objects[-k][3]:
            continue
        true += best >= 0.5 and k not in taken
        taken |= {k} if best >= 0.5 else set()
        curve.append((true / sum(not o[3] for o in objects), true / (len(curve) + 1)))
    steps = np.arange(100_000) / 100_000
    area = np.mean([max((p for r, p in curve if r > s), default=0) for s in steps[::50]])
    points = np.mean([max((p for r, p in curve if r >= k / 10 - 1e-12), default=0) for k in range(11)])
    metrics = voc_metrics(truth(*objects), found(*detections))
    assert 0.05 < area < 0.95
    assert metrics["AP50"] == pytest.approx(area, abs=1e-3)
    assert metrics["AP50_11point"] == pytest.approx(points)
