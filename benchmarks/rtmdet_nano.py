"""OpenMMLab's RTMDet-nano for persons on photographs: its AP in kdjax, and that of its file in onnxruntime.

    python benchmarks/rtmdet_nano.py --weights=rtmdet_nano_person.onnx --data=DIR

DIR is a folder in COCO format with `annotations/instances_*.json`, `images/*` and the class person; all its splits are
read. The file does its own NMS (scores over 0.05, IoU 0.6, 100 boxes of an image): kdjax is run with these values, and
with its defaults. Needs `kdjax[export]`.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tqdm import tqdm

import kdjax
from kdjax.evals import coco
from kdjax.inference.model import Model
from kdjax.inference.predict import on_canvas, read_image
from kdjax.structs import Detections

OF_FILE = dict(score_threshold=0.05, iou_threshold=0.6, max_detections=100)
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="rtmdet_nano_person.onnx")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="only the first images by id")
    args = parser.parse_args(arguments)
    truth, paths = persons(args.data, args.limit)
    model = kdjax.load(args.weights, detector="rtmdet_nano", class_names=["person"])
    model = dataclasses.replace(model, category_ids=(truth["categories"][0]["id"],))
    decode = functools.partial(model.detector.decode, **OF_FILE)
    as_file = dataclasses.replace(model, detector=dataclasses.replace(model.detector, decode=decode))
    ways = {
        "onnxruntime, with the file's own NMS": of_runtime(args.weights, model, paths),
        "kdjax, with the file's thresholds": of_kdjax(as_file, paths),
        "kdjax": of_kdjax(model, paths),
    }
    print(f"| {len(paths)} images | {' | '.join(METRICS)} |\n|---|{'---|' * len(METRICS)}")
    for name, found in ways.items():
        rows = [row for i, one in tqdm(found, name, len(paths)) for row in coco.to_coco(one, i)]
        metrics = coco.coco_metrics(truth, rows)
        print(f"| {name} | {' | '.join(f'{100 * metrics[metric]:.2f}' for metric in METRICS)} |", flush=True)


def persons(folder: Path, limit: int | None) -> tuple[dict[str, Any], dict[int, Path]]:
    """COCO instances of the class person alone, and the files by image id, both by ascending id."""
    images, annotations, paths = [], [], {}
    for file in sorted((folder / "annotations").glob("instances_*.json")):
        read = json.loads(file.read_text())
        [category] = [entry for entry in read["categories"] if entry["name"] == "person"]
        images += read["images"]
        annotations += [entry for entry in read["annotations"] if entry["category_id"] == category["id"]]
        split = folder / "images" / file.stem.removeprefix("instances_")
        paths |= {entry["id"]: split / entry["file_name"] for entry in read["images"]}
    paths = {i: paths[i] for i in sorted(paths)[:limit]}
    kept = [entry | {"id": number} for number, entry in enumerate(annotations, 1) if entry["image_id"] in paths]
    chosen = [entry for entry in images if entry["id"] in paths]
    return {"images": chosen, "annotations": kept, "categories": [category]}, paths


def of_kdjax(model: Model, paths: dict[int, Path]) -> Iterator[tuple[int, Detections]]:
    """(image id, detections) in pixels of the image."""
    found = model.stream(map(read_image, paths.values()))
    return ((i, detections) for i, (_, detections) in zip(paths, found, strict=True))


def of_runtime(file: Path, model: Model, paths: dict[int, Path]) -> Iterator[tuple[int, Detections]]:
    """The same of the file itself, on canvases of kdjax."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for i, path in paths.items():
        image = read_image(path)
        canvas, placed = on_canvas(image, model.image_size, fit=model.detector.fit)
        x = np.asarray(model.detector.preprocess(canvas[None])).transpose(0, 3, 1, 2)
        rows, labels = (found[0] for found in session.run(["dets", "labels"], {"input": x}))
        rows = rows[labels >= 0]
        ratio = np.array(image.shape[1::-1] * 2) / np.tile(placed[::-1], 2)
        yield (
            i,
            Detections(
                boxes=rows[:, :4] * ratio,
                scores=rows[:, 4],
                labels=np.zeros(len(rows), np.int32),
                class_names=model.class_names,
                category_ids=model.category_ids,
            ),
        )


if __name__ == "__main__":
    main()
