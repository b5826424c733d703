"""The schedule of a run: learning rate, length, moving average, and when methods are active."""

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kdjax import methods as zoo
from kdjax.doctor.findings import FAULT, FINE, LOOK, Finding
from kdjax.training import optim


def check_schedule(config: ConfigDict, size: int) -> list[Finding]:
    """Learning rate, length, moving average and the methods' schedules; rules of thumb.

    Args:
      config: of the run.
      size: training images.
    """
    found = []
    rule = optim.linear_rule(config)
    rate, steps, sgd = config.optimizer.lr or rule, config.steps, config.optimizer.name == "sgd"
    norm = "mmdetection's 0.01 for 16" if sgd else "RTMDet's 0.004 for 256"
    times = f"{rate:.2g}, {rate / rule:.2g} times what {norm} images is for {config.batch_size}"
    # With AdamW small batches bear more than the linear rule gives them.
    if rate > max(4 * rule, 0.0 if sgd else 0.012):
        found.append(Finding(FAULT, "learning rate", f"{times}: too high, config.optimizer.lr=0.0 follows the rule"))
    elif rate > 4 * rule:
        said = f"{times}: small models that start from random numbers bear it; config.optimizer.lr=0.0 follows the rule"
        found.append(Finding(LOOK, "learning rate", said))
    elif rate < rule / 4 and config.student.weights:
        found.append(Finding(LOOK, "learning rate", f"{times}: low, which suits fine-tuning only"))
    elif rate < rule / 4:
        found.append(Finding(FAULT, "learning rate", f"{times}: too low, config.optimizer.lr=0.0 follows the rule"))
    else:
        found.append(Finding(FINE, "learning rate", times))
    path = float(jnp.sum(optim.learning_rate(config)(jnp.arange(steps))))
    if path < 0.5 and not sgd and not config.student.weights:
        said = (
            f"{steps} steps at this rate move a weight by at most {path:.2g}: too little to learn from random "
            "numbers; train longer, or raise config.optimizer.lr"
        )
        found.append(Finding(FAULT, "length", said))
    rounds = steps * config.batch_size / size
    if rounds < 2:
        said = f"{steps} steps of {config.batch_size} show each of the {size} images {rounds:.1f} times: train longer"
        found.append(Finding(LOOK, "rounds", said))
    old = _age(config)
    if old > 0.5:
        said = (
            f"{old:.0%} of what is handed out would be weights of the first half of the run: lengthen config.ema.ramp "
            f"(it is {config.ema.ramp}, the run has {steps} steps)"
        )
        found.append(Finding(FAULT, "moving average", said))
    else:
        found.append(Finding(FINE, "moving average", f"{old:.0%} of it is of the first half of the run"))
    for name, options in config.methods.items():
        active = float(np.mean(np.asarray(zoo.build(name, **options).scale(np.arange(steps)))))
        if active < 0.1:
            said = f"its start, stop, warmup and decay give it {active:.0%} of its weight over the {steps} steps"
            found.append(Finding(FAULT if active < 0.01 else LOOK, name, said))
    return found


def _age(config: ConfigDict) -> float:
    """The share of the weights from before half of the run in the moving average at its end."""
    rates = np.asarray(optim.ema_rate(config, np.arange(config.steps // 2, config.steps)))
    return float(np.prod(1 - rates))
