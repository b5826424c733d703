"""Draws boxes on images: NumPy in, NumPy out, no file is touched.

Ground truth and plain detections have one colour per class. Detections that are compared with the ground truth are
marked by colour, line style and sign: a solid green box with a tick is correct, a solid red box with a cross is a false
positive, a dashed yellow box is a missed object.
"""

import colorsys
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from faster_coco_eval.core import mask as rle
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from kdjax.evals.matching import match
from kdjax.structs import Detections

TRUTH = "ground truth"  # name of its panel
CORRECT, FALSE, MISSED = 1, 2, 3
OUTCOME_COLORS = {CORRECT: (46, 204, 113), FALSE: (255, 71, 71), MISSED: (255, 205, 40)}

_SIGNS = {CORRECT: "✓ ", FALSE: "✗ ", MISSED: ""}
_INK = (20, 22, 26)
_PAPER = (255, 255, 255)


# Of the whole image at any resolution: COCO's compressed RLE, or u8[h, w], 255 on the object.
Mask = Mapping[str, Any] | np.ndarray


class Example(NamedTuple):
    """An image with its objects and what models detect in it."""

    image: np.ndarray  # u8[h, w, 3], RGB
    boxes: np.ndarray  # f[m, 4], x1 y1 x2 y2 of the objects in pixels of `image`
    labels: np.ndarray  # i[m], 0 .. K-1
    detections: Mapping[str, Detections]  # by model, in the order of the panels; in pixels of `image`
    name: str = ""
    masks: Sequence[Mask | None] = ()  # of the objects; () if they have none


class Panel(NamedTuple):
    """A drawn image with its counts."""

    name: str  # TRUTH or the model
    image: np.ndarray  # u8[h, w, 3], RGB, boxes drawn
    correct: int  # objects with a matching detection; for TRUTH, all objects
    false: int  # detections without a matching object
    missed: int  # objects without a matching detection


def class_color(label: int) -> tuple[int, int, int]:
    """Colour of a class, the same in every image; neighbouring labels have distant hues.

    Args:
      label: int, 0 .. K-1.

    Returns:
      RGB, each 0 .. 255.

    Example:
      >>> class_color(0)
      (64, 156, 255)
    """
    # Multiples of the golden ratio spread any number of hues evenly; three brightness levels separate close hues.
    hue = (0.5864 + 0.618034 * label) % 1.0
    saturation, value = ((0.75, 1.0), (0.6, 0.85), (0.9, 0.95))[label // 7 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def class_name(label: int, class_names: Sequence[str]) -> str:
    """Name of a class as the font can draw it: at most 22 characters, or `class 3` if the font lacks one of them.

    Args:
      label: int; a label without a name is shown as its number.
      class_names: K names.

    Returns:
      One line of text.

    Example:
      >>> [class_name(label, ["red cell", "細胞"]) for label in (0, 1, 2)]
      ['red cell', 'class 1', 'class 2']
    """
    name = str(class_names[label]) if 0 <= label < len(class_names) else ""
    if not name or not _characters().issuperset(map(ord, name)):
        return f"class {label}"
    return name if len(name) <= 22 else name[:21] + "…"


def draw(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None,
    class_names: Sequence[str],
    *,
    masks: Sequence[Mask | None] = (),
    threshold: float = 0.3,
    outcome: np.ndarray | None = None,
    width: tuple[int, int] | None = (320, 480),
) -> np.ndarray:
    """Draws boxes with class names and scores on an image, which is first scaled so that the text is legible.

    Masks are laid over the image in the colours of their boxes.

    Args:
      image: u8[h, w, 3], RGB.
      boxes: f32[n, 4], x1 y1 x2 y2 in pixels of `image`; clipped to it, and left out if not finite.
      labels: i32[n].
      scores: f32[n] in 0 .. 1, or None (ground truth): all boxes are drawn, without scores.
      class_names: K names.
      masks: of the n boxes, see `Mask`; None where there is none; () without any.
      threshold: minimum score of a drawn box.
      outcome: i32[n] of CORRECT, FALSE, MISSED for colours by outcome (a missed object has no score); None for
        colours by class.
      width: minimum and maximum width of the drawn image in pixels; None: the size of `image`.

    Returns:
      u8[h', w', 3], RGB; `image` is not changed.

    Raises:
      ValueError: the image is not u8[h, w, 3], or boxes, labels and scores differ in number.

    Example:
      >>> grey = np.full((40, 80, 3), 128, np.uint8)
      >>> draw(grey, np.array([[8, 8, 30, 30]]), np.array([0]), np.array([0.9]), ["cell"]).shape
      (160, 320, 3)
    """
    image = _checked(image)
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    labels = np.asarray(labels, np.int64).reshape(-1)
    values = np.ones(len(boxes)) if scores is None else np.asarray(scores, np.float64).reshape(-1)
    outcomes = np.zeros(len(boxes), int) if outcome is None else np.asarray(outcome, int).reshape(-1)
    if not len(boxes) == len(labels) == len(values) == len(outcomes):
        raise ValueError(
            f"draw: {len(boxes)} boxes, {len(labels)} labels, {len(values)} scores and {len(outcomes)} outcomes: "
            "the numbers must be equal"
        )
    height, breadth = image.shape[:2]
    scale = 1.0 if width is None else float(np.clip(breadth, *width)) / breadth
    if width is not None and height * scale > 2 * width[1]:
        scale = 2 * width[1] / height  # a tall image must not fill a page
    size = (max(1, round(breadth * scale)), max(1, round(height * scale)))
    canvas = Image.fromarray(image)
    if canvas.size != size:
        canvas = canvas.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.BOX)
    scales = np.array([size[0] / breadth, size[1] / height] * 2)

    shown = [i for i in range(len(boxes)) if np.isfinite(boxes[i]).all() and values[i] >= threshold]
    shown.sort(key=lambda i: (values[i], -i))  # the best last, on top
    pen = ImageDraw.Draw(canvas, "RGBA")
    line = max(2, round(min(size[0], 2 * size[1]) / 160))
    edges = np.array([0, 0, size[0] - 1, size[1] - 1])
    placed: list[tuple[float, ...]] = []
    frames = {}
    if len(masks):
        for i in shown:
            if (mask := masks[i]) is not None:
                color = OUTCOME_COLORS.get(int(outcomes[i])) or class_color(int(labels[i]))
                canvas.paste(color, mask=_cover(mask, size))
    for i in shown:
        x1, y1, x2, y2 = np.clip(np.round(boxes[i] * scales), 0, edges[[2, 3, 2, 3]])
        frames[i] = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        color = OUTCOME_COLORS.get(int(outcomes[i])) or class_color(int(labels[i]))
        _outline(pen, frames[i], color, line, dashed=outcomes[i] == MISSED)
    # Smaller text for many boxes, so that the tags do not hide the objects.
    points = size[0] / (23 if len(shown) <= 6 else 27 if len(shown) <= 14 else 32)
    font = _font(max(10, round(min(points, 40))))
    for i in reversed(shown):  # the best get the best place
        text = _SIGNS.get(int(outcomes[i]), "") + class_name(int(labels[i]), class_names)
        if scores is not None and outcomes[i] != MISSED:
            text += f" {min(values[i], 1):.2f}"
        color = OUTCOME_COLORS.get(int(outcomes[i])) or class_color(int(labels[i]))
        _tag(pen, frames[i], text, color, font, size, placed)
    return np.asarray(canvas)


def _cover(mask: Mask, size: tuple[int, int]) -> Image.Image:
    """How strongly a mask covers an image of `size` (w, h) px: at most by two fifths."""
    share = mask if isinstance(mask, np.ndarray) else rle.decode(dict(mask)) * np.uint8(255)
    cover = Image.fromarray(share).resize(size, Image.Resampling.BILINEAR)
    return cover.point([value * 2 // 5 for value in range(256)])


def panels(
    example: Example,
    class_names: Sequence[str],
    *,
    threshold: float = 0.3,
    iou_threshold: float = 0.5,
    width: tuple[int, int] = (320, 480),
) -> list[Panel]:
    """Draws the ground truth of an image and the detections of each model.

    Args:
      example: the image.
      class_names: K names.
      threshold: minimum score of a detection that is drawn and counted.
      iou_threshold: minimum IoU of a correct detection with an object of its class.
      width: minimum and maximum width of a drawn image in pixels.

    Returns:
      Panels of one size: the ground truth, then the models.

    Example:
      >>> box, label = np.array([[8.0, 8, 30, 30]]), np.array([0])
      >>> detections = {"student": Detections(box, np.array([0.9]), label)}
      >>> example = Example(np.zeros((40, 80, 3), np.uint8), box, label, detections)
      >>> [(panel.name, panel.correct, panel.missed) for panel in panels(example, ["cell"])]
      [('ground truth', 1, 0), ('student', 1, 0)]
    """
    drawn = draw(example.image, example.boxes, example.labels, None, class_names, masks=example.masks, width=width)
    result = [Panel(TRUTH, drawn, len(example.boxes), 0, 0)]
    for name, detections in example.detections.items():
        shown = detections[detections.scores >= threshold]
        correct, detected = match(
            example.boxes, example.labels, shown.boxes, shown.labels, shown.scores, iou_threshold=iou_threshold
        )
        missed = int((~detected).sum())
        masks = [*(shown.masks or [None] * len(shown))]
        masks += [example.masks[i] if example.masks else None for i in np.flatnonzero(~detected).tolist()]
        drawn = draw(
            example.image,
            np.concatenate([shown.boxes, example.boxes[~detected]]),
            np.concatenate([shown.labels, example.labels[~detected]]),
            np.concatenate([shown.scores, np.ones(missed)]),
            class_names,
            masks=masks,
            threshold=threshold,
            outcome=np.concatenate([np.where(correct, CORRECT, FALSE), np.full(missed, MISSED)]),
            width=width,
        )
        result.append(Panel(name, drawn, int(detected.sum()), int((~correct).sum()), missed))
    return result


def summary(panel: Panel) -> str:
    """The counts of a panel in words, for the heading and the alternative text of its image.

    Example:
      >>> summary(Panel("student", np.zeros((1, 1, 3), np.uint8), correct=3, false=1, missed=2))
      '3 correct, 1 false, 2 missed'
    """
    if panel.name == TRUTH:
        return "no object" if not panel.correct else "1 object" if panel.correct == 1 else f"{panel.correct} objects"
    return f"{panel.correct} correct, {panel.false} false, {panel.missed} missed"


def contact_sheet(
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    class_names: Sequence[str],
    columns: int,
    *,
    masks: Sequence[Sequence[Mask]] = (),
    width: int = 320,
) -> np.ndarray:
    """Puts images with their boxes on one sheet, row by row, to check data or augmentation.

    Args:
      images: images u8[h, w, 3] RGB, of any sizes.
      boxes: for each image f32[n, 4], x1 y1 x2 y2 in its pixels, without padding.
      labels: for each image i32[n].
      class_names: K names.
      columns: images per row.
      masks: for each image its n masks; () without any.
      width: width of each image on the sheet, in pixels.

    Returns:
      u8[H, W, 3], RGB; smaller images are centred in their cell.

    Raises:
      ValueError: no image, no column, or lists of different lengths.

    Example:
      >>> grey = np.full((40, 40, 3), 128, np.uint8)
      >>> contact_sheet([grey] * 3, [np.zeros((0, 4))] * 3, [np.zeros(0)] * 3, ["cell"], 2, width=100).shape
      (208, 208, 3)
    """
    if not len(images) == len(boxes) == len(labels):
        raise ValueError(
            f"contact_sheet: {len(images)} images, boxes of {len(boxes)} and labels of {len(labels)}: "
            "the numbers must be equal"
        )
    if not len(images) or columns < 1:
        raise ValueError(f"contact_sheet: {len(images)} images in {columns} columns: at least one of each is needed")
    drawn = [
        draw(image, own, own_labels, None, class_names, masks=own_masks, width=(width, width))
        for image, own, own_labels, own_masks in zip(images, boxes, labels, masks or [()] * len(images), strict=True)
    ]
    return _grid(drawn, columns)


def detection_sheet(
    examples: Sequence[Example], class_names: Sequence[str], columns: int, *, threshold: float = 0.3
) -> np.ndarray:
    """Puts images with the detections of one model on one sheet, row by row.

    Args:
      examples: each with the detections of the same model alone; at least one.
      class_names: K names.
      columns: images per row.
      threshold: minimum score of a detection that is drawn.

    Returns:
      u8[H, W, 3], RGB: correct, false and missed boxes as in `panels`; smaller images are centred in their cell.

    Example:
      >>> box, label = np.array([[8.0, 8, 30, 30]]), np.array([0])
      >>> found = {"student": Detections(box, np.array([0.9]), label)}
      >>> example = Example(np.zeros((40, 40, 3), np.uint8), box, label, found)
      >>> detection_sheet([example] * 3, ["cell"], 2).shape
      (648, 648, 3)
    """
    drawn = [panels(example, class_names, threshold=threshold)[1].image for example in examples]
    return _grid(drawn, columns)


def _grid(drawn: list[np.ndarray], columns: int, gap: int = 8) -> np.ndarray:
    columns = min(columns, len(drawn))
    rows = -(-len(drawn) // columns)
    height, width = (max(canvas.shape[axis] for canvas in drawn) for axis in (0, 1))
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), _PAPER)
    for i, canvas in enumerate(drawn):
        x, y = i % columns * (width + gap), i // columns * (height + gap)
        left, top = (width - canvas.shape[1]) // 2, (height - canvas.shape[0]) // 2
        sheet.paste(Image.fromarray(canvas), (x + left, y + top))
    return np.asarray(sheet)


def _outline(
    pen: ImageDraw.ImageDraw, frame: tuple[float, ...], color: tuple[int, ...], line: int, *, dashed: bool
) -> None:
    x1, y1, x2, y2 = frame
    # A dark halo on both sides keeps the line visible on any background.
    for grow in (-1, line):
        if x2 - x1 > 2 * grow and y2 - y1 > 2 * grow:
            pen.rectangle((x1 + grow, y1 + grow, x2 - grow, y2 - grow), outline=(0, 0, 0, 90))
    if not dashed:
        pen.rectangle(frame, outline=color, width=line)
        return
    pen.rectangle(frame, outline=(0, 0, 0, 130), width=line)  # between the dashes, for light backgrounds
    dash = 4 * line
    for start in np.arange(x1, x2, 2 * dash):
        end = min(start + dash, x2)
        pen.rectangle((start, y1, end, min(y1 + line - 1, y2)), fill=color)
        pen.rectangle((start, max(y2 - line + 1, y1), end, y2), fill=color)
    for start in np.arange(y1, y2, 2 * dash):
        end = min(start + dash, y2)
        pen.rectangle((x1, start, min(x1 + line - 1, x2), end), fill=color)
        pen.rectangle((max(x2 - line + 1, x1), start, x2, end), fill=color)


def _tag(
    pen: ImageDraw.ImageDraw,
    frame: tuple[float, ...],
    text: str,
    color: tuple[int, int, int],
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
    placed: list[tuple[float, ...]],
) -> None:
    """Writes a tag at the corner of its box where it overlaps least with earlier tags."""
    x1, y1, x2, y2 = frame
    pad = max(2, font.size // 6)
    width, height = pen.textlength(text, font=font) + 2 * pad, font.size + 2 * pad - 1
    above, below, right = y1 - height, y2 + 1, x2 - width
    corners = [(x1, above), (x1, y1), (x1, below), (right, above), (right, below), (x1, y2 - height)]

    def place(corner: tuple[float, float]) -> tuple[float, ...]:
        x, y = max(0, min(corner[0], size[0] - width)), max(0, min(corner[1], size[1] - height))
        return (x, y, x + width, y + height)

    spots, others = np.array([*map(place, corners)])[:, None], np.reshape(placed, (-1, 4))
    shared = np.minimum(spots[..., 2:], others[:, 2:]) - np.maximum(spots[..., :2], others[:, :2])
    hidden = np.maximum(shared, 0).prod(-1).sum(-1)
    spot = tuple(spots[hidden.argmin(), 0].tolist())  # the first of equals
    placed.append(spot)
    red, green, blue = color
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
    pen.rectangle((spot[0], spot[1], spot[2] - 1, spot[3] - 1), fill=(*color, 235))
    pen.text((spot[0] + pad, spot[1] + pad - 1), text, fill=_PAPER if dark else _INK, font=font, anchor="la")


def _checked(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image must be uint8[h, w, 3] in RGB, not {image.dtype}{list(image.shape)}")
    return np.ascontiguousarray(image)


def _font_file() -> str:
    # matplotlib comes with this font; it has Latin, Greek, Cyrillic and the signs above.
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@functools.lru_cache(maxsize=64)
def _font(points: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_file(), points, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=1)
def _characters() -> frozenset[int]:
    return frozenset(FT2Font(_font_file()).get_charmap())
