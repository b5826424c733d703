"""Overlaps of boxes: slow NumPy and the properties of the formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.boxes import iou
from kdjax.errors import UserError
from tests.support.boxes import area, slow_iou, some_boxes

FAST = settings(deadline=None, max_examples=30, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32 - 1)


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


def test_gradient_is_zero_where_boxes_just_touch():
    """As the peers have it: `maximum` would give one half."""
    a, b = np.array([0.0, 0, 2, 2]), np.array([2.0, 0, 4, 2])
    np.testing.assert_array_equal(jax.grad(lambda a: iou.box_iou(a, b))(a), 0)
    assert np.any(jax.grad(lambda a: iou.box_iou(a, b - np.array([0.5, 0, 0, 0])))(a))


def test_alpha_of_ciou_is_a_constant_to_the_gradient():
    a, b = np.array([0.0, 0, 8, 8]), np.array([1.0, 0, 8, 6])
    u = float(iou.box_iou(a, b))

    def v(a):
        return (
            2 / np.pi * (jnp.arctan((b[2] - b[0]) / (b[3] - b[1])) - jnp.arctan((a[2] - a[0]) / (a[3] - a[1])))
        ) ** 2

    alpha = float(v(a) / (1 - u + v(a)))
    want = jax.grad(lambda a: iou.box_iou(a, b, mode="diou") - alpha * v(a))(a)
    np.testing.assert_allclose(jax.grad(lambda a: iou.box_iou(a, b, mode="ciou"))(a), want, rtol=1e-3, atol=1e-6)
    assert u > 0.5 and alpha > 1e-3


def test_pairwise_is_box_iou_of_every_pair():
    a, b = some_boxes(4, side=5.0), some_boxes(5, 9, side=5.0)
    for mode in iou.MODES:
        got = iou.pairwise_iou(a, b, mode=mode, eps=50.0)
        want = [[iou.box_iou(x, y, mode=mode, eps=50.0) for y in b[:3]] for x in a[:3]]
        np.testing.assert_allclose(got[:3, :3], want, rtol=1e-5, atol=1e-6, err_msg=mode)
        assert np.max(np.abs(got - all_modes(a, b)[mode])) > 1e-3, mode


def test_unknown_overlap_is_named():
    with pytest.raises(UserError, match="iou, iof, giou, diou, ciou, not 'siou'"):
        iou.box_iou(np.zeros(4), np.zeros(4), mode="siou")


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_overlaps(self):
        a, b = some_boxes(2), some_boxes(3, 9)
        got = self.variant(lambda a, b: {mode: iou.pairwise_iou(a, b, mode=mode) for mode in iou.MODES})(a, b)
        chex.assert_trees_all_close(got, all_modes(a, b), atol=1e-5)
