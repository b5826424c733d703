"""Replays `kd/crosskd_*.npz` and `kd/ld_*.npz`: what stored tensors show of the losses of whole steps.

The detectors of these files come with a later issue. Until then their heads' convolutions, anchors and box codes are
written out here, next to the losses that are under test.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import nn
from kdjax.boxes import coding, iou
from kdjax.losses import box, cross, feature, localization, logits
from tests.golden_checks.api import LATER_DENSE, Check, Checks, UnknownCase, load, relative_error
from tests.golden_checks.kd import convolution, nhwc

LOSS, OUTPUT = 1e-4, 1e-4  # relative: losses of a whole model given the stored tensors; raw outputs
PREDICTORS = {"GFL": ("gfl_cls", "gfl_reg"), "ATSS": ("atss_cls", "atss_reg"), "FCOS": ("conv_cls", "conv_reg")}
PREDICTORS["RetinaNet"] = ("retina_cls", "retina_reg")


def levels(arrays, prefix: str) -> list[np.ndarray]:
    """Maps by level, channels last."""
    return [nhwc(arrays[f"{prefix}/{i}"]) for i in range(sum(k.startswith(prefix + "/") for k in arrays))]


def rows(x, width: int) -> jnp.ndarray:
    """f32[B, H W A, width] from f32[B, H, W, A * width]."""
    return jnp.asarray(x).reshape(len(x), -1, width)


def padded_ground_truth(arrays, pictures: int) -> tuple[np.ndarray, np.ndarray]:
    found = [arrays[f"gt/{i}/bboxes"] for i in range(pictures)]
    boxes = np.zeros((pictures, max(map(len, found)) + 1, 4), np.float32)
    valid = np.zeros(boxes.shape[:2], bool)
    for i, rows_ in enumerate(found):
        boxes[i, : len(rows_)], valid[i, : len(rows_)] = rows_, True
    return boxes, valid


def anchors_of(generator: dict, sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """mmdetection's anchors by level f32[H W A, 4]: centres on the cells' corners, ratios outside, scales inside."""
    octaves = generator["scales_per_octave"]
    scales = generator["octave_base_scale"] * 2 ** (np.arange(octaves) / octaves)
    found = []
    for stride, (height, width) in zip(generator["strides"], sizes, strict=True):
        roots = np.sqrt(np.array(generator["ratios"]))[:, None]
        half = np.stack([(stride / roots * scales).ravel(), (stride * roots * scales).ravel()], -1) / 2
        centres = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).reshape(-1, 1, 2) * stride
        found.append(np.concatenate([centres - half, centres + half], -1).reshape(-1, 4).astype(np.float32))
    return found


def decode_deltas(anchors, deltas, coder: dict):
    deltas = deltas * jnp.array(coder["target_stds"]) + jnp.array(coder["target_means"])
    size = anchors[..., 2:] - anchors[..., :2]
    centre = (anchors[..., :2] + anchors[..., 2:]) / 2 + deltas[..., :2] * size
    limit = abs(np.log(16 / 1000))
    half = size * jnp.exp(jnp.clip(deltas[..., 2:], -limit, limit)) / 2
    return jnp.concatenate([centre - half, centre + half], -1)


def atss_positives(anchors: list[np.ndarray], boxes, valid, topk: int) -> np.ndarray:
    """bool[B, N]: candidates above the threshold of their box whose centre lies inside it."""
    flat = np.concatenate(anchors)
    index, overlap, threshold = localization.candidates(flat, boxes, [len(a) for a in anchors], topk=topk)
    centre = ((flat[:, :2] + flat[:, 2:]) / 2)[np.asarray(index)]
    inside = np.minimum(centre - boxes[:, :, None, :2], boxes[:, :, None, 2:] - centre).min(-1) > 0.01
    chosen = (np.asarray(overlap) >= np.asarray(threshold)[..., None]) & inside & valid[..., None]
    positive = np.zeros((len(boxes), len(flat)), bool)
    for picture, *_ in np.argwhere(chosen)[:, :1]:
        positive[picture, np.asarray(index)[picture][chosen[picture]]] = True
    return positive


def ignored_by_overlap(anchors: list[np.ndarray], boxes, valid, assigner: dict) -> np.ndarray:
    """bool[B, N]: anchors between the two thresholds of a `MaxIoUAssigner` that are no box's best one."""
    overlap = np.where(valid[..., None], np.asarray(iou.pairwise(boxes, np.concatenate(anchors))), -1)
    best = np.any(valid[..., None] & (overlap == overlap.max(-1, keepdims=True)), 1)
    largest = overlap.max(1)
    return (largest >= assigner["neg_iou_thr"]) & (largest < assigner["pos_iou_thr"]) & ~best


def group_norm(x, scale, bias, groups: int):
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    grouped = feature.standardize(grouped, axes=(1, 2, 4), eps=0.0, variance_eps=1e-5)
    return grouped.reshape(x.shape) * scale + bias


def tower_conv(weights, branch: str, index: int, x, groups: int | None):
    """Convolution `index` of a branch with its norm, before the activation."""
    name = f"bbox_head.{branch}_convs.{index}"
    kernel = np.transpose(weights[f"{name}.conv.weight"], (2, 3, 1, 0))
    x = nn.conv2d(jnp.asarray(x), kernel, weights.get(f"{name}.conv.bias"))
    return group_norm(x, weights[f"{name}.gn.weight"], weights[f"{name}.gn.bias"], groups) if groups else x


def reused(kind: str, head: dict, start: int, student, teacher, student_map, teacher_map, level: int) -> dict:
    """CrossKD's predictions: the student's tower up to conv `start`, aligned, then the rest of the teacher's head."""
    groups = head["norm_cfg"]["num_groups"] if "norm_cfg" in head else None
    towers = {}
    for branch in ("cls", "reg"):
        maps = []
        for weights, x in ((student, student_map), (teacher, teacher_map)):
            for i in range(start):
                # The code takes the map before the activation, but its ReLU works in place and changes that map too.
                x = jax.nn.relu(tower_conv(weights, branch, i, x, groups))
            maps.append(jnp.asarray(x))
        x = jax.nn.relu(cross.align(*maps)) if start else cross.align(*maps)
        for i in range(start, head["stacked_convs"]):
            x = jax.nn.relu(tower_conv(teacher, branch, i, x, groups))
        towers[branch] = x
    names = dict(zip(("cls", "reg"), PREDICTORS[kind], strict=True))
    found = {b: nn.conv2d(towers[b], **convolution(teacher, f"bbox_head.{names[b]}")) for b in names}
    found["reg"] = found["reg"] * teacher.get(f"bbox_head.scales.{level}.scale", 1.0)
    if kind == "FCOS":
        found["reg"] = jnp.exp(found["reg"])
    centreness = {"FCOS": ("conv_centerness", "cls"), "ATSS": ("atss_centerness", "reg")}
    if kind in centreness:
        name, branch = centreness[kind]
        found["centreness"] = nn.conv2d(towers[branch], **convolution(teacher, f"bbox_head.{name}"))
    return found


def crosskd(path: Path) -> Checks:
    arrays, meta = load(path)
    kind, head, kd = meta["student_cfg"]["type"], meta["student_cfg"]["bbox_head"], meta["kd_cfg"]
    if kind not in PREDICTORS:
        raise UnknownCase(f"no check for a step of {kind!r}")
    yield Check("whole step", skip=LATER_DENSE)
    parts = ["cls", "reg", "centreness", "neck"] if kind in ("FCOS", "ATSS") else ["cls", "reg", "neck"]
    names = [f"{who} {part}" for who in ("teacher", "student") for part in parts]
    names += [f"reused {part}" for part in parts if part != "neck"]
    args = {name: levels(arrays, f"loss_by_feat_args/{i}") for i, name in enumerate(names)}
    stored = {k[11:]: v for k, v in arrays.items() if k.startswith("train/loss/")}

    weights = [{k[8:]: v for k, v in arrays.items() if k.startswith(f"{who}/")} for who in ("student", "teacher")]
    for level, maps in enumerate(zip(args["student neck"], args["teacher neck"], strict=True)):
        found = reused(kind, head, kd["reused_teacher_head_idx"], *weights, *maps, level)
        for name, value in found.items():
            error = relative_error(value, args[f"reused {name}"][level])
            yield Check(f"reused {name} {level}", error, OUTPUT)

    weight = kd["loss_feat_kd"]["loss_weight"]
    pkd = [
        weight * float(jnp.mean(feature.pearson(s, t, ddof=1)))
        for s, t in zip(args["student neck"], args["teacher neck"], strict=True)
    ]
    if "loss_feat_kd" not in stored:
        stored["loss_feat_kd"] = np.array([stored[f"loss_feat_kd_{i}"] for i in range(len(pkd))])
    for level, (got, want) in enumerate(zip(pkd, stored["loss_feat_kd"], strict=True)):
        yield Check(f"feature term {level}", relative_error(got, want), LOSS)
    yield from crosskd_heads(kind, head, kd, meta, arrays, args, stored)


def crosskd_heads(kind: str, head: dict, kd: dict, meta: dict, arrays, args, stored) -> Checks:
    pictures, classes = len(arrays["input"]), head["num_classes"]
    boxes, valid = padded_ground_truth(arrays, pictures)
    sizes = [x.shape[1:3] for x in args["teacher cls"]]
    student, teacher = args["reused cls"], args["teacher cls"]
    pairs = [(rows(s, classes), rows(t, classes)) for s, t in zip(student, teacher, strict=True)]
    scored = [np.ones(s.shape[:2], np.float32) for s, _ in pairs]
    if kind == "FCOS":
        yield from fcos_heads(head, kd, args, stored, pairs, sizes)
        return
    anchors = anchors_of(head["anchor_generator"], sizes)
    assigner = meta["student_cfg"]["train_cfg"]["assigner"]
    cut = np.cumsum([len(a) for a in anchors])[:-1]
    if kind == "RetinaNet":
        ignored = ignored_by_overlap(anchors, boxes, valid, assigner)
        scored = np.split(1 - ignored.astype(np.float32), cut, axis=1)
    else:
        positive = atss_positives(anchors, boxes, valid, assigner["topk"])
    beta = kd["loss_cls_kd"]["beta"]
    classification = [
        kd["loss_cls_kd"]["loss_weight"] * float(jnp.sum(w[..., None] * logits.modulated_bce(s, t, beta=beta)))
        for (s, t), w in zip(pairs, scored, strict=True)
    ]
    if kind == "RetinaNet":  # exact ties of overlaps make the number of positives hang on rounding: it must be whole
        count = sum(classification) / stored["loss_cls_kd"].sum()
        yield Check("number of positives is whole", abs(count - round(count)) / count, LOSS)
    else:
        count = np.maximum(positive.sum(1), 1).sum()
    yield Check("class term", relative_error(np.array(classification) / count, stored["loss_cls_kd"]), LOSS)

    confidence = [w * np.asarray(jax.nn.sigmoid(t).max(-1)) for (_, t), w in zip(pairs, scored, strict=True)]
    weight = kd["loss_reg_kd"]["loss_weight"]
    boxwise = []
    for level, (s, t) in enumerate(zip(args["reused reg"], args["teacher reg"], strict=True)):
        if kind == "GFL":
            bins = head["reg_max"] + 1
            s, t = (jnp.asarray(x).reshape(pictures, -1, 4, bins) for x in (s, t))
            options = {"temperature": kd["loss_reg_kd"]["T"], "class_reduction": kd["loss_reg_kd"]["class_reduction"]}
            distance = jnp.mean(logits.softmax_kl(s, t, **options), -1)
        else:
            distance = box.giou(*(decode_deltas(anchors[level], rows(x, 4), head["bbox_coder"]) for x in (s, t)))
        boxwise.append(weight * float(jnp.sum(confidence[level] * distance)))
    count_boxes = sum(c.sum() for c in confidence) if kind == "GFL" else count
    yield Check("box term", relative_error(np.array(boxwise) / count_boxes, stored["loss_reg_kd"]), LOSS)

    if kind == "ATSS":
        centreness = []
        parts = zip(args["reused centreness"], args["teacher centreness"], np.split(positive, cut, axis=1), strict=True)
        for s, t, p in parts:
            s, t = rows(s, 1)[..., 0], rows(t, 1)[..., 0]
            cross_entropy = jax.nn.softplus(s) - jax.nn.sigmoid(t) * s
            centreness.append(kd["loss_center_kd"]["loss_weight"] * float(jnp.sum(p * cross_entropy)) / count)
        yield Check("centreness term", relative_error(np.array(centreness), stored["losses_center_kd"]), LOSS)


def fcos_heads(head: dict, kd: dict, args, stored, pairs, sizes) -> Checks:
    """Both terms are sums over one normaliser that only FCOS's targets tell: it must be the same in both."""
    classification = boxwise = 0.0
    for level, (s, t) in enumerate(pairs):
        height, width = sizes[level]
        stride = head["strides"][level]
        points = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).reshape(-1, 2) * stride + stride / 2
        reg = [coding.distance_to_boxes(points, rows(args[f"{who} reg"][level], 4)) for who in ("reused", "teacher")]
        confidence = jax.nn.sigmoid(t).max(-1)
        classification += float(jnp.sum(logits.modulated_bce(s, t, beta=kd["loss_cls_kd"]["beta"])))
        boxwise += float(jnp.sum(confidence * box.iou(*reg, form="log")))
    of_class = kd["loss_cls_kd"]["loss_weight"] * classification / stored["loss_cls_kd"]
    of_boxes = kd["loss_reg_kd"]["loss_weight"] * boxwise / stored["loss_reg_kd"]
    yield Check("class and box terms share their normaliser", relative_error(of_class, of_boxes), LOSS)


def ld(path: Path) -> Checks:
    arrays, meta = load(path)
    head, config = meta["student_cfg"]["bbox_head"], meta["loss_ld"]
    if meta["student_cfg"]["type"] != "GFL":
        raise UnknownCase(f"no check for a step of {meta['student_cfg']['type']!r}")
    yield Check("whole step", skip=LATER_DENSE)
    classes, bins, pictures = head["num_classes"], head["reg_max"] + 1, len(arrays["input"])
    out = {(who, of): levels(arrays, f"{who}_out/{of}") for who in ("student", "teacher") for of in ("cls", "reg")}
    boxes, valid = padded_ground_truth(arrays, pictures)
    anchors = anchors_of(head["anchor_generator"], [x.shape[1:3] for x in out["student", "cls"]])
    topk = meta["student_cfg"]["train_cfg"]["assigner"]["topk"]
    positive = atss_positives(anchors, boxes, valid, topk)
    found = []
    parts = zip(*out.values(), np.split(positive, np.cumsum([len(a) for a in anchors])[:-1], axis=1), strict=True)
    for student_cls, student_reg, _, teacher_reg, mask in parts:
        edges = [jnp.asarray(x).reshape(pictures, -1, 4, bins) for x in (student_reg, teacher_reg)]
        kl = logits.softmax_kl(*edges, temperature=config["T"], class_reduction="mean")
        confidence = jax.nn.sigmoid(rows(student_cls, classes)).max(-1)
        # The original sums over the batch instead of dividing by the weights: normalizer="sum".
        found.append(config["loss_weight"] * float(jnp.sum(mask * confidence * jnp.mean(kl, -1))))
    yield Check("localisation term", relative_error(np.array(found), arrays["train/loss/loss_ld"]), LOSS)


CHECKS = [("kd/crosskd_*.npz", crosskd), ("kd/ld_*.npz", ld)]
