"""The detectors and methods that a config names."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import jax
from tqdm import tqdm

from kdjax import data, detectors, methods, weights
from kdjax.detectors.api import Detector, Tree
from kdjax.distill import Distiller, Distillers, Method
from kdjax.distill.distiller import method_key
from kdjax.errors import UserError, listed
from kdjax.structs import Array
from kdjax.training.config import AUTO, KINDS, Config, has_type


def build_methods(chosen: Config, where: str = "config.methods") -> dict[str, Method]:
    """Methods by name.

    Args:
      chosen: {method: its options}, as `config.methods`; a weight of "auto" begins as the published one.
      where: begins the message of an error.

    Raises:
      UserError: unknown method or option, or a value out of its range.
    """
    built = {}
    for name, options in chosen.items():
        try:
            given = {k: v for k, v in options.items() if (k, v) != ("weight", AUTO)}
            for option, default in methods.options(name).items():
                kind = KINDS.get(type(default))
                if kind and option in given and not has_type(given[option], type(default)):
                    kind += f" or '{AUTO}'" * (option == "weight")
                    raise UserError(f"{name}: {option} must be {kind}, not {given[option]!r}")
            built[name] = methods.build(name, **given)
        except UserError as error:
            text = str(error)
            raise UserError(f"{where}{'.' if text.startswith(f'{name}: ') else ': '}{text}") from error
    return built


def all_methods(config: Config) -> dict[str, Method]:
    """The methods of a run by name, with several teachers by "teacher/method".

    Raises:
      UserError: unknown method or option, or a value out of its range.
    """
    several = {
        f"{name}/{method}": built
        for name, chosen in config.teachers.items()
        for method, built in build_methods(chosen.methods, f"config.teachers.{name}.methods").items()
    }
    return several | build_methods(config.methods)


def named_detector(chosen: Config, num_classes: int) -> Detector:
    """The detector that `config.student` or `config.teacher` names.

    Raises:
      UserError: unknown detector or option, or a value out of its range.
    """
    return detectors.build(chosen.detector, num_classes, **chosen.options.to_dict())


def check_size(role: str, detector: Detector, image_size: tuple[int, int]) -> None:
    """Checks that the images of a run fit a detector.

    Raises:
      UserError: height or width is not a multiple of its `size_divisor`.
    """
    height, width = image_size
    if height % detector.size_divisor or width % detector.size_divisor:
        raise UserError(
            f"config.data.image_size must be multiples of {detector.size_divisor} for the {role} {detector.name}, not "
            f"{height}x{width}"
        )


def check_masks(student: Detector, config: Config) -> None:
    """Checks that the batches have masks if the student learns them.

    Raises:
      UserError: they have none.
    """
    if student.masks and not config.data.masks:
        raise UserError(
            f"config.data.masks: the student {student.name} learns masks, but the batches have none: set it to True, "
            "or choose a student without masks"
        )


def load_detector(
    role: str, chosen: Config, dataset: data.Dataset, key: Array, where: str = ""
) -> tuple[Detector, tuple[Tree, Tree] | None]:
    """The detector of a role with its initial weights.

    Args:
      role: "student" or "teacher". The classifiers of a student's weights for other classes are re-initialised.
      chosen: `config.student` or `config.teacher`.
      dataset: of the run.
      key: PRNG key for what the weights lack.
      where: begins messages; "" = "config.ROLE".

    Returns:
      The detector, and (params, stats) or None if there are no weights.

    Raises:
      UserError: the weights cannot be read, or do not fit the detector or, for a teacher, the classes of the data.
    """
    where = where or f"config.{role}"
    detector = named_detector(chosen, len(dataset.classes)) if chosen.detector else None
    if not chosen.weights:
        assert detector is not None, "check_models refuses a config without detector and weights"
        return detector, None
    detector, params, stats, classes = weights.load(
        chosen.weights, detector, key=key, keep_classifiers=role == "teacher"
    )
    if classes is not None and not data.same_names(classes, dataset.classes):
        if role == "student":
            told = f"the classes of {chosen.weights} are not those of the data: the classifiers are re-initialised"
            tqdm.write(f"{where}.weights: {told}", file=sys.stderr)
            detector = detectors.build(detector.name, len(dataset.classes), **detector.options)
            return detector, (weights.reset_classifiers(detector, params, key=key), stats)
        missing = [name for name in dataset.classes if name not in classes]
        what = f"{missing[0]!r} is unknown to the {role}" if missing else "the order or number of classes differs"
        raise UserError(
            f"{where}.weights: the class map of {chosen.weights} does not fit the data: {what}; "
            f"{role}: {listed(classes)}; data: {listed(dataset.classes)} (if only the spelling differs, "
            "rename the classes with `kdjax import-weights --classes`)"
        )
    if detector.num_classes != len(dataset.classes):
        raise UserError(
            f"{where}.weights: {chosen.weights} has {detector.num_classes} classes, the data has {len(dataset.classes)}"
        )
    return detector, (params, stats)


def precision(config: Config) -> str:
    """The precision of feature maps in training, "float32" or "bfloat16": `config.dtype`, or what "auto" stands for."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def in_precision(detector: Detector, dtype: str) -> Detector:
    """The detector with images, and so all feature maps up to the predictions, in the given precision."""
    if dtype == "float32":
        return detector
    return dataclasses.replace(detector, preprocess=lambda images: detector.preprocess(images).astype(dtype))


def reads_predictions(chosen: Mapping[str, Method]) -> bool:
    """Whether a method reads predictions of the teacher, so that teacher and student must have the same classes."""
    reads = {name for method in chosen.values() for name in method.reads.teacher}
    predictions = ("rows.", "cls_logits", "box_reg", "quality", "head", "layers", "ask", "proposals", "detections")
    return any(name.startswith(predictions) for name in reads)


def init_adapters(distiller: Distiller | Distillers, key: Array, image_size: tuple[int, int]) -> dict[str, Any]:
    """`Distiller.init`; an error also lists the methods that can compare this student and teacher.

    If the method itself can, with its default options, there is no list.

    Raises:
      UserError: a method cannot compare these two.
    """
    if isinstance(distiller, Distillers):
        return {
            name: adapters_of(one, method_key(key, name), image_size, f"config.teachers.{name}.methods")
            for name, one in distiller.by_teacher.items()
        }
    return adapters_of(distiller, key, image_size, "config.methods")


def adapters_of(distiller: Distiller, key: Array, image_size: tuple[int, int], where: str) -> dict[str, Any]:
    """`init_adapters` of one teacher; `where` begins the message of an error."""
    try:
        return distiller.init(key, image_size)
    except UserError as error:
        sides = distiller.student, distiller.teacher
        able = [n for n in methods.names() if not methods.refusal(n, *sides, image_size, distiller.pairing)]
        name = str(error).partition(":")[0]
        others = "" if name in able else f"; methods that run on this student and teacher: {', '.join(able)}"
        raise UserError(f"{where}.{error}{others}") from error
