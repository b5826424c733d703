"""The random frequency mask and what it does to a map, against the full complex transform."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdjax.errors import UserError
from kdjax.losses import distance, frequency
from tests.support.arrays import assert_finite, maps, on_shards

SIZES = [(4, 6), (5, 4), (5, 3), (1, 6), (1, 1)]


def losses(student, teacher):
    shape = student.shape[:3]
    masks = {
        "hermitian": frequency.frequency_mask(jax.random.key(0), shape, 0.5),
        "literal": frequency.frequency_mask(jax.random.key(0), shape, 0.3, hermitian=False),
        "keep_dc": frequency.frequency_mask(jax.random.key(1), shape, 0.9, keep_dc=True),
    }
    return {name: frequency.frequency_masked(student, teacher, mask) for name, mask in masks.items()}


jitted = jax.jit(losses)
masked = jax.jit(frequency.frequency_masked)
draw = jax.jit(frequency.frequency_mask, static_argnums=(1, 2), static_argnames=("hermitian", "keep_dc"))


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_value(self):
        student, teacher = maps(0)
        value, expected = self.variant(losses)(student, teacher), jitted(student, teacher)
        chex.assert_trees_all_close(value, expected, rtol=1e-4, atol=1e-5)


def full_transform(x, mask):
    """Re IDFT(M . DFT(x)) by the complex transform, in double precision."""
    return np.fft.ifft2(np.fft.fft2(np.float64(x), axes=(1, 2)) * np.float64(mask), axes=(1, 2))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("hermitian", [True, False])
def test_apply_mask_is_the_complex_transform(size, hermitian):
    x, _ = maps(1, (2, *size, 3))
    mask = draw(jax.random.key(2), (2, *size), 0.5, hermitian=hermitian)
    expected = full_transform(x, mask)
    value = jax.jit(frequency.apply_frequency_mask)(x, mask)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected.real, atol=2e-6)
    if hermitian:  # the inverse is exactly real: the imaginary part is rounding of the double precision transform
        assert np.max(np.abs(expected.imag)) < 1e-14


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_hermitian_mask_is_symmetric_and_one_per_image(height, width):
    mask = draw(jax.random.key(height), (3, height, width), 0.5)
    chex.assert_shape(mask, (3, height, width, 1))
    mask = np.asarray(mask)
    opposite = mask[:, -np.arange(height) % height][:, :, -np.arange(width) % width]
    np.testing.assert_array_equal(mask, opposite)
    assert set(np.unique(mask)) <= {0, 1}


@pytest.mark.parametrize("hermitian", [True, False])
@pytest.mark.parametrize("zeta", [0.1, 0.5, 0.65])
def test_mask_rate(hermitian, zeta):
    mask = np.asarray(draw(jax.random.key(3), (500, 6, 5), zeta, hermitian=hermitian))
    draws = 500 * (16 if hermitian else 30)  # bins (0, 0) and (3, 0) are their own opposites: (30 - 2) / 2 + 2
    # A pair of bins moves together: three sigma of the number of independent draws, pairs counted twice.
    assert abs(mask.mean() - (1 - zeta)) < 3 * np.sqrt(zeta * (1 - zeta) / draws) * (1.1 if hermitian else 1)
    per_bin = mask.mean(0)  # every bin is kept with the same probability
    assert np.max(np.abs(per_bin - (1 - zeta))) < 5 * np.sqrt(zeta * (1 - zeta) / 500)


def test_keep_dc_keeps_the_channel_mean():
    x, _ = maps(4)
    mask = draw(jax.random.key(4), x.shape[:3], 1.0, keep_dc=True)
    np.testing.assert_allclose(
        frequency.apply_frequency_mask(x, mask), jnp.broadcast_to(x.mean((1, 2), keepdims=True), x.shape), atol=1e-6
    )


@pytest.mark.parametrize("size", SIZES)
def test_zeta_zero_is_the_squared_difference(size):
    student, teacher = maps(5, (2, *size, 3))
    mask = draw(jax.random.key(5), student.shape[:3], 0.0)
    value = masked(student, teacher, mask)
    np.testing.assert_allclose(value, distance.squared(student, teacher), rtol=1e-4, atol=1e-5)


def test_zeta_one_is_the_teacher_with_no_gradient():
    student, teacher = maps(6)
    mask = draw(jax.random.key(6), student.shape[:3], 1.0)
    loss, gradient = jax.jit(jax.value_and_grad(lambda s: masked(s, teacher, mask).mean()))(student)
    np.testing.assert_allclose(loss, jnp.square(teacher).mean(), rtol=1e-6)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
@pytest.mark.parametrize("hermitian", [True, False])
def test_gradient_is_as_derived(size, hermitian):
    student, teacher = maps(7, (2, *size, 3))
    mask = draw(jax.random.key(7), student.shape[:3], 0.5, hermitian=hermitian)
    gradient = jax.jit(jax.grad(lambda s: masked(s, teacher, mask).mean()))(student)
    filtered = full_transform(student, mask).real
    expected = 2 / student.size * full_transform(filtered - np.float64(teacher), mask).real  # A is symmetric
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    opposite = np.asarray(mask)[:, -np.arange(size[0]) % size[0]][:, :, -np.arange(size[1]) % size[1]]
    spectrum = np.fft.fft2(np.float64(gradient), axes=(1, 2))
    dropped = np.broadcast_to((np.asarray(mask) + opposite) == 0, spectrum.shape)
    assert np.any(dropped) and np.max(np.abs(spectrum[dropped])) < 1e-6 < np.max(np.abs(spectrum))


def test_gradient_by_finite_differences():
    student, teacher = maps(8, (1, 3, 4, 2))
    total = jax.jit(lambda s: sum(v.mean() for v in losses(s, teacher).values()))
    check_grads(total, (student,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=1e-2)


@pytest.mark.parametrize("zeta", [0.3, 0.5])
def test_floor_at_equality(zeta):
    """Expected loss at S == T: zeta mean(T^2) (Hermitian); the literal mask has the exact sum over the bins."""
    _, teacher = maps(9, (1, 6, 5, 4))
    draws = 4000
    many = jnp.broadcast_to(teacher, (draws, *teacher.shape[1:]))

    @jax.jit
    def mean_loss(key):
        hermitian = frequency.frequency_mask(key, many.shape[:3], zeta)
        literal = frequency.frequency_mask(key, many.shape[:3], zeta, hermitian=False)
        return [frequency.frequency_masked(many, many, m).mean((1, 2, 3)) for m in (hermitian, literal)]

    hermitian, literal = (np.float64(x) for x in mean_loss(jax.random.key(9)))
    power = np.square(np.float64(teacher)).mean()
    assert abs(hermitian.mean() - zeta * power) < 4 * hermitian.std() / np.sqrt(draws)
    # The literal mask: E[(1 - m)^2] is zeta at the self-conjugate bins and zeta (1 + zeta) / 2 elsewhere.
    spectrum = np.abs(np.fft.fft2(np.float64(teacher), axes=(1, 2))) ** 2
    expectation = np.full((6, 5), zeta * (1 + zeta) / 2)
    expectation[[0, 3], 0] = zeta
    exact = (spectrum[0] * expectation[..., None]).sum() / 30**2 / 4
    assert abs(literal.mean() - exact) < 4 * literal.std() / np.sqrt(draws)


def test_amplitude_of_the_optimum():
    """The scale of the student that minimises the expected loss: 1 (Hermitian), 2 / (2 - zeta) at most (literal)."""
    zeta = 0.4
    wave = np.cos(2 * np.pi * np.add.outer(np.arange(6) / 6, 2 * np.arange(5) / 5))
    wave = np.broadcast_to(wave[None, :, :, None], (20000, 6, 5, 1)).astype(np.float32)
    best = {}
    for hermitian in (True, False):
        mask = draw(jax.random.key(10), wave.shape[:3], zeta, hermitian=hermitian)
        filtered = np.asarray(jax.jit(frequency.apply_frequency_mask)(wave, mask))
        best[hermitian] = np.sum(filtered * np.asarray(wave)) / np.sum(np.square(filtered))
    np.testing.assert_allclose([best[True], best[False]], [1, 2 / (2 - zeta)], rtol=0.02)


def test_keys():
    shape = (2, 5, 4)
    draws = [np.asarray(draw(jax.random.key(k), shape, 0.5)) for k in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.any(draws[0] != draws[2]) and np.any(draws[0][0] != draws[0][1])


def test_mask_per_channel_and_shared_over_the_batch():
    x, _ = maps(11)
    mask = (np.random.default_rng(12).uniform(size=(1, *x.shape[1:])) > 0.5).astype(np.float32)
    np.testing.assert_allclose(frequency.apply_frequency_mask(x, mask), full_transform(x, mask).real, atol=2e-6)


@pytest.mark.parametrize("size", [(4, 5), (1, 1), (1, 4)])
def test_finite_in_bfloat16(size):
    student, teacher = maps(13, (2, *size, 2), jnp.bfloat16)
    assert_finite(lambda s: sum(v.mean() for v in losses(s, teacher).values()), student)


def test_vmap_and_sharded_batch_are_the_batch():
    student, teacher = maps(14, (8, 3, 4, 2))
    mask = draw(jax.random.key(14), (8, 3, 4), 0.5)
    whole = masked(student, teacher, mask)
    alone = jax.jit(jax.vmap(lambda s, t, m: masked(s[None], t[None], m[None])[0]))(student, teacher, mask)
    np.testing.assert_allclose(alone, whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        on_shards(frequency.frequency_masked, student, teacher, mask), whole, rtol=1e-5, atol=1e-6
    )


def test_refused():
    with pytest.raises(UserError, match="zeta"):
        draw(jax.random.key(0), (1, 2, 2), 1.5)
    with pytest.raises(UserError, match="mask"):
        frequency.apply_frequency_mask(jnp.zeros((1, 4, 4, 2)), jnp.ones((1, 4, 3, 1)))
    with pytest.raises(UserError, match="adapter"):
        frequency.frequency_masked(jnp.zeros((1, 4, 4, 2)), jnp.zeros((1, 4, 4, 1)), jnp.ones((1, 4, 4, 1)))


def test_no_gradient_flows_to_the_mask():
    student, teacher = maps(15)
    gradient = jax.grad(lambda m: frequency.frequency_masked(student, teacher, m).sum())(jnp.ones((2, 4, 5, 1)))
    np.testing.assert_array_equal(gradient, 0)
