"""`kdjax import-weights`: a PyTorch checkpoint, or an ONNX file of YOLOX, to a kdjax folder."""

from pathlib import Path

from kdjax import detectors, weights
from kdjax.data import coco
from kdjax.evals import complexity


def run(*, file: str, detector: str, out: str, classes: str | None, image_size: str, network: str) -> int:
    """Converts a checkpoint.

    Args:
      file: `.pth`, `.safetensors` or `.npz` with the names of mmdetection, mmyolo (RTMDet), mmrazor or the authors of
        YOLOX, or their `.onnx`.
      detector: a name that `kdjax.detectors.build` knows.
      out: the folder to write.
      classes: file with the names of the classes: COCO json, or text with one a line; None: the checkpoint's own.
      image_size: "H,W" of the canvas in pixels.
      network: "student" or "teacher" of a distiller.

    Returns:
      Exit code 0.

    Raises:
      ValueError: one sentence on what does not fit.
    """
    height_width = _size(image_size)
    divisor = detectors.build(detector, 1).size_divisor
    if any(side < 1 or side % divisor for side in height_width):
        raise ValueError(f"--image-size={image_size} must be two multiples of {divisor}, as in 640,640.")
    given = read_classes(classes) if classes else None
    state, told = weights.read_checkpoint(file)
    names = given or told
    one_class = detectors.build(detector, 1)
    plain = weights.plain(one_class, state, network)
    count = weights.count_classes(one_class, plain)
    if not count:
        raise ValueError(f"{file} has no classifier of {detector} for its {network}.")
    if names is None:
        raise ValueError(
            f"{file} does not name its {count} classes: give --classes=FILE, a name a line or COCO's json."
        )
    if len(names) != count:
        raise ValueError(f"{file} has {count} classes, but {classes or 'its meta'} names {len(names)}.")
    built = weights.infer_options(detectors.build(detector, count), state)
    params, stats = weights.from_torch(built, plain, keep_classifiers=True)
    extra = {"source": Path(file).name}
    weights.save(out, built, params, stats, classes=names, image_size=height_width, extra=extra)
    print(f"{out}: {detector} with {complexity.parameters(params):,} parameters, {count} classes: {', '.join(names)}")
    return 0


def read_classes(path: str) -> list[str]:
    """Names of classes from a COCO json (by ascending category id) or from a text with one a line."""
    if not Path(path).is_file():
        raise ValueError(f"--classes={path}: there is no such file.")
    try:
        if Path(path).suffix == ".json":
            categories = coco.read(Path(path))["categories"]
            return [str(entry["name"]) for entry in sorted(categories, key=lambda entry: entry["id"])]
        return [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"--classes={path} cannot be read as names of classes: {error!r}.") from None


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in text.split(","))
    except ValueError:
        raise ValueError(f"--image-size={text} must be height and width in pixels, as in 640,640.") from None
    return height, width
