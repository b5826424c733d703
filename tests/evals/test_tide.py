"""Error kinds, thresholds and confusion on cases worked out by hand, and AP50 against COCO's own."""

import numpy as np
import pytest

from kdjax.evals import coco, matching, tide
from kdjax.evals.matching import detections_by_image, truth_by_image
from kdjax.structs import Detections

SQUARE = [0, 0, 40, 40]


def by_image(ground_truth, rows):
    return truth_by_image(ground_truth), detections_by_image(ground_truth, rows)


def case(objects, found, *, classes: int = 2):
    """One image: objects (category, bbox[, crowd]) and detections (category, bbox, score)."""
    truth = {
        "images": [{"id": 7}],
        "categories": [{"id": 10 * k, "name": f"c{k}"} for k in range(1, classes + 1)],
        "annotations": [
            {"image_id": 7, "category_id": k, "bbox": box, "iscrowd": int(bool(crowd))} for k, box, *crowd in objects
        ],
    }
    return by_image(truth, [{"image_id": 7, "category_id": k, "bbox": box, "score": score} for k, box, score in found])


def kinds(objects, found) -> list[str]:
    result = tide.outcomes(*case(objects, found), 2)
    return ["correct" if kind == tide.CORRECT else tide.KINDS[kind] for kind in result.kinds]


FAR = [200, 200, 20, 20]
QUARTER = [0, 0, 20, 20]  # IoU 0.25 with SQUARE


@pytest.mark.parametrize(
    ("objects", "found", "expected"),
    [
        ([(10, SQUARE)], [(10, SQUARE, 0.9)], ["correct"]),
        ([(10, SQUARE)], [(20, SQUARE, 0.9)], ["classification"]),
        ([(10, SQUARE)], [(10, QUARTER, 0.9)], ["localization"]),
        ([(10, SQUARE)], [(20, QUARTER, 0.9)], ["both"]),
        ([(10, SQUARE)], [(10, FAR, 0.9)], ["background"]),
        ([(10, SQUARE)], [(10, SQUARE, 0.9), (10, [0, 0, 40, 39], 0.8)], ["correct", "duplicate"]),
        # The higher score takes the object even if the other has the larger IoU.
        ([(10, SQUARE)], [(10, SQUARE, 0.8), (10, [0, 0, 40, 39], 0.9)], ["correct", "duplicate"]),
        # An object of its own class comes before an overlapping one of another class.
        ([(10, SQUARE), (20, QUARTER)], [(10, QUARTER, 0.9)], ["localization"]),
        ([(10, SQUARE, True)], [(10, QUARTER, 0.9), (20, QUARTER, 0.8)], ["background"]),
        ([], [(10, SQUARE, 0.9)], ["background"]),
    ],
)
def test_kinds(objects, found, expected):
    assert kinds(objects, found) == expected


def test_detections_in_a_crowd_do_not_count():
    objects = [(10, SQUARE, True), (10, [0, 0, 20, 20]), (20, FAR)]
    found = [(10, QUARTER, 0.9), (10, [20, 20, 20, 20], 0.8), (20, [20, 20, 20, 20], 0.7), (10, FAR, 0.6)]
    truth, detections = case(objects, found)
    assert tide.without_crowd(truth, detections)[7].scores.tolist() == [0.9, 0.7, 0.6]


def test_error_counts():
    objects = [(10, SQUARE), (10, FAR), (20, [300, 0, 40, 40]), (20, [0, 300, 40, 40])]
    found = [(10, SQUARE, 0.9), (10, [300, 0, 40, 40], 0.8), (10, FAR, 0.1), (10, [500, 500, 9, 9], 0.7)]
    result = tide.outcomes(*case(objects, found), 2)
    # The third object has a classification error, so only the fourth is missed.
    assert {k: n for k, n in tide.error_counts(result).items() if n} == {
        "classification": 1,
        "background": 1,
        "missed": 1,
    }


def test_ap_cost_by_hand():
    """Class 10: a background error at 0.95, correct at 0.9; class 20: one localization error."""
    objects = [(10, SQUARE), (20, FAR)]
    found = [(10, [500, 500, 9, 9], 0.95), (10, SQUARE, 0.9), (20, [200, 200, 10, 10], 0.5)]
    cost = tide.ap_cost(tide.outcomes(*case(objects, found), 2))
    assert cost["AP50"] == pytest.approx(0.25)  # class 10: precision 1/2 at all recalls; class 20: 0
    assert cost["background"] == pytest.approx(0.25)  # class 10 becomes 1
    assert cost["localization"] == pytest.approx(0.5)  # class 20 becomes 1
    assert cost["classification"] == cost["duplicate"] == cost["missed"] == cost["both"] == 0


def test_an_object_is_corrected_once():
    objects = [(10, SQUARE)]
    found = [(10, QUARTER, 0.9), (10, [0, 0, 20, 30], 0.8)]
    cost = tide.ap_cost(tide.outcomes(*case(objects, found), 2))
    assert cost["AP50"] == 0 and cost["localization"] == 1
    cost = tide.ap_cost(tide.outcomes(*case([(10, SQUARE)], [(10, SQUARE, 0.5), *found]), 2))
    # The object is detected already: the two localization errors are only removed.
    assert cost["localization"] == pytest.approx(1 - cost["AP50"])


def test_confusion_by_hand():
    objects = [(10, SQUARE), (20, FAR), (20, [300, 0, 40, 40]), (10, [0, 300, 50, 50], True)]
    found = [(10, SQUARE, 0.9), (10, FAR, 0.8), (20, [500, 500, 9, 9], 0.7), (10, [0, 300, 20, 20], 0.6)]
    matrix = tide.confusion(*case(objects, found), 2)
    assert matrix.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]


def test_confusion_pairs_the_own_class_first():
    objects = [(10, SQUARE), (20, [0, 0, 40, 38])]
    found = [(20, SQUARE, 0.9), (10, SQUARE, 0.8)]
    assert tide.confusion(*case(objects, found), 2).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_best_thresholds():
    boxes = [[50 * i, 0, 40, 40] for i in range(4)]
    found = [(10, boxes[0], 0.9), (10, boxes[1], 0.6), (10, [0, 400, 9, 9], 0.5), (10, boxes[2], 0.4)]
    found += [(10, [0, 400 + 20 * i, 9, 9], 0.3) for i in range(6)] + [(10, boxes[3], 0.2), (20, boxes[0], 0.9)]
    truth, detections = case([(10, box) for box in boxes], found)
    best = tide.best_thresholds(tide.outcomes(truth, detections, 2))
    # Three of four objects by the first four: F1 = 2 * 3 / (4 + 4).
    assert best == [pytest.approx({"score": 0.4, "precision": 0.75, "recall": 0.75, "F1": 0.75}), None]
    # Class 20 has no correct detection: it takes the threshold of both classes together, 0.4 as well.
    assert tide.above_threshold(truth, detections, best)[7].scores.tolist() == [0.9, 0.6, 0.5, 0.4, 0.9]


def test_swapped_classes():
    truth, detections = case(
        [(10, SQUARE), (20, FAR)], [(20, SQUARE, 0.9), (10, FAR, 0.9), (10, [500, 500, 9, 9], 0.2)]
    )
    kept = tide.above_threshold(truth, detections, tide.best_thresholds(tide.outcomes(truth, detections, 2)))
    assert tide.confusion(truth, kept, 2).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert tide.error_counts(tide.outcomes(truth, kept, 2))["classification"] == 2


def test_a_threshold_does_not_separate_equal_scores():
    truth, detections = case([(10, SQUARE)], [(10, SQUARE, 0.5), (10, FAR, 0.5)])
    assert tide.best_thresholds(tide.outcomes(truth, detections, 2))[0]["precision"] == 0.5


def rectangle(box):
    """A box as a polygon."""
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def test_masks_decide_where_both_sides_have_them():
    """Equal boxes, of which one detection's mask is half of the object's, and one object without a mask."""
    triangle = [[0, 0, 40, 0, 0, 40]]
    truth = {
        "images": [{"id": 7, "height": 400, "width": 400}],
        "categories": [{"id": 10, "name": "c"}],
        "annotations": [
            {"image_id": 7, "category_id": 10, "bbox": SQUARE, "segmentation": rectangle(SQUARE)},
            {"image_id": 7, "category_id": 10, "bbox": FAR},
        ],
    }
    half = matching._rle([[0, 0, 40, 0, 40, 16, 0, 16]], 400, 400)
    whole = matching._rle(rectangle(SQUARE), 400, 400)
    far = matching._rle(rectangle(FAR), 400, 400)
    assert matching._rle(triangle, 400, 400)["size"] == [400, 400]
    boxes = np.array([[0, 0, 40, 40.0], [0, 0, 40, 40], [200, 200, 220, 220]])
    found = {7: Detections(boxes, np.array([0.9, 0.8, 0.7]), np.zeros(3, int), masks=(half, whole, far))}
    by_box = tide.outcomes(truth_by_image(truth), found, 1)
    assert [tide.KINDS[k] if k >= 0 else "correct" for k in by_box.kinds] == ["correct", "duplicate", "correct"]
    objects = truth_by_image(truth, masks=True)
    by_mask = tide.outcomes(objects, found, 1)  # the third lies in what is a crowd region without its mask
    assert [tide.KINDS[k] if k >= 0 else "correct" for k in by_mask.kinds] == ["localization", "correct"]
    assert tide.confusion(objects, found, 1).tolist() == [[1, 0], [1, 0]]
    assert matching.masks_by_image(truth)[7][1] is None
    np.testing.assert_allclose(matching.overlaps(objects[7], found[7])[:, 0], [0.4, 1, 0])
    for form in (half["counts"].decode(), [0, *(n for _ in range(39) for n in (16, 384)), 16, 400 * 361 - 16]):
        again = matching._rle({"size": [400, 400], "counts": form}, 400, 400)
        assert matching.rle.area(again) == 640


def random_case(seed: int):
    """Images with crowds, empty ones, duplicates, wrong classes, moved boxes."""
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
    cost = tide.ap_cost(tide.outcomes(*by_image(truth, found), 3))
    assert cost["AP50"] == pytest.approx(coco.coco_metrics(truth, found)["AP50"], abs=1e-12)
    assert all(cost[kind] >= -1e-12 for kind in tide.KINDS)
    matrix = tide.confusion(*by_image(truth, found), 3)
    assert matrix[:-1].sum() == sum(not row["iscrowd"] for row in truth["annotations"])


def test_no_objects_and_no_detections():
    result = tide.outcomes(*case([], []), 2)
    assert tide.ap_cost(result)["AP50"] == -1 and tide.best_thresholds(result) == [None, None]
    assert tide.confusion(*case([], []), 2).sum() == 0
