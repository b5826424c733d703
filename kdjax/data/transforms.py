"""Geometry and colour of training and evaluation images; boxes and masks move with the pixels.

Coordinates are continuous: an image spans 0 .. w. Objects are clipped where their image is cropped, and dropped if too
little is left (`crop`). The steps are those of RTMDet (Lyu et al. 2022, arXiv 2212.07784).

A teacher's detections of an image (`Sample.found`) move as its objects do, by the same three functions of `Sample`, and
change neither the pixels nor what is drawn at random.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from kdjax.data import masks, recipes
from kdjax.data.masks import Masks
from kdjax.data.recipes import Recipe

PAD = 114  # grey level of the canvas outside the image
MIN_SIZE = 1.0  # px: a box with a shorter side after a crop is dropped
MIN_VISIBLE = 0.1  # a box is dropped if a crop leaves a smaller share of its area


class Sample(NamedTuple):
    """An image with its n objects and d detections, all in pixels of that image."""

    image: Any  # u8[h, w, 3] RGB, or how the device is to make it (`recipes.Recipe`)
    boxes: np.ndarray  # f32[n, 4] x1 y1 x2 y2
    labels: np.ndarray  # i32[n]
    masks: Masks | None = None  # n masks; None if they are not asked for
    found: np.ndarray | None = None  # f32[d, 6] x1 y1 x2 y2, label, score; None if there is no file of detections

    def on(
        self, image: np.ndarray | Recipe, *, scale: tuple[float, float] = (1, 1), offset: tuple[float, float] = (0, 0)
    ) -> "Sample":
        """Objects and detections on another image, to which every point (x, y) moves: (x, y) * scale + offset, px."""
        move = _moved(scale, offset)
        masks = None if self.masks is None else self.masks.moved(scale, offset)
        return self._with_boxes(move)._replace(image=image, masks=masks)

    def clipped(self) -> "Sample":
        """Without what is outside of the image."""
        height, width = self.image.shape[:2]
        masks = None if self.masks is None else self.masks.cut(width, height)
        return self._with_boxes(lambda boxes: _clipped(boxes, (height, width)))._replace(masks=masks)

    def kept(self, choose: Callable[[np.ndarray], np.ndarray]) -> "Sample":
        """With only those objects and detections whose boxes are chosen: boxes f32[k, 4] -> bool[k]."""
        keep = choose(self.boxes)
        return self._replace(
            boxes=self.boxes[keep],
            labels=self.labels[keep],
            masks=None if self.masks is None else self.masks[keep],
            found=None if self.found is None else self.found[choose(self.found[:, :4])],
        )

    def _with_boxes(self, change: Callable[[np.ndarray], np.ndarray]) -> "Sample":
        """With other boxes, of objects and of detections: f32[k, 4] -> f32[k, 4]."""
        found = self.found
        if found is not None:
            found = np.concatenate([change(found[:, :4]), found[:, 4:]], axis=1)
        return self._replace(boxes=change(self.boxes), found=found)


def _moved(scale: tuple[float, float], offset: tuple[float, float]) -> Callable[[np.ndarray], np.ndarray]:
    """Boxes f32[k, 4] -> boxes after every point has moved; a negative scale mirrors."""

    def move(boxes: np.ndarray) -> np.ndarray:
        ends = boxes.reshape(-1, 2, 2) * np.array(scale, np.float32) + np.array(offset, np.float32)
        return np.concatenate([ends.min(1), ends.max(1)], axis=1)

    return move


def _clipped(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes f32[k, 4] clipped to an image of (h, w) px."""
    return np.clip(boxes, 0, np.array([size[1], size[0]] * 2, np.float32))


def resize(sample: Sample, size: tuple[int, int]) -> Sample:
    """Resizes bilinearly to size (h, w) px; boxes and masks by the exact ratio of each axis."""
    height, width = sample.image.shape[:2]
    if (height, width) == tuple(size):
        return sample
    if isinstance(sample.image, Recipe):
        image = sample.image.resized(size)
    else:
        image = cv2.resize(sample.image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    return sample.on(image, scale=(size[1] / width, size[0] / height))


def fitted(
    image_size: tuple[int, int], canvas: tuple[int, int], *, fit: str = "round"
) -> tuple[float, tuple[int, int]]:
    """The factor that fits an image (h, w) into the canvas (h, w) with its aspect ratio, and the resulting size.

    The size is rounded half up, or with the fit "down" down, to integers of at least 1; with "stretch" it is the
    canvas.

    Example:
      >>> fitted((480, 640), (320, 320))
      (0.5, (240, 320))
      >>> fitted((427, 640), (320, 320))[1], fitted((427, 640), (320, 320), fit="down")[1]
      ((214, 320), (213, 320))
    """
    factor = min(canvas[0] / image_size[0], canvas[1] / image_size[1])
    if fit == "stretch":
        return factor, (canvas[0], canvas[1])
    if fit == "down":  # the small number keeps a product that is whole but for rounding
        height, width = (max(int(side * factor + 1e-6), 1) for side in image_size)
        return factor, (height, width)
    return factor, scaled(image_size, factor)


def scaled(image_size: tuple[int, int], factor: float) -> tuple[int, int]:
    """(h, w) times factor, rounded half up, at least 1."""
    return max(int(image_size[0] * factor + 0.5), 1), max(int(image_size[1] * factor + 0.5), 1)


def crop(sample: Sample, top: int, left: int, size: tuple[int, int]) -> Sample:
    """Crops to the window of `size` (h, w) px at (top, left), as far as the image extends.

    Returns:
      The window with the remaining objects, clipped to it. A box remains if its sides are at least `MIN_SIZE` px and at
      least `MIN_VISIBLE` of its area is inside.

    Example:
      >>> box, label = np.array([[2, 2, 6, 6]], np.float32), np.array([1], np.int32)
      >>> window = crop(Sample(np.zeros((8, 8, 3), np.uint8), box, label), 0, 4, (8, 8))
      >>> window.image.shape, window.boxes.tolist()
      ((8, 4, 3), [[0.0, 2.0, 2.0, 6.0]])
    """
    window = sample.image[top : top + size[0], left : left + size[1]]

    def remains(boxes: np.ndarray) -> np.ndarray:
        inside = _clipped(boxes, (window.shape[0], window.shape[1]))
        sides, before = inside[:, 2:] - inside[:, :2], boxes[:, 2:] - boxes[:, :2]
        return (sides >= MIN_SIZE).all(-1) & (sides.prod(-1) >= MIN_VISIBLE * before.prod(-1))

    return sample.on(window, offset=(-left, -top)).kept(remains).clipped()


def flip(sample: Sample) -> Sample:
    """Flips horizontally.

    Example:
      >>> box = np.array([[1, 0, 3, 4]], np.float32)
      >>> flip(Sample(np.zeros((4, 10, 3), np.uint8), box, np.array([0], np.int32))).boxes
      array([[7., 0., 9., 4.]], dtype=float32)
    """
    image = sample.image
    image = image[:, ::-1] if isinstance(image, Recipe) else cv2.flip(image, 1)
    return sample.on(image, scale=(-1, 1), offset=(image.shape[1], 0))


def pad(sample: Sample, canvas: tuple[int, int]) -> Sample:
    """Pads to a canvas (h, w) px that is at least as large: the image at the top left, grey elsewhere."""
    height, width = sample.image.shape[:2]
    if (height, width) == tuple(canvas):
        return sample
    if isinstance(sample.image, Recipe):
        return sample.on(sample.image.padded(canvas))
    padded = np.full((*canvas, 3), PAD, np.uint8)
    padded[:height, :width] = sample.image
    return sample.on(padded)


def mosaic(tiles: Sequence[Sample], centre: tuple[int, int], canvas: tuple[int, int]) -> Sample:
    """Four images around a point, each with one corner there; parts beyond the canvas are cut off.

    Args:
      tiles: top left, top right, bottom left and bottom right of the point, already resized.
      centre: the point (y, x), px of the canvas, inside it.
      canvas: (height, width) px.

    Returns:
      The canvas, grey where there is no image, with the objects of all four in order.

    Reference: YOLOv4 (Bochkovskiy et al. 2020, arXiv 2004.10934); the layout is that of YOLOX and RTMDet.
    """
    parts, corners = [], []
    for index, tile in enumerate(tiles):
        (top, y, height), (left, x, width) = (
            _visible(side, middle, end, after=bool(after))
            for after, middle, side, end in zip(divmod(index, 2), centre, tile.image.shape[:2], canvas, strict=True)
        )
        parts.append(crop(tile, top, left, (height, width)))
        corners.append((y, x))
    image = _pasted([part.image for part in parts], corners, canvas)
    return _joined(image, [part.on(image, offset=(x, y)) for part, (y, x) in zip(parts, corners, strict=True)])


def _pasted(parts: Sequence[Any], corners: Sequence[tuple[int, int]], canvas: tuple[int, int]) -> Any:  # noqa: ANN401
    """Images on a grey canvas (h, w), with their top left corners at (y, x)."""
    if isinstance(parts[0], Recipe):
        return recipes.pasted(parts, corners, canvas)
    image = np.full((*canvas, 3), PAD, np.uint8)
    for part, (y, x) in zip(parts, corners, strict=True):
        image[y : y + part.shape[0], x : x + part.shape[1]] = part
    return image


def _visible(side: int, middle: int, end: int, *, after: bool) -> tuple[int, int, int]:
    """Along one axis, the visible part of a tile before or after `middle`: its start, its place, its length."""
    length = min(side, end - middle if after else middle)
    return (0, middle, length) if after else (side - length, middle - length, length)


def mixup(first: Sample, second: Sample) -> Sample:
    """The mean of two images of one size, with the objects of both.

    Reference: Zhang et al. 2018 (arXiv 1710.09412), for detectors with equal shares as in YOLOX and RTMDet.
    """
    if isinstance(first.image, Recipe):
        return _joined(first.image.mixed(second.image), [first, second])
    return _joined(cv2.addWeighted(first.image, 0.5, second.image, 0.5, 0), [first, second])


def hsv_jitter(image: np.ndarray, shifts: tuple[int, int, int]) -> np.ndarray:
    """Shifts hue (of 180, cyclic), saturation and value (of 255, clipped), as YOLOX does."""
    if not any(shifts):
        return image
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    levels = np.arange(256)
    tables = (  # of hue, saturation and value
        ((levels + shifts[0]) % 180).astype(np.uint8),
        np.clip(levels + shifts[1], 0, 255).astype(np.uint8),
        np.clip(levels + shifts[2], 0, 255).astype(np.uint8),
    )
    merged = cv2.merge([cv2.LUT(c, t) for c, t in zip((hue, saturation, value), tables, strict=True)])
    return cv2.cvtColor(merged, cv2.COLOR_HSV2RGB)


def draw_shifts(rng: np.random.Generator, gains: tuple[float, float, float]) -> tuple[int, int, int]:
    """Draws integer shifts for `hsv_jitter`: each uniform in -gain .. gain, and zero with probability 1/2."""
    hue, saturation, value = rng.uniform(-1, 1, 3) * np.asarray(gains, float) * rng.integers(0, 2, 3)
    return int(hue), int(saturation), int(value)


def augment(
    sample: Sample,
    rng: np.random.Generator,
    *,
    canvas: tuple[int, int],
    flip_share: float,
    scale: tuple[float, float],
    random_crop: bool,
    hsv: tuple[float, float, float],
    stretch: bool = False,
) -> Sample:
    """One training image: random resize, random crop to the canvas, flip, colour; not yet padded.

    The factor is drawn uniformly from `scale`, relative to the size at which the image just fits the canvas; (0.1, 2)
    is large-scale jitter (Ghiasi et al. 2021, arXiv 2012.07177). Without `random_crop` it is at most 1, so that nothing
    is cut off. The number of random draws does not depend on the image.

    Args:
      sample: the image, of any size.
      rng: generator of the draws.
      canvas: (height, width) px.
      flip_share: probability of a horizontal flip.
      scale: (low, high) of the factor.
      random_crop: whether a resized image that is larger than the canvas is cropped at random.
      hsv: gains of `draw_shifts`.
      stretch: whether the image gets the ratio of the canvas, so that a factor of 1 fills it.

    Returns:
      An image of at most `canvas` (h, w) px with the remaining objects.
    """
    factor, top, left, mirrored = rng.uniform(*scale), rng.uniform(), rng.uniform(), rng.uniform() < flip_share
    shifts = draw_shifts(rng, hsv)
    if not random_crop:
        factor = min(factor, 1.0)
    fit, _ = fitted(sample.image.shape[:2], canvas)
    size = scaled(canvas, factor) if stretch else scaled(sample.image.shape[:2], fit * factor)
    # To enlarge only the window would be cheaper, but would change the pixels at its border.
    sample = resize(sample, size)
    spare = max(size[0] - canvas[0], 0), max(size[1] - canvas[1], 0)
    sample = crop(sample, int(top * (spare[0] + 1)), int(left * (spare[1] + 1)), canvas)
    if mirrored:
        sample = flip(sample)
    if isinstance(sample.image, Recipe):
        return sample._replace(image=sample.image.coloured(shifts))
    return sample._replace(image=hsv_jitter(sample.image, shifts))


def _joined(image: np.ndarray | Recipe, samples: Sequence[Sample]) -> Sample:
    """An image with the objects and detections of several; masks and detections only if all have them."""
    parts = [s.masks for s in samples if s.masks is not None]
    found = [s.found for s in samples if s.found is not None]
    return Sample(
        image,
        np.concatenate([s.boxes for s in samples]),
        np.concatenate([s.labels for s in samples]),
        masks.joined(parts) if len(parts) == len(samples) else None,
        np.concatenate(found) if len(found) == len(samples) else None,
    )
