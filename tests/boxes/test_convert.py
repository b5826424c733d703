"""Formats of boxes, and clipping."""

import jax
import numpy as np

from kdjax.boxes import convert


def test_clip_takes_a_size_for_each_image():
    boxes = np.array([[[-4.0, -2, 50, 60]], [[10, 10, 20, 20]]], np.float32)
    got = jax.jit(convert.clip)(boxes, np.array([[32, 40], [15, 12]]))
    np.testing.assert_array_equal(got, [[[0, 0, 40, 32]], [[10, 10, 12, 15]]])
