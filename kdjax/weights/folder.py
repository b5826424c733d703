"""A folder of weights: `model.safetensors`, and `config.json` with the detector that they are for."""

import hashlib
import importlib.metadata
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save as serialize

import kdjax
from kdjax import resources
from kdjax.detectors import FORMER, build, names
from kdjax.detectors.api import Detector, State, Tree, flatten, ranges, unflatten
from kdjax.errors import UserError, prefix
from kdjax.files import altered, sealed, write_bytes, write_json
from kdjax.weights.containers import read_safetensors
from kdjax.weights.fill import count_classes, from_torch, wrong_values
from kdjax.weights.read import read_checkpoint
from kdjax.weights.torch_names import plain

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_DTYPES = ("float32", "float16")
SEAL = "config_sha256"


def save(
    folder: str | Path,
    detector: Detector,
    params: Tree,
    stats: Tree,
    *,
    classes: list[str],
    image_size: tuple[int, int],
    dtype: str = "float32",
    extra: dict[str, Any] | None = None,
) -> None:
    """Writes `model.safetensors` (flat names "params/a/b", "stats/a/b") and `config.json` into a folder.

    Each file is replaced atomically, and the config holds the weights' hash and its own: `load` detects an interrupted
    save, and what was changed afterwards.

    Args:
      folder: made if missing.
      detector, params, stats: what to save.
      classes: names of the K classes, in the order of the labels.
      image_size: height and width of the canvas that the detector was trained on, in pixels.
      dtype: of the stored arrays, "float32" or "float16" (half the size; loaded back as float32).
      extra: JSON-able facts to keep in the config.

    Raises:
      UserError: for another dtype, a wrong number of classes, or values beyond float16.
    """
    if dtype not in _DTYPES:
        raise UserError(f"dtype must be {' or '.join(_DTYPES)}, not {dtype!r}")
    if len(classes) != detector.num_classes:
        raise UserError(f"classes must hold {detector.num_classes} names, not {len(classes)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for path, value in flatten({"params": params, "stats": stats}).items():
        value = np.asarray(value)
        if dtype == "float16" and np.abs(value).max(initial=0) > np.finfo(np.float16).max:
            raise UserError(f"{path} holds values beyond float16: store the weights as float32")
        arrays[path] = np.asarray(value, dtype, order="C")
    blob = serialize(arrays)
    config = {
        "detector": detector.name,
        "num_classes": detector.num_classes,
        "options": detector.options,
        "classes": list(classes),
        "image_size": list(image_size),
        "dtype": dtype,
        "sha256": hashlib.sha256(blob).hexdigest(),
        "versions": {"kdjax": kdjax.__version__}
        | {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")},
        "extra": extra or {},
    }
    write_bytes(folder / WEIGHTS, blob)
    write_json(folder / CONFIG, sealed(config, SEAL), indent=2)


def load(
    path: str | Path,
    detector: Detector | None = None,
    *,
    key: jax.Array | None = None,
    keep_classifiers: bool = False,
) -> tuple[Detector, Tree, Tree, list[str] | None]:
    """Loads weights: a folder that `save` wrote, a PyTorch state dict, or an ONNX file of YOLOX or RTMDet.

    Args:
      path: the folder (or the `model.safetensors` in it), or what `kdjax.weights.read_checkpoint` reads.
      detector: needed for PyTorch weights, which do not name their detector. Options that the state dict implies are
        set unless the detector has them set (mmyolo's RTMDet has linear distances in all sizes). For a folder: if
        given, name and options must be the folder's, except for int8, which float weights may begin with; the number of
        classes is the folder's.
      key: of the initial values of what PyTorch weights do not fill (see `from_torch`).
      keep_classifiers: refuse PyTorch weights with another number of classes.

    Returns:
      (detector, params, stats, names of the classes); arrays are float32. The names are None if the file has none; of
      PyTorch files only one with mmengine's or mmdetection 2's `meta` has them.

    Raises:
      UserError: anything is missing, broken, not finite, negative where it is a variance, or of another detector.
    """
    path = resources.model_path(path)
    if path.is_file() and path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        path = path.parent
    if path.is_dir():
        return _checked(path, *_load_folder(path, detector))
    if not path.exists():
        raise UserError(f"{path}: there are no weights")
    if detector is None:
        raise UserError(f"{path}: the file does not name its detector: name the detector too")
    state, classes = read_checkpoint(path)
    if classes:
        count = count_classes(build(detector.name, 1, **detector.options), plain(detector, state))
        if count and len(classes) != count:
            raise UserError(f"{path}: it has {count} classes, but its own metadata names {len(classes)}")
    detector = infer_options(detector, state)
    with prefix(str(path)):
        params, stats = from_torch(detector, state, key=key, keep_classifiers=keep_classifiers)
    if classes and len(classes) != detector.num_classes:  # the names belong to classifiers that were re-initialised
        classes = None
    return detector, params, stats, classes


def _checked(
    path: Path, detector: Detector, params: Tree, stats: Tree, classes: list[str] | None
) -> tuple[Detector, Tree, Tree, list[str] | None]:
    """Returns what `load` returns, if all values can be used."""
    for name, value in flatten({"params": params, "stats": stats}).items():
        if why := wrong_values(name, np.asarray(value), name):
            raise UserError(f"{path}: {why}")
    return detector, params, stats, classes


def infer_options(detector: Detector, state: State) -> Detector:
    """Sets the options that the names of a state dict imply; one that is set already is kept.

    Args:
      detector: of the family that the state dict is of.
      state: of `read_checkpoint`.
    """
    inferred = detector.torch.infer(state)
    return build(detector.name, detector.num_classes, **inferred | detector.options) if inferred else detector


def stored_detector(
    where: Path, name: str, num_classes: int, options: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> Detector:
    """The detector that stored arrays are of.

    Args:
      where: the folder, for the warning.
      name, num_classes, options: of the detector, as they are stored beside the arrays.
      arrays: "params/a/b" or "stats/a/b" -> array.

    Returns:
      The detector of that name; or, where the arrays do not fit it, the one that had the name before
      (`kdjax.detectors.FORMER`), if they fit that one.

    Raises:
      UserError: no such detector, or an option that it does not have.

    Warns:
      UserWarning: the detector has another name now.
    """
    if name in FORMER:
        before = build(FORMER[name], num_classes, **options)
        known = name in names() and not _misfits(build(name, num_classes, **options), arrays)
        if not known and not _misfits(before, arrays):
            warnings.warn(
                f"{where}: it names {name}, but was written when that was the name of what is {before.name} now: it is "
                f"loaded as {before.name}",
                stacklevel=3,
            )
            return before
    return build(name, num_classes, **options)


def _misfits(detector: Detector, arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The arrays that are missing, unknown or of another shape than the detector's."""
    wanted = flatten(dict(zip(("params", "stats"), detector.shapes, strict=True)))
    return sorted(
        path
        for path in set(wanted) | set(arrays)
        if path not in wanted or path not in arrays or wanted[path].shape != arrays[path].shape
    )


def _load_folder(folder: Path, detector: Detector | None) -> tuple[Detector, Tree, Tree, list[str]]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: there is no {name}: choose a folder of weights")
    try:
        config = json.loads((folder / CONFIG).read_text())
        if isinstance(config, dict) and "detector" not in config:
            raise UserError(
                f"{folder}: its {CONFIG} is not of kdjax: convert weights of another program with `kdjax "
                f"import-weights {folder / WEIGHTS} --detector=NAME`"
            )
        wanted = {"detector": str, "num_classes": int, "options": dict, "classes": list, "sha256": str, "extra": dict}
        for field, kind in wanted.items():
            if not isinstance(config[field], kind):
                raise TypeError(f"{field} is {config[field]!r}")
        name, num_classes, options, classes, digest, _ = (config[field] for field in wanted)
        if len(classes) != num_classes:
            raise ValueError(f"{len(classes)} names for {num_classes} classes")
        if not all(isinstance(name, str) for name in classes):
            raise TypeError(f"classes is {classes!r}")
        height, width = config["image_size"]
        if not (isinstance(height, int) and isinstance(width, int) and min(height, width) > 0):
            raise TypeError(f"image_size is {config['image_size']!r}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG}: it cannot be read as the config of weights: {error!r}") from error
    blob = (folder / WEIGHTS).read_bytes()
    if hashlib.sha256(blob).hexdigest() != digest:
        raise UserError(f"{folder / WEIGHTS}: it is not the file that {CONFIG} describes: its SHA-256 differs")
    with prefix(str(folder / WEIGHTS)):
        arrays = read_safetensors(blob)
    with prefix(str(folder / CONFIG)):
        stored = stored_detector(folder, name, num_classes, options, arrays)
    if detector is not None and detector.options == stored.options | {"int8": True} != stored.options:
        stored, arrays = build(stored.name, num_classes, **detector.options), arrays | ranges(detector)
    if detector is not None and (detector.name, detector.options) != (stored.name, stored.options):
        raise UserError(
            f"{folder}: the weights are for {stored.name} with options {stored.options}, not for {detector.name} with "
            f"options {detector.options}"
        )
    if wrong := _misfits(stored, arrays):
        raise UserError(
            f"{folder / WEIGHTS}: it does not fit {stored.name}: missing, unknown or of another shape: {wrong}"
        )
    if SEAL in config and altered(config, SEAL):  # older versions wrote none
        raise UserError(
            f"{folder / CONFIG}: it was changed after it was written (its SHA-256 differs): restore it; to rename "
            "classes, use `kdjax import-weights --classes`"
        )
    tree = unflatten({path: jax.device_put(np.asarray(value, np.float32)) for path, value in arrays.items()})
    return stored, tree["params"], tree["stats"], list(classes)
