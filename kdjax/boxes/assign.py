"""Assigners that match priors with ground-truth boxes by their geometry. No gradient flows through them.

Those that depend on the predictions are in `dynamic.py`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kdjax import shapes
from kdjax.boxes.iou import pairwise_iou
from kdjax.boxes.topk import k_smallest
from kdjax.errors import UserError
from kdjax.structs import AnyArray, Array, Assignment, Targets


def inside_padding(priors: AnyArray, pad_size: AnyArray) -> Array:
    """Whether each prior lies in the padded image: its cell starts inside.

    Args:
      priors: f32[N, 4], `x y stride_w stride_h` in pixels, offset 0 .. 1 (exclusive).
      pad_size: i32[B, 2], height and width in pixels.

    Returns:
      bool[B, N].

    Scope: each image on its own.

    Peers: mmdetection's `MlvlPointGenerator.valid_flags`.

    Example:
      >>> import numpy as np
      >>> inside_padding(np.array([[0.0, 0, 8, 8], [8, 0, 8, 8]]), np.array([[16, 8]])).tolist()
      [[True, False]]
    """
    cell = jnp.floor(priors[:, :2] / priors[:, 2:]) * priors[:, 2:]
    size_xy = pad_size[:, None, ::-1].astype(cell.dtype)
    return jnp.all(cell < size_xy, axis=-1)


def assignment_of(
    matched: Array, ignore: AnyArray, quality: AnyArray, num_classes: int, targets: Targets
) -> Assignment:
    """The `Assignment` for `matched`, the index of the box of each prior, which is -1 for background."""
    positive = matched >= 0
    index = jnp.maximum(matched, 0)
    labels = jnp.take_along_axis(targets.labels, index, axis=1)
    boxes = jnp.take_along_axis(targets.boxes, index[..., None], axis=1)
    result = Assignment(
        matched=matched,
        positive=positive,
        ignore=jnp.asarray(ignore),
        labels=jnp.where(positive, labels, num_classes),
        boxes=jnp.where(positive[..., None], boxes, 0),
        quality=jnp.where(positive, quality, 0),
    )
    return jax.lax.stop_gradient(result)


def check_targets(assigner: str, targets: Targets, **priors: AnyArray) -> None:
    """Checks priors or anchors [N, 4] and the targets."""
    shapes.check(
        assigner,
        **{name: (array, "N 4") for name, array in priors.items()},
        **{"targets.boxes": (targets.boxes, "B M 4"), "targets.labels": (targets.labels, "B M")},
        **{"targets.valid": (targets.valid, "B M"), "targets.pad_size": (targets.pad_size, "B 2")},
    )


def max_iou(
    anchors: AnyArray,
    targets: Targets,
    *,
    num_classes: int,
    positive_iou: float,
    negative_iou: float,
    min_positive_iou: float = 0.0,
    match_low_quality: bool = True,
    inside: AnyArray | None = None,
    ignored_boxes: AnyArray | None = None,
    ignore_iof: float | None = None,
) -> Assignment:
    """Assigns each anchor to the box with the highest IoU, if it is high enough, and to each box its best anchors.

    An anchor whose largest IoU is below `negative_iou` is background; with at least `positive_iou` it is matched;
    between the two it is ignored. With `match_low_quality` a box also gets all anchors that share its largest IoU, if
    that is at least `min_positive_iou` (0: even anchors that do not touch it). Of several such boxes the last one wins.

    Args:
      anchors: f32[N, 4], `x1 y1 x2 y2` in pixels, or f32[B, N, 4], of each image.
      targets: the ground truth, M >= 1; invalid rows are ignored.
      num_classes: K, the label of background.
      positive_iou: 0 .. 1.
      negative_iou: 0 .. 1, at most `positive_iou`.
      min_positive_iou: 0 .. 1.
      match_low_quality: whether each box gets its best anchors, see above.
      inside: bool[B, N], the anchors that take part (`inside_padding`); None: all.
      ignored_boxes: f32[B, C, 4], regions such as crowds, in pixels; zeros are padding.
      ignore_iof: anchors with more than this share of their area in an ignored box are ignored; None: none are.

    Returns:
      Assignment with `quality` 1 at matches. An image without boxes is all background.

    Scope: each image on its own.

    Peers: mmdetection's `MaxIoUAssigner`. IoUs that are exactly equal here may differ there, by rounding.

    Reference: Ren et al., Faster R-CNN, NeurIPS 2015, section 3.1.2.

    Example:
      >>> import numpy as np
      >>> truth = Targets(boxes=np.array([[[0.0, 0, 4, 4]]], np.float32), labels=np.array([[2]]),
      ...                 valid=np.array([[True]]), image_size=np.array([[8, 8]]), pad_size=np.array([[8, 8]]))
      >>> anchors = np.array([[0.0, 0, 4, 3], [0, 0, 4, 1], [4, 4, 8, 8]], np.float32)
      >>> max_iou(anchors, truth, num_classes=3, positive_iou=0.5, negative_iou=0.2).labels.tolist()
      [[2, 3, 3]]
    """
    check_targets("max_iou", targets)
    shapes.check("max_iou", anchors=(anchors, "B N 4" if anchors.ndim == 3 else "N 4"))
    batch, num_anchors = targets.boxes.shape[0], anchors.shape[-2]
    takes_part = jnp.ones((batch, num_anchors), bool) if inside is None else inside
    usable = takes_part
    if ignored_boxes is not None and ignore_iof is not None:
        usable &= jnp.max(pairwise_iou(jnp.asarray(anchors), ignored_boxes, mode="iof"), axis=-1) <= ignore_iof
    iou = jnp.where(targets.valid[..., None] & usable[:, None, :], pairwise_iou(targets.boxes, anchors), -1)

    best = jnp.max(iou, axis=1)
    matched = jnp.where(best >= positive_iou, jnp.argmax(iou, axis=1).astype(jnp.int32), -1)
    background = (best >= 0) & (best < negative_iou)
    if match_low_quality:
        best_of_box = jnp.max(iou, axis=2, keepdims=True)
        low = (iou == best_of_box) & (best_of_box >= min_positive_iou) & targets.valid[..., None] & takes_part[:, None]
        last = jnp.max(jnp.where(low, jnp.arange(iou.shape[1])[:, None], -1), axis=1).astype(jnp.int32)
        matched = jnp.where(last >= 0, last, matched)
    empty = ~jnp.any(targets.valid, axis=1, keepdims=True)
    ignore = ~takes_part | ((matched < 0) & ~background & ~empty)
    return assignment_of(matched, ignore, jnp.ones_like(best), num_classes, targets)


def atss_candidates(
    anchors: AnyArray,
    boxes: AnyArray,
    *,
    level_sizes: Sequence[int],
    topk: int = 9,
    inside: AnyArray | None = None,
) -> tuple[Array, Array, Array, Array]:
    """The anchors whose centres are nearest to each box on each level, and the IoU threshold that they give.

    Args:
      anchors: f32[N, 4], `x1 y1 x2 y2` in pixels.
      boxes: f32[B, M, 4], the same.
      level_sizes: number of anchors of each level; their sum is N.
      topk: number of candidates per level; all, if a level has fewer.
      inside: bool[B, N], the anchors that take part (`inside_padding`); None: all.

    Returns:
      (index i32[B, M, T] into the anchors; near bool[B, M, T], False where the anchor takes no part; IoU f32[B, M, T];
      threshold f32[B, M], the mean plus the standard deviation (divisor n - 1) of the IoUs).

    Scope: each box on its own.

    Peers: mmdetection's `ATSSAssigner`.

    Reference: Zhang et al., ATSS, CVPR 2020, algorithm 1, lines 3 to 11.

    Raises:
      UserError: the levels do not add up to N, or a shape is wrong.

    Example:
      >>> import numpy as np
      >>> anchors = np.array([[0.0, 0, 8, 8], [8, 0, 16, 8], [16, 0, 24, 8]], np.float32)
      >>> box = np.array([[[0.0, 0, 8, 8]]], np.float32)
      >>> index, _, overlap, threshold = atss_candidates(anchors, box, level_sizes=[3], topk=2)
      >>> index.tolist(), overlap.tolist(), round(float(threshold[0, 0]), 3)
      ([[[0, 1]]], [[[1.0, 0.0]]], 1.207)
    """
    shapes.check("atss_candidates", anchors=(anchors, "N 4"), boxes=(boxes, "B M 4"))
    if sum(level_sizes) != len(anchors):
        raise UserError(
            f"atss_candidates: level_sizes must add up to the {len(anchors)} anchors, not {sum(level_sizes)}"
        )
    anchors, boxes = jnp.asarray(anchors), jnp.asarray(boxes)
    takes_part = jnp.ones((boxes.shape[0], anchors.shape[0]), bool) if inside is None else inside
    iou = pairwise_iou(boxes, anchors)
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    centre_of_box = (boxes[..., :2] + boxes[..., 2:]) / 2
    distance = jnp.sqrt(jnp.sum((centre_of_box[:, :, None] - centre) ** 2, axis=-1))
    distance = jnp.where(takes_part[:, None, :], distance, jnp.inf)

    nears, candidates, start = [], [], 0
    for size in level_sizes:
        lowest, index = k_smallest(distance[..., start : start + size], min(topk, size))
        nears.append(jnp.isfinite(lowest))
        candidates.append(index + start)
        start += size
    near, index = jnp.concatenate(nears, axis=-1), jnp.concatenate(candidates, axis=-1)
    overlap = jnp.take_along_axis(iou, index, axis=-1)
    count, where = (overlap.shape[-1], None) if inside is None else (jnp.sum(near, axis=-1, keepdims=True), near)
    mean = jnp.sum(overlap, axis=-1, where=where, keepdims=True) / jnp.maximum(count, 1)
    variance = jnp.sum((overlap - mean) ** 2, axis=-1, where=where, keepdims=True) / jnp.maximum(count - 1, 1)
    return index, near, overlap, (mean + jnp.sqrt(variance))[..., 0]


def atss(
    anchors: AnyArray,
    targets: Targets,
    *,
    num_classes: int,
    level_sizes: Sequence[int],
    topk: int = 9,
    inside: AnyArray | None = None,
) -> Assignment:
    """Adaptive training sample selection (ATSS): the IoU threshold of a box comes from the anchors near its centre.

    Of the candidates of a box (`atss_candidates`), those match whose IoU is at least the threshold of the box and whose
    centre lies inside the box by more than 0.01 px. An anchor that several boxes match goes to the one with the largest
    IoU.

    Args:
      anchors: f32[N, 4], `x1 y1 x2 y2` in pixels.
      targets: the ground truth, M >= 1; invalid rows are ignored.
      num_classes: K, the label of background.
      level_sizes: number of anchors of each level; their sum is N.
      topk: number of candidates per level.
      inside: bool[B, N], the anchors that take part (`inside_padding`); None: all.

    Returns:
      Assignment with `quality` 1 at matches; `ignore` marks anchors that do not take part. An image without boxes is
      all background.

    Scope: each image on its own.

    Peers: mmdetection's `ATSSAssigner`.

    Reference: Zhang et al., ATSS, CVPR 2020, algorithm 1.

    Example:
      >>> import numpy as np
      >>> truth = Targets(boxes=np.array([[[0.0, 0, 4, 4]]], np.float32), labels=np.array([[2]]),
      ...                 valid=np.array([[True]]), image_size=np.array([[8, 8]]), pad_size=np.array([[8, 8]]))
      >>> anchors = np.array([[0.0, 0, 4, 3], [0, 0, 4, 1], [4, 4, 8, 8]], np.float32)
      >>> atss(anchors, truth, num_classes=3, level_sizes=(3,)).labels.tolist()
      [[2, 3, 3]]
    """
    check_targets("atss", targets, anchors=anchors)
    anchors = jnp.asarray(anchors)
    candidates, near, overlap, threshold = atss_candidates(
        anchors, targets.boxes, level_sizes=level_sizes, topk=topk, inside=inside
    )
    iou = pairwise_iou(targets.boxes, anchors)
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    x, y = (centre[:, i][candidates] for i in (0, 1))
    x1, y1, x2, y2 = (targets.boxes[:, :, i, None] for i in range(4))
    border = jnp.minimum(jnp.minimum(x - x1, x2 - x), jnp.minimum(y - y1, y2 - y))
    matches = near & (overlap >= threshold[..., None]) & (border > 0.01) & targets.valid[..., None]

    mark = jax.vmap(jax.vmap(lambda index, matches: jnp.zeros(anchors.shape[0], bool).at[index].max(matches)))
    iou_of_match = jnp.where(mark(candidates, matches), iou, -1)
    best = jnp.max(iou_of_match, axis=1)
    matched = jnp.where(best >= 0, jnp.argmax(iou_of_match, axis=1).astype(jnp.int32), -1)
    ignore = jnp.zeros(matched.shape, bool) if inside is None else ~inside
    return assignment_of(matched, ignore, jnp.ones_like(best), num_classes, targets)


def smallest_box(
    priors: AnyArray, targets: Targets, *, num_classes: int, ranges: AnyArray, radius: float | None = None
) -> Assignment:
    """FCOS's assigner: a point is matched with the smallest box around it whose size belongs to its level.

    A box is a candidate if the point is strictly inside and its largest distance to the sides lies in the range of the
    point. With a `radius` the point must also be strictly inside the square around the box's centre whose half side is
    `radius` strides, clipped to the box. Of several candidates the smallest is taken, of equal ones the first.

    Args:
      priors: f32[N, 4], `x y stride_w stride_h` in pixels: the centres of the cells.
      targets: the ground truth, M >= 1; invalid rows are ignored.
      num_classes: K, the label of background.
      ranges: f32[N, 2], smallest and largest distance of each point, both inclusive, in pixels.
      radius: half the side of the centre region, in strides; None: the whole box.

    Returns:
      Assignment with `quality` 1 at matches; nothing is ignored: points outside the padded image are background.

    Scope: each image on its own.

    Peers: mmdetection's `FCOSHead.get_targets`, with `center_sampling` where there is a radius.

    Reference: Tian et al., FCOS, ICCV 2019, section 3.2.

    Example:
      >>> import numpy as np
      >>> priors = np.array([[4.0, 4, 8, 8], [12, 4, 8, 8]], np.float32)
      >>> truth = Targets(boxes=np.array([[[0.0, 0, 8, 8], [0, 0, 16, 8]]], np.float32), labels=np.array([[0, 1]]),
      ...                 valid=np.array([[True, True]]), image_size=np.array([[8, 16]]), pad_size=np.array([[8, 16]]))
      >>> smallest_box(priors, truth, num_classes=2, ranges=np.array([[0, 64], [0, 64]])).matched.tolist()
      [[0, 1]]
    """
    check_targets("smallest_box", targets, priors=priors)
    shapes.check("smallest_box", priors=(priors, "N 4"), ranges=(ranges, "N 2"))
    priors, ranges = jnp.asarray(priors), jnp.asarray(ranges)
    x, y, stride = priors[:, 0], priors[:, 1], priors[:, 2]
    x1, y1, x2, y2 = (targets.boxes[:, :, i, None] for i in range(4))

    def nearest_side(x1: AnyArray, y1: AnyArray, x2: AnyArray, y2: AnyArray) -> Array:
        return jnp.minimum(jnp.minimum(x - x1, x2 - x), jnp.minimum(y - y1, y2 - y))

    farthest_side = jnp.maximum(jnp.maximum(x - x1, x2 - x), jnp.maximum(y - y1, y2 - y))
    candidate = (nearest_side(x1, y1, x2, y2) > 0) & targets.valid[..., None]
    candidate &= (farthest_side >= ranges[:, 0]) & (farthest_side <= ranges[:, 1])
    if radius is not None:
        centre_x, centre_y, reach = (x1 + x2) / 2, (y1 + y2) / 2, radius * stride
        region = (
            jnp.maximum(centre_x - reach, x1),
            jnp.maximum(centre_y - reach, y1),
            jnp.minimum(centre_x + reach, x2),
            jnp.minimum(centre_y + reach, y2),
        )
        candidate &= nearest_side(*region) > 0
    area = jnp.where(candidate, (x2 - x1) * (y2 - y1), jnp.inf)
    matched = jnp.where(jnp.any(candidate, axis=1), jnp.argmin(area, axis=1).astype(jnp.int32), -1)
    ignore = jnp.zeros(matched.shape, bool)
    return assignment_of(matched, ignore, jnp.ones(matched.shape, jnp.float32), num_classes, targets)
