"""The models of a run: weights that work on its images, class maps, sizes, frozen layers and taps."""

import contextlib
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from kdjax import data, methods, weights
from kdjax.detectors.api import Detector, flatten
from kdjax.distill import tap
from kdjax.doctor.findings import FAULT, FINE, LOOK, Finding
from kdjax.evals import coco, complexity, tide
from kdjax.evals.matching import detections_by_image, truth_by_image
from kdjax.training.setup import Setup, named_detector

# Ways in which images reach a detector, beside its own: f(u8[B, H, W, 3] RGB, its own input) -> input.
MISTAKES = {
    "its red and blue channels are swapped": lambda images, own: own[..., ::-1],
    "it wants pixels of 0 .. 255 as they are, RGB": lambda images, own: images.astype(jnp.float32),
    "it wants pixels of 0 .. 255 as they are, BGR": lambda images, own: images[..., ::-1].astype(jnp.float32),
    "it wants pixels of 0 .. 1, RGB": lambda images, own: images / 255.0,
    "it wants ImageNet's mean and deviation taken out, BGR": lambda images, own: _normalised(images)[..., ::-1],
    "it wants ImageNet's mean and deviation taken out, RGB": lambda images, own: _normalised(images),
}


def check_weights(role: str, detector, variables, setup: Setup, image_count: int) -> list[Finding]:
    """A detector with weights, tried on the user's images: as it is, with its input changed, and without classes."""
    dataset = setup.dataset
    truth = data.ground_truth(dataset, "val", limit=image_count)
    ids = list(dataset.category_ids)
    here = jax.local_devices()[0]
    variables = jax.tree.map(lambda leaf: jax.device_put(leaf.addressable_data(0), here), tuple(variables))

    @jax.jit
    def predict(variables, x, image_size):
        return detector.decode(detector.apply(*variables, x, train=False)[0], image_size)

    def detections(change: Callable) -> list[dict]:
        found = []
        batches = data.eval_batches(
            dataset,
            "val",
            setup.config.data,
            batch_size=setup.config.eval.batch_size,
            limit=image_count,
            round_down=detector.round_down,
        )
        with contextlib.closing(batches):
            for batch in batches:
                images = jnp.asarray(batch["image"])
                output = predict(variables, change(images, detector.preprocess(images)), batch["image_size"])
                found += coco.to_coco(batch, jax.device_get(output), ids)
        return found

    own = detections(lambda images, own: own)
    metrics, loose = coco.coco_metrics(truth, own), coco.coco_metrics(truth, own, use_categories=False)
    ap, ap50 = metrics["AP"], metrics["AP50"]
    measured = f"AP {100 * ap:.1f}, AP50 {100 * ap50:.1f} on {len(truth['images'])} validation images"
    if min(ap50, loose["AP50"]) < 0:
        return [Finding(LOOK, role, f"the first {image_count} validation images hold no object to try it on")]
    ways = tqdm(MISTAKES.items(), desc=f"try the {role}'s input otherwise", unit="way", leave=False)
    others = {way: coco.coco_metrics(truth, detections(change))["AP50"] for way, change in ways}
    way = max(others, key=others.get)
    wrong = _confusions(truth, own, dataset)
    explained = others[way] > max(ap50 + 0.05, 1.1 * ap50)
    confused = bool(wrong) and loose["AP50"] > ap50 + 0.05
    if explained and not (confused and others[way] < 0.8 * loose["AP50"]):
        said = f"{measured}, but AP50 {100 * others[way]:.1f} if {way}: mend the detector's `preprocess`"
        return [Finding(FAULT, f"{role}'s input", said)]
    if confused:
        said = f"{measured}, but AP50 {100 * loose['AP50']:.1f} if classes are not told apart: the class map is wrong"
        return [Finding(FAULT, f"{role}'s classes", f"{said} ({'; '.join(wrong)})")]
    if ap50 < 0.1:
        said = f"{measured}: it does not know these images; its weights are of other data, or not trained, or the boxes"
        said += " are not where the objects are (--config.data.check=True draws them)"
        return [Finding(FAULT if role == "teacher" else LOOK, role, said)]
    return [Finding(LOOK if ap50 < 0.3 else FINE, role, measured)]


def _confusions(truth: dict, found: list[dict], dataset) -> list[str]:
    """The classes whose detections mostly lie on objects of another; each image's best count, as many as objects."""
    kept = []
    for image in truth["images"]:
        objects = sum(a["image_id"] == image["id"] and not a["iscrowd"] for a in truth["annotations"])
        kept += sorted((d for d in found if d["image_id"] == image["id"]), key=lambda d: -d["score"])[:objects]
    matrix = tide.confusion(truth_by_image(truth), detections_by_image(truth, kept), len(truth["categories"]))
    of_objects = matrix[:-1, :-1].T  # a row for each class of the detector
    most = of_objects.argmax(1)
    return [
        f"what it calls {dataset.classes[label]!r} is {dataset.classes[most[label]]!r}"
        for label in np.flatnonzero((of_objects.sum(1) >= 3) & (most != np.arange(len(most))))
    ]


def check_class_map(role: str, chosen: ConfigDict, dataset) -> tuple[Finding, bool]:
    """The class map of a detector with weights beside that of the data.

    Args:
      role: "teacher" or "student".
      chosen: `config.teacher` or `config.student`; `prepare` has found nothing against it.
      dataset: of the run.

    Returns:
      The finding, and whether the weights' classifiers are used: a student's may start anew.
    """
    named = named_detector(chosen, len(dataset.classes)) if chosen.detector else None
    with warnings.catch_warnings(record=True) as told:  # where classifiers start anew
        warnings.simplefilter("always")
        theirs = weights.load(chosen.weights, named)[3]
    mine = f"the data's {len(dataset.classes)}: {_listed(dataset.classes)}"
    kept = not told if theirs is None else list(theirs) == list(dataset.classes)
    if not kept:
        others = f"the weights' {len(theirs)}, {_listed(theirs)}" if theirs else "those of the weights"
        said = f"its classifiers start anew for {mine}; {others}, are not used"
    elif theirs is None:
        said = f"the weights do not name their classes, which are taken for {mine}"
    else:
        said = f"the weights' are, in the same order, {mine}"
    return Finding(FINE, f"{role}'s class map", said), kept


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def check_sizes(setup: Setup) -> list[Finding]:
    """A teacher is not smaller than its student."""
    counts = [complexity.parameters(detector.shapes[0]) for detector in (setup.teacher, setup.student)]
    said = f"the teacher has {counts[0] / 1e6:.2f} million parameters, the student {counts[1] / 1e6:.2f}"
    if counts[0] < counts[1]:
        return [Finding(LOOK, "sizes", f"{said}: have they changed places?")]
    return [Finding(FINE, "sizes", said)]


def check_taps(setup: Setup) -> list[Finding]:
    """Which maps each method compares, with their shapes by stride; those that do not fit have been refused."""
    hw = tuple(setup.config.data.image_size)
    specs = {role: getattr(setup, role).spec(hw) for role in ("student", "teacher")}
    found = []
    for name, options in setup.config.methods.items():
        options = methods.options(name) | options.to_dict()
        sides, strides = [], []
        for role, spec in specs.items():
            maps = {}
            with contextlib.suppress(ValueError):  # a name that only the method understands
                maps = tap(spec, options[role])
            shapes = ", ".join(f"{stride}: {m.shape[1]}x{m.shape[2]}x{m.shape[3]}" for stride, m in maps.items())
            sides.append(f"{role} {options[role]}" + f" ({shapes})" * bool(shapes))
            strides.append(set(maps))
        alone = sorted(strides[0] ^ strides[1])
        said = ", ".join(sides) + f"; {', '.join(map(str, alone))} have no partner and are left out" * bool(alone)
        found.append(Finding(FINE, f"{name}'s taps", said))
    return found


def check_frozen(student: Detector) -> list[Finding]:
    """Layers that training leaves as they are, of a student that starts from random numbers."""
    alone = flatten(student.no_decay(student.shapes[0]))  # of kernels: what is frozen
    frozen = [path for path, is_left_alone in alone.items() if is_left_alone and path.endswith("/kernel")]
    if not frozen:
        return []
    said = (
        f"it starts from random numbers, of which {len(frozen)} kernels ({frozen[0]} first) are frozen: set "
        "config.student.weights, or config.student.options.frozen_stages=-1, .frozen_norm=False and .norm_eval=False"
    )
    return [Finding(FAULT, "frozen layers", said)]


def _normalised(images):
    return (images.astype(jnp.float32) - jnp.array([123.675, 116.28, 103.53])) / jnp.array([58.395, 57.12, 57.375])
