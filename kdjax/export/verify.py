"""Comparing an exported model with the JAX model: the largest difference of the outputs, and AP before and after."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kdjax.errors import UserError
from kdjax.evals import coco
from kdjax.export import graphs
from kdjax.inference import predict
from kdjax.inference.model import Model
from kdjax.structs import AnyArray, PaddedDetections, PyTree

TOLERANCE = 1e-4  # of an output, relative where it is larger than 1

Call = Callable[..., Sequence[np.ndarray]]  # from the inputs of an exported file to its outputs


def largest_difference(model: Model, call: Call, images: Iterable[np.ndarray], *, raw: bool) -> float:
    """The largest difference of an exported model's outputs from the JAX model's, relative where they exceed 1.

    Each detection of either model is compared with the nearest of its class: the JAX model's with the exported
    detections, the exported ones with the boxes and scores of all priors in JAX. The worst 2 % of each are left out:
    where an IoU or a score is within rounding of its threshold, either model may drop a box. If all places are taken,
    those that score as the last one are arbitrary: in them, only the exported detections are compared.

    Args:
      model: the JAX model.
      call: the exported one: `runner` of `onnx`, `litert` or `stablehlo`.
      images: u8[h, w, 3] RGB.
      raw: whether the outputs are maps.

    Returns:
      The difference; NaN if an output is, infinite if the numbers of detections differ by more than 2 %.
    """
    network = jax.jit(functools.partial(graphs.maps, model))
    program = predict.program(model.detector, devices=jax.local_devices()[:1])
    candidates = jax.jit(functools.partial(graphs.candidates, model, {}))
    worst = 0.0
    for batch in predict.canvases(images, model.image_size, batch_size=1, round_down=model.detector.round_down):
        canvas, placed = batch["image"], batch["image_size"]
        if not raw:
            wanted = jax.tree.map(lambda value: np.asarray(value)[0], program(model.variables, canvas, placed))
            boxes, scores, labels = call(canvas, placed)
            own = np.column_stack([wanted.boxes, wanted.scores])[wanted.valid]
            exported = np.column_stack([boxes, scores])
            if abs(len(own) - len(exported)) > 0.02 * len(own):
                return np.inf
            away = _nearest(own, wanted.labels[wanted.valid], exported, labels)
            if wanted.valid.all():
                away = away[own[:, 4] > own[-1, 4] + TOLERANCE]
            astray = np.full(len(exported), np.inf)  # also if there is no such class
            _, of_classes, of_priors = (np.asarray(value)[0] for value in candidates(canvas, placed))
            for label, of_class in enumerate(of_classes):
                mine, pairs = labels == label, np.column_stack([of_priors, of_class])
                astray[mine] = _nearest(exported[mine], labels[mine], pairs, np.full(len(pairs), label))
            for distances in (away, astray):
                if len(distances):
                    worst = np.maximum(worst, np.quantile(distances, 0.98, method="lower"))
            continue
        for own, exported in zip(map(np.asarray, network(canvas)), call(canvas), strict=True):
            worst = np.maximum(worst, (np.abs(own - exported) / np.maximum(np.abs(own), 1)).max())
    return float(worst)  # NaN if any output is


def _nearest(rows: np.ndarray, labels: np.ndarray, others: np.ndarray, their_labels: np.ndarray) -> np.ndarray:
    """f[n]: how far each row (box, score) is from the nearest of the others with its label; NaN if one of them is."""
    away = (np.abs(rows[:, None] - others) / np.maximum(np.abs(rows[:, None]), 1)).max(-1, initial=0.0)
    return np.where(labels[:, None] == their_labels, away, np.inf).min(1, initial=np.inf)


def check(model: Model, call: Call, images: Iterable[np.ndarray], *, raw: bool) -> float:
    """`largest_difference`, which must be within `TOLERANCE`.

    Raises:
      UserError: it is not.
    """
    worst = largest_difference(model, call, images, raw=raw)
    if not np.isfinite(worst):
        what = "hold numbers that are not finite" if np.isnan(worst) else "are not the detections of the JAX model"
        raise UserError(f"the exported outputs {what}")
    if worst > TOLERANCE:
        raise UserError(f"the exported outputs differ from the JAX model's by {worst:.2g}, more than {TOLERANCE:g}")
    return worst


def average_precision(
    model: Model, truth: Mapping[str, Any], batches: Iterable[predict.Batch], *, run: predict.Program | None = None
) -> float:
    """COCO's AP, a fraction, of the JAX model, or of an exported one.

    Args:
      model: the JAX model.
      truth: COCO instances.
      batches: of `kdjax.data.eval_batches`.
      run: `as_program` of the exported model; None: the JAX model.
    """
    return coco.coco_metrics(truth, coco.collect(model.predict(batches, run=run)))["AP"]


def as_program(model: Model, call: Call, *, raw: bool) -> predict.Program:
    """An exported model, which takes one image at a time, in the place of `kdjax.inference.predict.program`.

    Args:
      model: the JAX model, which decodes maps.
      call: the exported model.
      raw: whether its outputs are maps.
    """

    @jax.jit
    def decode(found: Sequence[jax.Array], image_size: jax.Array) -> PaddedDetections:
        return model.detector.decode(graphs.output(model, found), image_size)

    def run(_: PyTree, images: AnyArray, image_size: AnyArray) -> PaddedDetections:
        rows = []
        for image, size in zip(images, image_size, strict=True):
            if raw:
                rows.append([value[0] for value in jax.device_get(decode(call(image[None]), size[None]))])
            else:
                boxes, scores, labels = call(image[None], size[None])
                rows.append([boxes, scores, labels, np.ones(len(scores), bool)])
        places = max(len(row[1]) for row in rows)
        padded = ([_padded(value, places) for value in column] for column in zip(*rows, strict=True))
        return PaddedDetections(*map(np.stack, padded))  # pyright: ignore[reportArgumentType]

    return run


def _padded(value: np.ndarray, places: int) -> np.ndarray:
    return np.pad(value, [(0, places - len(value)), *[(0, 0)] * (value.ndim - 1)])
