"""Whole models with ResNet and FPN: RetinaNet, FCOS, GFL and ATSS."""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.boxes import coding
from kdjax.detectors import api, build, dense
from kdjax.structs import Assignment, DetectorOutput, Targets
from kdjax.weights import fill, torch_names
from tests.golden_checks.api import Check, Checks, below, load, mismatches, relative_error
from tests.golden_checks.model import (
    QUICK,
    detections,
    expect,
    leaves,
    levels,
    maps_of,
    nhwc,
    running_stats,
    targets_of,
)

# Fields of a model's configuration, and the option of kdjax that they set.
_OPTIONS = {
    "backbone.base_channels": "base_channels",
    "backbone.frozen_stages": "frozen_stages",
    "backbone.norm_eval": "norm_eval",
    "backbone.style": "style",
    "neck.out_channels": "neck_channels",
    "neck.add_extra_convs": "extra_convs",
    "bbox_head.feat_channels": "head_channels",
    "bbox_head.stacked_convs": "stacked_convs",
    "bbox_head.norm_cfg.num_groups": "groups",
    "bbox_head.reg_max": "reg_max",
    "bbox_head.center_sampling": "center_sampling",
    "bbox_head.norm_on_bbox": "norm_on_bbox",
    "bbox_head.centerness_on_reg": "centerness_on_reg",
}
_RGB = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "bgr_to_rgb": True}
_BGR = {"mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0], "bgr_to_rgb": False}
_PIXELS = {"type": "DetDataPreprocessor", "pad_size_divisor": 32}
# Fields that have one value, or one of a few, in every model.
_FIXED = {
    "backbone.type": ["ResNet"],
    "backbone.num_stages": [4],
    "backbone.out_indices": [[0, 1, 2, 3]],
    "backbone.norm_cfg.type": ["BN"],
    "neck.type": ["FPN"],
    "neck.start_level": [1],
    "neck.num_outs": [5],
    "bbox_head.norm_cfg.type": ["GN"],
    "bbox_head.norm_cfg.requires_grad": [True],
    "bbox_head.anchor_generator.type": ["AnchorGenerator"],
    "bbox_head.anchor_generator.strides": [[8, 16, 32, 64, 128]],
    "bbox_head.strides": [[8, 16, 32, 64, 128]],
    "bbox_head.bbox_coder.type": ["DeltaXYWHBBoxCoder"],
    "bbox_head.bbox_coder.target_means": [[0.0, 0.0, 0.0, 0.0]],
    "bbox_head.loss_cls.use_sigmoid": [True],
    "bbox_head.loss_cls.loss_weight": [1.0],
    "bbox_head.loss_centerness.type": ["CrossEntropyLoss"],
    "bbox_head.loss_centerness.use_sigmoid": [True],
    "bbox_head.loss_centerness.loss_weight": [1.0],
    "train_cfg.sampler.type": ["PseudoSampler"],
    "train_cfg.allowed_border": [-1],
    "train_cfg.pos_weight": [-1],
    "train_cfg.debug": [False],
    "train_cfg": [None],
}
_FOCAL = {
    "bbox_head.loss_cls.type": ["FocalLoss"],
    "bbox_head.loss_cls.gamma": [2.0],
    "bbox_head.loss_cls.alpha": [0.25],
}
_SQUARES = {
    "bbox_head.anchor_generator.octave_base_scale": [8],
    "bbox_head.anchor_generator.scales_per_octave": [1],
    "bbox_head.anchor_generator.ratios": [[1.0]],
    "train_cfg.assigner.type": ["ATSSAssigner"],
    "train_cfg.assigner.topk": [9],
    "neck.relu_before_extra_convs": [False],
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "RetinaNet": _FOCAL
    | {
        "bbox_head.type": ["RetinaHead"],
        "bbox_head.anchor_generator.octave_base_scale": [4],
        "bbox_head.anchor_generator.scales_per_octave": [3],
        "bbox_head.anchor_generator.ratios": [[0.5, 1.0, 2.0]],
        "bbox_head.bbox_coder.target_stds": [[1.0, 1.0, 1.0, 1.0]],
        "bbox_head.loss_bbox.type": ["L1Loss"],
        "bbox_head.loss_bbox.loss_weight": [1.0],
        "train_cfg.assigner.type": ["MaxIoUAssigner"],
        "train_cfg.assigner.pos_iou_thr": [0.5],
        "train_cfg.assigner.neg_iou_thr": [0.4],
        "train_cfg.assigner.min_pos_iou": [0],
        "train_cfg.assigner.ignore_iof_thr": [-1],
        "neck.relu_before_extra_convs": [False],
    },
    "FCOS": _FOCAL
    | {
        "bbox_head.type": ["FCOSHead"],
        "bbox_head.loss_bbox.loss_weight": [1.0],
        "bbox_head.dcn_on_last_conv": [False],
        "bbox_head.center_sample_radius": [1.5],
        "neck.relu_before_extra_convs": [True],
    },
    "GFL": _SQUARES
    | {
        "bbox_head.type": ["GFLHead"],
        "bbox_head.loss_cls.type": ["QualityFocalLoss"],
        "bbox_head.loss_cls.beta": [2.0],
        "bbox_head.loss_bbox.type": ["GIoULoss"],
        "bbox_head.loss_bbox.loss_weight": [2.0],
        "bbox_head.loss_dfl.type": ["DistributionFocalLoss"],
        "bbox_head.loss_dfl.loss_weight": [0.25],
    },
    "ATSS": _FOCAL
    | _SQUARES
    | {
        "bbox_head.type": ["ATSSHead"],
        "bbox_head.bbox_coder.target_stds": [[0.1, 0.1, 0.2, 0.2]],
        "bbox_head.loss_bbox.type": ["GIoULoss"],
        "bbox_head.loss_bbox.loss_weight": [2.0],
    },
}
LOSSES = {
    "loss_cls": "loss_cls",
    "loss_box": "loss_bbox",
    "loss_dfl": "loss_dfl",
    "loss_quality": "loss_centerness",
}


def options_of(config: dict[str, Any]) -> tuple[str, int, dict[str, Any]]:
    """(detector's name, number of classes, options) of a configuration of mmdetection; every field must be known."""
    family = config["type"]
    pixels = {key: config["data_preprocessor"][key] for key in _RGB}
    expect("data_preprocessor", {k: v for k, v in config["data_preprocessor"].items() if k not in _RGB}, _PIXELS)
    expect_one("data_preprocessor", pixels, [_RGB, _BGR, _BGR | {"mean": [102.9801, 115.9465, 122.7717]}])
    # mmdetection's defaults where the published models differ from them.
    options, fixed = {"frozen_stages": -1}, _FIXED | _FAMILIES[family]
    widths = [config["backbone"].get("base_channels", 64) * 2**i for i in range(4)]
    for field, value in leaves({k: v for k, v in config.items() if k not in ("data_preprocessor", "test_cfg")}).items():
        field = field.removeprefix("bbox_head.") if field.startswith("bbox_head.train_cfg") else field
        if field in ("type", "backbone.depth", "bbox_head.num_classes") or field.startswith("bbox_head.test_cfg"):
            continue
        if field in _OPTIONS:
            options[_OPTIONS[field]] = value
        elif field == "backbone.norm_cfg.requires_grad":
            options["frozen_norm"] = not value
        elif family == "FCOS" and field == "bbox_head.conv_bias":
            options["conv_bias"] = value is True
        elif family == "FCOS" and field == "bbox_head.loss_bbox.type":
            options["box_loss"] = {"IoULoss": "iou", "GIoULoss": "giou"}[value]
        elif field == "bbox_head.in_channels":
            expect(field, value, config["neck"]["out_channels"])
        elif field == "neck.in_channels":
            expect(field, value, [width * (4 if config["backbone"]["depth"] >= 50 else 1) for width in widths])
        else:
            expect_one(field, value, fixed.get(field, []))
    return f"{family.lower()}_r{config['backbone']['depth']}", config["bbox_head"]["num_classes"], options


def expect_one(field: str, value: Any, known: list) -> None:
    if value not in known:
        expect(field, value, known)


def rows_of(arrays: dict[str, np.ndarray], prefix: str, batch: int, width: int | None = None) -> np.ndarray:
    """The targets of all levels, [B, N] or [B, N, width]; FCOS has the images of a level behind each other."""
    found = below(arrays, prefix)
    shape = (batch, -1) if width is None else (batch, -1, width)
    return np.concatenate([found[str(level)].reshape(shape) for level in range(len(found))], 1)


def stored_assignment(
    family: str, arrays: dict[str, np.ndarray], classes: int, targets: Targets, normed: bool
) -> Assignment:
    """The assignment that the file holds; `normed`: FCOS's distances are in strides."""
    batch, anchors = len(arrays["input"]), np.concatenate([arrays[f"anchors/{level}"] for level in range(5)])
    if family == "RetinaNet":
        labels, weights = (rows_of(arrays, f"targets/{i}", batch) for i in (0, 1))
        boxes = np.asarray(coding.deltas_to_boxes(anchors, rows_of(arrays, "targets/2", batch, 4)))
    elif family == "FCOS":
        labels, distances = rows_of(arrays, "targets/0", batch), rows_of(arrays, "targets/1", batch, 4)
        weights = np.ones(labels.shape)
        boxes = np.asarray(coding.distance_to_boxes(anchors[:, :2], distances * (anchors[:, 2:3] if normed else 1)))
    else:
        labels, weights = (rows_of(arrays, f"targets/{i}", batch) for i in (1, 2))
        boxes = rows_of(arrays, "targets/3", batch, 4)
    positive = labels < classes
    # The boxes to the last bit, by the nearest one of the ground truth.
    apart = np.abs(boxes[:, :, None] - targets.boxes[:, None]).max(-1)
    fits = targets.valid[:, None] & (labels[..., None] == targets.labels[:, None])
    matched = np.where(positive, np.where(fits, apart, np.inf).argmin(-1), -1).astype(np.int32)
    exact = np.take_along_axis(targets.boxes, np.maximum(matched, 0)[..., None], 1)
    if np.abs(exact - boxes)[positive].max(initial=0) > 1e-3 * np.abs(boxes).max():
        raise ValueError("a stored target is no box of the ground truth")
    return Assignment(
        matched=matched,
        positive=positive,
        ignore=weights == 0,
        labels=labels.astype(np.int32),
        boxes=np.where(positive[..., None], exact, 0),
        quality=positive.astype(np.float32),
    )


class Case(NamedTuple):
    """One file, read and prepared."""

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]
    family: str
    options: dict[str, Any]
    detector: api.Detector
    prior_losses: Callable
    branches: dict[str, tuple[str, str]]  # of the head: field of `DetectorOutput`, tower
    targets: Targets
    stored: Assignment
    fragile: np.ndarray  # bool[B, N], priors whose assignment depends on rounding


def case_of(path: Path) -> Case:
    arrays, meta = load(path)
    arrays.setdefault("input", np.broadcast_to(np.float32(0), meta.get("input_shape", ())))  # its shape alone is read
    name, classes, options = options_of(meta["model_cfg"])
    family, targets = meta["model_cfg"]["type"], targets_of(arrays)
    stored = stored_assignment(family, arrays, classes, targets, options.get("norm_on_bbox", False))
    prior_losses = importlib.import_module(f"kdjax.detectors.{family.lower()}").prior_losses
    branches = {"cls": ("cls_logits", "cls_tower"), "reg": ("box_reg", "reg_tower")}
    if family in ("FCOS", "ATSS"):
        on_reg = family == "ATSS" or options.get("centerness_on_reg", False)
        branches["quality"] = ("quality", "reg_tower" if on_reg else "cls_tower")
    if family == "FCOS":
        prior_losses = functools.partial(prior_losses, box_loss=options["box_loss"])
    return Case(
        arrays=arrays,
        meta=meta,
        family=family,
        options=options,
        detector=build(name, classes, **options),
        prior_losses=prior_losses,
        branches=branches,
        targets=targets,
        stored=stored,
        fragile=arrays.get("fragile_anchors", np.zeros(stored.labels.shape, bool)),
    )


def losses_of(case: Case, forward: Callable, params) -> tuple:
    """(output of training, losses of the priors, gradient, losses end to end, assignment) of `forward(params)`.

    The losses end to end are those of kdjax's own assignment, which is the stored one where rounding decides.
    """

    def total(params):
        trained, new_stats = forward(params)
        losses = case.prior_losses(trained, case.stored)
        return sum(jnp.sum(one) for one in losses.values()), (trained, new_stats, losses)

    gradient, (trained, new_stats, losses) = jax.grad(total, has_aux=True)(params)
    assignment = case.detector.assign(trained, case.targets)

    def chosen(own, known):
        return jnp.where(case.fragile.reshape(*case.fragile.shape, *[1] * (own.ndim - 2)), known, own)

    mixed = jax.tree.map(chosen, assignment, case.stored)
    end_to_end = case.detector.loss(trained, case.targets, mixed)
    return trained, new_stats, losses, gradient, end_to_end, assignment


def replay(path: Path) -> Checks:
    """All checks of one file."""
    case = case_of(path)
    arrays, detector = case.arrays, case.detector
    params, stats = fill.from_torch(detector, below(arrays, "param"))

    def run(params, stats, x):
        evaluated, _ = detector.apply(params, stats, x, train=False)
        reentered = {
            field: detector.head(params, stats, getattr(evaluated, tower)[0], branch=branch, start=1)
            for branch, (field, tower) in case.branches.items()
        }
        return evaluated, reentered, *losses_of(case, lambda p: detector.apply(p, stats, x, train=True), params)

    outcome = jax.device_get(jax.jit(run, compiler_options=QUICK)(params, stats, nhwc(arrays["input"])))
    evaluated, reentered, trained, new_stats, losses, gradient, end_to_end, assignment = outcome
    yield from raw_outputs(case, evaluated, trained)
    for field, got in reentered.items():
        yield levels(f"head entered behind conv 1: {field}", got, getattr(evaluated, field), 1e-5)
    yield from moved_stats(case.options, stats, new_stats)
    yield from running_stats(detector, new_stats, below(arrays, "after_train_forward"))
    yield from assignments(case, assignment)
    yield from loss_values(arrays, trained, losses, end_to_end)
    yield from gradients(case, gradient)
    yield from frozen_parts(case, gradient)
    yield from detections(detector, arrays, case.meta, case.targets, evaluated)


def replay_head(path: Path) -> Checks:
    """The head alone on stored features of the neck: for a file without the image and the other parameters."""
    case = case_of(path)
    arrays, detector = case.arrays, case.detector
    state = fill.to_torch(detector, *jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), detector.shapes))
    stored_state = below(arrays, "param")
    if set(stored_state) != {name for name in state if name.startswith("bbox_head.")}:
        raise ValueError("the parameters are not those of a head")
    params, stats = fill.from_torch(detector, state | stored_state)
    anchors = 9 if case.family == "RetinaNet" else 1
    eval_neck = maps_of(arrays, "eval/neck")
    train_neck = maps_of(arrays, "train/neck") or eval_neck  # left out where all norms are frozen

    def outputs(params, stats, neck):
        found = {
            field: detector.head(params, stats, neck, branch=branch, start=0)
            for branch, (field, _) in case.branches.items()
        }
        return DetectorOutput(strides=detector.strides, anchors=anchors, neck=neck, **found)

    def run(params, stats, eval_neck, train_neck):
        forward = losses_of(case, lambda p: (outputs(p, stats, train_neck), stats), params)
        return outputs(params, stats, eval_neck), *forward

    outcome = jax.device_get(jax.jit(run, compiler_options=QUICK)(params, stats, eval_neck, train_neck))
    evaluated, trained, _, losses, gradient, end_to_end, assignment = outcome
    yield from raw_outputs(case, evaluated, trained)
    yield from assignments(case, assignment)
    yield from loss_values(arrays, trained, losses, end_to_end)
    yield from gradients(case, gradient)
    yield from detections(detector, arrays, case.meta, case.targets, evaluated)


def raw_outputs(case: Case, evaluated: DetectorOutput, trained: DetectorOutput) -> Checks:
    names = {"backbone": "backbone", "neck": "neck", "cls": "cls_logits", "reg": "box_reg", "ctr": "quality"}
    for mode, output, tolerance in (("eval", evaluated, 1e-4), ("train", trained, 2e-3)):
        for name, field in names.items():
            want = maps_of(case.arrays, f"{mode}/{name}")
            if want and case.options.get("norm_on_bbox") and (mode, name) == ("train", "reg"):
                # In training mmdetection leaves the stride out.
                want = tuple(m * stride for m, stride in zip(want, case.detector.strides, strict=True))
            if want:
                yield levels(f"{mode}/{name}", getattr(output, field), want, tolerance)


def moved_stats(options: dict[str, Any], old, new) -> Checks:
    """The running statistics of frozen norms must stay, the others move."""
    frozen = 5 if options.get("norm_eval", True) else options["frozen_stages"]
    old, new = api.flatten(old), api.flatten(new)
    parts = ("conv1/", "bn1/"), ("layer1/",), ("layer2/",), ("layer3/",), ("layer4/",)
    wrong = 0
    for stage, prefixes in enumerate(parts):
        for path in [path for path in old if path.startswith(tuple(f"backbone/{prefix}" for prefix in prefixes))]:
            wrong += np.array_equal(old[path], new[path]) != (stage <= frozen)
    yield Check("running statistics that move or stay wrongly", float(wrong), 0)


def assignments(case: Case, got: Assignment) -> Checks:
    arrays, stored, same = case.arrays, case.stored, ~case.fragile
    for field in ("labels", "positive", "ignore"):
        wrong = (getattr(got, field) != getattr(stored, field)) & same
        yield Check(f"assign {field}", float(wrong.sum()), 0)
    boxes = [one.boxes * same[..., None] for one in (got, stored)]
    yield Check("assign boxes", relative_error(*boxes), 1e-5)
    if case.family == "FCOS":
        return
    count = arrays["targets/4" if case.family == "RetinaNet" else "targets/5"]
    yield Check("number of positives", mismatches(dense.positives_of_images(stored), count), 0)
    if case.family == "RetinaNet":
        anchors = np.concatenate([arrays[f"anchors/{level}"] for level in range(5)])
        deltas = coding.boxes_to_deltas(anchors, np.where(stored.positive[..., None], stored.boxes, anchors))
        yield Check("targets", relative_error(deltas, rows_of(arrays, "targets/2", len(deltas), 4)), 1e-5)


def loss_values(arrays, trained, losses, end_to_end) -> Checks:
    want = below(arrays, "train/loss")
    sizes = np.cumsum([m.shape[1] * m.shape[2] for m in trained.cls_logits])
    for ours, name in LOSSES.items():
        if name not in want:
            continue
        per_cell = losses[ours].shape[1] // sizes[-1]
        got = np.array([part.sum() for part in np.split(losses[ours], sizes[:-1] * per_cell, axis=1)])
        got = got if want[name].ndim else got.sum()
        yield Check(f"{name}, stored targets", relative_error(got, want[name]), 1e-4)
        yield Check(f"{name}, end to end", relative_error(end_to_end[ours], want[name].sum()), 1e-3)
    stored_total = sum(one.sum() for one in losses.values())
    yield Check("loss total, stored targets", relative_error(stored_total, want["total"]), 1e-4)
    yield Check("loss total, end to end", relative_error(sum(end_to_end.values()), want["total"]), 1e-3)


def in_torch(detector: api.Detector, gradient) -> dict[str, np.ndarray]:
    return fill.to_torch(detector, gradient, jax.tree.map(lambda leaf: np.zeros(leaf.shape), detector.shapes[1]))


def gradients(case: Case, gradient) -> Checks:
    got = in_torch(case.detector, gradient)
    tolerance = 1e-3 if case.options.get("norm_eval", True) and case.family != "FCOS" else 2e-2
    for name, value in below(case.arrays, "grad").items():
        yield Check(f"grad/{name}", relative_error(got[name], value), tolerance)
    names = list(map(str, case.arrays["grad_norm/names"]))
    values = np.array([np.linalg.norm(np.asarray(got[name], np.float64)) for name in names])
    yield Check("grad_norm", relative_error(values, case.arrays["grad_norm/values"]), tolerance)


def frozen_parts(case: Case, gradient) -> Checks:
    """What gets no gradient in the file gets none here and is spared by weight decay, and nothing else."""
    got, trained = in_torch(case.detector, gradient), set(map(str, case.arrays["grad_norm/names"]))
    names = {path: names[0] for path, names in torch_names.table(case.detector).items()}
    ours = {name for path, name in names.items() if path.startswith("params/")}
    yield Check("trained parameters that are not here", float(len(trained - ours)), 0)
    frozen = [np.abs(got[name]).max() for name in ours - trained]
    yield Check("gradient of what is frozen", float(max(frozen, default=0)), 0)
    spared = api.flatten(case.detector.no_decay(case.detector.shapes[0]))
    kernels = {path for path in spared if path.endswith("/kernel")}
    wrong = [path for path in kernels if spared[path] == (names[f"params/{path}"] in trained)]
    yield Check("kernels with a wrong weight decay", float(len(wrong)), 0)


CHECKS = [(f"model/{family.lower()}_*.npz", replay) for family in _FAMILIES]
CHECKS += [(f"model/head_{family.lower()}_*.npz", replay_head) for family in _FAMILIES]
