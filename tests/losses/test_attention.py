"""Attention maps of FGD and FKD, and the losses with them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdjax.losses import attention
from tests.support.arrays import assert_finite, maps, on_shards, quick_jit


def losses(student, teacher):
    return {
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


@pytest.mark.parametrize("shape", [(2, 4, 5, 3), (1, 1, 1, 2), (2, 1, 6, 1)])
def test_finite_in_bfloat16_and_on_constant_maps(shape):
    noise = maps(7, shape, jnp.bfloat16)
    constant = (jnp.full(shape, 0.3, jnp.bfloat16), jnp.full(shape, -2.0, jnp.bfloat16))
    total = jax.jit(lambda s, t: sum(v.mean() for v in losses(s, t).values()))
    for student, teacher in (noise, constant, (constant[0], noise[1])):
        assert_finite(total, student, teacher)


def test_gradients_by_finite_differences():
    student, _ = maps(8, (1, 3, 4, 2))
    total = jax.jit(
        lambda s: jnp.square(attention.spatial_attention(s)).mean() + jnp.square(attention.channel_attention(s)).mean()
    )
    check_grads(total, (student,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=1e-3)


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


def test_attended_weights_are_the_teachers_and_have_no_gradient():
    student, teacher = maps(0, (2, 4, 5, 4))
    weight = attention.spatial_attention(teacher) * attention.channel_attention(teacher)
    np.testing.assert_allclose(
        attention.attention_weighted(student, teacher), weight * (student - teacher) ** 2, rtol=1e-5
    )
    fixed = quick_jit(jax.grad(lambda t: (jax.lax.stop_gradient(weight) * (student - t) ** 2).sum()))(teacher)
    found = quick_jit(jax.grad(lambda t: attention.attention_weighted(student, t).sum()))(teacher)
    np.testing.assert_allclose(found, fixed, rtol=1e-4, atol=1e-6)


def test_attention_difference_bound():
    student, teacher = maps(1, (2, 4, 5, 4), scale=20.0)
    difference = jax.jit(lambda s, t: attention.attention_difference(s, t, temperature=0.1))
    value = difference(student, teacher)
    assert np.all((np.asarray(value) > 1) & (np.asarray(value) <= 2 * (4 * 5 + 4) + 1e-3))
    np.testing.assert_allclose(difference(teacher, teacher), 0, atol=1e-6)


def slow_attention(x, temperature: float):
    """Spatial [H, W] and channel [C] attention of one image in float64."""

    def softmax(v):
        return np.exp(v - v.max()) / np.exp(v - v.max()).sum()

    x = np.abs(np.float64(x))
    height, width, channels = x.shape
    spatial = height * width * softmax(x.mean(2) / temperature)
    return spatial, channels * softmax(x.mean((0, 1)) / temperature)


@pytest.mark.parametrize("temperature", [0.3, 1.5])
def test_attention_equals_numpy(temperature):
    (student, teacher), wider = maps(12), maps(13, (2, 4, 5, 6))[0]

    @quick_jit
    def found(student, teacher, wider):
        return {
            "spatial": attention.spatial_attention(student, temperature=temperature),
            "channel": attention.channel_attention(student, temperature=temperature),
            "joint": attention.joint_spatial_attention(student, wider, temperature=temperature),
            "paper": attention.joint_spatial_attention(student, wider, temperature=temperature, paper=True),
            "weighted": attention.attention_weighted(student, teacher, temperature=temperature),
            "difference": attention.attention_difference(student, teacher, temperature=temperature),
        }

    got = found(student, teacher, wider)
    for i in range(2):
        (s_space, s_channel), (t_space, t_channel) = (slow_attention(x[i], temperature) for x in (student, teacher))
        strength = sum(np.abs(np.float64(x[i])).mean(2) for x in (student, wider)) / temperature
        want = {
            "spatial": s_space[..., None],
            "channel": s_channel[None, None],
            "joint": (s_space + slow_attention(wider[i], temperature)[0])[..., None] / 2,
            "paper": 20 * (np.exp(strength) / np.exp(strength).sum())[..., None],
            "weighted": t_space[..., None] * t_channel * np.float64(student[i] - teacher[i]) ** 2,
            "difference": np.abs(s_space - t_space).sum() + np.abs(s_channel - t_channel).sum(),
        }
        for name, value in want.items():
            np.testing.assert_allclose(got[name][i], value, rtol=1e-4, atol=1e-6, err_msg=name)
