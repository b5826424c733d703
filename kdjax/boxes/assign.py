"""Assigners: which prior answers for which box of the ground truth. No gradient flows through them."""

import jax
import jax.numpy as jnp

from kdjax.boxes.iou import pairwise
from kdjax.structs import Array, Assignment, Targets


def inside_padding(priors: Array, pad_size: Array) -> Array:
    """Which priors belong to the padded picture: those whose cell starts inside it.

    Args:
      priors: f32[N, 4], `x y stride_w stride_h` in pixels, offset 0 .. 1 (exclusive).
      pad_size: i32[B, 2], height and width in pixels.

    Returns:
      bool[B, N].

    Scope: each picture on its own.

    Peers: mmdetection's `MlvlPointGenerator.valid_flags`.

    Example:
      >>> import numpy as np
      >>> inside_padding(np.array([[0.0, 0, 8, 8], [8, 0, 8, 8]]), np.array([[16, 8]])).tolist()
      [[True, False]]
    """
    cell = jnp.floor(priors[:, :2] / priors[:, 2:]) * priors[:, 2:]
    size_xy = pad_size[:, None, ::-1].astype(cell.dtype)
    return jnp.all(cell < size_xy, axis=-1)


def k_smallest(values: Array, k: int) -> tuple[Array, Array]:
    """The k smallest entries of each row in ascending order, equal ones by index: `lax.top_k` for a sharded batch.

    `lax.top_k` itself would collect the rows of all devices on every device. Reductions do not.

    Args:
      values: f32[..., N]; inf where there is nothing to take.
      k: how many, small, at most N.

    Returns:
      (f32[..., k] the entries, i32[..., k] their indices).

    Scope: each row on its own.

    Example:
      >>> import numpy as np
      >>> smallest, index = k_smallest(np.array([[5.0, 1.0, 3.0, 1.0]]), 3)
      >>> smallest.tolist(), index.tolist()
      ([[1.0, 1.0, 3.0]], [[1, 3, 2]])
    """
    block, size = 16, values.shape[-1]
    if size <= block * k:
        # What has been taken becomes inf, so what was inf must be less.
        largest = jnp.finfo(jnp.float32).max

        def take_one(left, _):
            lowest = jnp.min(left, axis=-1, keepdims=True)
            index = jnp.min(jnp.where(left == lowest, jnp.arange(size), size), axis=-1, keepdims=True)
            return jnp.where(jnp.arange(size) == index, jnp.inf, left), (lowest[..., 0], index[..., 0])

        _, (lowest, index) = jax.lax.scan(take_one, jnp.minimum(values, largest), length=k)
        lowest, index = jnp.moveaxis(lowest, 0, -1), jnp.moveaxis(index, 0, -1)
        return jnp.where(lowest == largest, jnp.inf, lowest), index

    # The k smallest entries are in the k blocks with the smallest minima.
    rows = values.shape[:-1]
    padded = jnp.pad(values, [(0, 0)] * len(rows) + [(0, -size % block)], constant_values=jnp.inf)
    blocks = padded.reshape(*rows, -1, block)
    _, best = k_smallest(jnp.min(blocks, axis=-1), k)
    best = jnp.sort(best, axis=-1)
    candidates = jnp.take_along_axis(blocks, best[..., None], axis=-2).reshape(*rows, -1)
    lowest, index = k_smallest(candidates, k)
    return lowest, jnp.take_along_axis(best, index // block, axis=-1) * block + index % block


def _assignment(matched: Array, ignore: Array, quality: Array, num_classes: int, targets: Targets) -> Assignment:
    """Fill in the struct from what an assigner decided; `matched` is -1 for background."""
    positive = matched >= 0
    index = jnp.maximum(matched, 0)
    labels = jnp.take_along_axis(targets.labels, index, axis=1)
    boxes = jnp.take_along_axis(targets.boxes, index[..., None], axis=1)
    result = Assignment(
        matched=matched,
        positive=positive,
        ignore=ignore,
        labels=jnp.where(positive, labels, num_classes),
        boxes=jnp.where(positive[..., None], boxes, 0),
        quality=jnp.where(positive, quality, 0),
    )
    return jax.lax.stop_gradient(result)


def dynamic_soft_label(
    logits: Array,
    boxes: Array,
    priors: Array,
    targets: Targets,
    *,
    topk: int = 13,
    iou_weight: float = 3.0,
    radius: float = 3.0,
) -> Assignment:
    """RTMDet's assigner: every box takes the k priors that would cost it least, k from the overlaps themselves.

    Candidates are the priors inside the padded picture and strictly inside any box. The cost of prior n for box m of
    class c, with v their IoU, p = sigmoid(logits) and t the vector with v at c and 0 elsewhere, is

      sum_j (t_j - p_j)^2 BCE(p_j, t_j)  -  iou_weight log(v + 1e-7)  +  10^(|x_n - centre_m| / stride_n - radius)

    Box m takes its k_m cheapest candidates, k_m being the sum of its `topk` best IoUs, cut to an integer and at least
    1. A prior that several boxes take goes to the box, of all boxes, for which it costs least. A box without a prior
    inside it can take a prior that is inside another box. Equal costs go to the lower index.

    Args:
      logits: f32[B, N, K], class logits.
      boxes: f32[B, N, 4], predicted boxes in pixels.
      priors: f32[N, 4], `x y stride_w stride_h` in pixels.
      targets: the ground truth, M >= 1; rows that are not valid change nothing.
      topk: number of IoUs that are summed.
      iou_weight: weight of the IoU's cost.
      radius: distance from the box's centre, in strides, at which the third cost is 1.

    Returns:
      Assignment. `quality` is the IoU of the predicted box with the matched one; `ignore` marks priors outside the
      padded picture. A picture without boxes is all background.

    Scope: each picture on its own.

    Peers: mmdetection's `DynamicSoftLabelAssigner`; the prior's distance is measured in its horizontal stride.

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
    # All [.., M, N] arrays have the priors last, along which the rows are searched; nothing has a class axis beside.
    logits, boxes, priors, targets = jax.lax.stop_gradient((logits, boxes, jnp.asarray(priors), targets))
    logits, boxes = logits.astype(jnp.float32), boxes.astype(jnp.float32)
    num_boxes, num_classes = targets.boxes.shape[1], logits.shape[-1]
    x, y, stride = priors[:, 0], priors[:, 1], priors[:, 2]
    x1, y1, x2, y2 = (targets.boxes[:, :, i, None] for i in range(4))

    inside = (x > x1) & (y > y1) & (x < x2) & (y < y2) & targets.valid[..., None]
    padded = inside_padding(priors, targets.pad_size)
    candidate = jnp.any(inside, axis=1) & padded
    usable = candidate[:, None, :] & targets.valid[..., None]

    iou = jnp.where(usable, pairwise(targets.boxes, boxes), 0)
    # Only the true class has another target than zero, so the sum over classes is the one for an all-zero target with
    # that class's summand exchanged.
    probs, softplus = jax.nn.sigmoid(logits), jax.nn.softplus(logits)
    negative = softplus * probs**2
    of_class = jax.vmap(lambda values, index: values.T[index])  # f32[B, N, K], i32[B, M] -> f32[B, M, N]
    true_logit, true_negative = of_class(logits, targets.labels), of_class(negative, targets.labels)
    positive = (jax.nn.softplus(true_logit) - true_logit * iou) * (iou - jax.nn.sigmoid(true_logit)) ** 2
    class_cost = jnp.sum(negative, axis=-1)[:, None, :] - true_negative + positive
    iou_cost = -jnp.log(iou + 1e-7) * iou_weight
    distance = jnp.sqrt((x - (x1 + x2) / 2) ** 2 + (y - (y1 + y2) / 2) ** 2) / stride
    centre_cost = 10.0 ** (distance - radius)
    cost = jnp.where(usable, class_cost + iou_cost + centre_cost, jnp.inf)

    topk = min(topk, priors.shape[0])
    best_iou, _ = k_smallest(-iou, topk)
    k = jnp.maximum(jnp.sum(-best_iou, axis=-1).astype(jnp.int32), 1)
    lowest, taken = k_smallest(cost, topk)
    takes = (jnp.arange(topk) < k[..., None]) & jnp.isfinite(lowest)

    def claims(taken, takes):
        """For every prior how many boxes take it, and the last of them."""
        owner = jnp.broadcast_to(jnp.arange(num_boxes)[:, None], taken.shape)
        place = jnp.where(takes, taken, priors.shape[0])  # out of range: dropped
        count = jnp.zeros(priors.shape[0], jnp.int32).at[place].add(1, mode="drop")
        last = jnp.full(priors.shape[0], -1, jnp.int32).at[place].max(owner, mode="drop")
        return count, last

    count, last = jax.vmap(claims)(taken, takes)
    matched = jnp.where(count > 1, jnp.argmin(cost, axis=1).astype(jnp.int32), last)
    quality = jnp.take_along_axis(iou, jnp.maximum(matched, 0)[:, None, :], axis=1)[:, 0]
    return _assignment(matched, ~padded, quality, num_classes, targets)
