"""Context and non-local blocks, and relations of instances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import nn
from kdjax.losses import distance, relation
from tests.support.arrays import maps, quick_jit

SHAPE = (2, 4, 5, 4)


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


def test_relation_is_invariant_to_scale_and_rotation():
    student, teacher = maps(4, (2, 5, 3))
    valid = np.array([[True] * 5, [True, True, True, False, False]])
    loss = quick_jit(lambda s, t: relation.pairwise_relation(s, t, valid))
    value = loss(student, teacher)
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0].astype(np.float32)
    np.testing.assert_allclose(loss(7 * student @ rotation + 1, teacher), value, rtol=1e-3)
    np.testing.assert_allclose(loss(3 * teacher, teacher), 0, atol=1e-10)
    assert float(value.min()) > 0
    padded = student.at[1, 3:].set(100.0)
    np.testing.assert_allclose(loss(padded, teacher), value, rtol=1e-5)  # padding rows change nothing


def test_relation_needs_three_instances():
    student, teacher = maps(6, (1, 4, 3))
    total = quick_jit(jax.value_and_grad(lambda s, v: relation.pairwise_relation(s, teacher, v).sum()))
    for count in (0, 1, 2):
        valid = np.arange(4)[None] < count
        value, gradient = total(student, valid)
        assert value == 0 and np.all(np.asarray(gradient) == 0)


def test_relation_equals_a_slow_loop():
    student, teacher = maps(7, (1, 4, 3))

    def distances(x):
        x = np.float64(x[0])
        d = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
        return d / d[~np.eye(4, dtype=bool)].mean()

    difference = np.abs(distances(student) - distances(teacher))
    smooth = np.where(difference < 1, difference**2 / 2, difference - 0.5)
    expected = smooth[~np.eye(4, dtype=bool)].mean()
    np.testing.assert_allclose(
        relation.pairwise_relation(student, teacher, np.ones((1, 4), bool)), [expected], rtol=1e-3
    )


def test_initial_values():
    context = relation.init_context(jax.random.key(8), 512)
    shapes = {name: context[name]["kernel"].shape for name in ("attend", "down", "up")}
    assert shapes == {"attend": (1, 1, 512, 1), "down": (1, 1, 512, 256), "up": (1, 1, 256, 512)}
    np.testing.assert_allclose(np.std(context["attend"]["kernel"]), np.sqrt(2 / 512), rtol=0.15)
    for reduction, hidden in ((2, 4), (4, 2), (16, 1)):
        params = relation.init_non_local(jax.random.key(9), 8, reduction=reduction)
        assert all(params[name]["kernel"].shape == (1, 1, 8, hidden) for name in ("theta", "phi", "g"))
        assert params["out"]["kernel"].shape == (1, 1, hidden, 8)
