"""Conversions, coders, priors and overlaps of boxes: slow NumPy and the properties of the formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.boxes import assign, coding, convert, iou, priors
from kdjax.errors import UserError

FAST = settings(deadline=None, max_examples=30, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32 - 1)


def some_boxes(seed: int, count: int = 12, side: float = 100.0) -> np.ndarray:
    """Boxes with x1 <= x2 and y1 <= y2; some without area, some equal to the one before them."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, side, (count, 2, 2))
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    boxes[::5, 2] = boxes[::5, 0]
    boxes[3::4] = boxes[2::4][: len(boxes[3::4])]
    return boxes.astype(np.float32)


def area(box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def slow_iou(a, b, mode: str) -> float:
    a, b = np.float64(a), np.float64(b)
    overlap = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = area(a) + area(b) - overlap
    hull = [min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])]
    if mode == "iof":
        return overlap / max(area(a), 1e-6)
    if mode == "iou":
        return overlap / max(union, 1e-6)
    if mode == "giou":
        return overlap / max(union, 1e-6) - (area(hull) - max(union, 1e-6)) / max(area(hull), 1e-6)
    value = overlap / (union + 1e-6)
    centres = ((a[:2] + a[2:]) - (b[:2] + b[2:])) / 2
    diou = value - np.sum(centres**2) / ((hull[2] - hull[0]) ** 2 + (hull[3] - hull[1]) ** 2 + 1e-6)
    if mode == "diou":
        return diou
    angles = [np.arctan((x[2] - x[0]) / (x[3] - x[1] + 1e-6)) for x in (a, b)]
    v = 4 / np.pi**2 * (angles[0] - angles[1]) ** 2
    alpha = v / (1 - value + v) if value > 0.5 and v > 0 else 0
    return np.clip(diou - alpha * v, -1, 1)


all_modes = jax.jit(lambda a, b: {mode: iou.pairwise_iou(a, b, mode=mode) for mode in iou.MODES})


@FAST
@given(SEEDS)
def test_pairwise_equals_slow_loop(seed):
    a, b = some_boxes(seed), some_boxes(seed + 1, 9)
    for mode, got in all_modes(a, b).items():
        want = [[slow_iou(x, y, mode) for y in b] for x in a]
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5, err_msg=mode)


@FAST
@given(SEEDS)
def test_bounds_and_symmetry_of_overlaps(seed):
    a = some_boxes(seed)
    got = {mode: np.asarray(value) for mode, value in all_modes(a, a[:9]).items()}
    bounds = {"iou": 0, "iof": 0, "giou": -1, "diou": -1, "ciou": -1}
    for mode, low in bounds.items():
        assert np.all(got[mode] >= low - 1e-5) and np.all(got[mode] <= 1 + 1e-5), mode
        if mode != "iof":
            square = got[mode][:9]
            np.testing.assert_allclose(square, square.T, atol=1e-5, err_msg=mode)
            solid = np.array([area(box) > 1 for box in a[:9]])
            np.testing.assert_allclose(np.diag(square)[solid], 1, atol=1e-4, err_msg=mode)
    assert np.all(got["giou"] <= got["iou"] + 1e-5) and np.all(got["diou"] <= got["iou"] + 1e-5)
    assert np.all(got["ciou"] <= got["diou"] + 1e-5)


def test_overlap_does_not_change_with_place():
    a, b = some_boxes(0), some_boxes(1, 9)
    for mode, got in all_modes(a + 64, b + 64).items():
        np.testing.assert_allclose(got, all_modes(a, b)[mode], atol=1e-4, err_msg=mode)


def test_gradient_of_overlaps_is_finite_for_equal_empty_touching_and_inverted_boxes():
    a = np.array([[1, 1, 3, 3], [2, 2, 2, 2], [0, 0, 2, 2], [5, 5, 1, 1], [0, 0, 0, 4]], np.float32)
    b = np.array([[1, 1, 3, 3], [2, 2, 2, 2], [2, 0, 4, 2], [0, 0, 4, 4], [0, 0, 4, 4]], np.float32)
    for mode in iou.MODES:
        value, gradient = jax.value_and_grad(lambda a, mode=mode: jnp.sum(iou.box_iou(a, b, mode=mode)))(a)
        assert np.isfinite(value) and np.all(np.isfinite(gradient)), mode


def test_unknown_overlap_is_named():
    with pytest.raises(UserError, match="iou, iof, giou, diou, ciou, not 'siou'"):
        iou.box_iou(np.zeros(4), np.zeros(4), mode="siou")


@FAST
@given(SEEDS)
def test_decoding_undoes_encoding(seed):
    rng = np.random.default_rng(seed)
    boxes, points = some_boxes(seed), rng.uniform(0, 100, (12, 2)).astype(np.float32)
    distances = coding.boxes_to_distance(points, boxes)
    np.testing.assert_allclose(coding.distance_to_boxes(points, distances), boxes, atol=1e-4)
    other = rng.normal(0, 30, (12, 4)).astype(np.float32)
    back = coding.boxes_to_distance(points, coding.distance_to_boxes(points, other))
    np.testing.assert_allclose(back, other, atol=1e-4)
    solid = boxes + np.float32([0, 0, 4, 4])
    for options in ({}, {"means": (0.1, 0, 0, 0.2), "stds": (0.1, 0.1, 0.2, 0.2)}):
        deltas = coding.boxes_to_deltas(solid[::-1], solid, **options)
        back = coding.deltas_to_boxes(solid[::-1], deltas, **options)
        np.testing.assert_allclose(back, solid, atol=1e-3)
    np.testing.assert_allclose(convert.from_xywh(convert.to_xywh(boxes)), boxes, atol=1e-4)


def test_encoding_is_cut_below_the_last_bin():
    got = coding.boxes_to_distance(np.array([5.0, 5.0]), np.array([6.0, 0.0, 30.0, 8.0]), max_distance=16.0, eps=0.1)
    np.testing.assert_allclose(got, [0, 5, 15.9, 3], rtol=1e-6)


def test_clip_takes_a_size_for_each_image():
    boxes = np.array([[[-4.0, -2, 50, 60]], [[10, 10, 20, 20]]], np.float32)
    got = jax.jit(convert.clip)(boxes, np.array([[32, 40], [15, 12]]))
    np.testing.assert_array_equal(got, [[[0, 0, 40, 32]], [[10, 10, 12, 15]]])


def test_grid_priors_covers_maps_that_do_not_divide():
    got = priors.grid_priors((20, 33), [8, 16], offset=0.5)
    assert got.dtype == np.float32 and got.shape == (3 * 5 + 2 * 3, 4)
    want = [
        [(x + 0.5) * s, (y + 0.5) * s, s, s] for s, h, w in ((8, 3, 5), (16, 2, 3)) for y in range(h) for x in range(w)
    ]
    np.testing.assert_array_equal(got, want)


def test_decoded_boxes_stay_finite():
    anchors, deltas = np.array([[0.0, 0, 8, 8]], np.float32), np.array([[0.0, 9, 200, -200]], np.float32)
    got = coding.deltas_to_boxes(anchors, deltas)
    np.testing.assert_allclose(got, [[-246, 75.936, 254, 76.064]], rtol=1e-5)
    got = coding.deltas_to_boxes(anchors, deltas, max_shift=16.0)
    np.testing.assert_allclose(got, [[-246, 20, 254, 20]], rtol=1e-5)


def test_grid_anchors_have_their_area_and_shape():
    scales = priors.octave_scales(4, 3)
    got = priors.grid_anchors((16, 24), [8, 16], ratios=[0.5, 2.0], scales=scales)
    points = priors.grid_priors((16, 24), [8, 16]).repeat(6, axis=0)
    sizes = got[:, 2:] - got[:, :2]
    np.testing.assert_allclose((got[:, :2] + got[:, 2:]) / 2, points[:, :2], atol=1e-5)
    np.testing.assert_allclose(
        sizes[:, 1] / sizes[:, 0], np.tile(np.repeat([0.5, 2.0], 3), len(points) // 6), rtol=1e-5
    )
    np.testing.assert_allclose(np.sqrt(sizes.prod(1)) / points[:, 2], np.tile(scales, len(points) // 3), rtol=1e-5)


def test_priors_inside_the_padding():
    grid = priors.grid_priors((32, 32), [8], offset=0.5)
    inside = np.asarray(assign.inside_padding(grid, np.array([[32, 32], [17, 8]])))
    assert inside[0].all()
    # ceil(17 / 8) rows of ceil(8 / 8) columns.
    np.testing.assert_array_equal(
        inside[1].reshape(4, 4), np.arange(16).reshape(4, 4) % 4 < np.array([[1], [1], [1], [0]])
    )


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_overlaps(self):
        a, b = some_boxes(2), some_boxes(3, 9)
        got = self.variant(lambda a, b: {mode: iou.pairwise_iou(a, b, mode=mode) for mode in iou.MODES})(a, b)
        chex.assert_trees_all_close(got, all_modes(a, b), atol=1e-5)


@FAST
@given(SEEDS)
def test_centreness_and_expected_distance_equal_slow_loops(seed):
    rng = np.random.default_rng(seed)
    distances, logits = rng.uniform(-1, 9, (6, 4)), rng.normal(0, 2, (6, 20))
    for sides, value, row, expected in zip(
        distances, coding.centreness(distances), logits, coding.expected_distance(logits), strict=True
    ):
        left, top, right, bottom = sides
        inside = min(sides) > 0
        across, along = min(left, right) / max(left, right), min(top, bottom) / max(top, bottom)
        assert float(value) == pytest.approx(np.sqrt(across * along) if inside else 0, rel=1e-5)
        for side in range(4):
            weights = np.exp(row[5 * side : 5 * side + 5])
            mean = sum(i * w for i, w in enumerate(weights)) / sum(weights)
            assert float(expected[side]) == pytest.approx(mean, rel=1e-5)


def test_centreness_has_finite_gradients_on_the_border():
    gradient = jax.grad(lambda d: jnp.sum(coding.centreness(d)))(
        jnp.array([[0.0, 1, 2, 3], [0, 0, 0, 0], [-1, 2, 3, 4]])
    )
    assert np.isfinite(gradient).all()
