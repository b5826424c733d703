"""`kdjax import-weights`: a PyTorch checkpoint, or an ONNX file of YOLOX or RTMDet, to a kdjax folder.

A kdjax model gets other class names.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdjax import inference, resources, weights
from kdjax.commands import arguments
from kdjax.data.classes import read as read_classes
from kdjax.errors import UserError, listed, prefix
from kdjax.evals import complexity


def run(*, file: str, detector: str | None, out: str, classes: str | None, image_size: str | None, network: str) -> int:
    """Converts a checkpoint, or renames the classes of a kdjax model.

    Args:
      file: see `kdjax.inference.load`.
      detector: a name that `kdjax.detectors.build` knows; None for a kdjax model.
      out: the folder to write.
      classes: the class names, see `kdjax.data.classes.read`; None: those of the checkpoint.
      image_size: "H,W" of the network input in pixels; None: the detector's default; a kdjax model keeps its own.
      network: "student" or "teacher" of a distiller.

    Returns:
      Exit code 0.

    Raises:
      UserError: the checkpoint, the detector and the class names do not fit each other.
    """
    size = None if image_size is None else _size(image_size)
    with prefix("--classes"):
        names = read_classes(classes) if classes else None
    arguments.refuse_taken(out)
    if (Path(out).expanduser() / weights.CONFIG).exists():
        raise UserError(f"--out: {out} has a {weights.CONFIG}, which would be replaced: choose another folder")
    kept: dict[str, Any] = {"extra": {}}  # what a kdjax model was saved with
    path = resources.model_path(file).expanduser()
    # Other programs, too, write a config.json beside a model.safetensors: such a file comes with --detector.
    folder = path.is_dir() and not any(path.glob(f"*{weights.INDEX}"))
    if detector is not None and folder:
        raise UserError(
            f"{file} is a folder: of a kdjax model, which names its detector (leave --detector out), or of another "
            "program (give the file of weights in it)"
        )
    if detector is not None or not path.exists():
        model = inference.load(file, detector, class_names=names, image_size=size, network=network)
    elif folder or (path.name == weights.WEIGHTS and (path.parent / weights.CONFIG).exists()):
        if size is not None or network != "student":
            raise UserError(f"{file} is a kdjax model, on which --image-size and --network have no effect")
        model = _renamed(file, names)
        if (model.path / weights.WEIGHTS).exists():  # not a checkpoint
            stored = json.loads((model.path / weights.CONFIG).read_text())
            kept = {"extra": stored["extra"], "dtype": stored.get("dtype", "float32")}
    else:
        raise UserError(
            f"{file}: weights of other programs do not name their detector: give --detector=NAME (of a file that kdjax "
            "exported, give the folder of the model)"
        )
    if not model.class_names:
        count = model.detector.num_classes
        raise UserError(
            f"{file}: it does not name its {count} classes: give --classes=FILE, with one name per line or COCO's "
            "json, or --classes=coco or voc"
        )
    extra = kept["extra"] | {
        "source": Path(file).name,
        "category_ids": list(model.category_ids),
        "exif_orientation": model.exif_orientation,
    }
    params, stats = model.variables
    arguments.make_folder(out, outputs=(weights.WEIGHTS, weights.CONFIG))
    weights.save(
        out,
        model.detector,
        params,
        stats,
        classes=list(model.class_names),
        image_size=model.image_size,
        **kept | {"extra": extra},
    )
    parameters, count = complexity.parameters(params), len(model.class_names)
    height, width = model.image_size
    told = f"{parameters:,} parameters, input {height}x{width}, {count} classes: {listed(model.class_names)}"
    print(f"{out}: {model.detector.name} with {told}")
    return 0


def _renamed(path: str, names: Sequence[str] | None) -> inference.Model:
    """A kdjax model with other class names, in the order of the old ones."""
    model = inference.load(path)
    own = model.class_names
    if names is None:
        raise UserError(f"{path} is a kdjax model: give --classes=FILE to rename its classes: {listed(own)}")
    if len(names) != model.detector.num_classes:
        raise UserError(f"--classes: it has {len(names)} names, {path} has {len(own)} classes: {listed(own)}")
    for old, name in zip(own, names, strict=True):
        if name.casefold() in map(str.casefold, own) and name.casefold() != old.casefold():
            raise UserError(
                f"--classes: another order than that of {path}: {name!r} stands in the place of {old!r}: {listed(own)}"
            )
    return dataclasses.replace(model, class_names=tuple(names))


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in text.split(","))
    except ValueError:
        raise UserError(f"--image-size must be height and width in pixels, as in 640,640, not {text}") from None
    return height, width
