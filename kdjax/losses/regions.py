"""Masks and weights of cells and priors that come from boxes."""

from collections.abc import Sequence

import jax.numpy as jnp

from kdjax import shapes
from kdjax.boxes import iou
from kdjax.structs import AnyArray, Array


def focal_masks(
    boxes: AnyArray, valid: AnyArray, image_size: AnyArray, map_size: tuple[int, int]
) -> tuple[Array, Array]:
    """Foreground and background weights of the cells of a map (FGD).

    A box covers the cells floor(x1 / W_in * W) .. ceil(x2 / W_in * W), both included, and y alike. A foreground cell
    has the weight 1 / (number of cells of its box), that of the smallest box if there are several; the background cells
    of an image share weight 1. Cells outside the map still count in a box's number of cells.

    Args:
      boxes: f32[B, M, 4], x1 y1 x2 y2 in pixels of the network input.
      valid: bool[B, M], False on padding.
      image_size: i32[B, 2] or i32[2], height and width in pixels of the network input (the padded canvas). The official
        code passes the size of the unpadded image, which shifts the boxes on padded batches.
      map_size: (H, W) of the map.

    Returns:
      foreground f32[B, H, W, 1] in 0 .. 1 and background f32[B, H, W, 1], which sums to 1 per image (0 without
      background). Without boxes the foreground is 0 and the background 1 / (H W).

    Scope: image.
    Peers: FGD's `FeatureLoss`.
    Reference: Yang et al., "Focal and Global Knowledge Distillation for Detectors", 2022, Eqs. 2-3.

    Example:
      >>> box, valid = jnp.array([[[0.0, 0.0, 15.0, 8.0]]]), jnp.array([[True]])
      >>> fg, bg = focal_masks(box, valid, jnp.array([32, 32]), (2, 2))
      >>> fg.ravel().tolist(), bg.ravel().tolist()
      ([0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 0.0])
    """
    shapes.check("focal_masks", boxes=(boxes, "B M 4"), valid=(valid, "B M"), image_size=(image_size, "... 2"))
    boxes = jnp.asarray(boxes, jnp.float32)
    size = jnp.asarray(image_size, jnp.float32)[..., None, :]  # of each image, or of all
    height, width = map_size
    # The tolerance keeps an edge on the border of a cell there: compilers may divide by multiplying by the reciprocal.
    low, high = (lambda x: jnp.floor(x + 1e-5)), (lambda x: jnp.ceil(x - 1e-5))
    x1, x2 = low(boxes[..., 0] / size[..., 1] * width), high(boxes[..., 2] / size[..., 1] * width)
    y1, y2 = low(boxes[..., 1] / size[..., 0] * height), high(boxes[..., 3] / size[..., 0] * height)
    share = jnp.where(valid, 1 / (jnp.maximum(x2 - x1 + 1, 1) * jnp.maximum(y2 - y1 + 1, 1)), 0.0)
    covered = _inside(y1, y2, height)[..., :, None] & _inside(x1, x2, width)[..., None, :]
    foreground = jnp.max(jnp.where(covered, share[..., None, None], 0.0), 1, initial=0.0)
    background = (foreground == 0).astype(jnp.float32)
    background = background / jnp.maximum(background.sum((1, 2), keepdims=True), 1)
    return foreground[..., None], background[..., None]


def level_masks(
    boxes: AnyArray, valid: AnyArray, strides: Sequence[int], map_sizes: Sequence[tuple[int, int]]
) -> tuple[Array, ...]:
    """Foreground masks of all levels, each box on the level that matches its size (DeFeat).

    The level is floor(log2(sqrt((w + 1) (h + 1)) / 56)), clipped to the available ones; the cells are
    int(x1 / stride) .. int(x2 / stride) - 1, at least one, and y alike.

    Args:
      boxes: f32[B, M, 4], x1 y1 x2 y2 in pixels of the network input.
      valid: bool[B, M], False on padding.
      strides: of the levels, fine to coarse, in pixels.
      map_sizes: (H, W) of the levels.

    Returns:
      For each level bool[B, H, W, 1], True inside a box of the level.

    Scope: image.
    Peers: the official DeFeat code.
    Reference: Guo et al., "Distilling Object Detectors via Decoupled Features", 2021, Eq. 1.

    Example:
      >>> box, valid = jnp.array([[[8.0, 0.0, 24.0, 8.0]]]), jnp.array([[True]])
      >>> fine, coarse = level_masks(box, valid, (8, 16), ((1, 4), (1, 2)))
      >>> fine.ravel().tolist(), coarse.ravel().tolist()
      ([False, True, True, False], [False, False])
    """
    shapes.check("level_masks", boxes=(boxes, "B M 4"), valid=(valid, "B M"))
    boxes = jnp.asarray(boxes, jnp.float32)
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2] + 1, 1e-6)
    level = jnp.floor(jnp.log2(jnp.sqrt(sides[..., 0] * sides[..., 1]) / 56) + 1e-6)
    level = jnp.clip(level, 0, len(strides) - 1)
    masks = []
    for index, (stride, (height, width)) in enumerate(zip(strides, map_sizes, strict=True)):
        low, high = jnp.trunc(boxes[..., :2] / stride), jnp.trunc(boxes[..., 2:] / stride)
        high = jnp.maximum(high - 1, low)  # half-open; a box without area covers one cell
        rows, columns = _inside(low[..., 1], high[..., 1], height), _inside(low[..., 0], high[..., 0], width)
        covered = rows[..., :, None] & columns[..., None, :] & (valid & (level == index))[..., None, None]
        masks.append(jnp.any(covered, 1)[..., None])
    return tuple(masks)


def fine_grained_mask(boxes: AnyArray, valid: AnyArray, anchors: AnyArray, *, psi: float = 0.5) -> Array:
    """Mask of the cells with an anchor whose IoU with a box is above psi times the best IoU of that box (FGFI).

    Args:
      boxes: f32[B, M, 4], x1 y1 x2 y2 in pixels.
      valid: bool[B, M], False on padding.
      anchors: f32[H, W, A, 4], the same coordinates.
      psi: 0 .. 1; 0 keeps every cell that overlaps a box, larger values a subset.

    Returns:
      bool[B, H, W, 1]. The cell of a box's best anchor is always among them, unless nothing overlaps the box.

    Scope: image.
    Peers: the official FGFI code.
    Reference: Wang et al., "Distilling Object Detectors with Fine-grained Feature Imitation", 2019, section 3.2.

    Example:
      >>> anchors = jnp.array([[0.0, 0, 8, 8], [8, 0, 16, 8]]).reshape(1, 2, 1, 4)
      >>> fine_grained_mask(jnp.array([[[0.0, 0, 9, 8]]]), jnp.array([[True]]), anchors).ravel().tolist()
      [True, False]
    """
    shapes.check("fine_grained_mask", boxes=(boxes, "B M 4"), valid=(valid, "B M"), anchors=(anchors, "H W A 4"))
    height, width, count, _ = anchors.shape
    overlap = iou.pairwise_iou(jnp.asarray(boxes, jnp.float32), jnp.asarray(anchors, jnp.float32).reshape(-1, 4))
    overlap = jnp.where(valid[..., None], overlap, 0.0)
    best = jnp.max(overlap, -1, keepdims=True)
    kept = (overlap > psi * best) | ((overlap == best) & (best > 0))  # psi = 1 keeps the best one
    kept = jnp.any(kept, 1).reshape(-1, height, width, count)
    return jnp.any(kept, -1, keepdims=True)


def _inside(low: AnyArray, high: AnyArray, cells: int) -> Array:
    """bool[B, M, cells]: low <= cell <= high."""
    cell = jnp.arange(cells)
    return (cell >= low[..., None]) & (cell <= high[..., None])


def valuable_region(
    anchors: AnyArray, boxes: AnyArray, valid: AnyArray, threshold: AnyArray, *, gamma: float = 0.25
) -> Array:
    """Weights of LD's valuable localisation region: the largest IoU with a box whose DIoU lies in [gamma a, a).

    Args:
      anchors: f32[N, 4], x1 y1 x2 y2 in pixels.
      boxes: f32[B, M, 4], the same.
      valid: bool[B, M], False on padding.
      threshold: f32[B, M], a of each box, from `kdjax.boxes.atss_candidates`.
      gamma: lower bound of the region as a share of a, 0 .. 1; 1 makes it empty.

    Returns:
      f32[B, N] in 0 .. 1, zero outside the region. A positive prior may lie in it too.

    Scope: image.
    Peers: the official LD code.
    Reference: Zheng et al., "Localization Distillation for Dense Object Detection", 2022, Algorithm 1.

    Example:
      >>> anchors = jnp.array([[0.0, 0, 8, 8], [2, 0, 10, 8], [40, 0, 48, 8]])
      >>> box, valid = jnp.array([[[0.0, 0, 8, 8]]]), jnp.array([[True]])
      >>> [round(float(u), 2) for u in valuable_region(anchors, box, valid, jnp.array([[0.8]]))[0]]
      [0.0, 0.6, 0.0]
    """
    shapes.check(
        "valuable_region",
        anchors=(anchors, "N 4"),
        boxes=(boxes, "B M 4"),
        valid=(valid, "B M"),
        threshold=(threshold, "B M"),
    )
    anchors, boxes = jnp.asarray(anchors, jnp.float32), jnp.asarray(boxes, jnp.float32)
    overlap = iou.pairwise_iou(boxes, anchors)
    distance_iou = iou.pairwise_iou(boxes, anchors, mode="diou", eps=1e-7)
    a = threshold[..., None]
    inside = (distance_iou >= gamma * a) & (distance_iou < a) & valid[..., None]
    return jnp.max(jnp.where(inside, overlap, 0.0), 1, initial=0.0)
