"""Every form of convolution against the built-in one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdjax import nn
from kdjax.errors import UserError
from kdjax.nn import conv_builtin, conv_cpu
from tests.support.arrays import arrays

# Shapes of map and kernel, stride, padding, groups: every form and odd sizes.
CASES = {
    "depthwise": ((2, 9, 8, 6), (5, 5, 1, 6), 1, "same", 6),
    "depthwise stride 2": ((2, 9, 8, 6), (5, 5, 1, 6), 2, "same", 6),
    "depthwise stride 3": ((1, 10, 11, 4), (3, 3, 1, 4), 3, "same", 4),
    "depthwise even": ((1, 6, 7, 4), (2, 2, 1, 4), 2, 0, 4),
    "depthwise wide": ((1, 4, 9, 4), (1, 5, 1, 4), 1, "same", 4),
    "depthwise padded": ((1, 5, 5, 4), (3, 3, 1, 4), 1, 3, 4),
    "pointwise": ((2, 5, 4, 6), (1, 1, 6, 3), 1, "same", 1),
    "pointwise stride 2": ((2, 5, 4, 6), (1, 1, 6, 3), 2, "same", 1),
    "pointwise padded": ((2, 5, 4, 6), (1, 1, 6, 3), 1, 1, 1),
    "dense": ((2, 5, 6, 4), (3, 3, 4, 5), 1, "same", 1),
    "dense stride 2": ((2, 6, 5, 4), (3, 3, 4, 5), 2, "same", 1),
    "dense stride 3, cells that the kernel skips": ((1, 9, 8, 2), (4, 5, 2, 3), 3, 0, 1),
    "dense, kernel below the stride": ((1, 7, 7, 2), (2, 2, 2, 3), 3, 1, 1),
    "dense, more padding than kernel": ((1, 5, 5, 2), (3, 3, 2, 3), 2, 3, 1),
    "dense, as on a large map": ((2, 7, 6, 3), (3, 3, 3, 40), 2, "same", 1),
    "grouped": ((2, 5, 6, 4), (3, 3, 2, 6), 1, "same", 2),
    "grouped stride 2": ((2, 6, 5, 4), (3, 3, 2, 6), 2, "same", 2),
    "grouped padded": ((1, 5, 5, 6), (1, 3, 2, 3), 1, 1, 3),
    "depthwise multiplier": ((2, 5, 6, 4), (3, 3, 1, 8), 1, "same", 4),
}


def reference(x, kernel, bias, stride, padding, groups):
    sides = [k // 2 for k in kernel.shape[:2]] if padding == "same" else [padding, padding]
    return conv_builtin.conv(x, kernel, stride, tuple(sides), groups) + bias


def loss_of(form):
    return lambda *a: jnp.sum(jnp.sin(form(*a)))


@pytest.mark.parametrize("name", CASES)
def test_conv_equals_the_builtin_form(name, monkeypatch):
    if "large map" in name:
        monkeypatch.setattr(conv_cpu, "_LARGE_MAP", 0)
    shape, size, stride, padding, groups = CASES[name]
    inputs = arrays(shape, size, size[-1:])

    def tested(x, kernel, bias):
        return nn.conv2d(x, kernel, bias, stride=stride, padding=padding, groups=groups)

    def builtin(x, kernel, bias):
        return reference(x, kernel, bias, stride, padding, groups)

    def both(form):
        return jax.jit(lambda *a: (form(*a), jax.grad(loss_of(form), (0, 1, 2))(*a)))

    chex.assert_trees_all_close(both(tested)(*inputs), both(builtin)(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_in_a_loop_equals_that_outside(stride):
    x, kernel = arrays((3, 2, 5, 6, 2), (3, 3, 2, 4))

    def outside(x, kernel):
        return jnp.stack([nn.conv2d(one, kernel, stride=stride) for one in x])

    def inside(x, kernel):
        return jax.lax.map(lambda one: nn.conv2d(one, kernel, stride=stride, in_loop=True), x)

    values, expected = (jax.jit(jax.value_and_grad(loss_of(form), (0, 1)))(x, kernel) for form in (inside, outside))
    chex.assert_trees_all_close(values, expected, rtol=1e-4, atol=1e-4)


FAST = ["depthwise stride 2", "pointwise", "grouped"]


@pytest.mark.parametrize("name", [*FAST, "dense stride 2"])
def test_conv_under_transformations(name):
    shape, size, stride, padding, groups = CASES[name]
    x, kernel, images = arrays(shape, size, (8, *shape))

    def tested(x, kernel):
        return nn.conv2d(x, kernel, stride=stride, padding=padding, groups=groups)

    def builtin(x, kernel):
        return reference(x, kernel, 0.0, stride, padding, groups)

    # Eager.
    chex.assert_trees_all_close(tested(x, kernel), builtin(x, kernel), rtol=1e-4, atol=1e-4)
    # vmap over images, over kernels, and over the gradient.
    kernels = jnp.stack([kernel, 2 * kernel])
    chex.assert_trees_all_close(
        jax.jit(jax.vmap(tested, (None, 0)))(x, kernels),
        jnp.stack([builtin(x, k) for k in kernels]),
        rtol=1e-4,
        atol=1e-4,
    )
    gradient, expected = (jax.grad(loss_of(form), (0, 1)) for form in (tested, builtin))
    each = jax.jit(jax.vmap(expected, (0, None)))(images, kernel)
    chex.assert_trees_all_close(jax.jit(jax.vmap(gradient, (0, None)))(images, kernel), each, rtol=1e-4, atol=1e-4)
    # One image a device.
    chex.assert_trees_all_close(jax.pmap(gradient, in_axes=(0, None))(images, kernel), each, rtol=1e-4, atol=1e-4)
    # A batch over eight devices; the kernel's gradient is summed over them.
    devices = Mesh(np.array(jax.devices()), ("data",))
    whole = jax.device_put(images.reshape(-1, *shape[1:]), NamedSharding(devices, PartitionSpec("data")))
    chex.assert_trees_all_close(
        jax.jit(gradient)(whole, kernel),
        jax.jit(expected)(images.reshape(-1, *shape[1:]), kernel),
        rtol=1e-4,
        atol=1e-3,
    )

    # Reverse over reverse.
    def twice(form):
        return jax.grad(lambda k: jnp.sum(jax.grad(loss_of(form), 0)(x, k) ** 2))(kernel)

    chex.assert_trees_all_close(twice(tested), twice(builtin), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", FAST)
def test_platform_chooses_the_form(name):
    shape, size, stride, padding, groups = CASES[name]
    x, kernel = arrays(shape, size)

    def gradient(x, kernel):
        return jax.grad(lambda *a: nn.conv2d(*a, stride=stride, padding=padding, groups=groups).sum(), (0, 1))(
            x, kernel
        )

    for platform, builtin in (("cpu", False), ("cuda", True), ("tpu", True)):
        text = jax.export.export(jax.jit(gradient), platforms=(platform,))(x, kernel).mlir_module()
        assert ("stablehlo.convolution" in text) == builtin, platform


def test_only_accelerators_dilate_strided_gradients():
    x, kernel = arrays((2, 6, 6, 4), (3, 3, 4, 5))
    gradient = jax.jit(jax.grad(lambda x: nn.conv2d(x, kernel, stride=2).sum()))
    for platform, dilated in (("cpu", False), ("cuda", True), ("tpu", True)):
        text = jax.export.export(gradient, platforms=(platform,))(x).mlir_module()
        assert ("lhs_dilate = [2, 2]" in text) == dilated, platform


def test_conv_keeps_bfloat16():
    x, kernel = arrays((1, 4, 4, 3), (3, 3, 1, 3))
    assert nn.conv2d(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), groups=3).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        ((3, 3, 5, 4), {}, "needs 5 input channels"),
        ((3, 3, 2, 4), {"groups": 3}, "needs 6 input channels"),
        ((3, 3, 2, 5), {"groups": 2}, "outputs that 2 divides"),
        ((2, 2, 4, 4), {}, "odd kernel, not 2x2"),
    ],
)
def test_conv_errors(kernel, options, message):
    with pytest.raises(UserError, match=message):
        nn.conv2d(jnp.zeros((1, 4, 4, 4)), jnp.zeros(kernel), **options)
