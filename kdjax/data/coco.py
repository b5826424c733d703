"""Folders in COCO layout: finds their files, checks and repairs their json, streams their images."""

import concurrent.futures
import itertools
import json
import os
import sys
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from kdjax import files
from kdjax.data import hashes, images, masks, records
from kdjax.data.paths import in_another_form
from kdjax.data.records import ImageRecord
from kdjax.errors import UserError, listed

CLIPPED = "box clipped to the image"  # a reason in the log
LEAVES = "file_name leads out of the folder of images"  # a reason in the log
IGNORED = "marked ignore: taken as a crowd region"  # a reason in the log
FORM = "its name on disk is in another Unicode form"  # a reason in the log
REPEATED = "class and box are, digit for digit, those of another annotation of the image"  # a reason in the log
BOXED = "bbox is missing: set to the box of the mask"  # a reason in the log
ROOT = "root category of Roboflow, which no annotation has, is left out"  # a reason in the log
UNMASKED = "without mask"  # the action in the log where a segmentation cannot be used
CLIP = 0.01  # px: a box that extends beyond the image by less is clipped silently (rounding in the json)


def find(root: str, split: str, *, annotations: str = "", images: str = "") -> tuple[Path, Path]:
    """Finds the json and the folder of images of a split.

    Searched under `root`: annotations/instances_{split}.json, annotations/{split}.json, {split}/_annotations.coco.json;
    images/{split}/, {split}/, images/.

    Args:
      root: the folder.
      split: its name, as 'train' or 'val2017'.
      annotations, images: explicit paths, absolute or relative to `root`; "" searches.

    Raises:
      UserError: there is no such folder or file.
    """
    json_path = find_json(root, split, annotations)
    base = Path(root).expanduser()
    folders = [base / Path(images).expanduser()] if images else [base / "images" / split, base / split, base / "images"]
    folder = next((p for p in folders if p.is_dir()), None)
    if folder is None:
        raise UserError(f"split '{split}': no folder of images: searched {_listed(folders)}")
    return json_path, folder


def find_json(root: str, split: str, annotations: str = "") -> Path:
    """Finds the instances json of a split, as `find` does."""
    base = Path(root).expanduser()
    if not root and not annotations:
        raise UserError("root is empty: it must name a folder with annotations/ and images/")
    if root and not base.is_dir():
        raise UserError(f"root: there is no folder {base}")
    paths = [
        base / "annotations" / f"instances_{split}.json",
        base / "annotations" / f"{split}.json",
        base / split / "_annotations.coco.json",
    ]
    if annotations:
        paths = [base / Path(annotations).expanduser()]
    json_path = next((p for p in paths if p.is_file()), None)
    if json_path is None:
        raise UserError(f"split '{split}': no instances json: searched {_listed(paths)}")
    return json_path


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(str(p) for p in paths)


def read(json_path: Path) -> dict[str, Any]:
    """Parses an instances json, and checks that it has the three lists of COCO's layout.

    Raises:
      UserError: it is not json, or not in that layout.
    """
    return checked_layout(parsed(json_path), json_path)


def parsed(json_path: Path) -> hashes.Json:
    """The content of a json, whatever it is.

    Raises:
      UserError: it is not json in UTF-8.
    """
    encoding = json.detect_encoding(files.head(json_path, "annotations"))
    if not encoding.startswith("utf-8"):
        raise UserError(f"{json_path}: not valid json: it is {encoding.upper()}: must be UTF-8")
    try:
        with open(json_path, encoding="utf-8-sig") as file:  # some tools write a byte order mark
            return json.load(file)
    except UnicodeDecodeError as error:
        what = f"byte {error.object[error.start]:#04x} at {error.start} is not UTF-8"
        raise UserError(f"{json_path}: not valid json: {what}: must be UTF-8") from None
    except json.JSONDecodeError as error:
        what = "it has several values, as one on each line: must be one object" if error.msg == "Extra data" else error
        raise UserError(f"{json_path}: not valid json: {what}") from None
    except RecursionError:
        raise UserError(f"{json_path}: not valid json: it is nested too deeply") from None
    except ValueError:  # Python reads no longer integer
        what = f"an integer of over {sys.get_int_max_str_digits()} digits"
        raise UserError(f"{json_path}: not usable json: it has {what}") from None


def checked_layout(data: hashes.Json, json_path: Path) -> dict[str, Any]:
    """The content of a json that has the three lists of COCO's layout.

    Raises:
      UserError: it has not.
    """
    if not isinstance(data, dict):
        raise UserError(f"{json_path}: must hold a json object in COCO's layout, not a {type(data).__name__}")
    for key in ("images", "annotations", "categories"):
        value = data.get(key)
        if not isinstance(value, list):
            raise UserError(f"{json_path}: must have a list of objects under '{key}', as in COCO's layout")
        other = next((place for place, entry in enumerate(value) if not isinstance(entry, dict)), None)
        if other is not None:
            what = json.dumps(value[other])[:40]
            raise UserError(f"{json_path}: entry {other} of '{key}', from 0, is {what}: must be an object with an id")
    return data


def licenses(data: Mapping[str, Any]) -> list[str]:
    """Name and address of each licence that the json lists; empty and malformed entries are left out.

    Example:
      >>> licenses({"licenses": [{"id": 1, "name": "CC BY 4.0", "url": "https://example.org"}, {"id": 2, "name": ""}]})
      ['CC BY 4.0, https://example.org']
    """
    listed = data.get("licenses")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    names = [", ".join(str(entry[key]) for key in ("name", "url") if entry.get(key)) for entry in entries]
    return list(dict.fromkeys(filter(None, names)))


def check(data: Mapping[str, Any], name: str) -> tuple[list[ImageRecord], dict[int, str], list[dict[str, Any]]]:
    """Checks a json: images with their annotations in its order, categories by id, and the list of all changes.

    A json is refused if an annotation names an unknown image or category, if an id is duplicate or not an integer, or
    if boxes are fractions of the image. What is dropped or repaired is listed: boxes that are not four finite numbers
    or have no extent are dropped, missing or duplicate annotation ids are replaced. A missing `iscrowd` (0) or `area`
    (that of the box) is filled in silently. As in mmdetection, an object with `ignore` is not trained on: it becomes a
    crowd region, and is listed. A segmentation that cannot be used is taken out and listed; an object that has one but
    no box gets the box of its mask.

    Args:
      data: from `read`.
      name: the file's name, for messages.

    Raises:
      UserError: the json is refused.
    """
    data, root = without_root(data)
    categories = categories_of(data, name)
    image_records = image_records_of(data, name)
    log = noted(name, [ROOT] if root else [])
    used: set[int] = set()
    given = {a["id"] for a in data["annotations"] if whole(a.get("id"))}
    above = 1 + max(given, default=0)
    spare = (i for i in itertools.count(above if above < 2**62 else 1) if i not in given)
    crowd: list[str] = []
    boxes: set[tuple[float, ...]] = set()  # image, category, bbox
    for entry in data["annotations"]:
        where = f"{name}: annotation {entry.get('id')}"
        image_id = entry.get("image_id")
        record = image_records.get(image_id) if whole(image_id) else None
        if record is None:
            hint = integer_hint(image_id, image_records)
            raise UserError(f"{where}: image {image_id!r} is not among the images{hint}")
        category = entry.get("category_id")
        if not whole(category) or category not in categories:
            hint = integer_hint(category, categories) or f": they are {listed(categories)}"
            raise UserError(f"{where}: category {category!r} is not among the categories{hint}")
        entry = dict(entry)

        def note(action: str, reason: str, record: ImageRecord = record, entry: Mapping[str, Any] = entry) -> None:
            log.append({"file": record.file_name, "annotation": entry.get("id"), "action": action, "reason": reason})

        iscrowd, ignore = flag(entry.get("iscrowd")), flag(entry.get("ignore")) != 0
        if iscrowd or ignore:
            crowd.append("have ignore" if ignore else "crowd")
        bbox, mask = entry.get("bbox"), entry.get("segmentation")
        mask, fault = masks.usable(mask, (record.height, record.width)) if mask else (None, "")
        if bbox is None and mask:
            bbox = entry["bbox"] = masks.box(mask)
            note("repaired", BOXED)
        if bbox is None:
            note("dropped", "bbox is missing" + f", and its segmentation cannot be used: {fault}" * bool(fault))
            continue
        if not isinstance(bbox, list) or len(bbox) != 4 or not all(finite(v) for v in bbox):
            note("dropped", "bbox is not four finite numbers")
            continue
        if bbox[2] <= 0 or bbox[3] <= 0:
            note("dropped", "box has no extent")
            continue
        if not whole(entry.get("id")) or entry["id"] in used or entry["id"] < 1:
            # COCO's evaluation takes a match with annotation 0 for no match.
            note("repaired", "annotation id is missing, duplicate or below 1: replaced")
            entry["id"] = next(spare)
        used.add(entry["id"])
        if (image_id, category, *bbox) in boxes:
            note("noted", REPEATED)
        boxes.add((image_id, category, *bbox))
        if entry.get("iscrowd") not in (None, 0, 1):
            note("repaired", f"iscrowd is neither 0 nor 1: set to {iscrowd or 0}")
        if mask and not masks.touches(mask, bbox):
            mask, fault = None, "mask lies outside of its box"
        if fault:
            _set_mask(entry, mask)
            note("repaired" if mask else UNMASKED, fault)
        if ignore and not iscrowd:
            note("ignored", IGNORED)
        entry["iscrowd"] = int(bool(iscrowd or ignore))
        area = entry.get("area")
        if not (finite(area) and area >= 0):
            if area is not None:
                note("repaired", "area is not a number >= 0: set to the area of the box")
            entry["area"] = bbox[2] * bbox[3]
        record.annotations.append(entry)
    numbers = [value for record in image_records.values() for entry in record.annotations for value in entry["bbox"]]
    if numbers and max(numbers) <= 1:
        raise UserError(f"{name}: all box coordinates are <= 1: they look normalised, but must be in pixels")
    if crowd and len(crowd) == len(data["annotations"]):
        what = "crowd regions" if set(crowd) == {"crowd"} else "crowd regions or have ignore: 1"
        raise UserError(f"{name}: all annotations are {what}: objects must have iscrowd: 0")
    return list(image_records.values()), categories, log


def without_root(data: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """The json without the root that Roboflow writes above its categories, and whether it has one.

    The root has the id 0 and the supercategory "none", is the supercategory of another category, and no annotation has
    it. It is no class: nothing could be learned of it.

    Example:
      >>> root, cell = dict(id=0, name="blood", supercategory="none"), dict(id=1, name="cell", supercategory="blood")
      >>> without_root({"annotations": [], "categories": [root, cell]})
      ({'annotations': [], 'categories': [{'id': 1, 'name': 'cell', 'supercategory': 'blood'}]}, True)
    """
    first, others = None, []
    for entry in data["categories"]:
        if first is None and whole(entry.get("id")) and entry["id"] == 0 and entry.get("supercategory") == "none":
            first = entry
        else:
            others.append(entry)
    if first is None or not isinstance(first.get("name"), str):
        return data, False
    if not any(entry.get("supercategory") == first["name"] for entry in others):
        return data, False
    if any(entry.get("category_id") == 0 for entry in data["annotations"]):
        return data, False
    return {**data, "categories": others}, True


def _set_mask(entry: dict[str, Any], mask: masks.Segmentation | None) -> None:
    """Sets what can be used of an annotation's segmentation."""
    del entry["segmentation"]
    if mask:
        entry["segmentation"] = mask


def categories_of(data: Mapping[str, Any], name: str) -> dict[int, str]:
    """Names by id, in the json's order.

    Raises:
      UserError: an id or a name cannot be used.
    """
    categories: dict[int, str] = {}
    keys: dict[str, int] = {}  # by name, whatever its Unicode form and the spaces around it
    for entry in data["categories"]:
        key = _identity(entry, name, "category")
        if key in categories:
            raise UserError(f"{name}: category id {key} appears twice")
        label = entry.get("name")
        if label is None or label == "":
            raise UserError(f"{name}: category {key} has no name")
        if not isinstance(label, str):
            raise UserError(f'{name}: category {key}: its name is {label!r}: must be text, as "{label}"')
        if not visible(label):
            raise UserError(f"{name}: category {key}: its name {label!r} is blank: must be text that can be seen")
        if any("\ud800" <= letter <= "\udfff" for letter in label):
            what = "has a lone surrogate, half of a character: must be text that UTF-8 can hold"
            raise UserError(f"{name}: category {key}: its name {label!r} {what}")
        other = keys.setdefault(composed(label).strip(), key)
        if other != key:
            form = "" if categories[other] == label else ", in another Unicode form or with spaces around it"
            unused = [k for k in (other, key) if all(a.get("category_id") != k for a in data["annotations"])]
            remedy = f"delete {unused[0]}, which no annotation has" if unused else "rename one"
            raise UserError(f"{name}: two categories have the name '{label}', {other} and {key}{form}: {remedy}")
        categories[key] = label
    if not categories:
        raise UserError(f"{name}: it has no categories")
    return categories


def image_records_of(data: Mapping[str, Any], name: str) -> dict[int, ImageRecord]:
    """Records without annotations by id, in the json's order.

    Raises:
      UserError: an id or a file_name cannot be used.
    """
    image_records: dict[int, ImageRecord] = {}
    files = set()
    for entry in data["images"]:
        key = _identity(entry, name, "image")
        if key in image_records:
            raise UserError(f"{name}: image id {key} appears twice")
        if entry.get("file_name") in (None, ""):
            raise UserError(f"{name}: image {key} has no file_name")
        if not isinstance(entry["file_name"], str):
            raise UserError(f"{name}: image {key}: its file_name is {entry['file_name']!r}: must be text")
        if entry["file_name"] in files:
            raise UserError(f"{name}: file {entry['file_name']} is listed as two images")
        files.add(entry["file_name"])
        # 0 means unknown: the size is then taken from the image itself.
        width, height = (int(s) if finite(s) and s > 0 else 0 for s in (entry.get("width"), entry.get("height")))
        image_records[key] = ImageRecord(id=key, file_name=entry["file_name"], width=width, height=height)
    if not image_records:
        raise UserError(f"{name}: it lists no images")
    return image_records


def _identity(entry: Mapping[str, Any], name: str, kind: str) -> int:
    if not whole(entry.get("id")):
        raise UserError(f"{name}: {kind} id {entry.get('id')!r} is not a 64-bit integer")
    return entry["id"]


def whole(value: object) -> TypeGuard[int]:
    """Whether it is an integer that a record can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def finite(value: object) -> TypeGuard[float]:
    """Whether it is a number that float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38


def flag(value: object) -> int | None:
    """0 or 1, also from the text of one; None: neither. What is missing is 0."""
    if value is None or value in (0, 1):
        return int(bool(value))
    return {"0": 0, "1": 1, "false": 0, "true": 1}.get(value.lower()) if isinstance(value, str) else None


def integer_hint(value: object, known: Collection[int]) -> str:
    """What to write instead of an id as 1.0 or "1"."""
    if isinstance(value, float | str) and (meant := next((k for k in known if value in (k, str(k))), None)) is not None:
        return f": must be the integer {meant}"
    return ""


def visible(text: str) -> bool:
    """Whether a name has a letter that can be seen."""
    return any(letter.isprintable() and not letter.isspace() for letter in text)


def composed(text: str) -> str:
    """Text in the one Unicode form in which names are compared."""
    return unicodedata.normalize("NFC", text)


def same_names(some: Iterable[str], others: Iterable[str]) -> bool:
    """Whether classes have the same names in the same order, whatever their Unicode form."""
    return [*map(composed, some)] == [*map(composed, others)]


def stream(
    image_records: list[ImageRecord],
    paths: Mapping[str, str],
    folder: Path,
    name: str,
    log: list[dict[str, Any]],
    *,
    upright: bool = False,
) -> Iterator[tuple[ImageRecord, bytes]]:
    """Yields every image with its encoded bytes. Each is decoded once, to compare its boxes with its true size.

    Boxes outside the image are dropped. Boxes that extend beyond it are noted: they are clipped for training, and the
    ground truth keeps them as they are.

    Args:
      image_records: from `check`, with the hash of each image.
      paths: from `located`.
      folder: of the images.
      name: the json's name, for messages.
      log: what is dropped or repaired is appended to it, and the notes on images: names that lead out of the folder,
        and those of `kdjax.data.images.read`.
      upright: the json is of images to which EXIF's orientation is applied.

    Raises:
      UserError: an image cannot be read, has another hash, or has another size than the json says.
    """

    def load(record: ImageRecord) -> bytes:
        path = paths[record.file_name]
        try:
            encoded = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        if hashes.of_bytes(encoded) != record.sha256:
            raise hashes.changed(path)
        return encoded

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        # In portions, so that a large data set is never completely in memory.
        for start in range(0, len(image_records), 64):
            portion = image_records[start : start + 64]
            loaded = list(pool.map(load, portion))
            named = [(encoded, paths[record.file_name]) for record, encoded in zip(portion, loaded, strict=True)]
            seen = images.facts(named, pool, upright=upright)
            for record, encoded, facts in zip(portion, loaded, seen, strict=True):
                notes = list(facts.notes)
                if not Path(os.path.abspath(folder / record.file_name)).is_relative_to(os.path.abspath(folder)):
                    notes.append(LEAVES)
                if in_another_form(record.file_name, paths[record.file_name]):
                    notes.append(FORM)
                log += noted(record.file_name, notes)
                _fit(record, facts, name, log, upright)
                yield record, encoded


def noted(file: str, notes: Iterable[str]) -> list[dict[str, Any]]:
    """The entries of a log for the notes on an image."""
    return [{"file": file, "annotation": None, "action": "noted", "reason": note} for note in notes]


def _fit(record: ImageRecord, facts: images.Facts, name: str, log: list[dict[str, Any]], upright: bool) -> None:
    """Compares the image's entry with its true size; drops and notes boxes outside the image."""
    height, width = facts.size
    unknown = not (record.width and record.height)
    if unknown:
        reason = "width and height taken from the image"
        log.append({"file": record.file_name, "annotation": None, "action": "repaired", "reason": reason})
    elif (record.width, record.height) != (width, height):
        hint = ""
        if (record.height, record.width) == (width, height):
            hint = ": width and height are exchanged"
            if facts.orientation >= 5:
                other = images.EXIF[not upright]
                hint = f": --exif={other} fits (in a run, config.data.exif_orientation={other})"
        turned = " as its EXIF orientation turns it" if upright and facts.orientation >= 5 else ""
        raise UserError(
            f"{name}: {record.file_name} is listed as {record.width}x{record.height}, but is {width}x{height}"
            f"{turned}{hint}"
        )
    record.width, record.height = width, height
    kept = []
    for annotation in record.annotations:
        x, y, w, h = annotation["bbox"]
        x0, y0, x1, y1 = records.clipped(annotation["bbox"], width, height)
        note = {"file": record.file_name, "annotation": annotation["id"]}
        if x1 <= x0 or y1 <= y0:
            log.append({**note, "action": "dropped", "reason": "box outside the image"})
            continue
        if not records.has_extent(annotation["bbox"], width, height):
            log.append({**note, "action": "dropped", "reason": "box has no extent in float32"})
            continue
        if max(x0 - x, y0 - y, x + w - x1, y + h - y1) > CLIP:
            log.append({**note, "action": "repaired", "reason": CLIPPED})
        if unknown and annotation.get("segmentation"):
            mask, fault = masks.usable(annotation["segmentation"], (height, width))
            if fault:
                _set_mask(annotation, mask)
                log.append({**note, "action": UNMASKED, "reason": fault})
        kept.append(annotation)
    record.annotations = kept
