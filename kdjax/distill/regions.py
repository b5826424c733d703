"""Regions as rows: what the second stages of two detectors say about the same boxes."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdjax.boxes import assign, coding
from kdjax.errors import UserError
from kdjax.structs import Array, Assignment, DetectorOutput, Regions, Rows, Targets

POSITIVE_IOU = 0.5  # with the box of an object, from which a region is one of its own
Stage = Callable[[Array], Regions]


def check(student: DetectorOutput, teacher: DetectorOutput) -> bool:
    """Whether predictions of regions are compared: whether both detectors have two stages. Outputs of shape specs.

    Raises:
      UserError: one detector has two stages and the other one, or the two know different numbers of classes.
    """
    kinds = []
    for output in (student, teacher):
        predicts = output.rows is not None and output.rows.logits is not None
        kind = "queries" if output.layers else "priors" if predicts else ""
        kinds.append("regions" if output.at is not None else kind)
    if "regions" in kinds and {"priors", "queries"} & set(kinds):
        raise UserError(
            f"predictions are compared row by row, and the rows of the student are {kinds[0]}, those of the teacher "
            f"{kinds[1]}: take two detectors with two stages, two with one, or a method that compares maps"
        )
    if student.at is None or teacher.at is None:
        return False
    box = jax.ShapeDtypeStruct((1, 1, 4), jnp.float32)
    classes = [jax.eval_shape(lambda at, box: at(box), out.at, box).logits.shape[-1] - 1 for out in (student, teacher)]
    if classes[0] != classes[1]:
        raise UserError(
            f"the second stage of the student knows {classes[0]} classes and that of the teacher {classes[1]}: the "
            "classes must be the same"
        )
    return True


def with_rows(student: DetectorOutput, teacher: DetectorOutput, boxes: Array) -> tuple[DetectorOutput, DetectorOutput]:
    """Both outputs, with what their second stages say about the boxes f32[B, R, 4] as rows.

    Outputs may be shape specs, if `boxes` is one.
    """
    assert student.at is not None
    assert teacher.at is not None
    sides = student.at, teacher.at, boxes
    of_student, of_teacher = jax.eval_shape(rows, *sides) if isinstance(boxes, jax.ShapeDtypeStruct) else rows(*sides)
    return dataclasses.replace(student, rows=of_student), dataclasses.replace(teacher, rows=of_teacher)


def rows(student: Stage, teacher: Stage, boxes: Array) -> tuple[Rows, Rows]:
    """What two second stages say about the boxes f32[B, R, 4], as rows; both give the box of the teacher's class."""
    found = student(boxes), teacher(boxes)
    best = jnp.argmax(found[1].logits[..., :-1], -1)
    return _rows(found[0], boxes, best), _rows(found[1], boxes, best)


def own_rows(stage: Stage, boxes: Array) -> Rows:
    """What a second stage says about the boxes f32[B, R, 4], as rows; each gives the box of its likeliest class."""
    found = stage(boxes)
    return _rows(found, boxes, jnp.argmax(found.logits[..., :-1], -1))


def _rows(found: Regions, boxes: Array, classes: Array) -> Rows:
    """What a second stage has found in the boxes f32[B, R, 4], with its boxes for the classes i32[B, R]."""
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    location = jnp.concatenate([boxes[..., :2] + sides / 2, sides], -1)
    deltas = found.box_reg.reshape(*found.box_reg.shape[:2], -1, 4)
    of_class = jnp.minimum(classes, deltas.shape[2] - 1)[..., None, None]
    deltas = jnp.take_along_axis(deltas, of_class, 2)[:, :, 0]
    moved = coding.deltas_to_boxes(boxes, deltas, stds=coding.REGION_STDS)
    return Rows(logits=found.logits, boxes=moved, location=location, form="softmax")


def match(boxes: Array, targets: Targets, valid: Array, *, num_classes: int) -> Assignment:
    """Gives regions to the objects that they overlap most, if the IoU is at least 0.5; all others are background.

    Args:
      boxes: f32[B, R, 4], the regions.
      targets: the objects.
      valid: bool[B, R]; the other regions are ignored.
      num_classes: K, the label of background.
    """
    found = assign.max_iou(
        boxes,
        targets,
        num_classes=num_classes,
        positive_iou=POSITIVE_IOU,
        negative_iou=POSITIVE_IOU,
        match_low_quality=False,
        inside=valid,
    )
    return jax.lax.stop_gradient(found)
