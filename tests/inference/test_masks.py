"""Masks of the canvas as masks of the original image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import nn
from kdjax.inference import masks


@pytest.mark.parametrize("original", [(31, 47), (64, 94), (100, 150)])
def test_resizes_twice_cuts_and_compares(original):
    """As the maps would be resized one after the other; the image fills 40 x 60 of a canvas of 64 x 96."""
    canvas, image = (64, 96), (40, 60)
    logits = np.random.default_rng(0).normal(size=(3, 8, 12)).astype(np.float32)
    whole = [-(-side * length // part) for side, length, part in zip(canvas, original, image, strict=True)]
    fine = nn.resize_bilinear(nn.resize_bilinear(jnp.asarray(logits)[..., None], canvas), tuple(whole))
    probs = np.asarray(jax.nn.sigmoid(fine))[:, : original[0], : original[1], 0]
    for threshold in (0.5, 0.3):
        got = np.stack(list(masks.from_canvas(logits, canvas, image, original, threshold=threshold)))
        sure = np.abs(probs - threshold) > 1e-5
        assert got.shape == (3, *original) and got.dtype == bool
        np.testing.assert_array_equal(got[sure], probs[sure] > threshold)
        assert 0.1 < got.mean() < 0.95 and sure.mean() > 0.99


def test_no_mask_is_no_mask():
    assert list(masks.from_canvas(np.zeros((0, 8, 8), np.float32), (64, 64), (64, 64), (32, 32))) == []
