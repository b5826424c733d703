"""A file of detections of the training images, written by any program: COCO's results, or annotations with scores."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from kdjax.data import coco, hashes, records
from kdjax.errors import UserError, listed

WITH_IDS = ("coco_folder", "tfds")  # the sources whose images have ids that other programs know

Row = tuple[int, float, float, float, float, float, float]  # position of the image, x1 y1 x2 y2, label, score


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """The detections of images, by their position."""

    path: str
    sha256: str  # of the file
    rows: np.ndarray  # f32[N, 6], of one image after the other: x1 y1 x2 y2 in its pixels, label, score 0 .. 1
    ends: np.ndarray  # i64[images], where the rows of each image end
    left_out: int = 0  # boxes without an extent inside their image

    def __getitem__(self, position: int) -> np.ndarray:
        """The detections f32[d, 6] of the image at a position."""
        return self.rows[self.ends[position - 1] if position else 0 : self.ends[position]]

    def at(self, positions: Sequence[int]) -> "Found":
        """The detections of the images at some positions."""
        parts = [self[position] for position in positions]
        ends = np.cumsum([len(part) for part in parts])
        return dataclasses.replace(self, rows=np.concatenate([self.rows[:0], *parts]), ends=ends)

    def told(self, images: str) -> str:
        """How many detections there are, and how many images have none, in one line.

        Args:
          images: what the images are called.
        """
        counts = np.diff(self.ends, prepend=0)
        without = int((counts == 0).sum())
        lost = f"; {self.left_out:,} boxes without an extent inside their image are left out" if self.left_out else ""
        return (
            f"{self.path}: {len(self.rows):,} detections; {without:,} of {len(counts):,} {images} "
            f"({without / len(counts):.0%}) have none{lost}"
        )


def read(
    path: str | Path,
    images: Sequence[Mapping[str, Any]],
    categories: Sequence[tuple[int, str]],
    *,
    source: str,
    unlabelled: Sequence[Mapping[str, Any]] = (),
) -> Found:
    """Reads a file of detections.

    It is a list of COCO's results, [{image_id, category_id, bbox, score}, ...], with the ids of the training json; or a
    json of COCO's annotations, each with a `score` (1 where there is none), as `kdjax label` writes it: its images are
    matched by file name, its categories by name, and crowd regions are left out. A bbox is x y w h in pixels.

    Args:
      path: of the file.
      images: of the training split, in its order: id, file_name, width and height, as in COCO's json.
      categories: of the data set, (id, name) by label.
      source: that reads the data set; ids of images are known of those in `WITH_IDS` only.
      unlabelled: further images, which have file names alone.

    Returns:
      The detections of all images, the further ones last, clipped to their images.

    Raises:
      UserError: the file cannot be read, an entry of it cannot be used, or there is no detection; with the place.
    """
    file = Path(path).expanduser()
    sha256 = hashes.of_file(file)
    content = coco.parsed(file)
    if hashes.of_file(file) != sha256:
        raise hashes.changed(file)
    images, own = [*images, *unlabelled], len(images)
    if isinstance(content, list):
        if source not in WITH_IDS:
            raise UserError(
                f"{file}: it is a list of results, which names images by their ids, but the images of a {source} have "
                "none that other programs know: must be a json of annotations, whose images are matched by file name"
            )
        given = _results(content, file, images[:own], categories)
    else:
        given = _annotations(coco.checked_layout(content, file), file, images, categories)
    kept, left_out, most = [], 0, 0.0
    for position, x, y, w, h, label, score in given:
        most = max(most, x, y, w, h)
        width, height = images[position]["width"], images[position]["height"]
        x0, y0, x1, y1 = np.array(records.clipped([x, y, w, h], width, height), np.float32)
        if x1 > x0 and y1 > y0:
            kept.append((position, x0, y0, x1, y1, label, score))
        else:
            left_out += 1
    if not kept:
        lost = f": {left_out:,} boxes have no extent inside their image" if left_out else ""
        raise UserError(f"{file}: it has no detection of a training image{lost}")
    if most <= 1:
        raise UserError(f"{file}: all box coordinates are <= 1: they look normalised, but must be in pixels")
    rows = np.array(kept)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    ends = np.searchsorted(rows[:, 0], np.arange(len(images)), side="right")
    return Found(str(path), sha256, rows[:, 1:].astype(np.float32), ends, left_out)


def _results(
    entries: list[Any], file: Path, images: Sequence[Mapping[str, Any]], categories: Sequence[tuple[int, str]]
) -> Iterator[Row]:
    """The detections of a list of results."""
    positions = {image["id"]: position for position, image in enumerate(images)}
    labels = {key: label for label, (key, _) in enumerate(categories)}
    for place, entry in enumerate(entries):
        where = f"{file}: entry {place}, from 0"
        if not isinstance(entry, dict):
            raise UserError(f"{where}: it must be an object with image_id, category_id, bbox and score")
        image, category = entry.get("image_id"), entry.get("category_id")
        if not coco.whole(image) or image not in positions:
            hint = coco.integer_hint(image, positions)
            raise UserError(f"{where}: image {image!r} is not among the training images{hint}")
        if not coco.whole(category) or category not in labels:
            hint = coco.integer_hint(category, labels) or f": they are {listed(labels)}"
            raise UserError(f"{where}: category {category!r} is not among those of the data{hint}")
        if "score" not in entry:
            raise UserError(f"{where}: it has no score: must be in 0 .. 1")
        yield positions[image], *_box(entry, where), labels[category], _score(entry, where)


def _annotations(
    data: Mapping[str, Any], file: Path, images: Sequence[Mapping[str, Any]], categories: Sequence[tuple[int, str]]
) -> Iterator[Row]:
    """The detections of a json of annotations."""
    data, _ = coco.without_root(data)
    classes = {coco.composed(name): label for label, (_, name) in enumerate(categories)}
    names = coco.categories_of(data, file.name)
    named = {key: one.file_name for key, one in coco.image_records_of(data, file.name).items()}
    find = by_file_name([image["file_name"] for image in images])
    taken: dict[int, str] = {}
    for place, entry in enumerate(data["annotations"]):
        where = f"{file}: entry {place} of 'annotations', from 0"
        image, category = entry.get("image_id"), entry.get("category_id")
        if not coco.whole(image) or image not in named:
            hint = coco.integer_hint(image, named)
            raise UserError(f"{where}: image {image!r} is not among the images of the file{hint}")
        position = find(named[image])
        if position is None:
            raise UserError(
                f"{where}: no training image, or more than one, has the file name {named[image]!r}: must be as "
                f"{images[0]['file_name']!r}"
            )
        other = taken.setdefault(position, named[image])
        if other != named[image]:
            raise UserError(
                f"{where}: {named[image]!r} and {other!r} would be one training image: list each image once"
            )
        if not coco.whole(category) or category not in names:
            hint = coco.integer_hint(category, names) or f": they are {listed(names)}"
            raise UserError(f"{where}: category {category!r} is not among the categories of the file{hint}")
        label = classes.get(coco.composed(names[category]))
        if label is None:
            raise UserError(
                f"{where}: category {names[category]!r} is not among the classes of the data: they are "
                f"{listed(name for _, name in categories)}"
            )
        box, score = _box(entry, where), _score(entry, where)
        if not coco.flag(entry.get("iscrowd")) and coco.flag(entry.get("ignore")) == 0:
            yield position, *box, label, score


def _box(entry: Mapping[str, Any], where: str) -> tuple[float, float, float, float]:
    bbox = entry.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(coco.finite, bbox)):
        raise UserError(f"{where}: bbox is not four finite numbers: must be [x, y, width, height] in pixels")
    x, y, w, h = map(float, bbox)
    return x, y, w, h


def _score(entry: Mapping[str, Any], where: str) -> float:
    score = entry.get("score", 1.0)
    if not coco.finite(score) or not 0 <= score <= 1:
        raise UserError(f"{where}: score is {score!r}: must be in 0 .. 1")
    return float(score)


def by_file_name(names: Sequence[str]) -> Callable[[str], int | None]:
    """A function that finds the position of a name; names may begin at different folders.

    Args:
      names: of the images of a split.

    Returns:
      name -> the position of the one name that equals it, or of the only one that it ends with or that ends with it;
      None: there is no such name, or more than one.

    Example:
      >>> find = by_file_name(["a/1.jpg", "a/2.jpg", "b/2.jpg"])
      >>> find("1.jpg"), find("data/b/2.jpg"), find("2.jpg")
      (0, 2, None)
    """
    exact: dict[tuple[str, ...], set[int]] = {}
    shorter: dict[tuple[str, ...], set[int]] = {}
    for position, name in enumerate(names):
        exact.setdefault(_parts(name), set()).add(position)
        for tail in _tails(_parts(name)):
            shorter.setdefault(tail, set()).add(position)

    def find(name: str) -> int | None:
        parts = _parts(name)
        inside = exact.get(parts) or shorter.get(parts, set()).union(*(exact.get(tail, ()) for tail in _tails(parts)))
        return next(iter(inside)) if len(inside) == 1 else None

    return find


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(coco.composed(name)).parts if part != "..")


def _tails(parts: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """All ends of a path but the whole one."""
    return (parts[start:] for start in range(1, len(parts)))
