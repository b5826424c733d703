"""Checks of the models: weights on images of the run, class maps, sizes, frozen layers and taps."""

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from kdjax import data, detectors, methods, sharding, weights
from kdjax.detectors.api import Detector, flatten
from kdjax.distill import tap
from kdjax.doctor.findings import ERROR, OK, WARNING, Finding
from kdjax.errors import UserError, listed
from kdjax.evals import coco, complexity, tide
from kdjax.evals.matching import truth_by_image
from kdjax.inference import predict as prediction
from kdjax.structs import Array, Detections
from kdjax.training.config import Config
from kdjax.training.models import named_detector
from kdjax.training.setup import Setup, model
from kdjax.training.teachers import TeacherOfRun

# (images u8[B, H, W, 3] RGB, their input by the detector's own preprocess) -> input f32[B, H, W, 3]
Change = Callable[[Array, Array], Array]
# Common mistakes in `preprocess`: what the input must be instead.
INPUTS: dict[str, Change] = {
    "its own with red and blue swapped": lambda images, own: own[..., ::-1],
    "RGB in [0, 255]": lambda images, own: images.astype(jnp.float32),
    "BGR in [0, 255]": lambda images, own: images[..., ::-1].astype(jnp.float32),
    "RGB in [0, 1]": lambda images, own: images / 255.0,
    "BGR normalised with ImageNet's mean and std": lambda images, own: _normalized(images)[..., ::-1],
    "RGB normalised with ImageNet's mean and std": lambda images, own: _normalized(images),
}


def check_weights(role: str, setup: Setup, image_count: int) -> list[Finding]:
    """Evaluates a detector with weights on validation images, also with other inputs and without classes.

    Args:
      role: "student", or the `role` of a teacher.
      setup: of the run.
      image_count: number of validation images.

    Returns:
      One finding; an error names the most likely mistake: the input, the class map, or the weights.
    """
    truth = data.ground_truth(setup.dataset, "val", limit=image_count)
    own, *others = _detections(role, setup, image_count, [lambda images, own: own, *INPUTS.values()])
    metrics, agnostic = coco.coco_metrics(truth, own), coco.coco_metrics(truth, own, use_categories=False)
    ap, ap50, ap50_agnostic = metrics["AP"], metrics["AP50"], agnostic["AP50"]
    measured = f"AP {100 * ap:.1f}, AP50 {100 * ap50:.1f} on {len(truth['images'])} validation images"
    if min(ap50, ap50_agnostic) < 0:
        message = f"the first {image_count} validation images have no objects: the {role} was not evaluated"
        return [Finding(WARNING, role, message)]
    ap50_by_input = {name: coco.coco_metrics(truth, found)["AP50"] for name, found in zip(INPUTS, others, strict=True)}
    best = max(ap50_by_input, key=lambda name: ap50_by_input[name])
    confusions = _confusions(truth, own, setup.dataset)
    wrong_input = ap50_by_input[best] > max(ap50 + 0.05, 1.1 * ap50)
    wrong_classes = bool(confusions) and ap50_agnostic > ap50 + 0.05
    if wrong_input and not (wrong_classes and ap50_by_input[best] < 0.8 * ap50_agnostic):
        message = (
            f"{measured}: AP50 rises to {100 * ap50_by_input[best]:.1f} when the input is {best}: fix the detector's "
            "`preprocess`"
        )
        return [Finding(ERROR, f"{role}'s input", message)]
    if wrong_classes:
        message = (
            f"{measured}: AP50 rises to {100 * ap50_agnostic:.1f} when classes are ignored: the class map is wrong "
            f"({'; '.join(confusions)})"
        )
        return [Finding(ERROR, f"{role}'s classes", message)]
    if ap50 < 0.1:
        message = (
            f"{measured}: the {role} barely detects anything: wrong data set, untrained weights, or boxes of the data "
            "are misplaced (--config.data.check=True draws them)"
        )
        return [Finding(WARNING if role == "student" else ERROR, role, message)]
    return [Finding(WARNING if ap50 < 0.3 else OK, role, measured)]


def _detections(role: str, setup: Setup, image_count: int, changes: Sequence[Change]) -> list[dict[int, Detections]]:
    """The detections by image id for each change of a detector's input; all share one compiled program."""
    detector, variables = model(setup, role)
    variables = sharding.replicate(variables, sharding.mesh_of(jax.local_devices()))  # once for all changes
    results = []
    for change in tqdm(changes, desc=f"{role}'s input", unit="input", leave=False):
        batches = data.eval_batches(
            setup.dataset,
            "val",
            setup.config.data,
            batch_size=setup.config.eval.batch_size,
            limit=image_count,
            fit=detector.fit,
        )
        run = prediction.program(
            detector,
            preprocess=lambda images, change=change: change(images, detector.preprocess(images)),
        )
        ids = setup.dataset.category_ids
        with contextlib.closing(batches):
            results.append(coco.collect(prediction.predict(detector, variables, batches, run=run, category_ids=ids)))
    return results


def _confusions(truth: dict[str, Any], found: Mapping[int, Detections], dataset: data.Dataset) -> list[str]:
    """The classes whose detections mostly lie on objects of another class.

    Of each image only the highest scores count, as many as the image has objects.
    """
    objects = truth_by_image(truth)
    kept = {image_id: found[image_id][: int((~of.crowd).sum())] for image_id, of in objects.items()}
    matrix = tide.confusion(objects, kept, len(truth["categories"]))
    objects_by_class = matrix[:-1, :-1].T  # one row per class of the detector
    most = objects_by_class.argmax(1)
    return [
        f"detections of {dataset.classes[label]!r} are objects of {dataset.classes[most[label]]!r}"
        for label in np.flatnonzero((objects_by_class.sum(1) >= 3) & (most != np.arange(len(most))))
    ]


def check_class_map(role: str, chosen: Config, dataset: data.Dataset) -> tuple[Finding, bool]:
    """Compares the class map of weights with that of the data.

    Args:
      role: "student", or the `role` of a teacher.
      chosen: its settings in the config; `prepare` has accepted it.
      dataset: of the run.

    Returns:
      The finding, and whether the classifiers of the weights are used: if the classes differ, those of a student are
      re-initialised, and of a teacher only the feature maps are used.
    """
    detector = named_detector(chosen, len(dataset.classes)) if chosen.detector else None
    with warnings.catch_warnings(record=True) as caught:  # of classifiers that are re-initialised
        warnings.simplefilter("always")
        names = weights.load(chosen.weights, detector)[3]
    expected = f"the {len(dataset.classes)} classes of the data: {listed(dataset.classes)}"
    kept = not caught if names is None else data.same_names(names, dataset.classes)
    if names is None and kept:
        message = f"the weights do not name their classes: they are taken as {expected}"
    elif kept:
        message = f"the weights have, in the same order, {expected}"
    else:
        found = f"the weights have {len(names)} others: {listed(names)}" if names else "the weights have others"
        message = f"the classifiers are re-initialised for {expected}; {found}"
        if role != "student":
            message = f"only the feature maps are used, because the classes are not {expected}; {found}"
    return Finding(OK, f"{role}'s class map", message), kept


def check_sizes(setup: Setup, teacher: TeacherOfRun) -> list[Finding]:
    """Compares the number of parameters of a teacher and the student."""
    large, small = (complexity.parameters(detector.shapes[0]) for detector in (teacher.detector, setup.student))
    message = f"the {teacher.role} has {large / 1e6:.2f} million parameters, the student {small / 1e6:.2f}"
    if large < small:
        return [Finding(WARNING, "sizes", f"{message}: are student and teacher swapped?")]
    return [Finding(OK, "sizes", message)]


def check_taps(setup: Setup, teacher: TeacherOfRun) -> list[Finding]:
    """Lists the feature maps that each method of a teacher compares, with their shapes by stride."""
    image_size = tuple(setup.config.data.image_size)
    sides_of = {"student": setup.student, "teacher": teacher.detector}
    specs = {role: detector.spec(image_size) for role, detector in sides_of.items()}
    chosen = teacher.settings(setup.config).methods if teacher.name else setup.config.methods
    findings = []
    for name, changes in chosen.items():
        options = methods.options(name) | changes.to_dict()
        sides, strides = [], []
        for role, spec in specs.items():
            if role not in options:
                continue
            maps = {}
            with contextlib.suppress(UserError):  # a name that only the method understands
                maps = tap(spec, options[role])
            shapes = ", ".join(f"{stride}: {m.shape[1]}x{m.shape[2]}x{m.shape[3]}" for stride, m in maps.items())
            sides.append(f"{role} {options[role]}" + f" ({shapes})" * bool(shapes))
            strides.append(set(maps))
        if not sides:
            continue
        alone = sorted(set.union(*strides) - set.intersection(*strides))
        message = ", ".join(sides) + f"; strides {', '.join(map(str, alone))} exist on one side only" * bool(alone)
        findings.append(Finding(OK, f"{f'{teacher.name}/' * bool(teacher.name)}{name}'s taps", message))
    return findings


def check_frozen(student: Detector) -> list[Finding]:
    """Checks that a student with random initialisation has no frozen layers."""
    shapes, skipped = flatten(student.shapes[0]), flatten(student.no_decay(student.shapes[0]))
    # No weight decay on a matrix or kernel means that it is frozen.
    frozen = [path for path, skip in skipped.items() if skip and shapes[path].ndim > 1]
    if not frozen:
        return []
    options = [name for name in detectors.options(student.name) if "frozen" in name or name.endswith("_eval")]
    message = (
        f"{len(frozen)} kernels ({frozen[0]} first) have random initialisation and are frozen: set "
        f"config.student.weights, or train them through config.student.options ({', '.join(options)})"
    )
    return [Finding(ERROR, "frozen layers", message)]


def _normalized(images: Array) -> Array:
    return (images.astype(jnp.float32) - jnp.array([123.675, 116.28, 103.53])) / jnp.array([58.395, 57.12, 57.375])
