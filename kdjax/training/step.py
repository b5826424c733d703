"""One optimiser update: every gradient, stop-gradient and optimiser call of kdjax is in this file."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdjax.detectors.api import Detector, switched
from kdjax.distill import Distiller, Distillers
from kdjax.distill.teachers import RECORDED
from kdjax.sharding import Layout
from kdjax.structs import Array, DetectorOutput, PyTree, targets_of
from kdjax.training import auto_weight

UNLABELLED = "unlabelled"  # the key of a batch under which it has further images, without labels
SOUND = "sound"  # the key of a batch under which it has the "finite" of the step before


class TrainState(NamedTuple):
    """Everything that a step changes; a plain tree of arrays."""

    step: Array  # i32[], updates so far
    params: PyTree  # {"student": ..., "adapters": {method: ...}}
    stats: PyTree  # running statistics of the student's norms
    opt_state: PyTree
    ema: PyTree  # {"params": ..., "stats": ...} of the student: what is evaluated and exported
    key: Array  # never changes; every step folds its number in
    weights: PyTree = None  # of methods that set their own (`auto_weight.initial`)


class TeacherVariables(NamedTuple):
    """The teacher's variables: an argument of the step, neither a constant of the program nor trained nor saved."""

    params: PyTree
    stats: PyTree


Batch = Mapping[str, Any]  # arrays, and what the teachers say about them


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step in two parts, which a run compiles as two programs.

    The second knows neither images nor what a method computes, only its adapters: it is compiled once for a student,
    its adapters and its optimizer, and read from the cache by later runs. Jitted as a whole, a step is one program.
    """

    # (state without `opt_state` and `ema`, variables, batch) -> (gradients, new statistics, metrics)
    gradients: Callable[[TrainState, PyTree, Batch], tuple[PyTree, PyTree, dict[str, Array]]]
    # (state without `stats` and `weights`, gradients, new statistics, 1 or 0 f32[]: are they finite) -> the new one
    update: Callable[[TrainState, PyTree, PyTree, Array], TrainState]

    def __call__(self, state: TrainState, variables: PyTree, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """(state, variables of the teacher, or of several by name, or None; batch) -> (state, metrics)."""
        grads, stats, metrics = self.gradients(self.read(state), variables, batch)
        new = self.update(self.changed(state), grads, stats, metrics["finite"])
        return new._replace(stats=stats, weights=state.weights), metrics

    @staticmethod
    def read(state: TrainState) -> TrainState:
        """What the gradients read of a state."""
        return state._replace(opt_state=None, ema=None)

    @staticmethod
    def changed(state: TrainState) -> TrainState:
        """What the update changes of a state, in place."""
        return state._replace(stats=None, weights=None)


def init_state(
    student: Detector,
    key: Array,
    variables: tuple[PyTree, PyTree] | None,
    adapters: Mapping[str, PyTree],
    optimizer: optax.GradientTransformation,
    weights: PyTree = None,
) -> TrainState:
    """A state at step 0, on the host. `variables` is (params, stats) to start from, or None for `student.init(key)`."""
    params, stats = student.init(key) if variables is None else variables
    params = {"student": params, "adapters": adapters}
    ema = {"params": params["student"], "stats": stats}
    state = TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params), ema, key, weights)
    # Copies, because a step donates its state and no two leaves may share a buffer; NumPy's need no compilation.
    return jax.tree.map(np.array, state)


def make_probe(
    student: Detector, distiller: Distiller | Distillers
) -> Callable[[TrainState, PyTree, Batch], tuple[dict[str, Array], dict[str, Array], dict[str, Array]]]:
    """What the check before training computes: each term, and its gradient with respect to the student's output.

    Args:
      student, distiller: as for `make_step`.

    Returns:
      (state, teacher variables, batch) -> (detection losses f32[], unweighted terms f32[], the norm of the gradient of
      each term f32[]), each by name.
    """

    def probe(
        state: TrainState, variables: PyTree, batch: Batch
    ) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
        params = state.params
        output, _ = student.apply(params["student"], state.stats, student.preprocess(batch["image"]), train=True)
        targets = targets_of(batch)
        assignment = student.assign(output, targets, state.key)
        losses = student.loss(output, targets, assignment)

        def terms(output: DetectorOutput) -> dict[str, Array]:
            return distiller.terms(
                params["adapters"],
                output,
                batch,
                variables,
                observed=batch.get(RECORDED),
                assignment=assignment,
                key=state.key,
            )

        values, vjp = jax.vjp(terms, output)
        grad_norms = {}
        for name in values:
            (grads,) = vjp({other: jnp.float32(other == name) for other in values})
            grad_norms[name] = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        return losses, values, grad_norms

    return probe


def make_step(
    student: Detector,
    optimizer: optax.GradientTransformation,
    ema_rate: Callable[[Array], Array],
    *,
    distiller: Distiller | Distillers | None = None,
    layout: Layout | None = None,
    most: Mapping[str, float] = MappingProxyType({}),
    int8_from: int | None = None,
) -> Step:
    """The step of a student, with a distiller or without: a supervised run and the twin have the same.

    Args:
      student: what is trained.
      optimizer: of `state.params`.
      ema_rate: step -> share of the new weights in the moving average.
      distiller: of that student, its teacher and the methods; None trains without a teacher. What `distiller.observe`
        returned may be in the batch as `teacher`; otherwise the teacher is run in the step. A batch of further images,
        without labels, may be in the batch as `unlabelled`: it has the distillation terms alone, and a term is the mean
        over all images. Its `boxes`, `labels` and `valid`, if it has them, are for methods that read some; without
        them these methods see the labelled images alone.
      layout: where the state and the teacher's variables lie; None: each device has copies.
      most: of "total" and "grad_norm", above which a step is as bad as one that is not finite.
      int8_from: of a student with the option int8, the step from which on its values are rounded to 8 bits.

    Returns:
      (state, teacher variables or None, batch) -> (state, metrics). Metrics are f32[]: the detection losses, the
      unweighted terms as "method/term", "total", "grad_norm" and "finite" (1 or 0). A step whose total or gradient is
      not finite, or above `most`, changes nothing but the counter. The batch may have the "finite" of the step before
      as `sound`: after a bad step the next ones change nothing either, so that the state before it is still there when
      the host has checked.
    """

    def loss(
        params: PyTree, stats: PyTree, factors: PyTree, variables: PyTree, batch: Batch, step: Array, key: Array
    ) -> tuple[Array | int, tuple[dict[str, Array], PyTree]]:
        if int8_from is not None:
            stats = switched(stats, (step >= int8_from).astype(jnp.float32))
        output, stats = student.apply(params["student"], stats, student.preprocess(batch["image"]), train=True)
        targets = targets_of(batch)
        assignment = student.assign(output, targets, key)
        losses = student.loss(output, targets, assignment)
        total = sum(losses.values())
        if distiller is not None:
            assert variables is not None, "a distiller needs the variables of its teacher"
            observed = batch.get(RECORDED)
            terms = distiller.terms(
                params["adapters"], output, batch, variables, observed=observed, assignment=assignment, key=key
            )
            if UNLABELLED in batch:
                more = batch[UNLABELLED]
                given = distiller if "boxes" in more else distiller.without_boxes(more["image"].shape[1:3])
                output, stats = student.apply(params["student"], stats, student.preprocess(more["image"]), train=True)
                others = given.terms(
                    params["adapters"],
                    output,
                    more,
                    variables,
                    observed=more.get(RECORDED),
                    key=jax.random.fold_in(key, 1),
                )
                share = len(more["image"]) / (len(batch["image"]) + len(more["image"]))
                terms |= {name: (1 - share) * terms[name] + share * value for name, value in others.items()}
            weights = auto_weight.scaled(distiller.weights(step), factors)
            total += sum(weights[name] * value for name, value in terms.items())
            losses |= terms
        return total, (losses, stats)

    def gradients(state: TrainState, variables: PyTree, batch: Batch) -> tuple[PyTree, PyTree, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        # Outside of the gradient: the parameters are gathered once, and their gradients are summed into parts.
        whole = state.params, state.stats, state.weights, variables
        whole = whole if layout is None else layout.whole(whole)
        (total, (losses, stats)), grads = jax.value_and_grad(loss, has_aux=True)(*whole, batch, state.step, key)
        grads = grads if layout is None else layout.parts(grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        for name, bound in most.items():
            finite &= {"total": total, "grad_norm": norm}[name] <= bound
        if SOUND in batch:
            finite &= batch[SOUND] > 0
        stats = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stats, state.stats)
        return grads, stats, losses | {"total": total, "grad_norm": norm, "finite": finite.astype(jnp.float32)}

    def update(state: TrainState, grads: PyTree, stats: PyTree, finite: Array) -> TrainState:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: PyTree = optax.apply_updates(state.params, updates)
        rate = ema_rate(state.step)
        ema = jax.tree.map(
            lambda old, new: old + rate * (new - old), state.ema, {"params": params["student"], "stats": stats}
        )
        new = state._replace(params=params, opt_state=opt_state, ema=ema)
        new = jax.tree.map(lambda a, b: jnp.where(finite > 0, a, b), new, state)
        return new._replace(step=state.step + 1, key=state.key)

    return Step(gradients, update)
