"""Fake quantisation against integers in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import nn

RANGES = [(-3.1, 5.7), (0.0, 6.0), (-2.0, 0.0), (0.5, 4.0), (-4.0, -1.0), (0.0, 0.0)]


def as_bytes(x, low, high):
    """The bytes of values, scale and zero point, by the definition, in float64."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, 1e-8)
    zero = int(np.rint(-low / scale))
    return np.clip(np.rint(np.float64(x) / scale) + zero, 0, 255).astype(int), scale, zero


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_a_map_is_rounded_to_bytes(low, high):
    x = np.random.default_rng(0).uniform(-8, 8, 1000).astype(np.float32)
    scale, zero = nn.affine(jnp.float32(low), jnp.float32(high))
    got = nn.fake_quantise(jnp.asarray(x), scale, zero)
    whole, true_scale, true_zero = as_bytes(x, low, high)
    assert int(zero) == true_zero and 0 <= true_zero <= 255 and float(scale) == pytest.approx(true_scale, rel=1e-6)
    wanted = (whole - true_zero) * true_scale
    off = np.abs(np.asarray(got) - wanted) > 1e-5 * np.abs(wanted) + 1e-9
    assert off.sum() <= 2  # values that lie between two bytes to the last bit of float32
    assert len(np.unique(np.asarray(got))) <= 256
    assert np.asarray(nn.fake_quantise(jnp.zeros(1), scale, zero)) == 0, "0 is exact"
    again = nn.fake_quantise(got, scale, zero)
    np.testing.assert_array_equal(again, got)
    np.testing.assert_array_equal(nn.affine(np.float32(low), np.float32(high)), (scale, zero))  # in NumPy


def test_gradients_pass_what_is_not_clipped():
    x = jnp.array([-9.0, -1.2, -1.0, 0.3, 126.5, 126.7, 126.8, 300.0])  # of -1 .. 126.5, in steps of 0.5
    grads = jax.grad(lambda x, s, z: jnp.sum(3.0 * nn.fake_quantise(x, s, z)), argnums=(0, 1, 2))(x, 0.5, 2.0)
    np.testing.assert_array_equal(grads[0], [0, 3, 3, 3, 3, 3, 0, 0])
    assert grads[1] == grads[2] == 0
    half = nn.fake_quantise(x.astype(jnp.bfloat16), 0.5, 2.0)
    assert half.dtype == jnp.bfloat16 and half[-1] == 126.5


@pytest.mark.parametrize("shape", [(3, 3, 4, 5), (1, 1, 8, 3), (3, 3, 1, 6)])
def test_a_kernel_is_rounded_for_each_output_channel(shape):
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    kernel[..., 1] = 0  # a dead channel
    got = np.asarray(nn.fake_quantise_kernel(jnp.asarray(kernel)))
    for channel in range(shape[-1]):
        scale = np.abs(kernel[..., channel]).max() / 127
        wanted = np.rint(kernel[..., channel] / max(scale, 1e-8)) * scale
        np.testing.assert_allclose(got[..., channel], wanted, rtol=1e-5, atol=1e-6 * scale)
    np.testing.assert_allclose(nn.fake_quantise_kernel(kernel), got, rtol=1e-6)  # in NumPy
    gradient = jax.grad(lambda k: jnp.sum(jnp.arange(k.size).reshape(k.shape) * nn.fake_quantise_kernel(k)))(kernel)
    np.testing.assert_array_equal(gradient, np.arange(kernel.size).reshape(shape))


def test_rounding_a_kernel_commutes_with_folding_a_norm_into_it():
    rng = np.random.default_rng(0)
    kernel, factor = rng.normal(size=(3, 3, 4, 6)).astype(np.float32), rng.normal(size=6).astype(np.float32)
    factor[2] = 0
    assert (factor < 0).any()
    first, then = nn.fake_quantise_kernel(kernel) * factor, nn.fake_quantise_kernel(kernel * factor)
    np.testing.assert_allclose(first, then, rtol=1e-5, atol=1e-7)
    # The bytes are found again in what is folded.
    whole = np.rint(first / nn.kernel_scale(first))
    np.testing.assert_array_equal(np.abs(whole), np.abs(np.rint(kernel / nn.kernel_scale(kernel)) * (factor != 0)))


def test_what_replaces_it_gets_the_numbers():
    with nn.portable(), nn.replaced(fake_quantise=lambda *given: given):
        assert nn.fake_quantise(1.0, 0.5, 2.0) == (1.0, 0.5, 2.0)
