"""Whole models: features, outputs, running statistics, assignment, losses, gradients and detections of RTMDet."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.boxes import assign, coding, dynamic
from kdjax.detectors import api, rtmdet
from kdjax.detectors.levels import class_logits
from kdjax.structs import Assignment, DetectorOutput, Targets
from kdjax.weights import fill, torch_names
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
from tests.support.detections import detections

# Fields of a model's configuration, and the option of `rtmdet.make` that they set.
OPTIONS = {
    "backbone.widen_factor": "widen",
    "backbone.deepen_factor": "deepen",
    "backbone.expand_ratio": "expand_ratio",
    "backbone.channel_attention": "attention",
    "neck.out_channels": "neck_channels",
    "neck.num_csp_blocks": "neck_blocks",
    "bbox_head.feat_channels": "head_channels",
    "bbox_head.stacked_convs": "stacked_convs",
    "bbox_head.share_conv": "share_conv",
    "bbox_head.exp_on_reg": "exp_on_reg",
}
# Fields that have one value in every RTMDet.
FIXED = {
    "type": "RTMDet",
    "data_preprocessor.type": "DetDataPreprocessor",
    "data_preprocessor.mean": [103.53, 116.28, 123.675],
    "data_preprocessor.std": [57.375, 57.12, 58.395],
    "data_preprocessor.bgr_to_rgb": False,
    "data_preprocessor.batch_augments": None,
    "backbone.type": "CSPNeXt",
    "backbone.arch": "P5",
    "neck.type": "CSPNeXtPAFPN",
    "bbox_head.type": "RTMDetSepBNHead",
    "bbox_head.anchor_generator.type": "MlvlPointGenerator",
    "bbox_head.anchor_generator.offset": 0,
    "bbox_head.anchor_generator.strides": [8, 16, 32],
    "bbox_head.bbox_coder.type": "DistancePointBBoxCoder",
    "bbox_head.loss_cls.type": "QualityFocalLoss",
    "bbox_head.loss_cls.use_sigmoid": True,
    "bbox_head.loss_cls.beta": 2.0,
    "bbox_head.loss_cls.loss_weight": 1.0,
    "bbox_head.loss_bbox.type": "GIoULoss",
    "bbox_head.loss_bbox.loss_weight": 2.0,
    "bbox_head.with_objectness": False,
    "bbox_head.pred_kernel_size": 1,
    "train_cfg.assigner.type": "DynamicSoftLabelAssigner",
    "train_cfg.assigner.topk": 13,
    "train_cfg.allowed_border": -1,
    "train_cfg.pos_weight": -1,
    "train_cfg.debug": False,
}
_LAYERS = {"norm_cfg.type": "BN", "act_cfg.type": "SiLU", "act_cfg.inplace": True}


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def options_of(
    config: dict[str, Any], own: dict[str, str] = OPTIONS, fixed: dict[str, Any] = FIXED
) -> tuple[int, dict[str, Any]]:
    """(number of classes, options of `rtmdet.make`) of a configuration of mmdetection; every field must be known.

    `own`: field -> the option that it sets; `fixed`: field -> the only value that it may have.
    """
    fixed = fixed | {f"{part}.{k}": v for part in ("backbone", "neck", "bbox_head") for k, v in _LAYERS.items()}
    options, classes = {}, 0
    for field, value in leaves(config).items():
        field = field.removeprefix("bbox_head.") if field.startswith("bbox_head.train_cfg") else field
        if field.startswith(("test_cfg.", "bbox_head.test_cfg.")):
            continue  # the settings of each set of detections stand in the file
        if field in own:
            options[own[field]] = value
        elif field == "bbox_head.num_classes":
            classes = value
        elif field == "bbox_head.in_channels":
            expect(field, value, config["neck"]["out_channels"])
        elif field == "neck.expand_ratio":
            expect(field, value, config["backbone"]["expand_ratio"])
        elif field == "neck.in_channels":
            expect(field, value, [int(c * config["backbone"]["widen_factor"]) for c in (256, 512, 1024)])
        elif field in fixed:
            expect(field, value, fixed[field])
        else:
            raise UnknownCase(f"the model's {field} = {value!r}")
    return classes, options


def expect(field: str, value: Any, known: Any) -> None:
    if value != known:
        raise UnknownCase(f"the model's {field} = {value!r}; only {known!r} is known")


def targets_of(arrays: dict[str, np.ndarray]) -> Targets:
    batch, _, height, width = arrays["input"].shape
    boxes = [arrays[f"gt/{i}/bboxes"] for i in range(batch)]
    rows = max(1, *(len(b) for b in boxes))
    whole = np.tile(np.array([[height, width]], np.int32), (batch, 1))
    padded, labels = np.zeros((batch, rows, 4), np.float32), np.zeros((batch, rows), np.int32)
    valid = np.zeros((batch, rows), bool)
    for i, b in enumerate(boxes):
        padded[i, : len(b)], labels[i, : len(b)], valid[i, : len(b)] = b, arrays[f"gt/{i}/labels"], True
    sizes = (arrays.get(name, whole).astype(np.int32) for name in ("img_shape", "pad_shape"))
    instance_masks = None
    if "gt/0/masks" in arrays:
        instance_masks = np.zeros((batch, rows, height, width), bool)
        for i, b in enumerate(boxes):
            instance_masks[i, : len(b)] = arrays[f"gt/{i}/masks"]
    return Targets(padded, labels, valid, *sizes, instance_masks)


def stored_assignment(arrays: dict[str, np.ndarray], classes: int) -> Assignment:
    labels = arrays["assign/labels"].astype(np.int32)
    ignore = arrays["assign/label_weights"] == 0
    matched = np.full(labels.shape, -1, np.int32)
    for i in range(len(labels)):
        # mmdetection numbers the positive priors among those inside the padding.
        matched[i, np.flatnonzero(~ignore[i])[arrays[f"assign/{i}/pos_inds"]]] = arrays[f"assign/{i}/pos_gt"]
    return Assignment(
        matched=matched,
        positive=labels < classes,
        ignore=ignore,
        labels=labels,
        boxes=arrays["assign/bbox_targets"],
        quality=arrays["assign/metrics"],
    )


def stored_losses(output: DetectorOutput, targets: Targets, stored: Assignment) -> dict[str, jax.Array]:
    """The losses on the stored targets under the peer's names: of each prior, or one number."""
    del targets
    names = ("loss_cls", "loss_bbox")
    return dict(zip(names, rtmdet.prior_losses(class_logits(output), rtmdet.decode_boxes(output), stored), strict=True))


def _program(detector: api.Detector, net: api.PureModule, losses_of: Callable) -> Callable:
    """One program for all that is compiled per file: evaluation, training forward and backward."""

    def run(params, stats, x, targets: Targets, stored: Assignment):
        evaluated, _ = detector.apply(params, stats, x, train=False)
        reentered = {
            branch: detector.head(params, stats, tower[0], branch=branch, start=1)
            for branch, tower in (("cls", evaluated.cls_tower), ("reg", evaluated.reg_tower))
        }

        def total(params, offsets):
            def forward(module):
                backbone, neck, neck_conv = module.features(x, True)
                neck = tuple(a + b for a, b in zip(neck, offsets, strict=True))
                return module.outputs(backbone, neck, neck_conv, True)

            output, new_stats = net.call(params, stats, forward)
            losses = losses_of(output, targets, stored)
            return sum(jnp.sum(one) for one in losses.values()), (output, new_stats, losses)

        offsets = tuple(jnp.zeros_like(one) for one in evaluated.neck)
        gradient = jax.grad(total, (0, 1), has_aux=True)
        gradients, (trained, new_stats, losses) = gradient(params, offsets)
        assignment = detector.assign(trained, targets)
        end_to_end = detector.loss(trained, targets, assignment)
        return evaluated, reentered, trained, new_stats, losses, gradients, end_to_end, assignment

    return jax.jit(run, compiler_options=QUICK)


TAPS = {"backbone": "backbone", "neck": "neck", "cls": "cls_logits", "reg": "box_reg"}


def replay_rtmdet(path: Path) -> Checks:
    """All checks of one file of RTMDet."""
    yield from whole_model(path, rtmdet, OPTIONS, FIXED, TAPS, stored_losses)


def whole_model(
    path: Path,
    family: ModuleType,
    own: dict[str, str],
    fixed: dict[str, Any],
    taps: dict[str, str],
    losses_of: Callable,
    centers: Callable[[Targets], Any] = lambda targets: None,
) -> Checks:
    """All checks of one file of RTMDet or RTMDet-Ins.

    `own`, `fixed`: of `options_of`; `taps`: key of the file -> field of the output; `losses_of`: as `stored_losses`;
    `centers`: of the assigner.
    """
    arrays, meta = load(path)
    classes, options = options_of(meta["model_cfg"], own, fixed)
    detector = family.make("pico", classes, **options)
    params, stats = fill.from_torch(detector, below(arrays, "param"))
    targets, stored = targets_of(arrays), stored_assignment(arrays, classes)
    priors = detector.priors(arrays["input"].shape[2:])
    x = nhwc(arrays["input"])
    net = family.network(classes, **options)
    outcome = _program(detector, net, losses_of)(params, stats, x, targets, stored)
    evaluated, reentered, trained, new_stats, losses, gradients, end_to_end, assignment = jax.device_get(outcome)

    for mode, output, tolerance in (("eval", evaluated, 1e-4), ("train", trained, 2e-3)):
        for name, field in taps.items():
            got, want = getattr(output, field), maps_of(arrays, f"{mode}/{name}")
            if not want:  # one map for all levels
                got, want = (got,), (nhwc(arrays[f"{mode}/{name}"]),)
            yield levels(f"{mode}/{name}", got, want, tolerance)
    for name, field in (("cls", "cls_logits"), ("reg", "box_reg")):
        yield levels(f"head entered behind {name} conv 1", reentered[name], getattr(evaluated, field), 1e-5)
    # The file has the first image's priors, with zeros outside its padding.
    inside = np.asarray(assign.inside_padding(priors, targets.pad_size[:1]))[0, :, None]
    yield Check("priors", relative_error(priors * inside, arrays["priors"]), 1e-5)
    decoded = coding.distance_to_boxes(priors[:, :2], join(maps_of(arrays, "train/reg")))
    yield Check("decoded boxes, stored outputs", relative_error(decoded, arrays["train/decoded_bboxes"]), 1e-5)
    decoded = detector.decode_boxes(trained)
    yield Check("decoded boxes, end to end", relative_error(decoded, arrays["train/decoded_bboxes"]), 2e-3)
    yield from running_stats(detector, new_stats, below(arrays, "after_train_forward"))
    yield from assignment_checks(arrays, targets, stored, priors, assignment, centers(targets))
    yield from loss_checks(arrays, trained, losses, end_to_end)
    yield from gradient_checks(detector, arrays, *gradients)
    yield from detections(detector, arrays, meta, targets, evaluated)


def replay_head(path: Path) -> Checks:
    """The head alone on stored features of the neck: for a file without the image and the other parameters."""
    arrays, meta = load(path)
    classes, options = options_of(meta["model_cfg"])
    detector, net = rtmdet.make("pico", classes, **options), rtmdet.network(classes, **options)
    state = fill.to_torch(detector, *jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), detector.shapes))
    stored_state = below(arrays, "param")
    if set(stored_state) != {name for name in state if name.startswith("bbox_head.")}:
        raise ValueError("the parameters are not those of a head")
    params, stats = fill.from_torch(detector, state | stored_state)
    arrays["input"] = np.broadcast_to(np.float32(0), meta["input_shape"])  # its shape alone is read
    targets, stored = targets_of(arrays), stored_assignment(arrays, classes)
    priors = detector.priors(arrays["input"].shape[2:])

    def run(params, stats, eval_neck, train_neck, targets: Targets, stored: Assignment):
        evaluated, _ = net.call(params, stats, lambda module: module.outputs((), eval_neck, (), False))

        def total(neck):
            trained, _ = net.call(params, stats, lambda module: module.outputs((), neck, (), True))
            losses = stored_losses(trained, targets, stored)
            return sum(jnp.sum(one) for one in losses.values()), (trained, losses)

        gradient, (trained, losses) = jax.grad(total, has_aux=True)(train_neck)
        assignment = rtmdet.assign_targets(trained, targets)
        return evaluated, trained, losses, gradient, rtmdet.loss(trained, targets, assignment), assignment

    necks = (maps_of(arrays, "eval/neck"), maps_of(arrays, "train/neck"))
    outcome = jax.device_get(jax.jit(run)(params, stats, *necks, targets, stored))
    evaluated, trained, losses, gradient, end_to_end, assignment = outcome
    for mode, output, tolerance in (("eval", evaluated, 1e-4), ("train", trained, 2e-3)):
        for name, field in (("cls", "cls_logits"), ("reg", "box_reg")):
            yield levels(f"{mode}/{name}", getattr(output, field), maps_of(arrays, f"{mode}/{name}"), tolerance)
    yield Check("priors", relative_error(priors, arrays["priors"]), 1e-5)
    yield from assignment_checks(arrays, targets, stored, priors, assignment)
    yield from loss_checks(arrays, trained, losses, end_to_end)
    yield levels("grad_neck", gradient, maps_of(arrays, "grad_neck"), 2e-2)
    yield from detections(detector, arrays, meta, targets, evaluated)


def levels(name: str, got, want, tolerance: float) -> Check:
    if len(got) != len(want):
        raise ValueError(f"{len(got)} levels of {name} instead of {len(want)}")
    return Check(name, max(relative_error(a, b) for a, b in zip(got, want, strict=True)), tolerance)


def join(maps: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.concatenate([m.reshape(m.shape[0], -1, m.shape[-1]) for m in maps], 1)


def running_stats(detector, new_stats, want: dict[str, np.ndarray]) -> Checks:
    got = fill.to_torch(detector, jax.tree.map(lambda leaf: np.zeros(leaf.shape), detector.shapes[0]), new_stats)
    for name, value in want.items():
        yield Check(f"after_train_forward/{name}", relative_error(got[name], value), 2e-3)


def assignment_checks(arrays, targets: Targets, stored: Assignment, priors, end_to_end, centers=None) -> Checks:
    logits = join(maps_of(arrays, "train/cls"))
    assigner = jax.jit(dynamic.dynamic_soft_label, compiler_options=QUICK)
    got = assigner(logits, arrays["train/decoded_bboxes"], priors, targets, centers=centers)
    for field in ("labels", "positive", "matched", "ignore"):
        yield Check(f"assign {field}, stored inputs", mismatches(getattr(got, field), getattr(stored, field)), 0)
    for field in ("boxes", "quality"):
        yield Check(f"assign {field}, stored inputs", relative_error(getattr(got, field), getattr(stored, field)), 1e-5)
    differ = np.asarray((end_to_end.labels != stored.labels) | (end_to_end.matched != stored.matched)).sum(1)
    yield Check("assign, end to end: priors an image", float(differ.max()), 1)


def loss_checks(arrays, trained: DetectorOutput, losses, end_to_end) -> Checks:
    want = below(arrays, "train/loss")
    sizes = np.cumsum([m.shape[1] * m.shape[2] for m in trained.cls_logits])[:-1]
    yield Check("names of losses", float(len(set(want) ^ {*losses, "total"})), 0)
    for name, one in losses.items():
        got = np.array([part.sum() for part in np.split(one, sizes, axis=1)]) if one.ndim else one
        by_level = " by level" if one.ndim else ""
        yield Check(f"{name}{by_level}, stored targets", relative_error(got, want[name]), 1e-4)
        ours = end_to_end[{"loss_bbox": "loss_box"}.get(name, name)]
        yield Check(f"{name}, end to end", relative_error(ours, want[name].sum()), 1e-3)
    total = sum(one.sum() for one in losses.values())
    yield Check("loss total, stored targets", relative_error(total, want["total"]), 1e-4)
    yield Check("loss total, end to end", relative_error(sum(end_to_end.values()), want["total"]), 1e-3)


def gradient_checks(detector, arrays, params_gradient, neck_gradient) -> Checks:
    got = fill.to_torch(detector, params_gradient, jax.tree.map(lambda leaf: np.zeros(leaf.shape), detector.shapes[1]))
    for name, value in below(arrays, "grad").items():
        yield Check(f"grad/{name}", relative_error(got[name], value), 2e-2)
    norms = dict(zip(map(str, arrays["grad_norm/names"]), arrays["grad_norm/values"], strict=True))
    ours = [names[0] for path, names in torch_names.table(detector).items() if path.startswith("params/")]
    yield Check("grad_norm: names", float(len(set(ours) ^ set(norms))), 0)
    values = np.array([np.linalg.norm(np.asarray(got[name], np.float64)) for name in norms])
    yield Check("grad_norm", relative_error(values, np.array(list(norms.values()))), 2e-2)
    yield levels("grad_neck", neck_gradient, maps_of(arrays, "grad_neck"), 2e-2)


CHECKS = [("model/rtmdet_*.npz", replay_rtmdet), ("model/head_rtmdet_*.npz", replay_head)]
