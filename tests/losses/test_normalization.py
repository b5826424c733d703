"""Arrays brought to a common scale: statistics of the batch, of an image, of another map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdjax.losses import normalization
from tests.support.arrays import maps, on_pmap, quick_jit

SHAPE = (2, 4, 5, 4)


def test_align_takes_the_teachers_statistics_and_ignores_the_students():
    student, teacher = maps(10, SHAPE)
    align = quick_jit(normalization.match_statistics)
    aligned = align(student, teacher)
    np.testing.assert_allclose(aligned.mean((0, 1, 2)), teacher.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(aligned.std((0, 1, 2)), teacher.std((0, 1, 2)), rtol=1e-4)
    moved = align(jnp.array([0.1, 1, 5, 30]) * student + jnp.arange(4.0), teacher)
    np.testing.assert_allclose(moved, aligned, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(align(teacher, teacher), teacher, rtol=1e-4, atol=1e-5)


def test_align_of_a_constant_channel_gives_the_teachers_mean():
    student, teacher = maps(11, SHAPE)
    student = student.at[..., 0].set(0.3)
    np.testing.assert_allclose(
        normalization.match_statistics(student, teacher)[..., 0], teacher[..., 0].mean(), rtol=1e-5
    )


def test_align_gradient_flows_through_the_students_statistics():
    student, teacher = maps(12, (1, 2, 3, 2))
    weights = np.random.default_rng(13).normal(size=student.shape)
    loss = jax.jit(lambda s: (normalization.match_statistics(s, teacher) * weights).sum())
    check_grads(loss, (student,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)
    gradient = jax.grad(loss)(student)
    np.testing.assert_allclose(gradient.sum((0, 1, 2)), 0, atol=1e-4)  # a shift of a channel changes nothing


def test_standardize_is_accurate_far_from_zero():
    x, _ = maps(16)
    far = np.asarray(x + 1000)
    wide = np.float64(far)
    expected = (wide - wide.mean((0, 1, 2))) / wide.std((0, 1, 2))
    np.testing.assert_allclose(normalization.standardize(far), expected, atol=2e-5)


def test_standardize_over_devices_without_the_axis_name_would_differ():
    student, _ = maps(18, (8, 1, 2, 1))
    per_device = on_pmap(lambda x, axis_name: normalization.standardize(x), student)
    assert np.max(np.abs(per_device - normalization.standardize(student))) > 0.1


def test_unit_mean():
    x = jnp.square(maps(10, (2, 3, 4, 1))[0])
    np.testing.assert_allclose(normalization.unit_mean(x).mean(), 1, rtol=1e-5)
    np.testing.assert_allclose(normalization.unit_mean(1000 * x), normalization.unit_mean(x), rtol=1e-5)
    np.testing.assert_array_equal(normalization.unit_mean(jnp.zeros(3)), 0)


def test_unit_norm():
    x = maps(14, (3, 4, 5, 2))[0].at[1].set(0)
    got = normalization.unit_norm(x)
    for i in (0, 2):
        np.testing.assert_allclose(got[i], x[i] / np.linalg.norm(np.float64(x[i]).ravel()), rtol=1e-5)
    np.testing.assert_array_equal(got[1], 0)
    assert np.all(np.isfinite(jax.grad(lambda x: normalization.unit_norm(x).sum())(x)))


@pytest.mark.parametrize(
    "options", [{"axes": (1, 2, 3)}, {"eps": 0.5}, {"variance_eps": 0.5}, {"ddof": 1, "axes": (1, 2)}], ids=str
)
def test_standardize_equals_numpy(options):
    x, _ = maps(15, (3, 4, 5, 2))
    axes, eps = options.get("axes", (0, 1, 2)), options.get("eps", 1e-6)
    wide = np.float64(x)
    variance = wide.var(axes, ddof=options.get("ddof", 0), keepdims=True) + options.get("variance_eps", 0)
    want = (wide - wide.mean(axes, keepdims=True)) / (np.sqrt(variance) + eps)
    np.testing.assert_allclose(normalization.standardize(x, **options), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ddof", [0, 1])
def test_align_equals_numpy(ddof):
    student, teacher = maps(16, SHAPE)
    s, t = np.float64(student), np.float64(teacher)
    axes = (0, 1, 2)
    want = (s - s.mean(axes)) / (s.std(axes, ddof=ddof) + 0.5) * t.std(axes, ddof=ddof) + t.mean(axes)
    got = normalization.match_statistics(student, teacher, eps=0.5, ddof=ddof)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("scope", "axes"), [("image", (1, 2, 3)), ("channel", (1, 2)), ("batch", (0, 1, 2, 3))])
def test_min_max_equals_numpy(scope, axes):
    x, _ = maps(17, SHAPE)
    low, high = (f(np.float64(x), axes, keepdims=True) for f in (np.min, np.max))
    np.testing.assert_allclose(normalization.min_max(x, scope=scope), (x - low) / (high - low), rtol=1e-5, atol=1e-6)
    weights = maps(18, SHAPE)[0]
    gradient = jax.grad(lambda x: (weights * normalization.min_max(x, scope=scope)).sum())(jnp.full(SHAPE, 0.7))
    np.testing.assert_array_equal(gradient, 0)  # a constant stays 0, whatever is done to one cell
