"""Distributions over space (CWD) and the attention maps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdjax.errors import UserError
from kdjax.losses import attention, divergence
from tests.support.arrays import assert_finite, maps, on_shards


def losses(student, teacher):
    joint = attention.joint_spatial_attention(student, teacher)
    return {
        "channel_kl": divergence.channel_kl(student, teacher),
        "channel_kl_4": divergence.channel_kl(student, teacher, temperature=4.0),
        "attended": divergence.channel_kl(student, teacher, position_weight=joint),
        "spatial": attention.spatial_attention(student),
        "channel": attention.channel_attention(student),
        "joint": attention.joint_spatial_attention(student, teacher, paper=True, temperature=0.8),
    }


jitted = jax.jit(losses)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_value(self):
        student, teacher = maps(0)
        value, expected = self.variant(losses)(student, teacher), jitted(student, teacher)
        chex.assert_trees_all_close(value, expected, rtol=1e-4, atol=1e-6)


def test_vmap_and_sharded_batch_are_the_batch():
    student, teacher = maps(1, (8, 3, 4, 2))
    whole = jitted(student, teacher)
    alone = jax.jit(jax.vmap(lambda s, t: jax.tree.map(lambda v: v[0], losses(s[None], t[None]))))(student, teacher)
    chex.assert_trees_all_close(alone, whole, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(on_shards(losses, student, teacher), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_channel_kl_equals_numpy(temperature):
    student, teacher = maps(2)

    def log_softmax(x):
        x = np.float64(x) / temperature
        return x - np.log(np.exp(x).sum((1, 2), keepdims=True))

    p, q = log_softmax(teacher), log_softmax(student)
    expected = temperature**2 * (np.exp(p) * (p - q)).sum((1, 2))
    np.testing.assert_allclose(divergence.channel_kl(student, teacher, temperature=temperature), expected, rtol=1e-4)
    assert np.all(expected > 0)


def test_channel_kl_zero_and_invariances():
    student, teacher = maps(3)
    np.testing.assert_array_equal(divergence.channel_kl(teacher, teacher), 0)
    shift = 3 * maps(4, (2, 1, 1, 3))[0]  # one constant an image and channel
    value = divergence.channel_kl(student, teacher)
    np.testing.assert_allclose(divergence.channel_kl(student + shift, teacher - shift), value, rtol=1e-4, atol=1e-6)
    assert np.max(np.abs(divergence.channel_kl(2 * student, teacher) - value)) > 0.1  # scale counts


def test_channel_kl_large_temperature_is_half_the_centred_squared_difference():
    student, teacher = maps(5)
    centred = (student - teacher) - (student - teacher).mean((1, 2), keepdims=True)
    np.testing.assert_allclose(
        divergence.channel_kl(student, teacher, temperature=30.0), jnp.square(centred).mean((1, 2)) / 2, rtol=0.05
    )


def test_channel_kl_of_peaked_and_huge_maps_is_finite():
    student, teacher = maps(6, scale=1e3)
    value, _ = assert_finite(divergence.channel_kl, student, teacher)
    assert value > 0


@pytest.mark.parametrize("shape", [(2, 4, 5, 3), (1, 1, 1, 2), (2, 1, 6, 1)])
def test_finite_in_bfloat16_and_on_constant_maps(shape):
    noise = maps(7, shape, jnp.bfloat16)
    constant = (jnp.full(shape, 0.3, jnp.bfloat16), jnp.full(shape, -2.0, jnp.bfloat16))
    total = jax.jit(lambda s, t: sum(v.mean() for v in losses(s, t).values()))
    for student, teacher in (noise, constant, (constant[0], noise[1])):
        assert_finite(total, student, teacher)
    assert float(divergence.channel_kl(*constant).max()) < 1e-6  # constants are the same distribution
    if shape[1:3] == (1, 1):
        np.testing.assert_array_equal(divergence.channel_kl(*noise), 0)


def test_gradients_by_finite_differences():
    student, teacher = maps(8, (1, 3, 4, 2))
    total = jax.jit(
        lambda s: (
            divergence.channel_kl(s, teacher, temperature=2.0).mean()
            + jnp.square(attention.spatial_attention(s)).mean()
            + jnp.square(attention.channel_attention(s)).mean()
        )
    )
    check_grads(total, (student,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=1e-3)
    gradient = jax.jit(jax.grad(lambda s: divergence.channel_kl(s, teacher).sum()))(student)
    expected = jax.nn.softmax(student, (1, 2)) - jax.nn.softmax(teacher, (1, 2))  # q - p
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_attention_maps():
    student, teacher = maps(9)
    for temperature in (0.1, 0.5, 0.8):
        spatial = attention.spatial_attention(student, temperature=temperature)
        channel = attention.channel_attention(student, temperature=temperature)
        chex.assert_shape((spatial, channel), [(2, 4, 5, 1), (2, 1, 1, 3)])
        np.testing.assert_allclose(spatial.sum((1, 2, 3)), 20, rtol=1e-5)
        np.testing.assert_allclose(channel.sum((1, 2, 3)), 3, rtol=1e-5)
    for paper in (True, False):
        joint = attention.joint_spatial_attention(student, teacher, paper=paper)
        np.testing.assert_allclose(joint.sum((1, 2, 3)), 20, rtol=1e-5)
        square = lambda s, p=paper: jnp.square(attention.joint_spatial_attention(s, teacher, paper=p)).sum()  # noqa: E731
        gradient = jax.jit(jax.grad(square))(student)
        np.testing.assert_array_equal(gradient, 0)


def test_uniform_position_weight_changes_nothing():
    student, teacher = maps(10)
    value = divergence.channel_kl(student, teacher, position_weight=jnp.ones((2, 4, 5, 1)))
    np.testing.assert_allclose(value, divergence.channel_kl(student, teacher), rtol=1e-6)


def test_refused():
    with pytest.raises(UserError, match="temperature"):
        divergence.channel_kl(*maps(11), temperature=0.0)
    with pytest.raises(UserError, match="adapter"):
        divergence.channel_kl(jnp.zeros((1, 4, 4, 2)), jnp.zeros((1, 4, 4, 1)))
