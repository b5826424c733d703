"""Learning rate, moving average and weight decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import detectors
from kdjax.training import checkpoint, optim
from kdjax.training import config as settings


def test_learning_rate_and_moving_average():
    config = settings.base()
    config.update(dict(batch_size=64, steps=1000))
    config.optimizer.warmup = 100
    rate = optim.learning_rate(config)
    full = 0.004 * 64 / 256
    for at, share in ((0, 1e-5), (50, 0.500005), (100, 1), (500, 1), (750, 0.525), (1000, 0.05)):
        assert float(rate(at)) == pytest.approx(share * full, rel=2e-3), at
    for at in (0, 100, 5000, 10**6):
        assert float(optim.ema_rate(config, at)) == pytest.approx(
            (1 - 2e-4) * np.exp(-(1 + at) / 2000) + 2e-4, rel=1e-4
        )


def test_weight_decay_leaves_norms_and_biases_alone():
    config = settings.base()
    config.optimizer.update(dict(lr=0.1, warmup=0))
    detector = detectors.build("rtmdet_pico", 2)
    params, _ = detector.init(jax.random.PRNGKey(0))
    optimizer = optim.optimizer(config, detector.no_decay)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda zeros, params: optimizer.update(zeros, optimizer.init(params), params))(zeros, params)
    for name, update in checkpoint.flat(updates).items():
        leaf = checkpoint.flat(params)[name]
        np.testing.assert_allclose(update, -0.1 * 0.05 * leaf if leaf.ndim > 1 else 0 * leaf, atol=1e-9, err_msg=name)
