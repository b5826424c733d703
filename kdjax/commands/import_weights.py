"""`kdjax import-weights`: a PyTorch checkpoint, or an ONNX file of YOLOX or RTMDet, to a kdjax folder."""

from pathlib import Path

from kdjax import inference, weights
from kdjax.commands import arguments
from kdjax.data.classes import read as read_classes
from kdjax.errors import UserError, listed, prefix
from kdjax.evals import complexity


def run(*, file: str, detector: str, out: str, classes: str | None, image_size: str | None, network: str) -> int:
    """Converts a checkpoint.

    Args:
      file: see `kdjax.inference.load`.
      detector: a name that `kdjax.detectors.build` knows.
      out: the folder to write.
      classes: the class names, see `kdjax.data.classes.read`; None: those of the checkpoint.
      image_size: "H,W" of the network input in pixels; None: the detector's default.
      network: "student" or "teacher" of a distiller.

    Returns:
      Exit code 0.

    Raises:
      UserError: the checkpoint, the detector and the class names do not fit each other.
    """
    size = None if image_size is None else _size(image_size)
    with prefix("--classes"):
        names = read_classes(classes) if classes else None
    model = inference.load(file, detector, class_names=names, image_size=size, network=network)
    if not model.class_names:
        count = model.detector.num_classes
        raise UserError(
            f"{file}: it does not name its {count} classes: give --classes=FILE, with one name per line or COCO's "
            "json, or --classes=coco or voc"
        )
    params, stats = model.variables
    arguments.make_folder(out, outputs=(weights.WEIGHTS, weights.CONFIG))
    weights.save(
        out,
        model.detector,
        params,
        stats,
        classes=list(model.class_names),
        image_size=model.image_size,
        extra={"source": Path(file).name},
    )
    parameters, count = complexity.parameters(params), len(model.class_names)
    height, width = model.image_size
    told = f"{parameters:,} parameters, input {height}x{width}, {count} classes: {listed(model.class_names)}"
    print(f"{out}: {detector} with {told}")
    return 0


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in text.split(","))
    except ValueError:
        raise UserError(f"--image-size must be height and width in pixels, as in 640,640, not {text}") from None
    return height, width
