"""What an ONNX file takes and gives: short descriptions, ready ones for common exports, and reading outputs by them.

A `Layout` says how a file wants its images (colours, normalisation, how an image fits the input) and what its outputs
are: maps, rows of boxes with scores, or detections. `layout` makes one from a ready name and the options that differ.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard, cast, get_args, get_origin

import numpy as np

from kdjax.boxes.priors import grid_priors
from kdjax.errors import UserError
from kdjax.structs import DetectorOutput, PaddedDetections, Rows

PLACES = 300  # detections of an image, at most
_TOKENS = 16  # of a class and registers, before those of the patches, at most
_SURE = 6e-8  # of a probability of 1 in float32: its logit is 16.6
_NEVER = 1e-12  # of a probability of 0: its logit is -27.6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How an ONNX file takes images, and what its outputs are.

    The arrangement of the input (channels first or last), its type and its size are read from the file.
    """

    kind: Literal["maps", "rows", "detections", "kdjax"]
    # ---- the images
    image_size: tuple[int, ...] = ()  # height, width of the input, px, where the file leaves it open; (): the canvas
    colors: Literal["RGB", "BGR"] = "RGB"
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)  # subtracted of colours 0 .. 255, in the order of `colors`
    # that they are divided by afterwards: 255 for an input in 0 .. 1, 1 for one in 0 .. 255. None: it must be given
    # unless the input is of bytes
    std: tuple[float, ...] | None = None
    # how an image fits the input, at its top left: "round" or "down" (with its aspect ratio, sides rounded or cut off,
    # the rest grey), or "stretch"
    fit: Literal["round", "down", "stretch"] = "round"
    # what a second input gets: "image_hw", height and width of the image on the input; "input_wh", width and height of
    # the input (RT-DETR's `orig_target_sizes`); "input_hw"
    sizes: Literal["image_hw", "input_wh", "input_hw"] = "input_wh"
    # ---- the outputs
    outputs: tuple[
        str, ...
    ] = ()  # names of predictions, scores before boxes and labels; (): all outputs that are no `maps`
    # names of the feature maps, fine to coarse, that are taken as `neck`: outputs, or tensors inside the graph (needs
    # the package onnx). f32[B, C, H, W], f32[B, H, W, C], or tokens f32[B, T, C], those of the patches last
    maps: tuple[str, ...] = ()
    strides: tuple[int, ...] = ()  # of the maps, or of the grid that rows lie on, fine to coarse, px of the input
    # of rows in one output: its columns along the last axis ("joined": [B, N, 4 + ...]) or along the second
    # ("transposed": [B, 4 + ..., N]); "apart": scores and boxes are two outputs
    columns: Literal["apart", "joined", "transposed"] = "apart"
    objectness: bool = False  # whether a column between the box and the classes holds the score of any object
    # "cells": centre in cells relative to the own cell, logarithm of the size in cells (YOLOX without decoding)
    boxes: Literal["xyxy", "cxcywh", "xywh", "cells"] = "xyxy"
    unit: Literal["pixels", "fractions"] = "pixels"  # of the boxes: of the input
    # "probs": 0 .. 1; "logits": of a sigmoid for each class; "softmax": logits of all classes and, last, the background
    scores: Literal["probs", "logits", "softmax"] = "probs"
    nms: float = 0.65  # IoU above which a box is dropped for a better one of its class; 0: none is needed
    # names of the classes by index: coco, voc, or a file (a name per line, COCO's json, data.yaml); "": those in the
    # file's metadata
    classes: str = ""


_IMAGENET = {"colors": "RGB", "mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
_YOLO = {"std": (255.0, 255.0, 255.0), "boxes": "cxcywh", "strides": (8, 16, 32)}
READY: dict[str, dict[str, Any]] = {
    "kdjax": {"kind": "kdjax", "std": (1.0, 1.0, 1.0), "sizes": "image_hw"},
    "yolox": {
        "kind": "rows", "colors": "BGR", "std": (1.0, 1.0, 1.0), "fit": "down", "columns": "joined",
        "objectness": True, "boxes": "cells", "strides": (8, 16, 32),
    },
    "yolov5": {"kind": "rows", "columns": "joined", "objectness": True} | _YOLO,
    "yolov8": {"kind": "rows", "columns": "transposed", "nms": 0.7} | _YOLO,
    "detr": {
        "kind": "rows", "std": (255.0, 255.0, 255.0), "fit": "stretch", "boxes": "cxcywh", "unit": "fractions",
        "scores": "logits", "nms": 0.0,
    },
    "mmdeploy": {
        "kind": "detections", "colors": "BGR", "mean": (103.53, 116.28, 123.675), "std": (57.375, 57.12, 58.395),
    },
    "maps": {"kind": "maps", "fit": "stretch"} | _IMAGENET,
    "rows": {"kind": "rows"},
    "detections": {"kind": "detections"},
}  # fmt: skip


def layout(name: str, options: Mapping[str, Any] | None = None) -> Layout:
    """A ready description, with the options that differ from it.

    Args:
      name: of `READY`.
      options: fields of `Layout` except `kind`; one number stands for three equal ones in `mean` and `std`.

    Raises:
      UserError: unknown name or option, or a value of another type or out of its range.

    Example:
      >>> layout("yolov8", {"classes": "coco"}).boxes
      'cxcywh'
      >>> layout("yolov8", {"colours": "BGR"})
      Traceback (most recent call last):
      kdjax.errors.UserError: options.colours: there is no such option (did you mean colors?)
    """
    if name not in READY:
        raise UserError(f"layout must be one of {', '.join(READY)}, not {name!r}")
    fields = {field.name: field for field in dataclasses.fields(Layout) if field.name != "kind"}
    allowed = [*fields] if name != "kdjax" else ["maps", "strides", "classes"]
    given: dict[str, Any] = {}
    for option, value in (options or {}).items():
        if option not in allowed:
            close = difflib.get_close_matches(option, allowed, n=1)
            hint = f" (did you mean {close[0]}?)" if close else f": the options are {', '.join(allowed)}"
            why = "no such option" if option not in fields else f"no such option for the layout {name}"
            raise UserError(f"options.{option}: there is {why}{hint}")
        given[option] = _value(option, fields[option].type, value)
    described = Layout(**READY[name] | given)
    if described.boxes == "cells" and not described.strides:
        raise UserError("options.strides: boxes in cells need the strides of their grid, as in (8, 16, 32)")
    return described


def _value(option: str, kind: object, value: object) -> object:
    """A value of an option in its own type."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UserError(f"options.{option} must be one of {', '.join(map(repr, get_args(kind)))}, not {value!r}")
        return value
    if kind in (str, bool):
        if not isinstance(value, kind):
            raise UserError(f"options.{option} must be {'text' if kind is str else 'True or False'}, not {value!r}")
        return value
    if option in ("mean", "std") and _is_number(value):
        value = (value,) * 3
    if option in ("outputs", "maps"):
        value = (value,) if isinstance(value, str) else value
        if not isinstance(value, tuple | list) or not all(isinstance(name, str) and name for name in value):
            raise UserError(f"options.{option} must be names, not {value!r}")
        return tuple(value)
    if option == "nms":
        if not _is_number(value) or not 0 <= value < 1:
            raise UserError(f"options.nms must be in [0, 1), not {value!r}")
        return float(value)
    if option == "strides" and isinstance(value, int):
        value = (value,)
    if not isinstance(value, tuple | list) or not all(map(_is_number, value)):
        raise UserError(f"options.{option} must be numbers, not {value!r}")
    numbers = tuple(cast(Sequence[float], value))
    if option in ("mean", "std"):
        if len(numbers) != 3 or (option == "std" and min(numbers) <= 0):
            what = "three numbers" + " above 0" * (option == "std")
            raise UserError(f"options.{option} must be {what}, not {value}")
        return tuple(map(float, numbers))
    whole = all(isinstance(number, int) and number > 0 for number in numbers)
    if not whole or (option == "image_size" and len(numbers) not in (0, 2)):
        what = "height and width in pixels" if option == "image_size" else "whole numbers above 0"
        raise UserError(f"options.{option} must be {what}, not {value}")
    if option == "strides" and list(numbers) != sorted(set(numbers)):
        raise UserError(f"options.strides must run from fine to coarse, not {value}")
    return numbers


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Outputs(NamedTuple):
    """Arrays of the outputs of a file by name, for B images."""

    arrays: Mapping[str, np.ndarray]
    size: tuple[int, int]  # height and width of the input in pixels


def read(described: Layout, found: Outputs) -> DetectorOutput:
    """What the outputs of a file say, in pixels of its input.

    Args:
      described: the layout, of any kind but "kdjax".
      found: the outputs for B images.

    Returns:
      Arrays in NumPy: `neck` where there are maps; of rows `rows` (f32[B, N, K] logits of a sigmoid, boxes, `quality`
      with objectness; `level_sizes` where they lie on the grid of the strides), and then also `cls_logits`; of
      detections `detections`, `PLACES` an image at most. `strides` are those of maps or grid, () without.

    Raises:
      UserError: an output does not fit the layout; it is named with its shape.
    """
    neck, strides = read_maps(described, found)
    fields: dict[str, Any] = {"neck": neck, "strides": strides}
    predictions = {name: array for name, array in found.arrays.items() if name not in described.maps}
    if described.outputs:
        predictions = {name: found.arrays[name] for name in described.outputs}
    if described.kind == "detections":
        fields["detections"] = _detections(described, predictions, found.size)
    elif described.kind == "rows":
        fields["rows"] = rows = _rows(described, predictions, found.size)
        if rows.level_sizes:
            if neck and strides != described.strides:
                raise UserError(
                    f"the maps have the strides {strides}, the rows {described.strides}: take maps of these"
                )
            fields |= {"strides": described.strides, "cls_logits": _class_maps(described, rows, found.size)}
    return DetectorOutput(**fields)


def read_maps(described: Layout, found: Outputs) -> tuple[tuple[np.ndarray, ...], tuple[int, ...]]:
    """The maps among the outputs, f32[B, H, W, C], fine to coarse, and their strides in pixels of the input.

    Raises:
      UserError: an output is no map; it is named with its shape.
    """
    names = described.maps or (tuple(described.outputs or found.arrays) if described.kind == "maps" else ())
    strides = described.strides or (0,) * len(names)
    if names and len(strides) != len(names):
        raise UserError(f"options.strides: there are {len(strides)} strides for {len(names)} maps ({', '.join(names)})")
    maps = [_map(name, found.arrays[name], found.size, s) for name, s in zip(names, strides, strict=False)]
    maps.sort(key=lambda pair: pair[1])
    return tuple(x for x, _ in maps), tuple(stride for _, stride in maps)


def _map(name: str, x: np.ndarray, size: tuple[int, int], stride: int) -> tuple[np.ndarray, int]:
    """One map f32[B, H, W, C] with its stride."""
    what = f"output {name!r} f32{list(x.shape)}"
    if x.ndim == 3:
        if not stride:
            raise UserError(f"{what} holds tokens: options.strides must tell the side of their patches in pixels")
        cells = size[0] // stride, size[1] // stride
        extra = x.shape[1] - cells[0] * cells[1]
        if not 0 <= extra <= _TOKENS:
            raise UserError(
                f"{what} has {x.shape[1]} tokens, but patches of {stride} px of {size[0]}x{size[1]} are "
                f"{cells[0] * cells[1]}: options.strides must be the side of a patch"
            )
        return np.asarray(x[:, extra:].reshape(len(x), *cells, -1), np.float32), stride
    if x.ndim != 4:
        raise UserError(f"{what} is no map: it must be [B, C, H, W], [B, H, W, C] or tokens [B, T, C]")
    for channels in (1, 3):
        sides = [x.shape[axis] for axis in (1, 2, 3) if axis != channels]
        strides = [max(round(side / cells), 1) for side, cells in zip(size, sides, strict=True)]
        fits = all(-(-side // (stride or strides[0])) == cells for side, cells in zip(size, sides, strict=True))
        if fits and strides[0] == strides[1]:
            return np.asarray(np.moveaxis(x, channels, 3), np.float32), stride or strides[0]
    told = f"of the stride {stride}" if stride else "of one stride in height and width"
    raise UserError(f"{what} is no map {told} of an input of {size[0]}x{size[1]} px: check options.strides and maps")


def _grid(described: Layout, size: tuple[int, int]) -> tuple[int, ...]:
    """Rows of each level, if there is one a cell."""
    return tuple(-(-size[0] // stride) * -(-size[1] // stride) for stride in described.strides)


def _rows(described: Layout, arrays: Mapping[str, np.ndarray], size: tuple[int, int]) -> Rows:
    columns = 4 + described.objectness
    if described.columns == "apart":
        (name, scores), (box_name, boxes) = _scores_and_boxes(arrays)
        if scores.shape[:2] != boxes.shape[:2]:
            raise UserError(
                f"outputs {name!r} f32{list(scores.shape)} and {box_name!r} f32{list(boxes.shape)} have different "
                "numbers of rows: name those of scores and boxes in options.outputs"
            )
        objectness = scores[..., 0] if described.objectness else None
        scores = scores[..., 1:] if described.objectness else scores
    else:
        name, joined = _one(arrays)
        form = "[B, N, columns]" if described.columns == "joined" else "[B, columns, N]"
        if joined.ndim != 3 or joined.shape[2 if described.columns == "joined" else 1] <= columns:
            raise UserError(
                f"output {name!r} f32{list(joined.shape)} does not fit the layout: it must be {form} with {columns} "
                "columns of box" + " and objectness" * described.objectness + " before those of the classes"
            )
        joined = joined if described.columns == "joined" else np.swapaxes(joined, 1, 2)
        cells = sum(_grid(described, size))
        if joined.shape[1] != cells == joined.shape[2]:
            raise UserError(
                f"output {name!r} f32{list(arrays[name].shape)} has its rows along another axis: "
                f"options.columns must be {'transposed' if described.columns == 'joined' else 'joined'}"
            )
        boxes, scores = joined[..., :4], joined[..., columns:]
        objectness = joined[..., 4] if described.objectness else None
    levels = _grid(described, size)
    on_grid = bool(levels) and sum(levels) == boxes.shape[1]
    if described.boxes == "cells" and not on_grid:
        raise UserError(
            f"output {name!r} f32{list(arrays[name].shape)} has {boxes.shape[1]} rows, but the grid of the strides "
            f"{described.strides} has {sum(levels)} cells on an input of {size[0]}x{size[1]} px: check options.strides"
        )
    fields: dict[str, Any] = {"logits": _logits(name, described.scores, scores)}
    if objectness is not None:
        fields["quality"] = _logits(name, "logits" if described.scores == "logits" else "probs", objectness)
    fields["boxes"] = _boxes(described, boxes, size)
    return Rows(**fields, level_sizes=levels if on_grid else ())


def _one(arrays: Mapping[str, np.ndarray]) -> tuple[str, np.ndarray]:
    if len(arrays) != 1:
        raise UserError(f"the layout has one output of rows, the file {shapes(arrays)}: name it in options.outputs")
    return next(iter(arrays.items()))


def _scores_and_boxes(arrays: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """The outputs of scores and of boxes: boxes have four columns; if both have, the first are the scores."""
    pair = list(arrays.items())
    if len(pair) != 2 or any(array.ndim != 3 for _, array in pair) or not any(a.shape[-1] == 4 for _, a in pair):
        raise UserError(
            f"the layout has outputs [B, N, K] of scores and [B, N, 4] of boxes, the file {shapes(arrays)}: name them "
            "in options.outputs"
        )
    return pair if pair[1][1].shape[-1] == 4 else pair[::-1]


def shapes(arrays: Mapping[str, np.ndarray]) -> str:
    """The names and shapes of arrays, for messages.

    Example:
      >>> shapes({"dets": np.zeros((1, 2, 5), np.float32)})
      "'dets' float32[1, 2, 5]"
    """
    return ", ".join(f"{name!r} {array.dtype}{list(array.shape)}" for name, array in arrays.items()) or "none"


def _logits(name: str, form: str, scores: np.ndarray) -> np.ndarray:
    """Scores as logits of a sigmoid, f32."""
    if form == "logits":
        return np.asarray(scores, np.float32)
    scores = scores.astype(np.float64)
    if form == "softmax":
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        scores = (powers / powers.sum(-1, keepdims=True))[..., :-1]
    elif scores.size and not (scores.min() >= -1e-3 and scores.max() <= 1 + 1e-3):
        raise UserError(
            f"output {name!r} holds scores of {scores.min():.3g} .. {scores.max():.3g}, which are no probabilities: "
            "options.scores must be logits or softmax, or options.columns and objectness something else"
        )
    scores = np.clip(scores, _NEVER, 1 - _SURE)
    return np.log(scores / (1 - scores)).astype(np.float32)


def _boxes(described: Layout, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes f32[..., 4] as x1 y1 x2 y2 in pixels of the input."""
    boxes = np.asarray(boxes, np.float32)
    if described.boxes == "cells":
        corners, cells = np.split(grid_priors(size, described.strides), 2, axis=1)
        boxes = np.concatenate([boxes[..., :2] * cells + corners, np.exp(boxes[..., 2:]) * cells], -1)
    if described.unit == "fractions":
        boxes = boxes * np.array([size[1], size[0]] * 2, np.float32)
    if described.boxes == "xyxy":
        return boxes
    first, sides = boxes[..., :2], boxes[..., 2:]
    if described.boxes == "xywh":
        return np.concatenate([first, first + sides], -1)
    return np.concatenate([first - sides / 2, first + sides / 2], -1)


def _class_maps(described: Layout, rows: Rows, size: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """The logits of rows on a grid as maps f32[B, H, W, K]."""
    parts = np.split(np.asarray(rows.logits), np.cumsum(rows.level_sizes)[:-1], axis=1)
    sides = [[-(-side // stride) for side in size] for stride in described.strides]
    return tuple(part.reshape(len(part), *side, -1) for part, side in zip(parts, sides, strict=True))


def _detections(described: Layout, arrays: Mapping[str, np.ndarray], size: tuple[int, int]) -> PaddedDetections:
    boxes, scores, labels = _three(arrays)
    count = min(boxes.shape[1], PLACES)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]

    def best(x: np.ndarray) -> np.ndarray:
        taken = np.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), 1)
        return np.pad(taken, [(0, 0), (0, PLACES - count), *[(0, 0)] * (x.ndim - 2)])

    boxes, scores, labels = best(_boxes(described, boxes, size)), best(scores), best(labels)
    # Files with a fixed number of detections fill it up with a score of 0, a label of -1 or boxes without extent.
    valid = (scores > 0) & (labels >= 0) & np.all(boxes[..., 2:] > boxes[..., :2], -1)
    values: list[Any] = [
        np.where(valid[..., None], boxes, 0).astype(np.float32),
        np.where(valid, scores, 0).astype(np.float32),
        np.where(valid, labels, 0).astype(np.int32),
        valid,
    ]
    return PaddedDetections(*values)


def _three(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes [B, n, 4], scores [B, n] and labels [B, n] among the outputs; of one image, B may be left out."""
    dims = max((array.ndim for array in arrays.values()), default=0)
    wide = [name for name, array in arrays.items() if array.ndim == dims and array.shape[-1] in (4, 5, 6)]
    found: dict[str, np.ndarray] = {}
    if len(wide) == 1 and dims in (2, 3):
        joined = arrays[wide[0]] if dims == 3 else arrays[wide[0]][None]
        found = {"boxes": joined[..., :4]}
        found |= {
            name: joined[..., 4 + place] for place, name in enumerate(("scores", "labels")[: joined.shape[-1] - 4])
        }
        for name, array in arrays.items():
            if name != wide[0]:
                flat = array[..., 0] if array.ndim == dims and array.shape[-1] == 1 else array
                integers = np.issubdtype(array.dtype, np.integer) or "scores" in found
                found["labels" if integers else "scores"] = flat if dims == 3 else flat[None]
    if len(found) != 3 or len({value.shape[:2] for value in found.values()}) != 1:
        raise UserError(
            "the layout has outputs of boxes [B, n, 4], scores [B, n] and labels [B, n], or [B, n, 5] of boxes with "
            f"scores and labels, or [B, n, 6] of all, the file {shapes(arrays)}: name them in options.outputs"
        )
    return found["boxes"], found["scores"], found["labels"]
