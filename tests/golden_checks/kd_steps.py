"""Replays `kd/crosskd_*.npz` and `kd/ld_*.npz`: losses and methods of whole steps, computed from stored tensors.

Heads, anchors and box codes are written out here, so that only losses and methods are under test. `whole_steps.py`
replays the same files from the images on, with kdjax's detectors.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import methods, nn
from kdjax.boxes import assign, coding, iou
from kdjax.distill import Context
from kdjax.losses import box, classification, distance, divergence, normalization
from kdjax.structs import Assignment, DetectorOutput, Rows, Targets
from tests.golden_checks.api import Check, Checks, UnknownCase, load, relative_error
from tests.golden_checks.kd import convolution, nhwc

LOSS, OUTPUT = 1e-4, 1e-4  # relative: losses of a whole model given the stored tensors; raw outputs
PREDICTORS = {"GFL": ("gfl_cls", "gfl_reg"), "ATSS": ("atss_cls", "atss_reg"), "FCOS": ("conv_cls", "conv_reg")}
PREDICTORS["RetinaNet"] = ("retina_cls", "retina_reg")


def levels(arrays, prefix: str) -> list[np.ndarray]:
    """Maps by level, channels last."""
    return [nhwc(arrays[f"{prefix}/{i}"]) for i in range(sum(k.startswith(prefix + "/") for k in arrays))]


def rows(maps: list[np.ndarray], width: int) -> np.ndarray:
    """f32[B, N, width]: the predictions [B, H, W, A * width] of all levels."""
    return np.concatenate([x.reshape(len(x), -1, width) for x in maps], 1)


def by_level(x, counts: list[int]) -> np.ndarray:
    """Sums over images and priors of [B, N, ...], one a level."""
    parts = np.split(np.asarray(x, np.float64), np.cumsum(counts)[:-1], axis=1)
    return np.array([part.sum() for part in parts])


def padded_ground_truth(arrays, images: int) -> tuple[np.ndarray, np.ndarray]:
    found = [arrays[f"gt/{i}/bboxes"] for i in range(images)]
    boxes = np.zeros((images, max(map(len, found)) + 1, 4), np.float32)
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
    sizes = [len(a) for a in anchors]
    index, _, overlap, threshold = assign.atss_candidates(flat, boxes, level_sizes=sizes, topk=topk)
    centre = ((flat[:, :2] + flat[:, 2:]) / 2)[np.asarray(index)]
    inside = np.minimum(centre - boxes[:, :, None, :2], boxes[:, :, None, 2:] - centre).min(-1) > 0.01
    chosen = (np.asarray(overlap) >= np.asarray(threshold)[..., None]) & inside & valid[..., None]
    positive = np.zeros((len(boxes), len(flat)), bool)
    for image, *_ in np.argwhere(chosen)[:, :1]:
        positive[image, np.asarray(index)[image][chosen[image]]] = True
    return positive


def ignored_by_overlap(anchors: list[np.ndarray], boxes, valid, assigner: dict) -> np.ndarray:
    """bool[B, N]: anchors between the two thresholds of a `MaxIoUAssigner` that are no box's best one."""
    overlap = np.where(valid[..., None], np.asarray(iou.pairwise_iou(boxes, np.concatenate(anchors))), -1)
    best = np.any(valid[..., None] & (overlap == overlap.max(-1, keepdims=True)), 1)
    largest = overlap.max(1)
    return (largest >= assigner["neg_iou_thr"]) & (largest < assigner["pos_iou_thr"]) & ~best


def group_norm(x, scale, bias, groups: int):
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    grouped = normalization.standardize(grouped, axes=(1, 2, 4), eps=0.0, variance_eps=1e-5)
    return grouped.reshape(x.shape) * scale + bias


def tower_conv(weights, branch: str, index: int, x, groups: int | None):
    """Convolution `index` of a branch with its norm, before the activation."""
    name = f"bbox_head.{branch}_convs.{index}"
    kernel = np.transpose(weights[f"{name}.conv.weight"], (2, 3, 1, 0))
    x = nn.conv2d(jnp.asarray(x), kernel, weights.get(f"{name}.conv.bias"))
    return group_norm(x, weights[f"{name}.gn.weight"], weights[f"{name}.gn.bias"], groups) if groups else x


def groups_of(head: dict) -> int | None:
    return head["norm_cfg"]["num_groups"] if "norm_cfg" in head else None


def tower(weights, head: dict, branch: str, x) -> list[jnp.ndarray]:
    """The maps of one level behind each convolution of a branch, before the activation."""
    found = []
    for i in range(head["stacked_convs"]):
        found.append(tower_conv(weights, branch, i, jax.nn.relu(found[-1]) if found else x, groups_of(head)))
    return found


def rest_of_head(kind: str, head: dict, weights, branch: str, start: int, x, level: int) -> dict:
    """The predictions of a branch from the map behind its convolution `start` (or the neck's, 0) on, by name."""
    x = jax.nn.relu(x) if start else x
    for i in range(start, head["stacked_convs"]):
        x = jax.nn.relu(tower_conv(weights, branch, i, x, groups_of(head)))
    name = dict(zip(("cls", "reg"), PREDICTORS[kind], strict=True))[branch]
    found = {branch: nn.conv2d(x, **convolution(weights, f"bbox_head.{name}"))}
    if branch == "reg":
        found["reg"] = found["reg"] * weights.get(f"bbox_head.scales.{level}.scale", 1.0)
        if kind == "FCOS":
            found["reg"] = jax.nn.relu(found["reg"]) if head.get("norm_on_bbox") else jnp.exp(found["reg"])
    on_reg = "reg" if head.get("centerness_on_reg") else "cls"
    centreness = {"FCOS": ("conv_centerness", on_reg), "ATSS": ("atss_centerness", "reg")}
    if kind in centreness and centreness[kind][1] == branch:
        found["centreness"] = nn.conv2d(x, **convolution(weights, f"bbox_head.{centreness[kind][0]}"))
    return found


def reused(kind: str, head: dict, start: int, student, teacher, student_map, teacher_map, level: int) -> dict:
    """CrossKD's predictions: the student's tower up to conv `start`, aligned, then the rest of the teacher's head."""
    found = {}
    for branch in ("cls", "reg"):
        maps = [jnp.asarray(student_map), jnp.asarray(teacher_map)]
        if start:
            # The code takes the map before the activation, but its ReLU works in place and changes that map too.
            maps = [
                jax.nn.relu(tower(weights, head, branch, x)[start - 1])
                for weights, x in zip((student, teacher), maps, strict=True)
            ]
        found |= rest_of_head(kind, head, teacher, branch, start, normalization.match_statistics(*maps), level)
    return found


def crosskd(path: Path) -> Checks:
    arrays, meta = load(path)
    kind, head, kd = meta["student_cfg"]["type"], meta["student_cfg"]["bbox_head"], meta["kd_cfg"]
    if kind not in PREDICTORS:
        raise UnknownCase(f"no check for a step of {kind!r}")
    parts = ["cls", "reg", "centreness", "neck"] if kind in ("FCOS", "ATSS") else ["cls", "reg", "neck"]
    names = [f"{who} {part}" for who in ("teacher", "student") for part in parts]
    names += [f"reused {part}" for part in parts if part != "neck"]
    args = {name: levels(arrays, f"loss_by_feat_args/{i}") for i, name in enumerate(names)}
    stored = {k[11:]: v for k, v in arrays.items() if k.startswith("train/loss/")}

    weights = [{k[8:]: v for k, v in arrays.items() if k.startswith(f"{who}/")} for who in ("student", "teacher")]

    @jax.jit
    def of_necks(student, teacher):
        """The reused predictions and PKD, by level."""
        necks = list(zip(student, teacher, strict=True))
        start = kd["reused_teacher_head_idx"]
        predictions = [reused(kind, head, start, *weights, *maps, level) for level, maps in enumerate(necks)]
        return predictions, [jnp.mean(distance.pearson(*maps, ddof=1)) for maps in necks]

    predictions, pkd = of_necks(args["student neck"], args["teacher neck"])
    for level, found in enumerate(predictions):
        for name, value in found.items():
            error = relative_error(value, args[f"reused {name}"][level])
            yield Check(f"reused {name} {level}", error, OUTPUT)
    pkd = kd["loss_feat_kd"]["loss_weight"] * np.array(pkd)
    if "loss_feat_kd" not in stored:
        stored["loss_feat_kd"] = np.array([stored[f"loss_feat_kd_{i}"] for i in range(len(pkd))])
    for level, (got, want) in enumerate(zip(pkd, stored["loss_feat_kd"], strict=True)):
        yield Check(f"feature term {level}", relative_error(got, want), LOSS)
    yield from crosskd_heads(kind, head, kd, meta, arrays, args, stored)
    yield from crosskd_method(kind, head, kd, meta, arrays, args, stored, *weights)


def crosskd_method(kind: str, head: dict, kd: dict, meta: dict, arrays, args, stored, *weights) -> Checks:
    """The method `crosskd` itself, from the necks on, with the heads above as those of detectors."""
    if head["stacked_convs"] - 1 != kd["reused_teacher_head_idx"]:
        raise UnknownCase("no check for a cut elsewhere than behind the last but one convolution")
    sizes = [x.shape[1:3] for x in args["teacher cls"]]
    strides, decode = box_decoder(kind, head, sizes)
    boxes, valid = padded_ground_truth(arrays, len(arrays["input"]))
    assigner = (meta["student_cfg"].get("train_cfg") or {}).get("assigner")
    anchors = [np.repeat(p, 9, 0) if kind == "RetinaNet" else p for p in priors_of(strides, sizes)]
    shape = len(arrays["input"]), sum(map(len, anchors))
    positive, ignore = np.zeros(shape, bool), np.zeros(shape, bool)
    if kind == "RetinaNet":
        ignore = ignored_by_overlap(anchors_of(head["anchor_generator"], sizes), boxes, valid, assigner)
    elif kind != "FCOS":
        positive = atss_positives(anchors_of(head["anchor_generator"], sizes), boxes, valid, assigner["topk"])

    def detector(who: str, variables) -> DetectorOutput:
        necks = args[f"{who} neck"]
        towers = {
            f"{branch}_tower": tuple(zip(*(tower(variables, head, branch, jnp.asarray(x)) for x in necks), strict=True))
            for branch in ("cls", "reg")
        }
        cls, reg = (tuple(jnp.asarray(x) for x in args[f"{who} {part}"]) for part in ("cls", "reg"))
        return DetectorOutput(strides=strides, neck=tuple(necks), cls_logits=cls, box_reg=reg, **towers)

    def teacher_head(features, *, branch: str, start: int):
        levels_ = enumerate(features)
        return tuple(rest_of_head(kind, head, weights[1], branch, start, x, i)[branch] for i, x in levels_)

    def boxes_of(maps):
        return decode(DetectorOutput(strides=strides, box_reg=maps))

    def apply():
        context = context_of(
            *(detector(who, v) for who, v in zip(("student", "teacher"), weights, strict=True)),
            *(boxes, valid, positive, ignore, np.concatenate(anchors)),
        )._replace(teacher_head=teacher_head, teacher_boxes=boxes_of)
        return method.apply({"cls": {}, "reg": {}}, context)

    loss = kd["loss_reg_kd"]["type"]
    method = methods.build("crosskd", rectify=True, box_loss="log_iou" if loss == "IoULoss" else "giou")
    terms = jax.jit(apply)()
    got = np.array([terms["classes"], terms["boxes"]], np.float64)
    got *= [kd["loss_cls_kd"]["loss_weight"], kd["loss_reg_kd"]["loss_weight"]]
    want = np.array([np.sum(stored["loss_cls_kd"]), np.sum(stored["loss_reg_kd"])])
    if kind in ("FCOS", "RetinaNet"):  # another normaliser, or one that depends on rounding: the same in both terms
        error = relative_error(got[0] / got[1], want[0] / want[1])
        yield Check("method: class term over box term", error, LOSS)
    else:
        yield Check("method: class term", relative_error(got[0], want[0]), LOSS)
        yield Check("method: box term", relative_error(got[1], want[1]), LOSS)


def priors_of(strides: tuple[int, ...], sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """f32[H W, 4] by level: x, y and the stride twice, of priors on the cells' corners."""
    grids = [np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1).reshape(-1, 2) for h, w in sizes]
    return [
        np.concatenate([grid * stride, np.full_like(grid, stride)], -1).astype(np.float32)
        for grid, stride in zip(grids, strides, strict=True)
    ]


def box_decoder(kind: str, head: dict, sizes: list[tuple[int, int]]):
    """The strides of a detector, and the function of its output that gives boxes f32[B, N, 4]."""
    if kind == "FCOS":
        points = fcos_points(head["strides"], sizes)
        return tuple(head["strides"]), lambda out: coding.distance_to_boxes(points, joined(out.box_reg, 4))
    generator = head["anchor_generator"]
    flat = np.concatenate(anchors_of(generator, sizes))
    return tuple(generator["strides"]), lambda out: decode_deltas(flat, joined(out.box_reg, 4), head["bbox_coder"])


def joined(maps, width: int):
    return jnp.concatenate([x.reshape(len(x), -1, width) for x in maps], 1)


def rows_of(output: DetectorOutput, priors: np.ndarray) -> Rows:
    """The predictions as rows, without boxes: CrossKD decodes them with `Context.teacher_boxes`."""
    sizes = [m.shape[1] * m.shape[2] for m in output.cls_logits]
    of_cell = len(priors) // sum(sizes)
    width = output.box_reg[0].shape[-1] // of_cell
    edges = joined(output.box_reg, width)
    return Rows(
        logits=joined(output.cls_logits, output.cls_logits[0].shape[-1] // of_cell),
        distribution=edges.reshape(*edges.shape[:2], 4, -1) if width > 4 else None,
        location=jnp.asarray(priors),
        level_sizes=tuple(of_cell * n for n in sizes),
    )


def context_of(student, teacher, boxes, valid, positive, ignore, priors) -> Context:
    """The context of such a step; of the assignment, only the masks are set."""
    none, no_boxes = jnp.zeros(positive.shape, jnp.int32), jnp.zeros((*positive.shape, 4))
    size = jnp.zeros((len(boxes), 2), jnp.int32)
    return Context(
        student=student,
        teacher=teacher,
        student_rows=rows_of(student, priors),
        teacher_rows=rows_of(teacher, priors),
        targets=Targets(jnp.asarray(boxes), jnp.zeros(valid.shape, jnp.int32), jnp.asarray(valid), size, size),
        assignment=Assignment(none, jnp.asarray(positive), jnp.asarray(ignore), none, no_boxes, none),
        key=jax.random.PRNGKey(0),
        **dict.fromkeys(("assign", "teacher_head", "teacher_boxes", "proposals", "loss", "learned")),
    )


def crosskd_heads(kind: str, head: dict, kd: dict, meta: dict, arrays, args, stored) -> Checks:
    images, classes = len(arrays["input"]), head["num_classes"]
    sizes = [x.shape[1:3] for x in args["teacher cls"]]
    cls = rows(args["reused cls"], classes), rows(args["teacher cls"], classes)
    beta = kd["loss_cls_kd"]["beta"]
    by_class = kd["loss_cls_kd"]["loss_weight"] * jax.jit(lambda s, t: classification.modulated_bce(s, t, beta=beta))(
        *cls
    )
    confidence = np.asarray(jax.nn.sigmoid(cls[1]).max(-1))
    weight = kd["loss_reg_kd"]["loss_weight"]
    box_losses = {"GIoULoss": box.giou, "IoULoss": functools.partial(box.iou, form="log")}
    if kind == "FCOS":
        points = fcos_points(head["strides"], sizes)
        reg = [coding.distance_to_boxes(points, rows(args[f"{who} reg"], 4)) for who in ("reused", "teacher")]
        count = fcos_centreness(points, [h * w for h, w in sizes], *padded_ground_truth(arrays, images)).sum()
        box_term = weight * np.sum(confidence * box_losses[kd["loss_reg_kd"]["type"]](*reg))
        yield Check("class term", relative_error(np.sum(by_class) / count, stored["loss_cls_kd"]), LOSS)
        yield Check("box term", relative_error(box_term / count, stored["loss_reg_kd"]), LOSS)
        return
    boxes, valid = padded_ground_truth(arrays, images)
    anchors = anchors_of(head["anchor_generator"], sizes)
    counts = [len(a) for a in anchors]
    assigner = meta["student_cfg"]["train_cfg"]["assigner"]
    if kind == "RetinaNet":
        scored = ~ignored_by_overlap(anchors, boxes, valid, assigner)
        by_class, confidence = by_class * scored[..., None], confidence * scored
    class_term = by_level(by_class, counts)
    if kind == "RetinaNet":  # exact ties of overlaps make the number of positives depend on rounding: it must be whole
        count = class_term.sum() / stored["loss_cls_kd"].sum()
        yield Check("number of positives is whole", abs(count - round(count)) / count, LOSS)
    else:
        positive = atss_positives(anchors, boxes, valid, assigner["topk"])
        count = np.maximum(positive.sum(1), 1).sum()
    yield Check("class term", relative_error(class_term / count, stored["loss_cls_kd"]), LOSS)

    if kind == "GFL":
        bins = head["reg_max"] + 1
        reg = [rows(args[f"{who} reg"], 4 * bins).reshape(images, -1, 4, bins) for who in ("reused", "teacher")]
        options = {"temperature": kd["loss_reg_kd"]["T"], "class_reduction": kd["loss_reg_kd"]["class_reduction"]}
        distance = jax.jit(lambda s, t: jnp.mean(divergence.softmax_kl(s, t, **options), -1))(*reg)
        count_boxes = confidence.sum()
    else:
        decode = jax.jit(lambda deltas: decode_deltas(np.concatenate(anchors), deltas, head["bbox_coder"]))
        distance = box_losses[kd["loss_reg_kd"]["type"]](
            *(decode(rows(args[f"{who} reg"], 4)) for who in ("reused", "teacher"))
        )
        count_boxes = count
    box_term = weight * by_level(confidence * distance, counts) / count_boxes
    yield Check("box term", relative_error(box_term, stored["loss_reg_kd"]), LOSS)

    if kind == "ATSS":
        s, t = (rows(args[f"{who} centreness"], 1)[..., 0] for who in ("reused", "teacher"))
        cross_entropy = kd["loss_center_kd"]["loss_weight"] * (jax.nn.softplus(s) - jax.nn.sigmoid(t) * s)
        centreness = by_level(positive * cross_entropy, counts) / count
        yield Check("centreness term", relative_error(centreness, stored["losses_center_kd"]), LOSS)


def fcos_points(strides: list[int], sizes: list[tuple[int, int]]) -> np.ndarray:
    """The middles of the cells of all levels, in pixels."""
    grids = [np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1).reshape(-1, 2) for h, w in sizes]
    return np.concatenate([(grid + 0.5) * stride for grid, stride in zip(grids, strides, strict=True)])


def fcos_centreness(points, counts: list[int], boxes, valid) -> np.ndarray:
    """f64[B, N]: the centreness of each positive point in its box (the smallest that holds it and fits the level)."""
    lower, upper = (np.repeat(limits, counts) for limits in ([-1, 64, 128, 256, 512], [64, 128, 256, 512, np.inf]))
    x, y = (points[:, None, i].astype(np.float64) for i in range(2))
    x1, y1, x2, y2 = (boxes[:, None, :, i] for i in range(4))
    sides = np.stack([x - x1, y - y1, x2 - x, y2 - y], -1)
    longest = sides.max(-1)
    fits = (sides.min(-1) > 0) & (longest >= lower[:, None]) & (longest <= upper[:, None]) & valid[:, None]
    area = np.where(fits, (x2 - x1) * (y2 - y1), np.inf)
    chosen = np.take_along_axis(sides, area.argmin(-1)[..., None, None], 2)[:, :, 0]
    low, high = (reduce(chosen.reshape(*chosen.shape[:2], 2, 2), 2) for reduce in (np.min, np.max))
    ratio = np.where(np.isfinite(area.min(-1)), np.prod(low / high, -1), 0.0)
    return np.sqrt(np.maximum(ratio, 0.0))


def ld(path: Path) -> Checks:
    arrays, meta = load(path)
    head, config = meta["student_cfg"]["bbox_head"], meta["loss_ld"]
    if meta["student_cfg"]["type"] != "GFL":
        raise UnknownCase(f"no check for a step of {meta['student_cfg']['type']!r}")
    bins, images = head["reg_max"] + 1, len(arrays["input"])
    cls = levels(arrays, "student_out/cls")
    reg = [rows(levels(arrays, f"{who}_out/reg"), 4 * bins) for who in ("student", "teacher")]
    edges = [x.reshape(images, -1, 4, bins) for x in reg]
    boxes, valid = padded_ground_truth(arrays, images)
    anchors = anchors_of(head["anchor_generator"], [x.shape[1:3] for x in cls])
    positive = atss_positives(anchors, boxes, valid, meta["student_cfg"]["train_cfg"]["assigner"]["topk"])
    confidence = jax.nn.sigmoid(rows(cls, head["num_classes"])).max(-1)
    kl = jnp.mean(divergence.softmax_kl(*edges, temperature=config["T"], class_reduction="mean"), -1)
    # The original sums over the batch instead of dividing by the weights: normalizer="sum".
    found = config["loss_weight"] * by_level(positive * confidence * kl, [len(a) for a in anchors])
    yield Check("localisation term", relative_error(found, arrays["train/loss/loss_ld"]), LOSS)

    strides = tuple(head["anchor_generator"]["strides"])
    student, teacher = (
        DetectorOutput(
            strides=strides,
            cls_logits=tuple(jnp.asarray(x) for x in levels(arrays, f"{who}_out/cls")),
            box_reg=tuple(jnp.asarray(x) for x in levels(arrays, f"{who}_out/reg")),
        )
        for who in ("student", "teacher")
    )
    priors = np.concatenate(priors_of(strides, [x.shape[1:3] for x in cls]))
    options = {"main_weight": config["loss_weight"], "temperature": config["T"], "normalizer": "sum"}
    method = methods.build("ld", region_weight=0.0, class_weight=0.0, **options)
    context = context_of(student, teacher, boxes, valid, positive, np.zeros_like(positive), priors)
    specs = (dataclasses.replace(out, rows=rows_of(out, priors)) for out in (student, teacher))
    (term,) = method.apply(method.init(None, *specs), context).values()
    weighted = float(term) * method.weights["main"]
    yield Check("method: main term", relative_error(weighted, arrays["train/loss/loss_ld"].sum()), LOSS)


CHECKS = [("kd/crosskd_*.npz", crosskd), ("kd/ld_*.npz", ld)]
