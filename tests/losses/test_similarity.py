"""Structural similarity: its definition, its bounds, small and flat maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdjax.errors import UserError
from kdjax.losses import normalization, similarity
from tests.support.arrays import assert_finite, maps, quick_jit, users_jit


def unit(seed, shape=(2, 8, 9, 3)):
    """Student and teacher within 0 .. 1."""
    return tuple(normalization.min_max(x) for x in maps(seed, shape))


def slow_ssim(s, t, window, exponents=(1, 1, 1), *, sigma=1.5, data_range=1.0, k1=0.01, k2=0.03, padding="same"):
    """By the definition, cell by cell, in double precision, with reflected borders or none."""
    half = window // 2
    weights = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * sigma**2))
    weights = np.outer(weights, weights) / weights.sum() ** 2
    border = (half, half) if padding == "same" else (0, 0)
    pad = ((0, 0), border, border, (0, 0))
    s, t = (np.pad(np.float64(x), pad, mode="reflect") for x in (s, t))
    out = np.empty((s.shape[0], s.shape[1] - 2 * half, s.shape[2] - 2 * half, s.shape[3]))
    for i, j in np.ndindex(*out.shape[1:3]):
        a, b = (x[:, i : i + window, j : j + window] for x in (s, t))

        def mean(x):
            return np.einsum("bhwc,hw->bc", x, weights)

        ma, mb = mean(a), mean(b)
        va, vb = mean((a - ma[:, None, None]) ** 2), mean((b - mb[:, None, None]) ** 2)
        cov = mean((a - ma[:, None, None]) * (b - mb[:, None, None]))
        c1, c2 = (k1 * data_range) ** 2, (k2 * data_range) ** 2
        sd = np.sqrt(va * vb)
        factors = (
            (2 * ma * mb + c1) / (ma**2 + mb**2 + c1),
            (2 * sd + c2) / (va + vb + c2),
            (cov + c2 / 2) / (sd + c2 / 2),
        )
        factors = [f if e == 1 else np.maximum(f, 0) ** e for f, e in zip(factors, exponents, strict=True)]
        out[:, i, j] = np.prod(factors, 0)
    return out


@pytest.mark.parametrize(("window", "exponents"), [(5, (1, 1, 1)), (3, (1, 2, 0.5)), (5, (0, 0, 1))])
def test_definition(window, exponents):
    student, teacher = unit(0)
    value = quick_jit(lambda s, t: similarity.ssim(s, t, window=window, exponents=exponents))(student, teacher)
    np.testing.assert_allclose(value, slow_ssim(student, teacher, window, exponents), atol=2e-5)


OPTIONS = (
    {"sigma": 0.8},
    {"data_range": 30.0},
    {"k1": 0.5},
    {"k2": 0.5},
    {"padding": "valid"},
    {"exponents": (0.5, 1, 2), "k1": 0.3, "k2": 0.4, "padding": "valid"},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options):
    student, teacher = unit(7, (1, 6, 7, 2))
    found = quick_jit(
        lambda s, t: [f(s, t, window=5, **options) for f in (similarity.ssim, similarity.structural_dissimilarity)]
    )
    want = slow_ssim(student, teacher, 5, **options)
    for got, wanted in zip(found(student, teacher), (want, np.clip((1 - want) / 2, 0, 1)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_two_factor_form_is_the_product_of_three():
    student, teacher = unit(1)
    three = quick_jit(
        lambda s, t: [
            similarity.ssim(s, t, window=7, exponents=e) for e in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1))
        ]
    )(student, teacher)
    np.testing.assert_allclose(three[0] * three[1] * three[2], three[3], atol=1e-5)


def test_bounds_symmetry_and_self():
    student, teacher = unit(2)
    ssim = users_jit(lambda s, t: similarity.ssim(s, t, window=5))
    value = ssim(student, teacher)
    assert -1 <= float(value.min()) and float(value.max()) <= 1
    np.testing.assert_allclose(ssim(teacher, student), value, atol=1e-6)
    np.testing.assert_allclose(ssim(teacher, teacher), 1, atol=1e-6)
    loss = quick_jit(similarity.structural_dissimilarity)(student, teacher)
    assert 0 <= float(loss.min()) and float(loss.max()) <= 1


def test_constant_zero_against_constant_one():
    c1 = 0.01**2
    value = similarity.ssim(np.zeros((1, 5, 5, 1)), np.ones((1, 5, 5, 1)), window=5)
    np.testing.assert_allclose(value, c1 / (1 + c1), rtol=1e-3)


@pytest.mark.parametrize("scope", ["image", "channel", "batch"])
def test_min_max_makes_it_invariant_to_positive_affine_maps(scope):
    student, teacher = maps(3, (2, 8, 9, 3))

    @quick_jit
    def loss(s, t):
        return similarity.structural_dissimilarity(
            normalization.min_max(s, scope=scope), normalization.min_max(t, scope=scope)
        ).mean()

    value = loss(student, teacher)
    np.testing.assert_allclose(loss(7 * student - 3, teacher), value, rtol=1e-4)
    np.testing.assert_allclose(loss(student, 0.1 * teacher + 5), value, rtol=1e-3)
    assert abs(loss(-student, teacher) - value) > 1e-2
    rescaled = normalization.min_max(student, scope=scope)
    assert float(rescaled.min()) == 0 and abs(float(rescaled.max()) - 1) < 1e-6


def test_flat_maps_have_finite_value_and_gradient():
    _, teacher = maps(4, (2, 8, 9, 3))
    for flat in (jnp.zeros_like(teacher), jnp.full_like(teacher, 0.7)):
        for exponents in ((1.0, 1.0, 1.0), (0.5, 0.5, 0.5)):
            assert_finite(
                lambda s, t, e=exponents: similarity.structural_dissimilarity(
                    normalization.min_max(s), normalization.min_max(t), exponents=e
                ),
                flat,
                teacher,
            )
    gradient = jax.grad(lambda s: normalization.min_max(s).sum())(jnp.full((1, 2, 2, 1), 0.7))
    np.testing.assert_array_equal(gradient, 0)


def test_raw_maps():
    """Outside of 0 .. 1: x and -x count as alike, rounding is cut off, flat maps have a finite gradient."""
    rng = np.random.default_rng(8)
    loss = users_jit(lambda s, t: similarity.structural_dissimilarity(s, t, window=3, eps=1e-12))
    large = np.float32(rng.normal(size=(1, 6, 7, 2)) + 20)
    assert float(loss(-large, large).max()) < 0.01 < 0.3 < float(loss(large[:, ::-1], large).max())
    # The variance of a large and nearly flat map is all rounding: SSIM leaves its range, the loss does not.
    flat = np.float32(1000 + 1e-2 * rng.normal(size=(2, 1, 6, 7, 2)))
    raw = similarity.ssim(*flat, window=3, eps=1e-12)
    assert not -1 <= float(raw.min()) <= float(raw.max()) <= 1
    assert float(loss(*flat).min()) >= 0 and float(loss(*flat).max()) <= 1
    for student in (0.0, 0.7, -1000.0):
        for teacher in (np.zeros_like(large), large, flat[0]):
            assert_finite(
                lambda s, t: similarity.structural_dissimilarity(s, t, window=3, eps=1e-12),
                jnp.full_like(large, student),
                teacher,
            )
    # kornia's constant: what it makes of two maps of zeros is no longer exactly 1.
    zeros = np.zeros((1, 5, 5, 1))
    np.testing.assert_allclose(1 - similarity.ssim(zeros, zeros, window=3, eps=1e-12), 1.1146e-05, rtol=1e-2)
    np.testing.assert_array_equal(similarity.ssim(zeros, zeros, window=3), 1)


def test_gradient_by_finite_differences():
    student, teacher = maps(5, (1, 5, 6, 2))
    loss = jax.jit(
        lambda s: similarity.structural_dissimilarity(
            normalization.min_max(s), normalization.min_max(teacher), window=5
        ).mean()
    )
    check_grads(loss, (student,), order=1, modes=["rev"], atol=1e-2, rtol=2e-2, eps=1e-3)


def test_window_shrinks_to_the_map():
    assert similarity.fitting_window(11, (80, 80)) == 11
    assert similarity.fitting_window(11, (5, 5)) == 5 == similarity.fitting_window(11, (6, 10))
    assert similarity.fitting_window(11, (1, 20)) == 1
    student, teacher = unit(6, (2, 5, 5, 3))
    fitting = (1 - similarity.ssim(student, teacher, window=5)) / 2
    np.testing.assert_allclose(similarity.structural_dissimilarity(student, teacher), fitting, atol=1e-6)
    np.testing.assert_array_equal(similarity.structural_dissimilarity(*unit(6, (2, 1, 5, 3))), 0)


def test_gaussian_matrix_reflects_at_the_border():
    matrix = similarity._gaussian_matrix(6, 5, 1.5, "same")
    padded = np.pad(np.eye(6), ((2, 2), (0, 0)), mode="reflect")
    weights = np.exp(-(np.arange(-2, 3) ** 2) / 4.5)
    expected = np.stack([(weights / weights.sum()) @ padded[i : i + 5] for i in range(6)])
    np.testing.assert_allclose(matrix, expected, rtol=1e-6)


def test_refused():
    x = np.zeros((1, 8, 8, 1))
    for options in ({"window": 4}, {"window": 9}, {"window": 3, "padding": "zero"}):
        with pytest.raises(UserError, match="ssim"):
            similarity.ssim(x, x, **options)
    with pytest.raises(UserError, match="scope"):
        normalization.min_max(x, scope="level")
