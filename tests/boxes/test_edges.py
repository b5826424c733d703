"""Boxes by the distances of their edges: the bins, the way there and back, and interpolation between bins."""

import jax
import numpy as np
import pytest

from kdjax.boxes import convert, edges
from tests.support.arrays import quick_jit


def nearest(distance, bins):
    return jax.tree.map(np.asarray, quick_jit(edges.nearest_bins)(distance, bins))


def some_boxes(seed: int, count: int = 40):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.uniform(0, 1, (count, 2)), rng.uniform(0.02, 0.6, (count, 2))], -1).astype(np.float32)


@pytest.mark.parametrize("number", [8, 16, 32])
@pytest.mark.parametrize(("up", "scale"), [(0.5, 4.0), (0.25, 8.0)])
def test_bins_are_a_symmetric_geometric_progression(number, up, scale):
    bins = np.asarray(edges.edge_bins(number, up=up, scale=scale), np.float64)
    assert bins.shape == (number + 1,) and (np.diff(bins) > 0).all()
    np.testing.assert_array_equal(bins, -bins[::-1])
    inner = bins[number // 2 : -1] + 1
    np.testing.assert_allclose(inner[1:] / inner[:-1], inner[1], rtol=1e-5)
    np.testing.assert_allclose(bins[-2:], [up * scale, 2 * up * scale], rtol=1e-5)


def test_distances_lead_back_to_the_boxes():
    reference, boxes = some_boxes(0), some_boxes(1)
    for scale in (4.0, 8.0):
        distance = edges.edge_distance(reference, boxes, scale=scale)
        np.testing.assert_allclose(edges.edges_to_boxes(reference, distance, scale=scale), boxes, atol=1e-6)
    np.testing.assert_allclose(edges.edge_distance(reference, reference), 0, atol=1e-5)
    # One unit is a side divided by the scale, outwards.
    left, *_ = np.asarray(edges.edges_to_boxes(reference, np.float32([1, 0, 0, 0]), scale=8.0)).T
    np.testing.assert_allclose(left, reference[:, 0] - reference[:, 2] / 16, atol=1e-6)


def test_the_weights_of_the_nearest_bins_give_the_distance_back():
    bins = np.asarray(edges.edge_bins(32))
    distance = np.random.default_rng(0).uniform(-4.5, 4.5, (5, 7)).astype(np.float32)
    left, weight = nearest(distance, bins)
    back = (1 - weight) * bins[left] + weight * bins[left + 1]
    np.testing.assert_allclose(back, np.clip(distance, -4, 4), atol=1e-5)
    # The weights as logits: their distribution has that expectation.
    both = (1 - weight)[..., None] * np.eye(33)[left] + weight[..., None] * np.eye(33)[left + 1]
    expected = quick_jit(edges.expected_edges)(np.log(both + 1e-30), bins)
    np.testing.assert_allclose(expected, np.clip(distance, -4, 4), atol=1e-5)
    at, of = nearest(bins, bins)
    np.testing.assert_allclose((1 - of) * bins[at] + of * bins[at + 1], bins, atol=1e-6)


def test_centre_and_size_lead_back_to_corners():
    boxes = some_boxes(2)
    np.testing.assert_allclose(convert.to_cxcywh(convert.from_cxcywh(boxes)), boxes, atol=1e-6)
