"""Augmentations against painted pictures and slow references."""

import colorsys

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kdjax.data import transforms
from tests.data_tools import COLOURS, paint, read_off

BOXES = np.array([[4, 6, 20, 30], [30, 10, 55, 22], [10, 40, 50, 58]], np.float32)
LABELS = np.array([2, 0, 1], np.int32)


def painted():
    return paint(64, 80, BOXES.astype(int))


def slow_resize(image, size):
    """Bilinear with half-pixel centres and a clamped border, one pixel at a time."""
    height, width = image.shape[:2]
    out = np.zeros((*size, 3))
    for y in range(size[0]):
        for x in range(size[1]):
            v = np.clip((y + 0.5) * height / size[0] - 0.5, 0, height - 1)
            u = np.clip((x + 0.5) * width / size[1] - 0.5, 0, width - 1)
            y0, x0 = int(v), int(u)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            top = image[y0, x0] * (1 - (u - x0)) + image[y0, x1] * (u - x0)
            bottom = image[y1, x0] * (1 - (u - x0)) + image[y1, x1] * (u - x0)
            out[y, x] = top * (1 - (v - y0)) + bottom * (v - y0)
    return out


@pytest.mark.parametrize("size", [(10, 12), (25, 9), (17, 23), (5, 4)])
def test_resize_equals_a_slow_loop(size):
    image = np.random.default_rng(0).integers(0, 256, (10, 12, 3)).astype(np.uint8)
    box = np.array([[3.0, 2.0, 12.0, 10.0]], np.float32)
    out, boxes = transforms.resize(image, box, size)
    assert out.dtype == np.uint8 and boxes.dtype == np.float32
    np.testing.assert_allclose(out, slow_resize(image, size), atol=1)
    np.testing.assert_allclose(boxes[0], [3 * size[1] / 12, 2 * size[0] / 10, size[1], size[0]], rtol=1e-6)


@given(st.integers(0, 63), st.integers(0, 79), st.integers(1, 80), st.integers(1, 90))
@hypothesis_settings(deadline=None, max_examples=60)
def test_crop_equals_a_loop_over_boxes(top, left, height, width):
    image = painted()
    window, boxes, keep = transforms.crop(image, BOXES, top, left, (height, width))
    bottom, right = min(top + height, 64), min(left + width, 80)
    np.testing.assert_array_equal(window, image[top:bottom, left:right])
    for old, new, kept in zip(BOXES, boxes, keep, strict=True):
        x0, y0 = max(old[0], left), max(old[1], top)
        x1, y1 = min(old[2], right), min(old[3], bottom)
        w, h = max(x1 - x0, 0), max(y1 - y0, 0)
        share = w * h / ((old[2] - old[0]) * (old[3] - old[1]))
        assert kept == (w >= 1 and h >= 1 and share >= transforms.MIN_VISIBLE)
        if kept:
            np.testing.assert_array_equal(new, [x0 - left, y0 - top, x1 - left, y1 - top])


def test_a_box_that_is_hardly_seen_is_dropped():
    box = np.array([[0, 0, 20, 20]], np.float32)
    image = np.zeros((20, 40, 3), np.uint8)
    assert not transforms.crop(image, box, 0, 19, (20, 20))[2][0]  # one column of twenty
    assert transforms.crop(image, box, 0, 18, (20, 20))[2][0]  # a tenth
    assert not transforms.crop(image, box, 0, 20, (20, 20))[2][0]
    thin = np.array([[0.0, 0.0, 0.9, 20.0]], np.float32)
    assert not transforms.crop(image, thin, 0, 0, (20, 20))[2][0]


def test_flip_mirrors_pixels_and_boxes():
    image, boxes = transforms.flip(painted(), BOXES)
    for box, colour in zip(boxes, COLOURS, strict=False):
        np.testing.assert_array_equal(box, read_off(image, colour))
    back, again = transforms.flip(image, boxes)
    np.testing.assert_array_equal(back, painted())
    np.testing.assert_array_equal(again, BOXES)
    assert transforms.flip(painted(), BOXES[:0])[1].shape == (0, 4)


@pytest.mark.parametrize("shifts", [(4, 0, 0), (-5, 0, 0), (0, 25, 0), (0, 0, -30), (3, -20, 30)])
def test_colour_jitter_equals_the_textbook(shifts):
    pixels = np.random.default_rng(1).integers(0, 256, (1, 200, 3)).astype(np.uint8)
    out = transforms.hsv_jitter(pixels, shifts)
    expected = []
    for before in pixels[0]:
        h, s, v = colorsys.rgb_to_hsv(*(before / 255))
        hue = (round(h * 180) + shifts[0]) % 180
        saturation, value = np.clip([round(s * 255) + shifts[1], round(v * 255) + shifts[2]], 0, 255)
        expected.append(np.array(colorsys.hsv_to_rgb(hue / 180, saturation / 255, value / 255)) * 255)
    off = np.abs(out[0] - expected)
    assert off.max() < 10 and off.mean() < 1.5  # OpenCV may round the hue the other way, which is up to 8.5 levels


def test_colour_jitter_can_be_off():
    image = painted()
    assert transforms.hsv_jitter(image, (0, 0, 0)) is image
    draws = np.array([transforms.draw_shifts(np.random.default_rng(i), (5, 30, 30)) for i in range(400)])
    assert (np.abs(draws).max(0) <= [5, 30, 30]).all() and (np.abs(draws).max(0) >= [4, 28, 28]).all()
    assert ((draws == 0).mean(0) > 0.4).all()  # each is off half of the time
    assert transforms.draw_shifts(np.random.default_rng(0), (0, 0, 0)) == (0, 0, 0)


def test_pad_puts_the_picture_at_the_top_left():
    padded = transforms.pad(painted(), (70, 96))
    assert padded.shape == (70, 96, 3) and padded.dtype == np.uint8
    np.testing.assert_array_equal(padded[:64, :80], painted())
    assert (padded[64:] == 114).all() and (padded[:, 80:] == 114).all()


def test_fitted_keeps_the_aspect_ratio():
    assert transforms.fitted((480, 640), (320, 320)) == (0.5, (240, 320))
    assert transforms.fitted((640, 480), (320, 320)) == (0.5, (320, 240))
    assert transforms.fitted((100, 50), (160, 160)) == (1.6, (160, 80))
    assert transforms.fitted((427, 640), (320, 320))[1] == (214, 320)
    assert transforms.fitted((1, 1000), (100, 100))[1] == (1, 100)


@pytest.mark.parametrize("seed", range(12))
def test_boxes_stay_on_what_is_painted(seed):
    options = dict(canvas=(96, 120), flip_share=0.5, scale=(0.5, 2.5), random_crop=True, hsv=(0, 0, 0))
    image, boxes, labels = transforms.augment(painted(), BOXES, LABELS, np.random.default_rng(seed), **options)
    assert image.dtype == np.uint8 and boxes.dtype == np.float32 and labels.dtype == np.int32
    height, width = image.shape[:2]
    assert height <= 96 and width <= 120 and len(boxes) == len(labels)
    assert (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()
    colour_of = dict(zip(LABELS.tolist(), COLOURS, strict=False))
    for box, label in zip(boxes, labels.tolist(), strict=True):
        np.testing.assert_allclose(read_off(image, colour_of.pop(label)), box, atol=1.3)
    for colour in colour_of.values():  # what was dropped is hardly there
        seen = read_off(image, colour)
        assert seen is None or np.prod(seen[2:] - seen[:2]) < 0.2 * 25 * 25 * (2.5 * 1.5) ** 2


def test_augment_without_chance_is_the_evaluation_resize():
    options = dict(canvas=(96, 96), flip_share=0.0, scale=(1.0, 1.0), random_crop=True, hsv=(0, 0, 0))
    image, boxes, labels = transforms.augment(painted(), BOXES, LABELS, np.random.default_rng(0), **options)
    size = transforms.fitted((64, 80), (96, 96))[1]
    expected, expected_boxes = transforms.resize(painted(), BOXES, size)
    np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(boxes, expected_boxes)
    np.testing.assert_array_equal(labels, LABELS)


def test_without_crop_everything_stays_in_view():
    options = dict(canvas=(96, 96), flip_share=0.5, scale=(0.3, 3.0), random_crop=False, hsv=(0, 0, 0))
    for seed in range(8):
        image, boxes, _ = transforms.augment(painted(), BOXES, LABELS, np.random.default_rng(seed), **options)
        assert len(boxes) == 3 and abs(image.shape[1] / image.shape[0] - 80 / 64) < 0.05


def test_the_source_picture_is_left_alone():
    image = painted()
    image.flags.writeable = False
    boxes = BOXES.copy()
    options = dict(canvas=(48, 64), flip_share=1.0, scale=(0.5, 2.0), random_crop=True, hsv=(5, 30, 30))
    for seed in range(4):
        transforms.augment(image, boxes, LABELS, np.random.default_rng(seed), **options)
    np.testing.assert_array_equal(boxes, BOXES)
    np.testing.assert_array_equal(image, painted())


def test_empty_pictures_pass():
    options = dict(canvas=(48, 64), flip_share=1.0, scale=(0.5, 2.0), random_crop=True, hsv=(5, 30, 30))
    none = np.zeros((0, 4), np.float32)
    _, boxes, labels = transforms.augment(painted(), none, LABELS[:0], np.random.default_rng(0), **options)
    assert boxes.shape == (0, 4) and labels.shape == (0,)


def test_opencv_reads_hue_in_half_degrees():
    # hsv_jitter's tables rest on it.
    green = np.array([[[0, 255, 0]]], np.uint8)
    assert cv2.cvtColor(green, cv2.COLOR_RGB2HSV)[0, 0].tolist() == [60, 255, 255]
