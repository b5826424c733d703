"""Masks of a detector as masks of the original image, in NumPy: what a detector returns is much coarser."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle


def encoded(masks: Iterable[np.ndarray]) -> tuple[dict[str, Any], ...]:
    """COCO's compressed RLE of masks bool[height, width], as `structs.Detections.masks` has it.

    Example:
      >>> encoded([np.array([[False, True], [False, True]])])
      ({'size': [2, 2], 'counts': b'22'},)
    """
    return tuple(rle.encode(np.asfortranarray(mask, np.uint8)) for mask in masks)


def from_canvas(
    logits: np.ndarray,
    canvas: tuple[int, int],
    image_size: tuple[int, int],
    original_size: tuple[int, int],
    *,
    threshold: float = 0.5,
) -> Iterator[np.ndarray]:
    """Masks of the whole canvas ("canvas" of `Detector.masks`) as masks of the original image, one after the other.

    Logits are resized to the canvas, then by original_size / image_size, both bilinearly and without antialiasing, and
    cut to the image (the lower right is padding). A pixel belongs to the object if its probability is above the
    threshold.

    Args:
      logits: f32[n, h, w].
      canvas: H, W in pixels, multiples of h, w.
      image_size: height and width of the image on the canvas in pixels.
      original_size: height and width of the original image in pixels.
      threshold: above 0, below 1.

    Yields:
      bool[height, width] of each mask, in the size of the original image.

    Scope: each mask on its own. Only one of them is held in full resolution.

    Peers: mmdetection 3.3.0 RTMDetInsHead with `rescale=True` (with one ratio for both sides).

    Example:
      >>> logits = np.array([[[4.0, -4.0], [4.0, -4.0]]], np.float32)
      >>> next(from_canvas(logits, (4, 4), (4, 4), (2, 2))).tolist()
      [[True, False], [True, False]]
    """
    rows, columns = (
        (_interpolation(-(-side * length // part), side)[:length] @ _interpolation(side, cells)).astype(np.float32)
        for cells, side, part, length in zip(logits.shape[1:], canvas, image_size, original_size, strict=True)
    )
    cut = np.float32(np.log(threshold / (1 - threshold)))
    for one in np.asarray(logits, np.float32):
        yield rows @ one @ columns.T > cut


def from_boxes(
    probs: np.ndarray, boxes: np.ndarray, original_size: tuple[int, int], *, threshold: float = 0.5
) -> Iterator[np.ndarray]:
    """Masks of the detections' boxes ("box" of `Detector.masks`) as masks of the original image, one after the other.

    The cells of the box are interpolated bilinearly at the centres of the pixels; beyond the outer cells' centres the
    probability falls to 0 within the width of a cell. A pixel belongs to the object if its probability is at least the
    threshold.

    Args:
      probs: f32[n, m, m], 0 .. 1.
      boxes: f[n, 4], x1 y1 x2 y2 in pixels of the original image.
      original_size: height and width of the original image in pixels.
      threshold: above 0, below 1.

    Yields:
      bool[height, width] of each mask.

    Scope: each mask on its own. Only one of them is held in full resolution.

    Peers: mmdetection 3.3.0 FCNMaskHead with `rescale=True`.

    Example:
      >>> next(from_boxes(np.ones((1, 2, 2)), np.array([[1, 0, 3, 2]]), (2, 4))).tolist()
      [[False, True, True, False], [False, True, True, False]]
    """
    for one, (x0, y0, x1, y1) in zip(np.asarray(probs, np.float32), np.asarray(boxes, np.float64), strict=True):
        rows, columns = (
            _tents((np.arange(side) + 0.5 - low) / max(high - low, 1e-9) * cells - 0.5, cells)
            for side, low, high, cells in zip(original_size, (y0, x0), (y1, x1), one.shape, strict=True)
        )
        yield rows @ one @ columns.T >= threshold


def _tents(at: np.ndarray, cells: int) -> np.ndarray:
    """What bilinear interpolation at positions multiplies each cell by, f32[positions, cells]; 0 beyond them."""
    return np.clip(1 - np.abs(at[:, None] - np.arange(cells)), 0, 1).astype(np.float32)


def _interpolation(outputs: int, inputs: int) -> np.ndarray:
    """What bilinear resizing multiplies a side by, f64[outputs, inputs]."""
    at = np.clip((np.arange(outputs) + 0.5) * inputs / outputs - 0.5, 0, inputs - 1)
    low = np.minimum(at.astype(int), max(inputs - 2, 0))
    weights = np.zeros((outputs, inputs))
    weights[np.arange(outputs), low] = 1 - (at - low)
    if inputs > 1:
        weights[np.arange(outputs), low + 1] = at - low
    return weights
