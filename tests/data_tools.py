"""Small data sets for the tests, painted so that the truth can be read off the pixels."""

import json
from pathlib import Path

import cv2
import numpy as np
from ml_collections import ConfigDict

COLOURS = ((250, 20, 20), (20, 250, 20), (30, 30, 250), (250, 240, 20))  # of the boxes of a painted image


def paint(height: int, width: int, boxes) -> np.ndarray:
    """A dark image with one filled rectangle a box (x1 y1 x2 y2, whole numbers), each in its own colour."""
    image = np.full((height, width, 3), 15, np.uint8)
    for (x0, y0, x1, y1), colour in zip(boxes, COLOURS, strict=False):
        image[y0:y1, x0:x1] = colour
    return image


def read_off(image: np.ndarray, colour) -> np.ndarray | None:
    """The box x1 y1 x2 y2 of the pixels that look like a colour of `COLOURS`; None if there are none."""
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


def small_folder(root: Path, *, count: int = 11) -> Path:
    """`count` painted images in train, 3 in val; image i is (40 + i) x (60 - i) with i % 4 boxes."""
    pixels, sizes, annotations = {}, {}, []
    for i in range(count):
        boxes = [(2 + 14 * j, 5 + i, 12 + 14 * j, 25 + i) for j in range(i % 4)]
        name = f"p{i}.png"
        pixels[name] = paint(40 + i, 60 - i, boxes)
        sizes[name] = (40 + i, 60 - i)
        annotations += [(i, (3, 11)[j % 2], [x0, y0, x1 - x0, y1 - y0], {}) for j, (x0, y0, x1, y1) in enumerate(boxes)]
    train = coco_json(sizes, annotations)
    val = coco_json(dict(list(sizes.items())[:3]), [a for a in annotations if a[0] < 3])
    return write_folder(root, {"train": train, "val": val}, pixels)


def settings(cache: Path, **changes) -> ConfigDict:
    """A `config.data` as train.py has it; `augment` replaces single entries."""
    augment = dict(flip=0.5, scale=(0.6, 1.6), crop=True, hsv=(5.0, 30.0, 30.0)) | changes.pop("augment", {})
    base = dict(
        source="coco_folder",
        root="",
        train_split="train",
        val_split="val",
        train_annotations="",
        val_annotations="",
        train_images="",
        val_images="",
        cache=str(cache),
        scenes_train=6,
        scenes_val=3,
        image_size=(48, 64),
        max_boxes=0,
        workers=0,
        limit=0,
        check=False,
        augment=augment,
    )
    return ConfigDict(base | {key: str(v) if isinstance(v, Path) else v for key, v in changes.items()})
