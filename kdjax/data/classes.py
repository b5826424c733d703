"""Names of classes by index, for labels that have numbers: COCO's, VOC's, or those of a file."""

import json
from collections.abc import Iterable
from pathlib import Path

from kdjax.data import coco, data_yaml
from kdjax.errors import UserError

COCO = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
VOC = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
NEED = "must be coco, voc, or a file: a name per line, COCO's json, or a data.yaml"


def read(value: str) -> list[str]:
    """The names of classes by index.

    Args:
      value: "coco" (80 classes), "voc" (20), or a file: text with one name per line, a COCO json (by ascending category
        id, without Roboflow's root), or a data.yaml.

    Raises:
      UserError: there is no such file, or its names cannot be used.

    Example:
      >>> read("voc")[:3], len(read("coco"))
      (['aeroplane', 'bicycle', 'bird'], 80)
    """
    if value in ("coco", "voc"):
        return list(COCO if value == "coco" else VOC)
    path = Path(value).expanduser()
    if not path.is_file():
        raise UserError(f"there is no file {value}: {NEED}")
    if path.suffix.lower() in data_yaml.SUFFIXES:
        names = data_yaml.read(path).names
        return checked(names, path)
    try:
        if path.suffix.lower() == ".json":
            categories = coco.without_root(coco.read(path))[0]["categories"]
            return checked([(entry["name"], 0) for entry in sorted(categories, key=lambda entry: entry["id"])], path)
        text = path.read_text(encoding="utf-8-sig")
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as class names: {error!r}") from None
    if _is_json(text):
        raise UserError(f"{path} holds json: its name must end with .json, and a list of names has one per line")
    lines = text.splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    return checked([(line.strip(), number) for number, line in enumerate(lines, start=1)], path)


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def checked(named: Iterable[tuple[object, int]], path: Path) -> list[str]:
    """Names of classes, each with its line (0: unknown) in a file.

    Raises:
      UserError: there are none, one is blank or no text, or two are the same.
    """
    names: list[str] = []
    seen: set[str] = set()
    for name, line in named:
        where = f"{path}:{line}" if line else f"{path}"
        if not isinstance(name, str) or not coco.visible(name):
            raise UserError(f"{where} has the name {name!r} for a class: every class needs a name of its own")
        if coco.composed(name).strip() in seen:
            raise UserError(f"{where} has the name {name!r} twice: every class needs a name of its own")
        seen.add(coco.composed(name).strip())
        names.append(name)
    if not names:
        raise UserError(f"{path} has no names of classes")
    return names
