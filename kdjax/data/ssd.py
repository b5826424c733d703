"""The augmentations of SSD, which detection transformers are trained with: colours, a larger canvas, crops by overlap.

Liu et al., SSD, ECCV 2016, section 2.2 and its data augmentation; the ranges are those that RT-DETR and D-FINE take.
"""

import functools

import cv2
import numpy as np

from kdjax.data import transforms
from kdjax.data.transforms import Sample

BRIGHTNESS, CONTRAST, SATURATION = (0.875, 1.125), (0.5, 1.5), (0.5, 1.5)  # factors
HUE = 0.05  # largest turn, of a whole one
LARGEST = 4.0  # largest side of the canvas of `zoom_out`, in sides of the image
OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, None)  # smallest IoU of a crop with an object; None: no crop
SIDES, RATIOS = (0.3, 1.0), (0.5, 2.0)  # of a crop: its sides as shares of the image's; width / height of these shares
TRIALS = 40


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue, and the order of the channels, each with probability 1/2.

    The contrast is changed before or after saturation and hue, which is drawn too.

    Args:
      image: u8[h, w, 3] RGB.
      rng: generator of the draws.

    Peers: torchvision v2 `RandomPhotometricDistort` with its defaults; there the values are rounded after each change,
      here once.
    """
    chosen = rng.uniform(size=5) < 0.5
    early = rng.uniform() < 0.5
    brightness, contrast, saturation = (rng.uniform(*limits) for limits in (BRIGHTNESS, CONTRAST, SATURATION))
    turn, order = rng.uniform(-HUE, HUE), rng.permutation(3)
    pixels = image.astype(np.float32) / 255
    if chosen[0]:
        pixels = np.clip(pixels * np.float32(brightness), 0, 1)
    if chosen[1] and early:
        pixels = _contrasted(pixels, contrast)
    if chosen[2]:
        pixels = _towards(_grey(pixels), pixels, saturation)
    if chosen[3]:
        hue, *others = cv2.split(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV))
        pixels = cv2.cvtColor(cv2.merge([(hue + np.float32(360 * turn)) % 360, *others]), cv2.COLOR_HSV2RGB)
    if chosen[1] and not early:
        pixels = _contrasted(pixels, contrast)
    if chosen[4]:
        pixels = pixels[..., order]
    return (np.clip(pixels, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)


def zoom_out(sample: Sample, rng: np.random.Generator) -> Sample:
    """Places the image at random on a black canvas whose sides are 1 to 4 times as long."""
    height, width = sample.image.shape[:2]
    factor, down, across = rng.uniform(1.0, LARGEST), rng.uniform(), rng.uniform()
    canvas = int(height * factor), int(width * factor)
    top, left = int((canvas[0] - height) * down), int((canvas[1] - width) * across)
    image = np.zeros((*canvas, 3), np.uint8)
    image[top : top + height, left : left + width] = sample.image
    return sample.on(image, offset=(left, top))


def iou_crop(sample: Sample, rng: np.random.Generator) -> Sample:
    """Crops so that an object overlaps the crop at least so much as is drawn; objects with their centre outside go.

    The smallest IoU of the crop and an object is drawn from 0, 0.1, 0.3, 0.5, 0.7, 0.9 and "no crop"; after 40 crops
    without success it is drawn anew. An image without objects is not cropped.

    Peers: torchvision v2 `RandomIoUCrop` with its defaults.
    """
    height, width = sample.image.shape[:2]
    if not len(sample.boxes):
        return sample
    while (least := OVERLAPS[rng.integers(len(OVERLAPS))]) is not None:
        for _ in range(TRIALS):
            across, down = rng.uniform(*SIDES, 2)
            x, y = rng.uniform(size=2)
            size = int(height * down), int(width * across)
            if not RATIOS[0] <= across / down <= RATIOS[1] or not all(size):
                continue
            top, left = int((height - size[0]) * y), int((width - size[1]) * x)
            window = np.array([left, top, left + size[1], top + size[0]], np.float32)
            chosen = sample.kept(functools.partial(_centred, window=window))
            if len(chosen.boxes) and _overlaps(chosen.boxes, window).max() >= least:
                return transforms.crop(chosen, top, left, size)
    return sample


def _centred(boxes: np.ndarray, *, window: np.ndarray) -> np.ndarray:
    """Which boxes f32[k, 4] have their centre inside the window f32[4]: bool[k]."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return np.asarray(((window[:2] < centres) & (centres < window[2:])).all(-1))


def _overlaps(boxes: np.ndarray, window: np.ndarray) -> np.ndarray:
    shared = np.minimum(boxes[:, 2:], window[2:]) - np.maximum(boxes[:, :2], window[:2])
    shared = np.maximum(shared, 0).prod(-1)
    return shared / ((boxes[:, 2:] - boxes[:, :2]).prod(-1) + (window[2:] - window[:2]).prod() - shared)


def _grey(pixels: np.ndarray) -> np.ndarray:
    return pixels @ np.array([[0.299], [0.587], [0.114]], np.float32)


def _contrasted(pixels: np.ndarray, factor: float) -> np.ndarray:
    return _towards(_grey(pixels).mean(keepdims=True), pixels, factor)


def _towards(zero: np.ndarray, pixels: np.ndarray, factor: float) -> np.ndarray:
    """`zero` with a factor of 0, `pixels` with a factor of 1."""
    return np.clip(zero + np.float32(factor) * (pixels - zero), 0, 1).astype(np.float32)
