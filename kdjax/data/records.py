"""Prepared data on disk: encoded pictures in array_record files, written and read by TFDS without TensorFlow.

Our own builder writes the feature spec of TFDS's `coco/2017`, so that one reader serves our own records and a prepared
stock directory alike.
"""

import contextlib
import dataclasses
import functools
import io
import os
import threading
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import tensorflow_datasets as tfds

VERSION = "1.0.1"  # of what the builder writes; part of every cache key

_DECODE = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION  # boxes refer to the stored pixels, not to EXIF's view


@dataclasses.dataclass(kw_only=True)
class Picture:
    """One picture of a data set: what a record holds apart from the encoded bytes."""

    id: int
    file_name: str
    width: int
    height: int
    # As in COCO's json, original pixels: id, category_id, bbox (x y w h), area, iscrowd, and what else the json had.
    annotations: list[dict] = dataclasses.field(default_factory=list)


class Kdjax(tfds.core.GeneratorBasedBuilder):
    """Writes (picture, encoded bytes) streams as array_record files."""

    RELEASE_NOTES = {VERSION: "Odd values of iscrowd and area are repaired."}
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
        # Records stay in the order of the json: `limit` then means the first pictures of the file.
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(stream) for name, stream in self._streams.items()}

    def _generate_examples(self, stream):
        for index, (picture, encoded) in enumerate(stream):
            objects = []
            for annotation in picture.annotations:
                x0, y0, x1, y1 = clipped(annotation["bbox"], picture.width, picture.height)
                objects.append(
                    {
                        "area": float(annotation["area"]),
                        "bbox": tfds.features.BBox(
                            ymin=y0 / picture.height,
                            xmin=x0 / picture.width,
                            ymax=y1 / picture.height,
                            xmax=x1 / picture.width,
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
                    "image/filename": picture.file_name,
                    "image/id": picture.id,
                    "objects": objects,
                },
            )


def clipped(bbox: list[float], width: int, height: int) -> tuple[float, float, float, float]:
    """Corners x1 y1 x2 y2 of a COCO box x y w h, clipped to the picture."""
    x, y, w, h = (float(v) for v in bbox)
    return min(max(x, 0.0), width), min(max(y, 0.0), height), min(max(x + w, 0.0), width), min(max(y + h, 0.0), height)


def write(directory: Path, *, classes: list[str], category_ids: list[int], streams: dict[str, Iterable]) -> Path:
    """Write streams of (Picture, encoded bytes) under `directory`; returns the TFDS directory of the records."""
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
    """u8[h, w, 3] RGB of an encoded picture (grey, CMYK and 16-bit ones too); None if it cannot be read."""
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), _DECODE)
    except cv2.error:  # no bytes, or a header with an impossible size
        return None


@dataclasses.dataclass(frozen=True)
class Reader:
    """Random access to the records of one split; picklable, opens its files where it is used."""

    directory: str  # TFDS directory
    split: str

    @functools.cached_property
    def _source(self):
        with _OPENING:
            builder = tfds.builder_from_directory(self.directory)
            return builder.as_data_source(split=self.split, decoders={"image": tfds.decode.SkipDecoding()})

    def __reduce__(self):
        return Reader, (self.directory, self.split)

    def __len__(self) -> int:
        return len(self._source)

    def raw(self, index: int) -> dict:
        """The record as TFDS gives it, the picture still encoded."""
        return self._source[index]

    def __getitem__(self, index: int) -> dict:
        """Decoded example: image u8[h, w, 3] RGB, image_id, boxes f32[n, 4] x1 y1 x2 y2 px, labels i32[n].

        Crowd regions are left out: they are ground truth for evaluation, not something to train on.
        """
        record = self.raw(index)
        image = decode(record["image"])
        if image is None:
            name = record["image/filename"].decode()
            raise ValueError(f"picture {name} of {self.directory} cannot be decoded any more; delete that folder.")
        height, width = image.shape[:2]
        objects = record["objects"]
        boxes = np.asarray(objects["bbox"], np.float32).reshape(-1, 4)[:, [1, 0, 3, 2]]
        # Our own records have no box without extent, a stock directory may.
        keep = ~np.asarray(objects["is_crowd"], bool).reshape(-1) & (boxes[:, 2:] > boxes[:, :2]).all(-1)
        return {
            "image": image,
            "image_id": int(record["image/id"]),
            "boxes": (boxes * np.array([width, height, width, height], np.float32))[keep],
            "labels": np.asarray(objects["label"], np.int32).reshape(-1)[keep],
        }


_OPENING = threading.Lock()
