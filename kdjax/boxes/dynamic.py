"""Assigners that match priors with ground-truth boxes by a cost of the predictions. No gradient flows through them.

Each box takes its k cheapest priors, where k grows with the IoUs of the predicted boxes.
"""

import jax
import jax.numpy as jnp

from kdjax import shapes
from kdjax.boxes.assign import assignment_of, check_targets, inside_padding
from kdjax.boxes.iou import pairwise_iou
from kdjax.boxes.topk import k_smallest
from kdjax.structs import AnyArray, Array, Assignment, Targets


def _cheapest(cost: AnyArray, iou: AnyArray, topk: int) -> Array:
    """The box of each prior, i32[B, N] or -1: each box takes its k cheapest priors, k the sum of its `topk` best IoUs.

    Where `cost` f32[B, M, N] is inf, a prior cannot be taken, and `iou` f32[B, M, N] is 0.
    """
    num_boxes, num_priors = cost.shape[1:]
    topk = min(topk, num_priors)
    best_iou, _ = k_smallest(-iou, topk)
    k = jnp.maximum(jnp.sum(-best_iou, axis=-1).astype(jnp.int32), 1)
    lowest, taken = k_smallest(cost, topk)
    takes = (jnp.arange(topk) < k[..., None]) & jnp.isfinite(lowest)

    def claims(taken: AnyArray, takes: AnyArray) -> tuple[Array, Array]:
        """For each prior the number of boxes that take it, and the index of the last of them."""
        owner = jnp.broadcast_to(jnp.arange(num_boxes)[:, None], taken.shape)
        place = jnp.where(takes, taken, num_priors)  # out of range: dropped
        count = jnp.zeros(num_priors, jnp.int32).at[place].add(1, mode="drop")
        last = jnp.full(num_priors, -1, jnp.int32).at[place].max(owner, mode="drop")
        return count, last

    count, last = jax.vmap(claims)(taken, takes)
    return jnp.where(count > 1, jnp.argmin(cost, axis=1).astype(jnp.int32), last)


def _of_matched(values: AnyArray, matched: AnyArray) -> Array:
    """f32[B, M, N] -> f32[B, N]: the value of the matched box; undefined for background."""
    return jnp.take_along_axis(values, jnp.maximum(matched, 0)[:, None, :], axis=1)[:, 0]


def _of_class(values: AnyArray, labels: AnyArray) -> Array:
    """f32[B, N, K], i32[B, M] -> f32[B, M, N]: the columns of the boxes' classes."""
    return jax.vmap(lambda rows, index: rows.T[index])(values, labels)


def dynamic_soft_label(
    logits: AnyArray,
    boxes: AnyArray,
    priors: AnyArray,
    targets: Targets,
    *,
    topk: int = 13,
    iou_weight: float = 3.0,
    radius: float = 3.0,
    centers: AnyArray | None = None,
) -> Assignment:
    """RTMDet's assigner: each box takes the k priors of the lowest cost, where k depends on its IoUs.

    Candidates are the priors inside the padded image and strictly inside any box. The cost of prior n for box m of
    class c, with v their IoU, p = sigmoid(logits) and t the vector with v at c and 0 elsewhere, is

        sum_j (t_j - p_j)^2 BCE(p_j, t_j)  -  iou_weight log(v + 1e-7)  +  10^(|x_n - centre_m| / stride_n - radius)

    Box m takes its k_m cheapest candidates, k_m being the sum of its `topk` best IoUs, truncated to an integer and at
    least 1. A prior that several boxes take is matched with the box, of all boxes, for which its cost is lowest. A box
    with no prior inside can take a prior that is inside another box. Equal costs are resolved by the lower index.

    Args:
      logits: f32[B, N, K], class logits.
      boxes: f32[B, N, 4], predicted boxes in pixels.
      priors: f32[N, 4], `x y stride_w stride_h` in pixels.
      targets: the ground truth, M >= 1; invalid rows are ignored.
      topk: number of IoUs in the sum that gives k.
      iou_weight: weight of the IoU term.
      radius: distance from the object's centre, in strides, at which the third term is 1.
      centers: f32[B, M, 2], x and y of the objects' centres in pixels (`mask_centers`); None: the boxes' centres.

    Returns:
      Assignment. `quality` is the IoU of the predicted box with the matched one; `ignore` marks priors outside the
      padded image. An image without boxes is all background.

    Scope: each image on its own.

    Peers: mmdetection's `DynamicSoftLabelAssigner`. The distance is measured in the prior's horizontal stride.

    Reference: Lyu et al., RTMDet, arXiv:2212.07784, equations 1 to 4.

    Example:
      >>> import numpy as np
      >>> priors = np.array([[0.0, 0, 8, 8], [8, 0, 8, 8], [0, 8, 8, 8], [8, 8, 8, 8]], np.float32)
      >>> truth = Targets(boxes=np.array([[[4.0, 4, 12, 12]]], np.float32), labels=np.array([[1]]),
      ...                 valid=np.array([[True]]), image_size=np.array([[16, 16]]), pad_size=np.array([[16, 16]]))
      >>> predicted = np.array([[[0.0, 0, 4, 4], [4, 0, 12, 4], [0, 4, 4, 12], [4, 4, 12, 12]]], np.float32)
      >>> dynamic_soft_label(np.zeros((1, 4, 2), np.float32), predicted, priors, truth).matched.tolist()
      [[-1, -1, -1, 0]]
    """
    check_targets("dynamic_soft_label", targets, priors=priors)
    shapes.check("dynamic_soft_label", priors=(priors, "N 4"), logits=(logits, "B N K"), boxes=(boxes, "B N 4"))
    # All [.., M, N] arrays have the priors last, the axis of the searches. None has a class axis too.
    logits, boxes, priors, targets = jax.lax.stop_gradient((logits, boxes, jnp.asarray(priors), targets))
    logits, boxes = logits.astype(jnp.float32), boxes.astype(jnp.float32)
    num_classes = logits.shape[-1]
    x, y, stride = priors[:, 0], priors[:, 1], priors[:, 2]
    x1, y1, x2, y2 = (targets.boxes[:, :, i, None] for i in range(4))

    inside = (x > x1) & (y > y1) & (x < x2) & (y < y2) & targets.valid[..., None]
    padded = inside_padding(priors, targets.pad_size)
    candidate = jnp.any(inside, axis=1) & padded
    usable = candidate[:, None, :] & targets.valid[..., None]

    iou = jnp.where(usable, pairwise_iou(targets.boxes, boxes), 0)
    # Only the true class has a target other than 0, so the sum over classes is that of an all-zero target with the
    # term of the true class replaced.
    probs, softplus = jax.nn.sigmoid(logits), jax.nn.softplus(logits)
    negative = softplus * probs**2
    true_logit, true_negative = _of_class(logits, targets.labels), _of_class(negative, targets.labels)
    positive = (jax.nn.softplus(true_logit) - true_logit * iou) * (iou - jax.nn.sigmoid(true_logit)) ** 2
    class_cost = jnp.sum(negative, axis=-1)[:, None, :] - true_negative + positive
    iou_cost = -jnp.log(iou + 1e-7) * iou_weight
    if centers is None:
        x_centre, y_centre = (x1 + x2) / 2, (y1 + y2) / 2
    else:
        shapes.check("dynamic_soft_label", boxes=(targets.boxes, "B M 4"), centers=(centers, "B M 2"))
        x_centre, y_centre = (jax.lax.stop_gradient(centers)[:, :, i, None] for i in range(2))
    distance = jnp.sqrt((x - x_centre) ** 2 + (y - y_centre) ** 2) / stride
    centre_cost = 10.0 ** (distance - radius)  # overflows from 41 strides on; such a prior can be taken, too
    cost = jnp.where(usable, jnp.minimum(class_cost + iou_cost + centre_cost, 3e38), jnp.inf)

    matched = _cheapest(cost, iou, topk)
    return assignment_of(matched, ~padded, _of_matched(iou, matched), num_classes, targets)


def mask_centers(masks: AnyArray, *, stride: int) -> Array:
    """The centres of mass of masks, f32[..., 2]: x and y in pixels.

    Pixels are counted from 0, so that the centre of pixel i is i. An empty mask has its centre at 0, 0.

    Args:
      masks: f32[..., h, w], share of each block of stride x stride pixels that the object covers, or bool.
      stride: in pixels.

    Peers: mmdetection's `center_of_mass`, for masks of stride 1.

    Example:
      >>> mask_centers(jnp.array([[[0, 1, 1], [0, 0, 0]]]), stride=4).tolist()
      [[7.5, 1.5]]
    """
    masks = jnp.asarray(masks).astype(jnp.float32)
    rows, columns = jnp.sum(masks, -1), jnp.sum(masks, -2)
    total = jnp.maximum(jnp.sum(rows, -1), 1e-7)
    middle = [stride * jnp.arange(n, dtype=jnp.float32) + (stride - 1) / 2 for n in masks.shape[-2:]]
    return jnp.stack([jnp.sum(columns * middle[1], -1) / total, jnp.sum(rows * middle[0], -1) / total], -1)


def sim_ota(
    probs: AnyArray,
    boxes: AnyArray,
    priors: AnyArray,
    targets: Targets,
    *,
    topk: int = 10,
    radius: float = 2.5,
    iou_weight: float = 3.0,
    class_weight: float = 1.0,
) -> Assignment:
    """YOLOX's assigner: each box takes the k priors of the lowest cost, if possible near its centre.

    Candidates are the priors inside the padded image that are strictly inside any box or any box's centre region (the
    square of `radius` strides around its centre). The cost of prior n for box m of class c, with v their IoU, is

        class_weight sum_j BCE(p_j, [j = c])  -  iou_weight log(v + 1e-7)  +  1e5 unless n is in box m and its region

    k, and the rule for priors that several boxes take, are those of `dynamic_soft_label`.

    Args:
      probs: f32[B, N, K], class probabilities in 0 .. 1 (YOLOX: the square root of their product with the objectness).
      boxes: f32[B, N, 4], predicted boxes in pixels.
      priors: f32[N, 4], `x y stride_w stride_h` in pixels: the centres of the cells.
      targets: the ground truth, M >= 1; invalid rows are ignored.
      topk: number of IoUs in the sum that gives k.
      radius: half the side of the centre region, in strides.
      iou_weight: weight of the IoU term.
      class_weight: weight of the class term.

    Returns:
      Assignment. `quality` is the IoU of the predicted box with the matched one; `ignore` marks priors outside the
      padded image. An image without boxes is all background.

    Scope: each image on its own.

    Peers: mmdetection's `SimOTAAssigner`.

    Reference: Ge et al., YOLOX, arXiv:2107.08430, section 2.1.

    Example:
      >>> import numpy as np
      >>> priors = np.array([[4.0, 4, 8, 8], [12, 4, 8, 8]], np.float32)
      >>> truth = Targets(boxes=np.array([[[1.0, 1, 7, 7]]], np.float32), labels=np.array([[0]]),
      ...                 valid=np.array([[True]]), image_size=np.array([[8, 16]]), pad_size=np.array([[8, 16]]))
      >>> predicted = np.array([[[1.0, 1, 7, 7], [9, 1, 15, 7]]], np.float32)
      >>> sim_ota(np.full((1, 2, 1), 0.5, np.float32), predicted, priors, truth).matched.tolist()
      [[0, -1]]
    """
    check_targets("sim_ota", targets, priors=priors)
    shapes.check("sim_ota", priors=(priors, "N 4"), probs=(probs, "B N K"), boxes=(boxes, "B N 4"))
    probs, boxes, priors, targets = jax.lax.stop_gradient((probs, boxes, jnp.asarray(priors), targets))
    probs, boxes = probs.astype(jnp.float32), boxes.astype(jnp.float32)
    x, y, stride = priors[:, 0], priors[:, 1], priors[:, 2]
    x1, y1, x2, y2 = (targets.boxes[:, :, i, None] for i in range(4))

    valid = targets.valid[..., None]
    inside = (x > x1) & (y > y1) & (x < x2) & (y < y2) & valid
    away = jnp.maximum(jnp.abs(x - (x1 + x2) / 2), jnp.abs(y - (y1 + y2) / 2))
    central = (away < radius * stride) & valid
    padded = inside_padding(priors, targets.pad_size)
    candidate = jnp.any(inside | central, axis=1) & padded
    usable = candidate[:, None, :] & valid

    iou = jnp.where(usable, pairwise_iou(targets.boxes, boxes), 0)
    # The peers clip logarithms at -100.
    positive, negative = -jnp.maximum(jnp.log(probs), -100), -jnp.maximum(jnp.log1p(-probs), -100)
    of_class = (_of_class(values, targets.labels) for values in (positive, negative))
    class_cost = jnp.sum(negative, axis=-1)[:, None, :] + next(of_class) - next(of_class)
    cost = class_cost * class_weight - jnp.log(iou + 1e-7) * iou_weight + jnp.where(inside & central, 0, 1e5)
    matched = _cheapest(jnp.where(usable, cost, jnp.inf), iou, topk)
    return assignment_of(matched, ~padded, _of_matched(iou, matched), probs.shape[-1], targets)
