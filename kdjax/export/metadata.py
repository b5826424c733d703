"""The metadata of an exported file."""

import json
from pathlib import Path

import kdjax
from kdjax.errors import UserError
from kdjax.evals import complexity
from kdjax.export import graphs
from kdjax.inference.model import Model

_FITS = {
    "round": "scaled to fit, its sides rounded half up",
    "down": "scaled to fit, fractions of a pixel cut off",
    "stretch": "resized to it without keeping the aspect ratio",
}
_MASKS = {
    "canvas": "logits of the whole canvas, of which a cell has canvas / h pixels",
    "box": "probabilities inside the box",
}


def describe(model: Model, format: str, *, raw: bool, batch: int = 1) -> dict[str, str]:
    """The facts that a user of an exported file needs, as text by name.

    Args:
      model: from `kdjax.inference.load`.
      format: a key of `targets.NMS`.
      raw: whether the outputs are the head's maps.
      batch: number of images; 0: any.
    """
    height, width = model.image_size
    count = str(batch or "B")
    shape = f"f32[3, {height}, {width}], 0 .. 255" if format == "ncnn" else f"u8[{count}, {height}, {width}, 3]"
    image = f"image {shape}, RGB, {_FITS[model.detector.fit]}"
    if model.detector.fit != "stretch":
        image += f", at the top left, the rest {model.detector.pad_value}"
    outputs = "boxes f32[n, 4] x1 y1 x2 y2 in pixels of the canvas, scores f32[n], labels i64[n], best first"
    if batch != 1:
        most = graphs.most(model)
        outputs = (
            f"boxes f32[{count}, {most}, 4] x1 y1 x2 y2 in pixels of the canvas, scores f32[{count}, {most}], labels "
            f"i64[{count}, {most}], best first, filled up with scores of 0"
        )
    if format == "stablehlo":  # its detections are padded
        most = graphs.most(model)
        outputs = (
            f"boxes f32[1, {most}, 4] x1 y1 x2 y2 in pixels of the canvas, scores f32[1, {most}], labels i32[1, "
            f"{most}], valid bool[1, {most}]: which of them are detections"
        )
    if model.detector.masks:
        rows = (
            f"1, {graphs.most(model)}"
            if format == "stablehlo"
            else "n"
            if batch == 1
            else f"{count}, {graphs.most(model)}"
        )
        outputs += f"; masks f32[{rows}, h, w], {_MASKS[model.detector.masks]}"
    if format == "litert":
        limits = graphs.nms_settings(model)
        outputs = (
            "boxes f32[1, N, 4] x1 y1 x2 y2 in pixels of the canvas, scores f32[1, N, K], 0 where a class is left "
            f"out; not included: class-wise NMS over an IoU of {limits['iou_threshold']:g}, the best "
            f"{limits['max_detections']}, clipping to image_size"
        )
    if raw:
        sides = "H, W, C" if format == "ncnn" else f"{count}, H, W, C"
        outputs = f"{', '.join(graphs.map_names(model))}: f32[{sides}] as in kdjax.structs.DetectorOutput"
    return {
        "kdjax": kdjax.__version__,
        "detector": model.detector.name,
        "options": json.dumps(model.detector.options),
        "classes": json.dumps(model.class_names),
        "category_ids": json.dumps(model.category_ids),
        "image_size": json.dumps(model.image_size),
        "input": image if raw else f"{image}; image_size i32[{count}, 2], height and width of the image on it",
        "normalisation": _normalisation(model),
        "output": outputs,
        "parameters": str(complexity.parameters(model.variables[0])),
        "flops": str(complexity.flops(model.detector, model.image_size)),
    }


def place(file: Path) -> Path:
    """The json with the metadata of a file whose format has no place for them."""
    return file.with_name(f"{file.name}.json")


def beside(file: Path) -> dict[str, str]:
    """What `place` of a file holds; {} if nothing is there.

    Raises:
      UserError: it is no json of `kdjax export`.
    """
    path = place(file)
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: it is no json ({error}): export {file.name} again") from None
    if not isinstance(facts, dict) or not all(isinstance(fact, str) for fact in facts.values()):
        raise UserError(f"{path}: it is not the metadata of {file.name} that `kdjax export` writes: export it again")
    return facts


def _normalisation(model: Model) -> str:
    kernel, offset = graphs.affine(model)
    std = 1 / kernel.sum(0)
    order = "RGB" if kernel[0, 0] else "BGR"
    mean, std = (" ".join(f"{value:g}" for value in values.round(3)) for values in (-offset * std, std))
    return f"inside the graph: {order}, minus {mean}, divided by {std}"
