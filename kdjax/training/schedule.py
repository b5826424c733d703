"""The schedule of a run: learning rate, moving average, stage and weights over the steps."""

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.structs import Array
from kdjax.training import optim
from kdjax.training.config import Config
from kdjax.training.models import all_methods

POINTS = 2000  # at most, of a curve


def schedule(config: Config) -> dict[str, np.ndarray]:
    """Everything that changes over the steps of a run, computed by the functions that the trainer uses.

    Args:
      config: of the run.

    Returns:
      f64[P] each, P <= `POINTS`: `step`, `lr`, `ema` (weight of the new parameters), `stage` (1 or 2), and
      `weight/METHOD/TERM`.
    """
    steps = np.unique(np.linspace(0, config.steps - 1, POINTS).round().astype(int))
    methods = all_methods(config)

    def weights(step: Array) -> dict[str, Array | float]:
        return {f"{name}/{term}": w * m.scale(step) for name, m in methods.items() for term, w in m.weights.items()}

    curves = jax.vmap(
        lambda step: {
            "lr": optim.learning_rate(config)(step),
            "ema": optim.ema_rate(config, step),
            **{f"weight/{name}": weight for name, weight in weights(step).items()},
        }
    )(jnp.asarray(steps))
    start = config.data.stage2.start
    stage = np.where((start > 0) & (steps >= start), 2, 1)
    return {"step": steps.astype(float), "stage": stage} | {k: np.asarray(v, float) for k, v in curves.items()}
