"""One optimiser update: every gradient, stop-gradient and optimiser call of kdjax is in this file."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdjax.detectors.api import Detector
from kdjax.distill import Distiller
from kdjax.structs import targets_of


class TrainState(NamedTuple):
    """Everything that a step changes; a plain tree of arrays."""

    step: jax.Array  # i32[], updates so far
    params: Any  # {"student": ..., "adapters": {method: ...}}
    stats: Any  # running statistics of the student's norms
    opt_state: Any
    ema: Any  # {"params": ..., "stats": ...} of the student: what is evaluated and exported
    key: jax.Array  # never changes; every step folds its number in


class TeacherVariables(NamedTuple):
    """The frozen side: an argument of the step, never closed over, never trained, never saved."""

    params: Any
    stats: Any


def init_state(student, key, variables, adapters: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0, on the host. `variables` is (params, stats) to start from, or None for `student.init(key)`."""
    params, stats = student.init(key) if variables is None else variables
    params = {"student": params, "adapters": adapters}
    ema = {"params": params["student"], "stats": stats}
    state = TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params), ema, key)
    # Copies, because a step donates its state and no two leaves may share a buffer; NumPy's need no compilation.
    return jax.tree.map(np.array, state)


def make_step(
    student: Detector,
    optimizer: optax.GradientTransformation,
    ema_rate: Callable,
    *,
    distiller: Distiller | None = None,
) -> Callable:
    """The update of a student, with a distiller or without: a supervised run and the twin, one program.

    Args:
      student: what is trained.
      optimizer: of `state.params`.
      ema_rate: step -> share of the new weights in the moving average.
      distiller: of that student, its teacher and the methods; None trains without a teacher.

    Returns:
      (state, teacher variables or None, batch) -> (state, metrics). Metrics are f32[]: the detection losses, the
      unweighted terms as "method/term", "total", "grad_norm" and "finite" (1 or 0). A step whose total or gradient is
      not finite changes nothing but the counter.
    """

    def loss(params, stats, variables, batch, step, key):
        output, stats = student.apply(params["student"], stats, student.preprocess(batch["image"]), train=True)
        targets = targets_of(batch)
        assignment = student.assign(output, targets, key)
        losses = student.loss(output, targets, assignment)
        total = sum(losses.values())
        if distiller is not None:
            terms = distiller.terms(params["adapters"], output, batch, tuple(variables), assignment=assignment, key=key)
            weights = distiller.weights(step)
            total += sum(weights[name] * value for name, value in terms.items())
            losses |= terms
        return total, (losses, stats)

    def update(state: TrainState, variables, batch):
        key = jax.random.fold_in(state.key, state.step)
        (total, (losses, stats)), grads = jax.value_and_grad(loss, has_aux=True)(
            state.params, state.stats, variables, batch, state.step, key
        )
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = ema_rate(state.step)
        ema = jax.tree.map(
            lambda old, new: old + rate * (new - old), state.ema, {"params": params["student"], "stats": stats}
        )
        new = state._replace(params=params, stats=stats, opt_state=opt_state, ema=ema)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        metrics = losses | {"total": total, "grad_norm": norm, "finite": finite.astype(jnp.float32)}
        return new._replace(step=state.step + 1, key=state.key), metrics

    return update
