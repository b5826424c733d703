"""`Distiller` combines a student, a teacher and methods: it runs the teacher, pairs the outputs and compares them."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp

from kdjax.distill import pairing as pairings
from kdjax.distill import regions, taps
from kdjax.distill.method import Context, Method, PairedRows, Proposals
from kdjax.distill.pairing import Rule
from kdjax.distill.teachers import Batch, Custom, Student, Teacher
from kdjax.errors import UserError
from kdjax.structs import (
    Array,
    Assignment,
    DetectorOutput,
    PaddedDetections,
    Pairing,
    PyTree,
    Rows,
    Targets,
    targets_of,
)

# What a method may read beside taps, and which function of the model makes it.
EXTRAS = (
    ("assignment", "assign"),
    ("loss", "loss"),
    ("head", "head"),
    ("proposals", "propose"),
    ("detections", "decode"),
)

# What a method may read that is made of the ground truth.
_OF_BOXES = {"targets", "assignment", "loss", "proposals"}


class Loaded(Protocol):
    """What `kdjax.load` returns: a detector with its weights."""

    @property
    def detector(self) -> Teacher:
        """Pure functions."""
        ...

    @property
    def variables(self) -> PyTree:
        """Parameters and statistics."""
        ...


@dataclasses.dataclass(frozen=True, init=False)
class Distiller:
    """Pure functions of a student, a teacher and methods; the arrays that they need are their arguments.

    Attributes:
      student: a `Detector`, or anything with `spec` (`kdjax.distill.teachers.Student`).
      teacher: a `Detector`, or anything with `spec` and `observe` (`kdjax.distill.teachers.Teacher`); of a loaded model
        its detector is taken, and its weights wherever a call is given none.
      methods: `Method`s of `kdjax.methods`, in a sequence or by name.
      pairing: which rows are compared (`kdjax.distill.pairing`).
      variables: of the teacher, for calls that give none; those of a loaded model. Inside a jitted function they become
        constants of the program: pass them to `terms` or `observe` instead.

    Example:
      >>> from kdjax import detectors, methods
      >>> student, teacher = (detectors.build(name, 3) for name in ("rtmdet_pico", "rtmdet_micro"))
      >>> distiller = Distiller(student, teacher, [methods.cwd(weight=5.0)])
      >>> sorted(distiller.init(jax.random.key(0), (64, 64))["cwd"])
      ['16', '32', '8']
    """

    student: Any  # a `Student`, with what its methods need beside `spec`
    teacher: Any  # a `Teacher`, with what its methods need beside `spec` and `observe`
    methods: Mapping[str, Method]
    pairing: Rule = pairings.auto
    variables: PyTree = dataclasses.field(default=None, repr=False, compare=False)

    def __init__(
        self,
        student: Student | Loaded,
        teacher: Teacher | Custom | Loaded,
        methods: Mapping[str, Method] | Sequence[Method],
        pairing: Rule = pairings.auto,
        variables: PyTree = None,
    ) -> None:
        models: dict[str, Any] = {"student": student, "teacher": teacher}
        for role, model in models.items():
            if hasattr(model, "detector") and hasattr(model, "variables"):
                models[role] = model.detector
                if role == "teacher" and variables is None:
                    variables = model.variables
            if not hasattr(models[role], "spec"):
                raise UserError(f"{role}: {model!r} has no `spec`: pass a detector or a kdjax.distill.Custom")
        if not isinstance(methods, Mapping):
            names = [method.name for method in methods]
            if "" in names or len(set(names)) < len(names):
                raise UserError(f"methods: the names are {names}: each method needs a name of its own")
            methods = dict(zip(names, methods, strict=True))
        for name, value in {**models, "methods": methods, "pairing": pairing, "variables": variables}.items():
            object.__setattr__(self, name, value)

    # ------------------------------------------------------------------------------------------------ before training

    def specs(self, image_size: tuple[int, int]) -> tuple[DetectorOutput, DetectorOutput]:
        """Shapes of both outputs for one image of (height, width) pixels, on the levels that both have."""
        return taps.shared_levels(self._with_rows(self.student.spec(image_size)), self.teacher.spec(image_size))

    def init(self, key: Array, image_size: tuple[int, int]) -> dict[str, Any]:
        """What each method trains beside the student; also checks taps, channels, sizes and pairs.

        Args:
          key: PRNG key; what a method gets does not depend on the other methods.
          image_size: height and width of the network input in pixels.

        Returns:
          {method: params}, nested dicts of float32 arrays.

        Raises:
          UserError: a method cannot compare these two; the method is named.
        """
        specs = self.specs(image_size)
        adapters = {}
        for name, method in self.methods.items():
            try:
                adapters[name] = method.init(method_key(key, name), *self._compared(method, *specs))
            except UserError as error:
                raise UserError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error
        return adapters

    @property
    def teacher_reads(self) -> tuple[str, ...]:
        """The taps that the methods read of the teacher."""
        return tuple(sorted({name for method in self.methods.values() for name in method.reads.teacher}))

    # --------------------------------------------------------------------------------------------------- in the step

    def observe(self, batch: Batch, variables: PyTree = None) -> DetectorOutput:
        """The teacher's output for a batch: the taps that the methods read, without gradient.

        Args:
          batch: what the teacher reads of it; a detector reads `image` u8[B, H, W, 3].
          variables: of the teacher; by default those of the loaded model that the distiller was made with.

        Raises:
          UserError: the teacher has no `observe`, or its output lacks a tap that a method reads.
        """
        if getattr(self.teacher, "observe", None) is None:
            raise UserError("teacher: it has no `observe`: pass its output to `terms` as `observed`")
        variables = self.variables if variables is None else variables
        whole = self.teacher.observe(variables, batch)
        if "detections" in self.teacher_reads and whole.detections is None:
            whole = dataclasses.replace(whole, detections=self._detect(whole, batch))
        output = taps.only(whole, self.teacher_reads)
        if self._pairs_by_content(lambda: self.student.spec(batch["image"].shape[1:3]), whole):
            output = dataclasses.replace(output, rows=whole.rows)
        return jax.lax.stop_gradient(output)

    def terms(
        self,
        adapters: Mapping[str, Any],
        output: DetectorOutput,
        batch: Batch,
        variables: PyTree = None,
        *,
        observed: DetectorOutput | None = None,
        assignment: Assignment | None = None,
        key: Array,
        step: Array | int | None = None,
    ) -> dict[str, Array]:
        """All terms of all methods, unweighted.

        Args:
          adapters: of `init`, as trained so far.
          output: of the student on the batch.
          batch: `image` u8[B, H, W, 3]; what methods and teacher read of it: `boxes`, `labels`, `valid`, `image_size`.
          variables: of the teacher; by default those of the loaded model that the distiller was made with.
          observed: what `observe` returned for this batch; by default the teacher is run. The location of rows on a
            grid may be left out if the teacher has `priors`.
          assignment: of the student's assigner; by default it assigns. Of a two-stage student, its `regions` are the
            rows that both sides are asked about.
          key: PRNG key of the run, or of the step if `step` is None.
          step: i32[], folded into the key.

        Returns:
          {"method/term": f32[]}; `total` adds them up with their weights.

        Raises:
          UserError: an output lacks a tap that a method reads, or the batch lacks the ground truth.
        """
        key = key if step is None else jax.random.fold_in(key, step)
        variables = self.variables if variables is None else variables
        if observed is None:
            observed = self.observe(batch, variables)
        observed = self._with_places(observed, batch)
        whole = self._with_rows(output)
        reads = {name for method in self.methods.values() for side in method.reads for name in side}
        by_regions = whole.at is not None and any(map(_compares_rows, self.methods.values()))
        targets = _targets(batch) if by_regions or reads & _OF_BOXES else None
        if (by_regions or "assignment" in reads) and assignment is None and targets is not None:
            assignment = self._assign(output, targets, key)
        student, teacher = taps.shared_levels(whole, jax.lax.stop_gradient(observed))
        pairs = None if by_regions else self._pair(student.rows, teacher.rows)
        of_regions = _regions(student, teacher, assignment) if by_regions else None

        def paired(given: Assignment) -> Assignment:
            given = given._replace(queries=None, denoising=None)
            if (own := student.rows) is not None and student.at is None:
                given = jax.tree.map(lambda rows: rows[:, : _count(own)], given)
            return pairings.take_assignment(given, pairs)

        def assign(targets: Targets) -> Assignment:
            if of_regions is not None and assignment is not None:
                assert assignment.regions is not None
                return _match(of_regions[0], assignment.regions, targets, ~assignment.ignore)
            return paired(self._assign(output, targets, key))

        def proposals() -> Proposals:
            assert targets is not None
            boxes, valid = self.teacher.propose(teacher, targets.image_size)
            sides = regions.with_rows(student, teacher, boxes)
            names = [f"rows.{field}" for field in taps.OF_REGIONS]
            of_student, of_teacher = (_fields(side.rows or Rows(), names) for side in sides)
            return Proposals(of_student, of_teacher, _match(sides[0], boxes, targets, valid))

        def losses(targets: Targets) -> Mapping[str, Array]:
            found = self._assign(output, targets, key)._replace(denoising=None)
            return self.student.loss(output, targets, found)

        def learned(targets: Targets, names: Iterable[str]) -> tuple[PairedRows, Assignment]:
            found = self._assign(output, targets, key)._replace(denoising=None)
            rows = whole.rows or Rows()
            if whole.at is not None:
                assert found.regions is not None
                rows = regions.own_rows(whole.at, found.regions)
            return _fields(rows, names), found

        def boxes(maps: tuple[Array, ...]) -> Array:
            return self.teacher.decode_boxes(dataclasses.replace(teacher, box_reg=maps))

        ready = None if assignment is None else paired(assignment)
        rows = _paired_rows(student.rows, teacher.rows, pairs)
        values = {}
        for name, method in self.methods.items():
            sides, rows_of = (student, teacher), rows
            if of_regions is not None and _compares_rows(method):
                sides, rows_of = of_regions, (of_regions[0].rows or Rows(), of_regions[1].rows or Rows())
            mine, theirs = self._read(method, *sides)
            context = Context(
                student=mine,
                teacher=theirs,
                student_rows=_fields(rows_of[0], method.reads.student),
                teacher_rows=_fields(rows_of[1], method.reads.teacher),
                targets=targets if "targets" in method.reads.student else None,  # type: ignore[arg-type]
                assignment=ready if "assignment" in method.reads.student else None,  # type: ignore[arg-type]
                key=method_key(key, name),
                teacher_head=self._head(variables) if "head" in method.reads.teacher else None,  # type: ignore[arg-type]
                teacher_boxes=boxes if "head" in method.reads.teacher else None,  # type: ignore[arg-type]
                assign=assign if "assignment" in method.reads.student else None,  # type: ignore[arg-type]
                proposals=proposals() if "proposals" in method.reads.teacher else None,  # type: ignore[arg-type]
                loss=losses if "loss" in method.reads.student else None,  # type: ignore[arg-type]
                learned=functools.partial(learned, names=method.reads.student)  # type: ignore[arg-type]
                if "loss" in method.reads.student
                else None,
            )
            terms = method.apply(adapters[name], context)
            values |= {f"{name}/{term}": value for term, value in terms.items()}
        return values

    def without_boxes(self, image_size: tuple[int, int]) -> "Distiller":
        """The distiller with those of its methods alone that read no ground truth, for images that have none.

        Args:
          image_size: height and width of the network input in pixels.
        """
        by_regions = self.student.spec(image_size).at is not None

        def reads_boxes(method: Method) -> bool:
            reads = {*method.reads.student, *method.reads.teacher}
            return bool(reads & _OF_BOXES) or (by_regions and _compares_rows(method))

        kept = {name: method for name, method in self.methods.items() if not reads_boxes(method)}
        return Distiller(self.student, self.teacher, kept, self.pairing, self.variables)

    def weights(self, step: Array | int) -> dict[str, Array | float]:
        """The weight of every term at a step: {"method/term": f32[]}."""
        return {
            f"{name}/{term}": w * m.scale(step) for name, m in self.methods.items() for term, w in m.weights.items()
        }

    def total(self, terms: Mapping[str, Array], step: Array | int) -> Array:
        """The weighted sum of the terms at a step, f32[]: what is added to the detection loss."""
        weights = self.weights(step)
        return jnp.asarray(sum(weights[name] * value for name, value in terms.items()))

    # ------------------------------------------------------------------------------------------------------- helpers

    def _with_rows(self, output: DetectorOutput) -> DetectorOutput:
        """The student's output with its rows, if a method reads any and they are not there yet."""
        reads = {name for method in self.methods.values() for name in method.reads.student}
        needed = reads & {"assignment"} or any(name.startswith("rows.") for name in reads)
        rows = getattr(self.student, "rows", None)
        if output.rows is not None or rows is None or not needed:
            return output
        if isinstance(jax.tree.leaves(output)[0], jax.ShapeDtypeStruct):
            return dataclasses.replace(output, rows=jax.eval_shape(rows, output))
        return dataclasses.replace(output, rows=rows(output))

    def _with_places(self, observed: DetectorOutput, batch: Batch) -> DetectorOutput:
        """The teacher's output with the location of its rows, if they lie on a grid that the teacher can tell."""
        rows, priors = observed.rows, getattr(self.teacher, "priors", None)
        if rows is None or rows.location is not None or not rows.level_sizes or priors is None:
            return observed
        location = priors(tuple(batch["image"].shape[1:3]))
        return dataclasses.replace(observed, rows=dataclasses.replace(rows, location=location))

    def _compared(
        self, method: Method, student: DetectorOutput, teacher: DetectorOutput
    ) -> tuple[DetectorOutput, DetectorOutput]:
        """The specs of what a method reads, if it can compare these two."""
        for role, output in (("student", student), ("teacher", teacher)):
            if method.one_stage and output.at is not None:
                raise UserError(f"the {role} has two stages: {method.one_stage}")
            if method.grid and output.layers:
                raise UserError(f"the {role} is a transformer, whose queries lie on no grid: {method.grid}")
        compares, proposes = _compares_rows(method), "proposals" in method.reads.teacher
        if compares and self.pairing is pairings.by_place and (student.layers or teacher.layers):
            raise UserError(
                "predictions are compared row by row, and the rows of a transformer are queries, which have no place: "
                "take a method that compares maps, or pair them by `kdjax.distill.pairing.by_hungarian` or `by_overlap`"
            )
        by_regions = (compares or proposes) and regions.check(student, teacher)
        if proposes and not by_regions:
            raise UserError("the teacher's proposals are compared, which needs a student and a teacher with two stages")
        if compares and by_regions:
            box = jax.ShapeDtypeStruct((1, 1, 4), jnp.float32)
            student, teacher = regions.with_rows(student, teacher, cast(Array, box))
        read = self._read(method, student, teacher)
        if compares and not by_regions:
            by_content = self._pairs_by_content(lambda: student, teacher)
            sides = (student, teacher) if by_content else read
            self.pairing(*(side.rows or Rows() for side in sides))
        classes = [getattr(model, "num_classes", None) for model in (self.student, self.teacher)]
        if "detections" in method.reads.teacher and None not in classes and classes[0] != classes[1]:
            raise UserError(f"the student has {classes[0]} classes and the teacher {classes[1]}: they must be the same")
        return read

    def _read(
        self, method: Method, student: DetectorOutput, teacher: DetectorOutput
    ) -> tuple[DetectorOutput, DetectorOutput]:
        """Both outputs, with only the taps that a method declares."""
        sides = []
        for role, output in (("student", student), ("teacher", teacher)):
            names = getattr(method.reads, role)
            for extra, attribute in EXTRAS:
                there = getattr(getattr(self, role), attribute, None) or getattr(output, extra, None)
                if extra in names and there is None:
                    raise UserError(f"the method reads the {role}'s {extra}, which this {role} does not have")
            try:
                sides.append(taps.only(output, names))
            except UserError as error:
                raise UserError(f"{role}: {error}") from error
        return sides[0], sides[1]

    def _pair(self, student: Rows | None, teacher: Rows | None) -> Pairing | None:
        if student is None or teacher is None or not any(map(_compares_rows, self.methods.values())):
            return None
        return self.pairing(student, teacher)

    def _pairs_by_content(self, student: Callable[[], DetectorOutput], teacher: DetectorOutput) -> bool:
        """Whether rows are paired by more of what they say than the methods read of them."""
        if self.pairing is pairings.by_place or not any(map(_compares_rows, self.methods.values())):
            return False
        if self.pairing is not pairings.auto:
            return True
        sides = teacher.rows, self._with_rows(student()).rows
        return any(rows is not None and pairings.are_queries(rows) for rows in sides)

    def _assign(self, output: DetectorOutput, targets: Targets, key: Array) -> Assignment:
        return jax.lax.stop_gradient(self.student.assign(output, targets, key))

    def _detect(self, output: DetectorOutput, batch: Batch) -> PaddedDetections:
        """The teacher's best 100 detections, of 1,000 before NMS."""
        if getattr(self.teacher, "decode", None) is None or "image_size" not in batch:
            missing = "`image_size` in the batch" if "image_size" not in batch else "`decode` or `detections`"
            raise UserError(f"teacher: a method reads its detections, which needs {missing}")
        found = self.teacher.decode(output, batch["image_size"], pre_nms=1000, max_detections=100)
        return found._replace(masks=None)

    def _head(self, variables: PyTree) -> Callable[..., tuple[Array, ...]]:
        return lambda features, *, branch, start: self.teacher.head(
            *jax.lax.stop_gradient(variables), features, branch=branch, start=start
        )


def _regions(
    student: DetectorOutput, teacher: DetectorOutput, assignment: Assignment | None
) -> tuple[DetectorOutput, DetectorOutput]:
    """Both outputs, with the regions of the student's assignment as rows."""
    if teacher.at is None:
        raise UserError("teacher: the rows of the student are regions, about which this teacher cannot be asked")
    if assignment is None or assignment.regions is None:
        raise UserError("student: it has two stages, but its assignment has no `regions`")
    return regions.with_rows(student, teacher, assignment.regions)


def _match(output: DetectorOutput, boxes: Array, targets: Targets, valid: Array) -> Assignment:
    """The assignment of regions to objects, for an output whose rows are regions."""
    assert output.rows is not None
    assert output.rows.logits is not None
    return regions.match(boxes, targets, valid, num_classes=output.rows.logits.shape[-1] - 1)


def method_key(key: Array, name: str) -> Array:
    """A key of the method's own, the same whatever other methods run beside it."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _targets(batch: Batch) -> Targets:
    missing = [name for name in ("image", "boxes", "labels", "valid", "image_size") if name not in batch]
    if missing:
        raise UserError(f"batch: {', '.join(missing)} missing: a method reads the ground truth")
    return targets_of(batch)


def _compares_rows(method: Method) -> bool:
    reads = {name for side in method.reads for name in side if name.startswith("rows.")} - {"rows.location"}
    return bool(reads) and any(name.startswith("rows.") for name in method.reads.teacher)


def _count(rows: Rows) -> int:
    values = (rows.logits, rows.boxes, rows.distribution, rows.quality)
    return next((v.shape[1] for v in values if v is not None), 0 if rows.location is None else len(rows.location))


def _paired_rows(student: Rows | None, teacher: Rows | None, pairs: Pairing | None) -> tuple[Rows, Rows]:
    student, teacher = student or Rows(), teacher or Rows()
    if pairs is None:
        return student, teacher
    return pairings.take(student, pairs.student), pairings.take(teacher, pairs.teacher)


def _fields(rows: Rows, reads: Iterable[str]) -> PairedRows:
    names = [name.removeprefix("rows.") for name in reads if name.startswith("rows.")]
    return cast(PairedRows, taps.with_fields(rows, {name: getattr(rows, name) for name in names}))
