"""Opening a data set. Whatever the source, a split becomes prepared records with its ground truth in COCO's layout."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdjax import remote
from kdjax.data import cache, coco, folders, found, hashes, images, masks
from kdjax.data.found import Found
from kdjax.data.masks import Store
from kdjax.data.records import Reader
from kdjax.data.sources import CONTENTS, LOG, META, SOURCES, TRUTH, prepare_unlabelled
from kdjax.data.stages import Settings
from kdjax.errors import UserError, prefix

NAMED_BY_HAND = ("yolo_folder", "voc_folder")  # the sources that `classes` is for
FOLDER = "folder"  # the source that is recognised by what lies in the folder


class Part(NamedTuple):
    """A part of a training split: what `config.data.holdout` holds out, or the rest."""

    name: str  # "without 0.2" or "only 0.2"
    positions: tuple[int, ...]  # in the prepared split, ascending
    others: int  # number of images in the other part


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a data set."""

    name: str  # as in the source: 'train', 'val', 'train2017', …
    size: int  # images
    records: Reader  # random access by position
    folder: Path  # of the prepared split; holds TRUTH, LOG and CONTENTS
    categories: Mapping[int, str]  # of the data set: name by category id, ascending
    masks: Store | None = None  # of the objects that are trained on, if `config.data.masks` asks for them
    found: Found | None = None  # what a teacher detected on the images, if `with_found` read it
    labelled: bool = True  # False: what its images show is not known; True without an annotation: they show nothing
    beyond: int = 0  # images of the prepared split that `config.data.limit` leaves out
    part: Part | None = None  # of the others; None: all of them

    @functools.cached_property
    def positions(self) -> Sequence[int]:
        """Where its images are in the prepared split, ascending."""
        return range(self.size) if self.part is None else self.part.positions[: self.size]

    @functools.cached_property
    def truth(self) -> dict[str, Any]:
        """COCO instances dict of its images."""
        truth = hashes.read_json(self.folder / TRUTH)
        if len(truth["images"]) > self.size:
            truth["images"] = [truth["images"][position] for position in self.positions]
            ids = {image["id"] for image in truth["images"]}
            truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in ids]
        return truth | {"categories": [dict(id=key, name=name) for key, name in self.categories.items()]}

    @functools.cached_property
    def log(self) -> list[dict[str, Any]]:
        """What was dropped, ignored, repaired or noted in its images: file, annotation, action, reason."""
        log = hashes.read_json(self.folder / LOG)
        images = hashes.read_json(self.folder / TRUTH)["images"]
        if self.size == len(images):
            return log
        own = {images[position]["file_name"] for position in self.positions}
        others = {image["file_name"] for image in images} - own
        return [entry for entry in log if entry["file"] not in others]

    @functools.cached_property
    def contents(self) -> frozenset[str]:
        """The hashes of its images: fewer than `size` if an image appears twice."""
        contents = hashes.read_json(self.folder / CONTENTS)
        return frozenset(contents[position] for position in self.positions)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the encoded images, their boxes and the classes; their place on disk does not matter."""
        return hashes.of_bytes(json.dumps(self.identity).encode())

    @property
    def identity(self) -> list[Any]:
        """What the fingerprint is made of."""
        of_part = [] if self.part is None else [self.part.name]
        return [hashes.read_json(self.folder / META)["content"], self.size, *of_part]

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """i32[size, 2]: height and width of the images in pixels, in order."""
        sizes = [(image["height"], image["width"]) for image in self.truth["images"]]
        return np.array(sizes, np.int32).reshape(-1, 2)

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
    source: str = ""  # that reads it: 'coco_folder', 'yolo_folder', …
    unlabelled: Split | None = None  # the images of `config.data.unlabelled`

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the encoded images, their boxes and the classes; their place on disk does not matter."""
        parts = {
            role: split.identity
            for role, split in {**self.splits, "unlabelled": self.unlabelled}.items()
            if split is not None
        }
        return hashes.of_bytes(json.dumps(parts).encode())


def open_dataset(cfg: Settings, splits: Sequence[str] = ("train", "val")) -> Dataset:
    """Opens the data of a config. A split whose content has not been prepared yet is prepared first.

    Every split is prepared on its own: training and evaluation on the same folder share the prepared data.

    Args:
      cfg: `config.data`. Read here: source ('scenes', 'coco_folder', 'yolo_folder', 'voc_folder', 'tfds', or 'folder',
        which is one of the last four by what lies in root), root, classes, cache, limit (first images of each split, 0
        for all), masks (whether training batches have them), max_boxes (0: from the data), augment and stage2 (whether
        a training image is made of several), exif_orientation ('stored' or 'upright'); of every split {split}_split,
        {split}_annotations, {split}_images (explicit paths) and scenes_{split}; holdout (share of the training images
        that are the split 'val', 0 for the validation split itself, which otherwise need not exist).
      splits: which to open; the others need not exist. With 'train', also the images of `unlabelled`.

    Returns:
      The data set. Labels follow ascending category ids.

    Raises:
      UserError: the config or the data cannot be used; the message says what is wrong.
    """
    cfg = _here(cfg)
    source = cfg["source"]
    if source != FOLDER and source not in SOURCES:
        raise UserError(f"source must be one of {', '.join(sorted([*SOURCES, FOLDER]))}, not {source!r}")
    images.check_exif(cfg["exif_orientation"])
    held = float(cfg["holdout"])
    needed = ["train"] if held else splits
    if source == FOLDER:
        source = folders.recognised(cfg, needed)
    if cfg["classes"] and source not in NAMED_BY_HAND:
        raise UserError(f"classes={cfg['classes']} is for data in YOLO's and VOC's layout: {source} names its classes")
    prepared = SOURCES[source](cfg, needed)
    metas = {role: hashes.checked(folder / META) for role, folder in prepared.items()}
    categories = _categories(metas)
    opened = {}
    for role, meta in metas.items():
        name = role if source == "scenes" else cfg[f"{role}_split"]
        remedy = Reader.remedy if source == "tfds" else ""
        split = _split(cfg, name, prepared[role], meta, categories, remedy)
        opened[role] = dataclasses.replace(split, masks=_masks(cfg, split)) if role == "train" else split
    if held:
        parts = _parts(opened["train"], held)
        opened = {role: parts[role] for role in splits}
    return Dataset(
        name=next(iter(metas.values()))["name"],
        classes=tuple(categories.values()),
        category_ids=tuple(categories),
        max_boxes=int(cfg["max_boxes"]) or _box_rows(metas, cfg),
        splits=opened,
        licenses=tuple(dict.fromkeys(one for meta in metas.values() for one in meta["licenses"])),
        source=source,
        unlabelled=_unlabelled(cfg, opened),
    )


def _here(cfg: Settings) -> Settings:
    """The settings with copies on this machine instead of addresses in an object store; TFDS reads these itself."""
    copies = {}
    for name in ("root", "unlabelled"):
        if remote.is_url(cfg[name]) and cfg["source"] != "tfds":
            with prefix(name):
                copies[name] = str(remote.local(cfg[name]))
    settings: Any = cfg
    return {name: settings[name] for name in settings} | copies if copies else cfg


def _parts(split: Split, share: float) -> dict[str, Split]:
    """The training images without those that are held out, and these as the split 'val'.

    An image is held out by the hash of its content: equal images are on the same side, and neither the order of the
    images nor what else is in the split decides.

    Raises:
      UserError: one of the parts has no images.
    """
    contents = hashes.read_json(split.folder / CONTENTS)[: split.size]
    out = [int(content, 16) < share * 16 ** len(content) for content in contents]
    parts = {}
    for role, name, held in (("train", "without", False), ("val", "only", True)):
        positions = tuple(position for position, is_out in enumerate(out) if is_out == held)
        if not positions:
            what = (
                "holds none out to validate on: must be larger" if held else "leaves none to train on: must be smaller"
            )
            raise UserError(f"holdout={share:g} of the {split.size} images of the split '{split.name}' {what}, or 0")
        parts[role] = dataclasses.replace(
            split,
            name=f"{split.name}, {name} the {share:g} held out",
            size=len(positions),
            records=dataclasses.replace(split.records, chosen=positions),
            masks=None if held else split.masks,
            part=Part(f"{name} {share:g}", positions, split.size - len(positions)),
        )
    return parts


def without_labels(dataset: Dataset) -> Dataset:
    """The data set of the images of `config.data.unlabelled`, as its split 'train'.

    Args:
      dataset: from `open_dataset`, with such images.
    """
    assert dataset.unlabelled is not None, "it has no images without labels"
    return dataclasses.replace(dataset, splits={"train": dataset.unlabelled}, unlabelled=None)


def _unlabelled(cfg: Settings, opened: Mapping[str, Split]) -> Split | None:
    """The images of `config.data.unlabelled`.

    Raises:
      UserError: they cannot be read, or are among those of validation.
    """
    folder = cfg["unlabelled"]
    if not folder or "train" not in opened:
        return None
    with prefix("unlabelled"):
        split = open_unlabelled(cfg, folder)
        shared = len(split.contents & opened["val"].contents) if "val" in opened else 0
        if shared:
            raise UserError(
                f"{shared} of the {split.size} images of {folder} are, byte for byte, validation images, whose metrics "
                "would then be too good: remove them"
            )
    return split


def open_unlabelled(cfg: Settings, folder: str) -> Split:
    """A split of images that have no labels: all in a folder and those below it. It is prepared as others are.

    Args:
      cfg: `config.data`. Read here: cache, limit, exif_orientation.
      folder: its path.

    Returns:
      A split named as the folder whose `labelled` is False: its truth lists the images by their paths in the folder,
      without categories and annotations; its records have no boxes.

    Raises:
      UserError: there is no such folder, it has no images, or one cannot be read.
    """
    images.check_exif(cfg["exif_orientation"])
    prepared = prepare_unlabelled(cfg, folder)
    meta = hashes.checked(prepared / META)
    return _split(cfg, meta["name"], prepared, meta, {})


def with_found(dataset: Dataset, path: str | Path) -> Dataset:
    """The data set with the detections of a file on its training images, which training batches then have.

    Args:
      dataset: from `open_dataset`, with the split 'train'; the file may also have detections of its images without
        labels.
      path: of the file; see `found.read` for what it may hold.

    Raises:
      UserError: the file cannot be used; with the place.
    """
    split, further = dataset.splits["train"], dataset.unlabelled
    images = hashes.read_json(split.folder / TRUTH)["images"]
    read = found.read(
        path,
        images,
        list(zip(dataset.category_ids, dataset.classes, strict=True)),
        source=dataset.source,
        unlabelled=further.truth["images"] if further else (),
    )
    split = dataclasses.replace(split, found=read.at(split.positions))
    if further:
        rest = read.at(range(len(images), len(images) + further.size))
        others = dataclasses.replace(rest, left_out=0)  # counted with the first
        further = dataclasses.replace(further, found=others)
    return dataclasses.replace(dataset, splits=dataset.splits | {"train": split}, unlabelled=further)


def _split(
    cfg: Settings, name: str, folder: Path, meta: Mapping[str, Any], categories: Mapping[int, str], remedy: str = ""
) -> Split:
    """A prepared split, whose last record was read once."""
    labels = {key: label for label, key in enumerate(categories)}
    parts = tuple((str(folder / path), part) for path, part in meta["records"])  # an absolute path stays itself
    remedy = remedy or f"delete {folder} to have it prepared again"
    upright = cfg["exif_orientation"] == "upright"
    reader = Reader(parts, tuple(labels[key] for key, _ in meta["categories"]), remedy, upright)
    try:
        reader.raw(meta["size"] - 1)
    except Exception:  # TFDS and array_record raise many exception types
        raise hashes.damaged(" or ".join(dict.fromkeys(directory for directory, _ in parts)), folder) from None
    limit = int(cfg["limit"])
    size = min(meta["size"], limit) if limit > 0 else meta["size"]
    labelled = meta.get("labelled", True)
    return Split(name, size, reader, folder, categories, labelled=labelled, beyond=meta["size"] - size)


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


def _masks(cfg: Settings, split: Split) -> Store | None:
    """The masks of a split, if they are asked for; they are prepared when that happens first.

    Raises:
      UserError: no object has one.
    """
    if not cfg["masks"]:
        return None

    def write(folder: Path) -> None:
        masks.write(folder, hashes.read_json(split.folder / TRUTH))

    fingerprint = {"masks": masks.VERSION, "truth": hashes.sealed(split.folder)[TRUTH]}
    folder = cache.prepared(cache.root(cfg["cache"]), f"masks-{split.folder.name}", fingerprint, write)
    store = Store(folder).checked()
    if not len(store):
        raise UserError(
            f"masks: no object of the split '{split.name}' has a mask: must be False for such data, which trains "
            "detectors without masks"
        )
    return store


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
