"""Predictions as distributions: Hinton, DKD, LD's edges, CrossKD's and BCKD's modulated cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdjax.errors import UserError
from kdjax.losses import classification, disagreement, divergence
from tests.support.arrays import assert_finite, maps, quick_jit

SHAPE = (6, 5)
LABELS = np.array([0, 1, 2, 3, 4, 4])


def log_softmax(x, temperature):
    x = np.float64(x) / temperature
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_softmax_kl_equals_numpy(temperature):
    student, teacher = maps(0, SHAPE, scale=2.0)
    p, q = log_softmax(teacher, temperature), log_softmax(student, temperature)
    expected = temperature**2 * (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(divergence.softmax_kl(student, teacher, temperature=temperature), expected, rtol=1e-4)
    mean = divergence.softmax_kl(student, teacher, temperature=temperature, class_reduction="mean")
    np.testing.assert_allclose(mean, expected / SHAPE[-1], rtol=1e-4)  # mean and sum over the bins differ by n + 1


def test_softmax_kl_ignores_a_shift_and_the_sigmoid_forms_do_not():
    student, teacher = maps(1, SHAPE)
    shift = np.linspace(-5, 5, 6)[:, None]
    np.testing.assert_allclose(
        divergence.softmax_kl(student + shift, teacher - shift),
        divergence.softmax_kl(student, teacher),
        rtol=1e-4,
        atol=1e-6,
    )
    np.testing.assert_allclose(divergence.softmax_kl(teacher + 1, teacher), 0, atol=1e-6)
    assert float(divergence.sigmoid_kl(teacher + 1, teacher).min()) > 0.01
    assert float(classification.modulated_bce(teacher + 1, teacher).min()) > 0.01


def test_sigmoid_kl_equals_numpy():
    student, teacher = maps(2, SHAPE, scale=2.0)
    p, q = (1 / (1 + np.exp(-np.float64(x) / 2)) for x in (teacher, student))
    expected = 4 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    np.testing.assert_allclose(divergence.sigmoid_kl(student, teacher, temperature=2.0), expected, rtol=1e-3, atol=1e-6)


def test_gradient_at_high_temperature_is_the_centred_difference():
    student, teacher = maps(3, SHAPE)
    gradient = jax.jit(jax.grad(lambda s: divergence.softmax_kl(s, teacher, temperature=300.0).sum()))(student)
    centred = (student - teacher) - (student - teacher).mean(-1, keepdims=True)
    np.testing.assert_allclose(gradient, centred / SHAPE[-1], rtol=0.05, atol=1e-3)


def test_gradients_by_finite_differences():
    student, teacher = maps(4, SHAPE)
    for loss in (divergence.softmax_kl, divergence.sigmoid_kl, classification.modulated_bce):
        check_grads(
            jax.jit(lambda s, f=loss: f(s, teacher).mean()),
            (student,),
            order=1,
            modes=["rev"],
            atol=1e-2,
            rtol=1e-2,
            eps=1e-2,
        )


def test_finite_for_huge_logits():
    student, teacher = maps(5, SHAPE, scale=1e3)
    for loss in (divergence.softmax_kl, divergence.sigmoid_kl, classification.modulated_bce):
        value, _ = assert_finite(loss, student, teacher)
        assert value > 0
    assert_finite(lambda s, t: sum(divergence.decoupled_kl(s, t, LABELS)), student, teacher)


def test_modulated_bce_equals_its_definition():
    student, teacher = maps(6, SHAPE)
    p, q = (1 / (1 + np.exp(-np.float64(x))) for x in (teacher, student))
    entropy = -(p * np.log(q) + (1 - p) * np.log(1 - q))
    for beta in (1.0, 1.5, 2.0):
        value = classification.modulated_bce(student, teacher, beta=beta)
        np.testing.assert_allclose(value, np.abs(p - q) ** beta * entropy, rtol=1e-4)
    np.testing.assert_allclose(disagreement.score_gap(student, teacher), np.abs(p - q).max(-1), rtol=1e-5)


def test_modulated_bce_at_equality():
    """The gradient given there is 0; the slopes on both sides are +-H(p) p (1 - p)."""
    _, teacher = maps(7, SHAPE)
    np.testing.assert_array_equal(classification.modulated_bce(teacher, teacher), 0)
    for beta in (1.0, 2.0, 1.5):
        gradient = jax.grad(lambda s, b=beta: classification.modulated_bce(s, teacher, beta=b).sum())(teacher)
        np.testing.assert_array_equal(gradient, 0)
    p = 1 / (1 + np.exp(-np.float64(teacher)))
    slope = -(p * np.log(p) + (1 - p) * np.log(1 - p)) * p * (1 - p)
    step = 1e-3
    np.testing.assert_allclose(classification.modulated_bce(teacher + step, teacher) / step, slope, rtol=0.02)
    np.testing.assert_allclose(classification.modulated_bce(teacher - step, teacher) / step, slope, rtol=0.02)


# DKD -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_adds_up_to_hinton(temperature):
    student, teacher = maps(8, SHAPE, scale=2.0)
    target, others = divergence.decoupled_kl(student, teacher, LABELS, temperature=temperature)
    p = np.exp(log_softmax(teacher, temperature))[np.arange(6), LABELS]
    whole = divergence.softmax_kl(student, teacher, temperature=temperature)
    np.testing.assert_allclose(target + (1 - p) * others, whole, rtol=1e-4, atol=1e-6)


def test_decoupled_zero_and_invariance():
    student, teacher = maps(9, SHAPE)
    for part in divergence.decoupled_kl(teacher + 3, teacher, LABELS):
        np.testing.assert_allclose(part, 0, atol=1e-6)
    for part, shifted in zip(
        divergence.decoupled_kl(student, teacher, LABELS),
        divergence.decoupled_kl(student - 2, teacher + 1, LABELS),
        strict=True,
    ):
        assert float(part.min()) >= 0
        np.testing.assert_allclose(part, shifted, rtol=1e-3, atol=1e-6)


def test_decoupled_others_do_not_move_the_target_logit():
    student, teacher = maps(10, SHAPE)
    gradient = jax.jit(jax.grad(lambda s: divergence.decoupled_kl(s, teacher, LABELS)[1].sum()))(student)
    np.testing.assert_array_equal(gradient[np.arange(6), LABELS], 0)
    assert float(jnp.abs(gradient).max()) > 0


def test_two_classes_leave_nothing_to_the_others():
    student, teacher = maps(11, (6, 2))
    for split in (divergence.decoupled_kl, divergence.decoupled_sigmoid_kl):
        target, others = split(student, teacher, LABELS % 2)
        np.testing.assert_array_equal(others, 0)
        assert float(target.min()) > 0


def test_decoupled_sigmoid_targets():
    student, teacher = maps(12, SHAPE)
    target, others = divergence.decoupled_sigmoid_kl(student, teacher, LABELS, temperature=2.0)
    binary = divergence.sigmoid_kl(student, teacher)[np.arange(6), LABELS]
    np.testing.assert_allclose(target, binary, rtol=1e-5)
    np.testing.assert_allclose(others, divergence.decoupled_kl(student, teacher, LABELS, temperature=2.0)[1], rtol=1e-5)


def test_duplicating_the_batch_leaves_means_unchanged():
    student, teacher = maps(13, SHAPE)
    twice = jnp.concatenate([student, student]), jnp.concatenate([teacher, teacher])
    for loss in (divergence.softmax_kl, divergence.sigmoid_kl, classification.modulated_bce):
        loss = quick_jit(loss)
        np.testing.assert_allclose(loss(*twice).mean(), loss(student, teacher).mean(), rtol=1e-5)


@pytest.mark.parametrize("loss", [divergence.softmax_kl, divergence.sigmoid_kl])
def test_refused(loss):
    with pytest.raises(UserError, match="temperature"):
        loss(np.zeros((1, 2)), np.zeros((1, 2)), temperature=0.0)
    with pytest.raises(UserError, match="sum"):
        divergence.softmax_kl(np.zeros((1, 2)), np.zeros((1, 2)), class_reduction="max")
    with pytest.raises(UserError, match="temperature"):
        divergence.decoupled_kl(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros(1, int), temperature=-1.0)
