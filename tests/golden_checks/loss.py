"""`loss/det_cls*`, `loss/det_box*` and `loss/det_mask*`: detection losses with their reductions, value and gradient."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.losses import box, classification, distance, mask
from tests.golden_checks.api import NOT_PART, Check, Checks, UnknownCase, each_case, relative_error

VALUE, GRADIENT = 1e-5, 1e-4
OPTIONS = ("reduction", "loss_weight")  # of every class of mmdetection


def options(init: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """The parameters of a loss under kdjax's names; `names` is peer's name = our name."""
    unknown = sorted(set(init) - set(names) - set(OPTIONS))
    if unknown:
        raise UnknownCase(f"unknown parameters {', '.join(unknown)}")
    return {ours: init[theirs] for theirs, ours in names.items() if theirs in init}


def loss_of(cls: str, init: Mapping[str, Any]) -> tuple[Callable, dict[str, Any]]:
    """kdjax's loss for a class of mmdetection, and its options."""
    if cls == "QualityFocalLoss":
        return classification.quality_focal, options(init, beta="beta")
    if cls == "FocalLoss":
        return classification.sigmoid_focal, options(init, alpha="alpha", gamma="gamma")
    if cls == "CrossEntropyLoss":
        binary = options(init, use_sigmoid="use_sigmoid").get("use_sigmoid", False)
        return (classification.binary_cross_entropy if binary else classification.cross_entropy), {}
    if cls == "DistributionFocalLoss":
        return box.distribution_focal, options(init)
    if cls in ("GIoULoss", "DIoULoss", "CIoULoss"):
        return {"G": box.giou, "D": box.diou, "C": box.ciou}[cls[0]], options(init, eps="eps")
    if cls == "IoULoss":
        return box.iou, options(init, mode="form", eps="eps")
    if cls == "SmoothL1Loss":
        return distance.smooth_l1, options(init, beta="beta")
    if cls == "L1Loss":
        return distance.l1, options(init)
    if cls == "DiceLoss":
        return mask.dice, options(init, naive_dice="naive", eps="eps")
    raise UnknownCase(f"no check for {cls}")


@functools.lru_cache
def program(loss: Callable, settings: tuple) -> Callable:
    """The loss and its gradient in one program for all cases that differ in the reduction alone."""

    def run(pred, targets, factor):
        value, pull_back = jax.vjp(lambda pred: loss(pred, *targets, **dict(settings)), pred)
        return value, pull_back(factor)[0]

    return jax.jit(run)


def factors(init: Mapping[str, Any], call: Mapping[str, Any], arrays: Mapping[str, np.ndarray], shape: tuple) -> Any:
    """What mmdetection's weighting and reduction multiply each loss by before they add them up (if they do)."""
    unknown = sorted(set(call) - {"avg_factor"})
    if unknown:
        raise UnknownCase(f"unknown parameters {', '.join(unknown)}")
    reduction, normalizer = init.get("reduction", "mean"), call.get("avg_factor")
    factor = np.float32(init.get("loss_weight", 1.0))
    if "weight" in arrays:
        weight = arrays["weight"]
        factor = factor * weight.reshape(weight.shape + (1,) * (len(shape) - weight.ndim))
    if reduction == "mean":
        return factor / (math.prod(shape) if normalizer is None else normalizer + np.finfo(np.float32).eps)
    if reduction == "none" or (reduction == "sum" and normalizer is None):
        return factor
    raise UnknownCase(f"unknown reduction {reduction!r} with the factor {normalizer}")


def losses(what: str, params: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Checks:
    cls, init, call = params["cls"], params["init"], params["call"]
    name = f"{cls} {init.get('reduction', 'mean')}"
    if cls in ("EIoULoss", "SIoULoss", "VarifocalLoss"):
        yield Check(name, skip=NOT_PART)
        return
    loss, settings = loss_of(cls, init)
    targets = [arrays[key] for key in sorted(arrays) if key.startswith("target")]
    shape = jax.eval_shape(lambda pred: loss(pred, *targets, **settings), arrays["pred"]).shape
    factor = factors(init, call, arrays, shape)
    run = program(loss, tuple(settings.items()))
    upstream = np.broadcast_to(factor * arrays.get("upstream", 1), shape).astype(np.float32)
    value, gradient = run(arrays["pred"], targets, upstream)
    value = np.asarray(value) * factor
    if init.get("reduction", "mean") != "none":
        value = np.sum(value, dtype=np.float64)
    yield Check(f"{name} value", relative_error(value, arrays["value"]), VALUE)
    yield Check(f"{name} gradient", relative_error(gradient, arrays["grad_pred"]), GRADIENT)


def masks(what: str, params: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Checks:
    if what != "Mask R-CNN mask loss":
        yield from losses(what, params, arrays)
        return
    if params:
        raise UnknownCase(f"unknown parameters {', '.join(params)}")
    target, labels = arrays["target"], arrays["labels"]

    def mean(pred):
        return jnp.mean(mask.mask_cross_entropy(pred.transpose(0, 2, 3, 1), target, labels))

    value, gradient = jax.jit(jax.value_and_grad(mean))(arrays["pred"])
    yield Check("mask cross-entropy value", relative_error([value], arrays["value"]), VALUE)
    yield Check("mask cross-entropy gradient", relative_error(gradient, arrays["grad_pred"]), GRADIENT)


CHECKS = [
    ("loss/det_cls_*.npz", lambda path: each_case(path, losses)),
    ("loss/det_box_*.npz", lambda path: each_case(path, losses)),
    ("loss/det_mask_*.npz", lambda path: each_case(path, masks)),
]
