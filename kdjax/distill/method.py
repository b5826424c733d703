"""The interface of a distillation method, and the small tools that the method files share.

A method is two functions, its weights and the taps that it reads (`Method`). `make(**options)` in
`kdjax/methods/<name>.py` builds it. Methods see student and teacher only through `Context`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax.numpy as jnp

from kdjax.distill.taps import Reads
from kdjax.errors import UserError
from kdjax.structs import AnyArray, Array, Assignment, DetectorOutput, Targets

Params = Mapping[str, Any]  # what a method trains beside the student: nested dicts of arrays


class PairedRows(Protocol):
    """`kdjax.structs.Rows` as a method sees them: what it declares is there, the rest is None."""

    logits: Array  # f32[B, P, K], or with `form` "softmax" f32[B, P, K + 1], the background last
    boxes: Array  # f32[B, P, 4]
    quality: Array  # f32[B, P]
    distribution: Array  # f32[B, P, 4, n + 1]
    location: Array  # f32[P, 4], or f32[B, P, 4] where rows are paired by index or are regions
    level_sizes: tuple[int, ...]
    form: Literal["sigmoid", "softmax"]  # what turns the logits into scores; "softmax" means that rows are regions


class Proposals(NamedTuple):
    """What both second stages say about the P regions that the teacher proposes."""

    student: PairedRows  # logits, boxes, location
    teacher: PairedRows  # without gradient
    assignment: Assignment  # to the ground truth, at an IoU of 0.5; `ignore` where there are fewer than P proposals


class Context(NamedTuple):
    """All that a method may look at in one step; what it does not declare in `Method.reads` is None or empty.

    Row i of `student_rows` is paired with row i of `teacher_rows`; `assignment` is in the same order.
    """

    student: DetectorOutput  # both have the levels that they share
    teacher: DetectorOutput  # without gradient
    student_rows: PairedRows  # P paired rows
    teacher_rows: PairedRows
    targets: Targets
    assignment: Assignment  # of the student's assigner; rows without a partner are ignored
    key: Array  # PRNG key of this step and method
    # Of methods that read "head": (features by level, *, branch, start) -> predictions by level, of the teacher's head
    # with its frozen weights.
    teacher_head: Callable[..., tuple[Array, ...]]
    # Of methods that read "head": (predictions by level in the form of `DetectorOutput.box_reg`) -> boxes f32[B, N, 4].
    teacher_boxes: Callable[[tuple[Array, ...]], Array]
    # Of methods that read "assignment": the student's assigner, without gradient, for targets that the method chooses;
    # regions are not drawn again, but matched at an IoU of 0.5.
    assign: Callable[[Targets], Assignment]
    proposals: Proposals  # of methods that read "proposals"
    # Of methods that read "loss": the student's own losses, {name: f32[]}, for targets that the method chooses: its
    # assigner decides anew what each row learns. Without denoising queries and without masks.
    loss: Callable[[Targets], Mapping[str, Array]]
    # Of methods that read "loss": all of the student's rows, paired or not, and what each learns then; of a student
    # with two stages the regions that it draws for these targets.
    learned: Callable[[Targets], tuple[PairedRows, Assignment]]


class Method(NamedTuple):
    """A published set of terms; `scale(step) * weights[term] * apply(...)[term]` is added to the detection loss."""

    # (key, student spec, teacher spec) -> params; specs are DetectorOutputs of jax.ShapeDtypeStruct
    init: Callable[[Array, DetectorOutput, DetectorOutput], Params]
    apply: Callable[[Any, Context], Mapping[str, Array]]  # (params, context) -> {term: f32[], unweighted}
    weights: Mapping[str, float]  # full weight of each term; `kdjax.methods.build` leaves out terms of weight 0
    reads: Reads
    scale: Callable[[AnyArray | int], Array | float] = lambda step: 1.0  # step i32[] -> f32[] in 0 .. 1, the schedule
    name: str = ""
    # Why the method has no meaning for detectors with two stages, the rest of a sentence; "": it has one.
    one_stage: str = ""
    # Why the method needs priors on a grid, which a transformer has not, the rest of a sentence; "": it does not.
    grid: str = ""


def schedule(*, start: int = 0, stop: int = 0, warmup: int = 0, decay: int = 0) -> Callable[[AnyArray | int], Array]:
    """The share of its weight that a method has at a step: 0 before `start`, rising over `warmup`, 0 from `stop` on.

    Args:
      start: first step (optimiser updates) with a weight above zero.
      stop: first step without the method; 0 means never.
      warmup: number of steps after `start` in which the weight rises linearly from 1/warmup to 1.
      decay: number of steps before `stop` in which the weight falls linearly to 0; needs `stop`.

    Returns:
      A function step i32[] -> f32[] in 0 .. 1.

    Raises:
      UserError: negative numbers, `stop` not after `start`, or `decay` without `stop`.
    """
    if min(start, stop, warmup, decay) < 0 or (stop and stop <= start) or (decay and not stop):
        raise UserError(
            f"schedule start={start} stop={stop} warmup={warmup} decay={decay}: not possible: all must be >= 0, stop "
            "(0 means never) must come after start, and decay needs a stop"
        )

    def scale(step: AnyArray | int) -> Array:
        step = jnp.asarray(step, jnp.float32)
        share = jnp.where(step >= start, 1.0, 0.0)
        if warmup:
            share *= jnp.clip((step - start + 1) / warmup, 0.0, 1.0)
        if decay:
            share *= jnp.clip((stop - step) / decay, 0.0, 1.0)
        if stop:
            share *= jnp.where(step < stop, 1.0, 0.0)
        return share

    return scale


def guided_weight(
    weight: AnyArray | float,
    share: AnyArray | float,
    *,
    target: float,
    tolerance: float,
    default: float,
    plain: AnyArray | bool = False,
) -> Array:
    """The next weight of a method, so that its share of the gradient comes near a target (GAM of RT-DETRv4).

    A share p outside `target` -+ `tolerance` calls for the bound t on the other side of the target:

        w <- w clip(t (1 - p) / (p (1 - t)), 1/10, 10)

    Args:
      weight: w, > 0, in use.
      share: p, 0 .. 1, of the sum of the gradient's absolute values that lies in the parameters that the method acts
        on, a mean over the steps since the last call.
      target: of that share, 0 .. 1.
      tolerance: within which the weight stays as it is.
      default: the weight while the share is 0.
      plain: whether the run is in its last phase, without augmentation, which has the default weight.

    Returns:
      f32[...], > 0.

    Peers: RT-DETRv4's `det_solver`, once an epoch; there all are percentages.
    Reference: Liao et al., "RT-DETRv4", 2025.

    Example:
      >>> round(float(guided_weight(5.0, 0.005, target=0.02, tolerance=0.001, default=20.0)), 3)
      21.343
    """
    share = jnp.asarray(share, jnp.float32)
    wanted = jnp.where(share < target, target + tolerance, target - tolerance)
    known = share > 1e-8
    factor = wanted * (1 - share) / (jnp.where(known, share, 1) * (1 - wanted))
    inside = (share >= target - tolerance) & (share <= target + tolerance)
    new = weight * jnp.where(inside, 1.0, jnp.clip(factor, 0.1, 10.0))
    return jnp.where(known & ~jnp.asarray(plain), new, default)


def check_choice(option: str, value: str | int | None, choices: tuple[str | int | None, ...]) -> None:
    """Checks that the value of an option ("method: option") is one of its choices.

    Raises:
      UserError: it is not; the message lists the choices.
    """
    if value not in choices:
        raise UserError(f"{option} is {value!r}: it must be one of {', '.join(map(repr, choices))}")


def check(option: str, value: float | str | Sequence[float], possible: bool, range_: str) -> None:
    """Checks that the value of an option ("method: option") is in its range.

    Raises:
      UserError: `possible` is False; the message names option, value and range.
    """
    if not possible:
        raise UserError(f"{option} is {value}: it must be {range_}")


def check_head(name: str, chosen: str | None, student_spec: DetectorOutput) -> None:
    """Checks an option `head`: regions have softmax scores.

    Raises:
      UserError: "sigmoid" was chosen for regions.
    """
    rows = student_spec.rows
    if chosen == "sigmoid" and rows is not None and rows.form == "softmax":
        raise UserError(f"{name}: head is 'sigmoid', but the student's regions have softmax scores: leave head out")


def compared_rows(rows: PairedRows, assignment: Assignment) -> Array:
    """The rows that have a target class, bool[B, P]: all regions, with those of the background, or positive priors."""
    return ~assignment.ignore if rows.form == "softmax" else assignment.positive


def mean_over_positives(values: Array, positive: Array) -> Array:
    """The sum of f32[B, N] over the positive rows of the batch, divided by their number (at least 1)."""
    return jnp.sum(jnp.where(positive, values, 0.0)) / jnp.maximum(jnp.sum(positive), 1)


def mean_over_levels(values: Sequence[Array]) -> Array:
    """The mean of one scalar per level."""
    return jnp.asarray(sum(values) / len(values))


def sum_over_levels(values: Iterable[Array]) -> Array:
    """The sum of one array per level."""
    return jnp.asarray(sum(values))
