"""Images with drawn boxes, for the report, for previews and for predictions: NumPy in, NumPy out, no file is touched.

Ground truth and plain predictions are drawn in one colour per class. Where predictions are compared with the ground
truth, the outline says what became of a box (see `match`), by line style and mark as well as by colour: a solid green
box with a tick was found, a solid red box with a cross is false, a dashed yellow box is an object that was missed.
"""

import colorsys
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

HIT, FALSE, MISSED = 1, 2, 3
OUTCOME_COLORS = {HIT: (46, 204, 113), FALSE: (255, 71, 71), MISSED: (255, 205, 40)}
MODELS = ("teacher", "twin", "student")  # of a run
EVALUATED = ("other", "model")  # of an evaluation

_MARKS = {HIT: "✓ ", FALSE: "✗ ", MISSED: ""}
_INK = (20, 22, 26)
_PAPER = (255, 255, 255)


class Panel(NamedTuple):
    """One image of a comparison, with what became of its boxes."""

    name: str  # 'truth', 'teacher', 'twin' or 'student'
    image: np.ndarray  # u8[h, w, 3], RGB, boxes drawn
    found: int  # objects that were found; for 'truth', all objects
    false: int  # detections that match no object of their class
    missed: int  # objects that were not found


def class_color(label: int) -> tuple[int, int, int]:
    """Colour of a class, the same in every image: neighbouring labels get hues that lie far apart.

    Args:
      label: int, 0 .. K-1.

    Returns:
      RGB, each 0 .. 255.

    Example:
      >>> class_color(0)
      (64, 156, 255)
    """
    # Steps by the golden ratio spread any number of hues evenly; three brightness levels part hues that come close.
    hue = (0.5864 + 0.618034 * label) % 1.0
    saturation, value = ((0.75, 1.0), (0.6, 0.85), (0.9, 0.95))[label // 7 % 3]
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))


def class_name(label: int, classes: Sequence[str]) -> str:
    """Name of a class as the font can show it: `class 3` where the font lacks a letter, cut at 22 letters.

    Args:
      label: int; a label without a name is called by its number.
      classes: K names.

    Returns:
      One line of text.

    Example:
      >>> [class_name(label, ["red cell", "細胞"]) for label in (0, 1, 2)]
      ['red cell', 'class 1', 'class 2']
    """
    name = str(classes[label]) if 0 <= label < len(classes) else ""
    if not name or not _letters().issuperset(map(ord, name)):
        return f"class {label}"
    return name if len(name) <= 22 else name[:21] + "…"


def match(
    truth_boxes: np.ndarray,
    truth_labels: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    *,
    iou_threshold: float = 0.5,
) -> tuple[np.ndarray, np.ndarray]:
    """Says which detections hit an object and which objects were found.

    As in COCO's evaluation: detections choose in the order of their scores, each takes the free object of its own
    class with the largest IoU of at least `iou_threshold`.

    Args:
      truth_boxes: f32[n, 4], x1 y1 x2 y2 in pixels.
      truth_labels: i32[n].
      boxes: f32[m, 4], x1 y1 x2 y2 in pixels.
      labels: i32[m].
      scores: f32[m].
      iou_threshold: 0 .. 1.

    Returns:
      hit bool[m] and found bool[n]; both hold the same number of True.

    Example:
      >>> square = np.array([[0, 0, 10, 10]])
      >>> match(square, np.array([1]), square + 1, np.array([1]), np.array([0.9]))
      (array([ True]), array([ True]))
    """
    hit, found = np.zeros(len(boxes), bool), np.zeros(len(truth_boxes), bool)
    if not hit.size or not found.size:
        return hit, found
    overlap = np.where(labels[:, None] == truth_labels[None, :], iou(boxes, truth_boxes), -1.0)
    for i in np.argsort(-scores, kind="stable"):
        free = np.where(found, -1.0, overlap[i])
        best = int(np.argmax(free))
        if free[best] >= iou_threshold:
            hit[i] = found[best] = True
    return hit, found


def draw(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None,
    classes: Sequence[str],
    *,
    threshold: float = 0.3,
    outcome: np.ndarray | None = None,
    width: tuple[int, int] | None = (320, 480),
) -> np.ndarray:
    """Draws boxes with class names and scores on an image, which is scaled first so that the writing stays legible.

    Args:
      image: u8[h, w, 3], RGB.
      boxes: f32[n, 4], x1 y1 x2 y2 in pixels of `image`; parts outside are cut, boxes that are not finite left out.
      labels: i32[n].
      scores: f32[n] in 0 .. 1, or None (ground truth): all are drawn and no score is written.
      classes: K names.
      threshold: boxes with a smaller score are left out.
      outcome: None for colours by class, or i32[n] of HIT, FALSE, MISSED for colours by what became of a box; a
        missed box shows no score.
      width: the smallest and largest width of the drawn image in pixels; None leaves the size as it is.

    Returns:
      u8[h', w', 3], RGB; `image` itself is not changed.

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
            f"draw got {len(boxes)} boxes, {len(labels)} labels, {len(values)} scores and {len(outcomes)} outcomes: "
            "their numbers must be equal"
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
    for i in shown:
        x1, y1, x2, y2 = np.clip(np.round(boxes[i] * scales), 0, edges[[2, 3, 2, 3]])
        frames[i] = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        color = OUTCOME_COLORS.get(int(outcomes[i])) or class_color(int(labels[i]))
        _outline(pen, frames[i], color, line, dashed=outcomes[i] == MISSED)
    # Writing shrinks where boxes crowd: a tag that hides the object helps nobody.
    points = size[0] / (23 if len(shown) <= 6 else 27 if len(shown) <= 14 else 32)
    font = _font(max(10, round(min(points, 40))))
    for i in reversed(shown):  # the best choose their place first
        text = _MARKS.get(int(outcomes[i]), "") + class_name(int(labels[i]), classes)
        if scores is not None and outcomes[i] != MISSED:
            text += f" {min(values[i], 1):.2f}"
        color = OUTCOME_COLORS.get(int(outcomes[i])) or class_color(int(labels[i]))
        _tag(pen, frames[i], text, color, font, size, placed)
    return np.asarray(canvas)


def panels(
    example: dict,
    classes: Sequence[str],
    *,
    threshold: float = 0.3,
    iou_threshold: float = 0.5,
    width: tuple[int, int] = (320, 480),
) -> list[Panel]:
    """Draws the ground truth of an image and what each model made of it.

    Args:
      example: `image` u8[h, w, 3] RGB; `truth` {boxes f32[n, 4] in pixels of the image, labels i32[n]}; for each of
        `MODELS` and `EVALUATED` {boxes, labels, scores f32[m]} or None. Detections come as they are: those under
        `threshold` are left out here.
      classes: K names.
      threshold: smallest score of a detection that is drawn and counted.
      iou_threshold: smallest IoU at which a detection hits an object of its class.
      width: the smallest and largest width of a drawn image in pixels.

    Returns:
      Panels of one size, the truth first, then the models that are there.

    Example:
      >>> truth = {"boxes": [[8, 8, 30, 30]], "labels": [0]}
      >>> example = {"image": np.zeros((40, 80, 3), np.uint8), "truth": truth, "student": {**truth, "scores": [0.9]}}
      >>> [(panel.name, panel.found, panel.missed) for panel in panels(example, ["cell"])]
      [('truth', 1, 0), ('student', 1, 0)]
    """
    image = example["image"]
    truth_boxes = np.asarray(example["truth"]["boxes"], np.float64).reshape(-1, 4)
    truth_labels = np.asarray(example["truth"]["labels"], np.int64).reshape(-1)
    drawn = draw(image, truth_boxes, truth_labels, None, classes, width=width)
    result = [Panel("truth", drawn, len(truth_boxes), 0, 0)]
    for name in MODELS + EVALUATED:
        detections = example.get(name)
        if detections is None:
            continue
        scores = np.asarray(detections["scores"], np.float64).reshape(-1)
        keep = scores >= threshold
        boxes = np.asarray(detections["boxes"], np.float64).reshape(-1, 4)[keep]
        labels = np.asarray(detections["labels"], np.int64).reshape(-1)[keep]
        scores = scores[keep]
        hit, found = match(truth_boxes, truth_labels, boxes, labels, scores, iou_threshold=iou_threshold)
        missed = int((~found).sum())
        drawn = draw(
            image,
            np.concatenate([boxes, truth_boxes[~found]]),
            np.concatenate([labels, truth_labels[~found]]),
            np.concatenate([scores, np.ones(missed)]),
            classes,
            threshold=threshold,
            outcome=np.concatenate([np.where(hit, HIT, FALSE), np.full(missed, MISSED)]),
            width=width,
        )
        result.append(Panel(name, drawn, int(found.sum()), int((~hit).sum()), missed))
    return result


def summary(panel: Panel) -> str:
    """Says in words what a panel shows, as the heading of its image and for those who cannot see it.

    Example:
      >>> summary(Panel("student", np.zeros((1, 1, 3), np.uint8), found=3, false=1, missed=2))
      '3 found, 1 false, 2 missed'
    """
    if panel.name == "truth":
        return "no object" if not panel.found else "1 object" if panel.found == 1 else f"{panel.found} objects"
    return f"{panel.found} found, {panel.false} false, {panel.missed} missed"


def compare(
    example: dict,
    classes: Sequence[str],
    *,
    threshold: float = 0.3,
    iou_threshold: float = 0.5,
    width: tuple[int, int] = (320, 480),
) -> np.ndarray:
    """Puts ground truth, teacher, twin and student side by side in one image, under headings with their counts.

    Args:
      example, classes, threshold, iou_threshold, width: as for `panels`.

    Returns:
      u8[h', w', 3], RGB.

    Example:
      >>> example = {"image": np.zeros((40, 80, 3), np.uint8), "truth": {"boxes": [], "labels": []}}
      >>> compare(example, ["cell"]).shape[1]
      320
    """
    drawn = panels(example, classes, threshold=threshold, iou_threshold=iou_threshold, width=width)
    headings = [("ground truth" if panel.name == "truth" else panel.name) + f": {summary(panel)}" for panel in drawn]
    return _grid([panel.image for panel in drawn], len(drawn), headings=headings)


def contact_sheet(
    images: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    classes: Sequence[str],
    columns: int,
    *,
    width: int = 320,
) -> np.ndarray:
    """Puts images with their boxes on one sheet, row by row: a look at the data, or at what augmentation makes of it.

    Args:
      images: images u8[h, w, 3] RGB, of any sizes.
      boxes: for each image f32[n, 4], x1 y1 x2 y2 in its pixels; padding rows taken out.
      labels: for each image i32[n].
      classes: K names.
      columns: images in a row.
      width: width of each image on the sheet, in pixels.

    Returns:
      u8[H, W, 3], RGB; smaller images lie in the middle of their cell.

    Raises:
      ValueError: there is no image, no column, or the lists differ in length.

    Example:
      >>> grey = np.full((40, 40, 3), 128, np.uint8)
      >>> contact_sheet([grey] * 3, [np.zeros((0, 4))] * 3, [np.zeros(0)] * 3, ["cell"], 2, width=100).shape
      (208, 208, 3)
    """
    if not len(images) == len(boxes) == len(labels):
        raise ValueError(
            f"contact_sheet got {len(images)} images, boxes of {len(boxes)} and labels of {len(labels)}: "
            "their numbers must be equal"
        )
    if not len(images) or columns < 1:
        raise ValueError(f"contact_sheet needs an image and a column, but got {len(images)} and {columns}")
    drawn = [
        draw(image, own, names, None, classes, width=(width, width))
        for image, own, names in zip(images, boxes, labels, strict=True)
    ]
    return _grid(drawn, columns)


def _grid(drawn: list[np.ndarray], columns: int, *, headings: list[str] | None = None, gap: int = 8) -> np.ndarray:
    columns = min(columns, len(drawn))
    rows = -(-len(drawn) // columns)
    height, width = (max(canvas.shape[axis] for canvas in drawn) for axis in (0, 1))
    font = _font(max(12, round(width / 26)))
    if headings is not None:
        width = max(width, *(round(font.getlength(heading)) + 4 for heading in headings))
    strip = 0 if headings is None else 2 * font.size
    sheet = Image.new(
        "RGB", (columns * width + (columns - 1) * gap, rows * (height + strip) + (rows - 1) * gap), _PAPER
    )
    pen = ImageDraw.Draw(sheet)
    for i, canvas in enumerate(drawn):
        x, y = i % columns * (width + gap), i // columns * (height + strip + gap)
        if headings is not None:
            pen.text((x + 2, y + font.size // 2), headings[i], fill=_INK, font=font)
        left, top = (width - canvas.shape[1]) // 2, (height - canvas.shape[0]) // 2
        sheet.paste(Image.fromarray(canvas), (x + left, y + strip + top))
    return np.asarray(sheet)


def _outline(pen: ImageDraw.ImageDraw, frame: tuple[float, ...], color: tuple, line: int, *, dashed: bool) -> None:
    x1, y1, x2, y2 = frame
    # A dark halo on both sides keeps the line visible on any ground.
    for grow in (-1, line):
        if x2 - x1 > 2 * grow and y2 - y1 > 2 * grow:
            pen.rectangle((x1 + grow, y1 + grow, x2 - grow, y2 - grow), outline=(0, 0, 0, 90))
    if not dashed:
        pen.rectangle(frame, outline=color, width=line)
        return
    pen.rectangle(frame, outline=(0, 0, 0, 130), width=line)  # between the dashes, for light grounds
    dash = 4 * line
    for start in np.arange(x1, x2, 2 * dash):
        end = min(start + dash, x2)
        pen.rectangle((start, y1, end, min(y1 + line - 1, y2)), fill=color)
        pen.rectangle((start, max(y2 - line + 1, y1), end, y2), fill=color)
    for start in np.arange(y1, y2, 2 * dash):
        end = min(start + dash, y2)
        pen.rectangle((x1, start, min(x1 + line - 1, x2), end), fill=color)
        pen.rectangle((max(x2 - line + 1, x1), start, x2, end), fill=color)


def _tag(pen, frame: tuple, text: str, color: tuple, font, size: tuple[int, int], placed: list) -> None:
    """Writes a tag at that corner of its box where it hides least of the tags that are there already."""
    x1, y1, x2, y2 = frame
    pad = max(2, font.size // 6)
    width, height = pen.textlength(text, font=font) + 2 * pad, font.size + 2 * pad - 1
    above, below, right = y1 - height, y2 + 1, x2 - width
    corners = [(x1, above), (x1, y1), (x1, below), (right, above), (right, below), (x1, y2 - height)]

    def place(corner: tuple[float, float]) -> tuple[float, ...]:
        x, y = max(0, min(corner[0], size[0] - width)), max(0, min(corner[1], size[1] - height))
        return (x, y, x + width, y + height)

    def hidden(spot: tuple[float, ...]) -> float:
        return sum(
            max(0, min(spot[2], other[2]) - max(spot[0], other[0]))
            * max(0, min(spot[3], other[3]) - max(spot[1], other[1]))
            for other in placed
        )

    spot = min(map(place, corners), key=hidden)  # the first of equals
    placed.append(spot)
    red, green, blue = color
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
    pen.rectangle((spot[0], spot[1], spot[2] - 1, spot[3] - 1), fill=(*color, 235))
    pen.text((spot[0] + pad, spot[1] + pad - 1), text, fill=_PAPER if dark else _INK, font=font, anchor="la")


def _checked(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"an image to draw on must be uint8[h, w, 3] in RGB, but this is {image.dtype}{image.shape}")
    return np.ascontiguousarray(image)


def iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU f64[m, n] of boxes f64[m, 4] with others f64[n, 4], `x1 y1 x2 y2`; of empty boxes it is 0.

    In NumPy, because to draw images must not start an accelerator.
    """
    top, bottom = (
        np.maximum(boxes[:, None, :2], others[None, :, :2]),
        np.minimum(boxes[:, None, 2:], others[None, :, 2:]),
    )
    size = np.clip(bottom - top, 0, None)
    shared = size[..., 0] * size[..., 1]
    area, other_area = (np.prod(np.clip(b[:, 2:] - b[:, :2], 0, None), axis=1) for b in (boxes, others))
    union = area[:, None] + other_area[None, :] - shared
    return np.where(union > 0, shared / np.where(union > 0, union, 1), 0.0)


def _font_file() -> str:
    # The one font that is always there: matplotlib brings it, and it holds Latin, Greek, Cyrillic and our marks.
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@functools.lru_cache(maxsize=64)
def _font(points: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_file(), points, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=1)
def _letters() -> frozenset[int]:
    return frozenset(FT2Font(_font_file()).get_charmap())
