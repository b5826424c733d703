"""The learning rate over the steps, the optimiser, and the rate of the moving average."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

BASE_RATE, BASE_BATCH = 0.004, 256  # RTMDet's, with AdamW
SGD_RATE, SGD_BATCH = 0.01, 16  # mmdetection's for detectors on ResNets


def linear_rule(config: ConfigDict) -> float:
    """The learning rate that `optimizer.lr=0` stands for: 0.004 for 256 images with AdamW, 0.01 for 16 with SGD."""
    rate, batch = (SGD_RATE, SGD_BATCH) if config.optimizer.name == "sgd" else (BASE_RATE, BASE_BATCH)
    return rate * config.batch_size / batch


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Linear warm-up, flat, then cosine: RTMDet's schedule (Lyu et al. 2022, section 4.1).

    rate = optimizer.lr, or `linear_rule` where that is 0. It rises from 1e-5 of it over `warmup` steps, stays until
    `flat` of the run, and falls along a cosine to `end` of it at the last step. With `drops` it stays until the first
    of these steps and falls to a tenth at each, as in mmdetection's schedules of ResNets.

    Returns:
      step -> rate, f32[].

    Raises:
      ValueError: the warm-up is longer than the flat part, or `drops` do not ascend within the run.
    """
    settings = config.optimizer
    rate = settings.lr or linear_rule(config)
    drops = list(settings.drops)
    if drops != sorted(set(drops)) or not all(settings.warmup < step < config.steps for step in drops):
        raise ValueError(
            f"config.optimizer.drops is {tuple(drops)}; its steps must ascend between the end of the warm-up "
            f"({settings.warmup}) and that of the run ({config.steps})"
        )
    flat_end = int(settings.flat * config.steps)
    if settings.warmup > flat_end and not drops:
        raise ValueError(
            f"config.optimizer.warmup is {settings.warmup} steps, but the flat part of the schedule ends at step "
            f"{flat_end} (config.optimizer.flat of config.steps): shorten the warm-up or lengthen the run"
        )
    if drops:
        parts, bounds = [optax.constant_schedule(rate * 0.1**i) for i in range(len(drops) + 1)], drops
    else:
        cosine = optax.cosine_decay_schedule(rate, max(config.steps - flat_end, 1), settings.end)
        parts, bounds = [optax.constant_schedule(rate), cosine], [flat_end]
    if settings.warmup:
        parts.insert(0, optax.linear_schedule(1e-5 * rate, rate, settings.warmup))
        bounds.insert(0, settings.warmup)
    return optax.join_schedules(parts, bounds)


def optimizer(config: ConfigDict, no_decay) -> optax.GradientTransformation:
    """AdamW, or SGD with momentum and a weight decay that is part of the gradient, under `learning_rate`.

    Args:
      config: the run's config; `config.optimizer` is read.
      no_decay: params tree -> tree of bool, True where weight decay is not applied (norms, biases).
    """
    settings = config.optimizer
    rate = learning_rate(config)

    def decayed(params):
        return jax.tree.map(lambda skip: not skip, no_decay(params))

    if settings.name == "sgd":
        decay = optax.add_decayed_weights(settings.weight_decay, mask=decayed)
        update = optax.chain(decay, optax.sgd(rate, momentum=settings.momentum or None))
    elif settings.name == "adamw":
        update = optax.adamw(rate, weight_decay=settings.weight_decay, mask=decayed)
    else:
        raise ValueError(f"config.optimizer.name is {settings.name!r}; it must be 'adamw' or 'sgd'")
    if settings.clip_norm:
        return optax.chain(optax.clip_by_global_norm(settings.clip_norm), update)
    return update


def ema_rate(config: ConfigDict, step):
    """Share of the new weights in the moving average after update `step` (from 0): RTMDet's exponential ramp."""
    momentum, ramp = config.ema.momentum, config.ema.ramp
    return (1 - momentum) * jnp.exp(-(1.0 + step) / ramp) + momentum
