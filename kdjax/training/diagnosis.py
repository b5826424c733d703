"""Repeats a step that went wrong from its recorded inputs, and finds what began it: array, image, level, term."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from kdjax import sharding
from kdjax.distill.teachers import RECORDED
from kdjax.errors import UserError, prefix
from kdjax.structs import Array, DetectorOutput, PyTree, Rows, targets_of
from kdjax.training import checks, replay
from kdjax.training.blackbox import Recorded, filled
from kdjax.training.config import Config
from kdjax.training.models import in_precision, precision
from kdjax.training.provenance import environment
from kdjax.training.setup import Setup, bounds, given, placed, run_fingerprint, train_batches
from kdjax.training.step import SOUND, UNLABELLED, TrainState
from kdjax.training.teachers import distiller_in_precision, together
from kdjax.weights.checkpoint import flat

SHOWN = 4  # names in a line


class Diagnosis(NamedTuple):
    """What is wrong with a step of a role; names are of arrays, "neck.1", "rows.logits of level 2"."""

    role: str
    differs: list[str]  # metrics that are not those of the recorded step, to the bit; empty: it repeats
    state: list[str]  # arrays of the state that are not finite
    teacher: list[str]  # arrays of the teachers' variables that are not finite
    batch: dict[int, list[str]]  # of rows of the batch, from 0: arrays that are not finite
    images: list[int]  # rows with which alone the step goes wrong, if not all do
    images_unlabelled: list[int]  # likewise of the images without labels
    by_image: dict[int, list[str]]  # of these rows: losses and terms that are not finite (above a bound: the largest)
    output: list[str]  # of the student's output: arrays that are not finite, in the order in which they are computed
    terms: list[str]  # losses and terms whose value is not finite
    gradients: dict[str, list[str]]  # of each loss and term: arrays of the output where its gradient is not finite
    parameters: list[str]  # parameters whose gradient is not finite

    @property
    def began(self) -> str:
        """What comes first in the computation, in words."""
        of_image = f" in image {_numbered(self.images)}" if self.images else ""
        if self.state:
            return f"in the state: {_named(self.state)} is not finite before the step"
        if self.teacher:
            return f"in the teacher: {_named(self.teacher)} is not finite"
        if self.batch:
            names = dict.fromkeys(name for names in self.batch.values() for name in names)
            return f"in the batch: image {_numbered(self.batch)} has {_named([*names])} that is not finite"
        if self.images_unlabelled:
            return f"in image {_numbered(self.images_unlabelled)} without labels"
        if self.output:
            return f"in the student's output{of_image}: {self.output[0]} is the first that is not finite"
        if self.terms:
            levels = [level for term in self.terms for level in self.gradients.get(term, ())]
            at = f", at {_named(levels)}" if levels else ""
            return f"in the term {_named(self.terms)}{of_image}{at}"
        if self.gradients:
            levels = dict.fromkeys(level for found in self.gradients.values() for level in found)
            return f"in the gradient of {_named([*self.gradients])}{of_image}, at {_named([*levels])}"
        if self.parameters:
            return f"in the gradient of the parameters{of_image}, first {_named(self.parameters)}"
        if self.images:
            return f"with image {_numbered(self.images)}"
        return "with no image, level or term alone"


def setup_of(recorded: Recorded) -> tuple[Setup, list[str]]:
    """The setup of the run that recorded a step.

    Args:
      recorded: the step.

    Returns:
      The setup, and what of versions and devices has changed since.

    Raises:
      UserError: the config, data or weights cannot be used any more, or are others.
    """
    config = cast(Config, ConfigDict(recorded.config))
    setup = checks.checked(config)
    for name, value in run_fingerprint(setup).items():
        if recorded.run.get(name) != value:
            raise UserError(
                f"the step was recorded with other inputs: {name} was {recorded.run.get(name)!r}, is {value!r}: run "
                "this where the run was started, with its data and weights"
            )
    now = environment()
    return setup, [f"{name} was {old}, is {now.get(name)}" for name, old in recorded.environment.items()
                   if now.get(name) != old]  # fmt: skip


def diagnose(setup: Setup, recorded: Recorded) -> list[Diagnosis]:
    """Repeats a step of all roles that went wrong, and finds what began it.

    Args:
      setup: of `setup_of`.
      recorded: the step.

    Returns:
      What was found, by role.

    Raises:
      UserError: the arrays of the step are not those that the run has today.
    """
    stored = replay.ready(setup)
    with contextlib.closing(
        train_batches(setup, start_step=recorded.step - 1, attach=replay.attach(setup, stored))
    ) as batches:
        like = placed(setup, next(batches))
    batch = filled(like, recorded.batch, "the batch")
    return [_of_role(setup, recorded, role, batch) for role in recorded.roles]


def _of_role(setup: Setup, recorded: Recorded, role: str, whole: Mapping[str, Any]) -> Diagnosis:
    arrays = {name.removeprefix(f"{role}/"): a for name, a in recorded.state.items() if name.startswith(f"{role}/")}
    state: TrainState = filled(setup.states[role], arrays, "the state")
    most = bounds(setup.config)
    variables, batch = given(setup, role, whole)
    total = None if UNLABELLED in batch else 1 + len(batch["image"])  # the whole batch, and each image alone
    bar = tqdm(total=total, desc=f"replay of the {role}", unit="step", disable=jax.process_index() > 0)

    def step(batch: Mapping[str, Any]) -> dict[str, float]:
        """The metrics of the step with a batch on the host."""
        rows = jax.tree.map(lambda value: sharding.split(value, setup.mesh), dict(batch))
        rows[SOUND] = sharding.replicate(np.float32(1), setup.mesh)
        _, metrics = setup.steps[role](setup.layout.put(jax.tree.map(np.array, state)), variables, rows)  # it donates
        found = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bar.update()
        return found

    def wrong(metrics: Mapping[str, float]) -> list[str]:
        bad = [name for name, value in metrics.items() if not np.isfinite(value)]
        return bad or [name for name, bound in most.items() if not metrics[name] <= bound]

    before = {name.removeprefix(f"{role}/"): v for name, v in recorded.metrics.items() if name.startswith(f"{role}/")}
    now = step(batch)
    differs = [
        f"{name} was {value!r}, is {now.get(name)!r}"
        for name, value in before.items()
        if not np.array_equal(np.float32(value), np.float32(now.get(name, np.nan)), equal_nan=name in now)
    ]
    images, unlabelled, alone = _images_alone(batch, step, wrong)
    bar.close()
    weights = _weights(setup, role, recorded.step - 1)
    names = [name for name in now if name not in ("total", "grad_norm", "finite")]
    found = _examined(setup, role, state, variables, batch, names, weights)
    return Diagnosis(
        role,
        differs,
        _not_finite(state._asdict()),
        _not_finite(variables) if role == "student" else [],
        _rows_not_finite(batch),
        images,
        unlabelled,
        {row: _culprits(alone[row], weights) for row in images},
        *found,
    )


def _weights(setup: Setup, role: str, step: int) -> dict[str, float]:
    """The weights of the terms at a step."""
    if setup.distiller is None or role != "student":
        return {}
    with sharding.on_host():
        return {name: float(weight) for name, weight in setup.distiller.weights(step).items()}


def _culprits(metrics: Mapping[str, float], weights: Mapping[str, float]) -> list[str]:
    """The losses that are not finite; else the one that adds most to the total."""
    losses = {name: value for name, value in metrics.items() if name not in ("total", "grad_norm", "finite")}
    bad = [name for name, value in losses.items() if not np.isfinite(value)]
    if bad or not np.isfinite(metrics["grad_norm"]):
        return bad
    largest = max(losses, key=lambda name: losses[name] * weights.get(name, 1.0))
    return [f"{largest} ({losses[largest]:.4g})"]


def _images_alone(
    batch: Mapping[str, Any],
    step: Callable[[Mapping[str, Any]], dict[str, float]],
    wrong: Callable[[Mapping[str, float]], list[str]],
) -> tuple[list[int], list[int], dict[int, dict[str, float]]]:
    """The rows with which alone the step goes wrong: each fills the batch, so that the program is the same.

    Returns:
      These rows, those of the images without labels, and the metrics of the former; no rows if all go wrong, or none.
    """
    labelled = {name: value for name, value in batch.items() if name != UNLABELLED}
    more = batch.get(UNLABELLED)

    def filled_with(tree: PyTree, row: int) -> PyTree:
        return jax.tree.map(lambda value: np.repeat(np.asarray(value)[row : row + 1], len(value), axis=0), tree)

    def metrics_of(row: int, other: int) -> dict[str, float]:
        beside = {} if more is None else {UNLABELLED: filled_with(more, other)}
        return step(filled_with(labelled, row) | beside)

    size, others = len(batch["image"]), 1 if more is None else len(more["image"])
    for other in range(others):  # a good one beside the labelled images
        metrics = {row: metrics_of(row, other) for row in range(size)}
        bad = [row for row in metrics if wrong(metrics[row])]
        if len(bad) < size:
            break
    else:
        return [], [], {}
    good = next(row for row in metrics if row not in bad)
    bad_others = [] if more is None else [row for row in range(others) if wrong(metrics_of(good, row))]
    return bad, bad_others, {row: metrics[row] for row in bad}


def _examined(
    setup: Setup,
    role: str,
    state: TrainState,
    variables: PyTree,
    batch: Mapping[str, Any],
    names: Sequence[str],
    weights: Mapping[str, float],
) -> tuple[list[str], list[str], dict[str, list[str]], list[str]]:
    """`output`, `terms`, `gradients` and `parameters` of `Diagnosis`, of the labelled images."""
    config = setup.config
    student = in_precision(setup.student, precision(config))
    distiller = None
    if role == "student":
        distiller, _ = together([one._replace(distiller=distiller_in_precision(one, config)) for one in setup.teachers])

    def examine(factors: Mapping[str, float]) -> Callable[..., PyTree]:
        """The program for the sum of some losses alone: a factor of 0 would let through what is not finite."""

        def examined(state: TrainState, variables: PyTree, batch: Mapping[str, Any]) -> PyTree:
            key = jax.random.fold_in(state.key, state.step)

            def forward(params: PyTree) -> DetectorOutput:
                return student.apply(params["student"], state.stats, student.preprocess(batch["image"]), train=True)[0]

            def losses(params: PyTree, output: DetectorOutput) -> tuple[Array, dict[str, Array]]:
                assignment = student.assign(output, targets_of(batch), key)
                values = dict(student.loss(output, targets_of(batch), assignment))
                if distiller is not None:
                    values |= distiller.terms(
                        params["adapters"],
                        output,
                        batch,
                        variables,
                        observed=batch.get(RECORDED),
                        assignment=assignment,
                        key=key,
                    )
                return jnp.asarray(sum(factor * values[name] for name, factor in factors.items())), values

            output, back = jax.vjp(forward, state.params)
            _, of_losses, values = jax.vjp(losses, state.params, output, has_aux=True)
            of_params, of_output = of_losses(jnp.float32(1))
            (through_output,) = back(of_output)
            params = jax.tree.map(jnp.add, of_params, through_output)
            return values, _levels(output), _levels(of_output), jax.tree.map(_count, params)

        return jax.jit(setup.layout.gathering(examined))

    rows = jax.tree.map(lambda value: sharding.split(value, setup.mesh), dict(batch))
    rows.pop(UNLABELLED, None)
    state = setup.layout.put(state)

    def asked(factors: Mapping[str, float]) -> PyTree:
        return jax.device_get(examine(factors)(state, variables, rows))

    values, output, of_output, parameters = asked({name: weights.get(name, 1.0) for name in names})
    bad_output = [name for name, count in output if count]
    terms = [name for name in names if not np.isfinite(values[name])]
    bad_parameters = [name for name, count in flat(parameters).items() if count]
    gradients: dict[str, list[str]] = {}
    # Behind an output that is not finite nothing is. One program for each loss, so only where it can tell something.
    if not bad_output and any(count for _, count in of_output):
        for name in terms or names:
            if found := [level for level, count in asked({name: 1.0})[2] if count]:
                gradients[name] = found
    return bad_output, terms, gradients, bad_parameters


def _count(value: Array) -> Array:
    """How many numbers of an array are not finite; i32[]."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return jnp.int32(0)
    return jnp.sum(~jnp.isfinite(value), dtype=jnp.int32)


# Fields of `DetectorOutput` and of `Rows` that are arrays, in the order in which they are computed.
_FIELDS = ("backbone", "neck_conv", "neck", "cls_tower", "reg_tower", "kernels", "prototypes", "selected", "first",
           "layers", "quality", "cls_logits", "box_reg", "rows")  # fmt: skip


@jax.tree_util.register_static
class _Name(str):
    """A name inside a tree of arrays."""


def _levels(output: DetectorOutput) -> list[tuple[_Name, Array]]:
    """How many numbers are not finite in each array of an output, by level, in the order of computation."""
    return [(_Name(name), _count(value)) for name, value in _arrays(output)]


def _arrays(output: DetectorOutput) -> Iterator[tuple[str, Array]]:
    for field in _FIELDS:
        value = getattr(output, field)
        if isinstance(value, Rows):
            yield from _arrays_of_rows(value)
            continue
        for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
            yield ".".join([field, *jax.tree_util.keystr(path, simple=True, separator=".").split(".")]).strip("."), leaf


def _arrays_of_rows(rows: Rows) -> Iterator[tuple[str, Array]]:
    for name in ("logits", "boxes", "quality", "distribution"):
        value = getattr(rows, name)
        if value is None:
            continue
        if not rows.level_sizes:
            yield f"rows.{name}", value
        start = 0
        for level, size in enumerate(rows.level_sizes):
            yield f"rows.{name} of level {level}", value[:, start : start + size]
            start += size


def _not_finite(tree: PyTree) -> list[str]:
    """The names of the arrays that hold numbers that are not finite."""
    found = flat(sharding.gather(tree))
    return [name for name, value in found.items() if _is_float(value) and not np.isfinite(_wide(value)).all()]


def _rows_not_finite(batch: Mapping[str, Any]) -> dict[int, list[str]]:
    """Of the rows of a batch with numbers that are not finite: the names of these arrays."""
    found: dict[int, list[str]] = {}
    arrays = flat({name: value for name, value in batch.items() if name != UNLABELLED})
    for name, value in arrays.items():
        if _is_float(value):
            for row in np.flatnonzero(~np.isfinite(_wide(value)).reshape(len(value), -1).all(axis=1)):
                found.setdefault(int(row), []).append(name.replace("/", "."))
    return found


def _is_float(value: np.ndarray) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.floating))


def _wide(value: np.ndarray) -> np.ndarray:
    """NumPy itself knows no bfloat16."""
    return value.astype(np.float32) if value.dtype.itemsize < 4 else value


def _named(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names[:SHOWN])) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _numbered(rows: Sequence[int] | Mapping[int, Any]) -> str:
    return _named([str(row) for row in rows])


def lines(found: Diagnosis, recorded: Recorded) -> list[str]:
    """What was found, for the terminal.

    Args:
      found: of a role.
      recorded: the step.
    """
    role, step = found.role, recorded.step
    shown = ", ".join(f"{name} {recorded.metrics[f'{role}/{name}']:.6g}" for name in ("total", "grad_norm"))
    if found.differs:
        text = [f"step {step} of the {role} does not repeat: {_named(found.differs)}"]
    else:
        text = [f"step {step} of the {role} repeats to the bit: {shown}"]
    text.append(f"it began {found.began}")
    rows, more = recorded.images[""], recorded.images.get(UNLABELLED, [])
    for row in dict.fromkeys([*found.images, *found.batch]):
        losses = found.by_image.get(row)
        text.append(f"image {row} of the batch: {_of_row(rows[row])}" + (f": {_named(losses)}" if losses else ""))
    text += [f"image {row} of those without labels: {_of_row(more[row])}" for row in found.images_unlabelled]
    sums = {
        "state, not finite": found.state,
        "teacher, not finite": found.teacher,
        "student's output, not finite": found.output,
        "losses and terms, not finite": found.terms,
        "gradients, not finite": [f"of {name} at {_named(levels)}" for name, levels in found.gradients.items()],
        "gradients of parameters, not finite": found.parameters,
    }
    return text + [f"{what}: {_named(names)}" for what, names in sums.items() if names]


def _of_row(row: Mapping[str, Any]) -> str:
    """The images that a row is made of."""
    both = zip(row["files"], row["image_ids"], strict=True)
    first, *others = [f"{file or '(no name)'} (id {number})" for file, number in both]
    return first + (f", with {', '.join(others)}" if others else "")


def replay_folder(folder: str | Path, recorded: Recorded) -> tuple[list[Diagnosis], list[str]]:
    """Repeats the step of a folder, and tells what began it.

    Args:
      folder: WORKDIR/blackbox/step-N, for the message.
      recorded: what `blackbox.read` found there.

    Returns:
      What was found by role, and the lines for the terminal.

    Raises:
      UserError: it cannot be repeated here.
    """
    with prefix(str(folder)):
        setup, changed = setup_of(recorded)
        found = diagnose(setup, recorded)
    text = [f"other than when it was recorded: {'; '.join(changed)}"] if changed else []
    return found, text + [line for one in found for line in lines(one, recorded)]
