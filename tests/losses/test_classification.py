"""Losses of class logits: slow NumPy, the properties of the formulas, and every way to call them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from kdjax.losses import classification, disagreement
from tests.support.arrays import maps
from tests.support.losses import CLASSES, ROWS, some_predictions

FAST = settings(deadline=None, max_examples=30, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32 - 1)


HELD = ("varifocal", "matchability_aware")  # the weight is a constant to the gradient


def some_rows(seed: int):
    """Logits, labels (CLASSES is background) and qualities."""
    return some_predictions(seed)[2:]


def every(logits, labels, quality):
    return {
        "quality_focal": classification.quality_focal(logits, labels, quality),
        "quality_focal_1.5": classification.quality_focal(logits, labels, quality, beta=1.5),
        "sigmoid_focal": classification.sigmoid_focal(logits, labels),
        "sigmoid_focal_0.4_1.5": classification.sigmoid_focal(logits, labels, alpha=0.4, gamma=1.5),
        "varifocal": classification.varifocal(logits, labels, quality),
        "varifocal_0.4_1.5": classification.varifocal(logits, labels, quality, alpha=0.4, gamma=1.5),
        "matchability_aware": classification.matchability_aware(logits, labels, quality),
        "cross_entropy": classification.cross_entropy(logits, jnp.minimum(labels, CLASSES - 1)),
        "binary_cross_entropy": classification.binary_cross_entropy(logits, labels),
        "soft_binary_cross_entropy": classification.soft_binary_cross_entropy(logits[..., 0], quality),
    }


jitted = jax.jit(every)
with_gradient = jax.jit(
    jax.grad(lambda logits, labels, quality: sum(jnp.sum(v) for v in every(logits, labels, quality).values()))
)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_value(self):
        arrays = some_rows(0)
        chex.assert_trees_all_close(self.variant(every)(*arrays), jitted(*arrays), rtol=1e-5, atol=1e-6)


def test_vmap_over_rows_is_the_batch():
    arrays = some_rows(1)
    chex.assert_trees_all_close(jax.jit(jax.vmap(every))(*arrays), jitted(*arrays), rtol=1e-5, atol=1e-6)


def test_gradients_by_finite_differences():
    logits, labels, quality = some_rows(2)

    def smooth(logits):
        values = every(logits, labels, quality).items()
        return {name: jnp.mean(value) for name, value in values if not name.startswith(HELD)}

    check_grads(smooth, (logits,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


@FAST
@given(SEEDS)
def test_bounds(seed):
    for name, value in jitted(*some_rows(seed)).items():
        assert value.dtype == jnp.float32 and np.all(np.isfinite(value)), name
        assert np.all(np.asarray(value) >= -1e-5), name


@FAST
@given(SEEDS)
def test_equals_slow_loop(seed):
    logits, labels, quality = some_rows(seed)
    got = jitted(*some_rows(seed))
    for row in range(ROWS):
        total, gentle, held = 0.0, 0.0, np.zeros(3)
        row_logits = np.float64(logits[row])
        entropy = np.log(np.exp(row_logits).sum()) - row_logits[min(labels[row], CLASSES - 1)]
        np.testing.assert_allclose(got["cross_entropy"][row], entropy, rtol=1e-4, atol=1e-6)
        p, soft = 1 / (1 + np.exp(-row_logits[0])), quality[row]
        entropy = -soft * np.log(p) - (1 - soft) * np.log1p(-p)
        np.testing.assert_allclose(got["soft_binary_cross_entropy"][row], entropy, rtol=1e-4, atol=1e-6)
        for c in range(CLASSES):
            p = 1 / (1 + np.exp(-np.float64(logits[row, c])))
            t = float(labels[row] == c)
            entropy = -t * np.log(p) - (1 - t) * np.log1p(-p)
            weight = (0.25 if t else 0.75) * abs(t - p) ** 2
            np.testing.assert_allclose(got["binary_cross_entropy"][row, c], entropy, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(got["sigmoid_focal"][row, c], weight * entropy, rtol=1e-4, atol=1e-6)
            weight = (0.4 if t else 0.6) * abs(t - p) ** 1.5
            np.testing.assert_allclose(got["sigmoid_focal_0.4_1.5"][row, c], weight * entropy, rtol=1e-4, atol=1e-6)
            soft = t * quality[row]
            entropy = -soft * np.log(p) - (1 - soft) * np.log1p(-p)
            total, gentle = total + abs(soft - p) ** 2 * entropy, gentle + abs(soft - p) ** 1.5 * entropy
            held[:2] += entropy * np.array([soft, soft] if t else [0.75 * p**2, 0.4 * p**1.5])
            held[2] += -(soft**1.5) * np.log(p) - (1 - soft**1.5) * np.log1p(-p) if t else -(p**1.5) * np.log1p(-p)
        for name, value in zip(("varifocal", "varifocal_0.4_1.5", "matchability_aware"), held, strict=True):
            np.testing.assert_allclose(got[name][row], value, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(got["quality_focal"][row], total, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(got["quality_focal_1.5"][row], gentle, rtol=1e-4, atol=1e-6)


def test_zero_where_the_docstring_says_so():
    _, labels, _ = some_rows(3)
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


def test_finite_on_large_logits_and_bfloat16():
    logits, labels, quality = some_rows(4)
    arrays = (logits * 30, labels, quality)
    half = tuple(jnp.asarray(x, jnp.bfloat16) if x.dtype == np.float32 else x for x in arrays)
    for values in (arrays, half):
        for name, value in jitted(*values).items():
            assert value.dtype == jnp.float32 and np.all(np.isfinite(value)), name
        assert np.all(np.isfinite(np.asarray(with_gradient(*values), np.float32)))


def test_the_weight_of_varifocal_and_mal_is_a_constant_to_the_gradient():
    logits, labels, quality = some_rows(8)
    p, here = np.asarray(jax.nn.sigmoid(logits)), np.arange(CLASSES) == labels[:, None]
    for loss, gamma, exponent, at_label, alpha in (
        (classification.varifocal, 2.0, 1.0, quality[:, None], 0.75),
        (classification.matchability_aware, 1.5, 1.5, 1.0, 1.0),
    ):
        slope, of_quality = jax.grad(lambda x, q, loss=loss: jnp.sum(loss(x, labels, q)), (0, 1))(logits, quality)
        target = np.where(here, quality[:, None] ** exponent, 0)
        weight = np.where(here, at_label, alpha * p**gamma)
        np.testing.assert_allclose(slope, weight * (p - target), rtol=1e-4, atol=1e-6)
        assert not np.any(of_quality)
    # A match without overlap is learned by one of the two alone.
    rows = np.zeros((1, 1), np.float32), np.array([0]), np.zeros(1, np.float32)
    assert classification.varifocal(*rows)[0] == 0 < classification.matchability_aware(*rows)[0]


def test_label_score():
    logits = maps(5, (2, 3, 4))[0]
    labels = np.array([[0, 3, 4], [1, 1, -1]])  # 4 is background
    value = classification.label_score(logits, labels)
    np.testing.assert_allclose(value[0, 1], jax.nn.sigmoid(logits[0, 1, 3]), rtol=1e-6)
    assert np.all(np.isfinite(value))


def test_modulated_bce_equals_its_definition():
    student, teacher = maps(6, (6, 5))
    p, q = (1 / (1 + np.exp(-np.float64(x))) for x in (teacher, student))
    entropy = -(p * np.log(q) + (1 - p) * np.log(1 - q))
    for beta in (1.0, 1.5, 2.0):
        value = classification.modulated_bce(student, teacher, beta=beta)
        np.testing.assert_allclose(value, np.abs(p - q) ** beta * entropy, rtol=1e-4)
    np.testing.assert_allclose(disagreement.score_gap(student, teacher), np.abs(p - q).max(-1), rtol=1e-5)


def test_modulated_bce_at_equality():
    """The gradient given there is 0; the slopes on both sides are +-H(p) p (1 - p)."""
    _, teacher = maps(7, (6, 5))
    np.testing.assert_array_equal(classification.modulated_bce(teacher, teacher), 0)
    for beta in (1.0, 2.0, 1.5):
        gradient = jax.grad(lambda s, b=beta: classification.modulated_bce(s, teacher, beta=b).sum())(teacher)
        np.testing.assert_array_equal(gradient, 0)
    p = 1 / (1 + np.exp(-np.float64(teacher)))
    slope = -(p * np.log(p) + (1 - p) * np.log(1 - p)) * p * (1 - p)
    step = 1e-3
    np.testing.assert_allclose(classification.modulated_bce(teacher + step, teacher) / step, slope, rtol=0.02)
    np.testing.assert_allclose(classification.modulated_bce(teacher - step, teacher) / step, slope, rtol=0.02)
