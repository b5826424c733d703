"""A detector with its weights, ready to detect objects in images."""

import dataclasses
import json
import operator
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import jax
import numpy as np

from kdjax import detectors, resources, sharding, weights
from kdjax.data.images import check_exif
from kdjax.data.stages import LARGEST
from kdjax.detectors.api import Detector, Tree, unflatten
from kdjax.errors import UserError, listed, prefix
from kdjax.inference import predict
from kdjax.structs import Detections
from kdjax.weights import checkpoint

BATCH = 8  # images that are computed together, at most
CHECKPOINTS = "checkpoints"  # the folder of a run
EXPORTED = (".onnx", ".xml", ".param", ".tflite", ".stablehlo")  # suffixes of what `kdjax export` writes

Image = np.ndarray | str | Path


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A detector with its weights; see `load`."""

    path: Path
    detector: Detector
    variables: tuple[Tree, Tree]  # (params, stats)
    class_names: tuple[str, ...]  # of the K labels; () if the file does not say
    category_ids: tuple[int, ...]  # of the K labels in COCO's json: those of the training data, else 1 .. K
    image_size: tuple[int, int]  # height and width of the network input in pixels
    exif_orientation: str = "stored"  # how the images were read that it was trained on; see `detect`

    @overload
    def detect(self, images: Image, *, exif: str | None = None) -> Detections: ...
    @overload
    def detect(self, images: Sequence[Image], *, exif: str | None = None) -> list[Detections]: ...
    def detect(self, images: Image | Sequence[Image], *, exif: str | None = None) -> Detections | list[Detections]:
        """Detects the objects of one image or of several.

        Args:
          images: u8[h, w, 3] RGB of any size, or the path of an image file; or a list of them.
          exif: how image files are read: "stored": their pixels; "upright": as EXIF's orientation turns them;
            None: as in training, `exif_orientation`.

        Returns:
          The detections of the image, best score first, in its pixels; a list of them for a list of images. Low scores
          are kept: choose with `found[found.scores > 0.3]`.

        Raises:
          UserError: a file cannot be read, or an array is not u8[h, w, 3].
        """
        if isinstance(images, (str, Path)) or (isinstance(images, np.ndarray) and images.ndim == 3):
            return self.detect([images], exif=exif)[0]
        arrays = [_array(image, exif or self.exif_orientation) for image in images]
        return [found for _, found in self.stream(arrays, batch_size=max(1, min(BATCH, len(arrays))))]

    def stream(
        self, images: Iterable[np.ndarray], *, batch_size: int = BATCH
    ) -> Iterator[tuple[np.ndarray, Detections]]:
        """Detects the objects of many images, which are read as they are needed.

        Args:
          images: u8[h, w, 3] RGB each.
          batch_size: images that are computed together.

        Yields:
          Each image with its detections.
        """
        canvas, fit = self.image_size, self.detector.fit
        batches = predict.canvases(images, canvas, batch_size=batch_size, fit=fit)
        for batch, detections in self.predict(batches, devices=jax.local_devices()[:batch_size]):
            yield from zip(batch["originals"], detections, strict=False)  # the last batch is filled up

    def predict(
        self,
        batches: Iterable[predict.Batch],
        *,
        devices: Sequence[sharding.Device] | None = None,
        run: predict.Program | None = None,
    ) -> Iterator[tuple[predict.Batch, list[Detections]]]:
        """`kdjax.inference.predict.predict` with this model."""
        return predict.predict(
            self.detector,
            self.variables,
            batches,
            devices=devices,
            run=run,
            class_names=self.class_names,
            category_ids=self.category_ids,
        )


def _array(image: Image, exif: str) -> np.ndarray:
    if isinstance(image, (str, Path)):
        return predict.read_image(Path(image).expanduser(), exif=exif)
    if (
        not isinstance(image, np.ndarray)
        or image.dtype != np.uint8
        or image.ndim != 3
        or image.shape[2] != 3
        or not image.size
    ):
        what = f"{image.dtype}{list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f"an image must be u8[h, w, 3] RGB or a path, not {what}")
    return image


def load(
    path: str | Path,
    detector: str | None = None,
    *,
    class_names: Sequence[str] | None = None,
    image_size: tuple[int, int] | None = None,
    network: str = "student",
) -> Model:
    """Loads a model.

    Args:
      path: a folder of weights (a run's `student/`, or one that `kdjax import-weights` wrote); or the workdir of a run:
        its `student/`, or, before its end, its newest intact checkpoint; or a run's `checkpoints/` or
        `checkpoints/STEP`; or, with `detector`, what `kdjax.weights.read_checkpoint` reads: weights of mmdetection,
        mmyolo, mmrazor or the authors of YOLOX in a file of PyTorch, safetensors or NumPy, or an `.onnx` file of YOLOX
        or RTMDet; or the address of one of these, as "hf://OWNER/NAME".
      detector: name of the detector that a file of weights is for, as in `kdjax.detectors.build`; None for folders.
      class_names: names of the K classes of a file of weights; None: those that it holds, if any.
      image_size: height and width of the network input in pixels, for a file of weights; None: the detector's default,
        `Detector.image_size`.
      network: "student" or "teacher", where a file of weights holds a pair of mmrazor.

    Returns:
      The model.

    Raises:
      UserError: there is no such model, or it cannot be used.

    Example:
      >>> model = load("assets/quickstart_teacher")  # doctest: +SKIP
      >>> found = model.detect("image.jpg")  # doctest: +SKIP
    """
    folder = resources.model_path(path).expanduser()
    if not folder.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if detector is not None:
        if folder.is_dir() and not any(folder.glob(f"*{weights.INDEX}")):
            raise UserError(f"{path}: a folder names its detector itself: detector must be None, not {detector!r}")
        return _from_file(folder, detector, class_names, image_size, network)
    if folder.suffix.lower() in EXPORTED:
        raise UserError(
            f"{path}: an exported model cannot be loaded: give the folder of the model that it was made from (`kdjax "
            "latency` measures an exported file that is not StableHLO's, `kdjax export --data=DIR` its AP; `kdjax "
            "import-weights` converts an .onnx file of YOLOX or RTMDet)"
        )
    if folder.is_file() and folder.name != weights.WEIGHTS:
        raise UserError(
            f"{path}: a file does not name its detector: convert it with `kdjax import-weights`, or pass the "
            "argument `detector`"
        )
    folder = folder.parent if folder.is_file() else folder
    if folder.name == CHECKPOINTS:
        return _from_checkpoint(folder.parent)
    if folder.parent.name == CHECKPOINTS and folder.name.isdigit():
        return _from_checkpoint(folder.parent.parent, step=int(folder.name))
    if not (folder / weights.WEIGHTS).exists() and (folder / "student").is_dir():
        folder = folder / "student"
    if not (folder / weights.WEIGHTS).exists() and (folder / CHECKPOINTS).is_dir():
        return _from_checkpoint(folder)
    built, params, stats, names = weights.load(folder)
    config = json.loads((folder / weights.CONFIG).read_text())
    ids = config["extra"].get("category_ids") or list(range(1, built.num_classes + 1))
    whole = isinstance(ids, list) and all(isinstance(k, int) for k in ids)
    if not whole or len(ids) != built.num_classes or len(set(ids)) != len(ids):
        raise UserError(f"{folder / weights.CONFIG}: category_ids must be one integer per class, not {ids!r}")
    exif = config["extra"].get("exif_orientation", "stored")  # which older models do not have
    with prefix(str(folder / weights.CONFIG)):
        check_exif(exif)
    return Model(
        path=folder,
        detector=built,
        variables=(params, stats),
        class_names=tuple(names or ()),
        category_ids=tuple(ids),
        image_size=_canvas(folder / weights.CONFIG, built, config["image_size"]),
        exif_orientation=exif,
    )


def _canvas(where: str | Path, detector: Detector, size: Sequence[int]) -> tuple[int, int]:
    """The size of the network input, checked."""
    try:
        height, width = map(operator.index, size)
    except (TypeError, ValueError):
        raise UserError(f"{where}: image_size must be height and width in pixels, not {size!r}") from None
    step = detector.size_divisor
    if min(height, width) < 1 or max(height, width) > LARGEST or height % step or width % step:
        raise UserError(
            f"{where}: image_size must be multiples of {step} up to {LARGEST:,} px for {detector.name}, not "
            f"{height}x{width}"
        )
    return height, width


def _from_file(
    path: Path, name: str, class_names: Sequence[str] | None, image_size: tuple[int, int] | None, network: str
) -> Model:
    """Loads a file of weights that another program wrote."""
    probe = detectors.build(name, 1)
    canvas = _canvas("image_size", probe, image_size or probe.image_size)
    state, own_names = weights.read_checkpoint(path)
    plain = weights.plain(probe, state, network)
    count = weights.count_classes(probe, plain)
    if not count:
        why = weights.foreign(probe, plain)
        raise UserError(f"{path}: it holds no classifier of {name}" + (f": {why}" if why else ""))
    names = class_names or own_names or ()
    if names and len(names) != count:
        whose = "class_names" if class_names else "its own metadata"
        raise UserError(f"{path}: it has {count} classes, but {whose} names {len(names)}: {listed(names)}")
    if own_names and sorted(own_names) == sorted(names) and list(own_names) != list(names):
        raise UserError(
            f"{path}: its own metadata has the classes of class_names in another order: {listed(own_names)}"
        )
    built = weights.infer_options(detectors.build(name, count), state)
    with prefix(str(path)):
        variables = weights.from_torch(built, plain, keep_classifiers=True)
    return Model(
        path=path,
        detector=built,
        variables=variables,
        class_names=tuple(names),
        category_ids=tuple(range(1, count + 1)),
        image_size=canvas,
    )


def _from_checkpoint(workdir: Path, step: int | None = None) -> Model:
    """The moving average of the student in one checkpoint of a run; None: the newest intact one."""
    note, arrays = checkpoint.arrays(workdir / CHECKPOINTS, "student/ema/", step=step)
    try:  # older checkpoints do not have the settings
        config = note.get("config") or json.loads((workdir / "config.json").read_text())["config"]
        name, size = note["run"]["student"], config["data"]["image_size"]
        exif = config["data"].get("exif_orientation", "stored")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{workdir / 'config.json'}: it cannot be read as the config of a run: {error!r}") from None
    names = note["run"]["classes"]
    tree = unflatten({path: jax.numpy.asarray(value) for path, value in arrays.items()})
    detector = weights.stored_detector(workdir, name, len(names), note["run"].get("options", {}), arrays)
    ids = note.get("category_ids") or range(1, len(names) + 1)  # which older runs did not write
    return Model(
        path=workdir,
        detector=detector,
        variables=(tree["params"], tree["stats"]),
        class_names=tuple(names),
        category_ids=tuple(ids),
        image_size=_canvas(workdir, detector, size),
        exif_orientation=exif,
    )
