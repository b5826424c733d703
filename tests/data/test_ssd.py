"""SSD's augmentations: colours against slow formulas, and what becomes of boxes; masks: test_transforms.py."""

import colorsys

import numpy as np
import pytest

from kdjax.data import ssd
from kdjax.data.transforms import Sample
from tests.support.data import COLOURS, paint, read_off

BOXES = np.array([[4, 6, 20, 30], [30, 10, 55, 22], [10, 40, 50, 58]], np.float32)
LABELS = np.arange(3, dtype=np.int32)


class Draws:
    """A generator whose numbers are given: shares for `uniform`, in turn."""

    def __init__(self, *shares, order=(0, 1, 2)):
        self.shares, self.order = list(shares), order

    def uniform(self, low=0.0, high=1.0, size=None):
        if size is None:
            return low + self.shares.pop(0) * (high - low)
        return np.array([self.uniform(low, high) for _ in range(size)])

    def permutation(self, count):
        return np.array(self.order[:count])


def sample():
    return Sample(paint(64, 80, BOXES.astype(int)), BOXES, LABELS)


def slow_colours(pixel, brightness, contrast, saturation, turn, mean, early):
    """One pixel, its values in 0 .. 1; `mean` is the grey of the image where the contrast is changed."""
    grey = lambda p: 0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2]  # noqa: E731
    clip = lambda p: [min(max(v, 0.0), 1.0) for v in p]  # noqa: E731
    p = clip([v * brightness for v in pixel])
    contrasted = lambda p: clip([mean + contrast * (v - mean) for v in p])  # noqa: E731
    p = contrasted(p) if early else p
    p = clip([grey(p) + saturation * (v - grey(p)) for v in p])
    hue, s, v = colorsys.rgb_to_hsv(*p)
    p = list(colorsys.hsv_to_rgb((hue + turn) % 1, s, v))
    return p if early else contrasted(p)


@pytest.mark.parametrize("early", [True, False])
def test_colours_equal_a_slow_loop(early):
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    chosen = [0.0, 0.0, 0.0, 0.0, 1.0, 0.0 if early else 1.0]
    out = ssd.distort(image, Draws(*chosen, 0.2, 0.9, 0.8, 0.9))
    values = 0.925, 1.4, 1.3, 0.04
    if early:
        grey = np.clip(image / 255 * values[0], 0, 1) @ [0.299, 0.587, 0.114]
    else:  # the contrast's mean is that of the image with its new saturation and hue
        before = [slow_colours(p / 255, values[0], 1.0, *values[2:], 0.0, True) for p in image.reshape(-1, 3)]
        grey = np.array(before) @ [0.299, 0.587, 0.114]
    want = [slow_colours(p / 255, *values, grey.mean(), early) for p in image.reshape(-1, 3)]
    np.testing.assert_allclose(out.reshape(-1, 3), 255 * np.array(want), atol=1.0)


def test_only_the_channels_change_places_or_nothing_changes():
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    off = [1.0] * 4
    np.testing.assert_array_equal(ssd.distort(image, Draws(*off, 1.0, *[0.5] * 5)), image)
    swapped = ssd.distort(image, Draws(*off, 0.0, *[0.5] * 5, order=(2, 0, 1)))
    np.testing.assert_array_equal(swapped, image[..., [2, 0, 1]])


def test_objects_keep_their_pixels_on_a_larger_canvas():
    for seed in range(5):
        out = ssd.zoom_out(sample(), np.random.default_rng(seed))
        height, width = out.image.shape[:2]
        assert 64 <= height <= 256 and 80 <= width <= 320 and abs(height / 64 - width / 80) < 0.05
        for box, colour in zip(out.boxes, COLOURS, strict=False):
            np.testing.assert_array_equal(read_off(out.image, colour), box)


def test_crops_overlap_an_object_and_keep_those_whose_centre_is_inside():
    sizes = set()
    for seed in range(60):
        out = ssd.iou_crop(sample(), np.random.default_rng(seed))
        height, width = out.image.shape[:2]
        sizes.add((height, width))
        assert 19 <= height <= 64 and 24 <= width <= 80 and 0.45 <= (width / 80) / (height / 64) <= 2.2
        assert len(out.boxes) and (out.boxes >= 0).all() and (out.boxes[:, 2:] <= [width, height]).all()
        for box, label in zip(out.boxes, out.labels, strict=True):
            np.testing.assert_array_equal(read_off(out.image, COLOURS[label]), box)
            whole = BOXES[label]
            assert (box[2:] - box[:2]).prod() >= 0.25 * (whole[2:] - whole[:2]).prod()
    assert (64, 80) in sizes and len(sizes) > 30


def test_a_crop_has_the_overlap_that_was_drawn(monkeypatch):
    monkeypatch.setattr(ssd, "OVERLAPS", (0.5,))
    for seed in range(10):
        out = ssd.iou_crop(sample(), np.random.default_rng(seed))
        height, width = out.image.shape[:2]
        shared = (out.boxes[:, 2:] - out.boxes[:, :2]).prod(-1)  # what is visible lies inside the crop
        whole = (BOXES[:, 2:] - BOXES[:, :2]).prod(-1)[out.labels]
        assert (shared / (whole + height * width - shared)).max() >= 0.5


def test_an_image_without_objects_is_not_cropped():
    empty = Sample(paint(64, 80, []), BOXES[:0], LABELS[:0])
    assert ssd.iou_crop(empty, np.random.default_rng(0)) is empty
