"""What a user takes away: a folder with the weights (safetensors) and the config to load them."""

import argparse
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as deserialize
from safetensors.numpy import save as serialize

import kdjax
from kdjax.detectors import build
from kdjax.detectors.api import Detector, Tree, flatten, unflatten
from kdjax.files import write_bytes, write_json
from kdjax.weights import convert

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_DTYPES = ("float32", "float16")


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

    Each file is replaced in one go, and the config holds the weights' hash: an interrupted save is noticed by `load`.

    Args:
      folder: made if missing.
      detector, params, stats: what to save.
      classes: names of the K classes, in the order of the labels.
      image_size: height and width of the canvas that the detector was trained on, in pixels.
      dtype: of the stored arrays, "float32" or "float16" (half the size; loaded back as float32).
      extra: JSON-able facts to keep in the config.

    Raises:
      ValueError: for another dtype, a wrong number of classes, or values beyond float16.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"Weights are stored as {' or '.join(_DTYPES)}, not as {dtype!r}.")
    if len(classes) != detector.num_classes:
        raise ValueError(f"{detector.name} has {detector.num_classes} classes, but {len(classes)} names were given.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for path, value in flatten({"params": params, "stats": stats}).items():
        value = np.asarray(value)
        if dtype == "float16" and np.abs(value).max(initial=0) > np.finfo(np.float16).max:
            raise ValueError(f"{path} holds values beyond float16; store the weights as float32.")
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
    write_json(folder / CONFIG, config, indent=2)


def load(
    path: str | Path,
    detector: Detector | None = None,
    *,
    key: jax.Array | None = None,
    keep_classifiers: bool = False,
) -> tuple[Detector, Tree, Tree, list[str] | None]:
    """Loads weights: a folder that `save` wrote, a PyTorch state dict, or an ONNX file of YOLOX.

    Args:
      path: the folder (or the `model.safetensors` in it), or a `.npz`, `.safetensors` or `.pth` of PyTorch weights
        (`kdjax.weights.convert`), or a `.onnx` of YOLOX; what follows of PyTorch holds for it too.
      detector: needed for PyTorch weights, which do not say what they are of, or but little (`fitted`). For a folder:
        if given, name and options must be the folder's; the number of classes is the folder's.
      key: for classifiers that start anew because the number of classes differs (PyTorch weights only).
      keep_classifiers: refuse PyTorch weights of another number of classes.

    Returns:
      (detector, params, stats, names of the classes or None if the file does not tell); arrays are float32. Of PyTorch
      files a .pth with mmengine's or mmdetection 2's `meta` tells them.

    Raises:
      ValueError: if anything is missing, broken, or of another detector.
    """
    path = Path(path)
    if path.is_file() and path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        path = path.parent
    if path.is_dir():
        return _sound(path, *_load_folder(path, detector))
    if not path.exists():
        raise ValueError(f"There are no weights at {path}.")
    if detector is None:
        raise ValueError(f"{path} does not say which detector it is of; name it beside the weights.")
    state, classes = convert.load_checkpoint(path)
    detector = fitted(detector, state)
    try:
        params, stats = convert.from_torch(detector, state, key=key, keep_classifiers=keep_classifiers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    # Names of another number of classes are those of classifiers that have just started anew.
    return _sound(path, detector, params, stats, classes if classes and len(classes) == detector.num_classes else None)


def _sound(path: Path, detector: Detector, params: Tree, stats: Tree, classes: list[str] | None):
    """What `load` returns, if all numbers are finite."""
    for name, value in flatten({"params": params, "stats": stats}).items():
        if not np.isfinite(value).all():
            raise ValueError(
                f"{path}: {name} holds numbers that are not finite: the weights are of a run that went astray."
            )
    return detector, params, stats, classes


def fitted(detector: Detector, state: dict[str, np.ndarray]) -> Detector:
    """The detector with what the names of a state dict tell about it: mmyolo's RTMDet has no exponential in any size.

    Args:
      detector: as its name, or the user's options, have it; an option that is set stands.
      state: of `convert.load_checkpoint`.
    """
    exponential = detector.name in ("rtmdet_m", "rtmdet_l", "rtmdet_x") and "exp_on_reg" not in detector.options
    if not (exponential and convert.is_mmyolo(state)):
        return detector
    return build(detector.name, detector.num_classes, **detector.options, exp_on_reg=False)


def _load_folder(folder: Path, detector: Detector | None) -> tuple[Detector, Tree, Tree, list[str]]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}: it is no folder of weights.")
    try:
        config = json.loads((folder / CONFIG).read_text())
        wanted = {"detector": str, "num_classes": int, "options": dict, "classes": list, "sha256": str, "extra": dict}
        for field, kind in wanted.items():
            if not isinstance(config[field], kind):
                raise TypeError(f"{field} is {config[field]!r}")
        name, num_classes, options, classes, digest, _ = (config[field] for field in wanted)
        if len(classes) != num_classes:
            raise ValueError(f"{len(classes)} names for {num_classes} classes")
        height, width = config["image_size"]
        if not (isinstance(height, int) and isinstance(width, int) and min(height, width) > 0):
            raise TypeError(f"image_size is {config['image_size']!r}")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read as the config of weights: {error!r}.") from error
    if detector is not None and (detector.name, detector.options) != (name, options):
        raise ValueError(
            f"{folder} holds {name} with options {options}, not {detector.name} with options {detector.options}."
        )
    blob = (folder / WEIGHTS).read_bytes()
    if hashlib.sha256(blob).hexdigest() != digest:
        raise ValueError(f"{folder / WEIGHTS} is not the file that {CONFIG} describes: its SHA-256 differs.")
    try:
        arrays = deserialize(blob)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read: {error}.") from error
    detector = build(name, num_classes, **options)
    wanted = flatten(dict(zip(("params", "stats"), detector.shapes, strict=True)))
    wrong = sorted(
        path
        for path in set(wanted) | set(arrays)
        if path not in wanted or path not in arrays or wanted[path].shape != arrays[path].shape
    )
    if wrong:
        raise ValueError(f"{folder / WEIGHTS} does not fit {name}: missing, unknown or of another shape: {wrong}.")
    tree = unflatten({path: jax.numpy.asarray(value, jax.numpy.float32) for path, value in arrays.items()})
    return detector, tree["params"], tree["stats"], list(classes)


def main() -> None:
    """`python -m kdjax.weights.folder IN OUT --dtype=float16`: stores a folder of weights anew."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("source", help="a kdjax folder")
    parser.add_argument("target")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    args = parser.parse_args()
    config = json.loads((Path(args.source) / CONFIG).read_text())
    detector, params, stats, classes = load(args.source)
    extra = config["extra"]
    save(
        args.target,
        detector,
        params,
        stats,
        classes=classes,
        image_size=config["image_size"],
        dtype=args.dtype,
        extra=extra,
    )


if __name__ == "__main__":
    main()
