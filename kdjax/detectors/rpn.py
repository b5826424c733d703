"""The first stage of two-stage detectors: a region proposal network (RPN) on a feature pyramid.

Three anchors in each cell of five levels are told objects from background, and moved. The best of them, without those
that overlap, are the proposals, at which the second stage looks.

Reference: Ren et al., Faster R-CNN, NeurIPS 2015, section 3.1; on a pyramid: Lin et al., FPN, CVPR 2017, section 4.1.
Module names follow mmdetection 3.3.0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax.boxes import assign, coding, nms, priors
from kdjax.boxes.convert import clip
from kdjax.detectors import levels
from kdjax.detectors.layers import Conv, constant, normal
from kdjax.losses import classification, distance
from kdjax.structs import Array, Assignment, DetectorOutput, Targets

STRIDES = (4, 8, 16, 32, 64)  # P2 to P6
RATIOS, SCALES = (0.5, 1.0, 2.0), (8.0,)
ANCHORS = len(RATIOS) * len(SCALES)
POSITIVE_IOU, NEGATIVE_IOU, IOU_THRESHOLD = 0.7, 0.3, 0.7


class Proposals(NamedTuple):
    """A fixed number P of proposals per image, best first; rows whose `valid` is False hold zeros."""

    boxes: Array  # f32[B, P, 4], pixels of the network input
    scores: Array  # f32[B, P], 0 .. 1
    valid: Array  # bool[B, P]


class RPNHead(nnx.Module):
    """A 3x3 convolution, then 1x1 convolutions for the objectness and the deltas of each anchor, on all levels.

    With `rounded` the convolution's deltas are those of anchors whose corners are whole pixels from their centre, as
    torchvision has them; returned are the deltas of the same boxes from the anchors as they are.
    """

    def __init__(self, channels: int, *, rounded: bool = False) -> None:
        self.rounded = rounded

        def conv(outputs: int, size: int) -> Conv:
            return Conv(channels, outputs, size, draw=normal(0.01), bias=constant(0.0))

        self.rpn_conv, self.rpn_cls, self.rpn_reg = conv(channels, 3), conv(ANCHORS, 1), conv(ANCHORS * 4, 1)

    def __call__(self, maps: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Returns L of f32[B, H, W, A], logits of objects, and L of f32[B, H, W, A * 4], deltas."""
        hidden = [jax.nn.relu(self.rpn_conv(x)) for x in maps]
        logits, deltas = ([conv(x).astype(jnp.float32) for x in hidden] for conv in (self.rpn_cls, self.rpn_reg))
        if self.rounded:
            deltas = [x * scale + shift for x, (scale, shift) in zip(deltas, map(_of_rounded, STRIDES), strict=True)]
        return tuple(logits), tuple(deltas)


def _of_rounded(stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Factor and summand, f32[A * 4], that turn deltas of rounded anchors into those of the anchors themselves."""
    anchors = priors.grid_anchors((stride, stride), (stride,), ratios=RATIOS, scales=SCALES)
    share = np.round(anchors[:, 2:]) / anchors[:, 2:]  # of the sides
    none = np.zeros_like(share)
    return np.concatenate([share, none + 1], 1).ravel(), np.concatenate([none, np.log(share)], 1).ravel()


def grid_priors(hw: tuple[int, int]) -> np.ndarray:
    """x, y, stride and stride of every anchor's cell, f32[N, 4]."""
    return np.repeat(priors.grid_priors(hw, STRIDES), ANCHORS, 0)


def anchors(output: DetectorOutput) -> np.ndarray:
    """The anchors of all levels, f32[N, 4] in pixels."""
    return priors.grid_anchors(levels.input_size(output), STRIDES, ratios=RATIOS, scales=SCALES)


def objectness(output: DetectorOutput) -> Array:
    """Logits of all anchors to be an object, f32[B, N, 1]."""
    return levels.join(output.quality, 1)


def decode_boxes(output: DetectorOutput) -> Array:
    """Boxes of all anchors, f32[B, N, 4] in pixels, not clipped."""
    return coding.deltas_to_boxes(anchors(output), levels.join(output.box_reg, 4))


def sample(positive: Array, negative: Array, *, number: int, most_positive: int, key: Array) -> tuple[Array, Array]:
    """Draws rows of each image without repetition: first the positive ones, at most so many, then negative ones.

    Args:
      positive, negative: bool[B, N], which rows may be drawn as what.
      number: S, of rows; fewer if there are not enough.
      most_positive: largest number of positive rows, at most S.
      key: PRNG key.

    Returns:
      (index i32[B, S] of the rows, positive ones first; valid bool[B, S], False at the end where rows are missing).

    Scope: each image on its own.

    Peers: mmdetection's `RandomSampler` with `neg_pos_ub=-1`, but for the draw.

    Example:
      >>> positive = jnp.array([[True, False, True, False, False]])
      >>> index, valid = sample(positive, ~positive, number=6, most_positive=1, key=jax.random.key(0))
      >>> bool(positive[0, index[0, 0]]), sorted(index[0, 1:4].tolist()), valid[0].tolist()
      (True, [1, 3, 4], [True, True, True, True, False, False])
    """
    draw = jax.random.uniform(key, positive.shape)

    def best(allowed: Array, number: int) -> tuple[Array, Array]:
        value, index = jax.lax.top_k(jnp.where(allowed, draw, -1), min(number, draw.shape[1]))
        missing = ((0, 0), (0, number - index.shape[1]))
        return jnp.pad(index, missing), jnp.sum(jnp.pad(value, missing, constant_values=-1) >= 0, 1, keepdims=True)

    of_positive, positives = best(positive, most_positive)
    of_negative, negatives = best(negative, number)
    place = jnp.broadcast_to(jnp.arange(number), (len(draw), number))
    of_positive = jnp.take_along_axis(of_positive, jnp.minimum(place, most_positive - 1), 1)
    of_negative = jnp.take_along_axis(of_negative, jnp.maximum(place - positives, 0), 1)
    return jnp.where(place < positives, of_positive, of_negative), place < positives + negatives


def match(output: DetectorOutput, targets: Targets, *, inside_image: bool = False) -> Assignment:
    """Matches anchors with an IoU of at least 0.7, and each object's best ones from 0.3 on; below 0.3 is background.

    Labels are 0 for objects, 1 for background. With `inside_image`, anchors that leave the image take no part
    (`allowed_border=0` of mmdetection).
    """
    inside = assign.inside_padding(grid_priors(levels.input_size(output)), targets.pad_size)
    if inside_image:
        low, high = anchors(output)[:, :2], anchors(output)[:, 2:]
        inside &= jnp.all((low >= 0) & (high < targets.image_size[:, None, ::-1]), -1)
    return assign.max_iou(
        anchors(output),
        targets._replace(labels=jnp.zeros_like(targets.labels)),
        num_classes=1,
        positive_iou=POSITIVE_IOU,
        negative_iou=NEGATIVE_IOU,
        min_positive_iou=0.3,
        inside=inside,
    )


def keep_sampled(matched: Assignment, index: Array, valid: Array) -> Assignment:
    """The assignment in which only the sampled anchors are scored: `index` i32[B, S], where `valid` bool[B, S]."""
    size = matched.positive.shape[1]
    mark = jax.vmap(lambda index, valid: jnp.zeros(size, bool).at[jnp.where(valid, index, size)].set(True, mode="drop"))
    chosen = mark(index, valid)
    return matched._replace(
        matched=jnp.where(chosen, matched.matched, -1),
        positive=matched.positive & chosen,
        ignore=~chosen,
        labels=jnp.where(chosen, matched.labels, 1),
        boxes=jnp.where((matched.positive & chosen)[..., None], matched.boxes, 0),
        quality=jnp.where(chosen, matched.quality, 0),
    )


def assign_anchors(
    output: DetectorOutput, targets: Targets, key: Array, *, samples: int, inside_image: bool = False
) -> Assignment:
    """`match`, of which `samples` anchors of each image are drawn, at most half of them positive."""
    found = match(output, targets, inside_image=inside_image)
    negative = ~found.positive & ~found.ignore
    drawn = sample(found.positive, negative, number=samples, most_positive=samples // 2, key=key)
    return keep_sampled(found, *drawn)


def anchor_losses(
    output: DetectorOutput, assignment: Assignment, *, apart: Callable[..., Array] = distance.l1
) -> dict[str, Array]:
    """The two losses of each anchor, f32[B, N], divided by the number of samples of the global batch.

    With S = sum over images of max(positives, 1) + max(negatives, 1): loss_rpn_cls = cross-entropy of the objectness of
    the samples / S, loss_rpn_box = sum |deltas - deltas of the box| / S over the positives; `apart` is another distance
    than the absolute difference.

    Peers: mmdetection 3.3.0 RPNHead.loss_by_feat on one device.
    """
    positive, negative = assignment.positive, ~assignment.positive & ~assignment.ignore
    counts = [jnp.maximum(jnp.sum(rows, 1), 1) for rows in (positive, negative)]
    samples = jnp.sum(counts[0] + counts[1]).astype(jnp.float32)
    entropy = classification.binary_cross_entropy(objectness(output), assignment.labels)[..., 0]
    boxes = jnp.where(positive[..., None], assignment.boxes, anchors(output))
    wanted = coding.boxes_to_deltas(anchors(output), boxes)
    of_boxes = jnp.sum(apart(levels.join(output.box_reg, 4), wanted), -1)
    return {
        "loss_rpn_cls": jnp.where(assignment.ignore, 0.0, entropy) / samples,
        "loss_rpn_box": jnp.where(positive, of_boxes, 0.0) / samples,
    }


def propose(
    output: DetectorOutput,
    image_size: Array,
    *,
    pre_nms: int,
    number: int,
    iou_threshold: float = IOU_THRESHOLD,
) -> Proposals:
    """The proposals of each image: the best anchors of each level, decoded and clipped, then NMS within each level.

    Args:
      output: of the detector.
      image_size: i32[B, 2], height and width that boxes are clipped to; those without area are left out.
      pre_nms: largest number of anchors of a level that enter NMS.
      number: P, of proposals.
      iou_threshold: a box is dropped if its IoU with a better one of its level is above it.

    Returns:
      The proposals, without gradient.

    Scope: each image on its own.

    Peers: mmdetection 3.3.0 RPNHead.predict_by_feat with `min_bbox_size=0`.
    """
    scores = jax.lax.stop_gradient(jax.nn.sigmoid(objectness(output)[..., 0]))
    boxes = clip(jax.lax.stop_gradient(decode_boxes(output)), image_size)
    found, start = [], 0
    for size in levels.level_sizes(output):
        best, index = jax.lax.top_k(scores[:, start : start + size], min(pre_nms, size))
        found.append((best, index + start))
        start += size
    best, index = (jnp.concatenate(part, 1) for part in zip(*found, strict=True))
    level = np.repeat(np.arange(len(found)), [part[0].shape[1] for part in found])
    boxes = jnp.take_along_axis(boxes, index[..., None], 1)
    has_area = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    kept, valid = nms.greedy_nms(
        boxes,
        jnp.where(has_area, best, -jnp.inf),
        np.broadcast_to(level, best.shape),
        iou_threshold=iou_threshold,
        max_detections=number,
    )
    return Proposals(
        boxes=jnp.where(valid[..., None], jnp.take_along_axis(boxes, kept[..., None], 1), 0.0),
        scores=jnp.where(valid, jnp.take_along_axis(best, kept, 1), 0.0),
        valid=valid,
    )
