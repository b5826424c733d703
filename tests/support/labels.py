"""Folders in YOLO's and VOC's layouts, written from a COCO dict for the tests."""

from pathlib import Path

import cv2
import numpy as np

Pixels = dict[str, np.ndarray]


def yolo_lines(truth: dict, *, digits: int = 6) -> dict[str, str]:
    """The text of each image's labels by file name, as converters write it: polygons where there is a mask of one."""
    numbers = {key: i for i, key in enumerate(sorted(c["id"] for c in truth["categories"]))}
    texts = {}
    for image in truth["images"]:
        width, height, lines = image["width"], image["height"], []
        for entry in (a for a in truth["annotations"] if a["image_id"] == image["id"]):
            x, y, w, h = entry["bbox"]
            values = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
            if entry.get("segmentation"):
                [ring] = entry["segmentation"]
                values = [v / (width, height)[i % 2] for i, v in enumerate(ring)]
            lines.append(" ".join([str(numbers[entry["category_id"]]), *(f"{v:.{digits}f}" for v in values)]))
        texts[image["file_name"]] = "\n".join(lines) + "\n" * bool(lines)
    return texts


def write_images(folder: Path, pixels: Pixels) -> None:
    """Images by file name."""
    for name, image in pixels.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(folder / name), image[:, :, ::-1])


def write_texts(folder: Path, texts: dict[str, str], suffix: str) -> None:
    """A file for each image, with another suffix."""
    for name, text in texts.items():
        path = (folder / name).with_suffix(suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def write_yolo(
    root: Path,
    splits: dict[str, dict],
    pixels: Pixels,
    *,
    images: str = "images/{}",
    labels: str = "labels/{}",
    yaml: str = "names: [cat, dog]\n",
    digits: int = 6,
) -> Path:
    """A YOLO folder of the images of each split; yaml "" writes no data.yaml."""
    for split, truth in splits.items():
        listed = {image["file_name"] for image in truth["images"]}
        write_images(root / images.format(split), {name: image for name, image in pixels.items() if name in listed})
        write_texts(root / labels.format(split), yolo_lines(truth, digits=digits), ".txt")
    if yaml:
        (root / "data.yaml").write_text(yaml)
    return root


def voc_texts(truth: dict) -> dict[str, str]:
    """The xml of each image by file name. VOC counts from 1 and includes the last pixel."""
    names = {c["id"]: c["name"] for c in truth["categories"]}
    texts = {}
    for image in truth["images"]:
        objects = ""
        for entry in (a for a in truth["annotations"] if a["image_id"] == image["id"]):
            x, y, w, h = entry["bbox"]
            corners = dict(xmin=x + 1, ymin=y + 1, xmax=x + w, ymax=y + h)
            box = "".join(f"<{tag}>{value:g}</{tag}>" for tag, value in corners.items())
            objects += f"<object>\n  <name>{names[entry['category_id']]}</name>\n"
            objects += f"  <difficult>{entry.get('iscrowd', 0)}</difficult>\n  <bndbox>{box}</bndbox>\n</object>\n"
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>"
        text = f"<annotation>\n<filename>{image['file_name']}</filename>\n{size}\n{objects}</annotation>\n"
        texts[image["file_name"]] = text
    return texts


def write_voc(root: Path, splits: dict[str, dict], pixels: Pixels) -> Path:
    """A year of VOCdevkit: JPEGImages, Annotations, ImageSets/Main/SPLIT.txt."""
    (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    for split, truth in splits.items():
        listed = [image["file_name"] for image in truth["images"]]
        write_images(root / "JPEGImages", {name: pixels[name] for name in listed})
        write_texts(root / "Annotations", voc_texts(truth), ".xml")
        lines = "".join(f"{Path(name).with_suffix('')}\n" for name in listed)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)
    return root
