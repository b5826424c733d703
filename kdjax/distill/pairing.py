"""Rules that pair rows of the student with rows of the teacher.

A pairing rule is a function (student rows, teacher rows) -> `Pairing`, or None if row i is paired with row i. A rule
raises `UserError` for rows that it cannot pair, also on shape specs, so that a run is refused before anything is
computed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from kdjax.boxes import iou, matching
from kdjax.distill.taps import ROWS
from kdjax.errors import UserError
from kdjax.structs import AnyArray, Array, Assignment, Pairing, Rows

Rule = Callable[[Rows, Rows], Pairing | None]
SCORE = 0.05  # the best class score from which `auto` compares a row of the teacher


def auto(student: Rows, teacher: Rows) -> Pairing | None:
    """The rule that fits: by place, or where rows are queries, which have no place, by what they say.

    Args:
      student, teacher: rows. Queries are rows without levels.

    Returns:
      `by_place` if neither side has queries, `by_hungarian` if both have, else `by_overlap`; of the last two without
      the rows of the teacher whose best class score is below 0.05.

    Raises:
      UserError: that rule cannot pair them.
    """
    queries = [are_queries(rows) for rows in (student, teacher)]
    if not any(queries):
        return by_place(student, teacher)
    return (by_hungarian if all(queries) else by_overlap)(student, teacher, score=SCORE)


def are_queries(rows: Rows) -> bool:
    """Whether rows are queries: they belong to no level, and are not regions."""
    return not rows.level_sizes and rows.form == "sigmoid"


def by_place(student: Rows, teacher: Rows) -> None:
    """Pairs row i with row i; both sides must have the same levels, anchors and classes.

    Args:
      student, teacher: rows of the levels that both sides share, arrays or shape specs.

    Raises:
      UserError: the levels, anchors or classes differ.
    """
    sides = [_shape(rows) for rows in (student, teacher)]
    if sides[0][0] != sides[1][0] or (None not in (sides[0][1], sides[1][1]) and sides[0][1] != sides[1][1]):
        raise UserError(
            "predictions are compared row by row, which needs the same levels, anchors and classes on both sides: "
            f"rows per level and classes are {sides[0]} (student) and {sides[1]} (teacher)"
        )
    return None


def by_location(student: Rows, teacher: Rows) -> Pairing:
    """Pairs a row of the student with the first row of the teacher that has the same stride and location.

    Args:
      student, teacher: rows; `location` f32[N, 4] of both, in NumPy or as constants.

    Returns:
      The pairing, one pair for each row of the student; `valid` where there is a partner.

    Raises:
      UserError: a side has no locations, or the classes differ.
    """
    _check_classes(student, teacher)
    if student.location is None or teacher.location is None:
        raise UserError("pairing by location: one side has no locations: pair by overlap instead")
    if isinstance(student.location, jax.ShapeDtypeStruct) or isinstance(teacher.location, jax.ShapeDtypeStruct):
        return _spec(student)
    nearest, distance = _nearest(student.location, teacher.location)
    return _broadcast(student, nearest, distance < 1e-3)


def by_overlap(student: Rows, teacher: Rows, *, threshold: float = 0.5, score: float = 0.0) -> Pairing:
    """Pairs a row of the student with the row of the teacher whose box overlaps its own most.

    Args:
      student, teacher: rows with `boxes` f32[B, N, 4].
      threshold: smallest IoU of a pair, 0 .. 1.
      score: rows of the teacher whose best class score is below have no partner, 0 .. 1; above 0 the teacher's rows
        need `logits`.

    Returns:
      The pairing, one pair for each row of the student, without gradient. The IoU of all pairs of an image is
      computed in blocks of 1,024 rows of the student, so that memory is bounded.

    Raises:
      UserError: a side has no boxes, the teacher no logits, or the classes differ.
    """
    _check_classes(student, teacher)
    student_boxes, teacher_boxes = _boxes(student, teacher)
    if score and teacher.logits is None:
        raise UserError("pairing by overlap: the teacher's rows have no scores: they must have `logits`")
    if isinstance(student_boxes, jax.ShapeDtypeStruct):
        return _spec(student)

    def image(own: Array, other: Array, kept: Array) -> tuple[Array, Array]:
        def block(boxes: Array) -> tuple[Array, Array]:
            overlaps = jnp.where(kept, iou.box_iou(boxes[:, None], other[None]), -1.0)
            return jnp.argmax(overlaps, 1), jnp.max(overlaps, 1)

        size = min(1024, len(own))
        padded = jnp.pad(own, ((0, -len(own) % size), (0, 0))).reshape(-1, size, 4)
        index, best = jax.lax.map(block, padded)
        return index.reshape(-1)[: len(own)], best.reshape(-1)[: len(own)]

    own, other = map(jax.lax.stop_gradient, (student_boxes, teacher_boxes))
    index, best = jax.vmap(image)(own, other, _kept(teacher, score))
    rows = jnp.broadcast_to(jnp.arange(index.shape[1], dtype=jnp.int32), index.shape)
    return Pairing(rows, index.astype(jnp.int32), best >= threshold)


def by_hungarian(
    student: Rows, teacher: Rows, *, class_weight: float = 1.0, box_weight: float = 2.0, score: float = 0.0
) -> Pairing:
    """One-to-one pairs of least total cost: class_weight * L1 of the probabilities + box_weight * (1 - IoU).

    For queries; the cost matrix has all pairs of an image.

    Args:
      student, teacher: rows with `logits` f32[B, N, K] and `boxes` f32[B, N, 4].
      class_weight, box_weight: of the two costs, >= 0.
      score: rows of the teacher whose best class score is below have no partner, 0 .. 1.

    Returns:
      The pairing, min(N of the student, N of the teacher) pairs, without gradient.

    Raises:
      UserError: a side has no boxes or no logits, or the classes differ.
    """
    _check_classes(student, teacher)
    student_boxes, teacher_boxes = _boxes(student, teacher)
    if student.logits is None or teacher.logits is None:
        raise UserError("pairing by the Hungarian method: one side has no logits: its rows must have `logits`")
    counts = student_boxes.shape[1], teacher_boxes.shape[1]
    if isinstance(student_boxes, jax.ShapeDtypeStruct):
        return _spec(student if counts[0] <= counts[1] else teacher)
    sides = (student.logits, teacher.logits, student_boxes, teacher_boxes)
    own_logits, other_logits, own, other = map(jax.lax.stop_gradient, sides)
    probs = jax.nn.sigmoid(own_logits.astype(jnp.float32)), jax.nn.sigmoid(other_logits.astype(jnp.float32))

    def of_classes(one: Array) -> Array:
        """f32[B, S, T], of one class at a time: all classes at once would not fit in memory."""
        return jnp.abs(probs[0][..., one][:, :, None] - probs[1][..., one][:, None])

    apart = jax.lax.fori_loop(
        0, probs[0].shape[-1], lambda k, total: total + of_classes(k), jnp.zeros((len(own), *counts))
    )
    cost = class_weight * apart + box_weight * (1 - iou.box_iou(own[:, :, None], other[:, None]))
    kept = _kept(teacher, score)
    if counts[0] >= counts[1]:
        found = matching.hungarian(cost, kept)
        rows = jnp.broadcast_to(jnp.arange(counts[1], dtype=jnp.int32), found.shape)
        return Pairing(jnp.maximum(found, 0), rows, found >= 0)
    # Rows without a partner are the dearest, so that the fewer rows of the student have the others first.
    dear = jnp.max(cost, (1, 2), keepdims=True) + 1
    cost = jnp.where(kept[:, None], cost, dear * counts[0] + 1)
    found = matching.hungarian(jnp.swapaxes(cost, 1, 2), jnp.ones((len(cost), counts[0]), bool))
    rows = jnp.broadcast_to(jnp.arange(counts[0], dtype=jnp.int32), found.shape)
    return Pairing(rows, found, jnp.take_along_axis(kept, found, 1))


RULES: dict[str, Rule] = {rule.__name__: rule for rule in (auto, by_place, by_location, by_overlap, by_hungarian)}


def take(rows: Rows, index: Array | None) -> Rows:
    """The rows in the order of a pairing; `index` i32[B, P], None leaves them as they are."""
    if index is None:
        return rows

    def gather(field: str) -> Array | None:
        value = getattr(rows, field)
        if value is None:
            return None
        if field == "location":
            return jnp.asarray(value)[index]
        return jnp.take_along_axis(value, index.reshape(*index.shape, *[1] * (value.ndim - 2)), 1)

    fields: dict[str, Any] = {field: gather(field) for field in ROWS}
    return dataclasses.replace(rows, level_sizes=(), **fields)


def take_assignment(assignment: Assignment, pairing: Pairing | None) -> Assignment:
    """The assignment in the order of a pairing; rows without a partner are ignored and not positive."""
    if pairing is None:
        return assignment

    def gather(value: Array) -> Array:
        return jnp.take_along_axis(value, pairing.student.reshape(*pairing.student.shape, *[1] * (value.ndim - 2)), 1)

    # What belongs to no row is left out.
    rows = assignment._replace(first=None, earlier=(), queries=None, denoising=None)
    taken = jax.tree.map(gather, rows)
    return taken._replace(positive=taken.positive & pairing.valid, ignore=taken.ignore | ~pairing.valid)


def _shape(rows: Rows) -> tuple[tuple[int, ...], int | None]:
    count = next((v.shape[1] for v in (rows.logits, rows.boxes, rows.distribution, rows.quality) if v is not None), 0)
    return rows.level_sizes or (count,), None if rows.logits is None else rows.logits.shape[-1]


def _check_classes(student: Rows, teacher: Rows) -> None:
    classes = [None if rows.logits is None else rows.logits.shape[-1] for rows in (student, teacher)]
    if None not in classes and classes[0] != classes[1]:
        raise UserError(f"the student has {classes[0]} classes and the teacher {classes[1]}: they must be the same")


def _kept(teacher: Rows, score: float) -> Array:
    """Which rows have a best class score of at least `score`, bool[B, N]."""
    assert teacher.boxes is not None
    if not score:
        return jnp.ones(teacher.boxes.shape[:2], bool)
    assert teacher.logits is not None
    return jax.lax.stop_gradient(jnp.max(jax.nn.sigmoid(teacher.logits), -1)) >= score


def _boxes(student: Rows, teacher: Rows) -> tuple[Array, Array]:
    if student.boxes is None or teacher.boxes is None:
        raise UserError("pairing by boxes: one side has no decoded boxes: its rows must have `boxes`")
    return student.boxes, teacher.boxes


def _nearest(student: AnyArray, teacher: AnyArray) -> tuple[Array, Array]:
    apart = jnp.max(jnp.abs(jnp.asarray(student)[:, None] - jnp.asarray(teacher)[None]), -1)
    return jnp.argmin(apart, 1), jnp.min(apart, 1)


def _batch(rows: Rows) -> int:
    return next(v.shape[0] for v in (rows.logits, rows.boxes, rows.distribution, rows.quality) if v is not None)


def _broadcast(student: Rows, index: Array, valid: Array) -> Pairing:
    shape = (_batch(student), len(index))
    rows = jnp.broadcast_to(jnp.arange(len(index), dtype=jnp.int32), shape)
    return Pairing(rows, jnp.broadcast_to(index.astype(jnp.int32), shape), jnp.broadcast_to(valid, shape))


def _spec(rows: Rows) -> Pairing:
    shape = (_batch(rows), sum(_shape(rows)[0]))
    index, valid = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)
    return Pairing(*(cast(Array, spec) for spec in (index, index, valid)))
