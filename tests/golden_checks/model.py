"""Whole models: features, outputs, running statistics, assignment, losses, gradients and detections of RTMDet."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.boxes import assign, coding, dynamic
from kdjax.detectors import api, rtmdet
from kdjax.detectors.levels import class_logits
from kdjax.structs import Assignment, DetectorOutput, Targets
from kdjax.weights import fill, torch_names
from tests.golden_checks.api import Check, Checks, UnknownCase, below, load, mismatches, relative_error

# Fields of a model's configuration, and the option of `rtmdet.make` that they set.
_OPTIONS = {
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
_FIXED = {
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
# Programs that run once: most of their time is the compiler's.
QUICK = {"xla_backend_optimization_level": 0}
_LAYERS = {"norm_cfg.type": "BN", "act_cfg.type": "SiLU", "act_cfg.inplace": True}


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def options_of(config: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """(number of classes, options of `rtmdet.make`) of a configuration of mmdetection; every field must be known."""
    fixed = _FIXED | {f"{part}.{k}": v for part in ("backbone", "neck", "bbox_head") for k, v in _LAYERS.items()}
    options, classes = {}, 0
    for field, value in leaves(config).items():
        field = field.removeprefix("bbox_head.") if field.startswith("bbox_head.train_cfg") else field
        if field.startswith(("test_cfg.", "bbox_head.test_cfg.")):
            continue  # the settings of each set of detections stand in the file
        if field in _OPTIONS:
            options[_OPTIONS[field]] = value
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


def nhwc(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


def maps_of(arrays: dict[str, np.ndarray], prefix: str) -> tuple[np.ndarray, ...]:
    found = below(arrays, prefix)
    return tuple(nhwc(found[str(level)]) for level in range(len(found)))


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
    return Targets(padded, labels, valid, *sizes)


def _stored_assignment(arrays: dict[str, np.ndarray], classes: int) -> Assignment:
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


def _program(detector: api.Detector, net: api.PureModule) -> Callable:
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
            losses = rtmdet.prior_losses(class_logits(output), rtmdet.decode_boxes(output), stored)
            return sum(jnp.sum(one) for one in losses), (output, new_stats, losses)

        offsets = tuple(jnp.zeros_like(one) for one in evaluated.neck)
        gradient = jax.grad(total, (0, 1), has_aux=True)
        gradients, (trained, new_stats, losses) = gradient(params, offsets)
        assignment = rtmdet.assign_targets(trained, targets)
        end_to_end = rtmdet.loss(trained, targets, assignment)
        return evaluated, reentered, trained, new_stats, losses, gradients, end_to_end, assignment

    return jax.jit(run, compiler_options=QUICK)


def replay_rtmdet(path: Path) -> Checks:
    """All checks of one file of RTMDet."""
    arrays, meta = load(path)
    classes, options = options_of(meta["model_cfg"])
    detector = rtmdet.make("pico", classes, **options)
    params, stats = fill.from_torch(detector, below(arrays, "param"))
    targets, stored = targets_of(arrays), _stored_assignment(arrays, classes)
    priors = detector.priors(arrays["input"].shape[2:])
    x = nhwc(arrays["input"])
    outcome = _program(detector, rtmdet.network(classes, **options))(params, stats, x, targets, stored)
    evaluated, reentered, trained, new_stats, losses, gradients, end_to_end, assignment = jax.device_get(outcome)

    names = {"backbone": "backbone", "neck": "neck", "cls": "cls_logits", "reg": "box_reg"}
    for mode, output, tolerance in (("eval", evaluated, 1e-4), ("train", trained, 2e-3)):
        for name, field in names.items():
            yield levels(f"{mode}/{name}", getattr(output, field), maps_of(arrays, f"{mode}/{name}"), tolerance)
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
    yield from _assignments(arrays, targets, stored, priors, assignment)
    yield from _losses(arrays, trained, losses, end_to_end)
    yield from _gradients(detector, arrays, *gradients)
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
    targets, stored = targets_of(arrays), _stored_assignment(arrays, classes)
    priors = detector.priors(arrays["input"].shape[2:])

    def run(params, stats, eval_neck, train_neck, targets: Targets, stored: Assignment):
        evaluated, _ = net.call(params, stats, lambda module: module.outputs((), eval_neck, (), False))

        def total(neck):
            trained, _ = net.call(params, stats, lambda module: module.outputs((), neck, (), True))
            losses = rtmdet.prior_losses(class_logits(trained), rtmdet.decode_boxes(trained), stored)
            return sum(jnp.sum(one) for one in losses), (trained, losses)

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
    yield from _assignments(arrays, targets, stored, priors, assignment)
    yield from _losses(arrays, trained, losses, end_to_end)
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


def _assignments(arrays, targets: Targets, stored: Assignment, priors, end_to_end: Assignment) -> Checks:
    logits = join(maps_of(arrays, "train/cls"))
    assigner = jax.jit(dynamic.dynamic_soft_label, compiler_options=QUICK)
    got = assigner(logits, arrays["train/decoded_bboxes"], priors, targets)
    for field in ("labels", "positive", "matched", "ignore"):
        yield Check(f"assign {field}, stored inputs", mismatches(getattr(got, field), getattr(stored, field)), 0)
    for field in ("boxes", "quality"):
        yield Check(f"assign {field}, stored inputs", relative_error(getattr(got, field), getattr(stored, field)), 1e-5)
    differ = np.asarray((end_to_end.labels != stored.labels) | (end_to_end.matched != stored.matched)).sum(1)
    yield Check("assign, end to end: priors an image", float(differ.max()), 1)


def _losses(arrays, trained: DetectorOutput, losses, end_to_end) -> Checks:
    want = below(arrays, "train/loss")
    sizes = np.cumsum([m.shape[1] * m.shape[2] for m in trained.cls_logits])[:-1]
    for name, ours, one in zip(("loss_cls", "loss_bbox"), ("loss_cls", "loss_box"), losses, strict=True):
        got = np.array([part.sum() for part in np.split(one, sizes, axis=1)])
        yield Check(f"{name} by level, stored targets", relative_error(got, want[name]), 1e-4)
        yield Check(f"{name}, end to end", relative_error(end_to_end[ours], want[name].sum()), 1e-3)
    yield Check("loss total, stored targets", relative_error(sum(one.sum() for one in losses), want["total"]), 1e-4)
    yield Check("loss total, end to end", relative_error(sum(end_to_end.values()), want["total"]), 1e-3)


def _gradients(detector, arrays, params_gradient, neck_gradient) -> Checks:
    got = fill.to_torch(detector, params_gradient, jax.tree.map(lambda leaf: np.zeros(leaf.shape), detector.shapes[1]))
    for name, value in below(arrays, "grad").items():
        yield Check(f"grad/{name}", relative_error(got[name], value), 2e-2)
    norms = dict(zip(map(str, arrays["grad_norm/names"]), arrays["grad_norm/values"], strict=True))
    ours = [names[0] for path, names in torch_names.table(detector).items() if path.startswith("params/")]
    yield Check("grad_norm: names", float(len(set(ours) ^ set(norms))), 0)
    values = np.array([np.linalg.norm(np.asarray(got[name], np.float64)) for name in norms])
    yield Check("grad_norm", relative_error(values, np.array(list(norms.values()))), 2e-2)
    yield levels("grad_neck", neck_gradient, maps_of(arrays, "grad_neck"), 2e-2)


def detections(detector, arrays, meta, targets: Targets, evaluated: DetectorOutput) -> Checks:
    slim = DetectorOutput(
        strides=evaluated.strides,
        anchors=evaluated.anchors,
        cls_logits=evaluated.cls_logits,
        box_reg=evaluated.box_reg,
        quality=evaluated.quality,
    )
    maps = {field: maps_of(arrays, f"eval/{name}") for name, field in (("cls", "cls_logits"), ("reg", "box_reg"))}
    # A compact file may leave them out.
    stored = dataclasses.replace(slim, **maps, quality=maps_of(arrays, "eval/ctr")) if all(maps.values()) else slim
    sets = sorted({key.split("/")[1] for key in arrays if key.startswith(("pred/", "pred_rescaled/"))})
    for name in sets:
        config = dict(meta["test_cfgs"][name])
        if config.pop("min_bbox_size") != 0 or config["nms"].get("type") != "nms":
            raise UnknownCase(f"test settings {meta['test_cfgs'][name]}")
        settings = {
            "pre_nms": config.pop("nms_pre"),
            "score_threshold": config.pop("score_thr"),
            "iou_threshold": config.pop("nms")["iou_threshold"],
            "max_detections": config.pop("max_per_img"),
        }
        if config:
            raise UnknownCase(f"test settings {config}")
        decode = jax.jit(functools.partial(detector.decode, **settings), compiler_options=QUICK)
        for source, output in (("stored outputs", stored), ("end to end", slim)):
            found = jax.device_get(decode(output, targets.image_size))
            for prefix, scale in (("pred", (1.0, 1.0)), ("pred_rescaled", meta.get("rescale_factor"))):
                want = below(arrays, f"{prefix}/{name}")
                if want:
                    factor = np.array([*scale, *scale], np.float32)
                    error = sum(
                        unexplained(
                            [a[found.valid[i]] for a in (found.boxes[i] / factor, found.scores[i], found.labels[i])],
                            [want[f"{i}/{key}"] for key in ("bboxes", "scores", "labels")],
                            edges=score_edges(stored, i, settings),
                            settings=settings,
                        )
                        for i in range(len(found.valid))
                    )
                    yield Check(f"{prefix}/{name}, {source}: boxes without a match", float(error), 0)


def score_edges(output: DetectorOutput, image: int, settings: dict) -> list[float]:
    """Scores at which a rounding error lets a candidate in or out: the threshold and the last pair of each level.

    With a quality, those are class scores; the final scores of the candidates beside them are what is returned.
    """
    edges = []
    for level, logits in enumerate(output.cls_logits):
        scores = 1 / (1 + np.exp(-logits[image].astype(np.float64)))
        best = np.sort(scores.ravel())[::-1]
        last = [best[settings["pre_nms"] - 1]] if len(best) > settings["pre_nms"] else []
        last.append(settings["score_threshold"])
        if output.quality:
            final = scores / (1 + np.exp(-output.quality[level][image].astype(np.float64)))
            edges += [score for edge in last for score in final[np.abs(scores - edge) <= 1e-4]]
        else:
            edges += last
    return edges


def unexplained(got: list[np.ndarray], want: list[np.ndarray], *, edges: list[float], settings: dict) -> int:
    """How many detections of either side have no partner, and no reason in rounding for it.

    Partners share the label, lie within 1e-2 px and 1e-4 of score. Reasons are: a score within 1e-4 of an edge, or of
    the last kept one where all places are full; an IoU within 1e-4 of the suppression threshold; or suppression by, or
    by the lack of, a box that itself has a reason.
    """
    free = list(range(len(want[0])))
    alone = []  # (box, score, label, whose)
    for box, score, label in zip(*got, strict=True):
        fits = [
            j for j in free
            if want[2][j] == label and abs(want[1][j] - score) <= 1e-4 and np.abs(want[0][j] - box).max() <= 1e-2
        ]  # fmt: skip
        if fits:
            free.remove(min(fits, key=lambda j: np.abs(want[0][j] - box).max()))
        else:
            alone.append((box, score, label))
    alone += [(want[0][j], want[1][j], want[2][j]) for j in free]
    full = max(len(got[0]), len(want[0])) == settings["max_detections"]
    if full:
        edges = [*edges, min(got[1].min(), want[1].min()), max(got[1].min(), want[1].min())]
    everyone = [np.concatenate(pair) for pair in zip(got, want, strict=True)]
    excused: list[tuple] = []

    def reason(box, score, label) -> bool:
        if min((abs(score - edge) for edge in edges), default=1) <= 1e-4:
            return True
        same = everyone[2] == label
        if (np.abs(_iou(box, everyone[0][same]) - settings["iou_threshold"]) <= 1e-4).any():
            return True
        return any(lab == label and _iou(box, b[None])[0] > settings["iou_threshold"] for b, _, lab in excused)

    left = alone
    while left:
        now = [one for one in left if reason(*one)]
        if not now:
            break
        excused += now
        left = [one for one in left if not any(one is other for other in now)]
    return len(left)


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    overlap = np.clip(high - low, 0, None).prod(1)
    area = (others[:, 2:] - others[:, :2]).prod(1)
    return overlap / np.maximum((box[2:] - box[:2]).prod() + area - overlap, 1e-12)


CHECKS = [("model/rtmdet_*.npz", replay_rtmdet), ("model/head_rtmdet_*.npz", replay_head)]
