"""Norms against their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import nn
from kdjax.errors import UserError
from tests.support.arrays import arrays


def test_batch_norm_is_the_formula():
    x, scale, bias = arrays((3, 4, 5, 2), (2,), (2,))
    mean, var = nn.batch_moments(x)
    np.testing.assert_allclose(mean, np.mean(np.asarray(x), (0, 1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var, np.var(np.asarray(x), (0, 1, 2)), rtol=1e-5)
    got = nn.batch_norm(x, scale, bias, mean, var, eps=0.1)
    np.testing.assert_allclose(got, (x - mean) / np.sqrt(var + 0.1) * scale + bias, rtol=1e-5, atol=1e-5)


def test_batch_moments_keep_precision_and_float32():
    x = jnp.array([10000.0, 10001.0, 10002.0])[:, None]
    assert float(nn.batch_moments(x)[1][0]) == pytest.approx(2 / 3, rel=1e-4)
    assert nn.batch_moments(x.astype(jnp.bfloat16))[1].dtype == jnp.float32


def test_group_norm_is_the_formula():
    rng = np.random.default_rng(0)
    x = rng.normal(300, 0.1, (2, 3, 4, 6)).astype(np.float32)  # a mean so large that rounding matters
    scale, bias = rng.normal(size=(2, 6)).astype(np.float32)
    got = nn.group_norm(x, scale, bias, groups=3, eps=1e-5)
    grouped = np.float64(x).reshape(2, 12, 3, 2)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    normed = (centred / np.sqrt(grouped.var((1, 3), keepdims=True) + 1e-5)).reshape(x.shape)
    np.testing.assert_allclose(got, normed * scale + bias, rtol=1e-3, atol=1e-3)
    assert nn.group_norm(x.astype(jnp.bfloat16), scale, bias, groups=3).dtype == jnp.bfloat16
    assert nn.count(lambda x: nn.group_norm(x, scale, bias, groups=3), x)["norm"] == 5 * x.size
    with pytest.raises(UserError, match="groups must divide the 6 channels of x, but is 4"):
        nn.group_norm(x, scale, bias, groups=4)
