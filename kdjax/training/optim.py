"""Learning rate schedule, optimizer, and the rate of the moving average of the parameters."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from kdjax.errors import UserError
from kdjax.structs import Array, PyTree
from kdjax.training.config import Config

BASE_RATE, BASE_BATCH = 0.004, 256  # RTMDet's, with AdamW
SGD_RATE, SGD_BATCH = 0.01, 16  # mmdetection's for detectors on ResNets


def linear_rule(config: Config) -> float:
    """The default learning rate, proportional to the batch size.

    0.004 * batch_size / 256 with AdamW (RTMDet's), 0.01 * batch_size / 16 with SGD (mmdetection's for ResNets).
    """
    rate, batch = (SGD_RATE, SGD_BATCH) if config.optimizer.name == "sgd" else (BASE_RATE, BASE_BATCH)
    return rate * config.batch_size / batch


def learning_rate(config: Config) -> optax.Schedule:
    """Linear warm-up, constant, then cosine decay.

    The rate r is `optimizer.lr`, or `linear_rule` if that is 0. It rises from 1e-5 r to r over `warmup` steps, stays
    until the fraction `flat` of the run, and decays along a cosine to `end` * r at the last step. With `drops` there is
    no cosine: the rate is divided by 10 at each of these steps, as in mmdetection's schedules for ResNets.

    Args:
      config: the settings of the run; read here: steps, batch_size, optimizer.

    Returns:
      step -> rate, f32[].

    Raises:
      UserError: the warm-up is longer than the constant part, or `drops` are not in ascending order within the run.

    Reference: Lyu et al., "RTMDet: An Empirical Study of Designing Real-Time Object Detectors", 2022, section 4.1.
    """
    settings = config.optimizer
    rate = settings.lr or linear_rule(config)
    drops = list(settings.drops)
    whole = all(type(step) is int for step in drops)
    if not whole or drops != sorted(set(drops)) or not all(settings.warmup < step < config.steps for step in drops):
        raise UserError(
            f"config.optimizer.drops must be ascending steps between the end of the warm-up ({settings.warmup}) and "
            f"the end of the run ({config.steps}), not {tuple(drops)}"
        )
    flat_end = int(settings.flat * config.steps)
    if settings.warmup > flat_end and not drops:
        raise UserError(
            f"config.optimizer.warmup is {settings.warmup}, but the cosine decay starts at step {flat_end} "
            f"(config.optimizer.flat * config.steps): set it to at most {flat_end}, or lengthen the run"
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


def optimizer(config: Config, no_decay: Callable[[PyTree], PyTree]) -> optax.GradientTransformation:
    """AdamW, or SGD with momentum and an L2 penalty, with the schedule `learning_rate`.

    Args:
      config: the settings of the run; read here: steps, batch_size, optimizer.
      no_decay: params tree -> tree of bool, True where weight decay is not applied (norms, biases).

    Raises:
      UserError: unknown optimizer, or settings that `learning_rate` refuses.
    """
    settings = config.optimizer
    rate = learning_rate(config)

    def decayed(params: PyTree) -> PyTree:
        return jax.tree.map(lambda skip: not skip, no_decay(params))

    if settings.name == "sgd":
        decay = optax.add_decayed_weights(settings.weight_decay, mask=decayed)
        update = optax.chain(decay, optax.sgd(rate, momentum=settings.momentum or None))
    elif settings.name == "adamw":
        update = optax.adamw(rate, weight_decay=settings.weight_decay, mask=decayed)
    else:
        raise UserError(f"config.optimizer.name must be 'adamw' or 'sgd', not {settings.name!r}")
    if settings.backbone != 1:
        update = optax.chain(update, scale_backbone(settings.backbone))
    if settings.clip_norm:
        return optax.chain(optax.clip_by_global_norm(settings.clip_norm), update)
    return update


def scale_backbone(factor: float) -> optax.GradientTransformation:
    """Multiplies the updates of the student's backbone, and with them its learning rate and weight decay, by a factor.

    Updates are {"student": {part: ...}, ...}; a student without a part `backbone` is refused where the state is made.
    """

    def of_backbone(updates: PyTree) -> PyTree:
        student = updates["student"]
        if "backbone" not in student:
            raise UserError(
                f"config.optimizer.backbone is {factor}, but the student has no part `backbone`: its parts are "
                f"{', '.join(sorted(student))}: set it to 1"
            )
        return {key: {part: part == "backbone" for part in student} if key == "student" else False for key in updates}

    return optax.masked(optax.scale(factor), of_backbone)


def ema_rate(config: Config, step: Array | int) -> Array:
    """The weight of the new parameters in the moving average: RTMDet's exponential ramp.

    rate = (1 - momentum) * exp(-(1 + step) / ramp) + momentum

    Args:
      config: the settings of the run; read here: ema.
      step: number of the update, from 0.

    Returns:
      f32[], in (0, 1].
    """
    momentum, ramp = config.ema.momentum, config.ema.ramp
    return (1 - momentum) * jnp.exp(-(1.0 + step) / ramp) + momentum
