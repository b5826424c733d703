"""COCO's metrics: equal to pycocotools on random data sets, and from a batch to results."""

import contextlib
import copy
import io

import numpy as np
import pytest
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kdjax.errors import UserError
from kdjax.evals import coco
from kdjax.evals.matching import detections_by_image, truth_by_image
from kdjax.inference.predict import in_originals
from kdjax.structs import Detections, PaddedDetections

SIDE = 200


def mask_of(box) -> dict:
    """An ellipse in a box, as COCO writes compressed masks."""
    x, y, w, h = box
    lines, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    inside = ((columns - x - w / 2) / (w / 2)) ** 2 + ((lines - y - h / 2) / (h / 2)) ** 2 <= 1
    rle = masks.encode(np.asfortranarray(inside.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def some_data(seed: int, *, images: int = 8, classes: int = 3, crowded: bool = False):
    """Objects of all sizes and detections near them: ties, crowds, empty images, (crowded) over 100 in an image."""
    rng = np.random.default_rng(seed)
    category_ids = sorted(rng.choice(np.arange(1, 20), classes, replace=False).tolist())
    truth = {
        "images": [{"id": 7 + 3 * i, "height": SIDE, "width": SIDE, "file_name": f"{i}.png"} for i in range(images)],
        "categories": [{"id": c, "name": f"class {c}"} for c in category_ids],
        "annotations": [],
    }
    detections = []
    for i, image in enumerate(truth["images"]):
        boxes = []
        for _ in range(rng.integers(1, 9) if i % 3 else 0):  # every third image is empty
            size = np.exp(rng.uniform(np.log(6), np.log(150), 2))
            start = rng.uniform(0, SIDE - size)
            boxes.append([*start.round(2).tolist(), *size.round(2).tolist()])
            segmentation = mask_of(boxes[-1])
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": int(rng.choice(category_ids[:-1] or category_ids)),  # the last has no object
                    "bbox": boxes[-1],
                    "area": float(masks.area(segmentation)),
                    "iscrowd": int(rng.random() < 0.15),
                    "segmentation": segmentation,
                }
            )
        for _ in range(150 if crowded and i == 1 else rng.integers(0, 20)):
            if boxes and rng.random() < 0.8:
                x, y, w, h = boxes[rng.integers(len(boxes))] + rng.normal(0, 4, 4)
            else:
                x, y, w, h = rng.uniform(0, SIDE / 2, 4)
            box = [float(x), float(y), max(float(w), 1.0), max(float(h), 1.0)]
            detections.append(
                {
                    "image_id": image["id"],
                    "category_id": int(rng.choice(category_ids)),
                    "bbox": box,
                    "score": float(np.round(rng.random(), 1)),
                    "segmentation": mask_of(box),
                }
            )
    return truth, detections


def by_pycocotools(truth, detections, iou_type: str, use_categories: bool = True):
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = copy.deepcopy(truth)
        gt.createIndex()
        evaluation = COCOeval(gt, gt.loadRes(copy.deepcopy(detections)), iou_type)
        evaluation.params.useCats = int(use_categories)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def without(rows, key: str) -> list[dict]:
    return [{name: value for name, value in row.items() if name != key} for row in rows]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_equals_pycocotools(seed, iou_type):
    truth, detections = some_data(seed, crowded=seed % 2 == 1, classes=1 + seed % 4)
    detections = without(detections, "segmentation" if iou_type == "bbox" else "bbox")
    before = copy.deepcopy((truth, detections))
    for use_categories in (True, False):
        want = by_pycocotools(truth, detections, iou_type, use_categories)
        got = coco.curves(truth, detections, iou_type=iou_type, use_categories=use_categories)
        np.testing.assert_allclose(list(coco.metrics(got).values()), want.stats, rtol=0, atol=1e-12)
        np.testing.assert_allclose(got.precision, want.eval["precision"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(got.recall, want.eval["recall"], rtol=0, atol=1e-12)
    assert (truth, detections) == before


def test_masks_with_boxes_count_the_area_of_the_box():
    truth, detections = some_data(11)
    want = by_pycocotools(truth, detections, "segm").stats
    got = coco.coco_metrics(truth, detections, iou_type="segm")
    np.testing.assert_allclose(list(got.values()), want, rtol=0, atol=1e-12)
    assert list(got) == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def test_masks_of_detections_count_their_own_area():
    """Rows of `results` hold box and mask; the metrics of masks do not depend on the box."""
    truth, rows = some_data(15)
    found = detections_by_image(truth, rows)
    want = by_pycocotools(truth, without(rows, "bbox"), "segm").stats
    np.testing.assert_allclose(list(coco.coco_metrics(truth, found, iou_type="segm").values()), want, atol=1e-12)
    assert {row["segmentation"]["counts"] for row in coco.results(found)} == {
        row["segmentation"]["counts"] for row in rows
    }
    assert coco.coco_metrics(truth, found) == coco.coco_metrics(truth, without(rows, "segmentation"))
    some = next(one for one in found.values() if len(one) > 3)
    for chosen in (some.scores > np.median(some.scores), np.array([2, 0]), slice(1, 3)):
        part = some[chosen]
        assert part.masks == tuple(some.masks[i] for i in np.arange(len(some))[chosen]) and len(part.masks) == len(part)


def test_objects_without_masks_are_crowd_regions_of_masks():
    truth, rows = some_data(17)
    found = detections_by_image(truth, rows)
    whole = coco.mask_metrics(truth, found)
    assert list(whole.values()) == list(coco.coco_metrics(truth, found, iou_type="segm").values())
    assert list(whole) == [f"mask_{name}" for name in coco.METRICS] == list(coco.MASK_METRICS)
    part = {**truth, "annotations": [dict(row) for row in truth["annotations"]]}
    for row in part["annotations"][::3]:
        del row["segmentation"]
    crowd = copy.deepcopy(truth)
    for row in crowd["annotations"][::3]:
        x, y, w, h = row["bbox"]
        row |= {"iscrowd": 1, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
    want = by_pycocotools(crowd, without(rows, "bbox"), "segm").stats
    np.testing.assert_allclose(list(coco.mask_metrics(part, found).values()), want, rtol=0, atol=1e-12)
    bare = {**truth, "annotations": without(truth["annotations"], "segmentation")}
    boxes = detections_by_image(truth, without(rows, "segmentation"))
    assert coco.mask_metrics(bare, found) == coco.mask_metrics(truth, boxes) == {}


def test_metrics_of_masks_need_all_masks():
    truth, rows = some_data(16)
    with pytest.raises(UserError, match=r"detection of image \d+ has no segmentation"):
        coco.coco_metrics(truth, without(rows, "segmentation"), iou_type="segm")
    bare = {**truth, "annotations": without(truth["annotations"], "segmentation")}
    with pytest.raises(UserError, match=r"annotation of image \d+ has no segmentation"):
        coco.coco_metrics(bare, without(rows, "bbox"), iou_type="segm")


def test_perfect_detections():
    truth, _ = some_data(12)
    solid = [{**row, "iscrowd": 0} for row in truth["annotations"]]
    found = [{key: row[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5} for row in solid]
    metrics = coco.coco_metrics({**truth, "annotations": solid}, found)
    assert metrics["AP"] == pytest.approx(1) and metrics["AR100"] == pytest.approx(1)
    classes = coco.class_metrics(coco.curves({**truth, "annotations": solid}, found))
    assert list(classes) == [category["name"] for category in truth["categories"]]
    assert list(classes.values())[-1] == -1 and next(iter(classes.values())) == pytest.approx(1)


def test_no_detections_no_objects_and_missing_fields():
    truth, detections = some_data(13)
    none = coco.coco_metrics(truth, [])
    assert none["AP"] == none["AR100"] == 0
    nothing = coco.coco_metrics({**truth, "annotations": []}, without(detections, "segmentation"))
    assert set(nothing.values()) == {-1.0}
    bare = [{key: row[key] for key in ("image_id", "category_id", "bbox")} for row in truth["annotations"]]
    full = [{**row, "id": i + 1, "iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3]} for i, row in enumerate(bare)]
    boxes = without(detections, "segmentation")
    want = by_pycocotools({**truth, "annotations": full}, boxes, "bbox").stats
    # Annotation ids that begin at 0 confuse pycocotools; here they are not read.
    for rows in (bare, [{**row, "id": i} for i, row in enumerate(full)]):
        got = coco.coco_metrics({**truth, "annotations": rows}, boxes)
        np.testing.assert_allclose(list(got.values()), want, rtol=0, atol=1e-12)


def test_unknown_image_or_category_is_named():
    truth, detections = some_data(14)
    with pytest.raises(ValueError, match="detection of image 5000"):
        coco.coco_metrics(truth, [{**detections[0], "image_id": 5000}])
    with pytest.raises(ValueError, match="detection of category 99"):
        coco.coco_metrics(truth, [{**detections[0], "category_id": 99}])
    with pytest.raises(ValueError, match="annotation of category 99"):
        coco.coco_metrics({**truth, "annotations": [{**truth["annotations"][0], "category_id": 99}]}, [])


def test_classes_of_one_name_stay_apart():
    box = {"image_id": 1, "bbox": [0, 0, 40, 40]}
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 4, "name": "cat"}],
        "annotations": [{**box, "category_id": 1}, {**box, "category_id": 4}],
    }
    got = coco.class_metrics(coco.curves(truth, [{**box, "category_id": 4, "score": 0.9}]))
    assert got == {"cat": 0.0, "cat (4)": pytest.approx(1)}


@pytest.mark.user_input(
    "COCO json", "image and category ids over 2^53, negative or 0", "read: the metrics are the same"
)
@pytest.mark.parametrize(
    "number",
    [lambda k: 2**53 + k, lambda k: 2**63 - 8 + k, lambda k: -(2**63) + k, lambda k: k - 2, lambda k: 2**60 * k],
    ids=["2^53", "2^63", "negative", "around 0", "wide"],
)
@pytest.mark.parametrize("kind", ["image", "category"])
def test_metrics_do_not_depend_on_how_ids_are_numbered(kind, number):
    rng = np.random.default_rng(0)
    rows = [
        {"image_id": int(i), "category_id": int(c), "bbox": [*map(float, rng.uniform(0, 60, 2)), 30.0, 40.0]}
        for i, c in zip(rng.integers(0, 4, 12), rng.integers(0, 3, 12), strict=True)
    ]
    truth = {
        "images": [{"id": i} for i in range(4)],
        "categories": [{"id": c, "name": str(c)} for c in range(3)],
        "annotations": rows,
    }
    shifted = [[x + 3, y, w, h] for x, y, w, h in (row["bbox"] for row in rows)]
    found = [
        row | {"bbox": box, "score": float(s)}
        for row, box, s in zip(rows, shifted, rng.random(12).round(1), strict=True)
    ]
    want = coco.coco_metrics(truth, found)
    assert 0.1 < want["AP"] < 1
    for entry in truth["images" if kind == "image" else "categories"]:
        entry["id"] = number(entry["id"])
    for row in (*truth["annotations"], *found):
        row[f"{kind}_id"] = number(row[f"{kind}_id"])
    assert coco.coco_metrics(truth, found) == want


def test_results_are_read_back():
    boxes = np.array([[1, 2, 5, 8], [0, 0, 3, 3]], np.float64)
    found = Detections(boxes, np.array([0.5, 0.25], np.float32), np.array([1, 0], np.int32), ("a", "b"), (3, 9))
    truth = {"images": [{"id": 7}, {"id": 8}], "categories": [{"id": 9, "name": "b"}, {"id": 3, "name": "a"}]}
    again = detections_by_image(truth, coco.results({7: found, 8: found[:0]}))
    for field in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(again[7], field), getattr(found, field))
    assert (again[7].class_names, again[7].category_ids, len(again[8])) == (("a", "b"), (3, 9), 0)


def test_collect_orders_classes_by_their_ids_and_leaves_out_padding():
    """The data has its classes in the order of their ids, the model in any: the analysis of errors compares labels."""
    boxes = np.array([[0, 0, 40, 40], [50, 0, 90, 40.0], [0, 50, 40, 90]])
    found = Detections(boxes, np.float32([0.9, 0.8, 0.7]), np.array([0, 1, 2]), ("c", "a", "b"), (9, 1, 4))
    truth = {
        "images": [{"id": 7}],
        "categories": [{"id": 1, "name": "a"}, {"id": 4, "name": "b"}, {"id": 9, "name": "c"}],
        "annotations": [
            {"image_id": 7, "category_id": k, "bbox": [x, y, 40, 40]} for k, x, y in ((9, 0, 0), (1, 50, 0), (4, 0, 50))
        ],
    }
    got = coco.collect([({"image_id": np.array([7, -1]), "real": np.array([True, False])}, [found, found[:0]])])
    assert list(got) == [7] and got[7].class_names == ("a", "b", "c") and got[7].category_ids == (1, 4, 9)
    np.testing.assert_array_equal(got[7].labels, truth_by_image(truth)[7].labels)
    assert coco.coco_metrics(truth, got) == coco.coco_metrics(truth, coco.to_coco(found, 7))
    assert coco.coco_metrics(truth, got)["AP"] == pytest.approx(1)


def test_results_undo_the_resize():
    rng = np.random.default_rng(0)
    batch = {
        "image_id": np.array([5, 6, 7]),
        "image_size": np.array([[20, 30], [60, 40], [10, 10]]),
        "original_size": np.array([[40, 60], [30, 20], [10, 10]]),
        "real": np.array([True, True, False]),
    }
    boxes = np.tile(np.array([2.0, 4, 12, 16], np.float32), (3, 2, 1))
    boxes[1, 1] = [-4, 0, 100, 62]
    found = PaddedDetections(
        boxes=boxes,
        scores=rng.random((3, 2)).astype(np.float32),
        labels=np.array([[0, 1], [1, 0], [0, 0]]),
        valid=np.array([[True, False], [True, True], [True, True]]),
    )
    got = coco.results(coco.collect([(batch, in_originals(batch, found, category_ids=(10, 20)))]))
    assert [(row["image_id"], row["category_id"]) for row in got] == [(5, 10), (6, 20), (6, 10)]
    assert [row["bbox"] for row in got] == [[4, 8, 20, 24], [1, 2, 5, 6], [0, 0, 20, 30]]
    assert [row["score"] for row in got] == [float(found.scores[0, 0]), *found.scores[1].tolist()]
