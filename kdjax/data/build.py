"""Makes the rows of a batch from its plan: decodes, augments and pads.

A process keeps the images that Mosaic and MixUp may need again. They are not saved: an image that is not in memory is
made again, with the same result.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import cv2
import numpy as np

from kdjax.data import recipes, ssd, transforms
from kdjax.data.dataset import Split
from kdjax.data.kept import Kept
from kdjax.data.masks import Shape, masks_of
from kdjax.data.plans import STREAM, Row
from kdjax.data.recipes import Form, Recipe
from kdjax.data.stages import Stage
from kdjax.data.transforms import Sample

FOUND = 100  # detections of a row of a batch

Arrays = dict[str, Any]  # of arrays, and below "recipe" of a dict of some
Key = TypeVar("Key")
Value = TypeVar("Value")


class Builder(Protocol):
    """Makes the rows of a batch, or of a part of it, from their plan."""

    @property
    def images(self) -> "Images":
        """The images that the rows are made of."""
        ...

    def __call__(self, plan: list[Any], /) -> list[Arrays]:
        """One dict of arrays for every row of the plan."""
        ...


class Images:
    """Decoded examples of a split by position; the images that fit a budget are decoded once for all processes."""

    def __init__(self, split: Split, *, keep: float = 0.0, longest: int = 0) -> None:
        """Images that are read once, as in an evaluation, need no budget.

        Args:
          split: whose images they are.
          keep: budget in GiB.
          longest: px; images with a longer side are shrunk to it, and their objects with them. 0: none.
        """
        self._split, self._longest = split, longest
        self._kept = Kept(sizes_of(split, longest), keep) if keep else None
        self._rest: dict[int, dict[str, Any]] = {}  # examples of kept images, without them
        self._thread = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        # Without what the split has read of its truth; each process has objects and counts of its own.
        return {"_split": dataclasses.replace(self._split), "_longest": self._longest, "_kept": self._kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._rest, self._thread = {}, threading.local()

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self._kept.get(index) if self._kept else None
        if image is not None:
            return self._objects(index, image) | {"image": image}
        example = self._split.records[index]
        self._thread.decoded = getattr(self._thread, "decoded", 0) + 1
        image = example.pop("image")
        original = image.shape[:2]
        size = shrunk(original, self._longest)
        if size != original:
            image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
        example = self._completed(index, example, original, image)
        if self._kept and index in self._kept:
            image = self._kept.put(index, image)
            self._rest[index] = example
        return example | {"image": image}

    def newly_decoded(self) -> int:
        """Number of images that the calling thread has decoded since its last call."""
        count, self._thread.decoded = getattr(self._thread, "decoded", 0), 0
        return count

    def close(self) -> None:
        """Gives the memory of the kept images back."""
        if self._kept:
            self._kept.close()

    def _objects(self, index: int, image: np.ndarray) -> dict[str, Any]:
        """The example of a kept image, which another process may have decoded, without the image."""
        if index not in self._rest:
            original = tuple(self._split.sizes[index].tolist()) if self._longest else image.shape[:2]
            example = self._split.records.objects(index, original)
            self._rest[index] = self._completed(index, example, original, image)
        return self._rest[index]

    def _completed(
        self, index: int, example: dict[str, Any], original: tuple[int, int], image: np.ndarray
    ) -> dict[str, Any]:
        """The objects with masks and detections, moved from the original size (h, w) to that of the image."""
        if self._split.masks is not None:
            example = _masked(example, self._split.masks(example["ids"].tolist()))
        if self._split.found is not None:
            example["found"] = self._split.found[index]
        height, width = image.shape[:2]
        if (height, width) == original:
            return example
        sample = _sample(example | {"image": image}).on(image, scale=(width / original[1], height / original[0]))
        moved = {"boxes": sample.boxes, "masks": sample.masks, "found": sample.found}
        return example | {name: value for name, value in moved.items() if value is not None}


def shrunk(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """The size (h, w) of an image whose longer side is at most `longest` px; 0: its own.

    Example:
      >>> shrunk((3000, 4000), 1280), shrunk((480, 640), 1280)
      ((960, 1280), (480, 640))
    """
    return transforms.scaled(size, longest / max(size)) if 0 < longest < max(size) else size


def sizes_of(split: Split, longest: int) -> np.ndarray:
    """i32[N, 2]: height and width of the images of a split in pixels, after `shrunk`."""
    if not 0 < longest < split.sizes.max(initial=0):
        return split.sizes
    return np.array([shrunk((height, width), longest) for height, width in split.sizes.tolist()], np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainBuilder:
    """Makes rows of training batches."""

    images: Images
    seed: int  # of the draws, with the position of a row
    canvas: tuple[int, int]
    max_boxes: int
    stages: tuple[Stage, ...]
    stretch: bool  # images get the aspect ratio of the canvas
    streams: int  # number of virtual streams that this process has; 0: nothing is kept in memory for them
    form: Form | None = None  # of the recipes that rows have instead of images; None: rows have images

    def __call__(self, plan: list[Row], /) -> list[Arrays]:
        """One dict of arrays for every row of the plan."""
        rows = [_padded(self._mixed(row), self.canvas, self.max_boxes) for row in plan]
        return rows if self.form is None else [self._with_sources(row, self.form) for row in rows]

    def _with_sources(self, row: Arrays, form: Form) -> Arrays:
        """The row with its recipe, and the images that it is made of, instead of the image."""
        recipe: Recipe = row.pop("image")
        found = recipes.encoded(recipe, form)
        found["sources"] = np.zeros((*found["image"].shape, *form.source, 3), np.uint8)
        for places, images in zip(found["sources"], recipes.images_of(recipe), strict=False):
            for place, index in zip(places, images, strict=False):
                image = self._source(index)["image"]
                place[: image.shape[0], : image.shape[1]] = image
        return row | {"recipe": found}

    def _drawn(self, index: int) -> Sample:
        """The image at a position, or a recipe of it, with its objects."""
        if self.form is None:
            return _sample(self.images[index])
        sample = _sample(self._source(index))
        return sample._replace(image=recipes.source(index, sample.image.shape[:2]))

    @functools.cached_property
    def _source(self) -> Callable[[int], dict[str, Any]]:
        """The example at a position; the last ones that Mosaics and MixUp may need again are kept in memory."""
        if not self._mixing:
            return self.images.__getitem__
        return memoized(self.images.__getitem__, self.streams * (self._cache + self._cache // 2 + 2 * STREAM))

    def _mixed(self, row: Row) -> Sample:
        """The image of a row, after MixUp."""
        make = self._cached_single if self.stages[row.stage].mixup else self._single
        sample = make(row._replace(partner=None, mirrored=False))
        if row.partner is None:
            return sample
        partner = transforms.pad(make(row.partner), self.canvas)
        if row.mirrored:
            partner = transforms.flip(partner)
        return transforms.mixup(transforms.pad(sample, self.canvas), partner)

    def _single(self, row: Row) -> Sample:
        """The image of a row before MixUp: one image or a Mosaic, augmented."""
        stage = self.stages[row.stage]
        options: dict[str, Any] = stage.augment
        if stage.mosaic:
            y, x = (int(share * side) for share, side in zip(row.centre, self.canvas, strict=True))
            twice = (2 * self.canvas[0], 2 * self.canvas[1])
            sample = transforms.mosaic([self._cached_tile(image) for image in row.images], (y, x), twice)
            # The scale of a Mosaic is relative to its own size, which is twice the canvas.
            options = options | {"scale": tuple(2 * factor for factor in options["scale"])}
        else:
            sample = self._drawn(row.images[0])
        if any(stage.ssd.values()):
            sample = self._of_ssd(sample, np.random.default_rng((self.seed, row.position, 3)), **stage.ssd)
        return transforms.augment(
            sample,
            np.random.default_rng((self.seed, row.position)),
            canvas=self.canvas,
            stretch=self.stretch,
            **options,
        )

    def _of_ssd(
        self, sample: Sample, rng: np.random.Generator, *, distort: float, zoom_out: float, iou_crop: float
    ) -> Sample:
        """SSD's augmentations, each with its probability."""
        distorted, zoomed, cropped = rng.uniform(size=3) < (distort, zoom_out, iou_crop)
        if distorted:
            sample = sample._replace(image=ssd.distort(sample.image, rng))
        sample = ssd.zoom_out(sample, rng) if zoomed else sample
        return ssd.iou_crop(sample, rng) if cropped else sample

    @functools.cached_property
    def _cached_tile(self) -> Callable[[int], Sample]:
        """A tile of a Mosaic: the image, resized to fit the canvas; the last ones are kept in memory."""

        def tile(image: int) -> Sample:
            sample = self._drawn(image)
            return transforms.resize(sample, transforms.fitted(sample.image.shape[:2], self.canvas)[1])

        # MixUp's partner takes its own partners from its own position.
        return memoized(tile, self.streams * (self._cache + self._cache // 2 + 2 * STREAM))

    @functools.cached_property
    def _cached_single(self) -> Callable[[Row], Sample]:
        """`_single`; the last results are kept in memory for MixUp."""

        def single(row: Row) -> Sample:
            sample = self._single(row)
            return sample._replace(image=sample.image.copy())  # a window would keep its whole image in memory

        return memoized(single, self.streams * (self._cache // 2 + 2 * STREAM))

    @property
    def _mixing(self) -> list[Stage]:
        return [stage for stage in self.stages if stage.mosaic or stage.mixup]

    @property
    def _cache(self) -> int:
        return max(stage.cache for stage in self._mixing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalBuilder:
    """Makes rows of evaluation batches."""

    images: Images
    canvas: tuple[int, int]
    max_boxes: int
    fit: str

    def __call__(self, plan: list[int | None], /) -> list[Arrays]:
        """One dict of arrays for every image of the plan; None is a row that is not real."""
        return [self._row(index) for index in plan]

    def _row(self, index: int | None) -> Arrays:
        if index is None:
            image_id = -1
            grey = np.full((*self.canvas, 3), transforms.PAD, np.uint8)
            sample = Sample(grey, np.zeros((0, 4), np.float32), np.zeros(0, np.int32))
        else:
            example = self.images[index]
            image_id, sample = example["image_id"], _sample(example)
        original = sample.image.shape[:2]
        _, size = transforms.fitted(original, self.canvas, fit=self.fit)
        return _padded(transforms.resize(sample, size), self.canvas, self.max_boxes) | {
            "image_id": np.array(image_id, np.int64),
            "original_size": np.array(original, np.int32),
            "real": np.array(index is not None, np.bool_),
        }


def _masked(example: dict[str, Any], shapes: Sequence[Shape | None]) -> dict[str, Any]:
    """The example with its masks, without the objects that have none: what they cover is not known."""
    keep = np.array([one is not None for one in shapes], bool)
    objects = {name: example[name][keep] for name in ("boxes", "labels", "ids")}
    return example | objects | {"masks": masks_of([one for one in shapes if one is not None])}


def memoized(function: Callable[[Key], Value], count: int) -> Callable[[Key], Value]:
    """The function with its last `count` results kept in memory."""
    return functools.lru_cache(count)(function)


def stack(rows: Sequence[Arrays]) -> Arrays:
    """The batch of some rows."""
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return {key: stack(column) if isinstance(column[0], dict) else np.stack(column) for key, column in columns.items()}


def _sample(example: dict[str, Any]) -> Sample:
    return Sample(example["image"], example["boxes"], example["labels"], example.get("masks"), example.get("found"))


def _padded(sample: Sample, canvas: tuple[int, int], max_boxes: int) -> Arrays:
    """One row of a batch. Of more than `max_boxes` boxes the largest are kept, in their order."""
    boxes, labels, masks = sample.boxes, sample.labels, sample.masks
    if len(boxes) > max_boxes:
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
        largest = np.sort(np.argsort(-areas, kind="stable")[:max_boxes])
        boxes, labels = boxes[largest], labels[largest]
        masks = None if masks is None else masks[largest]
    count = len(boxes)
    row = {
        "image": transforms.pad(sample, canvas).image,
        "boxes": np.zeros((max_boxes, 4), np.float32),
        "labels": np.zeros(max_boxes, np.int32),
        "valid": np.arange(max_boxes) < count,
        "image_size": np.array(sample.image.shape[:2], np.int32),
    }
    row["boxes"][:count], row["labels"][:count] = boxes, labels
    if masks is not None:
        drawn = masks.drawn(canvas)
        row["masks"] = np.zeros((max_boxes, *drawn.shape[1:]), np.uint8)
        row["masks"][:count] = drawn
    return row if sample.found is None else row | _detections(sample.found)


def _detections(found: np.ndarray) -> Arrays:
    """The `FOUND` detections of the best scores, best first."""
    best = found[np.argsort(-found[:, 5], kind="stable")[:FOUND]]
    rows = np.zeros((FOUND, 6), np.float32)
    rows[: len(best)] = best
    return {
        "found_boxes": rows[:, :4],
        "found_labels": rows[:, 4].astype(np.int32),
        "found_scores": rows[:, 5],
        "found_valid": np.arange(FOUND) < len(best),
    }
