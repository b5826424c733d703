"""Comparing an exported model with the JAX model: the largest difference of the outputs, and AP before and after."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax.errors import UserError
from kdjax.evals import coco, matching
from kdjax.export import graphs
from kdjax.inference import masks, predict
from kdjax.inference.model import Model
from kdjax.structs import AnyArray, PaddedDetections, PyTree

TOLERANCE = 1e-4  # of an output, relative where it is larger than 1
STAGED = 5e-4  # the same, of detectors whose boxes are computed from boxes, stage by stage: rounding grows with each
MASK_IOU = 0.99  # of the masks of a detection, at least
LEFT_OUT = 0.02  # share of the detections of an image
# Of int8: detections with a score of at least SURE are compared; two are the same if their boxes and scores are so
# near, and at least the share SAME of them must be.
SURE, NEAR_IOU, NEAR_SCORE, SAME = 0.3, 0.8, 0.1, 0.9

_NOTHING = (
    "on these images neither the file nor the JAX model detects {what}, so nothing can be compared: give images of its "
    "classes, --data=DIR"
)

Call = Callable[..., Sequence[np.ndarray]]  # from the inputs of an exported file to its outputs


class Agreement(NamedTuple):
    """How near an exported model is to the JAX model."""

    difference: float  # the largest of an output, relative where it exceeds 1; NaN if an output is
    mask_iou: float = 1.0  # the smallest, of the two masks of a detection
    count: int = 0  # the detections of both that were compared; 0 of maps


def compare(model: Model, call: Call, images: Iterable[np.ndarray], *, raw: bool) -> Agreement:
    """Compares the outputs of an exported model with the JAX model's.

    Each detection of either model is compared with the nearest of its class: the JAX model's with the exported
    detections, the exported ones with the boxes and scores of all priors in JAX. Of 50 detections of an image the worst
    is left out, of 100 the worst two: where an IoU or a score is within rounding of its threshold, either model may
    drop a box. If all places are taken, those that score as the last one are arbitrary: in them, only the exported
    detections are compared. Masks are compared on the canvas, those of the JAX model's detections with those of the
    nearest exported ones.

    Args:
      model: the JAX model.
      call: the exported one: `runner` of the module of a format.
      images: u8[h, w, 3] RGB.
      raw: whether the outputs are maps.

    Returns:
      The agreement; the difference is infinite if the numbers of detections differ by more than 2 %.
    """
    network = jax.jit(functools.partial(graphs.maps if raw else graphs.network, model))
    decode = jax.jit(model.detector.decode)
    candidates = jax.jit(functools.partial(graphs.candidates, model, {}))
    worst, overlap, count = 0.0, 1.0, 0
    for batch in predict.canvases(images, model.image_size, batch_size=1, fit=model.detector.fit):
        canvas, placed = batch["image"], batch["image_size"]
        if raw:
            for own, exported in zip(jax.device_get(network(canvas)), call(canvas), strict=True):
                worst = np.maximum(worst, (np.abs(own - exported) / np.maximum(np.abs(own), 1)).max())
            continue
        output = network(canvas)
        wanted = jax.device_get(decode(output, placed))
        boxes, scores, labels, *rest = call(canvas, placed)
        valid = wanted.valid[0]
        own, own_labels = np.column_stack([wanted.boxes[0], wanted.scores[0]])[valid], wanted.labels[0][valid]
        exported = np.column_stack([boxes, scores])
        if abs(len(own) - len(exported)) > _left_out(len(own)):
            return Agreement(np.inf)
        away, nearest = _nearest(own, own_labels, exported, labels)
        sure = own[:, 4] > own[-1, 4] + TOLERANCE if valid.all() else np.ones(len(own), bool)
        astray = np.full(len(exported), np.inf)  # also if there is no such class
        of_priors, of_pairs = (np.asarray(value)[0] for value in candidates(output, placed))
        height, width = placed[0]
        of_priors, inside = (_clipped(rows, width, height) for rows in (of_priors, exported))
        for label, of_class in enumerate(of_pairs.T):
            mine = labels == label
            pairs = np.column_stack([of_priors if of_priors.ndim == 2 else of_priors[:, label], of_class])
            astray[mine], _ = _nearest(inside[mine], labels[mine], pairs, np.full(len(pairs), label))
        for distances in (away[sure], astray):
            if len(distances):
                kept = np.nan if np.isnan(distances).any() else np.sort(distances)[-1 - _left_out(len(distances))]
                worst = np.maximum(worst, kept)
                count += len(distances)
        if rest and np.any(sure):
            assert wanted.masks is not None
            drawn = functools.partial(_on_canvas, model, size=(int(height), int(width)))
            mine = drawn(wanted.masks[0][valid][sure], own[sure, :4])
            theirs = drawn(rest[0][nearest[sure]], boxes[nearest[sure]])
            shared = [_iou(one, other) for one, other in zip(mine, theirs, strict=True)]
            overlap = min(overlap, sorted(shared)[_left_out(len(shared))])
    return Agreement(float(worst), overlap, count)


def _left_out(count: int) -> int:
    """How many of the detections of an image are not compared."""
    return int(LEFT_OUT * count)


def _clipped(rows: np.ndarray, width: int, height: int) -> np.ndarray:
    """Rows whose first four numbers are boxes, with these clipped to the image; transformers do not clip theirs."""
    boxes = np.clip(rows[..., :4], 0, [width, height, width, height])
    return np.concatenate([boxes, rows[..., 4:]], -1)


def _nearest(
    rows: np.ndarray, labels: np.ndarray, others: np.ndarray, their_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How far each row (box, score) is from the nearest of the others with its label, NaN if one is; and which it is.

    Returns:
      f[n], infinite if there is none; i[n].
    """
    if not len(others):
        return np.full(len(rows), np.inf), np.zeros(len(rows), int)
    away = (np.abs(rows[:, None] - others) / np.maximum(np.abs(rows[:, None]), 1)).max(-1, initial=0.0)
    away = np.where(labels[:, None] == their_labels, away, np.inf)
    return away.min(1), away.argmin(1)


def _on_canvas(model: Model, found: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Masks bool[height, width] of an image on the canvas."""
    if model.detector.masks == "canvas":
        return masks.from_canvas(found, model.image_size, size, size)
    return masks.from_boxes(found, boxes, size)


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    union = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / union if union else 1.0


def check(
    model: Model, call: Call, images: Iterable[np.ndarray], *, raw: bool, tolerance: float = TOLERANCE
) -> Agreement:
    """`compare`, whose difference must be within a tolerance, and the IoU of masks at least `MASK_IOU`.

    Raises:
      UserError: it is not, or there are no detections to compare.
    """
    found = compare(model, call, images, raw=raw)
    if not np.isfinite(found.difference):
        nan = np.isnan(found.difference)
        what = "hold numbers that are not finite" if nan else "are not the detections of the JAX model"
        raise UserError(f"the exported outputs {what}")
    if not raw and not found.count:
        raise UserError(_NOTHING.format(what="anything"))
    if found.difference > tolerance:
        what = f"differ from the JAX model's by {found.difference:.2g}, more than {tolerance:g}"
        raise UserError(f"the exported outputs {what}")
    if not found.mask_iou >= MASK_IOU:
        what = f"have an IoU of {found.mask_iou:.3f} with the JAX model's, less than {MASK_IOU:g}"
        raise UserError(f"the exported masks {what}")
    return found


def check_int8(model: Model, call: Call, images: Iterable[np.ndarray], *, raw: bool) -> tuple[float, int]:
    """Compares the detections of a file in int8 with those of the JAX model that it was trained as.

    Both round at the same places to the same values. But their sums differ in the last bits of float32, so a value that
    lies between two bytes may become the one or the other, and later layers carry this on.

    Args:
      model: the JAX model, whose values are rounded.
      call: the exported one: `runner` of `onnx`, `openvino` or `litert`.
      images: u8[h, w, 3] RGB.
      raw: whether the outputs are maps, which the JAX model decodes.

    Returns:
      The share, of the detections of either with a score of at least 0.3, that the other has too: of the same class,
      with an IoU of at least 0.8 and a score that differs by at most 0.1. And how many there are.

    Raises:
      UserError: it is less than 0.9, neither has any such detection, or a number is not finite.
    """
    both = [as_program(model, call, raw=raw), jax.jit(lambda _, *given: graphs.decoded(model, *given))]
    shared, count = 0, 0
    for batch in predict.canvases(images, model.image_size, batch_size=1, fit=model.detector.fit):
        found = [jax.device_get(run(None, batch["image"], batch["image_size"])) for run in both]
        pair = [(one.boxes[0], one.scores[0], one.labels[0]) for one in found]
        if not all(np.isfinite(values).all() for one in pair for values in one):
            raise UserError("the exported outputs hold numbers that are not finite")
        for (boxes, scores, labels), others in (pair, pair[::-1]):
            near = matching.box_iou(boxes, others[0]) >= NEAR_IOU
            near &= (np.abs(scores[:, None] - others[1]) <= NEAR_SCORE) & (labels[:, None] == others[2])
            sure = scores >= SURE
            shared += int(np.count_nonzero(near.any(1) & sure))
            count += int(np.count_nonzero(sure))
    if not count:
        raise UserError(_NOTHING.format(what=f"anything with a score of at least {SURE:g}"))
    share = shared / count
    if share < SAME:
        raise UserError(
            f"the exported file and the JAX model share {share:.0%} of their detections with a score of at least "
            f"{SURE:g}, less than {SAME:.0%}"
        )
    return share, count


def average_precision(
    model: Model, truth: Mapping[str, Any], batches: Iterable[predict.Batch], *, run: predict.Program | None = None
) -> dict[str, float]:
    """COCO's AP, a fraction, of the JAX model, or of an exported one.

    Args:
      model: the JAX model.
      truth: COCO instances.
      batches: of `kdjax.data.eval_batches`.
      run: `as_program` of the exported model; None: the JAX model.

    Returns:
      {"AP": of the boxes, "mask AP": of the masks, where both the data and the detector have masks}.
    """
    found = coco.collect(model.predict(batches, run=run))
    of_masks = coco.mask_metrics(truth, found)
    return {"AP": coco.coco_metrics(truth, found)["AP"]} | ({"mask AP": of_masks["mask_AP"]} if of_masks else {})


def rows(found: Sequence[np.ndarray], row: int, *, raw: bool) -> list[np.ndarray]:
    """The outputs for one image of a batch: its maps [1, H, W, C], or its detections, without those that fill up."""
    if raw:
        return [value[row : row + 1] for value in found]
    kept = found[1][row] > 0
    return [value[row][kept] for value in found]


def in_batches(call: Call, count: int, *, raw: bool) -> Call:
    """Of an exported model for several images, a function of one image, which has other ones beside it.

    Args:
      call: the exported model.
      count: images of a batch: the others are those of the calls before, at first the image itself.
      raw: whether its outputs are maps.
    """
    past: list[tuple[np.ndarray, ...]] = []

    def one(*inputs: np.ndarray) -> Sequence[np.ndarray]:
        past[:] = [*(past or [inputs] * (count - 1)), inputs][-count:]
        place = len(past) // 2
        batch = [*past[:place], inputs, *past[place:-1]]
        return rows(call(*(np.concatenate(part) for part in zip(*batch, strict=True))), place, raw=raw)

    return one


def as_program(model: Model, call: Call, *, raw: bool, batch: int = 1) -> predict.Program:
    """An exported model in the place of `kdjax.inference.predict.program`.

    Args:
      model: the JAX model, which decodes maps.
      call: the exported model.
      raw: whether its outputs are maps.
      batch: number of images that it takes; 0: any.
    """

    @jax.jit
    def decode(found: Sequence[jax.Array], image_size: jax.Array) -> PaddedDetections:
        return model.detector.decode(graphs.output(model, found), image_size)

    def each(images: np.ndarray, sizes: np.ndarray) -> Iterator[Sequence[np.ndarray]]:
        """The outputs for each image; a last batch is filled up."""
        step = batch or len(images)
        for first in range(0, len(images), step):
            taken = np.minimum(np.arange(first, first + step), len(images) - 1)
            found = call(images[taken]) if raw else call(images[taken], sizes[taken])
            for row in range(min(step, len(images) - first)):
                yield found if batch == 1 else rows(found, row, raw=raw)

    def run(_: PyTree, images: AnyArray, image_size: AnyArray) -> PaddedDetections:
        images, image_size = np.asarray(images), np.asarray(image_size)
        columns = []
        for outputs, size in zip(each(images, image_size), image_size, strict=True):
            if raw:
                found = jax.device_get(decode(outputs, size[None]))
                columns.append([value[0] for value in found if value is not None])
            else:
                boxes, scores, labels, *rest = outputs
                columns.append([boxes, scores, labels, np.ones(len(scores), bool), *rest])
        places = max(len(row[1]) for row in columns)
        padded = ([_padded(value, places) for value in column] for column in zip(*columns, strict=True))
        return PaddedDetections(*map(np.stack, padded))  # pyright: ignore[reportArgumentType]

    return run


def _padded(value: np.ndarray, places: int) -> np.ndarray:
    return np.pad(value, [(0, places - len(value)), *[(0, 0)] * (value.ndim - 1)])
