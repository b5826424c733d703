"""Masks over feature maps that come from ground-truth boxes: FGD, DeFeat, FGFI."""

from collections.abc import Sequence

import jax.numpy as jnp

from kdjax.boxes import iou
from kdjax.structs import Array


def _inside(low: Array, high: Array, cells: int) -> Array:
    """bool[B, M, cells]: low <= cell <= high."""
    cell = jnp.arange(cells)
    return (cell >= low[..., None]) & (cell <= high[..., None])


def focal_masks(boxes: Array, valid: Array, image_size: Array, map_size: tuple[int, int]) -> tuple[Array, Array]:
    """FGD's foreground and background weights of the cells of a map.

    A box covers the cells floor(x1 / W_in * W) .. ceil(x2 / W_in * W), both included, and y alike. A foreground cell
    weighs 1 / (number of cells of its box), the smallest box wins; the background cells of an image share weight 1.
    Cells beyond the map are cut off, but still count in a box's number of cells.

    Args:
      boxes: f32[B, M, 4], x1 y1 x2 y2 in pixels of the network input.
      valid: bool[B, M], False on padding.
      image_size: i32[B, 2] or i32[2], height and width in pixels of the network input (the padded canvas). The official
        code gives the size of the unpadded image here, which shifts the boxes on padded batches.
      map_size: (H, W) of the map.

    Returns:
      foreground f32[B, H, W, 1] in 0 .. 1 and background f32[B, H, W, 1], which sums to 1 an image (0 without
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
    boxes = jnp.asarray(boxes, jnp.float32)
    size = jnp.asarray(image_size, jnp.float32)[..., None, :]  # pairs with the boxes, or with all of them
    height, width = map_size
    # An edge on the border of a cell may come out beside it, as compilers divide by multiplying with the reciprocal.
    low, high = (lambda x: jnp.floor(x + 1e-5)), (lambda x: jnp.ceil(x - 1e-5))
    x1, x2 = low(boxes[..., 0] / size[..., 1] * width), high(boxes[..., 2] / size[..., 1] * width)
    y1, y2 = low(boxes[..., 1] / size[..., 0] * height), high(boxes[..., 3] / size[..., 0] * height)
    share = jnp.where(valid, 1 / (jnp.maximum(x2 - x1 + 1, 1) * jnp.maximum(y2 - y1 + 1, 1)), 0.0)
    covered = _inside(y1, y2, height)[..., :, None] & _inside(x1, x2, width)[..., None, :]
    foreground = jnp.max(jnp.where(covered, share[..., None, None], 0.0), 1, initial=0.0)
    background = (foreground == 0).astype(jnp.float32)
    background = background / jnp.maximum(background.sum((1, 2), keepdims=True), 1)
    return foreground[..., None], background[..., None]


def levelled_masks(
    boxes: Array, valid: Array, strides: Sequence[int], map_sizes: Sequence[tuple[int, int]]
) -> tuple[Array, ...]:
    """DeFeat's foreground masks: every box on the one level that its size calls for.

    The level is floor(log2(sqrt((w + 1) (h + 1)) / 56)) within the available ones; the cells are
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
      >>> fine, coarse = levelled_masks(box, valid, (8, 16), ((1, 4), (1, 2)))
      >>> fine.ravel().tolist(), coarse.ravel().tolist()
      ([False, True, True, False], [False, False])
    """
    boxes = jnp.asarray(boxes, jnp.float32)
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2] + 1, 1e-6)
    level = jnp.floor(jnp.log2(jnp.sqrt(sides[..., 0] * sides[..., 1]) / 56) + 1e-6)
    level = jnp.clip(level, 0, len(strides) - 1)
    masks = []
    for index, (stride, (height, width)) in enumerate(zip(strides, map_sizes, strict=True)):
        low, high = jnp.trunc(boxes[..., :2] / stride), jnp.trunc(boxes[..., 2:] / stride)
        high = jnp.maximum(high - 1, low)  # half-open, and a box without area fills one cell
        rows, columns = _inside(low[..., 1], high[..., 1], height), _inside(low[..., 0], high[..., 0], width)
        covered = rows[..., :, None] & columns[..., None, :] & (valid & (level == index))[..., None, None]
        masks.append(jnp.any(covered, 1)[..., None])
    return tuple(masks)


def fine_grained_mask(boxes: Array, valid: Array, anchors: Array, *, psi: float = 0.5) -> Array:
    """FGFI's mask: the cells with an anchor whose IoU with a box is above psi times the best IoU of that box.

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
    height, width, count, _ = anchors.shape
    overlap = iou.pairwise(jnp.asarray(boxes, jnp.float32), jnp.asarray(anchors, jnp.float32).reshape(-1, 4))
    overlap = jnp.where(valid[..., None], overlap, 0.0)
    best = jnp.max(overlap, -1, keepdims=True)
    kept = (overlap > psi * best) | ((overlap == best) & (best > 0))  # psi = 1 keeps the best one
    kept = jnp.any(kept, 1).reshape(-1, height, width, count)
    return jnp.any(kept, -1, keepdims=True)
