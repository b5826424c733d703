"""Distances of arrays and maps: slow NumPy and the properties of the formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from kdjax.errors import UserError
from kdjax.losses import attention, distance, normalization
from tests.support.arrays import assert_finite, maps, on_pmap, on_shards

LOSSES = {
    "squared": distance.squared,
    "absolute": distance.l1,
    "unit_norm": lambda s, t: distance.squared(normalization.unit_norm(s), normalization.unit_norm(t)),
    "multiscale": distance.multiscale,
    "multiscale_mean": lambda s, t: distance.multiscale(s, t, scales=(2, 3), per_scale_mean=True),
    "hcl": lambda s, t: distance.multiscale(s, t, mode="hcl"),
    "cosine": distance.cosine,
    "pearson": distance.pearson,
    "pearson_ddof1": lambda s, t: distance.pearson(s, t, ddof=1),
    "batch_norm": lambda s, t: distance.squared(
        normalization.standardize(s, eps=0, variance_eps=1e-5), normalization.standardize(t, eps=0, variance_eps=1e-5)
    ),
}
PER_IMAGE = ("squared", "absolute", "cosine", "unit_norm", "multiscale", "multiscale_mean", "hcl")


def every(student, teacher):
    return {name: loss(student, teacher) for name, loss in LOSSES.items()}


jitted = jax.jit(every)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_value(self):
        student, teacher = maps(0)
        value = self.variant(every)(student, teacher)
        chex.assert_trees_all_close(value, jitted(student, teacher), rtol=1e-5, atol=1e-6)


def test_vmap_over_images_is_the_batch():
    student, teacher = maps(1)
    one_by_one = jax.jit(jax.vmap(lambda s, t: {n: LOSSES[n](s[None], t[None])[0] for n in PER_IMAGE}))(
        student, teacher
    )
    whole = {n: v for n, v in jitted(student, teacher).items() if n in PER_IMAGE}
    chex.assert_trees_all_close(one_by_one, whole, rtol=1e-5, atol=1e-6)


def test_gradients_by_finite_differences():
    student, teacher = maps(2, (2, 3, 4, 2))
    mixing = {k: np.random.default_rng(3).normal(size=v.shape) for k, v in jitted(student, teacher).items()}

    def total(s):
        return sum(jnp.mean(v * mixing[k]) for k, v in every(s, teacher).items())

    check_grads(jax.jit(total), (student,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=1e-2)


def test_zero_at_equality_and_nowhere_else():
    student, teacher = maps(4)
    means = jax.jit(lambda s, t: jax.tree.map(jnp.mean, every(s, t)))
    gradients = jax.jit(jax.jacrev(means))(student, teacher)
    for name, mean in means(student, teacher).items():
        np.testing.assert_allclose(jitted(teacher, teacher)[name], 0, atol=1e-10, err_msg=name)
        assert float(mean) > 1e-3 and float(jnp.max(jnp.abs(gradients[name]))) > 0, name


@pytest.mark.parametrize("shape", [(2, 4, 5, 3), (1, 1, 1, 2), (2, 1, 6, 1), (1, 5, 1, 2)])
def test_finite_in_bfloat16_and_on_degenerate_maps(shape):
    noise = maps(5, shape, jnp.bfloat16)
    constant = jnp.full(shape, 0.3, jnp.bfloat16), jnp.full(shape, -2.7, jnp.bfloat16)
    total = jax.jit(jax.value_and_grad(lambda s, t: sum(jnp.sum(v) for v in every(s, t).values())))
    for student, teacher in (noise, constant, (constant[0], noise[1]), (noise[0], constant[1])):
        value, gradient = total(student, teacher)
        assert value.dtype == jnp.float32 and np.isfinite(value)
        assert np.all(np.isfinite(np.asarray(gradient, np.float32)))


def test_bfloat16_is_computed_in_float32():
    student, teacher = maps(6, dtype=jnp.bfloat16)
    wide = jitted(student.astype(jnp.float32), teacher.astype(jnp.float32))
    chex.assert_trees_all_close(jitted(student, teacher), wide, rtol=1e-4, atol=1e-6)


def test_cosine_is_that_of_the_angle():
    student, teacher = maps(3, (2, 3, 3, 6))
    s, t = np.float64(student), np.float64(teacher)
    want = 1 - (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)
    np.testing.assert_allclose(distance.cosine(student, teacher), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(distance.cosine(5 * student, teacher), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(distance.cosine(-teacher, teacher), 2, rtol=1e-6)


@pytest.mark.parametrize("loss", [distance.squared, distance.l1, distance.multiscale, distance.pearson])
def test_shapes_that_differ_are_refused(loss):
    with pytest.raises(UserError, match="adapter"):
        loss(jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 2, 2, 1)))


def test_elementwise_distances_equal_numpy():
    student, teacher = maps(19, scale=2.0)
    apart = np.float64(student) - np.float64(teacher)
    np.testing.assert_allclose(distance.squared(student, teacher), apart**2, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(distance.l1(student, teacher), np.abs(apart), rtol=1e-5, atol=1e-7)
    for beta in (0.5, 1.0, 2.0):
        small = np.abs(apart) < beta
        assert small.any() and not small.all()
        want = np.where(small, apart**2 / (2 * beta), np.abs(apart) - beta / 2)
        np.testing.assert_allclose(distance.smooth_l1(student, teacher, beta=beta), want, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(jax.grad(lambda s: distance.l1(s, teacher).sum())(teacher), 0)


# Multiscale ----------------------------------------------------------------------------------------------------------


def slow_pool(x, k):
    """Window means with the border windows over the cells that they have."""
    rows, columns = range(0, x.shape[1], k), range(0, x.shape[2], k)
    return np.stack([np.stack([x[:, i : i + k, j : j + k].mean((1, 2)) for j in columns], 1) for i in rows], 1)


@pytest.mark.parametrize(
    ("shape", "scales", "per_scale_mean"),
    [((2, 4, 5, 3), (1, 2, 3), False), ((1, 7, 3, 2), (2, 4, 5), True), ((1, 1, 6, 1), (1, 4), True)],
)
def test_multiscale_equals_a_slow_loop(shape, scales, per_scale_mean):
    student, teacher = maps(7, shape)
    s, t = np.float64(student), np.float64(teacher)
    expected = 0
    for k in scales:
        squares = (slow_pool(s, k) - slow_pool(t, k)) ** 2
        expected = expected + (
            squares.mean((1, 2)) if per_scale_mean else squares.sum((1, 2)) / (s.shape[1] * s.shape[2])
        )
    loss = jax.jit(lambda s, t: distance.multiscale(s, t, scales=scales, per_scale_mean=per_scale_mean))
    value = loss(student, teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_multiscale_of_scale_one_is_fitnet():
    student, teacher = maps(8)
    plain = distance.squared(student, teacher).mean()
    np.testing.assert_allclose(distance.multiscale(student, teacher, scales=(1,)).mean(), plain, rtol=1e-6)


def test_multiscale_ignores_a_common_shift():
    student, teacher = maps(9)
    for options in ({}, {"mode": "hcl"}):
        np.testing.assert_allclose(
            distance.multiscale(student + 3, teacher + 3, **options),
            distance.multiscale(student, teacher, **options),
            rtol=1e-4,
        )


@pytest.mark.parametrize("k", [2, 4])
def test_multiscale_jensen_bound(k):
    student, teacher = maps(10, (2, 8, 4, 3))
    coarse = distance.multiscale(student, teacher, scales=(k,))
    fine = distance.multiscale(student, teacher, scales=(1,))
    assert np.all(coarse <= fine / k**2 * (1 + 1e-6))


def test_multiscale_without_scale_one_has_a_null_space():
    checkerboard = jnp.asarray((-1.0) ** np.add.outer(range(4), range(4))).reshape(1, 4, 4, 1)
    zero = jnp.zeros((1, 4, 4, 1))
    assert float(distance.multiscale(checkerboard, zero, scales=(2, 4)).max()) == 0
    assert float(distance.multiscale(checkerboard, zero, scales=(1, 2)).max()) == 1


def test_hcl_by_hand():
    # The sides of 3 use o = 2 and 1 only; cells of o = 2 cover 2 x 2 of the 3 x 3 map, overlapping in the middle.
    student = jnp.arange(9.0).reshape(1, 3, 3, 1)
    value = distance.multiscale(student, jnp.zeros_like(student), mode="hcl")
    full, two, one = np.mean(np.arange(9.0) ** 2), np.mean(np.array([2.0, 3, 5, 6]) ** 2), 16.0
    np.testing.assert_allclose(value, [[(full + two / 4 + one / 8) / (1 + 1 / 4 + 1 / 8)]], rtol=1e-6)


def test_hcl_leaves_out_poolings_that_are_no_smaller_than_the_map():
    student = jnp.arange(6.0).reshape(1, 2, 3, 1)
    value = distance.multiscale(student, jnp.zeros_like(student), mode="hcl")
    np.testing.assert_allclose(value, [[(np.mean(np.arange(6.0) ** 2) + 2.5**2 / 8) / (1 + 1 / 8)]], rtol=1e-6)


def test_adaptive_avg_pool_equals_a_slow_loop():
    x, _ = maps(20, (2, 5, 7, 3))
    got = distance.adaptive_avg_pool(x, (2, 4))
    for i, j in np.ndindex(2, 4):
        rows, columns = (slice(k * n // o, -(-(k + 1) * n // o)) for k, n, o in ((i, 5, 2), (j, 7, 4)))
        np.testing.assert_allclose(got[:, i, j], np.float64(x)[:, rows, columns].mean((1, 2)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"scales": ()}, {"scales": (0, 1)}, {"scales": (1.5,)}, {"mode": "max"}])
def test_multiscale_refuses_impossible_options(options):
    with pytest.raises(UserError, match="multiscale"):
        distance.multiscale(*maps(11), **options)


# Pearson -------------------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0, 1]))
def test_pearson_is_one_minus_the_correlation(seed, ddof):
    student, teacher = maps(seed, (3, 4, 5, 2))
    s, t = (np.float64(x).reshape(-1, 2) for x in (student, teacher))
    correlation = np.array([np.corrcoef(s[:, c], t[:, c])[0, 1] for c in range(2)])
    m = len(s)
    expected = np.mean(1 - correlation) * ((m - 1) / m if ddof else 1)
    value = distance.pearson(student, teacher, ddof=ddof).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert 0 <= value <= 2


def test_pearson_invariances():
    student, teacher = maps(12, (2, 4, 5, 3))
    scale, shift = jnp.array([0.1, 1.0, 20.0]), jnp.array([-3.0, 0.0, 5.0])
    loss = jax.jit(lambda s, t: distance.pearson(s, t).mean((0, 1, 2)))
    value = loss(student, teacher)
    np.testing.assert_allclose(loss(scale * student + shift, teacher), value, rtol=1e-4)
    np.testing.assert_allclose(loss(student, teacher + shift), value, rtol=1e-4)
    np.testing.assert_allclose(loss(-scale * student, teacher), 2 - value, rtol=1e-4)
    one_image = student * jnp.array([1.0, 4.0]).reshape(2, 1, 1, 1)  # the statistics span the batch
    assert np.max(np.abs(loss(one_image, teacher) - value)) > 1e-2


def test_pearson_gradient_is_centred_orthogonal_and_as_derived():
    student, teacher = maps(13, (2, 3, 4, 2))
    gradient = np.float64(jax.jit(jax.grad(lambda s: distance.pearson(s, teacher).mean((0, 1, 2)).sum()))(student))
    s, t = (np.float64(normalization.standardize(x)) for x in (student, teacher))
    m = s[..., 0].size
    expected = ((s * t).mean((0, 1, 2)) * s - t) / (m * np.float64(student).std((0, 1, 2)))
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    np.testing.assert_allclose(gradient.sum((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose((gradient * s).sum((0, 1, 2)), 0, atol=1e-6)


def test_pearson_counts_a_constant_channel_as_one_half():
    student, teacher = maps(14)
    value, gradient = assert_finite(lambda s: distance.pearson(s.at[..., 0].set(0.3), teacher)[..., 0].mean(), student)
    np.testing.assert_allclose(value, 0.5, rtol=1e-5)
    assert float(jnp.max(jnp.abs(gradient))) == 0


def test_pearson_equals_batch_norm_on_both_sides():
    student, teacher = maps(15)
    options = {"eps": 0.0, "variance_eps": 1e-5}
    of_batch_norm = distance.squared(
        normalization.standardize(student, **options), normalization.standardize(teacher, **options)
    )
    np.testing.assert_allclose(of_batch_norm.mean() / 2, distance.pearson(student, teacher).mean(), rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"ddof": 1}])
def test_splitting_the_batch_over_devices_changes_no_statistic(options):
    student, teacher = maps(17, (8, 3, 2, 4))
    whole = distance.pearson(student, teacher, **options)
    np.testing.assert_allclose(
        on_shards(lambda s, t: distance.pearson(s, t, **options), student, teacher), whole, rtol=1e-5, atol=1e-6
    )

    def mapped(s, t, axis_name):
        loss = distance.pearson(s, t, axis_name=axis_name, **options)
        gradient = jax.grad(lambda s: distance.pearson(s, t, axis_name=axis_name, **options).mean())(s)
        return loss, gradient

    loss, gradient = on_pmap(mapped, student, teacher)
    np.testing.assert_allclose(loss, whole, rtol=1e-5, atol=1e-6)
    # The devices' means add up under the mapped axis: their gradient is eight times that of the global mean.
    expected = jax.grad(lambda s: distance.pearson(s, teacher, **options).mean())(student)
    np.testing.assert_allclose(gradient / 8, expected, rtol=1e-4, atol=1e-7)


# Frobenius -----------------------------------------------------------------------------------------------------------


def test_frobenius():
    student, teacher = maps(6, (2, 4, 5, 4))
    mask = attention.joint_spatial_attention(student, teacher)
    np.testing.assert_allclose(mask.sum((1, 2, 3)), 20, rtol=1e-5)
    value = distance.frobenius(student, teacher, weight=mask)
    np.testing.assert_allclose(value, np.sqrt((np.float64(mask) * np.float64(student - teacher) ** 2).sum()), rtol=1e-5)
    twice = [jnp.concatenate([x, x]) for x in (student, teacher, mask)]
    np.testing.assert_allclose(distance.frobenius(twice[0], twice[1], weight=twice[2]), np.sqrt(2) * value, rtol=1e-5)
    zero, gradient = jax.value_and_grad(lambda s: distance.frobenius(s, teacher))(teacher)
    assert zero == 0 and np.all(np.asarray(gradient) == 0)
    loss = jax.jit(lambda s: distance.frobenius(s, teacher))
    check_grads(loss, (student,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=1e-2)
