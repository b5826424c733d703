"""Detections to COCO's metrics."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from kdjax.errors import UserError
from kdjax.evals.matching import with_mask
from kdjax.structs import Detections

IouType = Literal["bbox", "segm"]
Found: TypeAlias = Mapping[int, Detections] | Sequence[Mapping[str, Any]]  # by image id, or COCO results
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MASK_METRICS = tuple(f"mask_{name}" for name in METRICS)  # the same of masks
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # T, of the IoU
AREAS = ("all", "small", "medium", "large")  # A, limits at 32^2 and 96^2 px^2
MAX_DETECTIONS = (1, 10, 100)  # D, an image and a class


class Curves(NamedTuple):
    """The arrays that COCO's metrics average; -1 where a class has no object (of that size)."""

    precision: np.ndarray  # f64[T, 101, K, A, D] at the recalls 0, 0.01 .. 1
    recall: np.ndarray  # f64[T, K, A, D]
    classes: tuple[str, ...]  # names of the K classes, by category id; one "all" if they are not told apart
    category_ids: tuple[int, ...]  # their ids; (-1,) if they are not told apart


def _check(ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], iou_type: IouType) -> None:
    categories = {category["id"] for category in ground_truth["categories"]}
    images = {image["id"] for image in ground_truth["images"]}
    for what, rows in (("annotation", ground_truth["annotations"]), ("detection", detections)):
        for row in rows:
            if row["image_id"] not in images:
                raise UserError(f"{what} of image {row['image_id']}, which the ground truth does not list")
            if row["category_id"] not in categories:
                raise UserError(f"{what} of category {row['category_id']}, which the ground truth does not list")
            if iou_type == "segm" and not row.get("segmentation"):
                raise UserError(f"{what} of image {row['image_id']} has no segmentation: metrics of masks need all")


def curves(
    ground_truth: Mapping[str, Any],
    detections: Found,
    *,
    iou_type: IouType = "bbox",
    use_categories: bool = True,
) -> Curves:
    """Match detections with the ground truth as COCO does; the metrics are means of what this returns.

    Args:
      ground_truth: COCO instances: `images`, `annotations`, `categories`. A missing `iscrowd` is 0, a missing `area`
        that of the box; ids of annotations are not read. For `segm` every annotation needs a `segmentation` (polygons
        or RLE of any form) and every image its `height` and `width`.
      detections: {image id: its detections, with `category_ids` and, for `segm`, `masks`}, as `collect` gives them; or
        COCO results: `image_id`, `category_id`, `score`, and `bbox` (x y w h in pixels of the image) or `segmentation`
        (compressed RLE). May be empty.
      iou_type: `bbox` or `segm`.
      use_categories: False: every detection may match every object.

    Returns:
      Curves.

    Scope: the whole data set.

    Peers: pycocotools' `COCOeval.eval`; also that COCO results with a `bbox` beside their mask count with the area of
    the box. `Detections` count with the area of the mask, as in mmdetection and detectron2.

    Raises:
      UserError: if an image or a category is not listed in the ground truth, or a mask is missing for `segm`.
    """
    rows = results(detections) if isinstance(detections, Mapping) else detections
    if iou_type == "segm" and isinstance(detections, Mapping):  # the area is that of the mask, not of the box
        rows = [{key: value for key, value in row.items() if key != "bbox"} for row in rows]
    _check(ground_truth, rows, iou_type)
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    # The evaluator rounds ids to doubles, and takes 0 for "unmatched": it gets ranks, which keep the order.
    of_image, of_category = (
        {identity: rank for rank, identity in enumerate(sorted(entry["id"] for entry in entries), start=1)}
        for entries in (ground_truth["images"], categories)
    )

    def renumbered(row: Mapping[str, Any]) -> dict[str, Any]:
        return {**row, "image_id": of_image[row["image_id"]], "category_id": of_category[row["category_id"]]}

    annotations = [
        {"iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3], **renumbered(row), "id": i}
        for i, row in enumerate(ground_truth["annotations"], start=1)
    ]
    truth = COCO(
        {
            "images": [{**image, "id": of_image[image["id"]]} for image in ground_truth["images"]],
            "annotations": annotations,
            "categories": [{**category, "id": of_category[category["id"]]} for category in categories],
        }
    )
    found = truth.loadRes([renumbered(row) for row in rows])
    evaluation = COCOeval_faster(truth, found, iouType=iou_type)
    evaluation.params.useCats = int(use_categories)
    evaluation.evaluate()
    evaluation.accumulate()
    names = [str(category.get("name", category["id"])) for category in categories] if use_categories else ["all"]
    ids = [category["id"] for category in categories] if use_categories else [-1]
    areas, limits = len(AREAS), len(MAX_DETECTIONS)
    shape = (len(THRESHOLDS), 101, len(ids), areas, limits)
    return Curves(
        precision=np.asarray(evaluation.eval["precision"], np.float64).reshape(shape),
        recall=np.asarray(evaluation.eval["recall"], np.float64).reshape(shape[:1] + shape[2:]),
        classes=tuple(names),
        category_ids=tuple(ids),
    )


def _mean(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else -1.0


def metrics(curves: Curves) -> dict[str, float]:
    """COCO's twelve metrics: means of precision or recall over IoU thresholds 0.50 .. 0.95, recalls and classes.

    Args:
      curves: from `curves`.

    Returns:
      {name: fraction}, in the order AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl; -1 where there is
      no object (of that size).

    Scope: the whole data set; classes without objects are left out.

    Peers: pycocotools' `COCOeval.stats`.
    """
    precision, recall = curves.precision[..., -1], curves.recall
    half, three_quarters = (int(np.argmin(np.abs(THRESHOLDS - t))) for t in (0.5, 0.75))
    values = [_mean(precision[..., 0]), _mean(precision[half, ..., 0]), _mean(precision[three_quarters, ..., 0])]
    values += [_mean(precision[..., area]) for area in range(1, len(AREAS))]
    values += [_mean(recall[:, :, 0, limit]) for limit in range(len(MAX_DETECTIONS))]
    values += [_mean(recall[:, :, area, -1]) for area in range(1, len(AREAS))]
    return dict(zip(METRICS, values, strict=True))


def class_metrics(curves: Curves, *, threshold: float | None = None) -> dict[str, float]:
    """Average precision of each class.

    Args:
      curves: from `curves`.
      threshold: one of the IoU thresholds 0.50, 0.55 .. 0.95; None: the mean over them.

    Returns:
      {class: fraction}, -1 for a class without objects. If classes share a name, all but the first have their id
      after it.

    Scope: the whole data set.
    """
    rows = slice(None) if threshold is None else int(np.argmin(np.abs(THRESHOLDS - threshold)))
    seen, result = Counter(), {}
    for k, (name, identity) in enumerate(zip(curves.classes, curves.category_ids, strict=True)):
        seen[name] += 1
        result[name if seen[name] == 1 else f"{name} ({identity})"] = _mean(curves.precision[rows, :, k, 0, -1])
    return result


def coco_metrics(
    ground_truth: Mapping[str, Any],
    detections: Found,
    *,
    iou_type: IouType = "bbox",
    use_categories: bool = True,
) -> dict[str, float]:
    """COCO's twelve metrics of detections: `metrics(curves(...))`.

    Args:
      ground_truth: COCO instances, see `curves`.
      detections: by image id, or COCO results, see `curves`.
      iou_type: `bbox` or `segm`.
      use_categories: False: every detection may match every object.

    Returns:
      {AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl: fraction}, -1 where undefined.

    Scope: the whole data set.

    Peers: pycocotools' `COCOeval.stats`.

    Raises:
      UserError: if an image or a category is not listed in the ground truth, or a mask is missing for `segm`.

    Example:
      >>> box = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 40, 40]}
      >>> truth = {"images": [{"id": 1}], "categories": [{"id": 3, "name": "cat"}], "annotations": [box]}
      >>> result = coco_metrics(truth, [{**box, "score": 0.9}])
      >>> round(result["AP"], 3), result["APs"]
      (1.0, -1.0)
    """
    return metrics(curves(ground_truth, detections, iou_type=iou_type, use_categories=use_categories))


def has_masks(ground_truth: Mapping[str, Any], detections: Mapping[int, Detections]) -> bool:
    """Whether both the data and the detector have masks."""
    known = any(row.get("segmentation") for row in ground_truth["annotations"])
    return known and any(found.masks is not None for found in detections.values())


def mask_metrics(ground_truth: Mapping[str, Any], detections: Mapping[int, Detections]) -> dict[str, float]:
    """COCO's twelve metrics of masks, where both the data and the detector have masks.

    An object without a mask is taken as a crowd region of its box: what is detected there counts neither for nor
    against the detector.

    Args:
      ground_truth: COCO instances, see `curves`; some objects may have no `segmentation`.
      detections: by image id, with `category_ids`.

    Returns:
      {mask_AP, mask_AP50, ..., mask_ARl: fraction}, -1 where undefined; {} if no object or no detection has a mask.

    Scope: the whole data set.
    """
    rows = ground_truth["annotations"]
    if not has_masks(ground_truth, detections):
        return {}
    truth = {**ground_truth, "annotations": list(map(with_mask, rows))}
    values = coco_metrics(truth, detections, iou_type="segm").values()
    return dict(zip(MASK_METRICS, values, strict=True))


def to_coco(detections: Detections, image_id: int) -> list[dict[str, Any]]:
    """The detections of one image as COCO results, the rows of a results json.

    Args:
      detections: with `category_ids`.
      image_id: the image's id in COCO's json.

    Returns:
      One row per detection: `image_id`, `category_id`, `bbox` (x y w h in pixels of the image), `score` and, of
      detections with masks, `segmentation` (compressed RLE, its `counts` as text, as json holds it).

    Example:
      >>> found = Detections(np.float32([[2, 4, 10, 12]]), np.float32([0.5]), np.array([1]), category_ids=(3, 9))
      >>> to_coco(found, 7)
      [{'image_id': 7, 'category_id': 9, 'bbox': [2.0, 4.0, 8.0, 8.0], 'score': 0.5}]
    """
    boxes = np.asarray(detections.boxes, np.float64)
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    columns = (boxes.tolist(), detections.scores.tolist(), detections.labels.tolist())
    rows: list[dict[str, Any]] = [
        {"image_id": int(image_id), "category_id": int(detections.category_ids[label]), "bbox": box, "score": score}
        for box, score, label in zip(*columns, strict=True)
    ]
    for row, mask in zip(rows, detections.masks or (), strict=detections.masks is not None):
        row["segmentation"] = {"size": list(mask["size"]), "counts": mask["counts"].decode()}
    return rows


def results(detections: Mapping[int, Detections]) -> list[dict[str, Any]]:
    """The detections of many images as COCO results: `to_coco` of each.

    Args:
      detections: {image id: its detections, with `category_ids`}.
    """
    return [row for image_id, found in detections.items() for row in to_coco(found, image_id)]


def collect(predictions: Iterable[tuple[Mapping[str, Any], Sequence[Detections]]]) -> dict[int, Detections]:
    """The detections of all images by image id, as metrics take them.

    Args:
      predictions: (batch, detections of its rows), as `kdjax.inference.predict.predict` gives them, with
        `category_ids`; read of a batch are `image_id` i64[B] and `real` bool[B].

    Returns:
      {image id: its detections}, in the order of the images. Label i is the category with the i-th smallest id, as in
      `kdjax.evals.matching.truth_by_image`, in whatever order the model has its classes.

    Example:
      >>> found = Detections(np.zeros((1, 4)), np.float32([0.5]), np.array([0]), ("dog", "cat"), (9, 3))
      >>> one = collect([({"image_id": [7], "real": [True]}, [found])])[7]
      >>> int(one.labels[0]), one.class_names
      (1, ('cat', 'dog'))
    """
    return {
        int(image_id): _by_category(found)
        for batch, detections in predictions
        for image_id, real, found in zip(batch["image_id"], batch["real"], detections, strict=True)
        if real
    }


def _by_category(found: Detections) -> Detections:
    """The same detections with the classes in the order of their category ids."""
    order = np.argsort(found.category_ids)
    return dataclasses.replace(
        found,
        labels=np.argsort(order)[found.labels].astype(found.labels.dtype),
        class_names=tuple(found.class_names[k] for k in order) if found.class_names else (),
        category_ids=tuple(found.category_ids[k] for k in order),
    )
