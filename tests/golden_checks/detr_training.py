"""`ops/hungarian_*`, `ops/detr_losses_*`, `ops/contrastive_dn_*`: what the losses of transformers are made of."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.boxes import convert, edges, iou, matching
from kdjax.detectors import denoising, detr_loss
from kdjax.distill import method
from kdjax.losses import box, classification, distance
from kdjax.nn import resize_bilinear
from kdjax.structs import Queries, Targets
from tests.golden_checks.api import QUICK, Check, Checks, UnknownCase, each_case, mismatches, nhwc, relative_error
from tests.golden_checks.detr_loss import denoising_checks, logit, noised
from tests.golden_checks.ops import only_known

Arrays = Mapping[str, np.ndarray]
VALUE, GRADIENT = 1e-5, 1e-4
MATCHER = {
    "class_cost": "class_weight",
    "bbox_cost": "l1_weight",
    "giou_cost": "giou_weight",
    "alpha": "alpha",
    "gamma": "gamma",
}


def quick(function, *arguments: Any) -> Any:
    return jax.jit(function, compiler_options=QUICK)(*arguments)


def with_slope(function, x: np.ndarray, upstream: np.ndarray) -> tuple[Any, Any]:
    """The value, and its gradient with respect to x."""

    def both(x):
        value, pull_back = jax.vjp(function, x)
        return value, pull_back(upstream)[0]

    return quick(both, x)


def images_of(arrays: Arrays, key: str) -> list[np.ndarray]:
    return [arrays[f"{key}/{i}"] for i in range(sum(name.startswith(f"{key}/") for name in arrays))]


def padded(values: list[np.ndarray], fill: float = 0, spare: int = 2) -> np.ndarray:
    """Arrays of different lengths in one, with padding behind them."""
    size = max(map(len, values)) + spare
    return np.stack([np.pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1), constant_values=fill) for x in values])


def hungarian(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    if what.startswith("linear_sum_assignment"):
        only_known(params)
        cost, valid = arrays["cost"], np.ones(arrays["cost"].shape[1], bool)
        found = np.asarray(quick(matching.hungarian, cost, valid))
        want = np.full(len(valid), -1)
        want[arrays["target"]] = arrays["query"]
        kept = np.flatnonzero(found >= 0)
        yield Check("queries", mismatches(found, want), 0)
        yield Check("sum of the costs", relative_error(cost[found[kept], kept].sum(), arrays["value"]), VALUE)
    elif what.startswith("padded batch"):
        only_known(params)
        valid = np.arange(arrays["cost"].shape[2]) < arrays["num"][:, None]
        found = quick(matching.hungarian, arrays["cost"], valid)
        yield Check("padded queries", mismatches(found, arrays["query_of_target"]), 0)
    elif what.startswith("matcher"):
        only_known(params, *MATCHER, "eps")
        if params["eps"] != 1e-8:
            raise UnknownCase(f"unknown eps {params['eps']}")
        labels, truth = images_of(arrays, "gt_labels"), images_of(arrays, "gt_boxes")
        valid = padded([np.ones(len(x), bool) for x in labels])
        settings = {ours: params[theirs] for theirs, ours in MATCHER.items()}

        def match(logits, boxes, labels, truth):
            cost = matching.matching_cost(logits, boxes, labels, truth, **settings)
            return cost, matching.hungarian(cost, valid)

        given = arrays["logits"], arrays["boxes"], padded(labels), padded(truth, 0.3)
        cost, found = map(np.asarray, quick(match, *given))
        for i, of_image in enumerate(found):
            real = cost[i][:, valid[i]]
            yield Check(f"costs of image {i}", relative_error(real, arrays[f"cost/{i}"]), VALUE)
            want = np.full(len(of_image), -1)
            want[arrays[f"target/{i}"]] = arrays[f"query/{i}"]
            yield Check(f"queries of image {i}", mismatches(of_image, want), 0)
    elif what.startswith("GO-LSD union"):
        only_known(params, "differs_from_lowest_target_rule")
        yield from union(arrays, params["differs_from_lowest_target_rule"])
    else:
        raise UnknownCase(f"no check for {what!r}")


def union(arrays: Arrays, differs: Mapping[str, int]) -> Checks:
    """Queries whose objects were met equally often leave the repository's choice open; kdjax takes the first."""
    keys = [key.split("/") for key in arrays if key.startswith("in/")]
    layers, images = (len({key[i] for key in keys}) for i in (1, 2))
    objects = max(len(arrays[f"in/{s}/{i}/target"]) for s in range(layers) for i in range(images)) + 1
    found = np.full((layers, images, objects), -1)
    queries = 0
    for s in range(layers):
        for i in range(images):
            query, target = arrays[f"in/{s}/{i}/query"], arrays[f"in/{s}/{i}/target"]
            found[s, i, target] = query
            queries = max(queries, query.max(initial=-1) + 2)
    got = np.asarray(quick(lambda found: matching.objects_of(found, int(queries)), found))
    for i in range(images):
        want = np.full(len(got[i]), -1)
        want[arrays[f"union/{i}/query"]] = arrays[f"union/{i}/target"]
        apart = np.flatnonzero(got[i] != want)
        yield Check(f"union of image {i}: ties that differ", abs(len(apart) - differs[str(i)]), 0)
        counts = [[(found[:, i, m] == q).sum() for m in (got[i][q], want[q])] for q in apart]
        wrong = [q for q, (a, b) in zip(apart, counts, strict=True) if a != b or got[i][q] > want[q]]
        yield Check(f"union of image {i}: others", len(wrong) + ((got[i] < 0) != (want < 0)).sum(), 0)


def truth_of(arrays: Arrays, params: Mapping[str, Any]) -> tuple[detr_loss.Truth, np.ndarray]:
    """The objects, and the object of each query, i32[B, Q]."""
    labels, boxes = images_of(arrays, "gt_labels"), images_of(arrays, "gt_boxes")
    first = next(arrays[key] for key in ("logits", "boxes") if key in arrays)
    matched = np.full(first.shape[:2], -1)
    for i, of_image in enumerate(matched):
        of_image[arrays[f"query/{i}"]] = arrays[f"target/{i}"]
    truth = detr_loss.Truth(padded(boxes, 0.3), padded(labels).astype(np.int32), np.float32(params["num_boxes"]))
    return truth, matched


def class_losses(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    truth, matched = truth_of(arrays, params)
    batch = np.arange(len(matched))[:, None]
    labels = np.where(matched >= 0, truth.labels[batch, matched], arrays["logits"].shape[-1])
    wanted = truth.boxes[batch, matched]
    corners = [matching.corners(x) for x in (arrays.get("boxes", wanted), wanted)]
    quality = iou.box_iou(*corners, eps=detr_loss.EPS)
    if what.startswith("varifocal"):
        only_known(params, "alpha", "gamma", "num_boxes")
        loss = lambda x: classification.varifocal(x, labels, quality, alpha=params["alpha"], gamma=params["gamma"])  # noqa: E731
    elif what.startswith("sigmoid focal"):
        only_known(params, "alpha", "gamma", "num_boxes")
        loss = lambda x: classification.sigmoid_focal(x, labels, alpha=params["alpha"], gamma=params["gamma"])  # noqa: E731
    else:
        only_known(params, "gamma", "mal_alpha", "num_boxes")
        settings = {"gamma": params["gamma"]} | ({"alpha": params["mal_alpha"]} if params["mal_alpha"] else {})
        loss = lambda x: classification.matchability_aware(x, labels, quality, **settings)  # noqa: E731
    value, slope = quick(jax.value_and_grad(lambda x: jnp.sum(loss(x)) / truth.count), arrays["logits"])
    name = what.split(" (")[0]
    yield Check(f"{name} value", relative_error(value, arrays["value"]), VALUE)
    yield Check(f"{name} gradient", relative_error(slope, arrays["grad_logits"]), GRADIENT)


def box_losses(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    only_known(params, "num_boxes")
    truth, matched = truth_of(arrays, params)
    logits = np.zeros((*matched.shape, 1), np.float32)

    def both(boxes):
        found = detr_loss.box_losses([Queries(logits, boxes)], matched[None], truth, truth.count)
        return found["l1"][0], found["giou"][0]

    yield from two_losses(both, arrays["boxes"], ("l1", "giou"), arrays)


def two_losses(function, x: np.ndarray, names: tuple[str, str], arrays: Arrays) -> Checks:
    values, slopes = quick(lambda x: (function(x), jax.jacrev(function)(x)), x)
    for name, value, slope in zip(names, values, slopes, strict=True):
        yield Check(f"{name} value", relative_error(value, arrays[name]), VALUE)
        yield Check(f"{name} gradient", relative_error(slope, arrays[f"grad_{name}"]), GRADIENT)


def overlaps(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    only_known(params)

    def overlap(a, mode):
        corners = convert.from_cxcywh(a), convert.from_cxcywh(arrays["b"])
        return iou.pairwise_iou(*corners, mode=mode, eps=detr_loss.EPS)

    value, slope = with_slope(lambda a: overlap(a, "giou"), arrays["a"], arrays["upstream"])
    yield Check("pairwise GIoU", relative_error(value, arrays["giou"]), VALUE)
    yield Check("pairwise GIoU gradient", relative_error(slope, arrays["grad_a_giou"]), GRADIENT)
    yield Check("pairwise IoU", relative_error(quick(lambda a: overlap(a, "iou"), arrays["a"]), arrays["iou"]), VALUE)


def bins_of(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    only_known(params, "bins", "up", "reg_scale")
    bins = np.asarray(quick(lambda: edges.edge_bins(params["bins"], up=params["up"], scale=params["reg_scale"])))
    if what == "W(n)":
        yield Check("bins", relative_error(bins, arrays["value"]), VALUE)
        return

    def place(reference, boxes):
        return edges.nearest_bins(edges.edge_distance(reference, boxes, scale=params["reg_scale"]).reshape(-1), bins)

    left, weight = map(np.asarray, quick(place, arrays["ref"], arrays["gt"]))
    stored = np.minimum(np.floor(arrays["label"]), params["bins"] - 1)
    # A distance that is on a bin, up to rounding, may lie on either side of it.
    at_bin = np.minimum(arrays["weight_right"], arrays["weight_left"]) < 1e-4
    yield Check("left bins", mismatches(left[~at_bin], stored[~at_bin]), 0)
    spread = np.zeros((2, len(left), params["bins"] + 1))
    row = np.arange(len(left))
    for dense, first, of_right, of_left in (
        (spread[0], left, weight, 1 - weight),
        (spread[1], stored.astype(int), arrays["weight_right"], arrays["weight_left"]),
    ):
        dense[row, first], dense[row, first + 1] = of_left, of_right
    yield Check("weights of the bins", relative_error(*spread), GRADIENT)


def boxes_of(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    only_known(params, "reg_scale")
    decode = lambda distance: edges.edges_to_boxes(arrays["ref"], distance, scale=params["reg_scale"])  # noqa: E731
    value, slope = with_slope(decode, arrays["distance"], arrays["upstream"])
    yield Check("boxes of distances", relative_error(value, arrays["boxes"]), VALUE)
    yield Check("their gradient", relative_error(slope, arrays["grad_distance"]), GRADIENT)


def localization(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    """The bins are their numbers, so that a target is the left one plus the weight of the other."""
    only_known(params, "avg_factor", "bins")
    numbers = np.arange(params["bins"] + 1, dtype=np.float32)
    target = np.minimum(np.floor(arrays["label"]), params["bins"] - 1) + arrays["weight_right"]

    def total(pred):
        rows = box.fine_grained_localization(pred, target, numbers)
        return jnp.sum(rows * arrays["weight"]) / params["avg_factor"]

    value, slope = quick(jax.value_and_grad(total), arrays["pred"])
    yield Check("FGL value", relative_error(value, arrays["value"]), VALUE)
    yield Check("FGL gradient", relative_error(slope, arrays["grad_pred"]), GRADIENT)


def integral(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    only_known(params, "bins")
    expected = lambda x: edges.expected_edges(x.reshape(*x.shape[:-1], 4, -1), arrays["project"])  # noqa: E731
    value, slope = with_slope(expected, arrays["pred"], arrays["upstream"])
    yield Check("expected distances", relative_error(value, arrays["value"]), VALUE)
    yield Check("their gradient", relative_error(slope, arrays["grad_pred"]), GRADIENT)


def layer_losses(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    only_known(params, "T", "bins", "num_boxes", "up", "reg_scale", "num_pos", "num_neg")
    if params["T"] != detr_loss.TEMPERATURE:
        raise UnknownCase(f"unknown temperature {params['T']}")
    truth, matched = truth_of(arrays, params)
    count = (matched >= 0).sum()
    balance = np.sqrt([count, matched.size - count])
    if "num_pos" in params:
        balance = np.array([params["num_pos"], params["num_neg"]])
    teacher = Queries(arrays["teacher_logits"], arrays["boxes"], None, split(arrays["teacher_corners"]), arrays["ref"])

    def both(corners):
        layer = Queries(arrays["logits"], arrays["boxes"], None, split(corners), arrays["ref"])
        found = detr_loss.edge_losses(
            (layer, teacher),
            matched,
            truth=truth,
            count=truth.count,
            balance=np.float32(balance),
            bins=lambda number: edges.edge_bins(number, up=params["up"], scale=params["reg_scale"]),
            scale=params["reg_scale"],
        )
        return found["fgl"][0], found["ddf"][0]

    yield from two_losses(both, arrays["corners"], ("fgl", "ddf"), arrays)


def split(corners: Any) -> Any:
    return corners.reshape(*corners.shape[:2], 4, -1)


def injection(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    only_known(params)
    student, teacher = nhwc(arrays["student"]), nhwc(arrays["teacher"])

    def mean(student):
        return jnp.mean(distance.cosine(student, resize_bilinear(teacher, student.shape[1:3])))

    value, slope = quick(jax.value_and_grad(mean), student)
    yield Check("DSI value", relative_error(value, arrays["value"]), VALUE)
    yield Check("DSI gradient", relative_error(slope, nhwc(arrays["grad_student"])), GRADIENT)


def guided(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    only_known(params)
    weight, share, target, tolerance, plain, want = arrays["table"].T

    def adapt(weight, share, target, tolerance):
        return method.guided_weight(weight, share, target=target, tolerance=tolerance, default=20.0, plain=plain > 0)

    found = quick(adapt, weight, share / 100, target / 100, tolerance / 100)
    yield Check("GAM weights", float(np.max(np.abs(found / want - 1))), VALUE)


LOSSES = {
    "varifocal": class_losses,
    "sigmoid focal": class_losses,
    "MAL": class_losses,
    "L1 on cxcywh": box_losses,
    "pairwise GIoU": overlaps,
    "W(n)": bins_of,
    "bbox2distance": bins_of,
    "distance2bbox": boxes_of,
    "FGL alone": localization,
    "integral": integral,
    "FGL and DDF": layer_losses,
    "DSI": injection,
    "GAM": guided,
}


def losses(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    for beginning, check in LOSSES.items():
        if what.startswith(beginning):
            yield from check(what, params, arrays)
            return
    raise UnknownCase(f"no check for {what!r}")


def contrastive(what: str, params: Mapping[str, Any], arrays: Arrays) -> Checks:
    known = ("num_gt", "num_classes", "num_queries", "num_denoising", "label_noise_ratio", "box_noise_scale")
    only_known(params, *known)
    labels, truth = images_of(arrays, "gt_labels"), images_of(arrays, "gt_boxes")
    valid = padded([np.ones(len(x), bool) for x in labels])
    targets = Targets(padded(truth, 0.3), padded(labels, 1).astype(np.int32), valid, None, None)
    places = denoising.places(params["num_denoising"], valid.shape[1])
    settings = {
        "number": params["num_denoising"],
        "num_classes": params["num_classes"],
        "label_noise": params["label_noise_ratio"],
        "box_noise": params["box_noise_scale"],
    }
    corners = np.asarray(convert.from_cxcywh(targets.boxes))
    if "labels" not in arrays:
        draws = denoising.Draws(*(np.zeros((len(valid), places, *end), np.float32) for end in ((), (), (4,), (4,))))
        found = denoising.contrastive(draws, corners, targets.labels, valid, **settings)
        yield Check("denoising places", float(np.sum(found.live)), 0)
        return
    # A file has no draws of noise that is switched off.
    draws = dict(arrays)
    shape = arrays["labels"].shape
    for name in ("label_uniform", "new_label"):
        draws.setdefault(f"draw/{name}", np.zeros(shape, np.float32))
    for name in ("box_uniform", "box_sign"):
        draws.setdefault(f"draw/{name}", np.zeros((*shape, 4), np.float32))
    found = noised(draws, "", corners, targets, places, **settings)
    stored = dict(arrays)
    if params["box_noise_scale"] == 0:  # then the peers leave the boxes as they are, instead of their logits
        stored["boxes_unact"] = logit(stored["boxes_unact"])
    yield from denoising_checks(found, stored, "", valid, params["num_queries"])
    if "boxes_unact_dfine_repo" in arrays:
        mirrored = noised(draws, "", corners, targets, places, inverted="mirror", **settings)
        boxes = logit(np.asarray(mirrored.boxes)[:, np.asarray(found.live)])
        yield Check("denoising boxes of D-FINE", relative_error(boxes, arrays["boxes_unact_dfine_repo"]), VALUE)


CHECKS = [
    ("ops/hungarian_*.npz", lambda path: each_case(path, hungarian)),
    ("ops/detr_losses_*.npz", lambda path: each_case(path, losses)),
    ("ops/contrastive_dn_*.npz", lambda path: each_case(path, contrastive)),
]
