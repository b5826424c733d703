"""Masks of objects: COCO's segmentations checked, kept on disk, moved with their image and drawn in a batch.

A mask stays as it is in its original image, run-length encoded in the box around it. Of an image that is resized,
cropped and mirrored only the way from there is kept; the mask is drawn once, at a quarter of the resolution, within its
box.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from kdjax.data import hashes

STRIDE = 4  # px of the canvas, side of a cell of the masks of a batch
VERSION = "1"  # of the files that `write` writes

EMPTY = "mask is empty"
FEW_POINTS = "polygon has fewer than 3 points: left out"
_FAR = 1  # heights or widths of the image, outside of it

Segmentation = Any  # a list of polygons, each a list x y x y ..., or an RLE: {"size": [h, w], "counts": text or list}


def usable(segmentation: Segmentation, size: tuple[int, int]) -> tuple[Segmentation | None, str]:
    """What can be used of a segmentation of a json, and why the rest cannot.

    Args:
      segmentation: of any form; what is not one is reported. None and [] are objects without masks.
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
        flat = "polygons are not lists in a list, [[x, y, ...]]"
        return None, flat if all(map(_finite, polygons)) else "polygon is not a list of finite numbers"
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
        if sum(map(area, kept)) < 1 and not all(shape(kept, size).size):
            return None, EMPTY
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
    return "" if lengths[1::2].any() else EMPTY


def area(ring: list[float]) -> float:
    """What a polygon x y x y … encloses, in pixels."""
    x, y = np.asarray(ring[::2], float), np.asarray(ring[1::2], float)
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2


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


class Shape(NamedTuple):
    """A mask in its original image; of size 0 x 0 if it covers no pixel."""

    corner: tuple[int, int]  # x, y of its box in pixels
    size: tuple[int, int]  # height, width of its box in pixels
    counts: bytes  # COCO's compressed RLE of the mask in its box

    def decoded(self) -> np.ndarray:
        """u8[h, w], 1 on the object."""
        from faster_coco_eval.core import mask

        if not all(self.size):
            return np.zeros(self.size, np.uint8)
        return mask.decode({"size": list(self.size), "counts": self.counts})


def shape(segmentation: Segmentation, size: tuple[int, int]) -> Shape:
    """The mask of a usable segmentation, as COCO draws it.

    Args:
      segmentation: see `usable`.
      size: height and width of the image in pixels.

    Peers: pycocotools' `annToMask`.

    Example:
      >>> some = shape([[1, 2, 4, 2, 4, 4, 1, 4]], (10, 10))
      >>> some.corner, some.decoded().tolist()
      ((1, 2), [[1, 1, 1], [1, 1, 1]])
    """
    from faster_coco_eval.core import mask

    rle = segmentation
    if isinstance(segmentation, list):
        rings: Any = mask.frPyObjects([[float(v) for v in ring] for ring in segmentation], *size)
        rle = mask.merge(rings)
    lengths = runs(rle)
    assert lengths is not None
    if not lengths[1::2].any():
        return Shape((0, 0), (0, 0), b"")
    left, top, width, height = (int(v) for v in box({"size": size, "counts": rle["counts"]}))
    # Only the columns of the box are decoded: images are large, most objects are small.
    starts = np.cumsum(lengths) - lengths
    within = np.clip(np.append(starts, size[0] * size[1]), left * size[0], (left + width) * size[0])
    columns = np.repeat((np.arange(len(lengths)) % 2).astype(np.uint8), np.diff(within)).reshape(width, size[0])
    return Shape((left, top), (height, width), mask.encode(columns[:, top : top + height].T)["counts"])


def write(folder: Path, truth: Mapping[str, Any]) -> None:
    """Writes the masks of a COCO instances dict into an empty folder, for `Store`.

    Args:
      folder: is sealed (`hashes.seal`).
      truth: of prepared data; annotations without a usable segmentation are left out.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    shapes = {}
    for entry in truth["annotations"]:
        size = sizes[entry["image_id"]]
        kept, _ = usable(entry.get("segmentation"), size)  # prepared data may be older than this check
        if kept and not entry["iscrowd"]:
            shapes[entry["id"]] = shape(kept, size)
    ids = sorted(shapes)
    boxes = [(*shapes[i].corner, *shapes[i].size) for i in ids]
    np.save(folder / "ids.npy", np.array(ids, np.int64))
    np.save(folder / "boxes.npy", np.array(boxes, np.int32).reshape(-1, 4))
    np.save(folder / "ends.npy", np.cumsum([len(shapes[i].counts) for i in ids], dtype=np.int64))
    np.save(folder / "counts.npy", np.frombuffer(b"".join(shapes[i].counts for i in ids), np.uint8))
    hashes.seal(folder)


@dataclasses.dataclass(frozen=True)
class Store:
    """The masks that `write` wrote, by the ids of their annotations; picklable, maps its files where it is used."""

    folder: Path

    @functools.cached_property
    def _files(self) -> tuple[np.ndarray, ...]:
        return tuple(np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "boxes", "ends", "counts"))

    def __reduce__(self) -> tuple[type["Store"], tuple[Path]]:
        return Store, (self.folder,)

    def __len__(self) -> int:
        return len(self._files[0])

    def checked(self) -> "Store":
        """This store, after its files were compared with their hashes.

        Raises:
          UserError: a file is damaged or missing.
        """
        for name, expected in hashes.sealed(self.folder).items():
            path = self.folder / name
            if not path.is_file() or hashes.of_file(path) != expected:
                raise hashes.damaged(path, self.folder)
        return self

    def __call__(self, ids: Iterable[int]) -> list[Shape | None]:
        """The masks of annotations; None where one has no mask."""
        known, boxes, ends, counts = self._files
        found = []
        for identity in ids:
            at = int(np.searchsorted(known, identity))
            if at == len(known) or known[at] != identity:
                found.append(None)
                continue
            x, y, height, width = boxes[at].tolist()
            text = counts[ends[at - 1] if at else 0 : ends[at]].tobytes()
            found.append(Shape((x, y), (height, width), text))
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Masks:
    """The masks of the n objects of an image, and the way from their original images to it."""

    shapes: tuple[Shape, ...]
    scale: np.ndarray  # f64[n, 2]: the point p = (x, y) of the original lies at p * scale + offset; < 0: mirrored
    offset: np.ndarray  # f64[n, 2], px
    window: np.ndarray  # f64[n, 4], x1 y1 x2 y2 in pixels of the image: what is outside is cut off

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, rows: np.ndarray) -> "Masks":
        """The masks that a boolean mask or indices select."""
        shapes = tuple(self.shapes[i] for i in np.arange(len(self))[rows])
        return Masks(shapes, self.scale[rows], self.offset[rows], self.window[rows])

    def moved(self, scale: tuple[float, float], offset: tuple[float, float]) -> "Masks":
        """After every point (x, y) of the image has moved to (x, y) * scale + offset."""
        ends = self.window.reshape(-1, 2, 2) * scale + offset
        window = np.concatenate([ends.min(1), ends.max(1)], axis=1)
        return Masks(self.shapes, self.scale * scale, self.offset * scale + offset, window)

    def cut(self, width: int, height: int) -> "Masks":
        """Without what is outside 0 .. width, 0 .. height."""
        return dataclasses.replace(self, window=np.clip(self.window, 0, [width, height, width, height]))

    def drawn(self, canvas: tuple[int, int]) -> np.ndarray:
        """The masks u8[n, H / 4, W / 4] on a canvas: of each 4 x 4 pixels the share that the object covers, of 255.

        Args:
          canvas: H, W in pixels; the image is at its top left.
        """
        out = np.zeros((len(self), *(-(-side // STRIDE) for side in canvas)), np.uint8)
        for row, one, scale, offset, window in zip(out, self.shapes, self.scale, self.offset, self.window, strict=True):
            cells = [
                (max(int(low // STRIDE), 0), min(math.ceil(high / STRIDE), count))
                for low, high, count in zip(window[1::-1], window[:1:-1], row.shape, strict=True)
            ]
            if not all(one.size) or any(first >= last for first, last in cells):
                continue
            # Where the borders of the cells lie in the box of the mask, in its pixels.
            ys, xs = (
                (np.clip(np.arange(first, last + 1) * STRIDE, low, high) - shift) / factor - corner
                for (first, last), low, high, shift, factor, corner in zip(
                    cells, window[1::-1], window[:1:-1], offset[::-1], scale[::-1], one.corner[::-1], strict=True
                )
            )
            share = _sums(one.decoded(), ys, xs) * (abs(scale.prod()) / STRIDE**2)
            row[slice(*cells[0]), slice(*cells[1])] = np.minimum(share * 255 + 0.5, 255)
        return out


def masks_of(shapes: Sequence[Shape]) -> Masks:
    """Masks in their original image."""
    boxes = np.array([[*one.corner, *one.size[::-1]] for one in shapes], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Masks(tuple(shapes), np.ones((len(boxes), 2)), np.zeros((len(boxes), 2)), boxes)


def joined(parts: Sequence[Masks]) -> Masks:
    """The masks of several images that were put into one."""
    arrays = (np.concatenate([getattr(part, name) for part in parts]) for name in ("scale", "offset", "window"))
    return Masks(tuple(one for part in parts for one in part.shapes), *arrays)


def _sums(mask: np.ndarray, ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
    """Sums of a mask u8[h, w] in the cells between the positions ys f64[k + 1] and xs f64[l + 1]: f64[k, l].

    A pixel is shared by the cells that it lies in. The sum up to a point is linear in both coordinates within a pixel.
    """
    until = _linear(_linear(cv2.integral(mask.T), xs).T, ys)  # decoded masks run down the columns
    return np.abs(np.diff(np.diff(until, axis=0), axis=1))


def _linear(table: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The rows of a table at positions, between its rows linearly interpolated."""
    at = np.clip(at, 0, len(table) - 1)
    low = np.minimum(at.astype(int), len(table) - 2)
    return table[low] + (at - low)[:, None] * (table[low + 1] - table[low])


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e9


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
