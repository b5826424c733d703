"""Pooling and resizing against slow loops."""

import jax
import numpy as np
import pytest

from kdjax import nn
from tests.support.arrays import arrays


@pytest.mark.parametrize(("window", "stride", "padding"), [(5, 1, 2), (3, 2, 1), (2, 2, 0)])
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
