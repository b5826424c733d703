"""Taps: named feature maps and predictions of a detector, and the pairing of those of two detectors.

A tap is written `neck`, `backbone.2` (one level), `neck.0:3` (the first three levels), `cls_tower.1` (a convolution of
a tower, before its activation; `cls_tower.-2` counts from the end) or `rows.logits` (a field of the rows). The methods
declare the taps that they read (`Reads`).

The rows of a two-stage detector are regions, and their taps are `rows.logits`, `rows.boxes` and `rows.location`: what
its second stage says about the regions of the student's assignment. A method that reads `rows.location` and compares no
rows gets the anchors of the first stage there.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from kdjax.errors import UserError
from kdjax.structs import AnyArray, Array, DetectorOutput, Rows

LEVELS = ("backbone", "neck", "neck_conv", "cls_logits", "box_reg", "quality")  # fields that run over levels
TOWERS = ("cls_tower", "reg_tower")
# What a model must have for a tap that not all have.
NEEDS = {
    "neck_conv": "a neck that ends in convolutions with norm and activation",
    "quality": "a head that predicts centreness or objectness",
    "rows.quality": "a head that predicts centreness or objectness",
    "rows.location": "priors on a grid",
    "cls_logits": "priors on a grid",
    "rows.distribution": "box edges as distributions over bins, as GFL has them",
}
ROWS = ("logits", "boxes", "quality", "distribution", "location")
OF_REGIONS = ("logits", "boxes", "location")  # fields of the rows that a second stage fills
DECODER = ("layers", "ask")  # what a transformer's decoder says of its own queries, and of further ones
NO_TAPS = ("targets", "assignment", "loss", "head", "proposals", "detections", *DECODER)  # what else a method may read


class Reads(NamedTuple):
    """The taps that a method reads of each side.

    Beside taps, the student's may hold "targets" (the ground truth), "assignment" (of its assigner) and "loss" (its own
    losses for targets that the method chooses), the teacher's "head" (its head can be run on other features),
    "proposals" (the regions that it proposes, with what both second stages say about them) or "detections" (what it
    finds). Both may hold "layers" (what a transformer's decoder says of its queries, layer by layer,
    and the cells that became queries) and "ask" (the decoder answers further queries); of other models they are empty.
    """

    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()


class Pair(NamedTuple):
    """One level of a tap on both sides; arrays or shape specs f32[B, H, W, C]."""

    stride: int
    student: Array
    teacher: Array


def taps(output: DetectorOutput) -> list[str]:
    """Every name that `tap` understands for this output, except those of several levels."""
    names = []
    for field in LEVELS:
        levels = getattr(output, field)
        if levels:
            names += [field, *(f"{field}.{i}" for i in range(len(levels)))]
    for field in TOWERS:
        names += [f"{field}.{i}" for i in range(len(getattr(output, field)))]
    return names + [f"rows.{field}" for field in ROWS if _has_rows(output, field)]


def _has_rows(output: DetectorOutput, field: str) -> bool:
    """Whether the rows have a field, or would have it if they were regions."""
    return getattr(output.rows, field, None) is not None or (output.at is not None and field in OF_REGIONS)


def resolve(output: DetectorOutput, name: str) -> tuple[str, list[int] | None]:
    """The field of a tap, and the indices into it (levels, or the one convolution of a tower); None: all levels.

    Raises:
      UserError: no such tap; the valid ones are listed.
    """
    field, dot, index = name.partition(".")
    first, several, last = index.partition(":")
    count = len(getattr(output, field)) if field in LEVELS + TOWERS else 0
    if field in LEVELS and count and not dot:
        return field, None
    if field in LEVELS and several and first.isdigit() and last.isdigit():
        if int(first) < int(last) <= count:
            return field, list(range(int(first), int(last)))
    elif field in TOWERS and index.removeprefix("-").isdigit() and -count <= int(index) < count:
        return field, [int(index) % count]
    elif field in LEVELS and index.isdigit() and int(index) < count:
        return field, [int(index)]
    elif field == "rows" and _has_rows(output, index):
        return field, None
    needs = f", which needs {NEEDS[name]}" if name in NEEDS else ""
    raise UserError(
        f"tap {name!r}: this model has no such tap{needs}: its taps are {', '.join(taps(output)) or 'none'}"
    )


def tap(output: DetectorOutput, name: str) -> dict[int, Array]:
    """The maps of a tap, by stride.

    Args:
      output: arrays or shape specs.
      name: of a tap that runs over levels.

    Returns:
      {stride: f32[B, H, W, C]}.

    Raises:
      UserError: no such tap; the valid ones are listed.
    """
    field, indices = resolve(output, name)
    if field == "rows":
        raise UserError(f"tap {name!r}: rows have no levels: take a tap of maps, such as 'neck'")
    strides = output.backbone_strides if field == "backbone" else output.strides
    levels = getattr(output, field)
    if field in TOWERS and indices is not None:
        levels = levels[indices[0]]
    elif indices is not None:
        strides, levels = [strides[i] for i in indices], [levels[i] for i in indices]
    return dict(zip(strides, levels, strict=True))


def only(output: DetectorOutput, names: Iterable[str]) -> DetectorOutput:
    """The output with only the fields of the named taps; levels that are not named are None.

    The second stage `at` is kept where a tap or "proposals" needs to ask it, and with "loss" what learns masks.

    Args:
      output: arrays or shape specs.
      names: taps, and what else methods read.

    Raises:
      UserError: no such tap; the valid ones are listed.
    """
    wanted: dict[str, set[int] | None] = {}
    rows: dict[str, Array] = {}
    asks = False
    names = tuple(names)
    for name in names:
        asks |= name == "proposals"
        if name in NO_TAPS:
            continue
        field, indices = resolve(output, name)
        if field == "rows":
            value = getattr(output.rows, name.removeprefix("rows."), None)
            rows |= {} if value is None else {name.removeprefix("rows."): value}
            asks |= value is None
        elif indices is None or wanted.get(field, set()) is None:
            wanted[field] = None
        else:
            wanted[field] = (wanted.get(field) or set()) | set(indices)
    kept: dict[str, Any] = {"kernels": (), "stages": ()}  # no taps
    kept |= {} if "loss" in names else {"prototypes": None, "masks_at": None}
    kept |= {} if "detections" in names else {"detections": None}
    kept |= {} if "layers" in names else {"layers": (), "first": None, "selected": None}
    kept |= {} if "ask" in names else {"ask": None}
    for field in LEVELS + TOWERS:
        levels = getattr(output, field)
        if field not in wanted:
            kept[field] = ()
        elif (indices := wanted[field]) is not None:
            kept[field] = tuple(level if i in indices else None for i, level in enumerate(levels))
    kept["at"] = output.at if asks else None
    return dataclasses.replace(output, rows=with_fields(output.rows or Rows(), rows) if rows else None, **kept)


def with_fields(rows: Rows, fields: dict[str, Any]) -> Rows:
    """The rows with these fields and no others."""
    return dataclasses.replace(rows, **dict.fromkeys(ROWS) | fields)


def shared_levels(student: DetectorOutput, teacher: DetectorOutput) -> tuple[DetectorOutput, DetectorOutput]:
    """Both outputs, arrays or shape specs, cut to the finest levels that both have.

    Where the finest levels differ, both stay as they are: their maps still pair by stride.
    """
    same = [a == b for a, b in zip(student.strides, teacher.strides, strict=False)]
    count = same.index(False) if False in same else len(same)
    if not count:
        return student, teacher
    # Queries are predictions of all levels, and are compared with those of all levels.
    whole = bool(student.layers or teacher.layers) or any(
        side.rows is not None and not side.rows.level_sizes for side in (student, teacher)
    )
    return _cut(student, count, whole), _cut(teacher, count, whole)


def _cut(output: DetectorOutput, count: int, whole: bool) -> DetectorOutput:
    if count == len(output.strides):
        return output
    cut = {field: getattr(output, field)[:count] for field in LEVELS if field != "backbone"}
    cut |= {
        field: tuple(levels if levels is None else levels[:count] for levels in getattr(output, field))
        for field in TOWERS
    }
    rows = output.rows
    if rows is not None and rows.level_sizes and not whole:
        rows = first_rows(rows, count)
    return dataclasses.replace(output, strides=output.strides[:count], rows=rows, **cut)


def first_rows(rows: Rows, levels: int) -> Rows:
    """The rows of the finest levels, arrays or shape specs."""
    sizes = rows.level_sizes[:levels]
    end = sum(sizes)

    def cut(field: str) -> AnyArray | jax.ShapeDtypeStruct | None:
        value = getattr(rows, field)
        if value is None:
            return None
        axis = 0 if field == "location" else 1
        if isinstance(value, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((*value.shape[:axis], end, *value.shape[axis + 1 :]), value.dtype)
        return value[:end] if axis == 0 else value[:, :end]

    fields: dict[str, Any] = {field: cut(field) for field in ROWS}
    return dataclasses.replace(rows, level_sizes=sizes, **fields)


def pair(student: DetectorOutput, teacher: DetectorOutput, student_tap: str, teacher_tap: str = "") -> list[Pair]:
    """Pairs the levels of two taps by stride, fine to coarse; `teacher_tap` is `student_tap` if not given.

    Raises:
      UserError: a tap does not exist, or the two have no stride in common.
    """
    teacher_tap = teacher_tap or student_tap
    student_maps, teacher_maps = tap(student, student_tap), tap(teacher, teacher_tap)
    common = sorted(set(student_maps) & set(teacher_maps))
    if not common:
        raise UserError(
            f"the taps {student_tap!r} (student, strides {sorted(student_maps)}) and {teacher_tap!r} (teacher, strides "
            f"{sorted(teacher_maps)}) have no stride in common: choose taps that share one"
        )
    return [Pair(stride, student_maps[stride], teacher_maps[stride]) for stride in common]


def map_size(x: Array) -> tuple[int, int]:
    """Height and width of the maps [B, H, W, C], in cells."""
    return x.shape[1], x.shape[2]


def check_sizes(stride: int, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    """Checks that the sides of two maps differ by at most a factor of 2.

    Raises:
      UserError: they differ by more; the message has both shapes.
    """
    for a, b in zip(student[1:3], teacher[1:3], strict=True):
        if max(a, b) > 2 * min(a, b):
            raise UserError(
                f"at stride {stride} the student's map {student[1:3]} and the teacher's {teacher[1:3]} differ by more "
                "than a factor of 2: choose taps of similar resolution"
            )
