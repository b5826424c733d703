"""The smallest entries of rows."""

import jax
import numpy as np

from kdjax.boxes import topk


def test_k_smallest_is_a_stable_sort():
    rng = np.random.default_rng(0)
    search = jax.jit(topk.k_smallest, static_argnums=1)
    for size, k in ((5, 5), (208, 13), (209, 13), (700, 13), (37, 2)):
        for missing in (0.0, 0.9, 1.0):
            values = rng.integers(0, 40, (4, size)).astype(np.float32)
            values[rng.random(values.shape) < missing] = np.inf
            smallest, index = search(values, k)
            want = np.argsort(values, axis=-1, kind="stable")[:, :k]
            np.testing.assert_array_equal(index, want)
            np.testing.assert_array_equal(smallest, np.take_along_axis(values, want, -1))
