"""Coders of boxes: they undo each other, and equal slow loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.boxes import coding, convert
from tests.support.boxes import some_boxes

FAST = settings(deadline=None, max_examples=30, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32 - 1)


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


def test_decoded_boxes_stay_finite():
    anchors, deltas = np.array([[0.0, 0, 8, 8]], np.float32), np.array([[0.0, 9, 200, -200]], np.float32)
    got = coding.deltas_to_boxes(anchors, deltas)
    np.testing.assert_allclose(got, [[-246, 75.936, 254, 76.064]], rtol=1e-5)
    got = coding.deltas_to_boxes(anchors, deltas, max_shift=16.0)
    np.testing.assert_allclose(got, [[-246, 20, 254, 20]], rtol=1e-5)


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


@FAST
@given(SEEDS)
def test_cells_equal_numpy_and_undo_each_other(seed):
    rng = np.random.default_rng(seed)
    stride = rng.choice([8.0, 16.0], 6)
    priors = np.stack([*rng.uniform(0, 60, (2, 6)), stride, stride], 1)
    regressed = rng.normal(size=(2, 6, 4))
    centre, size = priors[:, :2] + stride[:, None] * regressed[..., :2], stride[:, None] * np.exp(regressed[..., 2:])
    boxes = coding.cells_to_boxes(priors, regressed)
    np.testing.assert_allclose(boxes, np.concatenate([centre - size / 2, centre + size / 2], -1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(coding.boxes_to_cells(priors, boxes), regressed, rtol=1e-3, atol=1e-3)


def test_an_empty_box_has_a_finite_logarithm_in_cells():
    prior, box = np.array([[8.0, 8, 8, 8]]), np.array([[5.0, 5, 5, 5]])
    np.testing.assert_allclose(coding.boxes_to_cells(prior, box, eps=1e-4)[0, 2:], np.log(1e-4), rtol=1e-6)
