"""The embedded data set: small generated images of textured, overlapping shapes in clutter.

Image `index` of a split is a pure function of (SEED, split, index). Some classes differ in a small part only (disc and
wedge) or in texture only (striped and checked), so that larger detectors have more to learn; all other shapes may have
any texture. Most objects have the usual colour of their class, and so may clutter: colour helps, but is not enough.
"""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from kdjax.data.records import ImageRecord

# The classes and their usual colours, RGB of 1.
COLOURS = {
    "disc": (0.85, 0.25, 0.2),
    "wedge": (0.9, 0.75, 0.2),
    "star": (0.25, 0.7, 0.3),
    "cross": (0.2, 0.65, 0.8),
    "striped": (0.3, 0.3, 0.8),
    "checked": (0.75, 0.35, 0.75),
}
CLASSES = tuple(COLOURS)

# The difficulty of the images.
SEED = 20240607
SIDE = 128  # px, height and width
EMPTY = 0.04  # probability of an image without objects
OBJECTS = (1, 6)  # number of objects in other images
SIZES = (12.0, 104.0)  # px, diameter of an object; the logarithm is uniform
OVERLAP = 0.35  # largest share of an object that others may cover
CONTRAST = (0.18, 0.55)  # distance of an object's colour from its background, of 1
TEXTURE = (0.14, 0.45)  # distance between the two colours of a texture
CLUTTER = (2, 8)  # number of fragments behind the objects
BARS = 0.25  # probability of thin bars in front of the objects
SQUEEZE = (0.65, 1.0)  # smaller over larger axis of an object
NOISE = (0.0, 0.035)  # standard deviation of the sensor noise, of 1
BLUR = (0.0, 0.6)  # px, standard deviation
LIGHT = (0.55, 1.0)  # darkest over brightest corner
WEDGE = (0.55, 1.1)  # rad, opening of the wedge
USUAL = 0.65  # probability of the usual colour of the class
SHADE = 0.2  # largest distance from the usual colour, of 1


def fingerprint() -> str:
    """Hash of this file, so that every change of it prepares the images again."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def stream(split: str, count: int) -> Iterator[tuple[ImageRecord, bytes]]:
    """Yields images 0 .. count-1 of a split ('train' or 'val') with their PNG bytes."""
    annotation_id = 0
    for index in range(count):
        image, objects = render(split, index)
        record = ImageRecord(id=index + 1, file_name=f"{split}_{index:05d}.png", width=SIDE, height=SIDE)
        for label, bbox, area in objects:
            annotation_id += 1
            entry = dict(id=annotation_id, image_id=record.id, category_id=label + 1, bbox=bbox, area=area, iscrowd=0)
            record.annotations.append(entry)
        encoded = cv2.imencode(".png", image[:, :, ::-1])[1]
        yield record, encoded.tobytes()


def render(split: str, index: int) -> tuple[np.ndarray, list[tuple[int, list[float], float]]]:
    """Draws one image and its objects.

    Args:
      split: 'train' or 'val'.
      index: 0 or more.

    Returns:
      u8[SIDE, SIDE, 3] RGB and for every object (label, [x, y, w, h] of its visible pixels, visible pixels).
    """
    rng = np.random.default_rng([SEED, {"train": 0, "val": 1}[split], index])
    image = _background(rng)
    for _ in range(rng.integers(*CLUTTER, endpoint=True)):
        size = _log_uniform(rng, 5, 60)
        mask, corner = _mask(_fragment(rng), rng, size, rng.uniform(0, SIDE, 2))
        _paint(image, mask, corner, rng, _any_texture(rng), size)

    owner = np.full((SIDE, SIDE), -1, np.int16)  # which object is in front
    labels, totals, visible = [], [], []  # of every object: label, pixels, visible pixels
    count = 0 if rng.random() < EMPTY else int(rng.integers(*OBJECTS, endpoint=True))
    for _ in range(count):
        label, size = int(rng.integers(len(CLASSES))), _log_uniform(rng, *SIZES)
        margin = 0.35 * size  # objects may extend slightly beyond the image
        centre = rng.uniform(margin, SIDE - margin, 2)
        mask, corner = _mask(_outline(CLASSES[label], rng), rng, size, centre)
        window = owner[corner[0] : corner[0] + mask.shape[0], corner[1] : corner[1] + mask.shape[1]]
        solid = mask > 0.5
        if not solid.any():
            continue
        hidden = np.bincount(window[solid] + 1, minlength=len(labels) + 1)[1:]
        left = [before - int(lost) for before, lost in zip(visible, hidden, strict=True)]
        if any(s < (1 - OVERLAP) * t for s, t, lost in zip(left, totals, hidden, strict=True) if lost):
            continue  # it would cover too much of another object
        window[solid] = len(labels)
        labels.append(label)
        totals.append(int(solid.sum()))
        visible = [*left, totals[-1]]
        _paint(image, mask, corner, rng, _texture_of(CLASSES[label], rng), size, COLOURS[CLASSES[label]])
    if rng.random() < BARS:
        _bars(image, owner, rng)

    objects = []
    for number, label in enumerate(labels):
        mask = owner == number
        area = int(mask.sum())
        if area < max((1 - OVERLAP) * totals[number] * 0.6, 12):
            continue  # bars cover too much of it
        (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis))[[0, -1]].tolist() for axis in (1, 0))
        objects.append((label, [float(left), float(top), right - left + 1.0, bottom - top + 1.0], float(area)))
    return _camera(image, rng), objects


def _log_uniform(rng, low, high):
    return math.exp(rng.uniform(math.log(low), math.log(high)))


# Shapes: lists of closed outlines in the unit disc; points inside an odd number of them are filled.


def _circle(radius=1.0, start=0.0, stop=2 * math.pi, points=40):
    angles = np.linspace(start, stop, points, endpoint=stop - start < 6.28)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], -1)


def _spikes(count, inner):
    angles = np.arange(2 * count) * math.pi / count
    radius = np.where(np.arange(2 * count) % 2 == 0, 1.0, inner)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], -1)


def _outline(name: str, rng) -> list[np.ndarray]:
    if name == "disc":
        return [_circle()]
    if name == "wedge":
        half = rng.uniform(*WEDGE) / 2
        return [np.concatenate([_circle(1.0, half, 2 * math.pi - half), [[rng.uniform(0.0, 0.25), 0.0]]])]
    if name == "star":
        return [_spikes(5, rng.uniform(0.4, 0.6))]
    if name in ("striped", "checked"):
        return [np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * 0.75]
    assert name == "cross"
    t = rng.uniform(0.22, 0.38)
    return [np.array([[t, 1], [-t, 1], [-t, t], [-1, t], [-1, -t], [-t, -t], [-t, -1], [t, -1], [t, -t], [1, -t],
                      [1, t], [t, t]])]  # fmt: skip


def _fragment(rng) -> list[np.ndarray]:
    """The outline of clutter, which has no class."""
    kind = rng.integers(5)
    if kind == 0:  # arc
        stop = rng.uniform(1.0, 4.5)
        outer = _circle(1.0, 0.0, stop, 20)
        return [np.concatenate([outer, _circle(rng.uniform(0.6, 0.85), 0.0, stop, 20)[::-1]])]
    if kind == 1:  # stick
        return [np.array([[1, 0.12], [-1, 0.12], [-1, -0.12], [1, -0.12]])]
    if kind == 2:  # corner
        t = rng.uniform(0.2, 0.5)
        return [np.array([[-1, -1], [1, -1], [1, -1 + t], [-1 + t, -1 + t], [-1 + t, 1], [-1, 1]]) * 0.75]
    if kind == 3:  # half disc
        return [_circle(1.0, 0.0, math.pi, 20)]
    angles = np.sort(rng.uniform(0, 2 * math.pi, 7))  # shard
    radius = rng.uniform(0.3, 1.0, 7)
    return [np.stack([radius * np.cos(angles), radius * np.sin(angles)], -1)]


def _mask(outline, rng, size, centre) -> tuple[np.ndarray, tuple[int, int]]:
    """Coverage f32[h, w] in 0 .. 1 of the rotated and squeezed outline, and its corner (top, left) in the image."""
    turn, squeeze, skew = rng.uniform(0, 2 * math.pi), rng.uniform(*SQUEEZE), rng.uniform(0, 2 * math.pi)
    transform = _rotation(skew) @ np.diag([1.0, squeeze]) @ _rotation(turn) * (size / 2)
    points = [o @ transform.T + centre for o in outline]
    every = np.concatenate(points)
    left, top = np.clip(np.floor(every.min(0)).astype(int) - 1, 0, SIDE)
    right, bottom = np.clip(np.ceil(every.max(0)).astype(int) + 2, 0, SIDE)
    mask = np.zeros((max(bottom - top, 0), max(right - left, 0)), np.uint8)
    if mask.size:
        shifted = [np.rint((p - (left, top)) * 16).astype(np.int32) for p in points]  # 4 fractional bits
        cv2.fillPoly(mask, shifted, 255, cv2.LINE_AA, 4)
    return mask.astype(np.float32) / 255, (int(top), int(left))


def _rotation(angle):
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


# Textures: f32[h, w] in 0 .. 1, the share of the second colour.


def _any_texture(rng) -> str:
    return ("plain", "plain", "gradient", "stripes", "checks", "dots", "noise")[rng.integers(7)]


def _texture_of(name: str, rng) -> str:
    return {"striped": "stripes", "checked": "checks"}.get(name) or _any_texture(rng)


def _texture(kind: str, shape, rng, size) -> np.ndarray:
    height, width = shape
    period = max(size / rng.uniform(2.5, 5.0), 3.5)
    angle, phase = rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi, 2)
    if kind == "plain":
        return np.zeros(shape, np.float32)
    if kind == "noise":
        grid = rng.random((max(int(height / period * 2), 2), max(int(width / period * 2), 2)), np.float32)
        return cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    u = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period) + phase[0]
    if kind == "gradient":
        return np.clip(0.5 + (u - u.mean()) * (period / size / 4), 0, 1)
    wave = np.sin(u)
    if kind != "stripes":
        across = np.sin((y * math.cos(angle) - x * math.sin(angle)) * (2 * math.pi / period) + phase[1])
        wave = wave * across * 1.6 if kind == "checks" else wave + across - 0.9
    return np.clip(0.5 + 2.5 * wave, 0, 1)


def _paint(image, mask, corner, rng, texture, size, usual=None) -> None:
    """Blends a textured shape into the image, in colours that differ from the background as CONTRAST says."""
    top, left = corner
    window = image[top : top + mask.shape[0], left : left + mask.shape[1]]
    weight = mask.sum()
    if weight == 0:
        return
    behind = (window * mask[..., None]).sum((0, 1)) / weight
    colour = _away(behind, rng, CONTRAST)
    if usual is not None and rng.random() < USUAL:
        shaded = np.clip(usual + rng.uniform(-SHADE, SHADE, 3), 0, 1).astype(np.float32)
        colour = shaded if np.abs(shaded - behind).max() >= CONTRAST[0] else colour
    share = _texture(texture, mask.shape, rng, size)[..., None]
    filled = colour + share * (_away(colour, rng, TEXTURE) - colour)
    window += mask[..., None] * (filled - window)


def _away(colour, rng, distances) -> np.ndarray:
    """A colour at a distance (largest channel) from another, inside 0 .. 1."""
    direction = rng.uniform(-1, 1, 3)
    direction /= np.abs(direction).max()
    step = direction * rng.uniform(*distances)
    moved = colour + step
    return np.where((moved < 0) | (moved > 1), colour - step, moved).astype(np.float32)


def _background(rng) -> np.ndarray:
    colour = rng.uniform(0.25, 0.75, 3)
    cells = int(rng.integers(2, 9))
    grid = (colour + rng.uniform(-0.15, 0.15, (cells, cells, 3))).astype(np.float32)
    image = cv2.resize(grid, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    share = _texture(_any_texture(rng), (SIDE, SIDE), rng, _log_uniform(rng, 20, 200))[..., None]
    return image + share * rng.uniform(-0.1, 0.1, 3).astype(np.float32)


def _bars(image, owner, rng) -> None:
    """Draws one to three thin bars across the image, in front of everything."""
    for _ in range(rng.integers(1, 4)):
        ends = rng.uniform(0, SIDE, (2, 2))
        ends += (ends[1] - ends[0]) * np.array([[-3], [3]])
        mask = np.zeros((SIDE, SIDE), np.uint8)
        points = np.rint(np.clip(ends, -1000, 1000) * 16).astype(np.int32)
        cv2.line(mask, points[0], points[1], 255, int(rng.integers(2, 5)), cv2.LINE_AA, 4)
        owner[mask > 127] = -1
        _paint(image, mask.astype(np.float32) / 255, (0, 0), rng, "plain", SIDE)


def _camera(image, rng) -> np.ndarray:
    """Applies light, blur, noise and rounding to eight bits."""
    corners = rng.uniform(*LIGHT, (2, 2)).astype(np.float32)
    image = image * cv2.resize(corners, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)[..., None]
    sigma = rng.uniform(*BLUR)
    if sigma > 0.3:
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    image = image + rng.standard_normal(image.shape, np.float32) * rng.uniform(*NOISE)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
