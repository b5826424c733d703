"""The one prediction loop: batches of images in, detections in pixels of the original images out."""

import collections
import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax import sharding
from kdjax.data import images, transforms
from kdjax.detectors.api import Apply, Decode, Detector, Tree
from kdjax.errors import UserError
from kdjax.inference.masks import encoded, from_boxes, from_canvas
from kdjax.structs import AnyArray, Array, Detections, PaddedDetections

Batch = Mapping[str, Any]
# (variables, images u8[B, H, W, 3] RGB, image_size i32[B, 2]) -> detections in pixels of the canvas
Program = Callable[[tuple[Tree, Tree], AnyArray, AnyArray], PaddedDetections]
Preprocess = Callable[[Array], Array]  # u8[B, H, W, 3] RGB -> f32[B, H, W, 3]

_traces: collections.Counter[tuple[Apply, Decode]] = collections.Counter()


def predict(
    detector: Detector,
    variables: tuple[Tree, Tree],
    batches: Iterable[Batch],
    *,
    devices: Sequence[sharding.Device] | None = None,
    run: Program | None = None,
    class_names: Sequence[str] = (),
    category_ids: Sequence[int] = (),
) -> Iterator[tuple[Batch, list[Detections]]]:
    """Detects the objects of batches of images; the host works on a batch while the devices compute the next.

    Args:
      detector: the detector.
      variables: its params and stats.
      batches: dicts with `image` u8[B, H, W, 3], `image_size` i32[B, 2] (height and width on the canvas),
        `original_size` i32[B, 2] and, if some rows are padding, `real` bool[B]; from `kdjax.data.eval_batches` or
        `canvases`.
      devices: each batch is split over them; None: those of this host. With devices of several hosts, every host calls
        this function with the same batches and gets all detections.
      run: what computes a batch; None: `program(detector, devices=devices)`.
      class_names: names of the K classes, for the detections.
      category_ids: COCO's ids of the K classes, for the detections.

    Yields:
      Each batch with the detections of its rows; none for a row that is not real.
    """
    names, ids = tuple(class_names), tuple(int(k) for k in category_ids)
    devices = tuple(jax.local_devices() if devices is None else devices)
    if run is None:
        run = program(detector, devices=devices)
        variables = sharding.replicate(tuple(variables), sharding.mesh_of(devices))
    pending: collections.deque[tuple[Batch, PaddedDetections]] = collections.deque()

    def finish() -> tuple[Batch, list[Detections]]:
        batch, padded = pending.popleft()
        return batch, in_originals(batch, sharding.gather(padded), names, ids, masks=detector.masks)

    for batch in batches:
        pending.append((batch, run(variables, batch["image"], batch["image_size"])))
        if len(pending) > 1:
            yield finish()
    while pending:
        yield finish()


def program(
    detector: Detector, *, devices: Sequence[sharding.Device] | None = None, preprocess: Preprocess | None = None
) -> Program:
    """The compiled function from pixels to detections on the canvas; equal detectors share it.

    Args:
      detector: the detector.
      devices: a batch is split over them, padded to a whole number of images per device (so is the result);
        None: those of this host.
      preprocess: instead of the detector's own. It is called outside of the compiled program: any number of them share
        one compilation.
    """
    devices = tuple(jax.local_devices() if devices is None else devices)
    compiled = _compiled(detector.apply, detector.decode, None if preprocess else detector.preprocess, devices)
    mesh = sharding.mesh_of(devices)

    def run(variables: tuple[Tree, Tree], images: AnyArray, image_size: AnyArray) -> PaddedDetections:
        extra = -len(images) % len(devices)
        inputs = (preprocess(jax.numpy.asarray(images)) if preprocess else images, image_size)
        if extra:
            inputs = (np.concatenate([part, np.repeat(part[-1:], extra, 0)]) for part in map(np.asarray, inputs))
        placed = (sharding.split(part, mesh) for part in inputs)
        return compiled(sharding.replicate(tuple(variables), mesh), *placed)

    return run


def lower(
    detector: Detector,
    variables: tuple[Tree, Tree],
    canvas: tuple[int, int],
    batch_size: int,
    *,
    devices: Sequence[sharding.Device] | None = None,
) -> jax.stages.Lowered:
    """The program that `predict` runs, lowered for batches of one shape; once compiled, `predict` finds it so.

    Args:
      detector, variables, devices: as for `predict`.
      canvas: height and width of the network input in pixels.
      batch_size: images of a batch.
    """
    devices = tuple(jax.local_devices() if devices is None else devices)
    mesh, rows = sharding.mesh_of(devices), batch_size + -batch_size % len(devices)
    shapes = jax.ShapeDtypeStruct((rows, *canvas, 3), np.uint8), jax.ShapeDtypeStruct((rows, 2), np.int32)
    compiled: Any = _compiled(detector.apply, detector.decode, detector.preprocess, devices)
    return compiled.lower(sharding.replicate(tuple(variables), mesh), *sharding.spec_of_rows(mesh, shapes))


def traces(detector: Detector) -> int:
    """How often this process has traced the `program` of this detector, for all shapes and devices together."""
    return _traces[detector.apply, detector.decode]


@functools.lru_cache(maxsize=32)
def _compiled(
    apply: Apply, decode: Decode, preprocess: Preprocess | None, devices: tuple[sharding.Device, ...]
) -> Callable[..., PaddedDetections]:
    def predict_batch(variables: tuple[Tree, Tree], images: Array, image_size: Array) -> PaddedDetections:
        _traces[apply, decode] += 1
        x = preprocess(images) if preprocess else images
        output, _ = apply(*variables, x, train=False)
        return decode(output, image_size)

    if len(devices) == 1:
        return jax.jit(predict_batch)
    # Each device works on its own rows: NMS loops until its slowest image is done, and needs no
    # communication.
    mesh, whole, split = sharding.mesh_of(devices), sharding.WHOLE, sharding.SPLIT
    return jax.jit(
        jax.shard_map(predict_batch, mesh=mesh, in_specs=(whole, split, split), out_specs=split, check_vma=False)
    )


def in_originals(
    batch: Batch,
    padded: PaddedDetections,
    class_names: tuple[str, ...] = (),
    category_ids: tuple[int, ...] = (),
    *,
    masks: str = "",
) -> list[Detections]:
    """Detections on the canvas as detections of the original images, clipped to them.

    Args:
      batch: as for `predict`. Each axis has its own ratio, because sizes on the canvas are whole pixels.
      padded: NumPy arrays, in pixels of the canvas.
      class_names: names of the K classes.
      category_ids: COCO's ids of the K classes.
      masks: `Detector.masks`: which masks `padded` has.

    Returns:
      One `Detections` per row of the batch, empty for a row that is not real.

    Scope: each image on its own.

    Example:
      >>> batch = {"image_size": np.array([[10, 15]]), "original_size": np.array([[20, 30]])}
      >>> padded = PaddedDetections(np.array([[[1.0, 2, 5, 6]]]), *np.array([[[0.5]], [[1]], [[True]]]))
      >>> in_originals(batch, padded)[0].boxes.tolist()
      [[2.0, 4.0, 10.0, 12.0]]
    """
    found = []
    real = batch.get("real", np.ones(len(batch["image_size"]), bool))
    for row, (height, width) in enumerate(batch["original_size"]):
        if not real[row]:
            empty = np.zeros((0, 4)), np.zeros(0, np.float32), np.zeros(0, np.int32)
            found.append(Detections(*empty, class_names, category_ids, () if masks else None))
            continue
        kept = np.asarray(padded.valid[row], bool)
        ratio = (np.asarray(batch["image_size"][row]) / np.asarray(batch["original_size"][row]))[[1, 0, 1, 0]]
        boxes = np.clip(np.asarray(padded.boxes[row], np.float64)[kept] / ratio, 0, [width, height, width, height])
        scores, labels = np.asarray(padded.scores[row])[kept], np.asarray(padded.labels[row])[kept]
        arrays = (boxes, scores.astype(np.float32), labels.astype(np.int32))
        shapes = None
        if masks:
            assert padded.masks is not None
            coarse, original = np.asarray(padded.masks[row])[kept], (int(height), int(width))
            if masks == "canvas":
                size_y, size_x = (int(side) for side in batch["image_size"][row])
                shapes = encoded(from_canvas(coarse, batch["image"].shape[1:3], (size_y, size_x), original))
            else:
                shapes = encoded(from_boxes(coarse, boxes, original))
        found.append(Detections(*arrays, class_names, category_ids, shapes))
    return found


def on_canvas(image: np.ndarray, canvas: tuple[int, int], *, fit: str = "round") -> tuple[np.ndarray, np.ndarray]:
    """An image as a detector gets it in every evaluation.

    Args:
      image: u8[h, w, 3], RGB.
      canvas: height and width in pixels.
      fit: `Detector.fit`.

    Returns:
      The canvas u8[H, W, 3], the image fitted to its top left, and the image's size on it, i32[2].
    """
    size = transforms.fitted(image.shape[:2], canvas, fit=fit)[1]
    sample = transforms.Sample(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int32))
    return transforms.pad(transforms.resize(sample, size), canvas).image, np.array(size, np.int32)


def read_image(file: Path, *, exif: str = "stored", warn: Callable[[str], None] = warnings.warn) -> np.ndarray:
    """Reads an image file as training and evaluation do.

    Args:
      file: the image file.
      exif: "stored": the stored pixels; "upright": as EXIF's orientation turns them.
      warn: is called with each note of `kdjax.data.images.read`.

    Returns:
      u8[h, w, 3] RGB.

    Raises:
      UserError: the file cannot be read, or only in part.
    """
    upright = images.check_exif(exif, "exif")
    images.check_file(file)
    try:
        encoded = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    pixels, facts = images.read(encoded, str(file), upright=upright)
    for note in facts.notes:
        if note != images.TURNED:  # as it was asked for
            warn(f"{file}: {note}")
    return pixels


def canvases(
    images: Iterable[np.ndarray], canvas: tuple[int, int], *, batch_size: int, fit: str = "round"
) -> Iterator[Batch]:
    """Batches for `predict` of images of any size.

    Args:
      images: u8[h, w, 3] RGB each; read as they are needed.
      canvas: height and width of the network input in pixels.
      batch_size: images of a batch; the last batch is filled up with rows that are not real.
      fit: `Detector.fit`.

    Yields:
      `image`, `image_size`, `original_size`, `real` as for `predict`, and `originals`, the list of the images.
    """
    images = iter(images)
    while originals := list(itertools.islice(images, batch_size)):
        rows = [on_canvas(image, canvas, fit=fit) for image in originals]
        sizes = [image.shape[:2] for image in originals]
        missing = batch_size - len(rows)
        placed, image_size = (np.stack(part) for part in zip(*rows + rows[-1:] * missing, strict=True))
        yield {
            "image": placed,
            "image_size": image_size,
            "original_size": np.array(sizes + sizes[-1:] * missing, np.int32),
            "real": np.arange(batch_size) < len(rows),
            "originals": originals,
        }
