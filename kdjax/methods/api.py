"""What a distillation method is, and the few tools that the method files share.

A method is two functions and its weights (`Method`). `make(**options)` in `kdjax/methods/<name>.py` builds it; the
name in the config is the name of the file. Methods see detectors only through `Context`.
"""

import dataclasses
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kdjax import nn
from kdjax.structs import Array, Assignment, DetectorOutput, Targets


class Context(NamedTuple):
    """All that a method may look at in one step."""

    student: DetectorOutput  # both have the levels that they share
    teacher: DetectorOutput  # its gradients are stopped, once, in train/step.py
    targets: Targets
    assignment: Assignment  # what the student's own assigner decided
    step: Array  # i32[], optimiser updates so far
    key: Array  # PRNG key of this step and method
    priors: Array  # f32[N, 4], x, y, stride_w, stride_h of the student's priors
    decode_student: Callable[[DetectorOutput], Array]  # output -> boxes f32[B, N, 4]
    decode_teacher: Callable[[DetectorOutput], Array]
    teacher_head: (
        Callable  # (features by level, *, branch, start) -> predictions by level; the teacher's frozen weights
    )
    # The student's own assigner, without gradient; methods that choose boxes of their own give them as targets.
    assign: Callable[[Targets], Assignment]


class Method(NamedTuple):
    """A published set of terms; `scale(step) * weights[term] * apply(...)[term]` is added to the detection loss."""

    init: Callable  # (key, student specs, teacher specs) -> params; specs are DetectorOutputs of ShapeDtypeStructs
    apply: Callable  # (params, Context) -> {term: f32[], unweighted}
    weights: Mapping[str, float]  # full weight of each term; a term of weight 0 is not declared (see `build`)
    scale: Callable = lambda step: 1.0  # step i32[] -> f32[] in 0 .. 1; `build` puts the schedule here


class Pair(NamedTuple):
    """One level of a tap on both sides; arrays or shape specs f32[B, H, W, C]."""

    stride: int
    student: Array
    teacher: Array


def names() -> list[str]:
    """The methods that exist: the files beside this one."""
    package = importlib.import_module("kdjax.methods")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "api")


def options(name: str) -> dict:
    """The options of a method with their defaults: those of its `make`, and those of `schedule`.

    Raises:
      ValueError: there is no method of that name.
    """
    if name not in names():
        raise ValueError(f"there is no method {name!r} (config.methods); the methods are: {', '.join(names())}")
    make = importlib.import_module(f"kdjax.methods.{name}").make
    return {k: p.default for f in (make, schedule) for k, p in inspect.signature(f).parameters.items()}


def build(name: str, **chosen) -> Method:
    """Makes the method `name` with the chosen options and its schedule; terms of weight 0 are left out.

    Raises:
      ValueError: unknown method or option; the valid ones are listed.
    """
    valid = options(name)
    unknown = sorted(set(chosen) - set(valid))
    if unknown:
        raise ValueError(f"config.methods.{name} has no option {unknown[0]!r}; its options are: {', '.join(valid)}")
    times = {k: chosen.pop(k) for k in inspect.signature(schedule).parameters if k in chosen}
    method = importlib.import_module(f"kdjax.methods.{name}").make(**chosen)
    weights = {term: float(weight) for term, weight in method.weights.items() if weight}
    return method._replace(weights=weights, scale=schedule(**times))


def shared_levels(student: DetectorOutput, teacher: DetectorOutput) -> tuple[DetectorOutput, DetectorOutput]:
    """Both outputs, arrays or shape specs, cut to the finest levels that both have, so that priors pair by location.

    Where the finest levels differ, both stay as they are: their maps still pair by stride.
    """
    same = [a == b for a, b in zip(student.strides, teacher.strides, strict=False)]
    count = same.index(False) if False in same else len(same)
    return (_cut(student, count), _cut(teacher, count)) if count else (student, teacher)


def _cut(output: DetectorOutput, count: int) -> DetectorOutput:
    fields = ("neck", "neck_conv", "cls_logits", "box_reg", "quality")
    cut = {field: getattr(output, field)[:count] for field in fields}
    cut |= {field: tuple(levels[:count] for levels in getattr(output, field)) for field in ("cls_tower", "reg_tower")}
    return dataclasses.replace(output, strides=output.strides[:count], **cut)


def count_priors(output: DetectorOutput) -> int:
    """How many priors an output has: those of every cell of its levels."""
    return sum(m.shape[1] * m.shape[2] for m in output.cls_logits) * output.anchors


def refusal(name: str, student: DetectorOutput, teacher: DetectorOutput) -> str:
    """The sentence with which a method, with its default options, refuses a pair of specs; "" if it runs on it."""
    method, pair = build(name), shared_levels(student, teacher)
    try:
        jax.eval_shape(lambda key: method.init(key, *pair), jax.ShapeDtypeStruct((2,), jnp.uint32))
    except ValueError as error:
        return str(error)
    return ""


def schedule(*, start: int = 0, stop: int = 0, warmup: int = 0, decay: int = 0) -> Callable:
    """The share of its weight that a method has at a step: 0 before `start`, rising over `warmup`, 0 from `stop` on.

    Args:
      start: first step (optimiser updates) with a weight above zero.
      stop: first step without the method; 0 means never.
      warmup: number of steps after `start` in which the weight rises linearly from 1/warmup to 1.
      decay: number of steps before `stop` in which the weight falls linearly to 0; needs `stop`.

    Returns:
      A function step i32[] -> f32[] in 0 .. 1.

    Raises:
      ValueError: negative numbers, `stop` not after `start`, or `decay` without `stop`.
    """
    if min(start, stop, warmup, decay) < 0 or (stop and stop <= start) or (decay and not stop):
        raise ValueError(
            f"the schedule start={start} stop={stop} warmup={warmup} decay={decay} of a method is not possible: "
            "all must be >= 0, stop (0 is never) after start, and decay needs a stop"
        )

    def scale(step):
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


def tap(output: DetectorOutput, name: str) -> dict[int, Array]:
    """The maps of a named place, by stride.

    Args:
      output: arrays or shape specs.
      name: a field of `DetectorOutput` that runs over levels ("neck", "cls_logits"), a tower with the number of its
        convolution from 0 ("cls_tower.1"), or levels of a field, counted fine to coarse: one ("backbone.2"), or those
        from one to before another ("neck.0:3", the first three).

    Raises:
      ValueError: no such tap; the valid ones are listed.
    """
    field, _, index = name.partition(".")
    valid, (first, several, last) = taps(output), index.partition(":")
    if several and first.isdigit() and last.isdigit() and field in valid:
        parts = [f"{field}.{i}" for i in range(int(first), int(last))]
        if parts and set(parts) <= set(valid):
            return {stride: level for part in parts for stride, level in tap(output, part).items()}
    if name not in valid:
        raise ValueError(f"there is no tap {name!r} on this detector; its taps are: {', '.join(valid)}")
    strides = output.backbone_strides if field == "backbone" else output.strides
    levels = getattr(output, field)
    if field in ("cls_tower", "reg_tower"):
        levels = levels[int(index)]
    elif index:
        strides, levels = (strides[int(index)],), (levels[int(index)],)
    return dict(zip(strides, levels, strict=True))


def taps(output: DetectorOutput) -> list[str]:
    """Every name that `tap` understands for this output, but for those of several levels."""
    found = []
    for field in ("backbone", "neck", "neck_conv", "cls_logits", "box_reg", "quality"):
        levels = getattr(output, field)
        if levels:
            found += [field, *(f"{field}.{i}" for i in range(len(levels)))]
    for field in ("cls_tower", "reg_tower"):
        found += [f"{field}.{i}" for i in range(len(getattr(output, field)))]
    return found


def pair(student: DetectorOutput, teacher: DetectorOutput, student_tap: str, teacher_tap: str = "") -> list[Pair]:
    """Pairs the levels of two taps by stride, fine to coarse; `teacher_tap` is `student_tap` if not given.

    Raises:
      ValueError: a tap does not exist, or the two have no stride in common.
    """
    teacher_tap = teacher_tap or student_tap
    of_student, of_teacher = tap(student, student_tap), tap(teacher, teacher_tap)
    common = sorted(set(of_student) & set(of_teacher))
    if not common:
        raise ValueError(
            f"the taps {student_tap!r} (student, strides {sorted(of_student)}) and {teacher_tap!r} (teacher, strides "
            f"{sorted(of_teacher)}) have no stride in common, so no level can be compared"
        )
    return [Pair(stride, of_student[stride], of_teacher[stride]) for stride in common]


def init_conv(
    key, kernel_size: int, inputs: int, outputs: int, *, bias: bool = True, deviation: float | None = None
) -> dict:
    """Parameters of a convolution: kernel and bias uniform in +-1/sqrt(fan in), the usual default of such adapters.

    With a `deviation`, the kernel is normal with it and the bias 0.
    """
    limit = 1 / math.sqrt(kernel_size * kernel_size * inputs)
    key_kernel, key_bias = jax.random.split(key)
    shape = (kernel_size, kernel_size, inputs, outputs)
    if deviation is not None:
        kernel = deviation * jax.random.normal(key_kernel, shape, jnp.float32)
        return {"kernel": kernel} | ({"bias": jnp.zeros(outputs)} if bias else {})
    params = {"kernel": jax.random.uniform(key_kernel, shape, jnp.float32, -limit, limit)}
    if bias:
        params["bias"] = jax.random.uniform(key_bias, (outputs,), jnp.float32, -limit, limit)
    return params


def init_adapters(
    key,
    pairs: list[Pair],
    *,
    kernel_size: int = 1,
    bias: bool = True,
    always: bool = False,
    deviation: float | None = None,
) -> dict:
    """One convolution a level that takes the student's channels to the teacher's: {stride: params}.

    A level whose channels agree gets none (identity), unless `always`. Adapters are trained with the student and never
    handed out. Also checks that the maps of a pair can be compared (see `adapt`). `deviation`: see `init_conv`.
    """
    params = {}
    for stride, student, teacher in pairs:
        check_sizes(stride, student.shape, teacher.shape)
        if always or student.shape[-1] != teacher.shape[-1]:
            params[str(stride)] = init_conv(
                jax.random.fold_in(key, stride),
                kernel_size,
                student.shape[-1],
                teacher.shape[-1],
                bias=bias,
                deviation=deviation,
            )
    return params


def init_generators(key, pairs: list[Pair]) -> dict:
    """Parameters of MGD's generator for each level, on the teacher's channels: {stride: for `generation.generate`}.

    The key may be the one that `init_adapters` gets.
    """
    key = jax.random.fold_in(key, 0)  # no stride is 0: another branch than the adapters'
    params = {}
    for stride, _, teacher in pairs:
        channels = teacher.shape[-1]
        keys = jax.random.split(jax.random.fold_in(key, stride))
        params[str(stride)] = {
            name: init_conv(k, 3, channels, channels) for name, k in zip(("first", "second"), keys, strict=True)
        }
    return params


def adapt(params: dict, pairs: list[Pair]) -> list[Pair]:
    """The pairs with the student's side brought to the teacher's channels and size, in float32.

    Another size is resized bilinearly, student to teacher, before the convolution (methods.md section 1.4).
    """
    adapted = []
    for stride, student, teacher in pairs:
        student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
        if student.shape[1:3] != teacher.shape[1:3]:
            student = nn.resize_bilinear(student, teacher.shape[1:3])
        if str(stride) in params:
            student = nn.conv2d(student, params[str(stride)]["kernel"], params[str(stride)].get("bias"))
        adapted.append(Pair(stride, student, teacher))
    return adapted


def check_sizes(stride: int, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    """Refuses two maps whose sides differ by more than a factor of 2, which no resampling makes comparable.

    Raises:
      ValueError: with both shapes.
    """
    for a, b in zip(student[1:3], teacher[1:3], strict=True):
        if max(a, b) > 2 * min(a, b):
            raise ValueError(
                f"at stride {stride} the student's map {student[1:3]} and the teacher's {teacher[1:3]} differ by more "
                "than a factor of 2; choose taps of like resolution"
            )


def check_choice(option: str, value, choices: tuple) -> None:
    """Refuses a value that an option ("method.option") does not have.

    Raises:
      ValueError: naming the values that it has.
    """
    if value not in choices:
        raise ValueError(f"config.methods.{option} is {value!r}; it must be one of {', '.join(map(repr, choices))}")


def check(option: str, value, possible: bool, range_: str) -> None:
    """Refuses a value that is out of the range of an option ("method.option").

    Raises:
      ValueError: unless `possible`: naming option, value and range.
    """
    if not possible:
        raise ValueError(f"config.methods.{option} is {value}; it must be {range_}")


def pair_priors(student: DetectorOutput, teacher: DetectorOutput, student_tap: str, teacher_tap: str) -> list[Pair]:
    """The pairs of two predictions that are compared prior by prior: levels, grids and channels must be the same.

    Raises:
      ValueError: a tap does not exist, or the predictions do not belong to the same priors and classes.
    """
    pairs = pair(student, teacher, student_tap, teacher_tap)
    sides = [
        {stride: tuple(m.shape[1:]) for stride, m in tap(output, name).items()}
        for output, name in ((student, student_tap), (teacher, teacher_tap))
    ]
    if sides[0] != sides[1] or set(sides[0]) != set(student.strides) or student.anchors != teacher.anchors:
        raise ValueError(
            f"predictions are compared prior by prior, which needs the same levels, grids, anchors and classes on both "
            f"sides; by stride, {student_tap!r} of the student is {sides[0]}, {teacher_tap!r} of the teacher {sides[1]}"
        )
    return pairs


def level_sizes(pairs: list[Pair], count: int) -> list[int]:
    """How many of the `count` priors belong to each level, the same number to every cell."""
    cells = [p.teacher.shape[1] * p.teacher.shape[2] for p in pairs]
    return [count // sum(cells) * n for n in cells]


def rows(maps: Sequence[Array], count: int) -> Array:
    """A prediction of all levels with one row a prior: L of f32[B, H, W, A*C] -> f32[B, count, C], in float32."""
    width = maps[0].shape[-1] * sum(m.shape[1] * m.shape[2] for m in maps) // count
    return jnp.concatenate([m.reshape(m.shape[0], -1, width) for m in maps], 1).astype(jnp.float32)


def row_pair(pairs: list[Pair], count: int) -> tuple[Array, Array]:
    """The student's and the teacher's `rows`."""
    return rows([p.student for p in pairs], count), rows([p.teacher for p in pairs], count)


def mean_over_positives(values: Array, positive: Array) -> Array:
    """The sum of f32[B, N] over the positive priors of the batch, divided by their number (at least 1)."""
    return jnp.sum(jnp.where(positive, values, 0.0)) / jnp.maximum(jnp.sum(positive), 1)


def mean_over_levels(values: list[Array]) -> Array:
    """The mean of one scalar a level."""
    return sum(values) / len(values)
