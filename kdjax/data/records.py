"""Prepared data on disk: encoded images in array_record files, written and read by TFDS without TensorFlow.

Our own builder writes the feature spec of TFDS's `coco/2017`, so that one reader serves our own records and a prepared
stock directory alike.
"""

import bisect
import contextlib
import dataclasses
import functools
import io
import itertools
import os
import threading
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import tensorflow_datasets as tfds

VERSION = "1.3.0"  # of what the builder writes; part of every cache key

_DECODE = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION  # boxes refer to the stored pixels, not to EXIF's view


@dataclasses.dataclass(kw_only=True)
class ImageRecord:
    """One image of a data set: what a record holds apart from the encoded bytes."""

    id: int
    file_name: str
    width: int
    height: int
    # As in COCO's json, original pixels: id, category_id, bbox (x y w h), area, iscrowd, and what else the json had.
    annotations: list[dict] = dataclasses.field(default_factory=list)


class Kdjax(tfds.core.GeneratorBasedBuilder):
    """Writes (image, encoded bytes) streams as array_record files."""

    RELEASE_NOTES = {VERSION: "The licences that a json lists are kept."}
    VERSION = tfds.core.Version(VERSION)

    def __init__(self, *, classes: list[str], category_ids: list[int], streams: dict, **kwargs):
        self._classes = classes
        self._label = {category: label for label, category in enumerate(category_ids)}
        self._streams = streams
        super().__init__(**kwargs)

    def _info(self):
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

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(stream) for name, stream in self._streams.items()}

    def _generate_examples(self, stream):
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
                    "image/filename": image.file_name,
                    "image/id": image.id,
                    "objects": objects,
                },
            )


def clipped(bbox: list[float], width: int, height: int) -> tuple[float, float, float, float]:
    """Corners x1 y1 x2 y2 of a COCO box x y w h, clipped to the image."""
    x, y, w, h = (float(v) for v in bbox)
    return min(max(x, 0.0), width), min(max(y, 0.0), height), min(max(x + w, 0.0), width), min(max(y + h, 0.0), height)


def write(directory: Path, *, classes: list[str], category_ids: list[int], streams: dict[str, Iterable]) -> Path:
    """Write streams of (ImageRecord, encoded bytes) under `directory`; returns the TFDS directory of the records."""
    tfds.disable_progress_bar()  # the streams show a bar of their own
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself with print
        builder = Kdjax(
            classes=classes,
            category_ids=category_ids,
            streams=streams,
            data_dir=os.fspath(directory),
            file_format="array_record",
        )
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(compute_stats=tfds.download.ComputeStatsMode.SKIP)
        )
    return Path(builder.data_dir)


def decode(encoded: bytes) -> np.ndarray | None:
    """u8[h, w, 3] RGB of an encoded image (grey, CMYK and 16-bit ones too); None if it cannot be read."""
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), _DECODE)
    except cv2.error:  # no bytes, or a header with an impossible size
        return None


class Damaged(ValueError):
    """Prepared data that was whole when it was opened, but is not where it is read."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """Random access to the records of a split; picklable, opens its files where it is used."""

    parts: tuple[tuple[str, str], ...]  # TFDS directory and split; several come one after the other

    @functools.cached_property
    def _sources(self) -> list:
        with _OPENING:
            return [
                tfds.builder_from_directory(directory).as_data_source(
                    split=split, decoders={"image": tfds.decode.SkipDecoding()}
                )
                for directory, split in self.parts
            ]

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(len(source) for source in self._sources))

    @functools.cached_property
    def _classes(self) -> int:
        return len(self._sources[0].dataset_info.features["objects"]["label"].names)

    def __reduce__(self):
        return Reader, (self.parts,)

    def __len__(self) -> int:
        return self._ends[-1]

    def raw(self, index: int) -> dict:
        """The record as TFDS gives it, the image still encoded; VOC's, which have no id, are numbered from 1."""
        part = bisect.bisect(self._ends, index)
        try:
            record = self._sources[part][index - (self._ends[part - 1] if part else 0)]
        except Exception:  # TFDS and array_record raise this and that
            raise Damaged(
                f"record {index} of {self.parts[part][0]} cannot be read any more; prepare it anew."
            ) from None
        return {"image/id": index + 1} | record

    def __getitem__(self, index: int) -> dict:
        """Decoded example: image u8[h, w, 3] RGB, image_id, boxes f32[n, 4] x1 y1 x2 y2 px, labels i32[n].

        Crowd regions and VOC's difficult objects are left out: they are ground truth for evaluation, not something to
        train on. So is what cannot be used, which our own records do not have, but a stock directory may.
        """
        record = self.raw(index)
        image = decode(record["image"])
        if image is None:
            name, directory = record["image/filename"].decode(), self.parts[bisect.bisect(self._ends, index)][0]
            raise Damaged(f"image {name} of {directory} cannot be decoded any more; prepare it anew.")
        height, width = image.shape[:2]
        boxes, labels, crowd = objects_of(record, height, width)
        keep = ~crowd & (labels >= 0) & (labels < self._classes) & np.isfinite(boxes).all(-1)
        boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
        keep &= (boxes[:, 2:] > boxes[:, :2]).all(-1)
        return {
            "image": image,
            "image_id": int(record["image/id"]),
            "boxes": boxes[keep],
            "labels": labels[keep],
        }


def objects_of(record: dict, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All objects of a record of an image of that size, with whatever is wrong about them.

    VOC counts pixels from 1 and its boxes hold their last pixel: x1 and y1 are one less here.

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
