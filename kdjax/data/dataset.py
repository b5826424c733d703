"""Opening a data set: whatever the source, prepared records, a ground truth in COCO's layout, and the class list."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from kdjax.data import cache, coco, records, scenes, tfds
from kdjax.data.records import ImageRecord, Reader

LOG = "log.json"  # {role: everything that was dropped or repaired}


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a data set."""

    name: str  # as in the source: 'train', 'val', 'train2017', …
    size: int  # images
    records: Reader  # random access by position
    folder: Path  # holds {role}.json, the ground truth, and LOG
    role: str  # 'train' or 'val'

    @functools.cached_property
    def truth(self) -> dict:
        """COCO instances dict of the first `size` images."""
        truth = _stored(self.folder / f"{self.role}.json")
        if len(truth["images"]) > self.size:
            truth["images"] = truth["images"][: self.size]
            ids = {image["id"] for image in truth["images"]}
            truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in ids]
        return truth

    @functools.cached_property
    def log(self) -> list[dict]:
        """Everything dropped or repaired: file, annotation, action, reason."""
        return _stored(self.folder / LOG)[self.role]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """What the trainer knows of its data; images come from `train_batches` and `eval_batches`."""

    name: str
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]  # label i stands for category_ids[i]; ascending
    max_boxes: int  # M of every batch
    splits: dict[str, Split]  # 'train' and 'val'
    licenses: tuple[str, ...] = ()  # of the images, as the jsons list them

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with the images, boxes and classes that the ground truths list; not with where they lie."""
        parts = {role: (coco.digest(split.folder / f"{role}.json"), split.size) for role, split in self.splits.items()}
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def open_dataset(cfg: Mapping) -> Dataset:
    """Open the data of a config, preparing it first if this content has not been prepared yet.

    Args:
      cfg: `config.data`. Read here: source ('scenes', 'coco_folder' or 'tfds'), root, train_split, val_split, cache,
        limit (first images of each split, 0 for all), max_boxes (0: from the data), augment and stage2 (whether a
        training image is made of several); for folders train_annotations, val_annotations, train_images, val_images
        (explicit paths); for scenes scenes_train, scenes_val.

    Returns:
      The data set. Labels follow ascending category ids.

    Raises:
      ValueError, FileNotFoundError: one sentence on what is wrong with the config or the data.
    """
    source = cfg.get("source", "scenes")
    if source not in _SOURCES:
        raise ValueError(f"config.data.source is '{source}', but must be one of {', '.join(sorted(_SOURCES))}.")
    folder = _SOURCES[source](cfg)
    meta = _stored(folder / "meta.json")
    splits = {}
    limit = int(cfg.get("limit", 0))
    for role, split in meta["splits"].items():
        size = min(split["size"], limit) if limit > 0 else split["size"]
        parts = tuple((str(folder / path), part) for path, part in split["records"])  # an absolute path stays itself
        reader = Reader(parts)
        splits[role] = Split(split["name"], size, reader, folder, role)
        try:
            reader.raw(split["size"] - 1)
        except Exception:  # TFDS and array_record raise this and that
            raise _damaged(" or ".join(dict.fromkeys(directory for directory, _ in parts)), folder) from None
    return Dataset(
        name=meta["name"],
        classes=tuple(meta["classes"]),
        category_ids=tuple(meta["category_ids"]),
        max_boxes=int(cfg.get("max_boxes", 0)) or _box_rows(meta["splits"], cfg),
        splits=splits,
        licenses=tuple(meta["licenses"]),
    )


def _stored(path: Path):
    """A json of the prepared data."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise _damaged(path, path.parent) from None


def _damaged(path: Path | str, folder: Path) -> ValueError:
    return ValueError(f"{path} is damaged or gone; delete {folder}, and it is prepared anew.")


def _box_rows(splits: Mapping, cfg: Mapping) -> int:
    """Rows that hold the boxes of every image, and of images made of several those of nearly all.

    The latter is mean + 3 standard deviations of the sum over as many training images as Mosaic and MixUp combine.
    """
    most = max(len(split["images_by_boxes"]) - 1 for split in splits.values())
    stages = [cfg.get("augment", {})]
    if cfg.get("stage2", {}).get("start", 0):
        stages.append(cfg["stage2"].get("augment", {}))
    together = max((4 if stage.get("mosaic") else 1) * (2 if stage.get("mixup") else 1) for stage in stages)
    image_records = np.array(splits["train"]["images_by_boxes"], float)
    share, boxes = image_records / max(image_records.sum(), 1), np.arange(len(image_records))
    mean = share @ boxes
    usual = together * mean + 3 * (together * (share @ (boxes - mean) ** 2)) ** 0.5
    rows = math.ceil(max(most, min(usual, together * most)))
    return max(8, -(-rows // 8) * 8)


def ground_truth(dataset: Dataset, split: str, *, limit: int | None = None) -> dict:
    """COCO instances dict of a split ('train' or 'val') for evaluation: original pixels, original category ids.

    It holds the boxes that are trained on and the crowd regions; a box that sticks out of its image is as in the
    json. With `limit`, only the first images, as `eval_batches(limit=…)` gives them.
    """
    chosen = dataset.splits[split]
    if limit is not None:
        chosen = dataclasses.replace(chosen, size=min(chosen.size, limit))
    return chosen.truth


def _names(cfg: Mapping) -> dict[str, str]:
    return {role: cfg.get(f"{role}_split", role) for role in ("train", "val")}


def _open_folder(cfg: Mapping) -> Path:
    """Prepare a folder in COCO layout."""
    names = _names(cfg)
    files = {
        role: coco.find(
            cfg.get("root", ""),
            name,
            annotations=cfg.get(f"{role}_annotations", ""),
            images=cfg.get(f"{role}_images", ""),
        )
        for role, name in names.items()
    }
    name = Path(cfg.get("root", "")).expanduser().resolve().name or "folder"
    print_of = {
        "builder": records.VERSION,
        "splits": names,
        **{role: coco.fingerprint(*paths) for role, paths in files.items()},
    }

    def write(folder: Path) -> None:
        streams, logs, categories, licenses = {}, {}, {}, []
        for role, (json_path, images) in files.items():
            given = coco.read(json_path)
            licenses += coco.licenses(given)
            image_records, categories[role], logs[role] = coco.check(given, json_path.name)
            streams[role] = (len(image_records), coco.stream(image_records, images, json_path.name, logs[role]))
        for key, label in categories["val"].items():
            if categories["train"].get(key) != label:
                raise ValueError(
                    f"{files['val'][0].name} has the category {key} '{label}', which {files['train'][0].name} "
                    f"{'calls ' + repr(categories['train'][key]) if key in categories['train'] else 'does not have'}."
                )
        _write(
            folder,
            name=name,
            names=names,
            categories=categories["train"],
            streams=streams,
            logs=logs,
            licenses=licenses,
        )

    return cache.prepared(cache.root(cfg.get("cache", "")), f"folder-{name}", print_of, write)


def _open_scenes(cfg: Mapping) -> Path:
    """Prepare the generated images."""
    counts = {role: int(cfg.get(f"scenes_{role}", default)) for role, default in (("train", 2000), ("val", 400))}
    print_of = {"builder": records.VERSION, "scenes": scenes.fingerprint(), "counts": counts}
    names = {"train": "train", "val": "val"}

    def write(folder: Path) -> None:
        streams = {role: (count, scenes.stream(role, count)) for role, count in counts.items()}
        categories = dict(enumerate(scenes.CLASSES, start=1))
        logs = {"train": [], "val": []}
        _write(folder, name="scenes", names=names, categories=categories, streams=streams, logs=logs)

    return cache.prepared(cache.root(cfg.get("cache", "")), "scenes", print_of, write)


def _open_stock(cfg: Mapping) -> Path:
    """Index prepared TFDS directories; the records stay where they are."""
    names = _names(cfg)
    name, classes, readers = tfds.describe(cfg.get("root", ""), names)
    directories = sorted({directory for reader in readers.values() for directory, _ in reader.parts})
    jsons = {role: cfg.get(f"{role}_annotations", "") for role in names}
    jsons = {role: coco.find_json(cfg["root"], names[role], path) for role, path in jsons.items() if path}
    print_of = {
        "builder": records.VERSION,
        "splits": names,
        "records": {role: reader.parts for role, reader in readers.items()},
        "files": [tfds.fingerprint(directory) for directory in directories],
        "json": {role: coco.digest(path) for role, path in jsons.items()},
    }

    def write(folder: Path) -> None:
        logs, image_records, given, licenses = {role: [] for role in names}, {}, {}, []
        # The records only know labels 0 .. K-1; without a json their ids are taken to be 1 .. K.
        categories = dict(enumerate(classes, start=1))
        for role, path in jsons.items():
            truth = coco.read(path)
            licenses += coco.licenses(truth)
            given[role], categories, _ = coco.check(truth, path.name)
            if [categories[key] for key in sorted(categories)] != classes:
                raise ValueError(
                    f"the categories of {path.name}, by ascending id, are not the classes of {', '.join(directories)}."
                )
        for role, reader in readers.items():
            scanned = tfds.scan(reader, sorted(categories), logs[role])
            scanned = tqdm(scanned, total=len(reader), desc=f"checking {name} {role}", unit="img", disable=None)
            image_records[role] = list(scanned)
            if role in given:
                image_records[role] = tfds.match(image_records[role], given[role], jsons[role].name)
        _save_index(
            folder,
            name=name,
            names=names,
            parts={role: reader.parts for role, reader in readers.items()},
            categories=categories,
            image_records=image_records,
            logs=logs,
            licenses=licenses,
        )

    return cache.prepared(cache.root(cfg.get("cache", "")), f"tfds-{name}", print_of, write)


_SOURCES = {"coco_folder": _open_folder, "scenes": _open_scenes, "tfds": _open_stock}


def _write(
    folder: Path, *, name: str, names: dict, categories: dict, streams: dict, logs: dict, licenses: Iterable[str] = ()
) -> None:
    """Write records, ground truths, log and meta of both splits into `folder`."""
    seen = {role: [] for role in streams}

    def tee(role: str, count: int, stream: Iterable[tuple[ImageRecord, bytes]]):
        # Without a terminal no bar is drawn.
        for record, encoded in tqdm(stream, total=count, desc=f"preparing {name} {role}", unit="img", disable=None):
            seen[role].append(record)
            yield record, encoded

    logging.info("Preparing %s: %s images.", name, {role: count for role, (count, _) in streams.items()})
    category_ids = sorted(categories)
    directory = records.write(
        folder,
        classes=[categories[key] for key in category_ids],
        category_ids=category_ids,
        streams={role: tee(role, count, stream) for role, (count, stream) in streams.items()},
    )
    _save_index(
        folder,
        name=name,
        names=names,
        parts={role: [(str(directory.relative_to(folder)), role)] for role in streams},
        categories=categories,
        image_records=seen,
        logs=logs,
        licenses=licenses,
    )


def _save_index(
    folder: Path,
    *,
    name: str,
    names: dict[str, str],
    parts: dict[str, Iterable[tuple[str, str]]],
    categories: dict[int, str],
    image_records: dict[str, list[ImageRecord]],
    logs: dict[str, list[dict]],
    licenses: Iterable[str],
) -> None:
    """Write what `open_dataset` and `ground_truth` read beside the records."""
    category_ids = sorted(categories)
    meta = {
        "name": name,
        "classes": [categories[key] for key in category_ids],
        "category_ids": category_ids,
        "licenses": list(dict.fromkeys(licenses)),
        "splits": {},
    }
    for role, entries in image_records.items():
        truth = {
            "images": [dict(id=p.id, file_name=p.file_name, width=p.width, height=p.height) for p in entries],
            "annotations": [annotation for p in entries for annotation in p.annotations],
            "categories": [dict(id=key, name=categories[key]) for key in category_ids],
        }
        (folder / f"{role}.json").write_text(json.dumps(truth))
        boxes = [sum(not a["iscrowd"] for a in p.annotations) for p in entries]
        meta["splits"][role] = {
            "name": names[role],
            "records": list(parts[role]),  # TFDS directory and split, several one after the other
            "size": len(entries),
            "images_by_boxes": np.bincount(boxes, minlength=1).tolist(),
        }
    (folder / LOG).write_text(json.dumps(logs))
    (folder / "meta.json").write_text(json.dumps(meta))
