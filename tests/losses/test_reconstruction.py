"""MGD's mask and generator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.losses import distance, reconstruction
from tests.support.arrays import maps, quick_jit

SHAPE = (2, 4, 5, 4)


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


def test_a_draw_at_the_border_is_dropped():
    np.testing.assert_array_equal(reconstruction.keep_mask(jnp.array([0.25, 0.5, 0.75]), 0.25), [1, 1, 0])


def test_reconstruct_equals_a_slow_loop():
    x, params = maps(10, SHAPE)[0], generator(11)

    def convolve(x, layer):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        kernel, out = np.float64(layer["kernel"]), np.zeros(x.shape) + np.float64(layer["bias"])
        for i, j in np.ndindex(3, 3):
            out += padded[:, i : i + x.shape[1], j : j + x.shape[2]] @ kernel[i, j]
        return out

    want = convolve(np.maximum(convolve(np.float64(x), params["first"]), 0), params["second"])
    np.testing.assert_allclose(quick_jit(reconstruction.reconstruct)(x, params), want, rtol=1e-4, atol=1e-5)
