"""Attention, context and non-local blocks, the generator, alignment of statistics, and the norm of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdjax import nn
from kdjax.errors import UserError
from kdjax.losses import attention, distance, normalization, reconstruction, relation
from tests.support.arrays import maps, quick_jit

SHAPE = (2, 4, 5, 4)


# FGD -----------------------------------------------------------------------------------------------------------------


def test_attended_weights_are_the_teachers_and_have_no_gradient():
    student, teacher = maps(0, SHAPE)
    weight = attention.spatial_attention(teacher) * attention.channel_attention(teacher)
    np.testing.assert_allclose(
        attention.attention_weighted(student, teacher), weight * (student - teacher) ** 2, rtol=1e-5
    )
    fixed = quick_jit(jax.grad(lambda t: (jax.lax.stop_gradient(weight) * (student - t) ** 2).sum()))(teacher)
    found = quick_jit(jax.grad(lambda t: attention.attention_weighted(student, t).sum()))(teacher)
    np.testing.assert_allclose(found, fixed, rtol=1e-4, atol=1e-6)


def test_attention_difference_bound():
    student, teacher = maps(1, SHAPE, scale=20.0)
    difference = jax.jit(lambda s, t: attention.attention_difference(s, t, temperature=0.1))
    value = difference(student, teacher)
    assert np.all((np.asarray(value) > 1) & (np.asarray(value) <= 2 * (4 * 5 + 4) + 1e-3))
    np.testing.assert_allclose(difference(teacher, teacher), 0, atol=1e-6)


def test_context_block_starts_as_the_identity():
    student, teacher = maps(2, SHAPE)
    params = [relation.init_context(jax.random.key(i), 4) for i in range(2)]
    blocks = [quick_jit(relation.context_block)(x, p) for x, p in zip((student, teacher), params, strict=True)]
    np.testing.assert_array_equal(distance.squared(*blocks), distance.squared(student, teacher))
    odd = relation.init_context(jax.random.key(3), 1)
    assert relation.context_block(student[..., :1], odd).shape == (2, 4, 5, 1)


def test_context_block_equals_numpy():
    x, _ = maps(3, SHAPE)
    params = jax.tree.map(lambda v: v + 0.3, relation.init_context(jax.random.key(4), 4))
    p = jax.tree.map(np.float64, params)
    for image, found in zip(np.float64(x), quick_jit(relation.context_block)(x, params), strict=True):
        cells = image.reshape(-1, 4)
        weights = np.exp(cells @ p["attend"]["kernel"][0, 0, :, 0])
        context = (weights / weights.sum()) @ cells
        hidden = context @ p["down"]["kernel"][0, 0] + p["down"]["bias"]
        hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
        added = np.maximum(hidden, 0) @ p["up"]["kernel"][0, 0] + p["up"]["bias"]
        np.testing.assert_allclose(found, image + added, rtol=1e-3, atol=1e-5)


# FKD -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [1, 2])
def test_non_local_block_equals_the_product_of_all_pairs(pool):
    x, _ = maps(4, SHAPE)
    params = relation.init_non_local(jax.random.key(5), 4)
    np.testing.assert_array_equal(relation.non_local_block(x, params, pool=pool), x)  # the norm's scale starts at 0
    params["norm"] = {"scale": jnp.arange(1.0, 5), "bias": jnp.arange(4.0)}

    def project(name, pooled):
        y = nn.conv2d(x, **params[name])
        y = nn.max_pool(y, pool, stride=pool) if pooled and pool > 1 else y
        return np.float64(y).reshape(2, -1, 2)

    theta, phi, g = project("theta", False), project("phi", True), project("g", True)
    mixed = np.einsum("bnm,bmc->bnc", np.einsum("bnk,bmk->bnm", theta, phi) / phi.shape[1], g)
    y = mixed.reshape(2, 4, 5, 2) @ np.float64(params["out"]["kernel"][0, 0]) + np.float64(params["out"]["bias"])
    y = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5)
    expected = x + y * params["norm"]["scale"] + params["norm"]["bias"]
    found = quick_jit(lambda x: relation.non_local_block(x, params, pool=pool))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_non_local_pool_is_cut_to_the_map():
    x, _ = maps(5, (2, 1, 3, 4))
    params = relation.init_non_local(jax.random.key(6), 4, reduction=4)
    assert relation.non_local_block(x, params, pool=8).shape == x.shape


def test_frobenius():
    student, teacher = maps(6, SHAPE)
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


# MGD -----------------------------------------------------------------------------------------------------------------


def test_keep_mask_rate_and_limits():
    uniform = jax.random.uniform(jax.random.key(7), (100000,))
    for drop in (0.15, 0.45, 0.65):
        rate = float(reconstruction.keep_mask(uniform, drop).mean())
        assert abs(rate - (1 - drop)) < 4 * np.sqrt(drop * (1 - drop) / 100000)
    np.testing.assert_array_equal(reconstruction.keep_mask(jnp.array([0.0, 1 - 2**-24]), 0.0), 1)
    np.testing.assert_array_equal(reconstruction.keep_mask(jnp.array([0.0, 0.5]), 1.0), 0)
    with pytest.raises(UserError, match="keep_mask"):
        reconstruction.keep_mask(uniform, 1.5)


def generator(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        name: {"kernel": 0.3 * jax.random.normal(key, (3, 3, 4, 4)), "bias": jnp.full(4, 0.1)}
        for name, key in zip(("first", "second"), keys, strict=True)
    }


def test_everything_masked_is_independent_of_the_student():
    student, teacher = maps(8, SHAPE)
    params = generator(9)

    def loss(student, mask, params):
        return distance.squared(reconstruction.reconstruct(mask * student, params), teacher).sum()

    found = quick_jit(jax.grad(loss, (0, 2)))
    gradients = [found(s, 0.0, params) for s in (student, 5 * student)]
    np.testing.assert_array_equal(gradients[0][0], 0)
    jax.tree.map(np.testing.assert_array_equal, gradients[0][1], gradients[1][1])
    assert float(loss(student, 0.0, params)) == float(loss(teacher, 0.0, params))
    assert float(loss(teacher, 1.0, params)) > 0  # not zero at equality


# CrossKD -------------------------------------------------------------------------------------------------------------


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
