"""Box regression losses of detectors."""

from typing import Literal

import jax
import jax.numpy as jnp

from kdjax.boxes.iou import box_iou
from kdjax.structs import Array


def _float32(*arrays: Array) -> tuple[Array, ...]:
    return tuple(jnp.asarray(x).astype(jnp.float32) for x in arrays)


def giou(pred: Array, target: Array, *, eps: float = 1e-6) -> Array:
    """One minus the generalised IoU of a predicted box and its target: `1 - GIoU`.

    Args:
      pred: f32[..., 4], `x1 y1 x2 y2` in pixels.
      target: f32[..., 4], the same.
      eps: px^2, see `boxes.iou.box_iou`.

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
    return 1 - box_iou(*_float32(pred, target), mode="giou", eps=eps)


def iou(pred: Array, target: Array, *, form: Literal["linear", "square", "log"] = "log", eps: float = 1e-6) -> Array:
    """IoU loss: `1 - v`, `1 - v^2` or `-log v` with `v = max(IoU, eps)`.

    Args:
      pred: f32[..., 4], `x1 y1 x2 y2` in pixels.
      target: f32[..., 4], the same.
      form: `linear`, `square` or `log`.
      eps: px^2 in the IoU (see `boxes.iou.box_iou`), and its lower bound.

    Returns:
      f32[...], 0 for equal boxes; at most 1 (linear, square) or -log(eps). No gradient for disjoint boxes.

    Scope: each pair on its own.

    Peers: mmdetection's `IoULoss` with `reduction="none"`.

    Reference: Yu et al., UnitBox, ACM MM 2016 (log).

    Raises:
      ValueError: for another form.

    Example:
      >>> import numpy as np
      >>> iou(np.array([0.0, 0, 2, 2]), np.array([0.0, 0, 1, 2]), form="square").item()
      0.75
    """
    overlap = box_iou(*_float32(pred, target), mode="iou", eps=eps)
    overlap = jnp.where(overlap >= eps, overlap, eps)
    if form == "linear":
        return 1 - overlap
    if form == "square":
        return 1 - overlap**2
    if form == "log":
        return -jnp.log(overlap)
    raise ValueError(f"the IoU loss has the forms linear, square and log, not {form!r}")


def diou(pred: Array, target: Array, *, eps: float = 1e-6) -> Array:
    """One minus the IoU lessened by the distance of the centres: `1 - DIoU`.

    Args:
      pred: f32[..., 4], `x1 y1 x2 y2` in pixels.
      target: f32[..., 4], the same.
      eps: px^2, see `boxes.iou.box_iou`.

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
    return 1 - box_iou(*_float32(pred, target), mode="diou", eps=eps)


def ciou(pred: Array, target: Array, *, eps: float = 1e-6) -> Array:
    """One minus the IoU lessened by the distance of the centres and the difference of shape: `1 - CIoU`.

    Args:
      pred: f32[..., 4], `x1 y1 x2 y2` in pixels.
      target: f32[..., 4], the same.
      eps: px^2, see `boxes.iou.box_iou`.

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
    return 1 - box_iou(*_float32(pred, target), mode="ciou", eps=eps)


def smooth_l1(pred: Array, target: Array, *, beta: float = 1.0) -> Array:
    """Smooth L1 loss of each number: `d^2 / (2 beta)` for `d = |pred - target| < beta`, else `d - beta / 2`.

    Args:
      pred: f32[...], any unit.
      target: f32[...], the same.
      beta: where the square ends, > 0.

    Returns:
      f32[...], >= 0; 0 for equal numbers.

    Scope: each number on its own.

    Peers: mmdetection's `SmoothL1Loss` with `reduction="none"`.

    Reference: Girshick, Fast R-CNN, ICCV 2015, equation 3 (beta = 1).

    Example:
      >>> import numpy as np
      >>> smooth_l1(np.array([0.5, 3.0]), np.zeros(2)).tolist()
      [0.125, 2.5]
    """
    pred, target = _float32(pred, target)
    distance = jnp.abs(pred - target)
    return jnp.where(distance < beta, distance**2 / (2 * beta), distance - beta / 2)


def l1(pred: Array, target: Array) -> Array:
    """Absolute difference of each number: `|pred - target|`.

    Args:
      pred: f32[...], any unit.
      target: f32[...], the same.

    Returns:
      f32[...], >= 0; 0 for equal numbers.

    Scope: each number on its own.

    Peers: mmdetection's `L1Loss` with `reduction="none"`.

    Example:
      >>> import numpy as np
      >>> l1(np.array([1.0, -3.0]), np.zeros(2)).tolist()
      [1.0, 3.0]
    """
    pred, target = _float32(pred, target)
    # Not `abs`: JAX gives it the gradient 1 at 0.
    return jnp.maximum(pred - target, target - pred)


def distribution_focal(logits: Array, target: Array) -> Array:
    """Distribution focal loss: cross-entropy to the two bins beside a target that lies between them.

    With i = floor(y) and q = softmax(logits): `-(i + 1 - y) log q_i - (y - i) log q_(i + 1)`.

    Args:
      logits: f32[..., R + 1], of the distances 0 .. R in strides.
      target: f32[...], y in 0 .. R (exclusive; R itself counts as the last bin), in strides.

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
    logits, target = _float32(logits, target)
    # One bin left of the last at most, so that both bins exist for y = R.
    left = jnp.clip(jnp.floor(target), 0, logits.shape[-1] - 2)
    log_q = jax.nn.log_softmax(logits, axis=-1)

    def bin_of(index):
        return jnp.take_along_axis(log_q, index.astype(jnp.int32)[..., None], axis=-1)[..., 0]

    return -(left + 1 - target) * bin_of(left) - (target - left) * bin_of(left + 1)
