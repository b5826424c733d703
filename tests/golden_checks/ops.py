"""`ops/*`: priors, assigners, coders, overlaps, suppression."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from kdjax.boxes import assign, coding, convert, iou, nms, priors
from kdjax.structs import Targets
from tests.golden_checks.api import (
    LATER_DENSE,
    NOT_PART,
    Check,
    Checks,
    UnknownCase,
    each_case,
    mismatches,
    relative_error,
)

Arrays = Mapping[str, np.ndarray]
VALUE = 1e-5
NEAR_THRESHOLD = 1e-4
FAR = 10**6  # a picture so large that it cuts nothing

dynamic_soft_label = jax.jit(assign.dynamic_soft_label, static_argnames="topk")
suppress = jax.jit(nms.suppress, static_argnames="max_detections")
select = jax.jit(nms.select, static_argnames=("level_sizes", "pre_nms", "max_detections"))


def only_known(params: Mapping[str, Any], *known: str) -> None:
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise UnknownCase(f"unknown parameters {', '.join(unknown)}")


def clipped(boxes, params: Mapping[str, Any]):
    """The peers' coders clip if a size is given and `clip_border` is not switched off."""
    if params.get("max_shape") is None or not params.get("clip_border", True):
        return boxes
    return convert.clip(boxes, np.array(params["max_shape"]))


def anchors(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    if what.startswith("AnchorGenerator"):
        yield Check("anchor generator", skip=LATER_DENSE)
    elif what.startswith("MlvlPointGenerator"):
        only_known(params, "strides", "offset", "sizes_hw", "pad_shape")
        for level, (stride, (rows, columns)) in enumerate(zip(params["strides"], params["sizes_hw"], strict=True)):
            points = priors.grid_priors((rows * stride, columns * stride), [stride], offset=params["offset"])
            valid = assign.inside_padding(points, np.array([params["pad_shape"]]))[0]
            yield Check(f"points of level {level}", relative_error(points, arrays[f"points{level}"]), VALUE)
            yield Check(f"valid flags of level {level}", mismatches(valid, arrays[f"valid{level}"]), 0)
    else:
        raise UnknownCase(f"no check for {what!r}")


def coders(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    if what.startswith("DeltaXYWH"):
        yield Check(what, skip=LATER_DENSE)
    elif what.startswith("DistancePoint decode"):
        only_known(params, "max_shape", "clip_border")
        boxes = clipped(coding.distance_to_boxes(arrays["points"], arrays["distances"]), params)
        yield Check("distance-point decode", relative_error(boxes, arrays["boxes"]), VALUE)
    elif what.startswith("DistancePoint encode"):
        only_known(params, "max_dis", "eps", "clip_border")
        got = coding.boxes_to_distance(
            arrays["points"], arrays["gt"], max_distance=params["max_dis"], eps=params.get("eps", 0.1)
        )
        yield Check("distance-point encode", relative_error(got, arrays["distances"]), VALUE)
    elif what.startswith("pairwise"):
        only_known(params, "mode", "eps")
        got = iou.pairwise(arrays["a"], arrays["b"], **params)
        yield Check(f"pairwise {params['mode']}", relative_error(got, arrays["out"]), VALUE)
    else:
        raise UnknownCase(f"no check for {what!r}")


def padded_targets(arrays: Arrays, places: int = 8) -> Targets:
    """One picture's ground truth with rows of padding behind it, as kdjax's batches have."""
    count = len(arrays["gt_bboxes"])
    places = math.ceil((count + 1) / places) * places
    boxes, labels = np.zeros((1, places, 4), np.float32), np.zeros((1, places), np.int32)
    boxes[0, :count], labels[0, :count] = arrays["gt_bboxes"], arrays["gt_labels"]
    size = np.array([[FAR, FAR]])
    return Targets(boxes, labels, np.arange(places)[None] < count, image_size=size, pad_size=size)


def assigners(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    name = what.split(";")[0]
    if name.startswith("TaskAligned"):
        yield Check(name, skip=NOT_PART)
    elif name in ("SimOTAAssigner", "MaxIoUAssigner", "ATSSAssigner"):
        yield Check(name, skip=LATER_DENSE)
    elif name.startswith("DynamicSoftLabel"):
        only_known(params, "topk", "iou_weight", "soft_center_radius")
        got = dynamic_soft_label(
            arrays["scores"][None],
            arrays["bboxes"][None],
            arrays["priors"],
            padded_targets(arrays),
            topk=params["topk"],
            iou_weight=params["iou_weight"],
            radius=params["soft_center_radius"],
        )
        # The reference counts boxes from 1, writes -1 as the label of background and -1e8 as its overlap.
        positive, labels = np.asarray(got.positive[0]), np.asarray(got.labels[0])
        yield Check(f"{name} boxes", mismatches(np.asarray(got.matched[0]) + 1, arrays["gt_inds"]), 0)
        yield Check(f"{name} labels", mismatches(np.where(positive, labels, -1), arrays["labels"]), 0)
        overlaps = np.where(arrays["gt_inds"] > 0, arrays["max_overlaps"], 0)
        yield Check(f"{name} overlaps", relative_error(got.quality[0], overlaps), VALUE)
    else:
        raise UnknownCase(f"no check for {what!r}")


def suppression(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    boxes, scores = arrays["boxes"], arrays["scores"]
    if what.startswith("multiclass_nms"):
        only_known(params, "score_thr", "iou_threshold", "max_per_img")
        got = select(
            boxes[None],
            scores[None, :, :-1],
            level_sizes=(len(boxes),),
            image_size=None,
            score_threshold=params["score_thr"],
            iou_threshold=params["iou_threshold"],
            pre_nms=scores.size,
            max_detections=params["max_per_img"],
        )
        valid = np.asarray(got.valid[0])
        dets = np.concatenate([got.boxes[0], got.scores[0][:, None]], axis=1)[valid]
        yield Check("multiclass nms boxes and scores", relative_error(dets, arrays["dets"]), VALUE)
        yield Check("multiclass nms labels", mismatches(got.labels[0][valid], arrays["labels"]), 0)
    elif what in ("batched (class-wise) nms", "class-agnostic nms"):
        only_known(params, "iou_threshold")
        labels = None if what.startswith("class-agnostic") else arrays["labels"][None]
        index, valid = suppress(
            boxes[None],
            scores[None],
            labels,
            iou_threshold=params["iou_threshold"],
            max_detections=len(boxes),
        )
        keep = set(np.asarray(index[0])[np.asarray(valid[0])].tolist())
        # Equal scores leave the order open, and an overlap at the threshold leaves open what goes.
        overlaps = np.asarray(iou.pairwise(boxes, boxes))
        open_cases = np.any(np.abs(overlaps - params["iou_threshold"]) < NEAR_THRESHOLD, axis=1)
        wrong = [i for i in keep ^ set(arrays["keep"].tolist()) if not open_cases[i]]
        yield Check(f"{what} indices", len(wrong), 0)
    else:
        raise UnknownCase(f"no check for {what!r}")


CHECKS = [
    ("ops/anchors_*.npz", lambda path: each_case(path, anchors)),
    ("ops/coders_*.npz", lambda path: each_case(path, coders)),
    ("ops/assigners_*.npz", lambda path: each_case(path, assigners)),
    ("ops/nms_*.npz", lambda path: each_case(path, suppression)),
]
