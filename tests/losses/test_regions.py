"""Masks from boxes and the valuable region: against slow loops, with padding and odd boxes."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.boxes import assign
from kdjax.losses import regions
from tests.support.arrays import quick_jit

HEIGHT, WIDTH, CANVAS = 5, 7, (40, 56)


def draw_boxes(seed, count=3):
    """Boxes of all kinds: inside, across the border, outside, without area; the last one is padding."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-10, 60, (1, count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0, 30, (1, count, 2))], -1).astype(np.float32)
    if seed % 3 == 0:
        boxes[:, 0, 2:] = boxes[:, 0, :2]
    return boxes, np.arange(count)[None] < count - 1


focal = quick_jit(lambda boxes, valid: regions.focal_masks(boxes, valid, jnp.array(CANVAS), (HEIGHT, WIDTH)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_focal_masks_equal_a_slow_loop(seed):
    boxes, valid = draw_boxes(seed)
    foreground = np.zeros((HEIGHT, WIDTH))
    for x1, y1, x2, y2 in boxes[0][valid[0]]:
        x1, x2 = int(np.floor(x1 / CANVAS[1] * WIDTH)), int(np.ceil(x2 / CANVAS[1] * WIDTH))
        y1, y2 = int(np.floor(y1 / CANVAS[0] * HEIGHT)), int(np.ceil(y2 / CANVAS[0] * HEIGHT))
        for i, j in np.ndindex(HEIGHT, WIDTH):
            if y1 <= i <= y2 and x1 <= j <= x2:
                foreground[i, j] = max(foreground[i, j], 1 / ((x2 - x1 + 1) * (y2 - y1 + 1)))
    background = (foreground == 0) / max((foreground == 0).sum(), 1)
    found = focal(boxes, valid)
    np.testing.assert_allclose(found[0][0, ..., 0], foreground, rtol=1e-5)
    np.testing.assert_allclose(found[1][0, ..., 0], background, rtol=1e-5)


def test_focal_masks_of_special_images():
    boxes, valid = np.array([[[9.0, 9, 30, 22], [0, 0, 0, 0]]], np.float32), np.array([[True, False]])
    one, _ = focal(boxes, valid)
    np.testing.assert_allclose(one.sum(), 1, rtol=1e-6)  # one box inside the map
    empty, background = focal(boxes, np.zeros((1, 2), bool))
    np.testing.assert_array_equal(empty, 0)
    np.testing.assert_allclose(background, 1 / (HEIGHT * WIDTH), rtol=1e-6)
    _, none_left = focal(np.array([[[0.0, 0, 56, 40], [0, 0, 0, 0]]], np.float32), valid)
    np.testing.assert_array_equal(none_left, 0)
    outside, background = focal(np.array([[[100.0, 100, 120, 120], [0, 0, 0, 0]]], np.float32), valid)
    np.testing.assert_array_equal(outside, 0)
    np.testing.assert_allclose(background.sum(), 1, rtol=1e-6)


def test_focal_masks_on_the_border_of_a_cell():
    """15.25 / 61 * 8 is 2 exactly, whatever a compiler makes of the division."""
    boxes, valid = np.array([[[15.25, 15.25, 30.5, 30.5]]], np.float32), np.array([[True]])
    foreground, _ = quick_jit(lambda b, v, size: regions.focal_masks(b, v, size, (8, 8)))(
        boxes, valid, np.array([[61, 61]])
    )
    np.testing.assert_array_equal(np.argwhere(foreground[0, ..., 0])[0], [2, 2])
    np.testing.assert_array_equal(np.argwhere(foreground[0, ..., 0])[-1], [4, 4])


def test_focal_masks_take_a_size_for_each_image():
    boxes, valid = np.repeat([[[8.0, 8, 20, 20]]], 2, 0), np.ones((2, 1), bool)
    masks = quick_jit(lambda b, v, size: regions.focal_masks(b, v, size, (HEIGHT, WIDTH)))
    both, _ = masks(boxes, valid, np.array([[40, 56], [20, 28]]))
    alone, _ = masks(boxes[:1], valid[:1], np.array([20, 28]))
    np.testing.assert_array_equal(both[1], alone[0])
    assert np.any(both[0] != both[1])


STRIDES, SIZES = (8, 16, 32), ((16, 20), (8, 10), (4, 5))
levelled = quick_jit(lambda boxes, valid: regions.level_masks(boxes, valid, STRIDES, SIZES))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_levelled_masks_equal_a_slow_loop(seed):
    boxes, valid = draw_boxes(seed)
    boxes[:, 0, 2:] += (seed % 5) * 40  # reach the coarser levels
    expected = [np.zeros(size, bool) for size in SIZES]
    for x1, y1, x2, y2 in boxes[0][valid[0]]:
        level = np.clip(np.floor(np.log2(np.sqrt((x2 - x1 + 1) * (y2 - y1 + 1)) / 56)), 0, 2).astype(int)
        (left, top), (right, bottom) = (
            (int(x / STRIDES[level]), int(y / STRIDES[level])) for x, y in ((x1, y1), (x2, y2))
        )
        for i, j in np.ndindex(*SIZES[level]):
            if top <= i <= max(bottom - 1, top) and left <= j <= max(right - 1, left):
                expected[level][i, j] = True
    for found, want in zip(levelled(boxes, valid), expected, strict=True):
        np.testing.assert_array_equal(found[0, ..., 0], want)


def test_levelled_masks_of_one_box():
    boxes, valid = np.array([[[16.0, 16, 60, 40]]], np.float32), np.array([[True]])
    fine, *others = levelled(boxes, valid)
    wanted = np.zeros(SIZES[0], bool)
    wanted[2:5, 2:7] = True  # from 16 / 8 to 40 / 8 and to 60 / 8, exclusive
    np.testing.assert_array_equal(fine[0, ..., 0], wanted)
    assert not any(np.any(other) for other in others)


def grid_anchors():
    centres = 8.0 * np.stack(np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT)), -1)[:, :, None]
    half = np.array([[6.0, 6], [10, 5], [5, 10]])
    return np.concatenate([centres - half, centres + half], -1).astype(np.float32)


fine_grained = quick_jit(
    lambda boxes, valid: [
        regions.fine_grained_mask(boxes, valid, grid_anchors(), psi=psi) for psi in (0.0, 0.5, 0.9, 1.0)
    ]
)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_fine_grained_mask(seed):
    boxes, valid = draw_boxes(seed)
    masks = [np.asarray(m)[0, ..., 0] for m in fine_grained(boxes, valid)]
    a, b = grid_anchors().reshape(-1, 1, 4), boxes[0][valid[0]][None]
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    inter = np.prod(np.clip(high - low, 0, None), -1)
    union = np.prod(a[..., 2:] - a[..., :2], -1) + np.prod(b[..., 2:] - b[..., :2], -1) - inter
    overlap = (inter / union).reshape(HEIGHT, WIDTH, 3, -1)
    np.testing.assert_array_equal(masks[0], (overlap > 0).any((2, 3)))  # psi = 0 keeps every overlapping cell
    for wide, narrow in itertools.pairwise(masks):
        assert np.all(wide | ~narrow)  # larger psi, a subset
    for j in range(overlap.shape[-1]):
        best = overlap[..., j].max()
        if best > 0:  # a cell of the best anchor is always kept
            assert np.any(masks[-1] & (overlap[..., j].max(-1) >= best - 1e-6))


def test_fine_grained_mask_without_boxes():
    boxes, valid = draw_boxes(1)
    for mask in fine_grained(boxes, np.zeros_like(valid)):
        assert not np.any(mask)


ANCHORS = np.concatenate([grid_anchors()[:, :, 0].reshape(-1, 4), 2 * grid_anchors()[:3, :4, 0].reshape(-1, 4)])
LEVELS = [HEIGHT * WIDTH, 12]


@quick_jit
def region(boxes, valid):
    index, _, overlap, threshold = assign.atss_candidates(ANCHORS, boxes, level_sizes=LEVELS, topk=9)
    weights = [regions.valuable_region(ANCHORS, boxes, valid, threshold, gamma=g) for g in (0.0, 0.25, 1.0)]
    return index, overlap, threshold, weights


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_valuable_region_equals_a_slow_loop(seed):
    boxes, valid = draw_boxes(seed)
    index, overlap, threshold, weights = region(boxes, valid)
    centres = (np.float64(ANCHORS[:, :2]) + ANCHORS[:, 2:]) / 2
    expected = np.zeros(len(ANCHORS))
    doubtful = np.zeros(len(ANCHORS), bool)
    for j, box in enumerate(np.float64(boxes[0])):
        middle = (box[:2] + box[2:]) / 2
        distance = np.sqrt(((centres - middle) ** 2).sum(-1))
        low, high = np.maximum(ANCHORS[:, :2], box[:2]), np.minimum(ANCHORS[:, 2:], box[2:])
        inter = np.prod(np.clip(high - low, 0, None), -1)
        iou = inter / (np.prod(ANCHORS[:, 2:] - ANCHORS[:, :2], -1) + np.prod(box[2:] - box[:2]) - inter)
        hull = np.maximum(ANCHORS[:, 2:], box[2:]) - np.minimum(ANCHORS[:, :2], box[:2])
        diou = iou - distance**2 / (hull**2).sum(-1)
        chosen = np.concatenate(
            [
                start + np.argsort(distance[start : start + n], kind="stable")[:9]
                for start, n in zip((0, 35), LEVELS, strict=True)
            ]
        )
        np.testing.assert_allclose(distance[np.asarray(index)[0, j]], distance[chosen], atol=1e-3)
        np.testing.assert_allclose(overlap[0, j], iou[np.asarray(index)[0, j]], atol=1e-5)
        a = float(threshold[0, j])
        own = iou[np.asarray(index)[0, j]]
        np.testing.assert_allclose(a, own.mean() + own.std(ddof=1), atol=1e-4)
        if valid[0, j]:
            expected = np.maximum(expected, np.where((diou >= 0.25 * a) & (diou < a), iou, 0))
            doubtful |= (abs(diou - 0.25 * a) < 1e-5) | (abs(diou - a) < 1e-5)
    np.testing.assert_allclose(np.asarray(weights[1])[0][~doubtful], expected[~doubtful], atol=1e-5)
    np.testing.assert_array_equal(weights[2], 0)
    assert np.all(np.asarray(weights[0]) >= np.asarray(weights[1]))


def test_no_valid_box_no_region():
    boxes, valid = draw_boxes(2)
    for weights in region(boxes, np.zeros_like(valid))[3]:
        np.testing.assert_array_equal(weights, 0)


@pytest.mark.parametrize("count", [0, 1])
def test_masks_of_images_with_few_rows(count):
    """No row of ground truth at all is possible too."""
    boxes, valid = np.zeros((2, count, 4), np.float32), np.zeros((2, count), bool)
    foreground, background = regions.focal_masks(boxes, valid, np.array([16, 16]), (2, 2))
    assert float(foreground.max()) == 0 and float(background.sum()) == 2


def test_valuable_region_excludes_its_upper_border():
    box, valid = np.array([[[0.0, 0, 8, 8]]], np.float32), np.array([[True]])
    for threshold, weight in ((1.0, 0.0), (1.5, 1.0)):  # the DIoU of equal boxes is 1
        found = regions.valuable_region(box[0], box, valid, np.array([[threshold]], np.float32))
        np.testing.assert_allclose(found, weight, atol=1e-6)
