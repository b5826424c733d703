"""YOLO folders: a text file beside each image, an object on each line as its class and its box in shares of the image.

A line is `class cx cy w h`, or `class x y x y x y …` with the corners of a polygon. Where they are is written in a
data.yaml, or as usual: images/SPLIT and labels/SPLIT, SPLIT/images and SPLIT/labels, or images and labels in SPLIT.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from kdjax.data import classes, coco, data_yaml, folders, masks
from kdjax.data.data_yaml import DataYaml
from kdjax.data.folders import Found, Parsed, Size
from kdjax.errors import UserError, listed, printable

KEYPOINTS = "keypoints are not read: only its box"  # a reason in the log

_SWAPS = {"images": ("labels",), "JPEGImages": ("labels",)}
_NAMES = ("classes.txt", "obj.names")  # files with the names of classes
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?|[-+]?nan|[-+]?inf(?:inity)?", re.IGNORECASE)
_FAR = 1e6  # shares: no area is computed of such points, which the check of the instances drops
_PIXELS = 2  # shares: if each box of a split has a larger value, they are taken for pixels


def find(root: str, split: str, *, annotations: str, images: str, names: str) -> Found:
    """Finds the images of a split, their labels, and the names of the classes.

    Args:
      root: the folder, or its data.yaml.
      split: its name in the data.yaml, or of its folders.
      annotations: the folder of labels, "" searches.
      images: the folder of images, or a list of images (.txt); "" searches.
      names: see `kdjax.data.classes.read`; "": data.yaml, classes.txt, or obj.names.

    Raises:
      UserError: something is missing.
    """
    path = Path(root).expanduser()
    given = path if root and path.is_file() and path.suffix.lower() in data_yaml.SUFFIXES else None
    base = given.parent if given else folders.check_root(root)
    file = given or data_yaml.find(base)
    said = data_yaml.read(file) if file else None
    found, whole = _images(base, split, said, images)
    by_name = folders.named(found, base)
    if not by_name:
        raise UserError(f"split '{split}': no images in {', '.join(map(str, whole)) or base}")

    def label(path: str) -> str | None:
        if not annotations:
            return folders.beside(path, ".txt", _SWAPS)
        tops = (os.path.abspath(one) for one in whole)
        inside = next((os.path.relpath(path, top) for top in tops if Path(path).is_relative_to(top)), None)
        stem = os.path.splitext(inside or os.path.basename(path))[0]
        one = os.path.join(base, os.path.expanduser(annotations), f"{stem}.txt")
        return one if os.path.isfile(one) else None

    if annotations and not (base / Path(annotations).expanduser()).is_dir():
        raise UserError(f"split '{split}': there is no folder of labels {base / Path(annotations).expanduser()}")
    labels, log = folders.paired(by_name, label, base)
    if not labels:
        first = next(iter(by_name))
        raise UserError(
            f"split '{split}': none of its {len(by_name)} images has labels, a .txt in labels/ or beside it, as "
            f"{first}: --annotations=DIR names their folder (in a run, config.data.train_annotations and "
            "val_annotations)"
        )
    paths = {name: str(Path(os.path.abspath(base), name)) for name in labels.values()}
    if whole:
        beside = {os.path.dirname(path) for path in paths.values()}
        spare = (os.path.join(one, name) for one in sorted(beside) for name in sorted(os.listdir(one)))
        log += folders.orphans(filter(_has_rows, spare), labels, base)
    return Found(
        name=f"{base}, split '{split}'",
        base=base,
        images=by_name,
        labels=labels,
        files=paths,
        facts={"names": _names(base, said, names, paths.values()), "keypoints": said.keypoints if said else 0},
        notes=log,
    )


def _images(base: Path, split: str, said: DataYaml | None, images: str) -> tuple[list[str], list[Path]]:
    """The images of a split, and the folders of which these are all images; none if they were listed one by one."""
    explicit = base / Path(images).expanduser()
    if images and explicit.suffix.lower() == ".txt" and explicit.is_file():
        return _listed(explicit, base), []
    key = next((name for name in folders.aliases(split) if said and name in said.splits), None)
    if images or not said or not key:
        lists = [base / f"{name}.txt" for name in folders.aliases(split)]
        file = next((one for one in lists if not images and one.is_file()), None)
        if file:
            return _listed(file, base), []
        if said and said.splits and not images:
            raise UserError(f"{said.path}: there is no split '{split}': it has {listed(said.splits)}")
        folder = folders.folder_of_images(base, split, ("images/{}", "{}/images", "{}"), images)
        return folders.below(folder), [folder]
    found, whole = [], []
    for value, line in said.splits[key]:
        place = _place(said, value, line)
        if place.is_dir():
            found += folders.below(place)
            whole.append(place)
        else:
            found += _listed(place, base)
    return found, [] if len(whole) < len(said.splits[key]) else whole


def _place(said: DataYaml, value: str, line: int) -> Path:
    """The folder or list of images that a data.yaml names.

    Roboflow writes ../train/images beside the folder train: such a path is also tried without its beginning.
    """
    here = said.path.parent
    starts = [os.path.join(here, os.path.expanduser(said.folder)), os.fspath(here)]
    forms = [os.path.expanduser(value), *([value[3:]] if value.startswith("../") else [])]
    tried = dict.fromkeys(os.path.abspath(os.path.join(start, form)) for form in forms for start in starts)
    usable = (one for one in tried if os.path.isdir(one) or (one.lower().endswith(".txt") and os.path.isfile(one)))
    found = next(usable, None)
    if found is None:
        raise UserError(
            f"{said.path}:{line}: {printable(value, 80)} is neither a folder of images nor a list of them (.txt): "
            f"searched {', '.join(printable(one, 200) for one in tried)}"
        )
    return Path(found)


def _listed(file: Path, base: Path) -> list[str]:
    """The images that a text lists, one on each line; relative to its folder or to the root.

    Raises:
      UserError: there is no such image, or it is listed twice; with the line.
    """
    found: dict[str, int] = {}
    for number, line in enumerate(folders.text(_content(file), str(file)), start=1):
        if not line.strip():
            continue
        tried = (os.path.normpath(os.path.join(start, line.strip())) for start in (file.parent, base, base.parent))
        path = next(filter(os.path.isfile, tried), None)
        if path is None:
            raise UserError(f"{file}:{number}: there is no image {printable(line.strip(), 80)}")
        if found.setdefault(path, number) != number:
            raise UserError(
                f"{file}:{number}: {printable(line.strip(), 80)} is listed twice, also in line {found[path]}"
            )
    return list(found)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _names(base: Path, said: DataYaml | None, names: str, labels: Iterable[str]) -> list[str]:
    """The names of the classes."""
    if names:
        return classes.read(names)
    if said and said.names:
        return classes.checked(said.names, said.path)
    places = dict.fromkeys([base, base / "labels", *(Path(path).parent for path in labels)])
    files = [place / name for place in places for name in _NAMES] + sorted(base.glob("*.names"))
    file = next((one for one in files if one.is_file()), None)
    if file:
        return classes.read(str(file))
    raise UserError(
        f"{said.path if said else base}: there are no names of classes: a data.yaml with names, classes.txt, or "
        "--classes=coco, voc or FILE must give them (in a run, config.data.classes)"
    )


def _has_rows(path: str) -> bool:
    """Whether a file looks like labels: lists of images and of classes do not."""
    if not path.endswith(".txt") or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        fields = file.readline(4096).decode("utf-8-sig", errors="replace").split()
    return len(fields) >= 5 and all(map(_NUMBER.fullmatch, fields))


def parse(found: Found, read: Callable[[str], bytes], sizes: Mapping[str, Size]) -> Parsed:
    """The labels as COCO instances: boxes in pixels, categories 1 .. K, images by their names.

    Args:
      found: from `find`.
      read: the content of a file, by its name.
      sizes: height and width of each image, px.

    Returns:
      COCO's dict, the log, and the file and line of each annotation.

    Raises:
      UserError: a line is no object, with the file and its number.
    """
    names, keypoints = found.facts["names"], found.facts["keypoints"]
    images, annotations, log, places = [], [], list(found.notes), {}
    pixels = True  # whether all boxes and polygons have a value that is far over 1
    for image_id, (name, (height, width)) in enumerate(sizes.items(), start=1):
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        label = found.labels.get(name)
        if label is None:
            continue
        path = found.files[label]
        for number, line in enumerate(folders.text(read(label), path), start=1):
            if not line.strip():
                continue
            label_index, values = _row(line.split(), f"{path}:{number}", names, keypoints)
            entry: dict[str, Any] = {"id": len(places) + 1, "image_id": image_id, "category_id": label_index + 1}
            if len(values) == 4:
                cx, cy, w, h = values
                entry["bbox"] = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
            else:
                ring = [value * side for value, side in zip(values, (width, height) * (len(values) // 2), strict=True)]
                xs, ys = ring[::2], ring[1::2]
                entry["segmentation"] = [ring]
                if all(abs(value) < _FAR for value in values):
                    entry["area"] = masks.area(ring)
                entry["bbox"] = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
            if not all(map(math.isfinite, values)):  # the check of the instances drops it
                entry["bbox"] = [math.nan] * 4
            pixels = pixels and max(values) > _PIXELS
            places[entry["id"]] = f"{label}:{number}"
            if keypoints:
                log += [one | {"annotation": entry["id"]} for one in coco.noted(name, [KEYPOINTS])]
            annotations.append(entry)
    if places and pixels:
        raise UserError(
            f"{found.base}/{places[1]}: here and in all other lines there are values over {_PIXELS}: they look like "
            "pixels, but must be shares of the image's width and height, 0 .. 1"
        )
    categories = [{"id": key, "name": name} for key, name in enumerate(names, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}, log, places


def _row(fields: list[str], where: str, names: list[str], keypoints: int) -> tuple[int, list[float]]:
    """Index of the class, and cx cy w h or the corners of a polygon, of the fields of a line."""
    wrong = next((field for field in fields if not _NUMBER.fullmatch(field)), None)
    if wrong is not None:
        raise UserError(
            f"{where}: {printable(wrong, 40)!r} is not a number: must be class cx cy w h, with spaces between"
        )
    first, *values = map(float, fields)
    if not first.is_integer() or first < 0:
        raise UserError(f"{where}: the class is {fields[0]}: must be a whole number from 0")
    if first >= len(names):
        raise UserError(
            f"{where}: class {printable(fields[0], 40)} has no name: there are names of 0 .. {len(names) - 1}, "
            f"{listed(names, most=3)}"
        )
    count = len(fields)
    if keypoints:
        if count != 5 + keypoints:
            raise UserError(
                f"{where}: it has {count} values: must have {5 + keypoints}, as kpt_shape of the data.yaml says"
            )
        return int(first), values[:4]
    if count == 6:
        raise UserError(
            f"{where}: it has 6 values, the last a confidence: these are predictions: labels have 5, class cx cy w h"
        )
    if count < 5 or count % 2 == 0:
        raise UserError(
            f"{where}: it has {count} value{'s' * (count > 1)}: must have 5, class cx cy w h, or a class and x y of at "
            "least 3 points"
        )
    return int(first), values
