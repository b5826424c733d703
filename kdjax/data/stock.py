"""Prepared TFDS directories with the feature spec of `coco/2017`, read without TensorFlow."""

import concurrent.futures
import os
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from kdjax.data import records
from kdjax.data.records import Picture, Reader

_ALIASES = {"val": ("val", "validation"), "train": ("train",)}  # TFDS calls COCO's val2017 'validation'


def find(root: str) -> Path:
    """The TFDS directory (it holds dataset_info.json and features.json) at `root` or the only one under it."""
    base = Path(root).expanduser()
    if not root or not base.is_dir():
        raise FileNotFoundError(f"config.data.root: there is no folder '{root}'.")
    # Up to DATA_DIR/name/config/version.
    found = [p.parent for depth in range(4) for p in base.glob("*/" * depth + "features.json")]
    if not found:
        raise FileNotFoundError(f"{base} holds no prepared TFDS directory (none with a features.json).")
    if len(found) > 1:
        raise ValueError(f"{base} holds several prepared TFDS directories: {', '.join(map(str, found))}; name one.")
    return found[0].resolve()


def describe(directory: Path, splits: dict[str, str]) -> tuple[str, list[str], dict[str, Reader]]:
    """Name, class names and a reader for every split, after a check of the feature spec."""
    try:
        builder = tfds.builder_from_directory(str(directory))
    except Exception as error:
        raise ValueError(f"{directory} is not a readable TFDS directory: {error}.") from None
    features = builder.info.features
    objects = features["objects"] if "objects" in features else {}
    missing = [key for key in ("image", "image/filename", "image/id", "objects") if key not in features]
    missing += [f"objects/{key}" for key in ("area", "bbox", "id", "is_crowd", "label") if key not in objects]
    if missing:
        raise ValueError(f"{directory} lacks the features {', '.join(missing)}; understood is the spec of coco/2017.")
    readers = {}
    for role, name in splits.items():
        real = next((n for n in _ALIASES.get(name, (name,)) if n in builder.info.splits), None)
        if real is None:
            raise ValueError(f"{directory} has no split '{name}', only {', '.join(builder.info.splits)}.")
        readers[role] = Reader(str(directory), real)
    return builder.info.name, list(objects["label"].names), readers


def fingerprint(directory: Path) -> list:
    """Name, size and time of every file of the directory."""
    return sorted([e.name, e.stat().st_size, e.stat().st_mtime_ns] for e in os.scandir(directory) if e.is_file())


def scan(reader: Reader, category_ids: list[int], log: list[dict]) -> Iterator[Picture]:
    """What every record holds, its picture really decoded once; adds to `log` what cannot be used.

    Boxes are back in pixels, as TFDS keeps them: float32 shares of the sides; areas are whole numbers in stock `coco`.
    """

    def load(index):
        record = reader.raw(index)
        image = records.decode(record["image"])
        return record, None if image is None else image.shape[:2]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(reader), 64):
            for record, shape in pool.map(load, range(start, min(start + 64, len(reader)))):
                name = record["image/filename"].decode()
                if shape is None:
                    raise ValueError(f"{name} in {reader.directory} cannot be read as a picture.")
                yield _picture(record, name, shape, category_ids, log)


def _picture(record: dict, name: str, shape: tuple[int, int], category_ids: list[int], log: list[dict]) -> Picture:
    height, width = shape
    picture = Picture(id=int(record["image/id"]), file_name=name, width=width, height=height)
    objects = record["objects"]
    for index, label in enumerate(objects["label"]):
        y0, x0, y1, x1 = (float(v) for v in objects["bbox"][index])
        entry = {
            "id": int(objects["id"][index]),
            "image_id": picture.id,
            "category_id": category_ids[int(label)],
            "bbox": [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height],
            "area": float(objects["area"][index]),
            "iscrowd": int(objects["is_crowd"][index]),
        }
        if x1 <= x0 or y1 <= y0:
            log.append({"file": name, "annotation": entry["id"], "action": "dropped", "reason": "box without extent"})
        else:
            picture.annotations.append(entry)
    return picture


def match(scanned: list[Picture], given: list[Picture], name: str) -> list[Picture]:
    """The json's entries of the scanned pictures, in the records' order; what is trained on must be what is scored."""
    by_id = {picture.id: picture for picture in given}
    missing = [p for p in scanned if p.id not in by_id]
    if missing:
        raise ValueError(f"{name} does not list image {missing[0].id} ({missing[0].file_name}), as the records do.")
    matched = []
    for picture in scanned:
        entry = by_id[picture.id]
        ours = sorted((a["id"], a["category_id"]) for a in picture.annotations)
        theirs = sorted((a["id"], a["category_id"]) for a in entry.annotations)
        if ours != theirs:
            raise ValueError(f"{name} and the records differ in the objects of image {picture.id} ({entry.file_name}).")
        entry.width, entry.height = picture.width, picture.height
        matched.append(entry)
    return matched
