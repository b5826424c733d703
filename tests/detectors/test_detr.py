"""What RT-DETR and D-FINE share: a training step over devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import detectors
from kdjax.structs import Targets
from tests.support.arrays import on_shards, quick_jit
from tests.support.models import TRANSFORMERS

SIDE, BATCH, CLASSES = 64, 8, 3


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_eight_devices_are_one(name):
    """Losses, matches, gradients and statistics, with denoising, are those of the global batch."""
    detector = detectors.build(name, CLASSES, **TRANSFORMERS[name])
    rng = np.random.default_rng(0)
    params, stats = detector.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.05 * rng.normal(size=leaf.shape).astype(np.float32), params)
    low = rng.uniform(0, SIDE / 2, (BATCH, 3, 2))
    boxes = np.concatenate([low, low + rng.uniform(8, SIDE / 2, low.shape)], -1).astype(np.float32)
    valid = np.arange(3) < np.array([3, 1, 0, 2, 3, 1, 2, 0])[:, None]
    size = np.full((BATCH, 2), SIDE, np.int32)
    targets = Targets(boxes, rng.integers(0, CLASSES, (BATCH, 3)).astype(np.int32), valid, size, size)
    images = rng.normal(size=(BATCH, SIDE, SIDE, 3)).astype(np.float32)

    def total(params, images, targets):
        output, new = detector.apply(params, stats, images, train=True)
        assignment = jax.lax.stop_gradient(detector.assign(output, targets, jax.random.key(1)))
        losses = detector.loss(output, targets, assignment)
        return sum(losses.values()), (losses, new, assignment.matched)

    arrays, tree = jax.tree.flatten((images, targets))
    step = jax.grad(total, has_aux=True)
    gradient, (losses, new, matched) = quick_jit(step)(params, images, targets)
    of_eight, (split, new_of_eight, matched_of_eight) = on_shards(
        lambda *flat: step(params, *jax.tree.unflatten(tree, flat)), *map(jnp.asarray, arrays)
    )
    np.testing.assert_array_equal(matched_of_eight, matched)
    assert (np.asarray(matched) >= 0).sum() == valid.sum()
    assert all(value > 0 for value in losses.values()) and any(name.startswith("loss_dn") for name in losses)
    chex.assert_trees_all_close(split, losses, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(new_of_eight, new, rtol=1e-4, atol=1e-5)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    chex.assert_trees_all_close(of_eight, gradient, rtol=1e-3, atol=1e-5 * scale)
