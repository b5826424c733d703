"""The teachers of a run: loading them, and what each says about a batch."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from kdjax import data, resources, sharding, weights
from kdjax.detectors.api import Detector, Tree
from kdjax.distill import Distiller, Distillers, Method, pairing, teachers
from kdjax.distill.teachers import RECORDED, functions_of, without_places
from kdjax.errors import UserError, prefix
from kdjax.inference.onnx_teacher import OnnxTeacher, on_host
from kdjax.inference.onnx_teacher import load_teacher as open_onnx
from kdjax.structs import Array, DetectorOutput
from kdjax.training.config import Config
from kdjax.training.models import (
    adapters_of,
    build_methods,
    check_size,
    in_precision,
    load_detector,
    named_detector,
    precision,
    reads_predictions,
)
from kdjax.training.step import Batch, TeacherVariables
from kdjax.weights.checkpoint import fingerprint


class Observer(NamedTuple):
    """A teacher as a program of its own, ahead of the student's step."""

    # (variables of the teacher, batch) -> what the methods read of it; every array has a batch axis
    function: Callable[[Any, Batch], DetectorOutput]
    # the function, jitted for the devices of the run; of a teacher on the host the function itself
    program: Callable[[Any, Batch], DetectorOutput]
    output: DetectorOutput  # shapes of what it returns for a batch of the run


class TeacherOfRun(NamedTuple):
    """A teacher of a run, with the methods that compare the student with it."""

    name: str  # of config.teachers; "" of config.teacher
    detector: Any  # a `Detector`, an `OnnxTeacher`, or for a mean of others and for a file of detections a `Custom`
    detects: bool  # it is a detector with the classes of the data, so that it can be evaluated
    distiller: Distiller  # of student, teacher and methods, in float32
    variables: Any  # of a detector `TeacherVariables`, of an ONNX file its hash, of a mean a tuple, of detections ()
    # None: it runs inside the step, because its output holds functions or is read from the batch
    observer: Observer | None
    file: data.Found | None = None  # of detections on the training images, if it is one
    further: data.Found | None = None  # of detections on the images without labels
    sha256: str = ""  # of its weights; of a file of detections `file` knows it

    @property
    def model(self) -> str:
        """What it is: the name of its detector, or what else."""
        return "file of detections" if self.file else getattr(self.detector, "name", "mean")

    @property
    def named(self) -> str:
        """What a sentence calls it."""
        return f"the teacher {self.name}" if self.name else "the teacher"

    @property
    def hash(self) -> str:
        """The hash of its weights, or of its file."""
        return self.file.sha256 if self.file else self.sha256

    @property
    def methods(self) -> Mapping[str, Method]:
        """The methods by name."""
        return self.distiller.methods

    @property
    def on_host(self) -> bool:
        """Whether it runs on the host, ahead of the step."""
        return isinstance(self.detector, OnnxTeacher)

    @property
    def setting(self) -> str:
        """Where its settings are."""
        return setting_of(self.name)

    def settings(self, config: Config) -> Config:
        """Its settings in the config of the run."""
        return config.teachers[self.name] if self.name else config.teacher

    @property
    def role(self) -> str:
        """What its evaluation is called."""
        return f"teacher/{self.name}" if self.name else "teacher"


def setting_of(name: str) -> str:
    """Where the settings of a teacher are, by its name; "": it is the only one."""
    return f"config.teachers.{name}" if name else "config.teacher"


def teacher_configs(config: Config) -> dict[str, tuple[Config, Config]]:
    """The settings and the options of the methods of every teacher, by name.

    Returns:
      {"": (config.teacher, config.methods)} or one entry for each of config.teachers; empty without a teacher.
    """
    if config.teachers:
        return {name: (chosen, chosen.methods) for name, chosen in config.teachers.items()}
    return {"": (config.teacher, config.methods)} if config.teacher.weights else {}


def members(chosen: Config) -> list[str]:
    """The teachers whose mean a teacher is; none if it is a model of its own."""
    return chosen.mean.split("+") if "mean" in chosen and chosen.mean else []


def of_file(chosen: Config) -> bool:
    """Whether a teacher is a file of detections.

    Args:
      chosen: its settings.
    """
    return chosen.weights.lower().endswith(".json") and not chosen.weights.endswith(weights.INDEX)


def with_detections(config: Config, dataset: data.Dataset) -> data.Dataset:
    """The data with the detections of the teacher that is a file, if there is one; says how many they are.

    Raises:
      UserError: the file cannot be used.
    """
    for name, (chosen, _) in teacher_configs(config).items():
        if of_file(chosen):
            with prefix(f"{setting_of(name)}.weights"):
                dataset = data.with_found(dataset, resources.model_path(chosen.weights))
            parts = {"training images": dataset.splits["train"], "images without labels": dataset.unlabelled}
            if not jax.process_index():
                print("\n".join(one.found.told(what) for what, one in parts.items() if one and one.found))
    return dataset


def load_teacher(
    where: str, chosen: Config, dataset: data.Dataset, key: Array, *, predictions: bool
) -> tuple[Detector, tuple[Tree, Tree] | None, bool]:
    """A teacher with its weights.

    Its classes may differ from those of the data if the methods read only its feature maps; it is then not evaluated.

    Args:
      where: "config.teacher" or "config.teachers.NAME"; begins messages.
      chosen: its settings.
      dataset: of the run.
      key: PRNG key for what the weights lack.
      predictions: whether a method reads predictions of it.

    Returns:
      The detector, (params, stats), and whether its classes are those of the data.

    Raises:
      UserError: the weights cannot be read, or do not fit the detector or the classes of the data.
    """
    try:
        return *load_detector("teacher", chosen, dataset, key, where), True
    except UserError:
        if predictions:
            raise
    detector = named_detector(chosen, len(dataset.classes)) if chosen.detector else None
    detector, params, stats, _ = weights.load(chosen.weights, detector, key=key)
    tqdm.write(
        f"{where}.weights: the classes of {chosen.weights} are not those of the data: only its feature maps "
        "are used; it is not evaluated",
        file=sys.stderr,
    )
    return detector, (params, stats), False


def load_onnx(where: str, chosen: Config, dataset: data.Dataset, *, predictions: bool) -> tuple[OnnxTeacher, bool]:
    """A teacher that is an ONNX file.

    Args:
      where: "config.teacher" or "config.teachers.NAME"; begins messages.
      chosen: its settings.
      dataset: of the run, with whose classes those of the file are matched by name.
      predictions: whether a method reads predictions of it; if not, its classes may be others.

    Returns:
      The teacher, and whether it finds objects of all classes of the data.

    Raises:
      UserError: the file cannot be read, does not fit its description, or lacks a class of the data.
    """
    with prefix(where):
        teacher = open_onnx(resources.model_path(chosen.weights), chosen.layout, chosen.options.to_dict())
        if not teacher.detects:
            return teacher, False
        try:
            return teacher.matched(dataset.classes), True
        except UserError as error:
            if predictions:
                raise
            tqdm.write(f"{where}.weights: {error}: only its maps are used; it is not evaluated", file=sys.stderr)
            return teacher, False


def host_observer(teacher: TeacherOfRun, config: Config) -> Observer:
    """The observer of a teacher that runs on the host; its program takes and returns arrays of the host."""

    def observe(variables: Any, batch: Batch) -> DetectorOutput:  # noqa: ANN401 - a tree of arrays
        del variables
        return on_host(teacher.distiller, {name: np.asarray(value) for name, value in batch.items()})

    one = {name: np.zeros((1, *leaf.shape[1:]), leaf.dtype) for name, leaf in batch_spec(config).items()}
    one["image_size"] += np.array(one["image"].shape[1:3], np.int32)
    output = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((config.batch_size, *leaf.shape[1:]), leaf.dtype), observe(None, one)
    )
    return Observer(observe, observe, output)


def load_teachers(
    config: Config,
    dataset: data.Dataset,
    key: Array,
    student: Detector,
    layout: sharding.Layout,
    program: Callable[..., jax.stages.Wrapped],
) -> tuple[TeacherOfRun, ...]:
    """All teachers, also those that have no methods and are only a part of a mean."""
    image_size, rule, chosen = tuple(config.data.image_size), pairing.RULES[config.pairing], teacher_configs(config)
    found: dict[str, TeacherOfRun] = {}
    averaged = {member for own, _ in chosen.values() for member in members(own)}
    # Means come last.
    for name, (own, options) in sorted(chosen.items(), key=lambda item: bool(members(item[1][0]))):
        where, of_methods = setting_of(name), f"{setting_of(name)}.methods" if name else "config.methods"
        built, file, further = build_methods(options, of_methods), None, None
        if averaging := [found[member] for member in members(own)]:
            with prefix(where):
                detector = teachers.mean([in_precision(member.detector, precision(config)) for member in averaging])
                detector.spec(image_size)
            detects, variables = False, tuple(member.variables for member in averaging)
        elif of_file(own):
            detector, detects, variables, file = teachers.from_file(), False, (), dataset.splits["train"].found
            further = dataset.unlabelled.found if dataset.unlabelled else None
        elif own.layout:
            detector, detects = load_onnx(where, own, dataset, predictions=reads_predictions(built))
            variables = layout.put(detector.variables)
        else:
            predictions = reads_predictions(built) or name in averaged
            detector, loaded, detects = load_teacher(where, own, dataset, key, predictions=predictions)
            check_size("teacher", detector, image_size)
            assert loaded is not None, "check_models refuses teachers without weights"
            variables = layout.put(TeacherVariables(*loaded))
        distiller = Distiller(student, detector, built, rule)
        sha256 = fingerprint(sharding.gather(variables))
        teacher = TeacherOfRun(name, detector, detects, distiller, variables, None, file, further, sha256)
        if built and teacher.on_host:
            # Whether the methods can compare the two; what is read of the file depends on it.
            adapters_of(teacher.distiller, key, image_size, of_methods)
            with prefix(where):
                teacher = teacher._replace(observer=host_observer(teacher, config))
        elif built and file is None:
            observe = observe_with(distiller_in_precision(teacher, config))
            output = jax.eval_shape(observe, variables, batch_spec(config))
            if not functions_of(output):
                rows = sharding.batch_sharding(layout.mesh)
                run = program(teacher.role, layout.gathering(observe), out_shardings=rows)
                teacher = teacher._replace(observer=Observer(observe, run, output))
        found[name] = teacher
    return tuple(found[name] for name in chosen)


def distiller_in_precision(teacher: TeacherOfRun, config: Config) -> Distiller:
    """The distiller of a teacher, with both models in the precision of the run."""
    student, built = teacher.distiller.student, teacher.distiller.methods
    if isinstance(teacher.detector, Detector):
        detector: Any = in_precision(teacher.detector, precision(config))
    else:
        detector = teacher.detector
    return Distiller(in_precision(student, precision(config)), detector, built, pairing.RULES[config.pairing])


def together(found: Sequence[TeacherOfRun]) -> tuple[Distiller | Distillers | None, Any]:
    """The distiller of all teachers with methods, and the variables that it takes."""
    if not found:
        return None, None
    if not found[0].name:
        return found[0].distiller, found[0].variables
    used = [teacher for teacher in found if teacher.methods]
    return Distillers({one.name: one.distiller for one in used}), {one.name: one.variables for one in used}


def observe_with(distiller: Distiller) -> Callable[[Any, Batch], DetectorOutput]:
    """`Observer.function`."""

    def observe(variables: Any, batch: Batch) -> DetectorOutput:  # noqa: ANN401 - a tree of arrays
        return without_places(distiller.observe(batch, variables))

    return observe


def unlabelled_rows(config: Config) -> int:
    """Number of images without labels in a batch."""
    return round(config.data.unlabelled_ratio * config.batch_size) if config.data.unlabelled else 0


def gives_boxes(found: Sequence[TeacherOfRun]) -> TeacherOfRun | None:
    """The teacher whose detections are the boxes of images without labels.

    It is the first that has the data's classes, or a file that has detections of these images if there is no such one.
    """
    able = [teacher for teacher in found if teacher.detects]
    return next(iter(able + [teacher for teacher in found if teacher.further and len(teacher.further.rows)]), None)


def sitting_out(found: Sequence[TeacherOfRun], image_size: tuple[int, int]) -> list[str]:
    """The methods that do not see images without labels: they read boxes, and no teacher gives any."""
    if gives_boxes(found):
        return []
    return [
        f"{teacher.name}/{name}" if teacher.name else name
        for teacher in found
        for name in teacher.methods
        if name not in teacher.distiller.without_boxes(image_size).methods
    ]


def check_unlabelled(
    found: Sequence[TeacherOfRun], distiller: Distiller | Distillers | None, image_size: tuple[int, int]
) -> None:
    """Checks that some method sees the images without labels.

    Raises:
      UserError: none does.
    """
    out = sitting_out(found, image_size)
    if distiller is not None and len(out) == len(distiller.methods):
        raise UserError(
            f"config.data.unlabelled: {', '.join(sorted(out))} read boxes, and no teacher can give these images "
            "some: leave it empty, take methods that compare maps or rows, a teacher with the classes of the data, or "
            "a file with detections of these images"
        )


def look_with(
    found: Sequence[TeacherOfRun], config: Config, dataset: data.Dataset
) -> Callable[[Mapping[str, Any], Batch], dict[str, Any]]:
    """What makes a batch of images without labels into what a step takes: with all that the teachers say about it."""
    giver = gives_boxes(found)

    def look(variables: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
        said = recorded(batch, found)
        said |= {
            one.name: without_places(one.distiller.observe(batch, variables[one.name]))
            for one in found
            if one.observer is not None and not one.on_host
        }
        boxes = {}
        if giver and not giver.on_host:
            output = giver.distiller.teacher.observe(variables[giver.name], batch)
            best = output.detections or giver.detector.decode(
                output, batch["image_size"], pre_nms=1000, max_detections=dataset.max_boxes
            )
            valid = best.valid & (best.scores >= config.data.unlabelled_score)
            boxes = {"boxes": best.boxes, "labels": best.labels, "valid": valid}
        return dict(batch) | boxes | attached(said)

    return look


def batch_spec(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what a teacher reads of a batch."""
    rows, size = config.batch_size, tuple(config.data.image_size)
    return {
        "image": jax.ShapeDtypeStruct((rows, *size, 3), np.uint8),
        "image_size": jax.ShapeDtypeStruct((rows, 2), np.int32),
    }


def recorded(batch: Batch, found: Sequence[TeacherOfRun]) -> dict[str, DetectorOutput]:
    """What a batch holds of the teachers, by name."""
    if RECORDED not in batch:
        return {}
    return dict(batch[RECORDED]) if found and found[0].name else {"": batch[RECORDED]}


def attached(said: Mapping[str, DetectorOutput]) -> dict[str, Any]:
    """The entry of a batch for what its teachers say, as the distiller takes it; by the names of the teachers."""
    if not said:
        return {}
    return {RECORDED: said[""] if "" in said else dict(said)}


def read_by_teacher(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a teacher reads of a batch, as `batch_spec`."""
    return {name: batch[name] for name in ("image", "image_size")}


def hash_of(found: Sequence[TeacherOfRun]) -> Any:  # noqa: ANN401 - as json holds it
    """The hash of the teacher's weights or file; of several teachers by name; None without."""
    by_name = {one.name: one.hash for one in found}
    return by_name.get("", by_name or None)
