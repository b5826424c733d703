"""Folders in COCO layout: finding their files, checking and repairing their json, streaming their images."""

import concurrent.futures
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from kdjax.data import records
from kdjax.data.records import ImageRecord

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
CLIPPED = "box clipped to the image"  # a reason in the log
_CLIP = 0.01  # px: a box that sticks out by less is clipped without a word (rounding in the json)


def find(root: str, split: str, *, annotations: str = "", images: str = "") -> tuple[Path, Path]:
    """The json and the folder of images of a split.

    Tried under `root`: annotations/instances_{split}.json, annotations/{split}.json, {split}/_annotations.coco.json;
    images/{split}/, {split}/, images/. Explicit paths count from `root`, or are absolute.
    """
    json_path = find_json(root, split, annotations)
    base = Path(root).expanduser()
    folders = [base / Path(images).expanduser()] if images else [base / "images" / split, base / split, base / "images"]
    folder = next((p for p in folders if p.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"split '{split}' has no folder of images: looked for {_listed(folders)}.")
    return json_path, folder


def find_json(root: str, split: str, annotations: str = "") -> Path:
    """The instances json of a split, as `find` looks for it."""
    base = Path(root).expanduser()
    if not root and not annotations:
        raise ValueError("config.data.root is empty: it must name a folder with annotations/ and images/.")
    if root and not base.is_dir():
        raise FileNotFoundError(f"config.data.root: there is no folder {base}.")
    paths = [
        base / "annotations" / f"instances_{split}.json",
        base / "annotations" / f"{split}.json",
        base / split / "_annotations.coco.json",
    ]
    if annotations:
        paths = [base / Path(annotations).expanduser()]
    found = next((p for p in paths if p.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"split '{split}' has no instances json: looked for {_listed(paths)}.")
    return found


def _listed(paths) -> str:
    return ", ".join(str(p) for p in paths)


def fingerprint(json_path: Path, folder: Path) -> dict:
    """What the preparation depends on: the json's content; name, size and time of every image."""
    seen = hashlib.sha256()
    for where, subfolders, names in os.walk(folder):
        subfolders.sort()
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES):
                stat = os.stat(os.path.join(where, name))
                seen.update(f"{os.path.relpath(where, folder)}/{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return {"json": digest(json_path), "images": seen.hexdigest()}


def digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(json_path: Path) -> dict:
    """The parsed json, with the three lists that COCO's layout requires."""
    try:
        with open(json_path, encoding="utf-8-sig") as file:  # some tools put a byte order mark in front
            data = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{json_path} does not parse as json: {error}.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{json_path} must hold a json object in COCO's layout, not a {type(data).__name__}.")
    for key in ("images", "annotations", "categories"):
        value = data.get(key)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise ValueError(f"{json_path} must have a list of objects under '{key}', as in COCO's layout.")
    return data


def licenses(data: dict) -> list[str]:
    """Name and address of each licence that the json lists; made-up and empty entries are left out.

    Example:
      >>> licenses({"licenses": [{"id": 1, "name": "CC BY 4.0", "url": "https://example.org"}, {"id": 2, "name": ""}]})
      ['CC BY 4.0, https://example.org']
    """
    listed = data.get("licenses")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    told = [", ".join(str(entry[key]) for key in ("name", "url") if entry.get(key)) for entry in entries]
    return list(dict.fromkeys(filter(None, told)))


def check(data: dict, name: str) -> tuple[list[ImageRecord], dict[int, str], list[dict]]:
    """Images with their annotations in json order, categories by id, and the list of what was dropped or repaired.

    What cannot be meant is refused (`ValueError`): an annotation of an unknown image or category, ids twice or not
    integer, boxes as fractions of the image. What merely cannot be used is dropped or repaired and listed: boxes that
    are not four finite numbers, have no extent or lie outside the image are dropped, boxes that stick out are clipped
    (for training; the ground truth keeps them as they are), missing or double annotation ids are replaced. Nothing is
    said where `iscrowd` (then 0) or `area` (then that of the box) is missing.

    Args:
      data: from `read`.
      name: the file's name, for messages.
    """
    categories = {}
    for entry in data["categories"]:
        key = _identity(entry, name, "category")
        if key in categories:
            raise ValueError(f"{name}: category id {key} appears twice.")
        if not isinstance(entry.get("name"), str) or not entry["name"]:
            raise ValueError(f"{name}: category {key} has no name.")
        if entry["name"] in categories.values():
            raise ValueError(f"{name}: two categories are called '{entry['name']}'.")
        categories[key] = entry["name"]
    if not categories:
        raise ValueError(f"{name} has no categories.")

    image_records, files = {}, set()
    for entry in data["images"]:
        key = _identity(entry, name, "image")
        if key in image_records:
            raise ValueError(f"{name}: image id {key} appears twice.")
        if not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
            raise ValueError(f"{name}: image {key} has no file_name.")
        if entry["file_name"] in files:
            raise ValueError(f"{name}: {entry['file_name']} is listed as two images.")
        files.add(entry["file_name"])
        sides = [entry.get(side) for side in ("width", "height")]
        # 0 stands for unknown: the size is then taken from the image itself.
        width, height = (int(s) if _finite(s) and s > 0 else 0 for s in sides)
        image_records[key] = ImageRecord(id=key, file_name=entry["file_name"], width=width, height=height)
    if not image_records:
        raise ValueError(f"{name} lists no images.")

    log = []
    used = set()
    spare = itertools.count(1 + max((a["id"] for a in data["annotations"] if _whole(a.get("id"))), default=0))
    for entry in data["annotations"]:
        what = f"annotation {entry.get('id')}"
        record = image_records.get(_hashable(entry.get("image_id")))
        if record is None:
            raise ValueError(f"{name}: {what} is of image {entry.get('image_id')!r}, which is not among the images.")
        if _hashable(entry.get("category_id")) not in categories:
            raise ValueError(
                f"{name}: {what} has the category {entry.get('category_id')!r}, which is not among the categories."
            )
        entry = dict(entry)

        def note(action, reason, record=record, entry=entry):
            log.append({"file": record.file_name, "annotation": entry.get("id"), "action": action, "reason": reason})

        bbox = entry.get("bbox")
        if not isinstance(bbox, list) or len(bbox) != 4 or not all(_finite(v) for v in bbox):
            note("dropped", "bbox is not four finite numbers")
            continue
        if bbox[2] <= 0 or bbox[3] <= 0:
            note("dropped", "box without extent")
            continue
        if not _whole(entry.get("id")) or entry["id"] in used or entry["id"] < 1:
            # COCO's evaluation takes a match with annotation 0 for no match.
            note("repaired", "annotation id missing, double or below 1: given a new one")
            entry["id"] = next(spare)
        used.add(entry["id"])
        if entry.get("iscrowd") not in (None, 0, 1):
            note("repaired", "iscrowd is neither 0 nor 1: taken for 0")
        entry["iscrowd"] = int(entry.get("iscrowd") == 1)
        area = entry.get("area")
        if not _finite(area) or area < 0:
            if area is not None:
                note("repaired", "area is no number of at least 0: that of the box taken")
            entry["area"] = bbox[2] * bbox[3]
        record.annotations.append(entry)
    numbers = [value for record in image_records.values() for entry in record.annotations for value in entry["bbox"]]
    if numbers and max(numbers) <= 1:
        raise ValueError(f"{name}: no number of its boxes is above 1, as if they were fractions; they must be pixels.")
    return list(image_records.values()), categories, log


def _identity(entry: dict, name: str, kind: str) -> int:
    if not _whole(entry.get("id")):
        raise ValueError(f"{name}: the {kind} id {entry.get('id')!r} is not an integer (of 64 bits).")
    return entry["id"]


def _whole(value) -> bool:
    """Whether it is an integer that a record can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _finite(value) -> bool:
    """Whether it is a number that float32 can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e38


def _hashable(value):
    return value if _whole(value) else None


def stream(
    image_records: list[ImageRecord], folder: Path, name: str, log: list[dict]
) -> Iterator[tuple[ImageRecord, bytes]]:
    """Every image with its encoded bytes, really decoded once; boxes are held against the image's true size.

    Adds to `log` what that drops or repairs.
    """
    paths = [located(record.file_name, folder) for record in image_records]
    missing = [p.file_name for p, path in zip(image_records, paths, strict=True) if path is None]
    if missing:
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{name} lists {missing[0]}{rest}, which is not in {folder}.")

    def load(path):
        encoded = path.read_bytes()
        image = records.decode(encoded)
        return encoded, None if image is None else image.shape

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        # In portions, so that a large data set is never in memory as a whole.
        for start in range(0, len(image_records), 64):
            loaded = pool.map(load, paths[start : start + 64])
            for record, path, (encoded, shape) in zip(image_records[start:], paths[start:], loaded, strict=False):
                if shape is None:
                    raise ValueError(f"{path} cannot be read as an image.")
                _fit(record, shape, name, log)
                yield record, encoded


def located(file_name: str, folder: Path) -> Path | None:
    """Where an image lies; some tools write names that begin with the folder of the split."""
    return next((p for p in (folder / file_name, folder.parent / file_name) if p.is_file()), None)


def _fit(record: ImageRecord, shape: tuple[int, ...], name: str, log: list[dict]) -> None:
    """Hold the image's entry against its true size; drop and note what cannot be seen."""
    height, width = shape[:2]
    if not (record.width and record.height):
        reason = "width and height taken from the image"
        log.append({"file": record.file_name, "annotation": None, "action": "repaired", "reason": reason})
    elif (record.width, record.height) != (width, height):
        turned = " (EXIF orientation is not applied)" if (record.height, record.width) == (width, height) else ""
        raise ValueError(
            f"{record.file_name} is {width}x{height}, but {name} says {record.width}x{record.height}{turned}."
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
        if max(x0 - x, y0 - y, x + w - x1, y + h - y1) > _CLIP:
            log.append({**note, "action": "repaired", "reason": CLIPPED})
        kept.append(annotation)
    record.annotations = kept
