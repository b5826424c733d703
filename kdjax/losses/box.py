"""Box regression losses of detectors."""

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
