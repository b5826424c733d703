"""Augmentations against painted images and slow references."""

import colorsys
import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kdjax.data import masks, ssd, transforms
from kdjax.data.masks import masks_of
from kdjax.data.transforms import Sample
from tests.support.data import COLOURS, paint, read_off

BOXES = np.array([[4, 6, 20, 30], [30, 10, 55, 22], [10, 40, 50, 58]], np.float32)
LABELS = np.array([2, 0, 1], np.int32)


def painted():
    return paint(64, 80, BOXES.astype(int))


def sample(image=None, boxes=BOXES, labels=LABELS, **extra):
    return Sample(painted() if image is None else image, boxes, labels, **extra)


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
    out = transforms.resize(sample(image, box, LABELS[:1]), size)
    assert out.image.dtype == np.uint8 and out.boxes.dtype == np.float32
    np.testing.assert_allclose(out.image, slow_resize(image, size), atol=1)
    np.testing.assert_allclose(out.boxes[0], [3 * size[1] / 12, 2 * size[0] / 10, size[1], size[0]], rtol=1e-6)


@given(st.integers(0, 63), st.integers(0, 79), st.integers(1, 80), st.integers(1, 90))
@hypothesis_settings(deadline=None, max_examples=60)
def test_crop_equals_a_loop_over_boxes(top, left, height, width):
    window = transforms.crop(sample(), top, left, (height, width))
    bottom, right = min(top + height, 64), min(left + width, 80)
    np.testing.assert_array_equal(window.image, painted()[top:bottom, left:right])
    expected = {}
    for old, label in zip(BOXES, LABELS.tolist(), strict=True):
        x0, y0 = max(old[0], left), max(old[1], top)
        x1, y1 = min(old[2], right), min(old[3], bottom)
        w, h = max(x1 - x0, 0), max(y1 - y0, 0)
        share = w * h / ((old[2] - old[0]) * (old[3] - old[1]))
        if w >= 1 and h >= 1 and share >= transforms.MIN_VISIBLE:
            expected[label] = [x0 - left, y0 - top, x1 - left, y1 - top]
    assert dict(zip(window.labels.tolist(), window.boxes.tolist(), strict=True)) == expected


def test_a_box_that_is_mostly_outside_is_dropped():
    box, label = np.array([[0, 0, 20, 20]], np.float32), LABELS[:1]
    image = np.zeros((20, 40, 3), np.uint8)
    assert not len(transforms.crop(sample(image, box, label), 0, 19, (20, 20)).boxes)  # one column of twenty
    assert len(transforms.crop(sample(image, box, label), 0, 18, (20, 20)).boxes)  # a tenth
    assert not len(transforms.crop(sample(image, box, label), 0, 20, (20, 20)).boxes)
    thin = np.array([[0.0, 0.0, 0.9, 20.0]], np.float32)
    assert not len(transforms.crop(sample(image, thin, label), 0, 0, (20, 20)).boxes)


def test_flip_mirrors_pixels_and_boxes():
    mirrored = transforms.flip(sample())
    for box, colour in zip(mirrored.boxes, COLOURS, strict=False):
        np.testing.assert_array_equal(box, read_off(mirrored.image, colour))
    back = transforms.flip(mirrored)
    np.testing.assert_array_equal(back.image, painted())
    np.testing.assert_array_equal(back.boxes, BOXES)
    assert transforms.flip(sample(boxes=BOXES[:0], labels=LABELS[:0])).boxes.shape == (0, 4)


@pytest.mark.parametrize("shifts", [(4, 0, 0), (-5, 0, 0), (0, 25, 0), (0, 0, -30), (3, -20, 30)])
def test_colour_jitter_equals_colorsys(shifts):
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


def test_pad_puts_the_image_at_the_top_left():
    padded = transforms.pad(sample(), (70, 96))
    assert padded.image.shape == (70, 96, 3) and padded.image.dtype == np.uint8
    np.testing.assert_array_equal(padded.image[:64, :80], painted())
    assert (padded.image[64:] == 114).all() and (padded.image[:, 80:] == 114).all()
    np.testing.assert_array_equal(padded.boxes, BOXES)


def test_fitted_keeps_the_aspect_ratio():
    assert transforms.fitted((480, 640), (320, 320)) == (0.5, (240, 320))
    assert transforms.fitted((640, 480), (320, 320)) == (0.5, (320, 240))
    assert transforms.fitted((100, 50), (160, 160)) == (1.6, (160, 80))
    assert transforms.fitted((427, 640), (320, 320))[1] == (214, 320)
    assert transforms.fitted((1, 1000), (100, 100))[1] == (1, 100)


@pytest.mark.parametrize("seed", range(12))
def test_boxes_stay_on_the_painted_pixels(seed):
    options = dict(canvas=(96, 120), flip_share=0.5, scale=(0.5, 2.5), random_crop=True, hsv=(0, 0, 0))
    image, boxes, labels, *_ = transforms.augment(sample(), np.random.default_rng(seed), **options)
    assert image.dtype == np.uint8 and boxes.dtype == np.float32 and labels.dtype == np.int32
    height, width = image.shape[:2]
    assert height <= 96 and width <= 120 and len(boxes) == len(labels)
    assert (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()
    colour_of = dict(zip(LABELS.tolist(), COLOURS, strict=False))
    for box, label in zip(boxes, labels.tolist(), strict=True):
        np.testing.assert_allclose(read_off(image, colour_of.pop(label)), box, atol=1.3)
    for colour in colour_of.values():  # dropped boxes are hardly visible
        seen = read_off(image, colour)
        assert seen is None or np.prod(seen[2:] - seen[:2]) < 0.2 * 25 * 25 * (2.5 * 1.5) ** 2


def test_augment_without_randomness_is_the_evaluation_resize():
    options = dict(canvas=(96, 96), flip_share=0.0, scale=(1.0, 1.0), random_crop=True, hsv=(0, 0, 0))
    out = transforms.augment(sample(), np.random.default_rng(0), **options)
    expected = transforms.resize(sample(), transforms.fitted((64, 80), (96, 96))[1])
    np.testing.assert_array_equal(out.image, expected.image)
    np.testing.assert_array_equal(out.boxes, expected.boxes)
    np.testing.assert_array_equal(out.labels, LABELS)


def test_without_crop_nothing_is_cut_off():
    options = dict(canvas=(96, 96), flip_share=0.5, scale=(0.3, 3.0), random_crop=False, hsv=(0, 0, 0))
    for seed in range(8):
        out = transforms.augment(sample(), np.random.default_rng(seed), **options)
        assert len(out.boxes) == 3 and abs(out.image.shape[1] / out.image.shape[0] - 80 / 64) < 0.05


def test_the_source_image_is_not_changed():
    image = painted()
    image.flags.writeable = False
    boxes = BOXES.copy()
    options = dict(canvas=(48, 64), flip_share=1.0, scale=(0.5, 2.0), random_crop=True, hsv=(5, 30, 30))
    for seed in range(4):
        transforms.augment(sample(image, boxes), np.random.default_rng(seed), **options)
    np.testing.assert_array_equal(boxes, BOXES)
    np.testing.assert_array_equal(image, painted())


@pytest.mark.user_input("Images and videos", "an image without objects", "read, also in Mosaic and MixUp")
def test_empty_images_pass():
    options = dict(canvas=(48, 64), flip_share=1.0, scale=(0.5, 2.0), random_crop=True, hsv=(5, 30, 30))
    none = sample(boxes=BOXES[:0], labels=LABELS[:0], masks=masks_of([]))
    out = transforms.augment(none, np.random.default_rng(0), **options)
    assert out.boxes.shape == (0, 4) and out.labels.shape == (0,) and len(out.masks) == 0
    out = transforms.mixup(transforms.pad(out, (48, 64)), transforms.pad(out, (48, 64)))
    assert out.boxes.shape == (0, 4) and out.masks.drawn((48, 64)).shape == (0, 12, 16)
    assert transforms.mosaic([none] * 4, (48, 64), (96, 128)).masks.drawn((96, 128)).shape == (0, 24, 32)


def test_opencv_reads_hue_in_half_degrees():
    # hsv_jitter's tables depend on it.
    green = np.array([[[0, 255, 0]]], np.uint8)
    assert cv2.cvtColor(green, cv2.COLOR_RGB2HSV)[0, 0].tolist() == [60, 255, 255]


# Large-scale jitter, Mosaic and MixUp


@pytest.mark.parametrize("seed", range(6))
def test_large_scale_jitter_equals_a_slow_loop(seed):
    image = np.random.default_rng(seed).integers(0, 256, (20, 26, 3)).astype(np.uint8)
    box = np.array([[3, 2, 21, 17]], np.float32)
    options = dict(canvas=(24, 24), flip_share=0.5, scale=(0.1, 2.0), random_crop=True, hsv=(0, 0, 0))
    out = transforms.augment(sample(image, box, LABELS[:1]), np.random.default_rng(seed), **options)

    rng = np.random.default_rng(seed)
    factor, down, right, mirrored = rng.uniform(0.1, 2.0), rng.uniform(), rng.uniform(), rng.uniform() < 0.5
    ratio = min(24 / 20, 24 / 26) * factor
    size = [max(int(side * ratio + 0.5), 1) for side in (20, 26)]
    resized = slow_resize(image, size)
    top, left = (int(share * (max(side - 24, 0) + 1)) for share, side in zip((down, right), size, strict=True))
    height, width = (min(side, 24) for side in size)
    expected = np.array([[resized[top + y, left + x] for x in range(width)] for y in range(height)])
    x0, x1 = (np.clip(x * size[1] / 26 - left, 0, width) for x in (3, 21))
    y0, y1 = (np.clip(y * size[0] / 20 - top, 0, height) for y in (2, 17))
    if mirrored:
        expected, x0, x1 = expected[:, ::-1], width - x1, width - x0
    np.testing.assert_allclose(out.image, expected, atol=1)
    if len(out.boxes):
        np.testing.assert_allclose(out.boxes, [[x0, y0, x1, y1]], atol=1e-4)
    else:
        assert (x1 - x0) * (y1 - y0) < 0.1 * 18 * 15 * ratio**2 or min(x1 - x0, y1 - y0) < 1


def tiles():
    """Four images of different sizes, each with one box of a different colour."""
    sizes, boxes = (
        [(30, 40), (25, 44), (40, 40), (13, 9)],
        [(5, 4, 30, 20), (4, 3, 41, 21), (8, 10, 30, 38), (1, 1, 8, 12)],
    )
    made = []
    for index, ((height, width), box) in enumerate(zip(sizes, boxes, strict=True)):
        image = paint(height, width, [(0, 0, 0, 0)] * index + [box])
        made.append(sample(image, np.array([box], np.float32), np.array([index], np.int32)))
    return made


@pytest.mark.parametrize("centre", [(40, 40), (20, 60), (60, 20), (22, 21), (59, 57)])
def test_mosaic_equals_a_loop_over_pixels_and_boxes(centre):
    canvas = (80, 80)
    out = transforms.mosaic(tiles(), centre, canvas)
    expected, boxes = np.full((*canvas, 3), 114), {}
    for index, tile in enumerate(tiles()):
        height, width = tile.image.shape[:2]
        # Where the tile's first row and column lie on the canvas, which they may do outside of it.
        top = centre[0] - height if index in (0, 1) else centre[0]
        left = centre[1] - width if index in (0, 2) else centre[1]
        for y in range(height):
            for x in range(width):
                if 0 <= top + y < 80 and 0 <= left + x < 80:
                    expected[top + y, left + x] = tile.image[y, x]
        box = tile.boxes[0] + [left, top, left, top]
        inside = np.clip(box, 0, 80)
        shares = (inside[2:] - inside[:2]) / (box[2:] - box[:2])
        if shares.prod() >= 0.1 and (inside[2:] - inside[:2] >= 1).all():
            boxes[index] = inside.tolist()
    np.testing.assert_array_equal(out.image, expected)
    assert dict(zip(out.labels.tolist(), out.boxes.tolist(), strict=True)) == boxes
    for label, box in boxes.items():  # the pixels agree
        np.testing.assert_array_equal(read_off(out.image, COLOURS[label]), box)
    assert len(boxes) >= 3 and out.image.dtype == np.uint8 and out.boxes.dtype == np.float32


def test_mixup_is_the_mean_with_the_objects_of_both():
    first, second = transforms.pad(sample(), (70, 90)), transforms.pad(tiles()[0], (70, 90))
    out = transforms.mixup(first, second)
    for y in range(0, 70, 3):
        for x in range(0, 90, 3):
            mean = (first.image[y, x].astype(float) + second.image[y, x]) / 2
            assert np.abs(out.image[y, x] - mean).max() <= 0.5
    np.testing.assert_array_equal(out.boxes, [*BOXES, *tiles()[0].boxes])
    np.testing.assert_array_equal(out.labels, [*LABELS, 0])


# Masks

# A concave outline, one in two parts, and one that the window of most crops cuts.
OUTLINES = (
    [[10, 8, 60, 12, 58, 30, 34, 20, 12, 32]],
    [[70, 5, 100, 9, 96, 30], [72, 40, 104, 36, 90, 60]],
    [[5, 50, 60, 45, 62, 88, 30, 66, 8, 90]],
)


def whole(shape, size):
    """A mask in the whole of its original image."""
    mask = np.zeros(size, bool)
    (x, y), (h, w) = shape.corner, shape.size
    mask[y : y + h, x : x + w] = shape.decoded()
    return mask


def outlined(*chosen):
    """An image in which the chosen objects are painted, with their masks and boxes."""
    shapes = [masks.shape(OUTLINES[i], (96, 110)) for i in chosen]
    image = np.full((96, 110, 3), 15, np.uint8)
    for i, shape in zip(chosen, shapes, strict=True):
        image[whole(shape, (96, 110))] = COLOURS[i]
    points = [np.concatenate([np.reshape(ring, (-1, 2)) for ring in OUTLINES[i]]) for i in chosen]
    boxes = np.array([[*p.min(0), *p.max(0)] for p in points], np.float32).reshape(-1, 4)
    return Sample(image, boxes, np.array(chosen, np.int32), masks_of(shapes))


def averaged(values, canvas):
    """Means over 4 x 4 pixels of the canvas, zero outside of the values."""
    padded = np.zeros(canvas)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded.reshape(canvas[0] // 4, 4, canvas[1] // 4, 4).mean((1, 3))


def same_objects(out):
    """Pixels and masks of every object show the same shape, inside its box."""
    canvas = tuple(-(-side // 4) * 4 for side in out.image.shape[:2])
    drawn = out.masks.drawn(canvas)
    assert len(out.boxes) == len(drawn) and drawn.dtype == np.uint8
    for box, label, mask in zip(out.boxes, out.labels, drawn, strict=True):
        seen = np.abs(out.image.astype(int) - COLOURS[label]).max(-1) < 110
        # Rounding along the outline.
        assert np.abs(averaged(seen, canvas) - mask / 255).sum() * 16 <= 0.06 * seen.sum() + 30
        ys, xs = np.nonzero(mask)
        beyond = np.subtract([4 * xs.min(), 4 * ys.min(), 4 * xs.max() + 4, 4 * ys.max() + 4], box) * [-1, -1, 1, 1]
        assert (beyond <= 4.01).all()


def test_a_stretched_image_fills_the_canvas():
    options = dict(canvas=(40, 120), flip_share=0.0, scale=(1.0, 1.0), random_crop=False, hsv=(0, 0, 0), stretch=True)
    out = transforms.augment(sample(), np.random.default_rng(0), **options)
    assert out.image.shape == (40, 120, 3)
    np.testing.assert_allclose(out.boxes, BOXES * np.tile([1.5, 0.625], 2))


@pytest.mark.parametrize("seed", range(8))
def test_masks_move_with_the_pixels(seed):
    rng = np.random.default_rng(seed)
    options = dict(canvas=(90, 90), flip_share=0.5, scale=(0.6, 2.0), random_crop=True, hsv=(0, 0, 0))
    one = transforms.augment(outlined(0, 1, 2), rng, **options)
    same_objects(one)
    same_objects(transforms.pad(one, (90, 90)))
    same_objects(ssd.zoom_out(outlined(0, 1, 2), rng))
    same_objects(ssd.iou_crop(outlined(0, 1, 2), rng))
    same_objects(transforms.augment(outlined(0, 1, 2), rng, **options | {"stretch": True}))
    put = transforms.mosaic([outlined(0), outlined(1), outlined(2), outlined()], (80, 95), (180, 180))
    assert len(put.boxes) == 3
    same_objects(put)
    same_objects(transforms.augment(put, rng, **options | {"scale": (1.2, 2.0)}))
    both = transforms.mixup(put, transforms.flip(put))
    np.testing.assert_array_equal(both.masks.drawn((180, 180))[:3], put.masks.drawn((180, 180)))
    assert both.masks.drawn((180, 180)).shape == (6, 45, 45)


@given(st.integers(0, 2**32 - 1))
@hypothesis_settings(deadline=None, max_examples=40)
def test_masks_are_the_means_of_the_pixels_of_their_window(seed):
    """Without a resize exactly, up to the rounding to 1 / 255."""
    rng = np.random.default_rng(seed)
    top, left, height, width = rng.integers(0, 60, 2).tolist() + rng.integers(20, 100, 2).tolist()
    some = outlined(0, 1, 2)
    out = transforms.flip(transforms.crop(some, top, left, (height, width)))
    drawn = out.masks.drawn((100, 112))
    for label, mask in zip(out.labels, drawn, strict=True):
        window = whole(some.masks.shapes[label], (96, 110))[top : top + height, left : left + width][:, ::-1]
        np.testing.assert_array_equal(mask, np.floor(averaged(window, (100, 112)) * 255 + 0.5))


@pytest.mark.parametrize("size", [(31, 37), (97, 111), (240, 150), (8, 300), (2, 3)])
def test_masks_are_shared_by_the_cells_that_they_cover(size):
    """Of every pixel of the original the part that lies in a cell."""

    def shares(count, end):  # [cells, pixels of the original]
        edges, cells = np.arange(count + 1) * end / count, 4.0 * np.arange(-(-end // 4))[:, None]
        return np.clip(np.minimum(edges[1:], cells + 4) - np.maximum(edges[:-1], cells), 0, None)

    some = outlined(0, 1, 2)
    drawn = transforms.resize(some, size).masks.drawn(size)
    for shape, mask in zip(some.masks.shapes, drawn, strict=True):
        want = shares(96, size[0]) @ whole(shape, (96, 110)) @ shares(110, size[1]).T / 16
        np.testing.assert_allclose(mask, want * 255, atol=0.51)


def test_many_masks_take_the_memory_of_one():
    """1,000 objects of an image of 2,000 x 2,000 px; each in full resolution is 4 MB."""
    ring = [[0, 0, 40, 0, 40, 30, 0, 30]]
    places = np.random.default_rng(0).integers(0, 1950, (1000, 2)).tolist()
    moved = ([[v + (x, y)[i % 2] for i, v in enumerate(ring[0])]] for x, y in places)
    shapes = [masks.shape(polygon, (2000, 2000)) for polygon in moved]
    some = masks_of(shapes).moved((0.32, 0.32), (0, 0))
    tracemalloc.start()
    drawn = some.drawn((640, 640))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < drawn.nbytes + 2**21
    np.testing.assert_allclose(drawn.sum((1, 2)) / 255 * 16, 40 * 30 * 0.32**2, rtol=0.02)


def as_found(boxes, labels):
    """The objects as detections; the score tells which one it is."""
    scores = np.linspace(0.1, 0.9, len(boxes))
    return np.concatenate([boxes, labels[:, None], scores[:, None]], 1).astype(np.float32)


@given(st.integers(0, 2**32 - 1))
@hypothesis_settings(deadline=None, max_examples=60)
def test_detections_move_as_objects_do_and_change_nothing(seed):
    """Random scenes through every transform in random order, with and without the objects as detections."""
    rng = np.random.default_rng(seed)

    def scene():
        height, width, count = *rng.integers(20, 90, 2).tolist(), rng.integers(0, 6)
        corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), 1) * [width, height]
        boxes, labels = corners.reshape(-1, 4).astype(np.float32), rng.integers(0, 9, count).astype(np.int32)
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        return Sample(image, boxes, labels, found=as_found(boxes, labels))

    canvas = tuple(rng.integers(40, 80, 2).tolist())
    options = dict(canvas=canvas, flip_share=0.5, scale=(0.4, 2.5), random_crop=bool(rng.integers(2)), hsv=(5, 30, 30))
    steps = [
        lambda one, draws: transforms.resize(one, tuple(draws.integers(20, 90, 2).tolist())),
        lambda one, draws: transforms.crop(one, *draws.integers(0, 20, 2).tolist(), draws.integers(10, 80, 2).tolist()),
        lambda one, draws: transforms.flip(one),
        ssd.zoom_out,
        ssd.iou_crop,
        lambda one, draws: transforms.augment(one, draws, **options),
    ]
    scenes, order, keys = [scene() for _ in range(5)], rng.permutation(len(steps)), rng.integers(0, 2**32, 9)

    def run(samples):
        tiles = list(samples[:4])
        for number, step in enumerate(order):
            tiles[number % 4] = steps[step](tiles[number % 4], np.random.default_rng(keys[step]))
        whole = transforms.mosaic(tiles, (canvas[0] // 2, canvas[1] // 3), canvas)
        other = transforms.pad(transforms.augment(samples[4], np.random.default_rng(keys[6]), **options), canvas)
        return transforms.mixup(whole, transforms.flip(other))

    out, plain = run(scenes), run([one._replace(found=None) for one in scenes])
    np.testing.assert_array_equal(out.found[:, :4], out.boxes)
    np.testing.assert_array_equal(out.found[:, 4], out.labels)
    assert plain.found is None
    for got, want in zip(out[:3], plain[:3], strict=True):
        np.testing.assert_array_equal(got, want)
