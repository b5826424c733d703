"""Masks of the canvas as masks of the original image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools import mask as peer

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


def test_masks_of_boxes_are_interpolated_between_the_centres_of_their_cells():
    """As a loop over the pixels does it: bilinear, with zeros around the cells."""
    rng = np.random.default_rng(0)
    probs = rng.random((4, 5, 5)).astype(np.float32)
    boxes = np.array([[3.3, 2.1, 20.7, 15.2], [-4, 5, 9, 30], [0, 0, 1.5, 1.2], [7, 7, 7, 9]])
    got = list(masks.from_boxes(probs, boxes, (18, 25)))
    for one, (x0, y0, x1, y1), mask in zip(probs[:3], boxes, got, strict=False):
        padded = np.pad(one, 1)
        for y in range(18):
            for x in range(25):
                v, u = (y + 0.5 - y0) / (y1 - y0) * 5 + 0.5, (x + 0.5 - x0) / (x1 - x0) * 5 + 0.5
                value = 0.0
                if 0 <= v < 6 and 0 <= u < 6:
                    (i, a), (j, b) = (int(v), v % 1), (int(u), u % 1)
                    upper = padded[i, j] * (1 - b) + padded[i, j + 1] * b
                    value = upper * (1 - a) + (padded[i + 1, j] * (1 - b) + padded[i + 1, j + 1] * b) * a
                assert mask[y, x] == (value >= 0.5) or abs(value - 0.5) < 1e-6
    assert got[0].any() and got[1].any() and not got[3].any()


def test_encoded_masks_are_read_by_pycocotools():
    some = np.random.default_rng(0).random((3, 9, 7)) < 0.4
    for mask, rle in zip(some, masks.encoded(iter(some)), strict=True):
        read = peer.toBbox(rle), peer.area(rle)
        ys, xs = np.nonzero(mask)
        assert read[0].tolist() == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1] and read[1] == mask.sum()


def test_no_mask_is_no_mask():
    assert list(masks.from_canvas(np.zeros((0, 8, 8), np.float32), (64, 64), (64, 64), (32, 32))) == []
