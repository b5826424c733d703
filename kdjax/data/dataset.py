"""Opening a data set. Whatever the source, a split becomes prepared records with its ground truth in COCO's layout."""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from kdjax.data import cache, coco, hashes, images, paths, records, scenes, tfds
from kdjax.data.records import ImageRecord, Reader
from kdjax.data.stages import Settings
from kdjax.errors import UserError

LOG = "log.json"  # everything that was dropped or repaired
TRUTH = "truth.json"  # COCO instances
_META = "meta.json"


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a data set."""

    name: str  # as in the source: 'train', 'val', 'train2017', …
    size: int  # images
    records: Reader  # random access by position
    folder: Path  # of the prepared split; holds TRUTH and LOG
    categories: Mapping[int, str]  # of the data set: name by category id, ascending

    @functools.cached_property
    def truth(self) -> dict[str, Any]:
        """COCO instances dict of the first `size` images."""
        truth = hashes.read_json(self.folder / TRUTH)
        if len(truth["images"]) > self.size:
            truth["images"] = truth["images"][: self.size]
            ids = {image["id"] for image in truth["images"]}
            truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in ids]
        return truth | {"categories": [dict(id=key, name=name) for key, name in self.categories.items()]}

    @functools.cached_property
    def log(self) -> list[dict[str, Any]]:
        """What was dropped, ignored, repaired or noted in the first `size` images: file, annotation, action, reason."""
        log = hashes.read_json(self.folder / LOG)
        if self.size == len(self.records):
            return log
        images = hashes.read_json(self.folder / TRUTH)["images"]
        beyond = {image["file_name"] for image in images[self.size :]}
        return [entry for entry in log if entry["file"] not in beyond]

    @property
    def image_ids(self) -> list[int]:
        """The ids of the images, in order."""
        return list(self._positions)

    def image(self, image_id: int) -> np.ndarray:
        """The original image u8[h, w, 3] RGB with this id, decoded on demand.

        Raises:
          KeyError: the split has no such image.
          Damaged: the prepared data can no longer be read.
        """
        return self.records.image(self._positions[image_id])

    @functools.cached_property
    def _positions(self) -> dict[int, int]:
        return {image["id"]: position for position, image in enumerate(self.truth["images"])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """The facts of a data set; batches come from `train_batches` and `eval_batches`."""

    name: str
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]  # label i stands for category_ids[i]; ascending
    max_boxes: int  # M of every batch
    splits: dict[str, Split]  # 'train' and 'val', as far as they were opened
    licenses: tuple[str, ...] = ()  # of the images, as the jsons list them

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the encoded images, their boxes and the classes; their place on disk does not matter."""
        parts = {
            role: (hashes.read_json(split.folder / _META)["content"], split.size) for role, split in self.splits.items()
        }
        return hashes.of_bytes(json.dumps(parts).encode())


def open_dataset(cfg: Settings, splits: Sequence[str] = ("train", "val")) -> Dataset:
    """Opens the data of a config. A split whose content has not been prepared yet is prepared first.

    Every split is prepared on its own: training and evaluation on the same folder share the prepared data.

    Args:
      cfg: `config.data`. Read here: source ('scenes', 'coco_folder' or 'tfds'), root, cache, limit (first images of
        each split, 0 for all), max_boxes (0: from the data), augment and stage2 (whether a training image is made of
        several), exif_orientation ('stored' or 'upright'); of every split {split}_split, {split}_annotations,
        {split}_images (explicit paths) and scenes_{split}.
      splits: which to open; the others need not exist.

    Returns:
      The data set. Labels follow ascending category ids.

    Raises:
      UserError: the config or the data cannot be used; the message says what is wrong.
    """
    source = cfg["source"]
    if source not in _SOURCES:
        raise UserError(f"source must be one of {', '.join(sorted(_SOURCES))}, not {source!r}")
    upright = images.check_exif(cfg["exif_orientation"])
    folders = _SOURCES[source](cfg, splits)
    metas = {role: hashes.checked(folder / _META) for role, folder in folders.items()}
    categories = _categories(metas)
    labels = {key: label for label, key in enumerate(categories)}
    limit = int(cfg["limit"])
    opened = {}
    for role, meta in metas.items():
        folder = folders[role]
        parts = tuple((str(folder / path), part) for path, part in meta["records"])  # an absolute path stays itself
        remedy = f"delete {folder} to have it prepared again" if cfg["source"] != "tfds" else Reader.remedy
        reader = Reader(parts, tuple(labels[key] for key, _ in meta["categories"]), remedy, upright)
        try:
            reader.raw(meta["size"] - 1)
        except Exception:  # TFDS and array_record raise many exception types
            raise hashes.damaged(" or ".join(dict.fromkeys(directory for directory, _ in parts)), folder) from None
        size = min(meta["size"], limit) if limit > 0 else meta["size"]
        opened[role] = Split(_split_name(cfg, role), size, reader, folder, categories)
    return Dataset(
        name=next(iter(metas.values()))["name"],
        classes=tuple(categories.values()),
        category_ids=tuple(categories),
        max_boxes=int(cfg["max_boxes"]) or _box_rows(metas, cfg),
        splits=opened,
        licenses=tuple(dict.fromkeys(one for meta in metas.values() for one in meta["licenses"])),
    )


def ground_truth(dataset: Dataset, split: str, *, limit: int | None = None) -> dict[str, Any]:
    """The COCO instances dict of a split for evaluation: original pixels, original category ids.

    It holds the boxes that are trained on and the crowd regions; a box that extends beyond its image is as in the json.

    Args:
      dataset: from `open_dataset`.
      split: 'train' or 'val'.
      limit: only the first images, as `eval_batches(limit=…)` gives them; None takes all.
    """
    chosen = dataset.splits[split]
    if limit is not None:
        chosen = dataclasses.replace(chosen, size=min(chosen.size, limit))
    return chosen.truth


def _split_name(cfg: Settings, role: str) -> str:
    return role if cfg["source"] == "scenes" else cfg[f"{role}_split"]


def _categories(metas: Mapping[str, Any]) -> dict[int, str]:
    """Names by ascending category id: those of the first split, which must have all of the others'."""
    (first, meta), *others = metas.items()
    categories = dict(meta["categories"])
    for role, other in others:
        for key, name in other["categories"]:
            if categories.get(key) != name:
                known = f"calls it '{categories[key]}'" if key in categories else "does not have it"
                if coco.composed(name) == coco.composed(categories.get(key, "")):
                    known += ", in another Unicode form: write both in one form (NFC)"
                raise UserError(f"{role} split: category {key} is '{name}': the {first} split {known}")
    return categories


def _box_rows(metas: Mapping[str, Any], cfg: Settings) -> int:
    """Number of box rows that suffices for every image, and for nearly every combination by Mosaic and MixUp.

    For the latter it is the mean + 3 standard deviations of the number of boxes in as many training images as Mosaic
    and MixUp combine.
    """
    rows = most = max(len(meta["images_by_boxes"]) - 1 for meta in metas.values())
    if "train" in metas:
        stages = [cfg["augment"], *([cfg["stage2"]["augment"]] if cfg["stage2"]["start"] else [])]
        together = max((4 if stage["mosaic"] else 1) * (2 if stage["mixup"] else 1) for stage in stages)
        counts = np.array(metas["train"]["images_by_boxes"], float)
        share, boxes = counts / max(counts.sum(), 1), np.arange(len(counts))
        mean = share @ boxes
        usual = together * mean + 3 * (together * (share @ (boxes - mean) ** 2)) ** 0.5
        rows = math.ceil(max(most, min(usual, together * most)))
    return max(8, -(-rows // 8) * 8)


# ------------------------------------------------------------------------- sources: folders of prepared splits by role


def _prepare_folders(cfg: Settings, splits: Sequence[str]) -> dict[str, Path]:
    """Prepares splits of a folder in COCO layout."""
    files = {
        role: coco.find(
            cfg["root"], cfg[f"{role}_split"], annotations=cfg[f"{role}_annotations"], images=cfg[f"{role}_images"]
        )
        for role in splits
    }
    name = Path(cfg["root"]).expanduser().resolve().name or "folder"
    exif = cfg["exif_orientation"]

    def prepare(role: str, json_path: Path, folder_of_images: Path) -> Path:
        content = hashes.of_file(json_path)

        @functools.cache
        def parsed() -> tuple[dict[str, Any], list[ImageRecord], dict[int, str], list[dict[str, Any]]]:
            truth = coco.read(json_path)
            if hashes.of_file(json_path) != content:
                raise hashes.changed(json_path)
            return truth, *coco.check(truth, json_path.name)

        def located(known: hashes.Known) -> dict[str, str]:
            return paths.located(
                known or [record.file_name for record in parsed()[1]], folder_of_images, json_path.name
            )

        def write(folder: Path, known: hashes.Known) -> None:
            truth, image_records, categories, log = parsed()
            for record in image_records:
                record.sha256 = known[record.file_name][1]
            stream = coco.stream(
                image_records, located(known), folder_of_images, json_path.name, log, upright=exif == "upright"
            )
            bar = tqdm(stream, **_bar(name, role, len(image_records)))
            licenses = coco.licenses(truth)
            _write(folder, name=name, categories=categories, stream=bar, log=log, licenses=licenses, exif=exif)

        fingerprint = {"json": content, "exif": exif}
        place = [content, os.path.abspath(folder_of_images)]
        return _prepared(cfg, f"folder-{name}", fingerprint, place, located, write)

    return {role: prepare(role, *paths) for role, paths in files.items()}


def _prepare_scenes(cfg: Settings, splits: Sequence[str]) -> dict[str, Path]:
    """Prepares splits of the generated images."""

    def prepare(role: str) -> Path:
        count = int(cfg[f"scenes_{role}"])

        def write(folder: Path) -> None:
            categories = dict(enumerate(scenes.CLASSES, start=1))
            stream = tqdm(_hashed(scenes.stream(role, count)), **_bar("scenes", role, count))
            _write(folder, name="scenes", categories=categories, stream=stream, log=[])

        fingerprint = {"builder": records.VERSION, "scenes": scenes.fingerprint(), "split": role, "count": count}
        return cache.prepared(cache.root(cfg["cache"]), "scenes", fingerprint, write)

    return {role: prepare(role) for role in splits}


def _hashed(stream: records.Stream) -> records.Stream:
    """The stream with the hashes of the pixels: with another version of the encoder, a run may still be resumed."""
    for record, encoded in stream:
        image = records.decode(encoded)
        assert image is not None, record.file_name
        record.sha256 = hashes.of_bytes(image.tobytes())
        yield record, encoded


def _prepare_tfds(cfg: Settings, splits: Sequence[str]) -> dict[str, Path]:
    """Indexes splits of prepared TFDS directories; the records stay where they are."""
    names = {role: cfg[f"{role}_split"] for role in splits}
    name, classes, readers = tfds.describe(cfg["root"], names)
    jsons = {role: cfg[f"{role}_annotations"] for role in splits}
    jsons = {role: coco.find_json(cfg["root"], names[role], path) for role, path in jsons.items() if path}

    def prepare(role: str, reader: Reader) -> Path:
        directories = sorted({directory for directory, _ in reader.parts})
        # The records have labels 0 .. K-1 but no category ids: those of any json hold for all splits, else 1 .. K.
        json_path = jsons.get(role) or next(iter(jsons.values()), None)

        def write(folder: Path, known: hashes.Known) -> None:
            categories, licenses, listed, log = dict(enumerate(classes, start=1)), [], [], []
            if json_path:
                truth = coco.read(json_path)
                listed, categories, _ = coco.check(truth, json_path.name)
                if [categories[key] for key in sorted(categories)] != classes:
                    raise UserError(
                        f"{json_path.name}: the categories by ascending id must be the classes of "
                        f"{', '.join(directories)}"
                    )
                licenses = coco.licenses(truth) if role in jsons else []
            turning = dataclasses.replace(reader, upright=cfg["exif_orientation"] == "upright")
            scanned = tfds.scan(turning, sorted(categories), log)
            image_records = list(tqdm(scanned, **_bar(name, role, len(reader))))
            if role in jsons:
                image_records = tfds.match(image_records, listed, jsons[role].name)
            _save_index(
                folder,
                name=name,
                parts=reader.parts,
                categories=categories,
                image_records=image_records,
                log=log,
                licenses=licenses,
                exif=cfg["exif_orientation"],
            )

        fingerprint = {
            "records": reader.parts,
            "json": json_path and hashes.of_file(json_path),
            "matched": role in jsons,
            "exif": cfg["exif_orientation"],
        }
        parts = [":".join(part) for part in reader.parts]
        return _prepared(cfg, f"tfds-{name}", fingerprint, parts, lambda known: tfds.files(reader), write)

    return {role: prepare(role, reader) for role, reader in readers.items()}


def _prepared(
    cfg: Settings,
    name: str,
    fingerprint: Mapping[str, Any],
    place: Iterable[str],
    paths: Callable[[hashes.Known], Mapping[str, str]],
    write: Callable[[Path, hashes.Known], None],
) -> Path:
    """The folder of a split that is made of files.

    Args:
      cfg: read here: cache.
      name: start of the folder's name.
      fingerprint: what the content depends on beside the files.
      place: where the files are; their hashes are remembered for it.
      paths: the files by name, given the hashes that are remembered.
      write: fills the folder, given the hashes of the files.
    """
    root = cache.root(cfg["cache"])
    memory = root / f".{name}-{hashes.together(place)[:16]}.sha256"
    before = hashes.recall(memory)
    known = hashes.of_files(paths(before), before, f"check {name}")

    def forget_and_write(folder: Path) -> None:
        memory.unlink(missing_ok=True)  # if the file system is not to be trusted, the next attempt reads all files
        write(folder, known)

    key = {"builder": records.VERSION, **fingerprint, "files": hashes.together(sha256 for _, sha256 in known.values())}
    folder = cache.prepared(root, name, key, forget_and_write)
    if known != before:
        hashes.save(memory, known)
    return folder


_SOURCES = {"coco_folder": _prepare_folders, "scenes": _prepare_scenes, "tfds": _prepare_tfds}


def _bar(name: str, role: str, count: int) -> dict[str, Any]:
    """Options of a progress bar; without a terminal none is drawn."""
    logging.info("Preparing %s %s: %d images.", name, role, count)
    return dict(total=count, desc=f"prepare {name} {role}", unit="image", disable=None)


def _write(
    folder: Path,
    *,
    name: str,
    categories: Mapping[int, str],
    stream: Iterable[tuple[ImageRecord, bytes]],
    log: list[dict[str, Any]],
    licenses: Iterable[str] = (),
    exif: str = "stored",
) -> None:
    """Writes the records of a split into `folder`, and its index."""
    image_records = []

    def kept() -> Iterable[tuple[ImageRecord, bytes]]:
        for record, encoded in stream:
            image_records.append(record)
            yield record, encoded

    category_ids = sorted(categories)
    classes = [categories[key] for key in category_ids]
    directory, part = records.write(folder, classes=classes, category_ids=category_ids, stream=kept())
    _save_index(
        folder,
        name=name,
        parts=[(str(directory.relative_to(folder)), part)],
        categories=categories,
        image_records=image_records,
        log=log,
        licenses=licenses,
        exif=exif,
    )


def _save_index(
    folder: Path,
    *,
    name: str,
    parts: Iterable[tuple[str, str]],
    categories: Mapping[int, str],
    image_records: Sequence[ImageRecord],
    log: list[dict[str, Any]],
    licenses: Iterable[str],
    exif: str,
) -> None:
    """Writes what `open_dataset` and `Split` read beside the records."""
    ascending = sorted(categories.items())
    truth = {
        "images": [dict(id=r.id, file_name=r.file_name, width=r.width, height=r.height) for r in image_records],
        "annotations": [annotation for record in image_records for annotation in record.annotations],
        "categories": [dict(id=key, name=label) for key, label in ascending],
    }
    (folder / TRUTH).write_text(json.dumps(truth))
    digests = [hashes.of_file(folder / TRUTH), *(record.sha256 for record in image_records)]
    if exif != "stored":  # other pixels of the same files
        digests.append(exif)
    boxes = [sum(not a["iscrowd"] for a in record.annotations) for record in image_records]
    meta = {
        "name": name,
        "categories": ascending,
        "licenses": list(licenses),
        "records": list(parts),  # TFDS directory and split, several one after the other
        "size": len(image_records),
        "content": hashes.together(digests),
        "images_by_boxes": np.bincount(boxes, minlength=1).tolist(),
    }
    (folder / LOG).write_text(json.dumps(log))
    (folder / _META).write_text(json.dumps(meta))
    hashes.seal(folder)
