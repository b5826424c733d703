"""A detector that is ready to predict, as the verbs share it."""

import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from kdjax import detectors, files, resources, weights
from kdjax.data import transforms
from kdjax.detectors.api import unflatten
from kdjax.evals import coco

BATCH = 8  # images that are computed together, at most
CHECKPOINTS = "checkpoints"  # the folder of a run


class Model(NamedTuple):
    """A detector with its weights."""

    folder: Path
    detector: detectors.Detector
    variables: tuple  # (params, stats)
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]  # of the results, by label: those of the data it was trained on, else 1 .. K
    image_size: tuple[int, int]  # height and width of the canvas in pixels


def load(path: str) -> Model:
    """Reads `--model`.

    Args:
      path: a folder of weights (a run's `student/`, or of import-weights); or the workdir of a run: its `student/`, or,
        before its end, the newest checkpoint that is sound; or a run's `checkpoints/` or `checkpoints/STEP`.

    Returns:
      The model.

    Raises:
      ValueError: there is no such model, or it is broken; one sentence.
    """
    if not jax.config.jax_compilation_cache_dir:  # a second command starts in seconds
        jax.config.update("jax_compilation_cache_dir", str(files.cache_root() / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    folder = resources.model_path(Path(path).expanduser())
    if not folder.exists():
        raise ValueError(f"--model={path}: there is no such folder.")
    if folder.is_file() and folder.name != weights.WEIGHTS:
        raise ValueError(f"--model={path} is a file: `kdjax import-weights` makes a folder of a checkpoint.")
    folder = folder.parent if folder.is_file() else folder
    if folder.name == CHECKPOINTS:
        return _of_checkpoint(folder.parent)
    if folder.parent.name == CHECKPOINTS and folder.name.isdigit():
        return _of_checkpoint(folder.parent.parent, step=int(folder.name))
    if not (folder / weights.WEIGHTS).exists() and (folder / "student").is_dir():
        folder = folder / "student"
    if not (folder / weights.WEIGHTS).exists() and (folder / CHECKPOINTS).is_dir():
        return _of_checkpoint(folder)
    detector, params, stats, classes = weights.load(folder)
    config = json.loads((folder / weights.CONFIG).read_text())
    ids = config["extra"].get("category_ids") or list(range(1, len(classes) + 1))
    whole = isinstance(ids, list) and all(isinstance(k, int) for k in ids)
    if not whole or len(ids) != len(classes) or len(set(ids)) != len(ids):
        raise ValueError(f"{folder / weights.CONFIG}: category_ids is {ids!r}, not a number for each of the classes.")
    return Model(folder, detector, (params, stats), tuple(classes), tuple(ids), tuple(config["image_size"]))


def _of_checkpoint(workdir: Path, step: int | None = None) -> Model:
    """The moving average of the student in one checkpoint of a run, the newest that is sound if none is named."""
    from kdjax.training import checkpoint  # Orbax takes a second

    note, arrays = checkpoint.arrays(workdir / CHECKPOINTS, "student/ema/", step=step)
    try:
        config = json.loads((workdir / "config.json").read_text())["config"]
        name, size = note["run"]["student"], config["data"]["image_size"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{workdir / 'config.json'} cannot be read as the config of a run: {error!r}.") from None
    classes = note["run"]["classes"]
    detector = detectors.build(name, len(classes), **note["run"].get("options", {}))
    tree = unflatten({path: jax.numpy.asarray(value) for path, value in arrays.items()})
    ids = note.get("category_ids") or range(1, len(classes) + 1)  # which older runs did not write
    return Model(workdir, detector, (tree["params"], tree["stats"]), tuple(classes), tuple(ids), tuple(size))


def check_out(path: str) -> Path:
    """Makes the folder `--out`, before anything is computed.

    Raises:
      ValueError: it cannot be made.
    """
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out={path} cannot be made ({error.strerror}): choose another folder.") from None
    return folder


def aligned(rows: list[list[str]]) -> str:
    """Rows of a table as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def on_canvas(image: np.ndarray, canvas: tuple[int, int], *, round_down: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """An image as a detector gets it in every evaluation.

    Args:
      image: u8[h, w, 3], RGB.
      canvas: height and width in pixels.
      round_down: `Detector.round_down`.

    Returns:
      The canvas u8[H, W, 3], the image fitted to its top left, and the image's size on it, i32[2].
    """
    size = transforms.fitted(image.shape[:2], canvas, round_down=round_down)[1]
    sample = transforms.Sample(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int32))
    return transforms.pad(transforms.resize(sample, size), canvas).image, np.array(size, np.int32)


def detect(
    model: Model, images: Iterable[tuple[int, np.ndarray]], *, batch: int = BATCH
) -> Iterator[tuple[tuple[int, np.ndarray], list[dict]]]:
    """Detects the objects of images, some at a time in one program.

    Args:
      model: from `load`.
      images: (image id, u8[h, w, 3] RGB) of each; read as they are needed.
      batch: images that are computed together; the last batch is filled up.

    Returns:
      Each of `images` with its COCO results in pixels of the image, best score first (`evals.coco.to_coco`).
    """
    images = iter(images)
    while chunk := list(itertools.islice(images, batch)):
        placed = [on_canvas(image, model.image_size, round_down=model.detector.round_down) for _, image in chunk]
        placed += placed[-1:] * (batch - len(chunk))
        canvases, sizes = (np.stack(arrays) for arrays in zip(*placed, strict=True))
        rows = {
            "image_id": np.array([image_id for image_id, _ in chunk]),
            "image_size": sizes[: len(chunk)],
            "original_size": np.array([image.shape[:2] for _, image in chunk]),
            "real": np.ones(len(chunk), bool),
        }
        found = jax.device_get(program(model.detector)(model.variables, canvases, sizes))
        results = coco.to_coco(rows, found, model.category_ids)
        for image_id, image in chunk:
            yield (image_id, image), [row for row in results if row["image_id"] == image_id]


def program(detector: detectors.Detector):
    """The jitted (variables, images u8[B, H, W, 3], image_size i32[B, 2]) -> PaddedDetections."""
    return _program(detector.name, detector.num_classes, json.dumps(detector.options, sort_keys=True))


@functools.cache
def _program(name: str, num_classes: int, options: str):
    detector = detectors.build(name, num_classes, **json.loads(options))

    def predict(variables, images, image_size):
        output, _ = detector.apply(*variables, detector.preprocess(images), train=False)
        return detector.decode(output, image_size)

    return jax.jit(predict)
