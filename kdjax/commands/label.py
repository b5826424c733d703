"""`kdjax label`: a model's detections as labels of images that have none, in COCO's layout."""

import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from faster_coco_eval.core import mask as rle
from tqdm import tqdm

from kdjax import files
from kdjax.commands import arguments, evaluate
from kdjax.commands.predict import LABELS, find, is_labels, is_video
from kdjax.data.images import SUFFIXES, is_image
from kdjax.errors import NAME, UserError, prefix, printable
from kdjax.evals import coco, tide
from kdjax.evals.matching import truth_by_image
from kdjax.inference.model import BATCH, Model
from kdjax.inference.predict import read_image
from kdjax.report import drawing
from kdjax.structs import Detections

SHOWN, COLUMNS = 12, 4  # images of the preview, and how many are beside each other


class Threshold(NamedTuple):
    """The lowest score of a class that becomes a label, and how right it was on labelled images."""

    score: float
    precision: float | None = None  # of the detections from this score on; None: not measured
    recall: float | None = None


def run(
    *,
    model: str,
    data: str,
    out: str,
    threshold: float | None,
    labelled: str | None,
    split: str,
    annotations: str,
    images: str,
    limit: int,
    precision: float | None,
    exif: str | None,
    classes: str = "",
) -> int:
    """Detects objects in a folder of images, and writes those with high enough scores as a COCO instances json.

    Images in which no object is sure enough are left out: that nothing was found does not mean that nothing is there.
    Beside the json, `NAME.png` shows some images with their labels.

    Args:
      model: see `kdjax.inference.load`.
      data: the folder of images, with those below it; names in the json are relative to it.
      out: the json to write.
      threshold: lowest score, 0 .. 1, for all classes; None: chosen on `labelled`.
      labelled: labelled data on which the threshold of each class is chosen; see `arguments.open_data`, also for
        split, annotations, images, limit and classes.
      split, annotations, images, limit, classes: of `labelled`.
      precision: the threshold is the lowest from which on at least this share of the detections of a class is correct
        (IoU 0.5), 0 .. 1; None: the one with the largest F1.
      exif: "stored" or "upright"; None: as the model was trained.

    Returns:
      Exit code: 0, or 2 if an image could not be read.

    Raises:
      UserError: before any compute: there are no images, no such model or data, or not exactly one of `threshold` and
        `labelled`. Later: no class can be labelled, or nothing was found.
    """
    if (threshold is None) == (labelled is None):
        raise UserError("--threshold, --labelled: give one of them: a score for all classes, or labelled data")
    for flag, value in (("--threshold", threshold), ("--precision", precision)):
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"{flag} must be in 0 .. 1, not {value}")
    if precision is not None and labelled is None:
        raise UserError("--precision is measured on labelled data: give --labelled too")
    if labelled is None:
        arguments.refuse_without(
            "--labelled", split=split, annotations=annotations, images=images, limit=limit, classes=classes
        )
    folder, file = Path(data).expanduser(), arguments.output_file(out)
    if file.exists() and not is_labels(file):
        raise UserError(f"--out: {out} is there, and `kdjax label` did not write it: choose another file")
    preview = file.with_name(f"{file.stem}.png")
    if preview == file:
        raise UserError(f"--out: {out} is the name of the preview beside the labels: name it {file.stem}.json")
    if preview.exists() and not file.exists():
        raise UserError(f"--out: {preview.name}, the preview beside {out}, would replace an image: choose another name")
    files.check_outputs("--out", file.parent, files=[preview.name])
    if not folder.is_dir():
        raise UserError(f"--data: there is no folder {data}")
    with prefix("--data"):
        found_files = [path for path, _ in find([data], file) if _readable(path) and not _same(path, preview)]
    if not found_files:
        raise UserError(f"--data: {data} has no images ({', '.join(SUFFIXES)})")
    loaded = arguments.load_model(model)
    exif = exif or loaded.exif_orientation
    if labelled is None:
        assert threshold is not None
        thresholds: list[Threshold | None] = [Threshold(threshold)] * len(loaded.class_names)
    else:
        where = (labelled, split, annotations, images, limit, exif)
        opened = arguments.open_data(*where, classes=classes, flag="--labelled")
        loaded = arguments.match_classes(loaded, opened, "--labelled")
        thresholds = chosen(loaded, opened, precision)
    if not any(thresholds):
        wanted = "correct" if precision is None else f"right in {precision:.0%} of the cases"
        raise UserError(f"--labelled={labelled}: no class of {model} has detections that are {wanted} at any score")

    minimum = np.array([np.inf if one is None else one.score for one in thresholds])
    entries: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    shown: list[tuple[np.ndarray, Detections]] = []
    every = max(len(found_files) // SHOWN, 1)
    seen, unreadable = np.zeros(len(minimum), int), 0

    def read() -> Iterator[tuple[Path, np.ndarray]]:
        nonlocal unreadable
        for path in found_files:
            try:
                yield path, read_image(path, exif=exif, warn=_warn)
            except UserError as error:
                unreadable += 1
                _warn(str(error))

    ahead, named = itertools.tee(read())
    stream = loaded.stream((image for _, image in ahead), batch_size=min(BATCH, len(found_files)))
    bar = tqdm(stream, desc="label", total=len(found_files), unit="image")
    for number, ((path, _), (image, found)) in enumerate(zip(named, bar, strict=False)):
        seen += np.bincount(found.labels, minlength=len(seen))
        kept = found[found.scores >= minimum[found.labels]]
        if not len(kept):
            continue
        height, width = image.shape[:2]
        entry = {"id": len(entries) + 1, "file_name": str(path.relative_to(folder)), "width": width, "height": height}
        entries.append(entry)
        rows += annotations_of(kept, entry, len(rows) + 1)
        if len(shown) < SHOWN and number >= len(shown) * every:
            shown.append((image, kept))
    if not rows:
        raise UserError(f"--data: {data}: no object in {len(found_files)} images has a score that is high enough")
    categories = [{"id": k, "name": name} for k, name in zip(loaded.category_ids, loaded.class_names, strict=True)]
    info = {"description": f"{LABELS} {loaded.path}", "exif_orientation": exif}
    files.write_json(file, {"info": info, "images": entries, "annotations": rows, "categories": categories})
    print(table(loaded, thresholds, seen, rows))
    left_out = len(found_files) - unreadable - len(entries)
    print(f"\n{file}: {len(rows)} objects in {len(entries)} images; {left_out} images without one are left out")
    failed: list[str] = []
    with files.attempt(failed):
        draw(preview, shown, loaded.class_names)
        print(preview)
    files.finish(failed)
    return 2 if unreadable else 0


def chosen(model: Model, opened: arguments.Data, precision: float | None) -> list[Threshold | None]:
    """The threshold of each class of the model, from what it finds in labelled data.

    Args:
      model: with the category ids of the data.
      opened: the data.
      precision: see `run`.

    Returns:
      In the order of the model's classes; None: no threshold is good enough, or no detection is correct.
    """
    detections, truth = evaluate.detect(model, opened), truth_by_image(opened.truth)
    outcomes = tide.outcomes(truth, detections, len(model.class_names))
    best = tide.best_thresholds(outcomes, precision=precision)
    found = [one and Threshold(one["score"], one["precision"], one["recall"]) for one in best]
    order = np.argsort(model.category_ids)  # `evaluate.detect` has the classes by category id
    return [found[place] for place in np.argsort(order)]


def annotations_of(found: Detections, image: Mapping[str, Any], first: int) -> list[dict[str, Any]]:
    """Detections as COCO annotations, with their scores; boxes are clipped to the image.

    Args:
      found: of the image.
      image: its entry in COCO's `images`.
      first: id of the first annotation.
    """
    rows = coco.to_coco(found, image["id"])
    for place, row in enumerate(rows):
        x, y, width, height = row["bbox"]
        left, top = max(x, 0.0), max(y, 0.0)
        width, height = min(x + width, image["width"]) - left, min(y + height, image["height"]) - top
        area = width * height if found.masks is None else float(rle.area(found.masks[place]))
        row |= {"id": first + place, "bbox": [left, top, width, height], "area": area, "iscrowd": 0}
    return rows


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def table(
    model: Model, thresholds: Sequence[Threshold | None], seen: np.ndarray, rows: Sequence[Mapping[str, Any]]
) -> str:
    """What was kept of each class, as text for a terminal."""
    kept = dict.fromkeys(model.category_ids, 0)
    for row in rows:
        kept[row["category_id"]] += 1
    lines = [["class", "threshold", "precision", "recall", "detections", "kept"]]
    for k, (category, name) in enumerate(zip(model.category_ids, model.class_names, strict=True)):
        one = thresholds[k]
        numbers = ["–"] * 3 if one is None else [_share(value) for value in one]
        lines.append([printable(name, NAME), *numbers, str(seen[k]), str(kept[category])])
    return arguments.aligned(lines)


def draw(file: Path, shown: Sequence[tuple[np.ndarray, Detections]], class_names: Sequence[str]) -> None:
    """Writes a sheet of images with their labels."""
    images, found = zip(*shown, strict=True)
    masks = [one.masks or () for one in found]
    sheet = drawing.contact_sheet(
        images, [one.boxes for one in found], [one.labels for one in found], class_names, COLUMNS, masks=masks
    )
    encoded, content = cv2.imencode(".png", np.ascontiguousarray(sheet[:, :, ::-1]))
    assert encoded, "OpenCV writes PNG"
    files.write_bytes(file, content.tobytes())


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _readable(path: Path) -> bool:
    return not is_video(path) and (path.suffix.lower() in SUFFIXES or is_image(path))


def _warn(message: str) -> None:
    tqdm.write(f"kdjax: {printable(message)}", file=sys.stderr)
