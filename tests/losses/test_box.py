"""The detectors' losses: slow NumPy, the properties of the formulas, and every way to call them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from kdjax.errors import UserError
from kdjax.losses import box, classification, distance

FAST = settings(deadline=None, max_examples=30, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32 - 1)
ROWS, CLASSES, BINS = 16, 5, 8

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
    """Solid boxes and others that overlap them, and logits, labels (CLASSES is background) and qualities."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 50, (ROWS, 2))
    target = np.concatenate([start, start + rng.uniform(4, 40, (ROWS, 2))], 1)
    pred = target + rng.uniform(-1.9, 1.9, (ROWS, 4))
    logits = rng.normal(0, 3, (ROWS, CLASSES))
    labels = rng.integers(0, CLASSES + 1, ROWS)
    quality = rng.uniform(0, 1, ROWS)
    return (*tuple(x.astype(np.float32) for x in (pred, target, logits)), labels.astype(np.int32), np.float32(quality))


def every(pred, target, logits, labels, quality):
    found = {name: loss(pred, target) for name, loss in BOX.items()}
    found["quality_focal"] = classification.quality_focal(logits, labels, quality)
    found["quality_focal_1.5"] = classification.quality_focal(logits, labels, quality, beta=1.5)
    found["sigmoid_focal"] = classification.sigmoid_focal(logits, labels)
    found["cross_entropy"] = classification.cross_entropy(logits, jnp.minimum(labels, CLASSES - 1))
    found["binary_cross_entropy"] = classification.binary_cross_entropy(logits, labels)
    found["distribution_focal"] = box.distribution_focal(logits, quality * (CLASSES - 1))
    return found


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
    pred, target, logits, labels, quality = some_pairs(2)

    def smooth(pred, logits):
        found = every(pred, target, logits, labels, quality)
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
def test_classification_equals_slow_loop(seed):
    _, _, logits, labels, quality = some_pairs(seed)
    got = jitted(*some_pairs(seed))
    for row in range(ROWS):
        total = 0.0
        for c in range(CLASSES):
            p = 1 / (1 + np.exp(-np.float64(logits[row, c])))
            t = float(labels[row] == c)
            entropy = -t * np.log(p) - (1 - t) * np.log1p(-p)
            weight = (0.25 if t else 0.75) * abs(t - p) ** 2
            np.testing.assert_allclose(got["binary_cross_entropy"][row, c], entropy, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(got["sigmoid_focal"][row, c], weight * entropy, rtol=1e-4, atol=1e-6)
            soft = t * quality[row]
            total += abs(soft - p) ** 2 * (-soft * np.log(p) - (1 - soft) * np.log1p(-p))
        np.testing.assert_allclose(got["quality_focal"][row], total, rtol=1e-4, atol=1e-6)


def test_zero_where_the_docstring_says_so():
    _, target, _, labels, _ = some_pairs(3)
    for name, loss in BOX.items():
        np.testing.assert_allclose(loss(target, target), 0, atol=1e-5, err_msg=name)
    sure = np.where(np.arange(CLASSES) == labels[:, None], 40.0, -40.0).astype(np.float32)
    for value in (
        classification.quality_focal(sure, labels, np.ones(ROWS, np.float32)),
        classification.sigmoid_focal(sure, labels),
        classification.binary_cross_entropy(sure, labels),
    ):
        np.testing.assert_allclose(value, 0, atol=1e-6)
    # A probability that equals its soft label costs nothing, whatever the cross-entropy is.
    logits = np.full((1, 2), -40.0, np.float32)
    logits[0, 1] = np.log(0.3 / 0.7)
    np.testing.assert_allclose(classification.quality_focal(logits, np.array([1]), np.array([0.3])), 0, atol=1e-6)


def test_distribution_focal_takes_the_last_bin():
    logits = jax.random.normal(jax.random.key(0), (3, BINS))
    log_q = jax.nn.log_softmax(logits)
    got = box.distribution_focal(logits, np.array([0.0, 2.25, BINS - 1.0], np.float32))
    want = [-log_q[0, 0], -0.75 * log_q[1, 2] - 0.25 * log_q[1, 3], -log_q[2, BINS - 1]]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_finite_on_bad_boxes_large_logits_and_bfloat16():
    pred, target, logits, labels, quality = some_pairs(4)
    pred[:4] = [[3, 3, 3, 3], [9, 9, 1, 1], [0, 0, 0, 5], [-1e4, -1e4, 1e4, 1e4]]
    target[:2] = [[3, 3, 3, 3], [500, 500, 600, 600]]
    pred[5] = target[5]
    arrays = (pred, target, logits * 30, labels, quality)
    half = tuple(jnp.asarray(x, jnp.bfloat16) if x.dtype == np.float32 else x for x in arrays)
    for values in (arrays, half):
        for name, value in jitted(*values).items():
            assert value.dtype == jnp.float32 and np.all(np.isfinite(value)), name
        for gradient in with_gradient(*values):
            assert np.all(np.isfinite(np.asarray(gradient, np.float32)))


def test_unknown_form_is_named():
    with pytest.raises(UserError, match="form must be one of linear, square, log, not 'cubic'"):
        box.iou(np.zeros((1, 4)), np.zeros((1, 4)), form="cubic")
