"""Masks of a detector as masks of the original image, in NumPy: what a detector returns is much coarser."""

from collections.abc import Iterator

import numpy as np


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


def _interpolation(outputs: int, inputs: int) -> np.ndarray:
    """What bilinear resizing multiplies a side by, f64[outputs, inputs]."""
    at = np.clip((np.arange(outputs) + 0.5) * inputs / outputs - 0.5, 0, inputs - 1)
    low = np.minimum(at.astype(int), max(inputs - 2, 0))
    weights = np.zeros((outputs, inputs))
    weights[np.arange(outputs), low] = 1 - (at - low)
    if inputs > 1:
        weights[np.arange(outputs), low + 1] = at - low
    return weights
