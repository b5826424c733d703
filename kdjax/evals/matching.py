"""Objects and detections by image, IoU of boxes and masks, and matching: nothing here needs an accelerator."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from faster_coco_eval.core import mask as rle

from kdjax.structs import Detections


class Truth(NamedTuple):
    """The objects of one image."""

    boxes: np.ndarray  # f64[m, 4], x1 y1 x2 y2 in pixels of the original image
    labels: np.ndarray  # i64[m], 0 .. K-1
    crowd: np.ndarray  # bool[m], COCO's `iscrowd`: a region of many objects
    masks: tuple[dict[str, Any], ...] | None = None  # m masks as in `Detections.masks`; None: boxes are compared


def truth_by_image(ground_truth: Mapping[str, Any], *, masks: bool = False) -> dict[int, Truth]:
    """Reads the objects of a COCO json.

    Args:
      ground_truth: COCO instances: `images`, `annotations` and `categories`; a missing `iscrowd` is 0. With `masks`,
        every image has its `height` and `width`.
      masks: whether to read the masks, by which objects and detections are then compared. An object without one is
        taken as a crowd region of its box.

    Returns:
      {image id: its objects} of all images, by ascending id. Label i is the category with the i-th smallest id.

    Example:
      >>> box = {"image_id": 1, "category_id": 3, "bbox": [0, 10, 40, 40]}
      >>> truth_by_image({"images": [{"id": 1}], "categories": [{"id": 3}], "annotations": [box]})[1].boxes
      array([[ 0., 10., 40., 50.]])
    """
    if masks:
        ground_truth = {**ground_truth, "annotations": list(map(with_mask, ground_truth["annotations"]))}
    found = masks_by_image(ground_truth) if masks else {}
    return {
        image_id: Truth(
            boxes, labels, np.array([bool(row.get("iscrowd", 0)) for row in rows], bool), found.get(image_id)
        )
        for image_id, rows, boxes, labels in _by_image(ground_truth, ground_truth["annotations"])
    }


def masks_by_image(ground_truth: Mapping[str, Any]) -> dict[int, tuple[Any, ...]]:
    """{image id: the masks of its objects as in `Detections.masks`, None for those without}, in the json's order.

    Args:
      ground_truth: COCO instances; every image has its `height` and `width`.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    return {
        image_id: tuple(row.get("segmentation") and _rle(row["segmentation"], *sizes[image_id]) for row in rows)
        for image_id, rows, *_ in _by_image(ground_truth, ground_truth["annotations"])
    }


def with_mask(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """An annotation of COCO; one without a mask as a crowd region of its box.

    Example:
      >>> with_mask({"bbox": [0, 1, 4, 4]})
      {'bbox': [0, 1, 4, 4], 'segmentation': [[0, 1, 4, 1, 4, 5, 0, 5]], 'iscrowd': 1}
    """
    if row.get("segmentation"):
        return row
    x, y, w, h = row["bbox"]
    return {**row, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]], "iscrowd": 1}


def _rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:  # noqa: ANN401 - any of COCO's forms
    """A mask of COCO, polygons or RLE, as compressed RLE."""
    if isinstance(segmentation, list):
        return rle.merge(cast(list[dict[str, Any]], rle.frPyObjects(segmentation, height, width)))
    counts = segmentation["counts"]
    if isinstance(counts, list):
        return cast(dict[str, Any], rle.frPyObjects(segmentation, height, width))
    return {**segmentation, "counts": counts.encode() if isinstance(counts, str) else counts}


def detections_by_image(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[int, Detections]:
    """Reads COCO results, the inverse of `kdjax.evals.coco.results`.

    Args:
      ground_truth: COCO instances, of which `images` and `categories` are read.
      rows: COCO results with `bbox`; with `segmentation` (compressed RLE) in all of them or in none.

    Returns:
      {image id: its detections} of all images, by ascending id, with the labels of `truth_by_image`.

    Example:
      >>> row = {"image_id": 1, "category_id": 3, "bbox": [0, 10, 40, 40], "score": 0.5}
      >>> detections_by_image({"images": [{"id": 1}], "categories": [{"id": 3}]}, [row])[1].boxes
      array([[ 0., 10., 40., 50.]])
    """
    categories = {category["id"]: str(category.get("name", "")) for category in ground_truth["categories"]}
    ids = tuple(sorted(categories))
    names = tuple(categories[k] for k in ids)
    masked = any("segmentation" in row for row in rows)

    def masks(own: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...] | None:
        found = (row["segmentation"] for row in own)
        return tuple({**rle, "counts": rle["counts"].encode()} for rle in found) if masked else None

    return {
        image_id: Detections(boxes, np.array([row["score"] for row in own], np.float64), labels, names, ids, masks(own))
        for image_id, own, boxes, labels in _by_image(ground_truth, rows)
    }


def _by_image(
    ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[int, list[Mapping[str, Any]], np.ndarray, np.ndarray]]:
    """(image id, its rows, boxes x1 y1 x2 y2, labels) of each image, by ascending id."""
    label = {k: i for i, k in enumerate(sorted(category["id"] for category in ground_truth["categories"]))}
    groups: dict[int, list[Mapping[str, Any]]] = {
        k: [] for k in sorted(image["id"] for image in ground_truth["images"])
    }
    for row in rows:
        groups[row["image_id"]].append(row)
    for image_id, own in groups.items():
        boxes = np.array([row["bbox"] for row in own], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        yield image_id, own, boxes, np.array([label[row["category_id"]] for row in own], np.int64)


def box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of each box with each of the others.

    Args:
      boxes: f[m, 4], x1 y1 x2 y2.
      others: f[n, 4].

    Returns:
      f64[m, n] in 0 .. 1; 0 where both boxes are empty.

    Example:
      >>> box_iou(np.array([[0, 0, 10, 10]]), np.array([[0, 0, 10, 5], [20, 0, 30, 10]]))
      array([[0.5, 0. ]])
    """
    boxes, others = np.asarray(boxes, np.float64), np.asarray(others, np.float64)
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    size = np.clip(high - low, 0, None)
    shared = size[..., 0] * size[..., 1]
    area, other_area = (np.prod(np.clip(b[:, 2:] - b[:, :2], 0, None), axis=1) for b in (boxes, others))
    union = area[:, None] + other_area[None, :] - shared
    return np.where(union > 0, shared / np.where(union > 0, union, 1), 0.0)


def overlaps(truth: Truth, found: Detections) -> np.ndarray:
    """IoU of each detection with each object, f64[n, m]: of the masks if the truth has them, else of the boxes."""
    if truth.masks is None:
        return box_iou(found.boxes, truth.boxes)
    return _of_masks(found, truth.masks, crowd=False)


def covered(truth: Truth, found: Detections) -> np.ndarray:
    """The share of each detection's area that lies in each object, f64[n, m], of masks or boxes as in `overlaps`."""
    if truth.masks is not None:
        return _of_masks(found, truth.masks, crowd=True)
    boxes = np.asarray(found.boxes, np.float64)
    low = np.maximum(boxes[:, None, :2], truth.boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], truth.boxes[None, :, 2:])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return np.clip(high - low, 0, None).prod(-1) / np.maximum(area, 1e-12)[:, None]


def _of_masks(found: Detections, masks: tuple[dict[str, Any], ...], *, crowd: bool) -> np.ndarray:
    if not len(found) or not masks:
        return np.zeros((len(found), len(masks)))
    assert found.masks is not None, "masks are compared with detections that have masks"
    return np.asarray(rle.iou(list(found.masks), list(masks), [int(crowd)] * len(masks)), np.float64)


def match(
    truth_boxes: np.ndarray,
    truth_labels: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    *,
    iou_threshold: float = 0.5,
) -> tuple[np.ndarray, np.ndarray]:
    """Matches the detections of an image with its objects, as COCO's evaluation does.

    In descending order of score, each detection takes the free object of its class with the largest IoU of at least
    `iou_threshold`.

    Args:
      truth_boxes: f[m, 4], x1 y1 x2 y2 in pixels.
      truth_labels: i[m].
      boxes: f[n, 4], x1 y1 x2 y2 in pixels.
      labels: i[n].
      scores: f[n].
      iou_threshold: 0 .. 1.

    Returns:
      bool[n], which detections have a match, and bool[m], which objects have one; equally many are True.

    Example:
      >>> square = np.array([[0, 0, 10, 10]])
      >>> match(square, np.array([1]), square + 1, np.array([1]), np.array([0.9]))
      (array([ True]), array([ True]))
    """
    iou = box_iou(boxes, truth_boxes)
    return match_overlaps(iou, truth_labels, labels, scores, iou_threshold=iou_threshold)


def match_overlaps(
    iou: np.ndarray, truth_labels: np.ndarray, labels: np.ndarray, scores: np.ndarray, *, iou_threshold: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """`match` by the IoU f[n, m] of each detection with each object."""
    correct, detected = np.zeros(len(labels), bool), np.zeros(len(truth_labels), bool)
    if not correct.size or not detected.size:
        return correct, detected
    iou = np.where(labels[:, None] == truth_labels[None, :], iou, -1.0)
    for i in np.argsort(-scores, kind="stable"):
        free = np.where(detected, -1.0, iou[i])
        best = int(np.argmax(free))
        if free[best] >= iou_threshold:
            correct[i] = detected[best] = True
    return correct, detected
