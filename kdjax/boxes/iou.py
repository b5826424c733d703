"""Overlap of boxes: IoU and its variants."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from kdjax import shapes
from kdjax.errors import UserError
from kdjax.structs import AnyArray, Array

Mode = Literal["iou", "iof", "giou", "diou", "ciou"]
MODES = ("iou", "iof", "giou", "diou", "ciou")


def _positive_part(x: AnyArray) -> Array:
    # Where boxes just touch, the gradient of `maximum` would be 1/2; that of the peers is 0.
    return jnp.where(x > 0, x, 0)


def box_iou(a: AnyArray, b: AnyArray, *, mode: Mode = "iou", eps: float = 1e-6) -> Array:
    """Overlap of each box of `a` with the box of `b` at the same place.

    With I the intersection's area, U the union's, A the area of `a`, C the smallest box around both, d the distance of
    the centres and c the diagonal of C:

      iou   I / max(U, eps)
      iof   I / max(A, eps)
      giou  I / max(U, eps) - (|C| - U) / max(|C|, eps)
      diou  I / (U + eps) - d^2 / (c^2 + eps)
      ciou  diou - alpha v,  v = (2 / pi)^2 (atan(w_b / (h_b + eps)) - atan(w_a / (h_a + eps)))^2,
            alpha = v / (1 - I / (U + eps) + v) where I / (U + eps) > 1/2, else 0; alpha is a constant to the gradient

    Args:
      a: f32[..., 4], `x1 y1 x2 y2` in pixels.
      b: f32[..., 4], the same; leading axes broadcast against those of `a`.
      mode: `iou`, `iof`, `giou`, `diou` or `ciou`.
      eps: keeps the quotients finite for boxes without area, in px^2.

    Returns:
      f32[...]: iou and iof in 0 .. 1, giou and diou above -1 up to 1, ciou in -1 .. 1 (all for boxes with
      x1 <= x2 and y1 <= y2). 1 for equal boxes, up to eps; iou is 0 for disjoint ones.

    Scope: each pair on its own.

    Peers: mmdetection's `bbox_overlaps` (iou, iof, giou) and its DIoU and CIoU losses, also for inverted boxes. For
      equal boxes mmdetection's CIoU may be NaN; here it is 1.

    Reference: Rezatofighi et al., Generalized Intersection over Union, CVPR 2019, algorithm 1; Zheng et al.,
      Distance-IoU Loss, AAAI 2020, equations 7, 10 and 11.

    Raises:
      UserError: unknown `mode`, or a last axis is not 4.

    Example:
      >>> import numpy as np
      >>> a, b = np.array([0.0, 0, 2, 2]), np.array([1.0, 0, 3, 2])
      >>> round(float(box_iou(a, b)), 4), round(float(box_iou(a, b, mode="iof")), 4)
      (0.3333, 0.5)
    """
    if mode not in MODES:
        raise UserError(f"box_iou: mode must be one of {', '.join(MODES)}, not {mode!r}")
    shapes.check("box_iou", a=(a, "... 4"), b=(b, "... 4"))
    ax1, ay1, ax2, ay2 = (a[..., i] for i in range(4))
    bx1, by1, bx2, by2 = (b[..., i] for i in range(4))
    area_a, area_b = (ax2 - ax1) * (ay2 - ay1), (bx2 - bx1) * (by2 - by1)
    width = _positive_part(jnp.minimum(ax2, bx2) - jnp.maximum(ax1, bx1))
    height = _positive_part(jnp.minimum(ay2, by2) - jnp.maximum(ay1, by1))
    overlap = width * height
    # Each product is rounded on its own, as in the peers: fused with the sums below, equal overlaps would differ.
    area_a, area_b, overlap = (jnp.where(x == x, x, jnp.nan) for x in (area_a, area_b, overlap))
    if mode == "iof":
        return overlap / jnp.maximum(area_a, eps)
    union = area_a + area_b - overlap
    if mode == "iou":
        return overlap / jnp.maximum(union, eps)

    hull_width = _positive_part(jnp.maximum(ax2, bx2) - jnp.minimum(ax1, bx1))
    hull_height = _positive_part(jnp.maximum(ay2, by2) - jnp.minimum(ay1, by1))
    if mode == "giou":
        union = jnp.maximum(union, eps)
        hull = jnp.maximum(hull_width * hull_height, eps)
        return overlap / union - (hull - union) / hull

    iou = overlap / (union + eps)
    distance2 = ((bx1 + bx2) - (ax1 + ax2)) ** 2 / 4 + ((by1 + by2) - (ay1 + ay2)) ** 2 / 4
    diou = iou - distance2 / (hull_width**2 + hull_height**2 + eps)
    if mode == "diou":
        return diou
    angle = jnp.arctan((bx2 - bx1) / (by2 - by1 + eps)) - jnp.arctan((ax2 - ax1) / (ay2 - ay1 + eps))
    v = (2 / math.pi * angle) ** 2
    denominator = 1 - iou + v
    # For equal boxes both are zero.
    alpha = jnp.where((iou > 0.5) & (denominator > 0), v / jnp.where(denominator > 0, denominator, 1), 0)
    ciou = diou - jax.lax.stop_gradient(alpha) * v
    return jnp.where(ciou < -1, -1, jnp.where(ciou > 1, 1, ciou))


def pairwise_iou(a: AnyArray, b: AnyArray, *, mode: Mode = "iou", eps: float = 1e-6) -> Array:
    """Overlap of each box of `a` with each box of `b`, by the formulas of `box_iou`.

    Args:
      a: f32[..., N, 4], `x1 y1 x2 y2` in pixels.
      b: f32[..., M, 4], the same.
      mode: `iou`, `iof` (of `a`), `giou`, `diou` or `ciou`.
      eps: px^2, see `box_iou`.

    Returns:
      f32[..., N, M]; ranges as for `box_iou`.

    Scope: each pair on its own.

    Peers: mmdetection's `bbox_overlaps`.

    Raises:
      UserError: unknown `mode`, or a last axis is not 4.

    Example:
      >>> import numpy as np
      >>> pairwise_iou(np.array([[0.0, 0, 2, 2]]), np.array([[0.0, 0, 2, 2], [0, 0, 1, 2]])).tolist()
      [[1.0, 0.5]]
    """
    return box_iou(a[..., :, None, :], b[..., None, :, :], mode=mode, eps=eps)
