"""Divergences over classes, positive priors and space: slow NumPy and the properties of the formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdjax.errors import UserError
from kdjax.losses import attention, classification, divergence
from tests.support.arrays import assert_finite, maps, on_shards, quick_jit

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
def test_logits_losses_refuse(loss):
    with pytest.raises(UserError, match="temperature"):
        loss(np.zeros((1, 2)), np.zeros((1, 2)), temperature=0.0)
    with pytest.raises(UserError, match="sum"):
        divergence.softmax_kl(np.zeros((1, 2)), np.zeros((1, 2)), class_reduction="max")
    with pytest.raises(UserError, match="temperature"):
        divergence.decoupled_kl(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros(1, int), temperature=-1.0)


def scores(seed, shape=(2, 12)):
    return tuple(jax.nn.sigmoid(x) for x in maps(seed, shape))


# Objects of 4, 1 and 0 positive priors, and one more of 3; the rest of the priors belongs to nobody.
MATCHED = np.array([[0, 0, 0, 0, 1, 3, 3, 3, 0, 0, 0, 0], [3, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]])


POSITIVE = np.array([[1] * 8 + [0] * 4, [1, 1, 1] + [0] * 9], bool)


ranked = jax.jit(lambda s, t: divergence.rank_kl(s, t, MATCHED, POSITIVE, boxes=4))


@pytest.mark.parametrize("theta", [1.0, 0.1, 0.005])
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


def test_rank_kl_of_a_reversed_ranking_is_charged():
    """Ports that sort both sides before the softmax give 0 here."""
    teacher = jnp.array([[0.9, 0.5, 0.1]])
    one, all_ = np.zeros((1, 3), int), np.ones((1, 3), bool)
    value = divergence.rank_kl(teacher[:, ::-1], teacher, one, all_, boxes=1)
    np.testing.assert_allclose(value, 0.208, atol=5e-4)
    assert float(divergence.rank_kl(teacher, teacher, one, all_, boxes=1)[0, 0]) == 0


@pytest.mark.parametrize(("count", "expected"), [(2, 0.46), (9, 0.16), (50, 0.033)])
def test_rank_kl_of_a_swapped_peak(count, expected):
    teacher = np.zeros((1, count), np.float32)
    student = teacher.copy()
    teacher[0, 0] = student[0, 1] = 1
    value = divergence.rank_kl(student, teacher, np.zeros((1, count), int), np.ones((1, count), bool), boxes=1)
    np.testing.assert_allclose(value[0, 0], expected, rtol=0.05)


def test_rank_kl_upper_bound():
    ones = np.arange(100)[None] < 41
    value = divergence.rank_kl(1.0 - ones, 1.0 * ones, np.zeros((1, 100), int), np.ones((1, 100), bool), boxes=1)
    assert 0.46 < float(value[0, 0]) < 0.475


def test_rank_kl_invariances():
    student, teacher = scores(1)
    value = ranked(student, teacher)
    np.testing.assert_allclose(
        ranked(student + 0.3, teacher - 0.1), value, rtol=1e-3, atol=1e-6
    )  # one constant an object
    order = np.random.default_rng(2).permutation(12)
    shuffled = divergence.rank_kl(student[:, order], teacher[:, order], MATCHED[:, order], POSITIVE[:, order], boxes=4)
    np.testing.assert_allclose(shuffled, value, rtol=1e-3, atol=1e-6)
    assert float(jnp.abs(ranked(student[:, ::-1], teacher) - value).max()) > 1e-4  # of one net alone it matters
    more = divergence.rank_kl(student, teacher, MATCHED, POSITIVE, boxes=7)  # padding rows change nothing
    np.testing.assert_allclose(more, jnp.pad(value, ((0, 0), (0, 3))), rtol=1e-5)


def test_rank_kl_without_positives_value_and_gradient_are_zero():
    student, teacher = scores(3)
    nobody = np.zeros_like(POSITIVE)
    total = quick_jit(jax.value_and_grad(lambda s: divergence.rank_kl(s, teacher, MATCHED, nobody, boxes=4).sum()))
    value, gradient = total(student)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_rank_kl_gradient():
    student, teacher = scores(4)
    check_grads(
        jax.jit(lambda s: ranked(s, teacher).sum()), (student,), order=1, modes=["rev"], atol=1e-2, rtol=2e-2, eps=1e-2
    )
    gradient = jax.grad(lambda s: ranked(s, teacher).sum())(student)
    np.testing.assert_array_equal(gradient[~POSITIVE], 0)
    assert gradient[0, 4] == 0 and float(jnp.abs(gradient).max()) > 0  # the object with one positive prior


def channel(student, teacher):
    joint = attention.joint_spatial_attention(student, teacher)
    return {
        "channel_kl": divergence.channel_kl(student, teacher),
        "channel_kl_4": divergence.channel_kl(student, teacher, temperature=4.0),
        "attended": divergence.channel_kl(student, teacher, position_weight=joint),
    }


channel_jitted = jax.jit(channel)


class ChannelVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_value(self):
        student, teacher = maps(0)
        value, expected = self.variant(channel)(student, teacher), channel_jitted(student, teacher)
        chex.assert_trees_all_close(value, expected, rtol=1e-4, atol=1e-6)


def test_channel_kl_vmapped_and_sharded_is_the_batch():
    student, teacher = maps(1, (8, 3, 4, 2))
    whole = channel_jitted(student, teacher)
    alone = jax.jit(jax.vmap(lambda s, t: jax.tree.map(lambda v: v[0], channel(s[None], t[None]))))(student, teacher)
    chex.assert_trees_all_close(alone, whole, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(on_shards(channel, student, teacher), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 4, 5, 3), (1, 1, 1, 2), (2, 1, 6, 1)])
def test_channel_kl_is_finite_in_bfloat16_and_on_constant_maps(shape):
    noise = maps(7, shape, jnp.bfloat16)
    constant = (jnp.full(shape, 0.3, jnp.bfloat16), jnp.full(shape, -2.0, jnp.bfloat16))
    total = jax.jit(lambda s, t: sum(v.mean() for v in channel(s, t).values()))
    for student, teacher in (noise, constant, (constant[0], noise[1])):
        assert_finite(total, student, teacher)
    assert float(divergence.channel_kl(*constant).max()) < 1e-6  # constants are the same distribution
    if shape[1:3] == (1, 1):
        np.testing.assert_array_equal(divergence.channel_kl(*noise), 0)


def test_channel_kl_gradient():
    student, teacher = maps(8, (1, 3, 4, 2))
    total = jax.jit(lambda s: divergence.channel_kl(s, teacher, temperature=2.0).mean())
    check_grads(total, (student,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=1e-3)
    gradient = jax.jit(jax.grad(lambda s: divergence.channel_kl(s, teacher).sum()))(student)
    expected = jax.nn.softmax(student, (1, 2)) - jax.nn.softmax(teacher, (1, 2))  # q - p
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


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


def test_channel_kl_weights_the_cells():
    student, teacher = maps(12)
    weight = jnp.abs(maps(13, (2, 4, 5, 1))[0])
    p, q = (jax.nn.softmax(x, (1, 2)) for x in (teacher, student))
    want = (np.float64(weight) * np.float64(p) * np.log(np.float64(p) / np.float64(q))).sum((1, 2))
    got = divergence.channel_kl(student, teacher, position_weight=weight)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


def test_channel_kl_with_uniform_position_weight_changes_nothing():
    student, teacher = maps(10)
    value = divergence.channel_kl(student, teacher, position_weight=jnp.ones((2, 4, 5, 1)))
    np.testing.assert_allclose(value, divergence.channel_kl(student, teacher), rtol=1e-6)


def test_channel_kl_refuses():
    with pytest.raises(UserError, match="temperature"):
        divergence.channel_kl(*maps(11), temperature=0.0)
    with pytest.raises(UserError, match="adapter"):
        divergence.channel_kl(jnp.zeros((1, 4, 4, 2)), jnp.zeros((1, 4, 4, 1)))
