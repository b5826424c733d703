"""Where the canvas of a run lies in the input of an ONNX file, and back."""

import dataclasses
from typing import Any, NamedTuple, cast

import numpy as np

from kdjax.data import transforms
from kdjax.errors import UserError
from kdjax.structs import AnyArray, DetectorOutput, PaddedDetections


class Placement(NamedTuple):
    """Where a canvas of a run lies in the input of a file, at the top left."""

    canvas: tuple[int, int]  # height, width in pixels
    placed: tuple[int, int]  # of the canvas in the input
    size: tuple[int, int]  # of the input

    @property
    def fills(self) -> bool:
        """Whether the canvas covers the whole input."""
        return self.placed == self.size

    @property
    def ratio(self) -> np.ndarray:
        """Pixels of the input to one of the canvas, f32[2]: x, y."""
        return np.array([self.placed[1] / self.canvas[1], self.placed[0] / self.canvas[0]], np.float32)


def placed(images: np.ndarray, place: Placement) -> np.ndarray:
    """Canvases u8[B, H, W, 3] in the input, u8[B, h, w, 3]."""
    if place.canvas == place.size:
        return images

    def fit(image: np.ndarray) -> np.ndarray:
        sample = transforms.Sample(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int32))
        return transforms.pad(transforms.resize(sample, place.placed), place.size).image

    return np.stack([fit(image) for image in images])


def on_canvas(output: DetectorOutput, place: Placement, sizes: np.ndarray) -> DetectorOutput:
    """An output in pixels of the input, in those of the canvas; detections are clipped to their images i32[B, 2]."""
    if output.neck and not place.fills:
        (height, width), (h, w), (y, x) = place
        raise UserError(
            f"the canvas of {height}x{width} px fills only {h}x{w} px of the input of {y}x{x} px, and its maps would "
            "not lie on the canvas: config.data.image_size must have its proportions, or options.fit be stretch"
        )
    ratio = place.ratio
    exact = [(stride / ratio).tolist() for stride in output.strides]
    strides = tuple(max(round(sum(pair) / 2), 1) for pair in exact)
    on_grid = place.fills and all(x == y == stride for (x, y), stride in zip(exact, strides, strict=True))
    fields: dict[str, Any] = {"strides": strides}
    if not np.all(ratio == 1):
        fields["box_reg"] = ()  # which is in pixels of the input
    if not on_grid:
        fields |= {"cls_logits": (), "box_reg": (), "quality": ()} | ({} if output.neck else {"strides": ()})
    if output.rows is not None:
        boxes = np.asarray(output.rows.boxes) / np.tile(ratio, 2)
        levels = output.rows.level_sizes if on_grid else ()
        fields["rows"] = dataclasses.replace(output.rows, boxes=boxes, level_sizes=levels)
    if (found := output.detections) is not None:
        boxes = np.asarray(found.boxes) / np.tile(ratio, 2)
        boxes = np.clip(boxes, 0, np.tile(sizes[:, None, ::-1], 2)).astype(np.float32)
        kept = np.asarray(found.valid) & np.all(boxes[..., 2:] > boxes[..., :2], -1)
        fields["detections"] = first(found._replace(boxes=cast(Any, boxes)), kept, np.asarray(found.labels))
    return dataclasses.replace(output, **fields)


def first(found: PaddedDetections, kept: np.ndarray, labels: np.ndarray) -> PaddedDetections:
    """Detections without those that are not kept, the others in their order and first."""
    order = np.argsort(~kept, axis=1, kind="stable")

    def take(value: AnyArray) -> np.ndarray:
        value = np.asarray(value)
        shape = *order.shape, *[1] * (value.ndim - 2)
        return np.take_along_axis(np.where(kept.reshape(shape), value, 0), order.reshape(shape), 1).astype(value.dtype)

    values: list[Any] = [found.boxes, found.scores, labels.astype(np.int32), kept]
    return PaddedDetections(*map(take, values))  # pyright: ignore[reportArgumentType] - NumPy's
