"""COCO's segmentations: whether they can be used, and the boxes around them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

FEW_POINTS = "polygon has fewer than 3 points: left out"
_FAR = 1  # heights or widths of the image, outside of it

Segmentation = Any  # a list of polygons, each a list x y x y ..., or an RLE: {"size": [h, w], "counts": text or list}


def usable(segmentation: Segmentation, size: tuple[int, int]) -> tuple[Segmentation | None, str]:
    """What can be used of a segmentation of a json, and why the rest cannot.

    Args:
      segmentation: of any form: what is not one is told. None and [] are objects without masks.
      size: height and width of the image in pixels; 0 if they are not known yet.

    Returns:
      The segmentation, without polygons that enclose nothing, or None; and the reason of a change, "" without one.

    Example:
      >>> usable([[1, 1, 9, 1, 9, 9]], (10, 10))
      ([[1, 1, 9, 1, 9, 9]], '')
      >>> usable([[1, 1, 9, 1, 9]], (10, 10))
      (None, 'polygon has an odd number of coordinates')
      >>> usable({"size": [2, 2], "counts": [1, 2]}, (2, 2))
      (None, 'counts of the RLE do not sum to height x width')
    """
    if segmentation is None or segmentation == []:
        return None, ""
    if isinstance(segmentation, list):
        return _usable_polygons(segmentation, size)
    if isinstance(segmentation, dict):
        reason = _rle_fault(segmentation, size)
        return (None, reason) if reason else (segmentation, "")
    return None, "segmentation is neither a list of polygons nor an RLE"


def _usable_polygons(polygons: list[Any], size: tuple[int, int]) -> tuple[list[Any] | None, str]:
    if not all(isinstance(ring, list) and all(map(_finite, ring)) for ring in polygons):
        return None, "polygon is not a list of finite numbers"
    if any(len(ring) % 2 for ring in polygons):
        return None, "polygon has an odd number of coordinates"
    kept = [ring for ring in polygons if len(ring) >= 6]
    if not kept:
        return None, "polygon has fewer than 3 points"
    if all(size):
        x0, y0, w, h = box(kept)
        if x0 >= size[1] or y0 >= size[0] or x0 + w <= 0 or y0 + h <= 0:
            return None, "polygon outside the image"
        sides = zip((x0, y0), (x0 + w, y0 + h), size[::-1], strict=True)
        if any(low < -_FAR * side or high > (1 + _FAR) * side for low, high, side in sides):
            return None, "polygon reaches farther outside the image than the image is large"
    return kept, FEW_POINTS if len(kept) < len(polygons) else ""


def _rle_fault(rle: Mapping[str, Any], size: tuple[int, int]) -> str:
    own, counts = rle.get("size"), rle.get("counts")
    if not isinstance(own, list) or len(own) != 2 or not all(_whole(side) and side > 0 for side in own):
        return "size of the RLE is not [height, width]"
    if all(size) and tuple(own) != size:
        return "size of the RLE is not that of the image"
    if not isinstance(counts, str) and not (isinstance(counts, list) and all(map(_whole, counts))):
        return "counts of the RLE are neither text nor whole numbers"
    lengths = runs(rle)
    if lengths is None or (lengths < 0).any():
        return "counts of the RLE cannot be read"
    if lengths.sum() != own[0] * own[1]:
        return "counts of the RLE do not sum to height x width"
    return "" if lengths[1::2].any() else "mask is empty"


def runs(rle: Mapping[str, Any]) -> np.ndarray | None:
    """The lengths of an RLE's runs i64[r], off and on in turn, down the columns; None if its text is no such list.

    COCO's text: six bits a character, above 48. Five are a part of the number, the lowest first; the sixth says that
    more follow; the last of them is the sign. From the fourth run on it is the difference to the run two before.

    Example:
      >>> runs({"size": [2, 2], "counts": "121"}).tolist()
      [1, 2, 1]
    """
    counts = rle["counts"]
    if isinstance(counts, list):
        return np.array([max(-1, min(count, 2**40)) for count in counts], np.int64)
    codes = np.frombuffer((counts if isinstance(counts, bytes) else counts.encode()), np.uint8).astype(np.int64) - 48
    last = codes < 32
    if not codes.size or codes.min() < 0 or codes.max() >= 64 or not last[-1]:
        return None
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 7:  # 40 bits
        return None
    place = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    numbers = np.add.reduceat((codes & 31) << (5 * place), starts)
    numbers -= np.where(codes[ends] & 16, np.int64(32) << (5 * place[ends]), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def box(segmentation: Segmentation) -> list[float]:
    """The box x y w h around a usable segmentation: around the points of polygons, or around the pixels of an RLE.

    Example:
      >>> box([[1, 2, 9.5, 2, 9.5, 8]]), box({"size": [4, 3], "counts": [5, 2, 5]})
      ([1, 2, 8.5, 6], [1, 1, 1, 2])
    """
    if isinstance(segmentation, list):
        xs, ys = ([v for ring in segmentation for v in ring[axis::2]] for axis in (0, 1))
        return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    height, lengths = segmentation["size"][0], runs(segmentation)
    assert lengths is not None
    ends = np.cumsum(lengths)[1::2]
    starts = (ends - lengths[1::2])[lengths[1::2] > 0]
    first, last = starts, ends[lengths[1::2] > 0] - 1
    left, right = int(first.min() // height), int(last.max() // height)
    whole = bool((first // height != last // height).any())  # a run over the end of a column
    top = 0 if whole else int((first % height).min())
    bottom = height - 1 if whole else int((last % height).max())
    return [left, top, right - left + 1, bottom - top + 1]


def touches(segmentation: Segmentation, bbox: list[float]) -> bool:
    """Whether the box of a usable segmentation and a box x y w h are less than a pixel apart."""
    (x, y, w, h), (x0, y0, w0, h0) = box(segmentation), bbox
    return x < x0 + w0 + 1 and y < y0 + h0 + 1 and x0 < x + w + 1 and y0 < y + h + 1


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e9


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
