"""`loss/det_cls*` and `loss/det_box*`: detection losses with their reductions, value and gradient."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.losses import box, classification
from tests.golden_checks.api import NOT_PART, Check, Checks, UnknownCase, each_case, relative_error

VALUE, GRADIENT = 1e-5, 1e-4
OPTIONS = ("reduction", "loss_weight")  # of every class of mmdetection


def options(init: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """The parameters of a loss under kdjax's names; `names` is peer's name = our name."""
    unknown = sorted(set(init) - set(names) - set(OPTIONS))
    if unknown:
        raise UnknownCase(f"unknown parameters {', '.join(unknown)}")
    return {ours: init[theirs] for theirs, ours in names.items() if theirs in init}


def unreduced(cls: str, init: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Callable:
    """The loss as a function of the prediction alone."""
    if cls == "QualityFocalLoss":
        kwargs = options(init, beta="beta")
        return lambda pred: classification.quality_focal(pred, arrays["target0"], arrays["target1"], **kwargs)
    target = arrays["target"]
    if cls == "FocalLoss":
        kwargs = options(init, alpha="alpha", gamma="gamma")
        return lambda pred: classification.sigmoid_focal(pred, target, **kwargs)
    if cls == "CrossEntropyLoss":
        use_sigmoid = options(init, use_sigmoid="use_sigmoid").get("use_sigmoid", False)
        loss = classification.binary_cross_entropy if use_sigmoid else classification.cross_entropy
        return lambda pred: loss(pred, target)
    if cls == "DistributionFocalLoss":
        options(init)
        return lambda pred: box.distribution_focal(pred, target)
    names = {"GIoULoss": box.giou, "DIoULoss": box.diou, "CIoULoss": box.ciou}
    if cls in names:
        kwargs = options(init, eps="eps")
        return lambda pred: names[cls](pred, target, **kwargs)
    if cls == "IoULoss":
        kwargs = options(init, mode="form", eps="eps")
        return lambda pred: box.iou(pred, target, **kwargs)
    if cls == "SmoothL1Loss":
        kwargs = options(init, beta="beta")
        return lambda pred: box.smooth_l1(pred, target, **kwargs)
    if cls == "L1Loss":
        options(init)
        return lambda pred: box.l1(pred, target)
    raise UnknownCase(f"no check for {cls}")


def reduced(loss: jax.Array, init: Mapping[str, Any], call: Mapping[str, Any], weight: np.ndarray | None) -> jax.Array:
    """mmdetection's weighting and reduction."""
    unknown = sorted(set(call) - {"avg_factor"})
    if unknown:
        raise UnknownCase(f"unknown parameters {', '.join(unknown)}")
    reduction, factor = init.get("reduction", "mean"), call.get("avg_factor")
    if weight is not None:
        loss = loss * weight.reshape(weight.shape + (1,) * (loss.ndim - weight.ndim))
    if reduction == "mean":
        loss = jnp.mean(loss) if factor is None else jnp.sum(loss) / (factor + np.finfo(np.float32).eps)
    elif reduction == "sum" and factor is None:
        loss = jnp.sum(loss)
    elif reduction != "none":
        raise UnknownCase(f"unknown reduction {reduction!r} with the factor {factor}")
    return init.get("loss_weight", 1.0) * loss


def losses(what: str, params: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Checks:
    cls, init, call = params["cls"], params["init"], params["call"]
    name = f"{cls} {init.get('reduction', 'mean')}"
    if cls in ("EIoULoss", "SIoULoss", "VarifocalLoss"):
        yield Check(name, skip=NOT_PART)
        return
    loss = unreduced(cls, init, arrays)
    value, pull_back = jax.vjp(lambda pred: reduced(loss(pred), init, call, arrays.get("weight")), arrays["pred"])
    (gradient,) = pull_back(jnp.asarray(arrays.get("upstream", np.float32(1))))
    yield Check(f"{name} value", relative_error(value, arrays["value"]), VALUE)
    yield Check(f"{name} gradient", relative_error(gradient, arrays["grad_pred"]), GRADIENT)


CHECKS = [
    ("loss/det_cls_*.npz", lambda path: each_case(path, losses)),
    ("loss/det_box_*.npz", lambda path: each_case(path, losses)),
]
