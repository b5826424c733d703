"""Folders with Pascal VOC's xml: a file for each image, with its size and its objects.

Read are VOCdevkit and its years, whose splits are lists in ImageSets/Main, and plain folders: images/SPLIT with
annotations/SPLIT, or images and xml in SPLIT.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kdjax.data import classes, coco, folders, xml
from kdjax.data.folders import Found, Log, Parsed, Size
from kdjax.data.images import SUFFIXES
from kdjax.data.xml import Element
from kdjax.errors import UserError, listed, printable

ANOTHER = "its xml names another file: those with the same name belong together"  # reasons in the log
DIFFICULT = "difficult is neither 0 nor 1: set to 0"
SIZELESS = "width and height are missing in the xml: taken from the image"

_ANNOTATIONS = ("Annotations", "annotations", "labels", "xmls")
_SWAPS = {"images": _ANNOTATIONS, "JPEGImages": _ANNOTATIONS}
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def find(root: str, split: str, *, annotations: str, images: str, names: str) -> Found:
    """Finds the images of a split and their xml.

    Args:
      root: the folder: VOCdevkit, one of its years, or a plain folder.
      split: the name of a list in ImageSets/Main, of a year if there are several ('VOC2007/train'), or several of them
        ('VOC2007/train+VOC2012/train'); else of folders.
      annotations: the folder of xml; "" searches.
      images: the folder of images; "" searches.
      names: of the classes, see `kdjax.data.classes.read`; "": all that the xml below the root have, sorted.

    Raises:
      UserError: something is missing.
    """
    base = folders.check_root(root)
    years = [] if images or annotations else _years(base)
    labels: dict[str, str] = {}
    log: Log = []
    if years:
        paths = {}
        for part in split.split("+"):
            paths |= _listed(years, part, base)
        by_name = folders.named(paths, base)
        labels, log = folders.paired(by_name, lambda path: paths.get(path), base)
    else:
        patterns = ("images/{}", "{}/images", "JPEGImages/{}", "{}/JPEGImages", "{}")
        folder = folders.folder_of_images(base, split, patterns, images)
        by_name = folders.named(folders.below(folder), base)
        if not by_name:
            raise UserError(f"split '{split}': no images in {folder}")
        label = _beside(base, folder, split, annotations)
        labels, log = folders.paired(by_name, label, base)
        beside = {os.path.dirname(os.path.join(base, name)) for name in labels.values()}
        spare = [path for one in sorted(beside) for path in folders.below(Path(one), (".xml",))]
        log += folders.orphans(spare, labels, base)
    if not labels:
        first = next(iter(by_name))
        raise UserError(
            f"split '{split}': none of its {len(by_name)} images has an xml, in Annotations/ or beside it, as {first}: "
            "--annotations=DIR names their folder (in a run, config.data.train_annotations and val_annotations)"
        )
    files = {name: str(Path(os.path.abspath(base), name)) for name in labels.values()}
    if not names:  # the names of all splits are the classes
        places = [base, *([base / Path(annotations).expanduser()] if annotations else [])]
        files |= folders.named((path for place in places for path in folders.below(place, (".xml",))), base)
    return Found(
        name=f"{base}, split '{split}'",
        base=base,
        images=by_name,
        labels=labels,
        files=files,
        facts={"names": classes.read(names) if names else None},
        notes=log,
    )


def _years(base: Path) -> list[Path]:
    """The folders with VOC's lists of images, at or below the root."""
    tried = [base, *sorted(base.glob("*")), *sorted(base.glob("VOCdevkit/*"))]
    return [one for one in tried if (one / "ImageSets" / "Main").is_dir() and (one / "Annotations").is_dir()]


def _listed(years: list[Path], part: str, base: Path) -> dict[str, str | None]:
    """The images of a split's list and the xml of each that has one.

    Raises:
      UserError: there is no such list, or several; an image that it names is missing, or there twice.
    """
    place, _, name = part.strip().rpartition("/")
    lists = [year / "ImageSets" / "Main" / f"{one}.txt" for year in years for one in folders.aliases(name)]
    lists = [one for one in lists if not place or f"/{place}/" in f"/{one}" or f"/VOC{place}/" in f"/{one}"]
    existing = [one for one in lists if one.is_file()]
    if not existing:
        there = sorted({one.stem for year in years for one in (year / "ImageSets" / "Main").glob("*.txt")})
        has = f": there are {listed(there)}" if there else ""
        raise UserError(f"split '{part}': no list ImageSets/Main/{name}.txt in {listed(years)}{has}")
    if len(existing) > 1:
        found = [one.parents[2].name for one in existing]
        raise UserError(f"split '{part}': it is in {listed(found)}: write {found[0]}/{name}, or join them with +")
    file, year = existing[0], existing[0].parents[2]
    try:
        lines = folders.text(file.read_bytes(), str(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    stems: dict[str, list[str]] = {}
    folder = os.path.abspath(year / "JPEGImages")
    for path in folders.below(Path(folder)):
        stems.setdefault(os.path.splitext(os.path.relpath(path, folder))[0], []).append(path)
    paths: dict[str, str | None] = {}
    for number, line in enumerate(lines, start=1):
        stem = re.sub(r"\s+-?[01]$", "", line.strip())  # lists of a class say whether the image shows it
        if not stem:
            continue
        if stem.lower().endswith(SUFFIXES) and stem not in stems:
            stem = os.path.splitext(stem)[0]
        where = f"{file}:{number}: image {printable(stem, 80)}"
        found = stems.get(stem, [])
        if len(found) != 1:
            what = "is missing in" if not found else f"is there as {listed(map(os.path.basename, found))} in"
            raise UserError(f"{where} {what} {folder}")
        if found[0] in paths:
            raise UserError(f"{where} is listed twice")
        label = os.path.join(os.path.abspath(year), "Annotations", f"{stem}.xml")
        paths[found[0]] = label if os.path.isfile(label) else None
    if not paths:
        raise UserError(f"{file}: it lists no images")
    return paths


def _beside(base: Path, folder: Path, split: str, annotations: str) -> Callable[[str], str | None]:
    """The function that gives the xml of an image of a plain folder."""
    top = os.path.abspath(folder)
    places = [base / name / one for name in _ANNOTATIONS for one in (*folders.aliases(split), "")]
    if annotations:
        places = [base / Path(annotations).expanduser()]
        if not places[0].is_dir():
            raise UserError(f"split '{split}': there is no folder of xml {places[0]}")

    def label(path: str) -> str | None:
        inside = os.path.splitext(os.path.relpath(path, top))[0] + ".xml"
        found = None if annotations else folders.beside(path, ".xml", _SWAPS)
        return found or next(filter(os.path.isfile, (os.path.abspath(one / inside) for one in places)), None)

    return label


def parse(found: Found, read: Callable[[str], bytes], sizes: Mapping[str, Size]) -> Parsed:
    """The xml as COCO instances: boxes in pixels, categories 1 .. K, images by their names.

    VOC counts pixels from 1 and its boxes include their last pixel: they are read as x1-1 y1-1 x2 y2. Difficult objects
    become crowd regions. Parts of objects are not read.

    Args:
      found: from `find`.
      read: the content of a file, by its name.
      sizes: height and width of each image, px.

    Returns:
      COCO's dict, the log, and the file and line of each annotation.

    Raises:
      UserError: an xml cannot be used, with the file and its line.
    """
    roots = {name: xml.parse(read(name), found.files[name]) for name in dict.fromkeys(found.labels.values())}
    names = found.facts["names"] or _all_names(found, read, roots)
    numbers = {coco.composed(name): number for number, name in enumerate(names, start=1)}
    images, annotations, log, places = [], [], list(found.notes), {}
    for image_id, (name, size) in enumerate(sizes.items(), start=1):
        images.append({"id": image_id, "file_name": name, "height": size[0], "width": size[1]})
        label = found.labels.get(name)
        if label is None:
            continue
        path, root = found.files[label], roots[label]
        if root.tag != "annotation":
            raise UserError(f"{path}:{root.line}: its root is <{printable(root.tag, 40)}>: must be <annotation>")
        log += coco.noted(name, _head(root, path, name, size))
        for one in root.all("object"):
            key = coco.composed(_name(one, path))
            if key not in numbers:
                raise UserError(f"{path}:{one.line}: {printable(key, 40)!r} is not among the classes: {listed(names)}")
            identity = len(places) + 1
            entry: dict[str, Any] = {"id": identity, "image_id": image_id, "category_id": numbers[key]}
            box = one.get("bndbox")
            if box:
                x1, y1, x2, y2 = (_number(box, corner, path) for corner in _CORNERS)
                entry["bbox"] = [x1 - 1, y1 - 1, x2 - (x1 - 1), y2 - (y1 - 1)]
            difficult = one.get("difficult")
            flag = difficult.text.lower() if difficult else ""
            entry["iscrowd"] = int(flag in ("1", "true"))
            if flag not in ("", "0", "1", "true", "false"):
                log.append({"file": name, "annotation": identity, "action": "repaired", "reason": DIFFICULT})
            places[identity] = f"{label}:{one.line}"
            annotations.append(entry)
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}, log, places


def _all_names(found: Found, read: Callable[[str], bytes], roots: Mapping[str, Element]) -> list[str]:
    """The names of all objects in all xml, sorted."""
    names = set()
    for file, path in found.files.items():
        root = roots.get(file) or xml.parse(read(file), path)
        if root.tag == "annotation":
            names |= {coco.composed(_name(one, path)) for one in root.all("object")}
    if not names:
        raise UserError(
            f"{found.name}: no xml has an object: --classes=coco, voc or FILE names the classes (in a run, "
            "config.data.classes)"
        )
    return sorted(names)


def _name(one: Element, path: str) -> str:
    name = one.get("name")
    if name is None or not coco.visible(name.text):
        raise UserError(f"{path}:{one.line}: the object has no name")
    return name.text


def _head(root: Element, path: str, name: str, size: Size) -> list[str]:
    """Notes on what an xml says of its image as a whole.

    Raises:
      UserError: it has another size.
    """
    notes = []
    said = root.get("filename")
    if said and said.text and os.path.splitext(re.split(r"[/\\]", said.text)[-1])[0] != Path(name).stem:
        notes.append(ANOTHER)
    sides = root.get("size")
    height, width = (_number(sides, side, path) if sides and sides.get(side) else 0 for side in ("height", "width"))
    if not (height > 0 and width > 0):
        notes.append(SIZELESS)
    elif (height, width) != size:
        line = sides.line if sides else root.line
        hint = ""
        if (width, height) == size:
            hint = ": width and height are exchanged; if EXIF turns it, --exif=upright or stored fits (in a run, "
            hint += "config.data.exif_orientation)"
        raise UserError(
            f"{path}:{line}: the size is {width:g}x{height:g}, but {name} is {size[1]}x{size[0]}{hint}: must be the "
            "image that was labelled"
        )
    return notes


def _number(parent: Element, tag: str, path: str) -> float:
    found = parent.get(tag)
    if found is None:
        raise UserError(f"{path}:{parent.line}: <{parent.tag}> has no <{tag}>")
    if not re.fullmatch(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?|[-+]?nan|[-+]?inf", found.text.lower()):
        raise UserError(f"{path}:{found.line}: {tag} is {printable(found.text, 40)!r}: must be a number of pixels")
    return float(found.text)
