"""The data of a run: objects that were dropped or are too small, classes without objects."""

import numpy as np

from kdjax import data
from kdjax.data.coco import CLIPPED
from kdjax.doctor.findings import FAULT, FINE, LOOK, Finding
from kdjax.training.setup import Setup

TINY = 4  # px on the canvas: the side of a box of half a cell of the finest level


def check_data(setup: Setup) -> list[Finding]:
    """What was dropped, objects too small for the canvas, classes without objects."""
    dataset, found = setup.dataset, []
    truth = data.ground_truth(dataset, "train")
    by_id = {image["id"]: image for image in truth["images"]}
    objects = [entry for entry in truth["annotations"] if not entry["iscrowd"]]
    for role, split in dataset.splits.items():
        dropped = sum(entry["action"] == "dropped" for entry in split.log)
        total = len(data.ground_truth(dataset, role)["annotations"]) + dropped
        clipped = sum(entry["reason"] == CLIPPED for entry in split.log)
        lost = max(dropped, clipped / 2)
        level = FAULT if lost > 0.2 * total else LOOK if lost > 0.05 * total else FINE
        said = f"{split.size} images, {dropped} of {total} objects dropped, {clipped} clipped to the image"
        if level != FINE:
            said += (
                ": --config.data.check=True lists them, and draws boxes, which must be x, y, width, height in pixels"
            )
        found.append(Finding(level, f"{role} data", said))
    canvas = np.array(setup.config.data.image_size)
    sides = [
        min(entry["bbox"][2:]) * min(canvas / (by_id[entry["image_id"]]["height"], by_id[entry["image_id"]]["width"]))
        for entry in objects
    ]
    tiny = float(np.mean(np.array(sides) < TINY)) if sides else 0.0
    advice = ": a larger config.data.image_size shows more of them" if tiny > 0.2 else ""
    said = f"{tiny:.0%} of the objects are under {TINY} px on the canvas of {canvas[0]}x{canvas[1]}{advice}"
    found.append(Finding(LOOK if tiny > 0.2 else FINE, "small objects", said))
    seen = {entry["category_id"] for entry in objects}
    absent = [n for n, key in zip(dataset.classes, dataset.category_ids, strict=True) if key not in seen]
    if absent:
        found.append(Finding(LOOK, "classes", f"no training image holds {', '.join(absent)}: it cannot be learned"))
    return found
