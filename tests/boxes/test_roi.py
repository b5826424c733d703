"""RoIAlign against a slow loop over samples, on one level and on a pyramid; its gradient and its corner cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.boxes import roi
from tests.support.arrays import quick_jit

STRIDES = (8, 16)


def pyramid(seed: int = 0, channels: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(2, *hw, channels)).astype(np.float32) for hw in ((6, 9), (3, 5))]


def some_boxes(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Boxes inside, across and outside the 48 x 72 image, one without area, one upside down; and a level each."""
    rng = np.random.default_rng(seed)
    boxes = np.sort(rng.uniform(-20, 90, (2, 8, 2, 2)), 2).reshape(2, 8, 4).astype(np.float32)
    boxes[0, 0], boxes[0, 1], boxes[1, 0] = (5, 5, 5, 30), (200, 200, 240, 240), (40, 30, 20, 10)
    return boxes, rng.integers(0, 2, (2, 8)).astype(np.int32)


def slow_sample(image, y, x):
    """Bilinear interpolation between the centres of cells as torchvision has it."""
    height, width, channels = image.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return np.zeros(channels)
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = image[top, left] * (1 - dx) + image[top, right] * dx
    return upper * (1 - dy) + (image[bottom, left] * (1 - dx) + image[bottom, right] * dx) * dy


def slow_align(image, box, stride, size, ratio, aligned):
    x1, y1, x2, y2 = np.float64(box) / stride - (0.5 if aligned else 0)
    wide, tall = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1), max(y2 - y1, 1))
    rows, columns = (ratio or max(int(np.ceil(side / size)), 0) for side in (tall, wide))
    out = np.zeros((size, size, image.shape[-1]))
    for i, j, k, m in np.ndindex(size, size, rows, columns):
        y = y1 + (i + (k + 0.5) / rows) * tall / size
        x = x1 + (j + (m + 0.5) / columns) * wide / size
        out[i, j] += slow_sample(image, y, x) / (rows * columns)
    return out


@pytest.mark.parametrize(("ratio", "aligned"), [(2, True), (1, True), (0, True), (2, False), (0, False)])
def test_roi_align_equals_a_slow_loop(ratio, aligned):
    maps, (boxes, level) = pyramid(), some_boxes()
    align = quick_jit(
        lambda maps: roi.roi_align(maps, boxes, level, strides=STRIDES, size=3, sampling_ratio=ratio, aligned=aligned)
    )
    found = np.asarray(align(maps))
    for b, r in np.ndindex(level.shape):
        of = level[b, r]
        want = slow_align(np.float64(maps[of][b]), boxes[b, r], STRIDES[of], 3, ratio, aligned)
        np.testing.assert_allclose(found[b, r], want, atol=2e-5, err_msg=f"{boxes[b, r]} on {of}")


def test_the_box_of_the_whole_map_is_the_map():
    (fine, _), box = pyramid(), np.array([[[0.0, 0, 48, 48]]], np.float32)
    square = fine[:1, :, :6]
    level = np.zeros((1, 1), np.int32)
    found = quick_jit(lambda m: roi.roi_align([m], box, level, strides=(8,), size=6, sampling_ratio=1))(square)
    np.testing.assert_allclose(found[0, 0], square[0], atol=1e-5)


def test_gradient_is_the_transpose_of_the_sampling():
    """RoIAlign is linear in the maps: <R(m), v> = <m, R^T v>; maps that no box looks at get none."""
    maps, (boxes, _) = [jnp.array(m) for m in pyramid()], some_boxes()
    level = np.zeros(boxes.shape[:2], np.int32)

    def product(maps, v):
        return jnp.sum(roi.roi_align(maps, boxes, level, strides=STRIDES, size=3) * v)

    v = np.random.default_rng(2).normal(size=(2, 8, 3, 3, 3)).astype(np.float32)
    value, gradient = quick_jit(jax.value_and_grad(product))(maps, v)
    np.testing.assert_allclose(
        sum(float(jnp.sum(g * m)) for g, m in zip(gradient, maps, strict=True)), value, rtol=1e-4
    )
    assert np.any(gradient[0]) and not np.any(gradient[1])


def test_gradient_at_the_boxes_is_the_slope():
    """Central differences, on boxes whose samples lie inside cells."""
    maps = [jnp.array(m) for m in pyramid()]
    boxes = jnp.array([[[9.9, 5.1, 41.7, 33.9], [3.0, 4.2, 30.6, 26.3]]] * 2, jnp.float32)
    level = np.array([[0, 1], [1, 0]], np.int32)
    v = np.random.default_rng(2).normal(size=(2, 2, 3, 3, 3)).astype(np.float32)

    def product(boxes):
        return jnp.sum(roi.roi_align(maps, boxes, level, strides=STRIDES, size=3) * v)

    slope = np.asarray(quick_jit(jax.grad(product))(boxes))
    moved = quick_jit(jax.vmap(lambda step: product(boxes + step.reshape(boxes.shape))))
    steps = 0.01 * np.eye(boxes.size, dtype=np.float32)
    want = (np.asarray(moved(steps)) - np.asarray(moved(-steps))) / 0.02
    np.testing.assert_allclose(slope.ravel(), want, rtol=0.02, atol=0.01)


def test_more_samples_than_allowed_are_cut():
    maps, box = pyramid(), np.array([[[0.0, 0, 64, 40]], [[0, 0, 64, 40]]], np.float32)
    level = np.zeros((2, 1), np.int32)

    def align(**sampling):
        return roi.roi_align(maps, box, level, strides=STRIDES, size=2, **sampling)

    cut, two = quick_jit(lambda: (align(sampling_ratio=0, max_samples=2), align(sampling_ratio=2)))()
    np.testing.assert_allclose(cut, two, atol=1e-6)  # 4 and 3 samples a cell would be needed


def test_levels_by_size():
    side = np.array([1.0, 55, 111, 112.5, 223, 225, 5000], np.float32)
    boxes = np.stack([side, side, 2 * side, 2 * side], -1)
    assert roi.roi_levels(boxes, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert roi.roi_levels(boxes, 3, finest=112.0).tolist() == [0, 0, 0, 0, 0, 1, 2]
    assert roi.roi_levels(np.array([[5.0, 5, 5, 9], [9, 9, 0, 0]]), 3).tolist() == [0, 0]
