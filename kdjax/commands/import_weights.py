"""`kdjax import-weights`: a PyTorch checkpoint, or an ONNX file of YOLOX, to a kdjax folder."""

from pathlib import Path

from kdjax import inference, weights
from kdjax.commands import arguments
from kdjax.data import coco
from kdjax.errors import UserError, listed
from kdjax.evals import complexity


def run(*, file: str, detector: str, out: str, classes: str | None, image_size: str, network: str) -> int:
    """Converts a checkpoint.

    Args:
      file: see `kdjax.inference.load`.
      detector: a name that `kdjax.detectors.build` knows.
      out: the folder to write.
      classes: file with the class names: COCO json, or text with one per line; None: those of the checkpoint.
      image_size: "H,W" of the network input in pixels.
      network: "student" or "teacher" of a distiller.

    Returns:
      Exit code 0.

    Raises:
      UserError: the checkpoint, the detector and the class names do not fit each other.
    """
    size = _size(image_size)
    names = read_classes(classes) if classes else None
    model = inference.load(file, detector, class_names=names, image_size=size, network=network)
    if not model.class_names:
        count = model.detector.num_classes
        raise UserError(
            f"{file}: it does not name its {count} classes: give --classes=FILE, with one name per line or COCO's json"
        )
    params, stats = model.variables
    arguments.make_folder(out, outputs=(weights.WEIGHTS, weights.CONFIG))
    weights.save(
        out,
        model.detector,
        params,
        stats,
        classes=list(model.class_names),
        image_size=size,
        extra={"source": Path(file).name},
    )
    parameters, count = complexity.parameters(params), len(model.class_names)
    print(f"{out}: {detector} with {parameters:,} parameters, {count} classes: {listed(model.class_names)}")
    return 0


def read_classes(path: str) -> list[str]:
    """Class names of a COCO json (by ascending category id) or of a text file with one per line."""
    if not Path(path).is_file():
        raise UserError(f"--classes: there is no file {path}")
    try:
        if Path(path).suffix == ".json":
            categories = coco.read(Path(path))["categories"]
            names = [entry["name"] for entry in sorted(categories, key=lambda entry: entry["id"])]
        else:
            names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"--classes: {path} cannot be read as class names: {error!r}") from None
    if not names:
        raise UserError(f"--classes: {path} has no names of classes")
    for name in names:
        if not isinstance(name, str) or not name.strip() or names.count(name) > 1:
            what = "twice" if isinstance(name, str) and name.strip() else "for a class"
            raise UserError(f"--classes: {path} has the name {name!r} {what}: every class needs a name of its own")
    return names


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in text.split(","))
    except ValueError:
        raise UserError(f"--image-size must be height and width in pixels, as in 640,640, not {text}") from None
    return height, width
