"""Losses of boxes: the properties of the formulas, and every way to call them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from kdjax.boxes import iou
from kdjax.errors import UserError
from kdjax.losses import box, distance
from tests.support.boxes import slow_iou
from tests.support.losses import ROWS, some_predictions

FAST = settings(deadline=None, max_examples=30, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32 - 1)
BINS = 8
UNEVEN = np.float32([-1, 0.3, 1, 1.5, 5])  # what the bins of `some_pairs` stand for

BOX = {
    "giou": box.giou,
    "diou": box.diou,
    "ciou": box.ciou,
    "iou_linear": lambda p, t: box.iou(p, t, form="linear"),
    "iou_square": lambda p, t: box.iou(p, t, form="square"),
    "iou_log": lambda p, t: box.iou(p, t, form="log"),
    "smooth_l1": lambda p, t: distance.smooth_l1(p, t, beta=0.5),
    "l1": distance.l1,
}
IN_0_2 = ("giou", "diou", "ciou")
IN_0_1 = ("iou_linear", "iou_square")


def some_pairs(seed: int):
    """Solid boxes and others that overlap them, and logits and a place for the distribution."""
    pred, target, logits, _, quality = some_predictions(seed)
    return pred, target, logits, quality * (logits.shape[-1] - 1)


def every(pred, target, logits, place):
    return {name: loss(pred, target) for name, loss in BOX.items()} | {
        "distribution_focal": box.distribution_focal(logits, place),
        "fine_grained_localization": box.fine_grained_localization(logits, place, UNEVEN),
    }


jitted = jax.jit(every)
with_gradient = jax.jit(
    lambda *arrays: jax.grad(
        lambda pred, logits: sum(jnp.sum(v) for v in every(pred, arrays[1], logits, *arrays[3:]).values()),
        argnums=(0, 1),
    )(arrays[0], arrays[2])
)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_value(self):
        arrays = some_pairs(0)
        chex.assert_trees_all_close(self.variant(every)(*arrays), jitted(*arrays), rtol=1e-5, atol=1e-6)


def test_vmap_over_rows_is_the_batch():
    arrays = some_pairs(1)
    chex.assert_trees_all_close(jax.jit(jax.vmap(every))(*arrays), jitted(*arrays), rtol=1e-5, atol=1e-6)


def test_gradients_by_finite_differences():
    pred, target, logits, place = some_pairs(2)

    def smooth(pred, logits):
        found = every(pred, target, logits, place)
        return {name: jnp.mean(value) for name, value in found.items() if name not in ("l1", "smooth_l1", "ciou")}

    # CIoU holds its alpha constant, so its gradient is not the derivative; the reference numbers cover it.
    check_grads(smooth, (pred, logits), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


@FAST
@given(SEEDS)
def test_bounds(seed):
    for name, value in jitted(*some_pairs(seed)).items():
        assert value.dtype == jnp.float32 and np.all(np.isfinite(value)), name
        assert np.all(np.asarray(value) >= -1e-5), name
        if name in IN_0_2 + IN_0_1:
            assert np.all(np.asarray(value) <= (2 if name in IN_0_2 else 1) + 1e-5), name


@FAST
@given(SEEDS)
def test_equals_slow_loop(seed):
    pred, target, logits, place = some_pairs(seed)
    got = jitted(pred, target, logits, place)
    for row in range(ROWS):
        overlap = {mode: slow_iou(pred[row], target[row], mode) for mode in ("iou", "giou", "diou", "ciou")}
        v, apart = overlap.pop("iou"), np.abs(np.float64(pred[row]) - target[row])
        want = {mode: 1 - value for mode, value in overlap.items()}
        want |= {"iou_linear": 1 - v, "iou_square": 1 - v**2, "iou_log": -np.log(max(v, 1e-6))}
        want |= {"l1": apart, "smooth_l1": np.where(apart < 0.5, apart**2, apart - 0.25)}
        q = np.exp(np.float64(logits[row])) / np.exp(np.float64(logits[row])).sum()
        left = int(place[row])
        want["distribution_focal"] = -(left + 1 - place[row]) * np.log(q[left]) - (place[row] - left) * np.log(
            q[left + 1]
        )
        hat = [np.interp(place[row], UNEVEN, unit) for unit in np.eye(len(UNEVEN))]
        want["fine_grained_localization"] = -np.dot(hat, np.log(q))
        assert want.keys() == got.keys()
        for name, value in want.items():
            np.testing.assert_allclose(got[name][row], value, rtol=2e-4, atol=2e-5, err_msg=name)


def test_eps_and_the_default_form():
    pred, target = (x / 16 for x in some_pairs(5)[:2])
    for name in ("giou", "diou", "ciou"):
        want = 1 - iou.box_iou(pred, target, mode=name, eps=50.0)
        np.testing.assert_allclose(BOX[name](pred, target, eps=50.0), want, rtol=1e-6, err_msg=name)
        assert np.max(np.abs(BOX[name](pred, target) - want)) > 1e-3, name
    np.testing.assert_array_equal(box.iou(pred, target), box.iou(pred, target, form="log"))
    far = box.iou(np.array([0.0, 0, 2, 2]), np.array([5.0, 5, 6, 6]), eps=0.01)
    np.testing.assert_allclose(far, -np.log(0.01), rtol=1e-6)


def test_zero_at_equality():
    _, target, *_ = some_pairs(3)
    for name, loss in BOX.items():
        np.testing.assert_allclose(loss(target, target), 0, atol=1e-5, err_msg=name)


def test_distribution_focal_takes_the_last_bin():
    logits = jax.random.normal(jax.random.key(0), (3, BINS))
    log_q = jax.nn.log_softmax(logits)
    got = box.distribution_focal(logits, np.array([0.0, 2.25, BINS - 1.0], np.float32))
    want = [-log_q[0, 0], -0.75 * log_q[1, 2] - 0.25 * log_q[1, 3], -log_q[2, BINS - 1]]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_fine_grained_localization_between_and_beyond_the_bins():
    logits = jax.random.normal(jax.random.key(1), (4, 5))
    log_q = jax.nn.log_softmax(logits)
    got = box.fine_grained_localization(logits, np.float32([-7, 1.25, 1.5, 9]), UNEVEN)
    want = [-log_q[0, 0], -(log_q[1, 2] + log_q[1, 3]) / 2, -log_q[2, 3], -log_q[3, 4]]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    even = box.fine_grained_localization(logits, np.float32([0, 0.5, 2.25, 4]), np.arange(5.0))
    np.testing.assert_allclose(even, box.distribution_focal(logits, np.float32([0, 0.5, 2.25, 4])), rtol=1e-5)
    with pytest.raises(UserError, match="target must have the shape"):
        box.fine_grained_localization(logits, np.zeros(3), UNEVEN)


def test_finite_on_bad_boxes_large_logits_and_bfloat16():
    pred, target, logits, place = some_pairs(4)
    pred[:4] = [[3, 3, 3, 3], [9, 9, 1, 1], [0, 0, 0, 5], [-1e4, -1e4, 1e4, 1e4]]
    target[:2] = [[3, 3, 3, 3], [500, 500, 600, 600]]
    pred[5] = target[5]
    arrays = (pred, target, logits * 30, place)
    half = tuple(jnp.asarray(x, jnp.bfloat16) if x.dtype == np.float32 else x for x in arrays)
    for values in (arrays, half):
        for name, value in jitted(*values).items():
            assert value.dtype == jnp.float32 and np.all(np.isfinite(value)), name
        for gradient in with_gradient(*values):
            assert np.all(np.isfinite(np.asarray(gradient, np.float32)))


def test_unknown_form_is_named():
    with pytest.raises(UserError, match="form must be one of linear, square, log, not 'cubic'"):
        box.iou(np.zeros((1, 4)), np.zeros((1, 4)), form="cubic")
