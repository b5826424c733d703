"""Prepared TFDS directories with the feature spec of `coco/2017` or of `voc`, read without TensorFlow."""

import concurrent.futures
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from kdjax.data import coco, hashes, images, records
from kdjax.data.records import ImageRecord, Reader
from kdjax.errors import UserError

_ALIASES = {"val": ("val", "validation"), "train": ("train",)}  # TFDS calls COCO's val2017 'validation'


def find(root: str) -> list[Path]:
    """Finds the TFDS directories (they hold a features.json) at `root` or under it, up to DATA_DIR/name/config/version.

    Raises:
      UserError: there is no such folder, or none in it.
    """
    base = Path(root).expanduser()
    if not root or not base.is_dir():
        raise UserError(f"root: there is no folder '{root}'")
    directories = sorted(p.parent.resolve() for depth in range(4) for p in base.glob("*/" * depth + "features.json"))
    if not directories:
        raise UserError(f"root: {base} holds no prepared TFDS directory (none with a features.json)")
    return directories


def describe(root: str, splits: dict[str, str]) -> tuple[str, list[str], dict[str, Reader]]:
    """Name, class names and a reader of every split, after a check of the feature specs.

    Args:
      root: see `find`.
      splits: by role: a split of the only directory ('train'), of the one with a part of its path ('2007/test'), or
        several of these one after the other ('2007/train+2012/train').

    Raises:
      UserError: a split is missing or ambiguous, or the features or classes do not fit.
    """
    directories, opened, readers = find(root), {}, {}
    for role, expression in splits.items():
        parts = []
        for part in expression.split("+"):
            place, _, name = part.rpartition("/")
            fitting = [p for p in directories if not place or f"/{place}/" in f"{p}/"]
            if not fitting:
                raise UserError(f"split '{part}': no prepared TFDS directory under {root} has '{place}' in its path")
            if len(fitting) > 1:
                raise UserError(
                    f"split '{part}' is ambiguous; it exists in {', '.join(map(str, fitting))}: "
                    f"put a part of the path before it, as in '{fitting[0].parent.name}/{name}'"
                )
            if fitting[0] not in opened:
                opened[fitting[0]] = _open(fitting[0])
            available = opened[fitting[0]].info.splits
            real = next((n for n in _ALIASES.get(name, (name,)) if n in available), None)
            if real is None:
                raise UserError(f"{fitting[0]}: there is no split '{name}': it has {', '.join(available)}")
            parts.append((str(fitting[0]), real))
        readers[role] = Reader(tuple(parts))
    classes = {directory: list(b.info.features["objects"]["label"].names) for directory, b in opened.items()}
    (first, names), *others = classes.items()
    for directory, other in others:
        if other != names:
            raise UserError(f"{first} and {directory} must have the same classes in the same order")
    return opened[first].info.name, names, readers


def _open(directory: Path) -> tfds.core.DatasetBuilder:
    """The directory's builder, after a check of its features."""
    try:
        builder = tfds.builder_from_directory(str(directory))
    except Exception as error:
        raise UserError(f"{directory}: not a readable TFDS directory: {error}") from None
    features: Any = builder.info.features
    objects = features["objects"] if "objects" in features else {}
    if "is_difficult" in objects:  # voc
        top, inner = ("image", "image/filename", "objects"), ("bbox", "label")
    else:
        top, inner = ("image", "image/filename", "image/id", "objects"), ("area", "bbox", "id", "is_crowd", "label")
    missing = [key for key in top if key not in features] + [f"objects/{key}" for key in inner if key not in objects]
    if missing:
        raise UserError(
            f"{directory}: the features {', '.join(missing)} are missing: they must be those of coco/2017 or voc"
        )
    return builder


def files(reader: Reader) -> dict[str, str]:
    """What is read of the directories, by path: records, and the facts beside them."""
    paths = set()
    for directory, split in reader.parts:
        info: Any = tfds.builder_from_directory(directory).info
        paths |= {os.fspath(path) for path in info.splits[split].filepaths}
        paths |= {str(path) for kind in ("*.json", "*.txt") for path in Path(directory).glob(kind) if path.is_file()}
    return {path: path for path in sorted(paths)}


def scan(reader: Reader, category_ids: list[int], log: list[dict[str, Any]]) -> Iterator[ImageRecord]:
    """Yields the content of every record apart from the image, which is decoded once to check it.

    Boxes are in pixels, with the precision of TFDS, which stores float32 fractions of the sides; TFDS's `coco` rounds
    areas to whole numbers. VOC's objects are numbered from 1, and the difficult ones become crowd regions.

    Args:
      reader: of the split.
      category_ids: of the labels.
      log: what is dropped or repaired is appended to it, and the notes on images.

    Raises:
      UserError: an image cannot be read.
    """
    number, ids = 0, set()
    directories = ", ".join(directory for directory, _ in reader.parts)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(reader), 64):
            portion = list(pool.map(reader.raw, range(start, min(start + 64, len(reader)))))
            names = [record["image/filename"].decode(errors="surrogateescape") for record in portion]
            named = [(r["image"], f"{directories}: {name}") for r, name in zip(portion, names, strict=True)]
            seen = images.facts(named, pool, upright=reader.upright)
            for record, name, facts in zip(portion, names, seen, strict=True):
                log += coco.noted(name, facts.notes)
                image = _image_record(record, name, facts.size, category_ids, number, log)
                if image.id in ids:
                    places = ", ".join(f"{directory} ({split})" for directory, split in reader.parts)
                    raise UserError(f"{places}: image id {image.id} appears twice: join only splits of other images")
                ids.add(image.id)
                image.sha256 = hashes.of_bytes(record["image"])
                yield image
                number += len(record["objects"]["label"])


def _image_record(
    record: dict[str, Any],
    name: str,
    shape: tuple[int, ...],
    category_ids: list[int],
    number: int,
    log: list[dict[str, Any]],
) -> ImageRecord:
    """The image of a record; its objects are numbered from `number` + 1 if they have no ids."""
    height, width = shape
    image = ImageRecord(id=int(record["image/id"]), file_name=name, width=width, height=height)
    boxes, labels, crowds = records.stored_objects(record, height, width)
    objects = record["objects"]
    for index, (box, label, crowd) in enumerate(zip(boxes.astype(float), labels, crowds, strict=True)):
        identity = int(objects["id"][index]) if "id" in objects else number + index + 1
        x0, y0, x1, y1 = box.tolist()
        size = x1 - x0, y1 - y0
        inside = np.clip(box, 0, [width, height, width, height])

        def note(action: str, reason: str, identity: int = identity) -> None:
            log.append({"file": name, "annotation": identity, "action": action, "reason": reason})

        if not np.isfinite(box).all():
            note("dropped", "bbox is not four finite numbers")
        elif min(size) <= 0:
            note("dropped", "box has no extent")
        elif (inside[2:] <= inside[:2]).any():
            note("dropped", "box outside the image")
        elif not 0 <= label < len(category_ids):
            note("dropped", "label is not a class")
        else:
            if np.abs(inside - box).max() > coco.CLIP:
                note("repaired", coco.CLIPPED)
            area = float(objects["area"][index]) if "area" in objects else size[0] * size[1]
            entry = dict(id=identity, image_id=image.id, category_id=category_ids[label], bbox=[x0, y0, *size])
            image.annotations.append(entry | dict(area=area, iscrowd=int(crowd)))
    return image


def match(scanned: list[ImageRecord], listed: list[ImageRecord], name: str) -> list[ImageRecord]:
    """The json's entries of the scanned images, in the order of the records; both must have the same objects.

    Args:
      scanned: from `scan`.
      listed: from `kdjax.data.coco.check` of the json.
      name: of the json, for messages.

    Raises:
      UserError: an image is missing in the json, or its objects differ.
    """
    by_id = {record.id: record for record in listed}
    missing = [record for record in scanned if record.id not in by_id]
    if missing:
        raise UserError(f"{name}: image {missing[0].id} ({missing[0].file_name}) of the records is missing")
    matched = []
    for record in scanned:
        entry = by_id[record.id]
        stored, expected = (sorted((a["id"], a["category_id"]) for a in image.annotations) for image in (record, entry))
        if stored != expected:
            raise UserError(f"{name}: the objects of image {record.id} ({entry.file_name}) differ from the records'")
        entry.width, entry.height, entry.sha256 = record.width, record.height, record.sha256
        matched.append(entry)
    return matched
