"""Checks of the schedule: learning rate, number of steps, moving average, and schedules of methods."""

import jax.numpy as jnp
import numpy as np

from kdjax.doctor.findings import ERROR, OK, WARNING, Finding
from kdjax.training import optim
from kdjax.training.config import Config
from kdjax.training.models import all_methods


def check_schedule(config: Config, size: int) -> list[Finding]:
    """Checks learning rate, number of steps, moving average and schedules of methods, by rules of thumb.

    Args:
      config: the settings of the run.
      size: number of training images.
    """
    findings = []
    rule = optim.linear_rule(config)
    rate, steps, sgd = config.optimizer.lr or rule, config.steps, config.optimizer.name == "sgd"
    reference = "mmdetection's 0.01 for 16 images" if sgd else "RTMDet's 0.004 for 256 images"
    message = f"{rate:.2g} is {rate / rule:.2g} times the linear rule ({reference}) for {config.batch_size} images"
    advice = "config.optimizer.lr=0.0 follows the rule"
    # With AdamW, small batches tolerate a higher rate than the linear rule.
    if rate > max(4 * rule, 0.0 if sgd else 0.012):
        findings.append(Finding(ERROR, "learning rate", f"{message}: too high: {advice}"))
    elif rate > 4 * rule:
        message += f": usually fine for small models trained from scratch; {advice}"
        findings.append(Finding(WARNING, "learning rate", message))
    elif rate < rule / 4 and config.student.weights:
        findings.append(Finding(WARNING, "learning rate", f"{message}: low, suitable only for fine-tuning"))
    elif rate < rule / 4:
        findings.append(Finding(ERROR, "learning rate", f"{message}: too low: {advice}"))
    else:
        findings.append(Finding(OK, "learning rate", message))
    distance = float(jnp.sum(optim.learning_rate(config)(jnp.arange(steps))))
    if distance < 0.5 and not sgd and not config.student.weights:
        message = (
            f"{steps} steps at this rate change a parameter by at most {distance:.2g}: too little for random "
            "initialisation: train longer, or raise config.optimizer.lr"
        )
        findings.append(Finding(ERROR, "length", message))
    epochs = steps * config.batch_size / size
    if epochs < 2:
        message = f"{steps} steps of {config.batch_size} images are {epochs:.1f} epochs of {size} images: train longer"
        findings.append(Finding(WARNING, "epochs", message))
    old = _old_share(config)
    message = f"{old:.0%} of the final average comes from the first half of the run"
    if old > 0.5:
        message += f": increase config.ema.ramp (it is {config.ema.ramp}, the run has {steps} steps)"
        findings.append(Finding(ERROR, "moving average", message))
    else:
        findings.append(Finding(OK, "moving average", message))
    for name, method in all_methods(config).items():
        active = float(np.mean(np.asarray(method.scale(np.arange(steps)))))
        if active < 0.1:
            message = f"start, stop, warmup and decay leave {active:.0%} of its weight on average over {steps} steps"
            findings.append(Finding(ERROR if active < 0.01 else WARNING, name, message))
    return findings


def _old_share(config: Config) -> float:
    """The weight of the parameters of the first half of the run in the final moving average."""
    rates = np.asarray(optim.ema_rate(config, np.arange(config.steps // 2, config.steps)))
    return float(np.prod(1 - rates))
