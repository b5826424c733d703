"""What of the data reaches training, and what does not and why: the same counts in every command and report."""

import collections
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from kdjax.data import records, transforms
from kdjax.data.dataset import Dataset, ground_truth
from kdjax.data.stages import Settings, Stage, canvas_size, read_stages
from kdjax.data.transforms import MIN_SIZE
from kdjax.errors import listed, printable

SHARED = "image that is, byte for byte, also in the training split"  # reasons
REPEATED = "image that is, byte for byte, another one of the split"


class Counts(NamedTuple):
    """Of one split."""

    images: int
    empty: int  # images without objects
    objects: int  # boxes that are trained on
    most: int  # in one image
    masks: int  # of the objects, those with a mask
    crowd: int  # regions of many objects, objects marked ignore, VOC's difficult objects
    other: dict[tuple[str, str], int]  # by action and reason: what was dropped, ignored, left out, repaired or noted

    @property
    def dropped(self) -> int:
        """Objects that were dropped because they cannot be used."""
        return sum(count for (action, _), count in self.other.items() if action == "dropped")


def count(dataset: Dataset, role: str, cfg: Settings) -> Counts:
    """Counts the images and objects of a split.

    Args:
      dataset: from `open_dataset`.
      role: 'train' or 'val'.
      cfg: `config.data`; read here: image_size, masks, augment and stage2.
    """
    split, truth = dataset.splits[role], ground_truth(dataset, role)
    objects = [entry for entry in truth["annotations"] if not entry["iscrowd"]]
    boxes = collections.Counter(entry["image_id"] for entry in objects)
    other = collections.Counter((entry["action"], entry["reason"]) for entry in split.log)
    others = split.part.others if split.part else 0
    other["left out", f"image after the first {split.size + others}, as limit says"] = split.beyond
    if role == "train":
        other["left out", "image that is held out to validate on, as holdout says"] = others
    over = sum(max(0, number - dataset.max_boxes) for number in boxes.values())
    other["left out", f"box over max_boxes={dataset.max_boxes} of an image, the smallest first"] = over
    masked = sum(bool(entry.get("segmentation")) for entry in objects)
    if cfg["masks"] and role == "train":
        other["left out", "object without mask, as masks=True needs"] = len(objects) - masked
    elif cfg["masks"] and masked:
        other["noted", "object without mask, which metrics of masks ignore"] = len(objects) - masked
    elif cfg["masks"]:
        other["noted", "object without mask: no object has one, so there are no metrics of masks"] = len(objects)
    if role == "train":
        other["left out", "box too small, less than a pixel on the canvas at every scale"] = _tiny(truth, cfg)
    elif "train" in dataset.splits:
        other["noted", SHARED] = len(split.contents & dataset.splits["train"].contents)
    other["noted", REPEATED] = split.size - len(split.contents)
    absent = set(dataset.category_ids) - {entry["category_id"] for entry in objects}
    names = [name for name, key in zip(dataset.classes, dataset.category_ids, strict=True) if key in absent]
    other["noted", f"class without objects: {listed(names)}"] = len(names)
    return Counts(
        images=len(truth["images"]),
        empty=len(truth["images"]) - len(boxes),
        objects=len(objects),
        most=max(boxes.values(), default=0),
        masks=masked,
        crowd=len(truth["annotations"]) - len(objects),
        other={key: number for key, number in sorted(other.items()) if number},
    )


def counted(dataset: Dataset, role: str, cfg: Settings) -> list[str]:
    """The counts of a split as text: a line of what is used, then one for each reason why something is not.

    Args:
      dataset, role, cfg: as for `count`.
    """
    counts = count(dataset, role, cfg)
    line = f"{role} ('{dataset.splits[role].name}'): {counts.images} images, {counts.empty} without objects, "
    line += f"{counts.objects} boxes, at most {counts.most} per image"
    if counts.masks:
        line += f", {counts.masks} with masks and {counts.objects - counts.masks} without"
    if counts.crowd:
        line += f", {counts.crowd} crowd regions or difficult objects (used in evaluation only)"
    return [line, *(f"{role}: {text}" for text in reasons(counts))]


def counted_in_one_line(dataset: Dataset, role: str, cfg: Settings) -> str:
    """`counted` as one line."""
    return "; ".join(line.removeprefix(f"{role}: ") for line in counted(dataset, role, cfg))


def reasons(counts: Counts, actions: Iterable[str] = ()) -> list[str]:
    """What was dropped, ignored, left out, repaired or noted, as '2 dropped: box has no extent'.

    Args:
      counts: from `count`.
      actions: only these; empty takes all.
    """
    chosen = set(actions) or {action for action, _ in counts.other}
    return [
        printable(f"{number} {action}: {reason}")
        for (action, reason), number in counts.other.items()
        if action in chosen
    ]


def _tiny(truth: Mapping[str, Any], cfg: Settings) -> int:
    """Objects that every crop drops, because even the largest scale leaves less than `MIN_SIZE` px of a side."""
    canvas, (stages, _) = canvas_size(cfg), read_stages(cfg)
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    ratios = {key: [_largest(size, canvas, stage) for stage in stages] for key, size in sizes.items()}
    count = 0
    for entry in truth["annotations"]:
        if not entry["iscrowd"]:
            height, width = sizes[entry["image_id"]]
            x0, y0, x1, y1 = records.clipped(entry["bbox"], width, height)
            sides = (min((y1 - y0) * y, (x1 - x0) * x) for y, x in ratios[entry["image_id"]])
            count += max(sides) < MIN_SIZE
    return count


def _largest(size: tuple[int, int], canvas: tuple[int, int], stage: Stage) -> tuple[float, float]:
    """The largest ratios, of height and width, at which `build.TrainBuilder` resizes an image (h, w)."""
    fit, resized = transforms.fitted(size, canvas)
    most = stage.augment["scale"][1]
    if not stage.augment["random_crop"]:
        most = min(most, 0.5 if stage.mosaic else 1.0)  # a Mosaic has twice the sides of the canvas
    if stage.mosaic:
        return most * resized[0] / size[0], most * resized[1] / size[1]
    resized = transforms.scaled(size, fit * most)  # at least 1 px a side
    return resized[0] / size[0], resized[1] / size[1]
