"""Losses of masks: slow NumPy, the properties of the formulas, and every way to call them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kdjax.errors import UserError
from kdjax.losses import mask

MASKS, SIDE, CLASSES = 8, 5, 3


def some_masks(seed: int):
    """Logits of all classes, truth (the last mask is empty), labels."""
    rng = np.random.default_rng(seed)
    target = np.round(rng.uniform(0, 1, (MASKS, SIDE, SIDE + 1)) * 4) / 4
    target[-1] = 0
    logits = rng.normal(0, 3, (*target.shape, CLASSES))
    return np.float32(logits), np.float32(target), rng.integers(0, CLASSES, MASKS).astype(np.int32)


def every(logits, target, labels):
    return {
        "dice": mask.dice(logits[..., 0], target),
        "dice naive": mask.dice(logits[..., 0], target, naive=True, eps=0.01),
        "mask_cross_entropy": mask.mask_cross_entropy(logits, target, labels),
    }


jitted = jax.jit(every)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_value(self):
        arrays = some_masks(0)
        chex.assert_trees_all_close(self.variant(every)(*arrays), jitted(*arrays), rtol=1e-5, atol=1e-6)


def test_vmap_over_masks_is_the_batch():
    arrays = some_masks(1)
    chex.assert_trees_all_close(jax.jit(jax.vmap(every))(*arrays), jitted(*arrays), rtol=1e-5, atol=1e-6)


def test_equals_slow_loop():
    logits, target, labels = some_masks(2)
    got = jitted(logits, target, labels)
    for row in range(MASKS):
        t = np.float64(target[row])
        probs = 1 / (1 + np.exp(-np.float64(logits[row])))
        p, q = probs[..., 0], probs[..., labels[row]]
        want = {
            "dice": 1 - 2 * (p * t).sum() / ((p**2).sum() + (t**2).sum() + 2e-3),
            "dice naive": 1 - (2 * (p * t).sum() + 0.01) / (p.sum() + t.sum() + 0.01),
            "mask_cross_entropy": -(t * np.log(q) + (1 - t) * np.log1p(-q)).mean(),
        }
        for name, value in want.items():
            np.testing.assert_allclose(got[name][row], value, rtol=1e-5, err_msg=name)


def test_gradients_by_finite_differences():
    logits, target, labels = some_masks(3)

    def total(logits):
        return {name: jnp.mean(value) for name, value in every(logits, target, labels).items()}

    check_grads(total, (logits,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


def test_bounds_and_the_empty_mask():
    logits, target, labels = some_masks(4)
    sure = np.where(target > 0.5, 40.0, -40.0).astype(np.float32)
    whole = (target > 0.5).astype(np.float32)
    np.testing.assert_allclose(mask.dice(sure[:-1], whole[:-1]), 0, atol=2e-3)
    np.testing.assert_allclose(mask.dice(sure, whole, naive=True), 0, atol=1e-6)
    np.testing.assert_allclose(mask.mask_cross_entropy(sure[..., None], whole, 0 * labels), 0, atol=1e-6)
    value, gradient = jax.value_and_grad(lambda x: mask.dice(x, target)[-1])(logits[..., 0])
    assert float(value) == 1 and not np.any(gradient)


def test_finite_on_large_logits_and_bfloat16():
    logits, target, labels = some_masks(5)

    def total(logits, target):
        values = every(logits, target, labels)
        return sum(jnp.sum(value) for value in values.values()), values

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    for dtype in (jnp.float32, jnp.bfloat16):
        (_, values), gradient = run(jnp.asarray(30 * logits, dtype), jnp.asarray(target, dtype))
        for name, value in values.items():
            assert value.dtype == jnp.float32 and np.all(np.isfinite(value)), name
        assert np.all(np.isfinite(np.asarray(gradient, np.float32)))


def test_wrong_shapes_and_options_are_refused():
    logits, target, labels = some_masks(6)
    for call in (
        lambda: mask.dice(logits[..., 0], target[:, 1:]),
        lambda: mask.dice(logits[..., 0], target, eps=0.0),
        lambda: mask.mask_cross_entropy(logits[..., 0], target, labels),
        lambda: mask.mask_cross_entropy(logits, target, labels[1:]),
    ):
        with pytest.raises(UserError, match=r"^(dice|mask_cross_entropy): "):
            call()
