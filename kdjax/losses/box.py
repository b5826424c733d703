"""Losses of boxes and of the distances of their sides."""

from typing import Literal

import jax
import jax.numpy as jnp

from kdjax import shapes
from kdjax.boxes.edges import nearest_bins
from kdjax.boxes.iou import box_iou
from kdjax.errors import UserError
from kdjax.losses import common
from kdjax.structs import AnyArray, Array

FORMS = ("linear", "square", "log")


def _boxes(loss: str, pred: AnyArray, target: AnyArray) -> tuple[Array, Array]:
    shapes.check(loss, pred=(pred, "... 4"), target=(target, "... 4"))
    return jnp.asarray(pred).astype(jnp.float32), jnp.asarray(target).astype(jnp.float32)


def giou(pred: AnyArray, target: AnyArray, *, eps: float = 1e-6) -> Array:
    """One minus the generalised IoU of a predicted box and its target: `1 - GIoU`.

    Args:
      pred: f32[..., 4], `x1 y1 x2 y2` in pixels.
      target: f32[..., 4], the same.
      eps: px^2, see `kdjax.boxes.box_iou`.

    Returns:
      f32[...], 0 (equal boxes, up to eps) to 2.

    Scope: each pair on its own.

    Peers: mmdetection's `GIoULoss` with `reduction="none"`.

    Reference: Rezatofighi et al., Generalized Intersection over Union, CVPR 2019, algorithm 1.

    Example:
      >>> import numpy as np
      >>> giou(np.array([0.0, 0, 2, 2]), np.array([0.0, 0, 1, 2])).item()
      0.5
    """
    return 1 - box_iou(*_boxes("giou", pred, target), mode="giou", eps=eps)


def iou(
    pred: AnyArray, target: AnyArray, *, form: Literal["linear", "square", "log"] = "log", eps: float = 1e-6
) -> Array:
    """IoU loss: `1 - v`, `1 - v^2` or `-log v` with `v = max(IoU, eps)`.

    Args:
      pred: f32[..., 4], `x1 y1 x2 y2` in pixels.
      target: f32[..., 4], the same.
      form: `linear`, `square` or `log`.
      eps: px^2, see `kdjax.boxes.box_iou`; also the lower bound of v.

    Returns:
      f32[...], 0 for equal boxes; at most 1 (linear, square) or -log(eps). No gradient for disjoint boxes.

    Scope: each pair on its own.

    Peers: mmdetection's `IoULoss` with `reduction="none"`.

    Reference: Yu et al., UnitBox, ACM MM 2016 (log).

    Raises:
      UserError: unknown `form`.

    Example:
      >>> import numpy as np
      >>> iou(np.array([0.0, 0, 2, 2]), np.array([0.0, 0, 1, 2]), form="square").item()
      0.75
    """
    common.check_choice("iou", FORMS, form=form)
    overlap = box_iou(*_boxes("iou", pred, target), mode="iou", eps=eps)
    overlap = jnp.where(overlap >= eps, overlap, eps)
    if form == "linear":
        return 1 - overlap
    if form == "square":
        return 1 - overlap**2
    return -jnp.log(overlap)


def diou(pred: AnyArray, target: AnyArray, *, eps: float = 1e-6) -> Array:
    """One minus the IoU reduced by the distance of the centres: `1 - DIoU`.

    Args:
      pred: f32[..., 4], `x1 y1 x2 y2` in pixels.
      target: f32[..., 4], the same.
      eps: px^2, see `kdjax.boxes.box_iou`.

    Returns:
      f32[...], 0 (equal boxes, up to eps) to 2.

    Scope: each pair on its own.

    Peers: mmdetection's `DIoULoss` with `reduction="none"`.

    Reference: Zheng et al., Distance-IoU Loss, AAAI 2020, equation 7.

    Example:
      >>> import numpy as np
      >>> round(float(diou(np.array([0.0, 0, 2, 2]), np.array([0.0, 0, 1, 2]))), 4)
      0.5313
    """
    return 1 - box_iou(*_boxes("diou", pred, target), mode="diou", eps=eps)


def ciou(pred: AnyArray, target: AnyArray, *, eps: float = 1e-6) -> Array:
    """One minus the IoU reduced by the distance of the centres and the difference of the aspect ratios: `1 - CIoU`.

    Args:
      pred: f32[..., 4], `x1 y1 x2 y2` in pixels.
      target: f32[..., 4], the same.
      eps: px^2, see `kdjax.boxes.box_iou`.

    Returns:
      f32[...], 0 (equal boxes, up to eps) to 2.

    Scope: each pair on its own.

    Peers: mmdetection's `CIoULoss` with `reduction="none"`, which may give NaN for equal boxes.

    Reference: Zheng et al., Distance-IoU Loss, AAAI 2020, equations 10 and 11.

    Example:
      >>> import numpy as np
      >>> ciou(np.array([0.0, 0, 2, 2]), np.array([0.0, 0, 2, 2])).round(4).item()
      0.0
    """
    return 1 - box_iou(*_boxes("ciou", pred, target), mode="ciou", eps=eps)


def distribution_focal(logits: AnyArray, target: AnyArray) -> Array:
    """Distribution focal loss: cross-entropy with the two bins around a target that lies between them.

    With i = floor(y) and q = softmax(logits): `-(i + 1 - y) log q_i - (y - i) log q_(i + 1)`.

    Args:
      logits: f32[..., R + 1], of the distances 0 .. R in strides.
      target: f32[...], y in 0 .. R, in strides; y = R is the last bin alone.

    Returns:
      f32[...], >= 0; at least the entropy of the two weights.

    Scope: each distance on its own.

    Peers: mmdetection's `DistributionFocalLoss` with `reduction="none"`.

    Reference: Li et al., Generalized Focal Loss, NeurIPS 2020, equation 6.

    Example:
      >>> import numpy as np
      >>> round(float(distribution_focal(np.array([0.0, 0.0]), np.array(0.25))), 4)
      0.6931
    """
    logits, target = jnp.asarray(logits).astype(jnp.float32), jnp.asarray(target).astype(jnp.float32)
    if logits.shape[:-1] != target.shape:
        raise UserError(f"distribution_focal: target must have the shape {logits.shape[:-1]}, not {target.shape}")
    # At most the last bin but one, so that both bins exist for y = R.
    left = jnp.clip(jnp.floor(target), 0, logits.shape[-1] - 2)
    log_q = jax.nn.log_softmax(logits, axis=-1)

    def log_prob(index: AnyArray) -> Array:
        return jnp.take_along_axis(log_q, index.astype(jnp.int32)[..., None], axis=-1)[..., 0]

    return -(left + 1 - target) * log_prob(left) - (target - left) * log_prob(left + 1)


def fine_grained_localization(logits: AnyArray, target: AnyArray, bins: AnyArray) -> Array:
    """Fine-grained localization loss: cross-entropy with the two bins around a target, as `distribution_focal`.

    With the bins W_i, the last of them W_l at or below the target y, w = (y - W_l) / (W_(l + 1) - W_l) in 0 .. 1 and
    q = softmax(logits): `-(1 - w) log q_l - w log q_(l + 1)`.

    Args:
      logits: f32[..., n + 1].
      target: f32[...], y, in the unit of the bins; beyond them the outermost one is the target.
      bins: f32[n + 1], increasing: the distances that the bins stand for, as of `kdjax.boxes.edge_bins`.

    Returns:
      f32[...], >= 0; at least the entropy of the two weights.

    Scope: each distance on its own.

    Peers: `loss_local` of D-FINE and transformers, which weights each edge by the IoU of its box and divides the sum by
      the number of boxes.

    Reference: Peng et al., D-FINE, ICLR 2025, section 4.1.

    Raises:
      UserError: the shapes differ.

    Example:
      >>> import numpy as np
      >>> loss = fine_grained_localization(np.array([9.0, 0.0, 9.0]), np.array(1.0), np.array([-1.0, 0.0, 1.0]))
      >>> round(float(loss), 4)
      0.6932
    """
    shapes.check("fine_grained_localization", logits=(logits, "... N"), bins=(bins, "N"))
    logits, target = jnp.asarray(logits).astype(jnp.float32), jnp.asarray(target).astype(jnp.float32)
    if logits.shape[:-1] != target.shape:
        raise UserError(
            f"fine_grained_localization: target must have the shape {logits.shape[:-1]}, not {target.shape}"
        )
    left, weight = nearest_bins(target, bins)
    index, weight = jnp.arange(logits.shape[-1]), weight[..., None]
    wanted = jnp.where(index == left[..., None], 1 - weight, jnp.where(index == left[..., None] + 1, weight, 0.0))
    return -jnp.sum(wanted * jax.nn.log_softmax(logits, axis=-1), axis=-1)
