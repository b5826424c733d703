"""Whole two-stage models: Faster and Mask R-CNN."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.boxes import coding, roi
from kdjax.detectors import api, box_head, build, mask_head, rpn
from kdjax.inference import masks
from kdjax.structs import Assignment, DetectorOutput, Targets
from kdjax.weights import fill
from tests.golden_checks import dense
from tests.golden_checks.api import (
    QUICK,
    Check,
    Checks,
    UnknownCase,
    below,
    load,
    maps_of,
    mismatches,
    nhwc,
    relative_error,
)
from tests.golden_checks.model import expect, leaves, levels, targets_of
from tests.support.detections import mask_check, unexplained

_OPTIONS = {
    "backbone.base_channels": "base_channels",
    "backbone.frozen_stages": "frozen_stages",
    "backbone.norm_eval": "norm_eval",
    "backbone.style": "style",
    "neck.out_channels": "neck_channels",
    "roi_head.bbox_head.fc_out_channels": "head_channels",
    "roi_head.mask_head.conv_out_channels": "mask_channels",
    "roi_head.mask_head.num_convs": "mask_convs",
    "train_cfg.rpn.sampler.num": "rpn_samples",
    "train_cfg.rpn_proposal.nms_pre": "train_pre_nms",
    "train_cfg.rpn_proposal.max_per_img": "proposals",
    "train_cfg.rcnn.sampler.num": "region_samples",
}
_EXTRACTOR = {"type": "SingleRoIExtractor", "featmap_strides": [4, 8, 16, 32]}
_ALIGN = {"type": "RoIAlign", "sampling_ratio": 0}
_CODER = {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0, 0.0, 0.0, 0.0]}
_PROPOSALS = {"nms.type": "nms", "nms.iou_threshold": 0.7, "min_bbox_size": 0}
_COMMON = {"assigner.type": "MaxIoUAssigner", "assigner.ignore_iof_thr": -1, "pos_weight": -1, "debug": False}
_COMMON |= {"sampler.type": "RandomSampler", "sampler.neg_pos_ub": -1}
_RPN = _COMMON | {
    "assigner.pos_iou_thr": 0.7, "assigner.neg_iou_thr": 0.3, "assigner.min_pos_iou": 0.3,
    "assigner.match_low_quality": True, "sampler.pos_fraction": 0.5, "sampler.add_gt_as_proposals": False,
    "allowed_border": -1,
}  # fmt: skip
_RCNN = _COMMON | {
    "assigner.pos_iou_thr": 0.5, "assigner.neg_iou_thr": 0.5, "assigner.min_pos_iou": 0.5,
    "sampler.pos_fraction": 0.25, "sampler.add_gt_as_proposals": True,
}  # fmt: skip


def _below(prefix: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{field}": value for field, value in fields.items()}


# Fields that have one value in every model; lists hold the allowed values.
_FIXED = (
    {f"data_preprocessor.{field}": value for field, value in (dense._RGB | dense._PIXELS).items()}
    | _below("backbone", {"type": "ResNet", "num_stages": 4, "out_indices": [0, 1, 2, 3], "norm_cfg.type": "BN"})
    | {"neck.type": "FPN", "neck.num_outs": 5, "rpn_head.type": "RPNHead", "roi_head.type": "StandardRoIHead"}
    | _below("rpn_head.anchor_generator", {"type": "AnchorGenerator", "scales": [8], "ratios": [0.5, 1.0, 2.0]})
    | {"rpn_head.anchor_generator.strides": [4, 8, 16, 32, 64]}
    | _below("rpn_head.bbox_coder", _CODER | {"target_stds": [1.0, 1.0, 1.0, 1.0]})
    | _below("rpn_head.loss_cls", {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0})
    | _below("rpn_head.loss_bbox", {"type": "L1Loss", "loss_weight": 1.0})
    | _below("roi_head.bbox_roi_extractor", _EXTRACTOR)
    | _below("roi_head.bbox_roi_extractor.roi_layer", _ALIGN | {"output_size": 7})
    | _below("roi_head.bbox_head", {"type": "Shared2FCBBoxHead", "roi_feat_size": 7, "reg_class_agnostic": False})
    | _below("roi_head.bbox_head.bbox_coder", _CODER | {"target_stds": [0.1, 0.1, 0.2, 0.2]})
    | _below("roi_head.bbox_head.loss_cls", {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0})
    | _below("roi_head.bbox_head.loss_bbox", {"type": "L1Loss", "loss_weight": 1.0})
    | _below("train_cfg.rpn", _RPN)
    | _below("train_cfg.rpn_proposal", _PROPOSALS)
    | _below("train_cfg.rcnn", _RCNN)
)
_MASKS = (
    {"data_preprocessor.pad_mask": True, "train_cfg.rcnn.assigner.match_low_quality": True}
    | {"train_cfg.rcnn.mask_size": mask_head.OUTPUT}
    | _below("roi_head.mask_roi_extractor", _EXTRACTOR)
    | _below("roi_head.mask_roi_extractor.roi_layer", _ALIGN | {"output_size": mask_head.SIZE})
    | _below("roi_head.mask_head", {"type": "FCNMaskHead"})
    | _below("roi_head.mask_head.loss_mask", {"type": "CrossEntropyLoss", "use_mask": True, "loss_weight": 1.0})
)
_FAMILIES = {
    "FasterRCNN": ("faster_rcnn", {"train_cfg.rcnn.assigner.match_low_quality": False}),
    "MaskRCNN": ("mask_rcnn", _MASKS),
}


def options_of(config: dict[str, Any]) -> tuple[str, int, dict[str, Any]]:
    """(name, number of classes, options) of a configuration of mmdetection; every field must be known."""
    family, own = _FAMILIES[config["type"]]
    fixed, options = _FIXED | own, {"frozen_stages": -1}
    base, neck, depth = config["backbone"].get("base_channels", 64), config["neck"]["out_channels"], 0
    for field, value in leaves({k: v for k, v in config.items() if k not in ("type", "test_cfg")}).items():
        if field == "backbone.depth":
            depth = value
        elif field == "backbone.norm_cfg.requires_grad":
            options["frozen_norm"] = not value
        elif field == "neck.in_channels":
            wide = 4 if config["backbone"]["depth"] >= 50 else 1
            expect(field, value, [base * wide * 2**i for i in range(4)])
        elif field in _OPTIONS:
            options[_OPTIONS[field]] = value
        elif field.endswith((".in_channels", "rpn_head.feat_channels", "roi_extractor.out_channels")):
            expect(field, value, neck)
        elif field.endswith(".num_classes"):
            expect(field, value, config["roi_head"]["bbox_head"]["num_classes"])
        elif field in fixed:
            expect(field, value, fixed[field])
        else:
            raise UnknownCase(f"the model's {field} = {value!r}")
    return f"{family}_r{depth}", config["roi_head"]["bbox_head"]["num_classes"], options


class Case(NamedTuple):
    """One file, read and prepared."""

    arrays: dict[str, np.ndarray]
    family: str
    options: dict[str, Any]
    detector: api.Detector
    targets: Targets
    first: Assignment  # of the anchors, as stored
    proposals: rpn.Proposals  # of training, as stored
    chosen: tuple[np.ndarray, np.ndarray]  # the stored draw of regions


def padded(arrays: list[np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Arrays [n_i, ...] of the images in one, and which rows are there."""
    whole = np.zeros((len(arrays), rows, *arrays[0].shape[1:]), arrays[0].dtype)
    valid = np.zeros(whole.shape[:2], bool)
    for i, array in enumerate(arrays):
        whole[i, : len(array)], valid[i, : len(array)] = array, True
    return whole, valid


def images_of(arrays: dict[str, np.ndarray], prefix: str, field: str) -> list[np.ndarray]:
    return [arrays[f"{prefix}/{i}/{field}"] for i in range(len(arrays["input"]))]


def proposals_of(arrays: dict[str, np.ndarray], mode: str, rows: int) -> rpn.Proposals:
    boxes, valid = padded(images_of(arrays, f"{mode}/proposals", "bboxes"), rows)
    return rpn.Proposals(boxes, padded(images_of(arrays, f"{mode}/proposals", "scores"), rows)[0], valid)


def stored_first(arrays: dict[str, np.ndarray], targets: Targets) -> Assignment:
    """The assignment of the sampled anchors; boxes to the last bit, by the nearest one of the ground truth."""
    batch, anchors = len(arrays["input"]), np.concatenate([arrays[f"anchors/{level}"] for level in range(5)])
    labels, weights = (dense.rows_of(arrays, f"rpn_targets/{i}", batch) for i in (0, 1))
    boxes = np.asarray(coding.deltas_to_boxes(anchors, dense.rows_of(arrays, "rpn_targets/2", batch, 4)))
    positive = (labels == 0) & (weights > 0)
    apart = np.abs(boxes[:, :, None] - targets.boxes[:, None]).max(-1)
    matched = np.where(positive, np.where(targets.valid[:, None], apart, np.inf).argmin(-1), -1).astype(np.int32)
    exact = np.take_along_axis(targets.boxes, np.maximum(matched, 0)[..., None], 1)
    if np.abs(exact - boxes)[positive].max(initial=0) > 1e-3 * np.abs(boxes).max():
        raise ValueError("a stored target is no box of the ground truth")
    return Assignment(
        matched=matched,
        positive=positive,
        ignore=weights == 0,
        labels=np.where(positive, 0, 1).astype(np.int32),
        boxes=np.where(positive[..., None], exact, 0),
        quality=positive.astype(np.float32),
    )


def case_of(path: Path) -> tuple[Case, dict[str, Any]]:
    arrays, meta = load(path)
    name, classes, options = options_of(meta["model_cfg"])
    targets = targets_of(arrays)
    objects = targets.valid.sum(1)
    draws = []
    for i, count in enumerate(objects):
        index = np.concatenate([arrays[f"sampled/{i}/{part}_inds"] for part in ("pos", "neg")])
        draws.append(np.where(index < count, index, index - count + targets.boxes.shape[1]).astype(np.int32))
    case = Case(
        arrays=arrays,
        family=meta["model_cfg"]["type"],
        options=options,
        detector=build(name, classes, **options),
        targets=targets,
        first=stored_first(arrays, targets),
        proposals=proposals_of(arrays, "train", options["proposals"]),
        chosen=padded(draws, options["region_samples"]),
    )
    return case, meta


def replay(path: Path) -> Checks:
    """All checks of one file."""
    case, meta = case_of(path)
    arrays, detector, targets = case.arrays, case.detector, case.targets
    params, stats = fill.from_torch(detector, below(arrays, "param"))
    low_quality = case.family == "MaskRCNN"
    draw = functools.partial(
        box_head.assign_regions,
        targets=targets,
        num_classes=detector.num_classes,
        samples=case.options["region_samples"],
        match_low_quality=low_quality,
    )
    settings = {"pre_nms": case.options["train_pre_nms"], "number": case.options["proposals"]}
    image, boxes = arrays["eval/rois"][:, 0], arrays["eval/rois"][:, 1:]
    regions, there = padded([boxes[image == i] for i in range(len(targets.boxes))], case.options["proposals"])

    def run(params, stats, x):
        evaluated, _ = detector.apply(params, stats, x, train=False)
        stored = draw(case.proposals, chosen=case.chosen)._replace(first=case.first)
        if detector.masks:
            stored = stored._replace(masked=stored.positive)

        def total(params):
            trained, new_stats = detector.apply(params, stats, x, train=True)
            found = trained.at(stored.regions)
            losses = rpn.anchor_losses(trained, case.first) | box_head.region_losses(found, stored)
            if detector.masks:
                losses["loss_mask"] = mask_head.mask_losses(trained.masks_at, targets, stored, stride=1)
            return sum(jnp.sum(one) for one in losses.values()), (trained, new_stats, found, losses)

        gradient, (trained, new_stats, found, losses) = jax.grad(total, has_aux=True)(params)
        proposals = rpn.propose(trained, targets.image_size, **settings)
        by_key = draw(case.proposals, key=jax.random.key(0))
        anchors_by_key = rpn.assign_anchors(trained, targets, jax.random.key(0), samples=case.options["rpn_samples"])
        summed = detector.loss(trained, targets, stored)
        at_stored = evaluated.at(regions)
        of_masks = mask_outputs(trained, targets, stored, detector.num_classes) if detector.masks else ()
        alone = {"at": None, "masks_at": None}
        slim = {name: dataclasses.replace(o, **alone) for name, o in (("e", evaluated), ("t", trained))}
        found = (found, of_masks)
        return slim, new_stats, found, losses, gradient, proposals, by_key, anchors_by_key, stored, summed, at_stored

    outcome = jax.device_get(jax.jit(run, compiler_options=QUICK)(params, stats, nhwc(arrays["input"])))
    slim, new_stats, found, losses, gradient, proposals, by_key, anchors_by_key, stored, summed, at_stored = outcome
    evaluated, trained, (found, of_masks) = slim["e"], slim["t"], found
    for name, field in (("backbone", "backbone"), ("neck", "neck"), ("rpn_cls", "quality"), ("rpn_reg", "box_reg")):
        yield levels(f"eval/{name}", getattr(evaluated, field), maps_of(arrays, f"eval/{name}"), 1e-4)
    for name, field in (("cls", "logits"), ("reg", "box_reg")):
        got = getattr(at_stored, field)[there]
        yield Check(f"eval/roi_{name}, stored regions", relative_error(got, arrays[f"eval/roi_{name}"]), 1e-4)
        got = getattr(found, field)[case.chosen[1]]
        yield Check(f"train/roi_{name}, stored regions", relative_error(got, arrays[f"train/roi_{name}"]), 2e-3)
    yield from dense.moved_stats(case.options, stats, new_stats)
    yield from anchor_checks(case, trained, anchors_by_key)
    yield proposal_check("train proposals, end to end", proposals, case.proposals)
    yield from region_checks(case, stored, by_key)
    if detector.masks:
        yield from mask_checks(arrays, stored, *of_masks)
    yield from loss_checks(arrays, trained, losses, summed)
    yield from dense.gradients(case, gradient)
    yield from dense.frozen_parts(case, gradient)
    yield from detection_checks(case, meta, params, stats, evaluated)


def anchor_checks(case: Case, trained: DetectorOutput, drawn: Assignment) -> Checks:
    arrays, first = case.arrays, case.first
    fragile = arrays.get("fragile_anchors", np.zeros(first.labels.shape, bool))
    anchors = np.concatenate([arrays[f"anchors/{level}"] for level in range(5)])
    yield Check("anchors", relative_error(rpn.anchors(trained), anchors), 1e-5)
    matched = jax.device_get(jax.jit(rpn.match, compiler_options=QUICK)(trained, case.targets))
    for name, wrong in (
        ("positive", first.positive & ~matched.positive),
        ("background", ~first.ignore & ~first.positive & (matched.positive | matched.ignore)),
        ("box", first.positive & (first.matched != matched.matched)),
    ):
        yield Check(f"sampled anchors with another {name}", float((wrong & ~fragile).sum()), 0)
    counts = [np.maximum(rows.sum(1), 1) for rows in (first.positive, ~first.positive & ~first.ignore)]
    yield Check("samples of the RPN", mismatches(sum(counts).sum(), arrays["rpn_targets/4"]), 0)
    deltas = coding.boxes_to_deltas(anchors, np.where(first.positive[..., None], first.boxes, anchors))
    yield Check(
        "targets of the RPN", relative_error(deltas, dense.rows_of(arrays, "rpn_targets/2", len(deltas), 4)), 1e-5
    )
    for name, got, want in (
        ("positive", drawn.positive, first.positive),
        ("scored", ~drawn.ignore, ~first.ignore),
    ):
        apart = np.abs(got.sum(1) - want.sum(1)) - fragile.sum(1)
        yield Check(f"anchors drawn with a key: {name} ones too many or few", float(np.maximum(apart, 0).sum()), 0)
    wrong = drawn.positive & ~matched.positive | (~drawn.ignore & ~drawn.positive & (matched.positive | matched.ignore))
    yield Check("anchors drawn with a key: not to be drawn so", float(wrong.sum()), 0)


def proposal_check(name: str, got: rpn.Proposals, want: rpn.Proposals) -> Check:
    settings = {"iou_threshold": rpn.IOU_THRESHOLD, "max_detections": want.boxes.shape[1]}
    wrong = 0
    for i in range(len(want.boxes)):
        sides = [
            [p.boxes[i][p.valid[i]], p.scores[i][p.valid[i]], np.zeros(p.valid[i].sum(), int)] for p in (got, want)
        ]
        wrong += unexplained(*sides, edges=[], settings=settings)
    return Check(f"{name}: boxes without a match", float(wrong), 0)


def region_checks(case: Case, stored: Assignment, drawn: Assignment) -> Checks:
    arrays, valid = case.arrays, case.chosen[1]
    positive = [arrays[f"sampled/{i}/pos_inds"] for i in range(len(valid))]
    priors = np.concatenate(images_of(arrays, "sampled", "priors"))
    yield Check("regions", relative_error(stored.regions[valid], priors), 1e-5)
    image = np.broadcast_to(np.arange(len(valid))[:, None], valid.shape)[valid]
    yield Check("images of regions", mismatches(image, arrays["train/rois"][:, 0]), 0)
    yield Check("labels of regions", mismatches(stored.labels[valid], arrays["roi_targets/0"]), 0)
    yield Check("regions that are not scored", mismatches(~stored.ignore[valid], arrays["roi_targets/1"]), 0)
    matched = np.concatenate([stored.matched[i, : len(index)] for i, index in enumerate(positive)])
    want = np.concatenate(images_of(arrays, "sampled", "pos_assigned_gt_inds"))
    yield Check("boxes of regions", mismatches(matched, want), 0)
    unit = np.array([0, 0, 1, 1], np.float32)
    given, wanted = (np.where(stored.positive[..., None], b, unit) for b in (stored.regions, stored.boxes))
    deltas = np.asarray(coding.boxes_to_deltas(given, wanted, stds=box_head.STDS))[valid]
    yield Check("targets of regions", relative_error(deltas, arrays["roi_targets/2"]), 1e-5)
    weights = np.repeat(stored.positive[valid][:, None], 4, 1)
    yield Check("regions with a box", mismatches(weights, arrays["roi_targets/3"]), 0)
    yield Check("regions drawn with a key: positive", mismatches(drawn.positive.sum(1), stored.positive.sum(1)), 0)
    yield Check("regions drawn with a key: all", mismatches((~drawn.ignore).sum(1), valid.sum(1)), 0)


def loss_checks(arrays: dict[str, np.ndarray], trained: DetectorOutput, losses, summed) -> Checks:
    sizes = np.cumsum([m.shape[1] * m.shape[2] * rpn.ANCHORS for m in trained.quality])[:-1]
    for ours, name in (("loss_rpn_cls", "loss_rpn_cls"), ("loss_rpn_box", "loss_rpn_bbox")):
        got = np.array([part.sum() for part in np.split(losses[ours], sizes, axis=1)])
        yield Check(f"{name} by level", relative_error(got, arrays[f"train/loss/{name}"]), 1e-4)
    for ours, name in (("loss_cls", "loss_cls"), ("loss_box", "loss_bbox")):
        yield Check(name, relative_error(losses[ours].sum(), arrays[f"train/loss/{name}"]), 1e-4)
    if "loss_mask" in losses:
        yield Check("loss_mask", relative_error(losses["loss_mask"].sum(), arrays["train/loss/loss_mask"].sum()), 1e-4)
    total = sum(one.sum() for one in losses.values())
    yield Check("loss total", relative_error(total, arrays["train/loss/total"]), 1e-4)
    yield Check("loss total of `loss`", relative_error(sum(summed.values()), arrays["train/loss/total"]), 1e-4)


def mask_outputs(output: DetectorOutput, targets: Targets, stored: Assignment, classes: int) -> tuple:
    """The masks' logits of all classes [K, B, R, 28, 28], the share of each cell that is covered, and the targets."""
    labels = jnp.arange(classes)[:, None, None]
    logits = jax.vmap(lambda label: output.masks_at(stored.regions, jnp.broadcast_to(label, stored.labels.shape)))
    of_objects = (targets.instance_masks, stored.regions, jnp.maximum(stored.matched, 0))
    shares = roi.crop_masks(*of_objects, stride=1, size=mask_head.OUTPUT)
    return logits(labels), shares, mask_head.targets_of(*of_objects, stride=1)


def mask_checks(arrays: dict[str, np.ndarray], stored: Assignment, logits, shares, wanted) -> Checks:
    got = np.moveaxis(logits, 0, 2)[stored.positive]
    yield Check("train/mask_preds, stored regions", relative_error(got, arrays["train/mask_preds"]), 2e-3)
    # Half a cell is covered or not by rounding alone.
    clear = np.abs(shares[stored.positive] - 0.5) > 1e-5
    wrong = (wanted[stored.positive] != arrays["mask_targets"]) & clear
    yield Check("cells of mask_targets", float(wrong.sum()), 0)
    yield Check("share of cells of mask_targets that are half covered", float((~clear).mean()), 0.01)


def detection_checks(case: Case, meta: dict[str, Any], params, stats, evaluated: DetectorOutput) -> Checks:
    arrays, first, second = case.arrays, dict(meta["test_cfgs"]["rpn"]), dict(meta["test_cfgs"]["rcnn"])
    nms = [config.pop("nms") for config in (first, second)]
    if first.pop("min_bbox_size") != 0 or nms[0] != {"type": "nms", "iou_threshold": 0.7} or nms[1]["type"] != "nms":
        raise UnknownCase(f"test settings {meta['test_cfgs']}")
    number, pre_nms = first.pop("max_per_img"), first.pop("nms_pre")
    settings = {
        "score_threshold": second.pop("score_thr"),
        "iou_threshold": nms[1]["iou_threshold"],
        "max_detections": second.pop("max_per_img"),
    }
    threshold = second.pop("mask_thr_binary", 0.5)
    if first or second:
        raise UnknownCase(f"test settings {first | second}")
    name, classes, options = options_of(meta["model_cfg"])
    detector = build(name, classes, **options | {"proposals": number})
    maps = {field: maps_of(arrays, f"eval/{n}") for n, field in (("rpn_cls", "quality"), ("rpn_reg", "box_reg"))}
    neck = maps_of(arrays, "eval/neck")
    stored = dataclasses.replace(evaluated, neck=neck, **maps)

    def run(params, stats, output: DetectorOutput):
        # The second stage of these weights on the given maps of the neck.
        x = jnp.zeros((len(neck[0]), *(4 * side for side in neck[0].shape[1:3]), 3), jnp.float32)
        whole, known = detector.apply(params, stats, x, train=False)[0], (params["roi_head"], tuple(output.neck[:4]))
        calls = {name: call for name in ("at", "masks_at") if (call := getattr(whole, name))}
        bound = {name: jax.tree_util.Partial(call.func, *known) for name, call in calls.items()}
        output = dataclasses.replace(output, **bound)
        size = case.targets.image_size
        proposals = rpn.propose(output, size, pre_nms=pre_nms, number=number)
        return proposals, detector.decode(output, size, pre_nms=pre_nms, **settings)

    program = jax.jit(run, compiler_options=QUICK)
    for source, output in (("stored outputs", stored), ("end to end", evaluated)):
        proposals, found = jax.device_get(program(params, stats, output))
        yield proposal_check(f"eval proposals, {source}", proposals, proposals_of(arrays, "eval", number))
        error = sum(
            unexplained(
                [a[found.valid[i]] for a in (found.boxes[i], found.scores[i], found.labels[i])],
                [arrays[f"pred/default/{i}/{key}"] for key in ("bboxes", "scores", "labels")],
                edges=[settings["score_threshold"]],
                settings=settings,
            )
            for i in range(len(found.valid))
        )
        yield Check(f"pred/default, {source}: boxes without a match", float(error), 0)
        if detector.masks:
            want = below(arrays, "pred/default")

            def in_image(i: int, boxes: np.ndarray, found=found):
                kept = found.masks[i][found.valid[i]]
                return masks.from_boxes(kept, boxes, case.targets.image_size[i], threshold=threshold)

            yield mask_check(f"pred/default, {source}", found, want, np.ones(4, np.float32), in_image)


CHECKS = [("model/faster_*.npz", replay), ("model/mask_*.npz", replay)]
