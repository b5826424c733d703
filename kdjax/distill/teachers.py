"""Teachers: anything that has `spec` and `observe`.

Detectors are teachers without further code. `Custom` makes a teacher (or a student) of
a model of your own, `on_host` of a function that runs on the host, `recorded` of arrays that travel in the batch,
`mean` of the rows of several teachers, `from_file` of detections in a file.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from kdjax.errors import UserError
from kdjax.structs import FOUND, AnyArray, Array, Assignment, DetectorOutput, PyTree, Rows, Targets, detections_of

Batch = Mapping[str, Any]
RECORDED = "teacher"  # the key of a batch under which `recorded` finds its output


class Teacher(Protocol):
    """What `Distiller` needs of a teacher.

    - `spec(image_size)`: the output for one image of (height, width) pixels as `jax.ShapeDtypeStruct`, computed without
      running.
    - `observe(variables, batch)`: the output for a batch, with the taps that the methods read. `variables` is whatever
      tree of arrays the teacher needs, None if it needs none.

    A method that reads "head" also needs `head(params, stats, features, *, branch, start)` and `decode_boxes(output)`,
    one that reads "proposals" `propose(output, image_size)`, one that reads "detections" `decode(output, image_size)`,
    as `Detector` has them, or `detections` in the output. A teacher with two stages has `at`
    in its output, also in that of `spec`: it is asked about the regions of the student.
    """

    @property
    def spec(self) -> Callable[[tuple[int, int]], DetectorOutput]:
        """(height, width) -> shapes of the output for one image."""
        ...

    @property
    def observe(self) -> Callable[[Any, Batch], DetectorOutput]:
        """(variables, batch) -> output."""
        ...


class Student(Protocol):
    """What `Distiller` needs of a student: `spec(image_size)`, as of a teacher.

    A method that reads "assignment" also needs `assign(output, targets, key)`, one that reads "loss" that and
    `loss(output, targets, assignment)`, as `Detector` has them. `rows(output)` is called where a method reads rows and
    the output has none.
    """

    @property
    def spec(self) -> Callable[[tuple[int, int]], DetectorOutput]:
        """(height, width) -> shapes of the output for one image."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Custom:
    """A model of your own as a student or a teacher.

    Attributes:
      spec: (height, width) -> DetectorOutput of `jax.ShapeDtypeStruct` for one image; see `spec_of`.
      observe: (variables, batch) -> DetectorOutput; only a teacher needs it.
      assign: (output, targets, key) -> Assignment; only a student whose methods read "assignment" needs it. That of a
        student with two stages has `regions`.
      loss: (output, targets, assignment) -> {name: f32[]}; only a student whose methods read "loss" needs it.
      propose: (output, image_size i32[B, 2]) -> (boxes f32[B, P, 4], valid bool[B, P]); only a teacher with two stages
        whose methods read "proposals" needs it.
      priors: (height, width) -> f32[N, 4], the location of rows that lie on a grid, where `observe` leaves it out.
    """

    spec: Callable[[tuple[int, int]], DetectorOutput]
    observe: Callable[[Any, Batch], DetectorOutput] | None = None
    assign: Callable[[DetectorOutput, Targets, Array | None], Assignment] | None = None
    loss: Callable[[DetectorOutput, Targets, Assignment], dict[str, Array]] | None = None
    propose: Callable[[DetectorOutput, Array], tuple[Array, Array]] | None = None
    priors: Callable[[tuple[int, int]], AnyArray] | None = None


def spec_of(function: Callable[..., DetectorOutput], *arguments: Any) -> Callable[[tuple[int, int]], DetectorOutput]:
    """The `spec` of a function (*arguments, images f32[B, H, W, 3]) -> DetectorOutput; nothing is computed.

    Args:
      function: of the model.
      *arguments: arrays or shape specs of what comes before the images, usually the variables.

    Example:
      >>> net = lambda images: DetectorOutput(strides=(8,), neck=(images[:, ::8, ::8],))
      >>> spec_of(net)((64, 64)).neck[0].shape
      (1, 8, 8, 3)
    """

    def spec(image_size: tuple[int, int]) -> DetectorOutput:
        return jax.eval_shape(function, *arguments, jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32))

    return spec


def recorded(spec: Callable[[tuple[int, int]], DetectorOutput]) -> Custom:
    """A teacher whose output travels in the batch, under the key "teacher".

    Args:
      spec: of the outputs.
    """
    return Custom(spec=spec, observe=lambda variables, batch: batch[RECORDED])


def mean(teachers: Sequence[Teacher]) -> Custom:
    """An ensemble: a teacher whose rows are the means of those of several teachers with the same rows.

    Scores and the distributions of edges are averaged as probabilities, boxes as coordinates. It has no maps.

    Args:
      teachers: two or more, whose rows lie on the same grid; the variables of the mean are a sequence of theirs.

    Raises:
      UserError: there is one teacher alone; or, from `spec`, their rows differ, or are queries or regions, which have
        no common order.
    """
    if len(teachers) < 2:
        raise UserError(f"mean: {len(teachers)} teachers: it needs at least 2")

    def spec(image_size: tuple[int, int]) -> DetectorOutput:
        outputs = [teacher.spec(image_size) for teacher in teachers]
        first = outputs[0]
        for number, output in enumerate(outputs, 1):
            rows = output.rows
            if rows is None or not rows.level_sizes or rows.form != "sigmoid" or output.at is not None:
                raise UserError(f"mean: teacher {number} has no rows on a grid: take dense detectors of one kind")
            assert first.rows is not None
            shapes = [jax.tree.map(lambda leaf: leaf.shape, one) for one in (rows, first.rows)]
            if shapes[0] != shapes[1] or output.strides != first.strides:
                raise UserError(
                    f"mean: teachers 1 and {number} do not predict the same rows: take detectors with the same "
                    "strides, anchors, classes and kind of boxes"
                )
        return DetectorOutput(strides=first.strides, anchors=first.anchors, rows=first.rows)

    def observe(variables: PyTree, batch: Batch) -> DetectorOutput:
        outputs = [teacher.observe(own, batch) for teacher, own in zip(teachers, variables, strict=True)]
        rows = _mean_rows([output.rows for output in outputs if output.rows is not None])
        return DetectorOutput(strides=outputs[0].strides, anchors=outputs[0].anchors, rows=rows)

    return Custom(spec=spec, observe=observe, priors=getattr(teachers[0], "priors", None))


def _mean_rows(rows: Sequence[Rows]) -> Rows:
    """The means of rows of the same shape and order."""

    def values(name: str) -> Array | None:
        arrays = [getattr(one, name) for one in rows]
        return None if arrays[0] is None else jnp.stack(arrays)

    def of_logits(x: Array | None) -> Array | None:
        """The logits of the mean probability."""
        if x is None:
            return None
        return jax.nn.logsumexp(jax.nn.log_sigmoid(x), 0) - jax.nn.logsumexp(jax.nn.log_sigmoid(-x), 0)

    boxes, bins = values("boxes"), values("distribution")
    return dataclasses.replace(
        rows[0],
        logits=of_logits(values("logits")),
        quality=of_logits(values("quality")),
        boxes=None if boxes is None else boxes.mean(0),
        distribution=None if bins is None else jax.nn.logsumexp(jax.nn.log_softmax(bins), 0) - jnp.log(len(rows)),
    )


def from_file() -> Custom:
    """A teacher that is a file of detections: it reads from the batch what `kdjax.data.with_found` puts there.

    It has detections alone, neither rows nor maps, and no variables.
    """
    arrays = {"boxes": ((1, 100, 4), "float32"), "labels": ((1, 100), "int32")}
    arrays |= {"scores": ((1, 100), "float32"), "valid": ((1, 100), "bool")}
    shapes: Any = {f"found_{name}": jax.ShapeDtypeStruct(*one) for name, one in arrays.items()}

    def observe(variables: PyTree, batch: Batch) -> DetectorOutput:
        del variables
        if missing := [name for name in FOUND if name not in batch]:
            raise UserError(f"batch: {', '.join(missing)} missing: open the data with kdjax.data.with_found")
        return DetectorOutput(strides=(), detections=detections_of(batch))

    return Custom(spec=lambda image_size: observe(None, shapes), observe=observe)


def functions_of(output: DetectorOutput) -> list[str]:
    """The fields of a teacher's output that are functions: it is asked inside the step, and cannot travel in the batch.

    Args:
      output: arrays or shape specs.
    """
    return [name for name in ("at", "masks_at", "stages", "ask") if getattr(output, name)]


def without_places(output: DetectorOutput) -> DetectorOutput:
    """The output without the location of its rows, which is the same for all images and has no batch axis."""
    if output.rows is None:
        return output
    return dataclasses.replace(output, rows=dataclasses.replace(output.rows, location=None))


def on_host(function: Callable[[Any], DetectorOutput], spec: Callable[[tuple[int, int]], DetectorOutput]) -> Custom:
    """A teacher that runs on the host, outside of the compiled program, by `jax.pure_callback`.

    Args:
      function: images u8[B, H, W, 3] in NumPy -> DetectorOutput of NumPy arrays with exactly what `spec` has.
      spec: of its output for one image; without `at`, because the host is not asked about regions.
    """

    def observe(variables: PyTree, batch: Batch) -> DetectorOutput:
        images = batch["image"]
        one = spec(images.shape[1:3])
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(images), *leaf.shape[1:]), leaf.dtype), one)
        # A location has no batch axis.
        if one.rows is not None and one.rows.location is not None:
            shapes = dataclasses.replace(shapes, rows=dataclasses.replace(shapes.rows, location=one.rows.location))
        return jax.pure_callback(function, shapes, images)

    return Custom(spec=spec, observe=observe)
