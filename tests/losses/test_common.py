"""The arithmetic that losses share: values, and slopes where the function is not smooth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.losses import common
from tests.support.arrays import maps


def slope(function, at: float) -> float:
    return float(jax.grad(function)(at))


def test_slopes_at_zero():
    assert slope(common.absolute, 0.0) == 0 and [slope(common.absolute, x) for x in (-2.0, 2.0)] == [-1, 1]
    assert slope(common.safe_sqrt, 0.0) == 0 and slope(common.safe_sqrt, 4.0) == 0.25
    assert slope(lambda x: common.power(x, 0.5), 0.0) == 0
    np.testing.assert_array_equal(common.absolute(jnp.array([-3.0, 0, 2])), [3, 0, 2])


def test_power():
    x = jnp.array([-1.0, 0.0, 1e-7, 0.25, 4.0])
    np.testing.assert_array_equal(common.power(x, 1), x)
    np.testing.assert_array_equal(common.power(x, 0), 1)
    np.testing.assert_allclose(common.power(x, 0.5), [0, 0, np.sqrt(1e-7), 0.5, 2], rtol=1e-6)
    np.testing.assert_allclose(common.power(x, 0.5, smallest=1e-6), [0, 0, 0, 0.5, 2], rtol=1e-6)


@pytest.mark.parametrize(("axes", "ddof"), [((0, 1, 2), 0), ((0, 1, 2), 1), ((1, 2, 3), 1)])
def test_moments(axes, ddof):
    x, _ = maps(0)
    mean, centred, variance = common.moments(x + 100, axes=axes, ddof=ddof)
    wide = np.float64(x + 100)
    np.testing.assert_allclose(mean, wide.mean(axes, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(centred, wide - wide.mean(axes, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(variance, wide.var(axes, ddof=ddof, keepdims=True), rtol=1e-4)
    _, centred, variance = common.moments(jnp.full((3, 7, 5, 2), 0.1), axes=axes, ddof=ddof)
    np.testing.assert_array_equal(centred, 0)
    np.testing.assert_array_equal(variance, 0)
    assert np.isfinite(common.moments(jnp.ones((1, 1, 1, 1)), axes=axes, ddof=ddof)[2])


def test_along_sides():
    x, rng = maps(1)[0], np.random.default_rng(2)
    rows, columns = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(7, 5)).astype(np.float32)
    want = np.einsum("ih,jw,bhwc->bijc", rows, columns, np.float64(x))
    np.testing.assert_allclose(common.along_sides(x, rows, columns), want, rtol=1e-4, atol=1e-5)
