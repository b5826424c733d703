"""Checks of the data: dropped objects, tiny objects, and classes without objects."""

import numpy as np

from kdjax import data
from kdjax.data.coco import CLIPPED
from kdjax.data.images import NOT_TURNED
from kdjax.doctor.findings import ERROR, OK, WARNING, Finding
from kdjax.errors import listed
from kdjax.training.setup import Setup

TINY = 4  # shorter side of a tiny object on the canvas in pixels: half a cell of the finest level


def check_data(setup: Setup) -> list[Finding]:
    """Checks how many objects were dropped or clipped, how many are tiny, and which classes have none."""
    dataset, findings = setup.dataset, []
    for role in dataset.splits:
        counts = data.count(dataset, role, setup.config.data)
        total = counts.objects + counts.crowd + counts.dropped
        lost = max(counts.dropped, counts.other.get(("repaired", CLIPPED), 0) / 2)
        level = ERROR if lost > 0.2 * total else WARNING if lost > 0.05 * total else OK
        message = data.counted_in_one_line(dataset, role, setup.config.data)
        if level != OK:
            message += (
                ": --config.data.check=True lists them and draws boxes, which must be x, y, width, height in pixels"
            )
        findings.append(Finding(level, f"{role} data", message))
        turned = counts.other.get(("noted", NOT_TURNED))
        if turned:
            message = f"{turned} images: {NOT_TURNED}; config.data.exif_orientation=upright applies it"
            findings.append(Finding(WARNING, f"{role} orientation", message))
    truth = data.ground_truth(dataset, "train")
    images = {image["id"]: image for image in truth["images"]}
    objects = [entry for entry in truth["annotations"] if not entry["iscrowd"]]
    canvas = np.array(setup.config.data.image_size)
    sides = [
        min(entry["bbox"][2:]) * min(canvas / (images[entry["image_id"]]["height"], images[entry["image_id"]]["width"]))
        for entry in objects
    ]
    tiny = float(np.mean(np.array(sides) < TINY)) if sides else 0.0
    message = f"{tiny:.0%} of the objects are smaller than {TINY} px on the canvas of {canvas[0]}x{canvas[1]}"
    if tiny > 0.2:
        findings.append(Finding(WARNING, "small objects", f"{message}: increase config.data.image_size"))
    else:
        findings.append(Finding(OK, "small objects", message))
    present = {entry["category_id"] for entry in objects}
    absent = [n for n, key in zip(dataset.classes, dataset.category_ids, strict=True) if key not in present]
    if absent:
        message = f"no training image has objects of {listed(absent)}: these classes cannot be learned"
        findings.append(Finding(WARNING, "classes", message))
    return findings
