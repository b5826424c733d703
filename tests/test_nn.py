"""The primitives: every form of convolution against the built-in one, norms, pools, resizing, counting."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdjax import nn

# Map, kernel, stride, padding, groups: depthwise, 1x1, dense; odd sizes; all that leaves the fast forms.
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
    "dense stride 3, cells that no tap meets": ((1, 9, 8, 2), (4, 5, 2, 3), 3, 0, 1),
    "dense, kernel below the stride": ((1, 7, 7, 2), (2, 2, 2, 3), 3, 1, 1),
    "dense, more padding than taps": ((1, 5, 5, 2), (3, 3, 2, 3), 2, 3, 1),
    "dense, as on a large map": ((2, 7, 6, 3), (3, 3, 3, 40), 2, "same", 1),
    "grouped": ((2, 5, 6, 4), (3, 3, 2, 6), 1, "same", 2),
    "depthwise multiplier": ((2, 5, 6, 4), (3, 3, 1, 8), 1, "same", 4),
}


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def reference(x, kernel, bias, stride, padding, groups):
    sides = [k // 2 for k in kernel.shape[:2]] if padding == "same" else [padding, padding]
    return nn._builtin_conv(x, kernel, stride, tuple(sides), groups) + bias


def loss_of(form):
    return lambda *a: jnp.sum(jnp.sin(form(*a)))


@pytest.mark.parametrize("name", CASES)
def test_conv_equals_the_builtin_one(name, monkeypatch):
    if "large map" in name:
        monkeypatch.setattr(nn, "_LARGE_MAP", 0)
    shape, size, stride, padding, groups = CASES[name]
    inputs = arrays(shape, size, size[-1:])

    def ours(x, kernel, bias):
        return nn.conv2d(x, kernel, bias, stride=stride, padding=padding, groups=groups)

    def theirs(x, kernel, bias):
        return reference(x, kernel, bias, stride, padding, groups)

    def both(form):
        return jax.jit(lambda *a: (form(*a), jax.grad(loss_of(form), (0, 1, 2))(*a)))

    chex.assert_trees_all_close(both(ours)(*inputs), both(theirs)(*inputs), rtol=1e-4, atol=1e-4)


FAST = ["depthwise stride 2", "pointwise"]


@pytest.mark.parametrize("name", [*FAST, "dense stride 2"])
def test_conv_under_transformations(name):
    shape, size, stride, padding, groups = CASES[name]
    x, kernel, images = arrays(shape, size, (8, *shape))

    def ours(x, kernel):
        return nn.conv2d(x, kernel, stride=stride, padding=padding, groups=groups)

    def theirs(x, kernel):
        return reference(x, kernel, 0.0, stride, padding, groups)

    # Eager.
    chex.assert_trees_all_close(ours(x, kernel), theirs(x, kernel), rtol=1e-4, atol=1e-4)
    # vmap over images, over kernels, and over the gradient.
    kernels = jnp.stack([kernel, 2 * kernel])
    chex.assert_trees_all_close(
        jax.jit(jax.vmap(ours, (None, 0)))(x, kernels), jnp.stack([theirs(x, k) for k in kernels]), rtol=1e-4, atol=1e-4
    )
    gradient, expected = (jax.grad(loss_of(form), (0, 1)) for form in (ours, theirs))
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

    chex.assert_trees_all_close(twice(ours), twice(theirs), rtol=1e-4, atol=1e-3)


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


def test_strided_gradients_are_spread_on_accelerators_alone():
    x, kernel = arrays((2, 6, 6, 4), (3, 3, 4, 5))
    gradient = jax.jit(jax.grad(lambda x: nn.conv2d(x, kernel, stride=2).sum()))
    for platform, spread in (("cpu", False), ("cuda", True), ("tpu", True)):
        text = jax.export.export(gradient, platforms=(platform,))(x).mlir_module()
        assert ("lhs_dilate = [2, 2]" in text) == spread, platform


def test_conv_keeps_bfloat16():
    x, kernel = arrays((1, 4, 4, 3), (3, 3, 1, 3))
    assert nn.conv2d(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), groups=3).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "kernel, options, message",
    [
        ((3, 3, 5, 4), {}, "needs maps of 5 channels"),
        ((3, 3, 2, 4), {"groups": 3}, "needs maps of 6 channels"),
        ((3, 3, 2, 5), {"groups": 2}, "outputs that divide"),
        ((2, 2, 4, 4), {}, "odd kernel, not 2x2"),
    ],
)
def test_conv_errors(kernel, options, message):
    with pytest.raises(ValueError, match=message):
        nn.conv2d(jnp.zeros((1, 4, 4, 4)), jnp.zeros(kernel), **options)


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


@pytest.mark.parametrize("window, stride, padding", [(5, 1, 2), (3, 2, 1), (2, 2, 0)])
def test_max_pool(window, stride, padding):
    (x,) = arrays((2, 7, 6, 3))
    x = x - 10  # what the padding adds must not win
    padded = np.pad(np.asarray(x), ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=-np.inf)
    rows, columns = ((side + 2 * padding - window) // stride + 1 for side in (7, 6))
    want = np.zeros((2, rows, columns, 3), np.float32)
    for i in range(rows):
        for j in range(columns):
            top, left = i * stride, j * stride
            want[:, i, j] = padded[:, top : top + window, left : left + window].max((1, 2))
    got = nn.max_pool(x, window, stride=stride, padding=padding)
    np.testing.assert_array_equal(got, want)
    gradient = jax.grad(lambda x: nn.max_pool(x, window, stride=stride, padding=padding).sum())(x)
    assert float(gradient.sum()) == got.size


def test_avg_pool_of_cut_windows():
    (x,) = arrays((2, 5, 7, 3))
    got = np.asarray(nn.avg_pool(x, 3))
    assert got.shape == (2, 2, 3, 3)
    for i in range(2):
        for j in range(3):
            window = np.asarray(x)[:, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
            np.testing.assert_allclose(got[:, i, j], window.mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_upsample_nearest():
    (x,) = arrays((1, 2, 3, 2))
    np.testing.assert_array_equal(nn.upsample_nearest(x, 3), np.repeat(np.repeat(x, 3, 1), 3, 2))


@pytest.mark.parametrize("size", [(8, 9), (3, 2), (4, 6), (5, 3)])
def test_resize_bilinear(size):
    (x,) = arrays((2, 4, 6, 3))

    def weights(source, target):
        at = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
        low = np.minimum(np.floor(at).astype(int), source - 1)
        table = np.zeros((target, source))
        np.add.at(table, (np.arange(target), low), 1 - (at - low))
        np.add.at(table, (np.arange(target), np.minimum(low + 1, source - 1)), at - low)
        return table

    want = np.einsum("ih,bhwc,jw->bijc", weights(4, size[0]), np.asarray(x, np.float64), weights(6, size[1]))
    np.testing.assert_allclose(nn.resize_bilinear(x, size), want, rtol=1e-5, atol=1e-5)


def test_count_follows_the_peers_rule():
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
            "norm": 2 * 9 * 8,
            "pool": 9 * 8,
            "upsample": 36 * 8 + 4 * 2,
            "flops": 9 * 288 + 9 * 200 + 36 * 16 + 144 + 72 + 288 + 8,
        }


def test_nothing_is_counted_outside():
    counted = nn.count(lambda x: x, jnp.zeros(3))
    nn.upsample_nearest(jnp.zeros((1, 2, 2, 1)))
    assert counted["flops"] == 0


def test_group_norm_is_the_formula():
    rng = np.random.default_rng(0)
    x = rng.normal(300, 0.1, (2, 3, 4, 6)).astype(np.float32)  # a mean that rounding would feel
    scale, bias = rng.normal(size=(2, 6)).astype(np.float32)
    got = nn.group_norm(x, scale, bias, groups=3, eps=1e-5)
    grouped = np.float64(x).reshape(2, 12, 3, 2)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    normed = (centred / np.sqrt(grouped.var((1, 3), keepdims=True) + 1e-5)).reshape(x.shape)
    np.testing.assert_allclose(got, normed * scale + bias, rtol=1e-3, atol=1e-3)
    assert nn.group_norm(x.astype(jnp.bfloat16), scale, bias, groups=3).dtype == jnp.bfloat16
    assert nn.count(lambda x: nn.group_norm(x, scale, bias, groups=3), x)["norm"] == 5 * x.size
    with pytest.raises(ValueError, match="6 channels do not divide into 4 groups"):
        nn.group_norm(x, scale, bias, groups=4)
