"""Kinds of error, thresholds and confusion against cases whose truth is known by hand, and against COCO's own AP."""

import numpy as np
import pytest

from kdjax.evals import coco, tide

SQUARE = [0, 0, 40, 40]


def case(objects, found, *, classes: int = 2):
    """One image: objects (category, bbox[, crowd]) and detections (category, bbox, score)."""
    truth = {
        "images": [{"id": 7}],
        "categories": [{"id": 10 * k, "name": f"c{k}"} for k in range(1, classes + 1)],
        "annotations": [
            {"image_id": 7, "category_id": k, "bbox": box, "iscrowd": int(bool(crowd))} for k, box, *crowd in objects
        ],
    }
    return truth, [{"image_id": 7, "category_id": k, "bbox": box, "score": score} for k, box, score in found]


def kinds(objects, found) -> list[str]:
    seen = tide.outcomes(*case(objects, found))
    return ["hit" if kind == tide.HIT else tide.KINDS[kind] for kind in seen.kinds]


FAR = [200, 200, 20, 20]
QUARTER = [0, 0, 20, 20]  # IoU 0.25 with SQUARE


@pytest.mark.parametrize(
    ("objects", "found", "expected"),
    [
        ([(10, SQUARE)], [(10, SQUARE, 0.9)], ["hit"]),
        ([(10, SQUARE)], [(20, SQUARE, 0.9)], ["classification"]),
        ([(10, SQUARE)], [(10, QUARTER, 0.9)], ["localization"]),
        ([(10, SQUARE)], [(20, QUARTER, 0.9)], ["both"]),
        ([(10, SQUARE)], [(10, FAR, 0.9)], ["background"]),
        ([(10, SQUARE)], [(10, SQUARE, 0.9), (10, [0, 0, 40, 39], 0.8)], ["hit", "duplicate"]),
        # The better score takes the object even if the other fits better.
        ([(10, SQUARE)], [(10, SQUARE, 0.8), (10, [0, 0, 40, 39], 0.9)], ["hit", "duplicate"]),
        # An object of its own class nearby counts before one of another class under it.
        ([(10, SQUARE), (20, QUARTER)], [(10, QUARTER, 0.9)], ["localization"]),
        ([(10, SQUARE, True)], [(10, QUARTER, 0.9), (20, QUARTER, 0.8)], ["background"]),
        ([], [(10, SQUARE, 0.9)], ["background"]),
    ],
)
def test_kinds(objects, found, expected):
    assert kinds(objects, found) == expected


def test_what_lies_in_a_crowd_does_not_count():
    objects = [(10, SQUARE, True), (10, [0, 0, 20, 20]), (20, FAR)]
    found = [(10, QUARTER, 0.9), (10, [20, 20, 20, 20], 0.8), (20, [20, 20, 20, 20], 0.7), (10, FAR, 0.6)]
    truth, rows = case(objects, found)
    assert tide.counted(truth, rows) == [rows[0], rows[2], rows[3]]


def test_counts_and_what_is_missed():
    objects = [(10, SQUARE), (10, FAR), (20, [300, 0, 40, 40]), (20, [0, 300, 40, 40])]
    found = [(10, SQUARE, 0.9), (10, [300, 0, 40, 40], 0.8), (10, FAR, 0.1), (10, [500, 500, 9, 9], 0.7)]
    seen = tide.outcomes(*case(objects, found))
    # The third object is taken for another class, so only the fourth is missed.
    assert {k: n for k, n in tide.counts(seen).items() if n} == {"classification": 1, "background": 1, "missed": 1}


def test_losses_by_hand():
    """Class 10: a hit at .9 and a double at .95 of another object's; class 20: nothing found, and one place error."""
    objects = [(10, SQUARE), (20, FAR)]
    found = [(10, [500, 500, 9, 9], 0.95), (10, SQUARE, 0.9), (20, [200, 200, 10, 10], 0.5)]
    lost = tide.losses(tide.outcomes(*case(objects, found)))
    assert lost["AP50"] == pytest.approx(0.25)  # class 10: precision 1/2 at all recalls; class 20: 0
    assert lost["background"] == pytest.approx(0.25)  # class 10 becomes 1
    assert lost["localization"] == pytest.approx(0.5)  # class 20 becomes 1
    assert lost["classification"] == lost["duplicate"] == lost["missed"] == lost["both"] == 0


def test_only_one_error_mends_an_object():
    objects = [(10, SQUARE)]
    found = [(10, QUARTER, 0.9), (10, [0, 0, 20, 30], 0.8)]
    lost = tide.losses(tide.outcomes(*case(objects, found)))
    assert lost["AP50"] == 0 and lost["localization"] == 1
    seen = tide.outcomes(*case([(10, SQUARE)], [(10, SQUARE, 0.5), *found]))
    # The object is found already: mending the places only takes the two false ones away.
    assert tide.losses(seen)["localization"] == pytest.approx(1 - tide.losses(seen)["AP50"])


def test_confusion_by_hand():
    objects = [(10, SQUARE), (20, FAR), (20, [300, 0, 40, 40]), (10, [0, 300, 50, 50], True)]
    found = [(10, SQUARE, 0.9), (10, FAR, 0.8), (20, [500, 500, 9, 9], 0.7), (10, [0, 300, 20, 20], 0.6)]
    matrix = tide.confusion(*case(objects, found))
    assert matrix.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]


def test_confusion_pairs_the_own_class_first():
    objects = [(10, SQUARE), (20, [0, 0, 40, 38])]
    found = [(20, SQUARE, 0.9), (10, SQUARE, 0.8)]
    assert tide.confusion(*case(objects, found)).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_best_thresholds():
    boxes = [[50 * i, 0, 40, 40] for i in range(4)]
    found = [(10, boxes[0], 0.9), (10, boxes[1], 0.6), (10, [0, 400, 9, 9], 0.5), (10, boxes[2], 0.4)]
    found += [(10, [0, 400 + 20 * i, 9, 9], 0.3) for i in range(6)] + [(10, boxes[3], 0.2), (20, boxes[0], 0.9)]
    truth, rows = case([(10, box) for box in boxes], found)
    best = tide.best_thresholds(tide.outcomes(truth, rows))
    # Three of four found by the first four: F1 = 2 * 3 / (4 + 4).
    assert best == [pytest.approx({"score": 0.4, "precision": 0.75, "recall": 0.75, "F1": 0.75}), None]
    # Of class 20 nothing is found: it takes the best of both together, 0.4 as well.
    assert [row["score"] for row in tide.keep(truth, rows, best)] == [0.9, 0.6, 0.5, 0.4, 0.9]


def test_classes_that_are_swapped_throughout_are_seen():
    truth, rows = case([(10, SQUARE), (20, FAR)], [(20, SQUARE, 0.9), (10, FAR, 0.9), (10, [500, 500, 9, 9], 0.2)])
    kept = tide.keep(truth, rows, tide.best_thresholds(tide.outcomes(truth, rows)))
    assert tide.confusion(truth, kept).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert tide.counts(tide.outcomes(truth, kept))["classification"] == 2


def test_equal_scores_come_in_together():
    truth, rows = case([(10, SQUARE)], [(10, SQUARE, 0.5), (10, FAR, 0.5)])
    assert tide.best_thresholds(tide.outcomes(truth, rows))[0]["precision"] == 0.5


def random_case(seed: int):
    """Images with crowds, empty ones, doubles, wrong classes, moved boxes."""
    rng = np.random.default_rng(seed)
    truth = {
        "images": [{"id": i} for i in (5, 2, 9, 4, 1)],
        "categories": [{"id": k, "name": str(k)} for k in (3, 1, 8)],
    }
    truth["annotations"], found = [], []
    for image in truth["images"][:-1]:
        for _ in range(rng.integers(0, 12)):
            box = [*rng.uniform(0, 200, 2), *rng.uniform(10, 80, 2)]
            label = int(rng.choice([1, 3, 8]))
            row = {"image_id": image["id"], "category_id": label, "bbox": box}
            truth["annotations"].append(row | {"iscrowd": int(rng.random() < 0.1), "area": box[2] * box[3]})
            for _ in range(rng.integers(0, 4)):
                moved = (np.array(box) * rng.uniform(0.8, 1.2, 4)).tolist()
                other = int(rng.choice([1, 3, 8])) if rng.random() < 0.2 else label
                found.append(row | {"category_id": other, "bbox": moved, "score": float(rng.random())})
    return truth, found


@pytest.mark.parametrize("seed", range(8))
def test_ap50_is_cocos(seed):
    truth, found = random_case(seed)
    seen = tide.outcomes(truth, found)
    lost = tide.losses(seen)
    assert lost["AP50"] == pytest.approx(coco.coco_metrics(truth, found)["AP50"], abs=1e-12)
    assert all(lost[kind] >= -1e-12 for kind in tide.KINDS)
    matrix = tide.confusion(truth, found)
    assert matrix[:-1].sum() == sum(not row["iscrowd"] for row in truth["annotations"])


def test_nothing_at_all():
    seen = tide.outcomes(*case([], []))
    assert tide.losses(seen)["AP50"] == -1 and tide.best_thresholds(seen) == [None, None]
    assert tide.confusion(*case([], [])).sum() == 0
