"""Small data sets for the tests, painted so that the true boxes can be read from the pixels."""

import contextlib
import io
import json
from pathlib import Path

import cv2
import numpy as np
from ml_collections import ConfigDict
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kdjax import data
from kdjax.training import config

COLOURS = ((250, 20, 20), (20, 250, 20), (30, 30, 250), (250, 240, 20))  # of the boxes of a painted image


def paint(height: int, width: int, boxes) -> np.ndarray:
    """A dark image with one filled rectangle a box (x1 y1 x2 y2, whole numbers), each in its own colour."""
    image = np.full((height, width, 3), 15, np.uint8)
    for (x0, y0, x1, y1), colour in zip(boxes, COLOURS, strict=False):
        image[y0:y1, x0:x1] = colour
    return image


def read_off(image: np.ndarray, colour) -> np.ndarray | None:
    """The box x1 y1 x2 y2 around the pixels of about one of `COLOURS`; None if there are none."""
    ys, xs = np.nonzero(np.abs(image.astype(int) - colour).max(-1) < 110)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) if len(xs) else None


def coco_json(sizes, annotations, categories=((3, "cat"), (11, "dog"))) -> dict:
    """An instances dict: sizes {file name: (height, width)}, annotations (image, category, bbox, extra fields)."""
    return {
        "images": [
            dict(id=10 + i, file_name=name, height=h, width=w) for i, (name, (h, w)) in enumerate(sizes.items())
        ],
        "annotations": [
            dict(id=1 + i, image_id=10 + image, category_id=category, bbox=bbox) | extra
            for i, (image, category, bbox, extra) in enumerate(annotations)
        ],
        "categories": [dict(id=key, name=name) for key, name in categories],
    }


def write_folder(root: Path, splits: dict[str, dict], pixels: dict[str, np.ndarray], *, images="images/{}") -> Path:
    """A folder in COCO layout; `pixels` by file name are written for every split that lists them."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, truth in splits.items():
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(truth))
        folder = root / images.format(split)
        folder.mkdir(parents=True, exist_ok=True)
        for name in {entry.get("file_name") for entry in truth["images"]} & set(pixels):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(folder / name), pixels[name][:, :, ::-1])
    return root


def small_folder(root: Path, *, count: int = 11, masks: bool = False) -> Path:
    """`count` painted images in train, 3 in val; image i is (40 + i) x (60 - i) with i % 4 boxes, masks as polygons."""
    pixels, sizes, annotations = {}, {}, []
    for i in range(count):
        boxes = [(2 + 14 * j, 5 + i, 12 + 14 * j, 25 + i) for j in range(i % 4)]
        name = f"p{i}.png"
        pixels[name] = paint(40 + i, 60 - i, boxes)
        sizes[name] = (40 + i, 60 - i)
        for j, (x0, y0, x1, y1) in enumerate(boxes):
            extra = {"segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]]} if masks else {}
            annotations.append((i, (3, 11)[j % 2], [x0, y0, x1 - x0, y1 - y0], extra))
    train = coco_json(sizes, annotations)
    val = coco_json(dict(list(sizes.items())[:3]), [a for a in annotations if a[0] < 3])
    return write_folder(root, {"train": train, "val": val}, pixels)


def settings(cache: Path, **changes) -> ConfigDict:
    """The defaults of `config.data` with `changes`, on a small canvas; `augment` changes single entries."""
    cfg = config.base().data
    cfg.update(dict(source="coco_folder", cache=str(cache), scenes_train=6, scenes_val=3, image_size=(48, 64)))
    cfg.augment.update(dict(scale=(0.6, 1.6)) | changes.pop("augment", {}))
    cfg.update({key: str(value) if isinstance(value, Path) else value for key, value in changes.items()})
    return cfg


def opened(root: Path | str, tmp_path: Path, splits=("train", "val"), **changes) -> data.Dataset:
    """The data set at `root`, prepared under `tmp_path`."""
    return data.open_dataset(settings(tmp_path / "cache", root=root, **changes), splits)


def one_split(root: Path, truth: dict, pixels: dict[str, np.ndarray], **kwargs) -> Path:
    """A folder whose train and val are the same."""
    return write_folder(root, {"train": truth, "val": truth}, pixels, **kwargs)


def perfect_ap(truth: dict) -> float:
    """pycocotools' AP of the ground truth given back as detections."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        ground.dataset = json.loads(json.dumps(truth))
        ground.createIndex()
        found = [
            dict(image_id=a["image_id"], category_id=a["category_id"], bbox=a["bbox"], score=1.0)
            for a in truth["annotations"]
            if not a["iscrowd"]
        ]
        evaluation = COCOeval(ground, ground.loadRes(found), "bbox")
        evaluation.params.maxDets = [1, 10, 1000]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    return float(precision[precision > -1].mean())
