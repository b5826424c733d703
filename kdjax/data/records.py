"""Prepared data on disk: encoded images in array_record files, written and read by TFDS without TensorFlow.

`RecordsBuilder` writes the feature spec of TFDS's `coco/2017`, so that one reader serves these records and directories
that TFDS prepared itself.
"""

import bisect
import contextlib
import dataclasses
import functools
import io
import itertools
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from kdjax.data.images import decode
from kdjax.errors import UserError

VERSION = "1.7.1"  # of what the builder writes; part of every cache key
_SPLIT = "images"  # the only TFDS split that the builder writes


@dataclasses.dataclass(kw_only=True)
class ImageRecord:
    """One image of a data set: the content of a record apart from the encoded bytes."""

    id: int
    file_name: str
    width: int
    height: int
    # As in COCO's json, in original pixels: id, category_id, bbox (x y w h), area, iscrowd, and its other fields.
    annotations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    sha256: str = ""  # of the encoded image; of the pixels of a generated one


Example = tuple[int, dict[str, Any]]  # key and features, as TFDS takes them
Stream = Iterable[tuple[ImageRecord, bytes]]  # with the encoded image


class RecordsBuilder(tfds.core.GeneratorBasedBuilder):
    """Writes a stream of (image record, encoded bytes) as array_record files."""

    RELEASE_NOTES: ClassVar[dict[str, str]] = {
        VERSION: "The hashes of the images are kept, so that a repeated image is noticed."
    }
    VERSION = tfds.core.Version(VERSION)

    def __init__(self, *, classes: list[str], category_ids: list[int], stream: Stream, **kwargs: Any) -> None:
        self._classes = classes
        self._label = {category: label for label, category in enumerate(category_ids)}
        self._stream = stream
        super().__init__(**kwargs)

    def _info(self) -> "tfds.core.DatasetInfo":
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(
                {
                    "area": np.float32,
                    "bbox": tfds.features.BBoxFeature(),
                    "id": np.int64,
                    "is_crowd": np.bool_,
                    "label": tfds.features.ClassLabel(names=self._classes),
                }
            ),
        }
        # Records stay in the order of the json: `limit` then means the first images of the file.
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: "tfds.download.DownloadManager") -> dict[str, Iterator[Example]]:
        return {_SPLIT: self._generate_examples(self._stream)}

    def _generate_examples(self, stream: Stream) -> Iterator[Example]:
        for index, (image, encoded) in enumerate(stream):
            objects = []
            for annotation in image.annotations:
                x0, y0, x1, y1 = clipped(annotation["bbox"], image.width, image.height)
                objects.append(
                    {
                        "area": float(annotation["area"]),
                        "bbox": tfds.features.BBox(
                            ymin=y0 / image.height,
                            xmin=x0 / image.width,
                            ymax=y1 / image.height,
                            xmax=x1 / image.width,
                        ),
                        "id": annotation["id"],
                        "is_crowd": bool(annotation["iscrowd"]),
                        "label": self._label[annotation["category_id"]],
                    }
                )
            yield (
                index,
                {
                    "image": io.BytesIO(encoded),
                    # A name on disk need not be UTF-8.
                    "image/filename": image.file_name.encode(errors="surrogateescape"),
                    "image/id": image.id,
                    "objects": objects,
                },
            )


def clipped(bbox: list[float], width: int, height: int) -> tuple[float, float, float, float]:
    """Corners x1 y1 x2 y2 of a COCO box x y w h, clipped to the image."""
    x, y, w, h = (float(v) for v in bbox)
    return min(max(x, 0.0), width), min(max(y, 0.0), height), min(max(x + w, 0.0), width), min(max(y + h, 0.0), height)


def has_extent(bbox: list[float], width: int, height: int) -> bool:
    """Whether a COCO box still has an extent as it is stored, as float32 shares of the sides."""
    sides = np.array([width, height, width, height])
    x0, y0, x1, y1 = (np.array(clipped(bbox, width, height)) / sides).astype(np.float32) * sides.astype(np.float32)
    return bool(x1 > x0 and y1 > y0)


def write(directory: Path, *, classes: list[str], category_ids: list[int], stream: Stream) -> tuple[Path, str]:
    """Writes a stream under `directory`; returns the TFDS directory of the records and its only split."""
    tfds.disable_progress_bar()  # the stream shows a bar of its own
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints what it does
        builder = RecordsBuilder(
            classes=classes,
            category_ids=category_ids,
            stream=stream,
            data_dir=os.fspath(directory),
            file_format="array_record",
        )
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(compute_stats=tfds.download.ComputeStatsMode.SKIP)
        )
    return Path(builder.data_dir), _SPLIT


class Damaged(UserError):
    """Prepared data could be opened, but a record of it cannot be read."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """Random access to the records of a split; picklable, opens its files where it is used."""

    parts: tuple[tuple[str, str], ...]  # TFDS directory and split; several come one after the other
    labels: tuple[int, ...] = ()  # the data set's label of every stored label; needed for decoded examples
    remedy: str = "prepare the data again"  # what to do if a record cannot be read
    upright: bool = False  # apply EXIF's orientation
    chosen: tuple[int, ...] | None = None  # the records that it gives, by their positions in the files; None: all

    @functools.cached_property
    def _sources(self) -> list[Any]:
        decoders = {"image": tfds.decode.SkipDecoding()}
        with _OPENING:
            builders: list[tuple[Any, str]] = [(tfds.builder_from_directory(path), split) for path, split in self.parts]
            return [builder.as_data_source(split=split, decoders=decoders) for builder, split in builders]

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(len(source) for source in self._sources))

    def __reduce__(self) -> tuple[type["Reader"], tuple[Any, ...]]:
        return Reader, (self.parts, self.labels, self.remedy, self.upright, self.chosen)

    def __len__(self) -> int:
        return self._ends[-1] if self.chosen is None else len(self.chosen)

    def _place(self, index: int) -> int:
        return index if self.chosen is None else self.chosen[index]

    def raw(self, index: int) -> dict[str, Any]:
        """The record as TFDS reads it, the image still encoded; VOC's images, which have no id, are numbered from 1.

        Raises:
          Damaged: it cannot be read.
        """
        place = self._place(index)
        part = bisect.bisect(self._ends, place)
        try:
            record = self._sources[part][place - (self._ends[part - 1] if part else 0)]
        except Exception:  # TFDS and array_record raise many exception types
            raise Damaged(f"{self.parts[part][0]}: record {place} cannot be read: {self.remedy}") from None
        return {"image/id": place + 1} | record

    def image(self, index: int) -> np.ndarray:
        """The image u8[h, w, 3] RGB at a position.

        Raises:
          Damaged: it cannot be read or decoded.
        """
        return self._decoded(index, self.raw(index))

    def _decoded(self, index: int, record: dict[str, Any]) -> np.ndarray:
        image = decode(record["image"], upright=self.upright)
        if image is None:
            name = record["image/filename"].decode(errors="surrogateescape")
            directory = self.parts[bisect.bisect(self._ends, self._place(index))][0]
            raise Damaged(f"{directory}: image {name} cannot be decoded: {self.remedy}")
        return image

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decoded example: image u8[h, w, 3] RGB, image_id, boxes f32[n, 4] x1 y1 x2 y2 px, labels i32[n], ids i64[n].

        Crowd regions and VOC's difficult objects are left out: they are ground truth for evaluation only. So are boxes
        and labels that cannot be used, which a directory that TFDS prepared may hold. `ids` are those of the
        annotations; VOC's objects have none, and get 0.

        Raises:
          Damaged: it cannot be read or decoded.
        """
        record = self.raw(index)
        image = self._decoded(index, record)
        return {"image": image} | self._objects(record, image.shape[0], image.shape[1])

    def objects(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        """The example without its image, which has the size (h, w) px.

        Raises:
          Damaged: it cannot be read.
        """
        return self._objects(self.raw(index), *size)

    def _objects(self, record: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        boxes, labels, crowd = stored_objects(record, height, width)
        keep = ~crowd & (labels >= 0) & (labels < len(self.labels)) & np.isfinite(boxes).all(-1)
        boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
        keep &= (boxes[:, 2:] > boxes[:, :2]).all(-1)
        ids = np.asarray(record["objects"].get("id", np.zeros(len(boxes))), np.int64).reshape(-1)
        return {
            "image_id": int(record["image/id"]),
            "boxes": boxes[keep],
            "labels": np.array(self.labels, np.int32)[labels[keep]],
            "ids": ids[keep],
        }


def stored_objects(record: dict[str, Any], height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All objects of a record, unchecked; `height` and `width` are those of its image.

    VOC counts pixels from 1 and its boxes include their last pixel: x1 and y1 are one less here.

    Returns:
      Boxes f32[n, 4] x1 y1 x2 y2 px, labels i32[n], and bool[n]: crowd regions of COCO, difficult objects of VOC.
    """
    objects = record["objects"]
    boxes = np.asarray(objects["bbox"], np.float32).reshape(-1, 4)[:, [1, 0, 3, 2]]
    boxes = boxes * np.array([width, height, width, height], np.float32)
    crowd = objects.get("is_crowd")
    if crowd is None:
        crowd = objects["is_difficult"]
        boxes = boxes - np.array([1, 1, 0, 0], np.float32)
    return boxes, np.asarray(objects["label"], np.int32).reshape(-1), np.asarray(crowd, bool).reshape(-1)


_OPENING = threading.Lock()
