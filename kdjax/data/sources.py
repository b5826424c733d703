"""The sources of data: each turns its splits into folders of prepared records, whose ground truth has COCO's layout."""

import concurrent.futures
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from kdjax.data import cache, coco, folders, hashes, images, paths, records, scenes, tfds, voc, yolo
from kdjax.data.folders import Found, Parsed, Size
from kdjax.data.records import ImageRecord, Reader
from kdjax.data.stages import Settings
from kdjax.errors import UserError

LOG = "log.json"  # everything that was dropped or repaired
TRUTH = "truth.json"  # COCO instances
META = "meta.json"
CONTENTS = "contents.json"  # the first 16 hex digits of each image's hash, in order


def _prepare_folders(cfg: Settings, splits: Sequence[str]) -> dict[str, Path]:
    """Prepares splits of a folder in COCO layout."""
    files = {
        role: coco.find(
            cfg["root"], cfg[f"{role}_split"], annotations=cfg[f"{role}_annotations"], images=cfg[f"{role}_images"]
        )
        for role in splits
    }
    name = _folder_name(Path(cfg["root"]))
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

        fingerprint = {"json": content, "exif": exif, "root": "left out"}
        place = [content, os.path.abspath(folder_of_images)]
        return _prepared(cfg, f"folder-{name}", fingerprint, place, located, write)

    return {role: prepare(role, *paths) for role, paths in files.items()}


def _prepare_labelled(
    cfg: Settings,
    splits: Sequence[str],
    *,
    find: Callable[..., Found],
    parse: Callable[[Found, Callable[[str], bytes], Mapping[str, Size]], Parsed],
) -> dict[str, Path]:
    """Prepares splits of a folder that has a file of labels for each image: `find` finds them, `parse` reads them."""

    def prepare(role: str, found: Found) -> Path:
        def write(folder: Path, known: hashes.Known) -> None:
            def read(name: str) -> bytes:
                return folders.content(found.files[name], known[name][1])

            sizes = _sizes(found.images, upright=cfg["exif_orientation"] == "upright")
            truth, log, places = parse(found, read, sizes)
            image_records, categories, changes = coco.check(truth, found.name)
            _write_images(folder, cfg, role, found, known, image_records, categories, log + changes, places)

        files = found.images | found.files
        fingerprint = {
            "folders": folders.VERSION,
            "images": [*found.images],
            "labels": found.labels,
            "notes": found.notes,
            "exif": cfg["exif_orientation"],
            **found.facts,
        }
        place = [os.path.abspath(found.base), *(cfg[f"{role}_{what}"] for what in ("split", "annotations", "images"))]
        return _prepared(cfg, f"folder-{_folder_name(found.base)}", fingerprint, place, lambda _: files, write)

    found = {
        role: find(
            cfg["root"],
            cfg[f"{role}_split"],
            annotations=cfg[f"{role}_annotations"],
            images=cfg[f"{role}_images"],
            names=cfg["classes"],
        )
        for role in splits
    }
    return {role: prepare(role, one) for role, one in found.items()}


def prepare_unlabelled(cfg: Settings, folder: str) -> Path:
    """Prepares the images of a folder, and of those below it, without any labels."""
    base = Path(folder).expanduser()
    if not base.is_dir():
        raise UserError(f"there is no folder {base}")
    by_name = folders.named(folders.below(base), base)
    if not by_name:
        raise UserError(f"{base}: it holds no images ({', '.join(images.SUFFIXES)})")
    found = Found(f"{base}", base, by_name, labels={}, files={}, facts={}, notes=[])

    def write(target: Path, known: hashes.Known) -> None:
        sizes = _sizes(by_name, upright=cfg["exif_orientation"] == "upright")
        image_records = [
            ImageRecord(id=number, file_name=name, width=width, height=height)
            for number, (name, (height, width)) in enumerate(sizes.items(), start=1)
        ]
        _write_images(target, cfg, "unlabelled", found, known, image_records, {}, [], {}, labelled=False)

    fingerprint = {"unlabelled": [*by_name], "exif": cfg["exif_orientation"]}
    place = [os.path.abspath(base), "unlabelled"]
    return _prepared(cfg, f"folder-{_folder_name(base)}", fingerprint, place, lambda _: by_name, write)


def _folder_name(folder: Path) -> str:
    return folder.expanduser().resolve().name or "folder"


def _sizes(paths: Mapping[str, str], *, upright: bool) -> dict[str, Size]:
    """Height and width of images in pixels, by name."""
    names = [*paths]
    found: dict[str, Size] = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(names), 64):
            portion = names[start : start + 64]
            measured = images.sizes([paths[name] for name in portion], pool, upright=upright)
            found |= dict(zip(portion, measured, strict=True))
    return found


def _write_images(
    folder: Path,
    cfg: Settings,
    role: str,
    found: Found,
    known: hashes.Known,
    image_records: list[ImageRecord],
    categories: Mapping[int, str],
    log: list[dict[str, Any]],
    places: Mapping[int, str],
    *,
    labelled: bool = True,
) -> None:
    """Writes the images of a folder as records; entries of the log get the file and line of their annotation."""
    for record in image_records:
        record.sha256 = known[record.file_name][1]
    exif, name = cfg["exif_orientation"], _folder_name(found.base)
    stream = coco.stream(image_records, found.images, found.base, found.name, log, upright=exif == "upright")

    def placed() -> records.Stream:
        yield from tqdm(stream, **_bar(name, role, len(image_records)))
        for entry in log:
            if entry["annotation"] in places:
                entry["place"] = places[entry["annotation"]]

    _write(folder, name=name, categories=categories, stream=placed(), log=log, exif=exif, labelled=labelled)


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
                listed, categories, changes = coco.check(truth, json_path.name)
                if [categories[key] for key in sorted(categories)] != classes:
                    raise UserError(
                        f"{json_path.name}: the categories by ascending id must be the classes of "
                        f"{', '.join(directories)}"
                    )
                if role in jsons:  # boxes are those of the records
                    licenses = coco.licenses(truth)
                    log += [entry for entry in changes if entry["action"] == coco.UNMASKED]
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
    labelled: bool = True,
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
        labelled=labelled,
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
    labelled: bool = True,
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
        "labelled": labelled,
    }
    (folder / LOG).write_text(json.dumps(log))
    (folder / CONTENTS).write_text(json.dumps([record.sha256[:16] for record in image_records]))
    (folder / META).write_text(json.dumps(meta))
    hashes.seal(folder)


SOURCES = {
    "coco_folder": _prepare_folders,
    "scenes": _prepare_scenes,
    "tfds": _prepare_tfds,
    "voc_folder": functools.partial(_prepare_labelled, find=voc.find, parse=voc.parse),
    "yolo_folder": functools.partial(_prepare_labelled, find=yolo.find, parse=yolo.parse),
}
