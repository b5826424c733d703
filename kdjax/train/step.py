"""One optimiser update: every gradient, stop-gradient and optimiser call of kdjax is in this file."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdjax.methods import api
from kdjax.structs import Targets


class TrainState(NamedTuple):
    """Everything that a step changes; a plain tree of arrays."""

    step: jax.Array  # i32[], updates so far
    params: Any  # {"student": ..., "adapters": {method: ...}}
    stats: Any  # running statistics of the student's norms
    opt_state: Any
    ema: Any  # {"params": ..., "stats": ...} of the student: what is evaluated and handed out
    key: jax.Array  # never changes; every step folds its number in


class Teacher(NamedTuple):
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


def init_adapters(methods: Mapping[str, api.Method], key, student_spec, teacher_spec) -> dict:
    """What each method trains beside the student, {method: params}; checks taps, channels and sizes on the way.

    Raises:
      ValueError: a method cannot compare these two; if not with its default options either, with the names of those
        that can.
    """
    adapters = {}
    for name, method in methods.items():
        try:
            adapters[name] = method.init(method_key(key, name), *api.shared_levels(student_spec, teacher_spec))
        except ValueError as error:
            if name not in api.names() or not api.refusal(name, student_spec, teacher_spec):
                raise
            able = [other for other in api.names() if not api.refusal(other, student_spec, teacher_spec)]
            raise ValueError(f"{error}. Methods that run on this student and teacher: {', '.join(able)}") from error
    return adapters


def method_key(key, name: str):
    """A key of the method's own, the same whatever other methods run beside it."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def targets_of(batch: dict) -> Targets:
    """The ground truth of a batch of kdjax's own loader, whose canvas is padded: every prior is valid."""
    canvas = jnp.broadcast_to(jnp.array(batch["image"].shape[1:3], jnp.int32), batch["image_size"].shape)
    return Targets(batch["boxes"], batch["labels"], batch["valid"], batch["image_size"], canvas)


def compare(student, teacher, methods, params, variables: Teacher, output, assignment, batch, step, key):
    """All terms of all methods, unweighted: {"method/term": f32[]}. The teacher looks at the same images."""
    seen, _ = teacher.apply(*variables, teacher.preprocess(batch["image"]), train=False)
    variables, seen = jax.lax.stop_gradient((variables, seen))
    whole, (output, seen) = output, api.shared_levels(output, seen)
    compared = slice(api.count_priors(output))  # the priors of those levels come first

    def of_compared(assignment):
        return jax.tree.map(lambda rows: rows[:, compared], assignment)

    terms = {}
    for name, method in methods.items():
        context = api.Context(
            student=output,
            teacher=seen,
            targets=targets_of(batch),
            assignment=of_compared(assignment),
            step=step,
            key=method_key(key, name),
            priors=student.priors(batch["image"].shape[1:3])[compared],
            decode_student=student.decode_boxes,
            decode_teacher=teacher.decode_boxes,
            teacher_head=lambda features, *, branch, start: teacher.head(
                *variables, features, branch=branch, start=start
            ),
            assign=lambda targets: of_compared(jax.lax.stop_gradient(student.loss(whole, targets)[1])),
        )
        values = method.apply(params[name], context)
        terms |= {f"{name}/{term}": value for term, value in values.items()}
    return terms


def weights_of(methods: Mapping[str, api.Method], step) -> dict:
    """The weight of every term at a step: {"method/term": f32[]}."""
    return {f"{name}/{term}": w * m.scale(step) for name, m in methods.items() for term, w in m.weights.items()}


def make_step(
    student,
    optimizer: optax.GradientTransformation,
    ema_rate: Callable,
    *,
    teacher=None,
    methods: Mapping[str, api.Method] = {},
) -> Callable:
    """The update of a student, with a teacher and methods or without: a supervised run and the twin, one program.

    Args:
      student, teacher: Detectors.
      optimizer: of `state.params`.
      ema_rate: step -> share of the new weights in the moving average.
      methods: by name; none without a teacher.

    Returns:
      (state, teacher variables or None, batch) -> (state, metrics). Metrics are f32[]: the detection losses, the
      unweighted terms as "method/term", "total", "grad_norm" and "finite" (1 or 0). A step whose total or gradient is
      not finite changes nothing but the counter.
    """

    def loss(params, stats, variables, batch, step, key):
        output, stats = student.apply(params["student"], stats, student.preprocess(batch["image"]), train=True)
        losses, assignment = student.loss(output, targets_of(batch))
        total = sum(losses.values())
        if methods:
            weights = weights_of(methods, step)
            terms = compare(
                student, teacher, methods, params["adapters"], variables, output, assignment, batch, step, key
            )
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
