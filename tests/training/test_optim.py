"""Learning rate, moving average and weight decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import detectors
from kdjax.errors import UserError
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


def config_of(**optimizer):
    config = settings.base()
    config.update(dict(batch_size=32, steps=100))
    config.optimizer.update(dict(warmup=10) | optimizer)
    return config


def test_the_rate_is_that_of_the_settings_or_proportional_to_the_batch():
    for options, rate in ((dict(lr=0.3), 0.3), ({}, 0.004 / 8), (dict(name="sgd"), 0.02)):
        assert float(optim.learning_rate(config_of(**options))(20)) == pytest.approx(rate, rel=1e-6)


def test_the_cosine_ends_at_its_share_of_the_rate():
    for end in (0.0, 0.25):
        rate = optim.learning_rate(config_of(lr=1.0, flat=0.6, end=end))
        for at, share in ((60, 1.0), (80, (1 + end) / 2), (100, end)):
            assert float(rate(at)) == pytest.approx(share, rel=1e-5, abs=1e-6), (end, at)


def test_the_rate_is_divided_by_ten_at_each_drop():
    rate = optim.learning_rate(config_of(lr=1.0, drops=(40, 70)))
    for at, share in ((0, 1e-5), (10, 1), (39, 1), (40, 0.1), (69, 0.1), (70, 0.01), (99, 0.01)):
        assert float(rate(at)) == pytest.approx(share, rel=2e-3), at


@pytest.mark.parametrize(
    "drops", [(40, 30), (40, 40), (10,), (5,), (100,), (200,), ("x",), (None,), ((1, 2),), (40.5,)]
)
def test_drops_that_are_not_possible_are_refused(drops):
    with pytest.raises(UserError, match=r"config.optimizer.drops must be ascending"):
        optim.learning_rate(config_of(drops=drops))


def test_a_warm_up_longer_than_the_constant_part_is_refused():
    optim.learning_rate(config_of(warmup=50, flat=0.5))
    optim.learning_rate(config_of(warmup=51, flat=0.5, drops=(60,)))  # with drops there is no cosine
    with pytest.raises(UserError, match=r"config.optimizer.warmup is 51, but the cosine decay starts at step 50"):
        optim.learning_rate(config_of(warmup=51, flat=0.5))


def first_updates(gradient, count=1, **options):
    """The first updates of a matrix and of a bias, both ones, the bias without weight decay."""
    config = config_of(**dict(warmup=0, flat=1.0, weight_decay=0.0) | options)
    optimizer = optim.optimizer(config, lambda params: {"matrix": False, "bias": True})
    params = {"matrix": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    state, gradients = optimizer.init(params), jax.tree.map(lambda p: gradient * jnp.ones_like(p), params)
    for _ in range(count):
        updates, state = optimizer.update(gradients, state, params)
    return {name: float(update.ravel()[0]) for name, update in updates.items()}


def test_sgd_has_momentum_and_an_l2_penalty():
    sgd = dict(name="sgd", lr=0.1)
    assert first_updates(2.0, **sgd) == pytest.approx({"matrix": -0.2, "bias": -0.2})
    assert first_updates(2.0, **sgd, weight_decay=0.5) == pytest.approx({"matrix": -0.25, "bias": -0.2})
    assert first_updates(2.0, 2, **sgd, momentum=0.5) == pytest.approx({"matrix": -0.3, "bias": -0.3})


def test_gradients_are_clipped_by_their_global_norm():
    clipped = first_updates(2.0, name="sgd", lr=0.1, clip_norm=1.0)  # the norm of six twos
    assert clipped == pytest.approx(dict.fromkeys(("matrix", "bias"), -0.1 / np.sqrt(6)), rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_backbone_learns_at_its_own_rate(name):
    params = {"student": {"backbone": {"a": jnp.ones(2)}, "neck": {"a": jnp.ones(2)}}, "adapters": {"b": jnp.ones(2)}}
    none = lambda params: jax.tree.map(lambda _: False, params)  # noqa: E731

    def updates(**options):
        transform = optim.optimizer(config_of(name=name, lr=0.5, **options), none)
        return transform.update(params, transform.init(params), params)[0]

    plain, slow = updates(), updates(backbone=0.1)
    np.testing.assert_allclose(slow["student"]["backbone"]["a"], 0.1 * plain["student"]["backbone"]["a"], rtol=1e-6)
    plain["student"]["backbone"] = slow["student"]["backbone"]
    assert jax.tree.all(jax.tree.map(np.array_equal, slow, plain)) and np.all(slow["adapters"]["b"])
    with pytest.raises(UserError, match=r"config\.optimizer\.backbone is 0\.1, but the student has no part `backbone`"):
        optim.optimizer(config_of(backbone=0.1), none).init({"student": {"neck": {}}})


def test_an_unknown_optimizer_is_named():
    with pytest.raises(UserError, match=r"config.optimizer.name must be 'adamw' or 'sgd', not 'adam'"):
        optim.optimizer(config_of(name="adam"), lambda params: params)


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
