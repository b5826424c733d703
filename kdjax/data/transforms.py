"""Geometry and colour of training and evaluation pictures; boxes move with the pixels.

Images are u8[h, w, 3] RGB, boxes f32[n, 4] x1 y1 x2 y2 in pixels of that image (continuous: a picture spans 0 .. w).
"""

import cv2
import numpy as np

PAD = 114  # grey level of the canvas outside the picture
MIN_SIZE = 1.0  # px: a box whose side is shorter after a crop is dropped
MIN_VISIBLE = 0.1  # a box of whose area a crop leaves less is dropped


def resize(image: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear resize to size (h, w); boxes are scaled by the true ratio of each axis.

    Args:
      image: u8[h, w, 3].
      boxes: f32[n, 4] px.
      size: new (height, width) px.

    Returns:
      u8[*size, 3] and f32[n, 4].
    """
    height, width = image.shape[:2]
    if (height, width) != tuple(size):
        image = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
        y, x = size[0] / height, size[1] / width
        boxes = boxes * np.array([x, y, x, y], np.float32)
    return image, boxes


def fitted(image_size: tuple[int, int], canvas: tuple[int, int]) -> tuple[float, tuple[int, int]]:
    """The factor that fits a picture (h, w) into the canvas (h, w) keeping its aspect ratio, and the size it gets.

    Example:
      >>> fitted((480, 640), (320, 320))
      (0.5, (240, 320))
    """
    factor = min(canvas[0] / image_size[0], canvas[1] / image_size[1])
    return factor, scaled(image_size, factor)


def scaled(image_size: tuple[int, int], factor: float) -> tuple[int, int]:
    """(h, w) times factor, rounded half up, at least 1."""
    return max(int(image_size[0] * factor + 0.5), 1), max(int(image_size[1] * factor + 0.5), 1)


def crop(
    image: np.ndarray, boxes: np.ndarray, top: int, left: int, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The window of `size` (h, w) at (top, left), as far as the image reaches.

    Args:
      image: u8[h, w, 3].
      boxes: f32[n, 4] px.
      top, left: px, inside the image.
      size: (height, width) px.

    Returns:
      The window, boxes clipped to it f32[n, 4], and bool[n]: which boxes remain (sides of at least `MIN_SIZE` px and at
      least `MIN_VISIBLE` of the area).

    Example:
      >>> image, box = np.zeros((8, 8, 3), np.uint8), np.array([[2, 2, 6, 6]], np.float32)
      >>> window, boxes, keep = crop(image, box, 0, 4, (8, 8))
      >>> window.shape, boxes.tolist(), keep.tolist()
      ((8, 4, 3), [[0.0, 2.0, 2.0, 6.0]], [True])
    """
    window = image[top : top + size[0], left : left + size[1]]
    height, width = window.shape[:2]
    moved = boxes - np.array([left, top, left, top], np.float32)
    inside = np.clip(moved, 0, np.array([width, height, width, height], np.float32))
    sides, before = inside[:, 2:] - inside[:, :2], moved[:, 2:] - moved[:, :2]
    keep = (sides >= MIN_SIZE).all(-1) & (sides.prod(-1) >= MIN_VISIBLE * before.prod(-1))
    return window, inside, keep


def flip(image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mirror left and right.

    Example:
      >>> flip(np.zeros((4, 10, 3), np.uint8), np.array([[1, 0, 3, 4]], np.float32))[1]
      array([[7., 0., 9., 4.]], dtype=float32)
    """
    width = image.shape[1]
    boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=-1)
    return cv2.flip(image, 1), boxes.astype(np.float32)


def hsv_jitter(image: np.ndarray, shifts: tuple[int, int, int]) -> np.ndarray:
    """Shift hue (of 180, cyclic), saturation and value (of 255, clipped); YOLOX's colour augmentation."""
    if not any(shifts):
        return image
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    levels = np.arange(256)
    tables = (
        ((levels + shifts[0]) % 180).astype(np.uint8),
        np.clip(levels + shifts[1], 0, 255).astype(np.uint8),
        np.clip(levels + shifts[2], 0, 255).astype(np.uint8),
    )
    merged = cv2.merge([cv2.LUT(c, t) for c, t in zip((hue, saturation, value), tables, strict=True)])
    return cv2.cvtColor(merged, cv2.COLOR_HSV2RGB)


def draw_shifts(rng: np.random.Generator, gains: tuple[float, float, float]) -> tuple[int, int, int]:
    """Whole-number shifts for `hsv_jitter`: each uniform in -gain .. gain, and zero half of the time."""
    shifts = rng.uniform(-1, 1, 3) * np.asarray(gains, float) * rng.integers(0, 2, 3)
    return tuple(int(s) for s in shifts)


def pad(image: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """u8[*canvas, 3] with the picture at the top left and grey elsewhere."""
    height, width = image.shape[:2]
    if (height, width) == tuple(canvas):
        return image
    padded = np.full((*canvas, 3), PAD, np.uint8)
    padded[:height, :width] = image
    return padded


def augment(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    rng: np.random.Generator,
    *,
    canvas: tuple[int, int],
    flip_share: float,
    scale: tuple[float, float],
    random_crop: bool,
    hsv: tuple[float, float, float],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One training picture: random resize, random crop to the canvas, flip, colour; not yet padded.

    The factor is drawn uniformly from `scale`, relative to the size at which the picture just fits the canvas. Without
    `random_crop` it is at most 1, so that everything stays in view. The number of draws does not depend on the picture.

    Returns:
      u8[h <= canvas, w <= canvas, 3], f32[m, 4], i32[m] of the boxes that remain.
    """
    factor, top, left, mirrored = rng.uniform(*scale), rng.uniform(), rng.uniform(), rng.uniform() < flip_share
    shifts = draw_shifts(rng, hsv)
    if not random_crop:
        factor = min(factor, 1.0)
    fit, _ = fitted(image.shape[:2], canvas)
    size = scaled(image.shape[:2], fit * factor)
    # Enlarging only what is kept would be cheaper, but would not give the same pixels at the window's border.
    image, boxes = resize(image, boxes, size)
    spare = max(size[0] - canvas[0], 0), max(size[1] - canvas[1], 0)
    image, boxes, keep = crop(image, boxes, int(top * (spare[0] + 1)), int(left * (spare[1] + 1)), canvas)
    boxes, labels = boxes[keep], labels[keep]
    if mirrored:
        image, boxes = flip(image, boxes)
    return hsv_jitter(image, shifts), boxes, labels
