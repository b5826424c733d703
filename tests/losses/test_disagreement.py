"""Rank mimicking and prediction-guided feature imitation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdjax.errors import UserError
from kdjax.losses import classification, disagreement, distance, divergence, normalization
from tests.support.arrays import maps, quick_jit


def scores(seed, shape=(2, 12)):
    return tuple(jax.nn.sigmoid(x) for x in maps(seed, shape))


# Objects of 4, 1 and 0 positive priors, and one more of 3; the rest of the priors belongs to nobody.
MATCHED = np.array([[0, 0, 0, 0, 1, 3, 3, 3, 0, 0, 0, 0], [3, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
POSITIVE = np.array([[1] * 8 + [0] * 4, [1, 1, 1] + [0] * 9], bool)
loss = jax.jit(lambda s, t: divergence.rank_kl(s, t, MATCHED, POSITIVE, boxes=4))


@pytest.mark.parametrize("theta", [1.0, 0.1])
def test_rank_kl_equals_a_slow_loop(theta):
    student, teacher = scores(0)
    expected = np.zeros((2, 4))
    for b, j in np.ndindex(2, 4):
        own = POSITIVE[b] & (MATCHED[b] == j)
        if own.any():
            p, q = (np.exp(np.float64(x[b][own]) / theta) for x in (teacher, student))
            p, q = p / p.sum(), q / q.sum()
            expected[b, j] = (p * np.log(p / q)).sum()
    value = quick_jit(lambda s, t: divergence.rank_kl(s, t, MATCHED, POSITIVE, boxes=4, theta=theta))(student, teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-7)
    owned = divergence.has_positives(MATCHED, POSITIVE, boxes=4)
    np.testing.assert_array_equal(owned, [[True, True, False, True], [False, True, False, True]])
    assert value[0, 1] == 0 and value[0, 2] == 0  # one positive prior, none


def test_a_reversed_ranking_is_charged():
    """Ports that sort both sides before the softmax give 0 here."""
    teacher = jnp.array([[0.9, 0.5, 0.1]])
    one, all_ = np.zeros((1, 3), int), np.ones((1, 3), bool)
    value = divergence.rank_kl(teacher[:, ::-1], teacher, one, all_, boxes=1)
    np.testing.assert_allclose(value, 0.208, atol=5e-4)
    assert float(divergence.rank_kl(teacher, teacher, one, all_, boxes=1)[0, 0]) == 0


@pytest.mark.parametrize(("count", "expected"), [(2, 0.46), (9, 0.16), (50, 0.033)])
def test_the_scale_of_a_swapped_peak(count, expected):
    teacher = np.zeros((1, count), np.float32)
    student = teacher.copy()
    teacher[0, 0] = student[0, 1] = 1
    value = divergence.rank_kl(student, teacher, np.zeros((1, count), int), np.ones((1, count), bool), boxes=1)
    np.testing.assert_allclose(value[0, 0], expected, rtol=0.05)


def test_upper_bound():
    ones = np.arange(100)[None] < 41
    value = divergence.rank_kl(1.0 - ones, 1.0 * ones, np.zeros((1, 100), int), np.ones((1, 100), bool), boxes=1)
    assert 0.46 < float(value[0, 0]) < 0.475


def test_invariances():
    student, teacher = scores(1)
    value = loss(student, teacher)
    np.testing.assert_allclose(
        loss(student + 0.3, teacher - 0.1), value, rtol=1e-3, atol=1e-6
    )  # one constant an object
    order = np.random.default_rng(2).permutation(12)
    shuffled = divergence.rank_kl(student[:, order], teacher[:, order], MATCHED[:, order], POSITIVE[:, order], boxes=4)
    np.testing.assert_allclose(shuffled, value, rtol=1e-3, atol=1e-6)
    assert float(jnp.abs(loss(student[:, ::-1], teacher) - value).max()) > 1e-4  # of one net alone it matters
    more = divergence.rank_kl(student, teacher, MATCHED, POSITIVE, boxes=7)  # padding rows change nothing
    np.testing.assert_allclose(more, jnp.pad(value, ((0, 0), (0, 3))), rtol=1e-5)


def test_without_positives_value_and_gradient_are_zero():
    student, teacher = scores(3)
    nobody = np.zeros_like(POSITIVE)
    total = quick_jit(jax.value_and_grad(lambda s: divergence.rank_kl(s, teacher, MATCHED, nobody, boxes=4).sum()))
    value, gradient = total(student)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_rank_gradient():
    student, teacher = scores(4)
    check_grads(
        jax.jit(lambda s: loss(s, teacher).sum()), (student,), order=1, modes=["rev"], atol=1e-2, rtol=2e-2, eps=1e-2
    )
    gradient = jax.grad(lambda s: loss(s, teacher).sum())(student)
    np.testing.assert_array_equal(gradient[~POSITIVE], 0)
    assert gradient[0, 4] == 0 and float(jnp.abs(gradient).max()) > 0  # the object with one positive prior


def test_label_score():
    logits = maps(5, (2, 3, 4))[0]
    labels = np.array([[0, 3, 4], [1, 1, -1]])  # 4 is background
    value = classification.label_score(logits, labels)
    np.testing.assert_allclose(value[0, 1], jax.nn.sigmoid(logits[0, 1, 3]), rtol=1e-6)
    assert np.all(np.isfinite(value))


# PFI -----------------------------------------------------------------------------------------------------------------


def pfi(student, teacher, student_logits, teacher_logits, **options):
    return distance.guided_squared(
        student, teacher, disagreement.class_disagreement(student_logits, teacher_logits, **options)
    )


def test_pfi_equals_its_formula():
    (s, t), (zs, zt) = maps(6, (2, 3, 4, 5)), maps(7, (2, 3, 4, 6))
    expected = ((zs - zt) ** 2).mean(-1) * ((s - t) ** 2).mean(-1)
    np.testing.assert_allclose(pfi(s, t, zs, zt)[..., 0], expected, rtol=1e-5)
    sigmoid = (jax.nn.sigmoid(zs) - jax.nn.sigmoid(zt)) ** 2
    np.testing.assert_allclose(
        disagreement.class_disagreement(zs, zt, space="probs")[..., 0], sigmoid.mean(-1), rtol=1e-4
    )


def test_pfi_properties():
    (s, t), (zs, zt) = maps(8, (2, 3, 4, 5)), maps(9, (2, 3, 4, 6))
    value = pfi(s, t, zs, zt)
    assert float(value.min()) > 0
    np.testing.assert_array_equal(pfi(s, s, zs, zt), 0)
    np.testing.assert_array_equal(pfi(s, t, zs, zs), 0)
    np.testing.assert_allclose(pfi(t, s, zt, zs), value, rtol=1e-5)  # student and teacher swapped
    ones = distance.guided_squared(s, t, jnp.ones((2, 3, 4, 1)))
    np.testing.assert_allclose(ones.mean(), distance.squared(s, t).mean(), rtol=1e-5)
    gradients = quick_jit(jax.grad(lambda s, zs: pfi(s, t, zs, zt).sum(), (0, 1)))(s, zs)
    assert all(float(jnp.abs(g).max()) > 0 for g in gradients)


def test_unit_mean():
    x = jnp.square(maps(10, (2, 3, 4, 1))[0])
    np.testing.assert_allclose(normalization.unit_mean(x).mean(), 1, rtol=1e-5)
    np.testing.assert_allclose(normalization.unit_mean(1000 * x), normalization.unit_mean(x), rtol=1e-5)
    np.testing.assert_array_equal(normalization.unit_mean(jnp.zeros(3)), 0)


def test_refused():
    with pytest.raises(UserError, match="space"):
        disagreement.class_disagreement(np.zeros((1, 1, 1, 2)), np.zeros((1, 1, 1, 2)), space="softmax")
