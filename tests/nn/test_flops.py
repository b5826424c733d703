"""The count of floating-point operations."""

import functools

import jax
import jax.numpy as jnp

from kdjax import nn
from kdjax.nn import flops


def test_count_follows_the_rule_of_mmengine():
    x = jax.ShapeDtypeStruct((1, 6, 6, 4), jnp.float32)
    kernels = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 3, 4, 8), (5, 5, 1, 8), (1, 1, 8, 2))]

    def network(x, dense, depthwise, pointwise):
        x = nn.conv2d(x, dense, stride=2)
        ones = jnp.ones(8)
        x = nn.batch_norm(nn.conv2d(x, depthwise, ones, groups=8), ones, ones, ones, ones)
        x = nn.upsample_nearest(x * nn.global_average_pool(x))
        return nn.resize_bilinear(nn.conv2d(x, pointwise), (2, 2))

    for function in (network, functools.partial(network)):
        assert nn.count(function, x, *kernels) == {
            "conv": 9 * (9 * 4 * 8) + 9 * 25 * 8 + 36 * 8 * 2,
            "linear": 0,
            "norm": 2 * 9 * 8,
            "pool": 9 * 8,
            "upsample": 36 * 8 + 4 * (4 * 2),
            "flops": 9 * 288 + 9 * 200 + 36 * 16 + 144 + 72 + 288 + 32,
        }


def test_only_the_counted_function_counts():
    def inner(x):
        return nn.upsample_nearest(x)

    def outer(x):
        assert nn.count(inner, x)["flops"] == 16  # a count of its own
        return nn.global_average_pool(x)

    x = jnp.zeros((1, 2, 2, 1))
    with flops._counting() as counts:
        pass
    nn.upsample_nearest(x)
    assert not any(counts.values())
    assert nn.count(outer, x)["flops"] == 4
