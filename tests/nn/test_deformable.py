"""Deformable attention against plain loops, and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import nn

SHAPES, POINTS, HEADS, CHANNELS = [(3, 5), (2, 2)], [2, 3], 2, 3
CELLS = sum(height * width for height, width in SHAPES)


def inputs(seed=0, batch=2, queries=4, spread=0.8):
    """Locations reach beyond the maps."""
    rng = np.random.default_rng(seed)
    places = (batch, queries, HEADS, sum(POINTS))
    memory = rng.normal(size=(batch, CELLS, HEADS, CHANNELS))
    locations = rng.uniform(0.5 - spread, 0.5 + spread, (*places, 2))
    return [x.astype(np.float32) for x in (memory, locations, rng.normal(size=places))]


def maps_of(memory):
    ends = np.cumsum([height * width for height, width in SHAPES])
    parts = np.split(memory, ends[:-1])
    return [part.reshape(*shape, *memory.shape[1:]) for part, shape in zip(parts, SHAPES, strict=True)]


def by_loops(memory, locations, weights, discrete):
    level = np.repeat(np.arange(len(POINTS)), POINTS)
    out = np.zeros((*locations.shape[:2], HEADS, CHANNELS))
    for b, q, h, p in np.ndindex(locations.shape[:-1]):
        one = maps_of(memory[b])[level[p]][:, :, h]
        height, width = one.shape[:2]
        x, y = locations[b, q, h, p] * [width, height]
        if discrete:
            row, column = (int(np.clip(np.trunc(v + 0.5), 0, side - 1)) for v, side in ((y, height), (x, width)))
            value = one[row, column]
        else:

            def near(place, i):
                return max(0.0, 1 - abs(place - 0.5 - i))

            value = sum(near(y, i) * near(x, j) * one[i, j] for i, j in np.ndindex(height, width))
        out[b, q, h] += weights[b, q, h, p] * value
    return out.reshape(*out.shape[:2], -1)


@pytest.mark.parametrize("discrete", [False, True])
def test_it_equals_plain_loops(discrete):
    arrays = inputs()
    attend = jax.jit(lambda *x: nn.deformable_attention(*x, shapes=SHAPES, points=POINTS, discrete=discrete))
    np.testing.assert_allclose(attend(*arrays), by_loops(*arrays, discrete), atol=2e-6)


def test_the_form_for_other_formats_is_the_same():
    arrays = inputs(1)
    with nn.portable():
        portable = nn.deformable_attention(*arrays, shapes=SHAPES, points=POINTS)
    np.testing.assert_array_equal(portable, nn.deformable_attention(*arrays, shapes=SHAPES, points=POINTS))


def test_gradients_are_differences():
    memory, locations, weights = inputs(2, batch=1, queries=2, spread=0.4)
    moved = np.random.default_rng(3).normal(size=(3, 1, 2, HEADS, sum(POINTS), 2)).astype(np.float32)

    def total(memory, locations, weights):
        out = nn.deformable_attention(memory, locations, weights, shapes=SHAPES, points=POINTS)
        return jnp.sum(jnp.sin(out))

    slope = jax.jit(jax.grad(total, (0, 1, 2)))(memory, locations, weights)
    step = 1e-3
    for along, at in ((moved[0], 1), (moved[1][..., 0], 2), (moved[2].reshape(-1)[: memory.size], 0)):
        along = np.resize(along, (memory, locations, weights)[at].shape)
        ends = []
        for sign in (1, -1):
            arrays = [memory, locations, weights]
            arrays[at] = arrays[at] + sign * step * along
            ends.append(by_loops(*arrays, False))
        want = float(np.sum(np.sin(ends[0]) - np.sin(ends[1])) / (2 * step))
        assert float(np.sum(slope[at] * along)) == pytest.approx(want, rel=2e-3, abs=2e-3)


def test_single_cells_give_places_no_gradient():
    arrays = inputs(4)

    def attend(where):
        return jnp.sum(
            nn.deformable_attention(arrays[0], where, arrays[2], shapes=SHAPES, points=POINTS, discrete=True)
        )

    assert not np.any(jax.grad(attend)(arrays[1]))


def test_the_backward_pass_keeps_no_samples():
    """All four corners of all points would be 4 x 5 times the maps' channels of each query."""
    memory, locations, weights = (jnp.asarray(x) for x in inputs(5, queries=64))

    def attend(*x):
        return nn.deformable_attention(*x, shapes=SHAPES, points=POINTS)

    kept = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(attend, *x)[1], memory, locations, weights))
    given = memory.size + locations.size + weights.size
    assert sum(leaf.size for leaf in kept) < 2 * given < weights.size * 4 * CHANNELS


def test_samples_lie_around_the_box_in_shares_of_its_size():
    reference = np.array([0.5, 0.25, 0.2, 0.4], np.float32).reshape(1, 1, 1, 4)
    offsets = np.zeros((1, 1, HEADS, sum(POINTS), 2), np.float32)
    offsets[..., 1, :], offsets[..., 4, :] = (2, -2), (3, 1)
    found = nn.sample_points(reference, offsets, shapes=SHAPES, points=POINTS)
    np.testing.assert_allclose(found[0, 0, 0], [[0.5, 0.25], [0.6, 0.05], *[[0.5, 0.25]] * 2, [0.6, 0.25 + 0.2 / 3]])


def test_samples_lie_around_a_point_in_cells():
    reference = np.tile(np.array([0.5, 0.25], np.float32), (1, 1, 2, 1))
    offsets = np.ones((1, 1, HEADS, sum(POINTS), 2), np.float32)
    found = nn.sample_points(reference, offsets, shapes=SHAPES, points=POINTS)
    np.testing.assert_allclose(found[0, 0, 1, [0, 2]], [[0.5 + 1 / 5, 0.25 + 1 / 3], [1.0, 0.75]], rtol=1e-6)
