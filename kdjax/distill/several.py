"""`Distillers` combines several teachers of one student; its functions are those of a `Distiller`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from kdjax.distill.distiller import Distiller, method_key
from kdjax.distill.method import Method
from kdjax.distill.teachers import Batch
from kdjax.errors import UserError, prefix
from kdjax.structs import Array, Assignment, DetectorOutput, PyTree


@dataclasses.dataclass(frozen=True)
class Distillers:
    """Several teachers at once, each with methods of its own; the same method may be used with two of them.

    Attributes:
      by_teacher: the distiller of every teacher, by a name of your choice without "/"; all have the same student.

    Example:
      >>> from kdjax import detectors, methods
      >>> student, near, far = (detectors.build(f"rtmdet_{name}", 3) for name in ("pico", "micro", "tiny"))
      >>> teachers = {"near": near, "far": far}
      >>> both = Distillers({name: Distiller(student, one, [methods.cwd()]) for name, one in teachers.items()})
      >>> sorted(both.methods)
      ['far/cwd', 'near/cwd']
    """

    by_teacher: Mapping[str, Distiller]

    def __post_init__(self) -> None:
        for name in self.by_teacher:
            if not name or "/" in name:
                raise UserError(f"by_teacher: {name!r} is not a name: choose one without /")

    @property
    def methods(self) -> dict[str, Method]:
        """All methods, by "teacher/method"."""
        return {
            f"{teacher}/{name}": method
            for teacher, distiller in self.by_teacher.items()
            for name, method in distiller.methods.items()
        }

    def init(self, key: Array, image_size: tuple[int, int]) -> dict[str, Any]:
        """What the methods train, {teacher: {method: params}}; see `Distiller.init`.

        Raises:
          UserError: a method cannot compare student and teacher; both are named.
        """
        adapters = {}
        for name, distiller in self.by_teacher.items():
            with prefix(name):
                adapters[name] = distiller.init(method_key(key, name), image_size)
        return adapters

    def observe(self, batch: Batch, variables: Mapping[str, PyTree] | None = None) -> dict[str, DetectorOutput]:
        """The output of every teacher, by name; see `Distiller.observe`.

        Args:
          batch: what the teachers read of it.
          variables: of each teacher, by name; by default those of the loaded models.
        """
        return {name: one.observe(batch, (variables or {}).get(name)) for name, one in self.by_teacher.items()}

    def terms(
        self,
        adapters: Mapping[str, Any],
        output: DetectorOutput,
        batch: Batch,
        variables: Mapping[str, PyTree] | None = None,
        *,
        observed: Mapping[str, DetectorOutput] | None = None,
        assignment: Assignment | None = None,
        key: Array,
        step: Array | int | None = None,
    ) -> dict[str, Array]:
        """All terms of all methods of all teachers, unweighted: {"teacher/method/term": f32[]}.

        Args:
          adapters: of `init`, as trained so far.
          output, batch, assignment, key, step: as for `Distiller.terms`.
          variables: of each teacher, by name; by default those of the loaded models.
          observed: what `observe` returned for this batch; teachers that are not in it are run.

        Raises:
          UserError: as for `Distiller.terms`.
        """
        values = {}
        for name, distiller in self.by_teacher.items():
            terms = distiller.terms(
                adapters[name],
                output,
                batch,
                (variables or {}).get(name),
                observed=(observed or {}).get(name),
                assignment=assignment,
                key=method_key(key, name),
                step=step,
            )
            values |= {f"{name}/{term}": value for term, value in terms.items()}
        return values

    def without_boxes(self, image_size: tuple[int, int]) -> "Distillers":
        """The distillers with those of their methods alone that read no ground truth; see `Distiller.without_boxes`."""
        return Distillers({name: one.without_boxes(image_size) for name, one in self.by_teacher.items()})

    def weights(self, step: Array | int) -> dict[str, Array | float]:
        """The weight of every term at a step: {"teacher/method/term": f32[]}."""
        return {
            f"{name}/{term}": weight
            for name, distiller in self.by_teacher.items()
            for term, weight in distiller.weights(step).items()
        }

    def total(self, terms: Mapping[str, Array], step: Array | int) -> Array:
        """The weighted sum of the terms at a step, f32[]: what is added to the detection loss."""
        weights = self.weights(step)
        return jnp.asarray(sum(weights[name] * value for name, value in terms.items()))
