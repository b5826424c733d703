"""`ops/*`: priors, assigners, coders, overlaps, suppression; and the features of regions in the two-stage models."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax.boxes import assign, coding, convert, dynamic, iou, nms, priors, roi
from kdjax.structs import Assignment, Targets
from tests.golden_checks.api import (
    NOT_PART,
    Check,
    Checks,
    UnknownCase,
    each_case,
    load,
    mismatches,
    relative_error,
)

Arrays = Mapping[str, np.ndarray]
VALUE = 1e-5
NEAR_THRESHOLD = 1e-4
FAR = 10**6  # an image so large that it cuts nothing

dynamic_soft_label = jax.jit(dynamic.dynamic_soft_label, static_argnames="topk")
sim_ota = jax.jit(dynamic.sim_ota, static_argnames="topk")
max_iou = jax.jit(assign.max_iou, static_argnames=("num_classes", "match_low_quality", "ignore_iof"))
atss = jax.jit(assign.atss, static_argnames=("num_classes", "level_sizes", "topk"))
align = jax.jit(roi.roi_align, static_argnames=("strides", "size", "sampling_ratio"))
suppress = jax.jit(nms.greedy_nms, static_argnames="max_detections")
select = jax.jit(nms.select_detections, static_argnames=("level_sizes", "pre_nms", "max_detections"))


def only_known(params: Mapping[str, Any], *known: str) -> None:
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise UnknownCase(f"unknown parameters {', '.join(unknown)}")


def clipped(boxes, params: Mapping[str, Any]):
    """mmdetection's coders clip if they have a size and `clip_border` is not switched off."""
    if params.get("max_shape") is None or not params.get("clip_border", True):
        return boxes
    return convert.clip(boxes, np.array(params["max_shape"]))


def anchors(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    levels = list(zip(params["strides"], params["sizes_hw"], strict=True))
    if what.startswith("AnchorGenerator"):
        only_known(
            params, "strides", "ratios", "octave_base_scale", "scales_per_octave", "scales", "sizes_hw", "pad_shape"
        )
        scales = params.get("scales") or priors.octave_scales(params["octave_base_scale"], params["scales_per_octave"])
        for level, (stride, (rows, columns)) in enumerate(levels):
            hw = (rows * stride, columns * stride)
            got = priors.grid_anchors(hw, [stride], ratios=params["ratios"], scales=scales)
            cells = priors.grid_priors(hw, [stride]).repeat(len(got) // (rows * columns), axis=0)
            valid = assign.inside_padding(cells, np.array([params["pad_shape"]]))[0]
            yield Check(f"anchors of level {level}", relative_error(got, arrays[f"anchors{level}"]), VALUE)
            yield Check(f"valid flags of level {level}", mismatches(valid, arrays[f"valid{level}"]), 0)
            first = got[: len(arrays[f"base{level}"])]
            yield Check(f"base anchors of level {level}", relative_error(first, arrays[f"base{level}"]), VALUE)
    elif what.startswith("MlvlPointGenerator"):
        only_known(params, "strides", "offset", "sizes_hw", "pad_shape")
        for level, (stride, (rows, columns)) in enumerate(levels):
            points = priors.grid_priors((rows * stride, columns * stride), [stride], offset=params["offset"])
            valid = assign.inside_padding(points, np.array([params["pad_shape"]]))[0]
            yield Check(f"points of level {level}", relative_error(points, arrays[f"points{level}"]), VALUE)
            yield Check(f"valid flags of level {level}", mismatches(valid, arrays[f"valid{level}"]), 0)
    else:
        raise UnknownCase(f"no check for {what!r}")


def coders(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    if what.startswith("DeltaXYWH"):
        known = ("target_means", "target_stds", "clip_border", "max_shape", "add_ctr_clamp", "ctr_clamp")
        only_known(params, *known)
        # The case of several classes does not name its deviations: they are those of the RoI heads.
        settings = {
            "means": params.get("target_means", (0, 0, 0, 0)),
            "stds": params.get("target_stds", (0.1, 0.1, 0.2, 0.2)),
        }
        if "encode" in what:
            got, key = coding.boxes_to_deltas(arrays["anchors"], arrays["gt"], **settings), "deltas"
        else:
            shift = params.get("ctr_clamp", 32) if params.get("add_ctr_clamp") else None
            # Several classes stand side by side: one set of four numbers each.
            deltas = arrays["deltas"].reshape(len(arrays["deltas"]), -1, 4)
            got = coding.deltas_to_boxes(arrays["anchors"][:, None], deltas, **settings, max_shift=shift)
            got, key = clipped(got.reshape(-1, 4), params).reshape(arrays["boxes"].shape), "boxes"
        yield Check(what, relative_error(got, arrays[key]), VALUE)
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
        got = iou.pairwise_iou(arrays["a"], arrays["b"], **params)
        yield Check(f"pairwise {params['mode']}", relative_error(got, arrays["out"]), VALUE)
    else:
        raise UnknownCase(f"no check for {what!r}")


def padded_targets(arrays: Arrays, places: int = 8) -> Targets:
    """One image's ground truth with rows of padding behind it, as kdjax's batches have."""
    count = len(arrays["gt_bboxes"])
    places = math.ceil((count + 1) / places) * places
    boxes, labels = np.zeros((1, places, 4), np.float32), np.zeros((1, places), np.int32)
    boxes[0, :count], labels[0, :count] = arrays["gt_bboxes"], arrays["gt_labels"]
    size = np.array([[FAR, FAR]])
    return Targets(boxes, labels, np.arange(places)[None] < count, image_size=size, pad_size=size)


def assigned(name: str, params: Mapping[str, Any], arrays: Arrays) -> Assignment:
    """What kdjax's assigner of that name decides."""
    targets = padded_targets(arrays)
    if name in ("MaxIoUAssigner", "ATSSAssigner"):
        classes = int(arrays["gt_labels"].max(initial=0)) + 1
        if name == "ATSSAssigner":
            only_known(params, "topk")
            sizes = tuple(arrays["num_level"].tolist())
            return atss(arrays["anchors"], targets, num_classes=classes, level_sizes=sizes, topk=params["topk"])
        known = ("pos_iou_thr", "neg_iou_thr", "min_pos_iou", "match_low_quality", "ignore_iof_thr")
        only_known(params, *known)
        ignored = arrays.get("ignore_bboxes", np.zeros((1, 4), np.float32))
        return max_iou(
            arrays["anchors"],
            targets,
            num_classes=classes,
            positive_iou=params["pos_iou_thr"],
            negative_iou=params["neg_iou_thr"],
            min_positive_iou=params.get("min_pos_iou", 0.0),
            match_low_quality=params.get("match_low_quality", True),
            ignored_boxes=ignored[None],
            ignore_iof=params["ignore_iof_thr"] if params.get("ignore_iof_thr", -1) > 0 else None,
        )
    scores = arrays["scores"]
    if name == "SimOTAAssigner" and (scores.min() < 0 or scores.max() > 1):
        scores = jax.nn.sigmoid(scores)  # the file says probabilities and holds their logits
    predictions = scores[None], arrays["bboxes"][None], arrays["priors"], targets
    if name == "DynamicSoftLabelAssigner":
        names = {"topk": "topk", "iou_weight": "iou_weight", "soft_center_radius": "radius"}
    elif name == "SimOTAAssigner":
        names = {"candidate_topk": "topk", "iou_weight": "iou_weight", "cls_weight": "class_weight"}
        names |= {"center_radius": "radius"}
    else:
        raise UnknownCase(f"no check for {name!r}")
    only_known(params, *names)
    settings = {ours: params[theirs] for theirs, ours in names.items() if theirs in params}
    return (sim_ota if name == "SimOTAAssigner" else dynamic_soft_label)(*predictions, **settings)


def assigners(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    name = what.split(";")[0]
    if name == "TaskAlignedAssigner":
        yield Check(name, skip=NOT_PART)
        return
    got = assigned(name, params, arrays)
    # The reference counts boxes from 1, 0 is background and -1 ignored; the label of both is -1.
    positive, labels = np.asarray(got.positive[0]), np.asarray(got.labels[0])
    index = np.where(got.ignore[0], -1, np.asarray(got.matched[0]) + 1)
    yield Check(f"{name} boxes", mismatches(index, arrays["gt_inds"]), 0)
    yield Check(f"{name} labels", mismatches(np.where(positive, labels, -1), arrays["labels"]), 0)
    if name in ("DynamicSoftLabelAssigner", "SimOTAAssigner"):  # they write -1e8 as the overlap of background
        overlaps = np.where(arrays["gt_inds"] > 0, arrays["max_overlaps"], 0)
        yield Check(f"{name} overlaps", relative_error(got.quality[0], overlaps), VALUE)


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
        overlaps = np.asarray(iou.pairwise_iou(boxes, boxes))
        open_cases = np.any(np.abs(overlaps - params["iou_threshold"]) < NEAR_THRESHOLD, axis=1)
        wrong = [i for i in keep ^ set(arrays["keep"].tolist()) if not open_cases[i]]
        yield Check(f"{what} indices", len(wrong), 0)
    else:
        raise UnknownCase(f"no check for {what!r}")


def region_features(path: Path) -> Checks:
    """What the RoI extractor of a two-stage model took out of its neck, and from where: a sample a map cell."""
    arrays, _ = load(path)
    image, boxes = arrays["eval/rois"][:, 0].astype(int), arrays["eval/rois"][:, 1:]
    level = roi.roi_levels(boxes, 4)
    yield Check("levels of regions", mismatches(level, arrays["eval/roi_levels"]), 0)
    want = np.moveaxis(arrays["eval/roi_feats_first8"], 1, -1)
    first = slice(len(want))
    maps = [np.moveaxis(arrays[f"eval/neck/{i}"], 1, -1)[image[first]] for i in range(4)]
    got = align(
        maps, boxes[first, None], level[first, None], strides=(4, 8, 16, 32), size=want.shape[1], sampling_ratio=0
    )
    yield Check("features of regions", relative_error(got[:, 0], want), VALUE)


CHECKS = [
    ("ops/anchors_*.npz", lambda path: each_case(path, anchors)),
    ("ops/coders_*.npz", lambda path: each_case(path, coders)),
    ("ops/assigners_*.npz", lambda path: each_case(path, assigners)),
    ("ops/nms_*.npz", lambda path: each_case(path, suppression)),
    ("model/faster_*.npz", region_features),
    ("model/mask_*.npz", region_features),
]
