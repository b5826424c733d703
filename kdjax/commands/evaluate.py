"""`kdjax evaluate`: what a model finds and what it gets wrong, and the difference of two models."""

import collections
import itertools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from kdjax.data import coco as folders
from kdjax.data import records, scenes
from kdjax.evals import coco, complexity, tide
from kdjax.evals.matching import detections_by_image, truth_by_image
from kdjax.files import write_json, write_text
from kdjax.inference import model as models
from kdjax.report import evaluation

SCENES = 400  # images of the embedded validation split, as in a run


class Data(NamedTuple):
    """Images with boxes."""

    name: str
    truth: dict  # COCO instances
    read: Callable[[], Iterator[tuple[int, bytes]]]  # (image id, encoded image), in order

    def stream(self, only: Container[int] | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(image id, u8[h, w, 3] RGB) of all images in order, or of some ids."""
        return ((i, records.decode(encoded)) for i, encoded in self.read() if only is None or i in only)


def run(
    *,
    model: str,
    against: str | None,
    data: str,
    split: str,
    annotations: str,
    images: str,
    limit: int,
    out: str | None,
) -> int:
    """Evaluates a model and prints tables; with `out`, writes them as json and as a page, and the detections.

    Args:
      model: see `kdjax.inference.model.load`.
      against: another one, or None.
      data, split, annotations, images: see `open_data`.
      limit: only the first images; 0 takes all.
      out: a folder for evaluation.json, report.html, detections.json (COCO results) and, of the other model,
        detections_against.json; or None.

    Returns:
      Exit code 0.

    Raises:
      ValueError, FileNotFoundError: before any compute: no such model or data, a broken image, another class map.
    """
    loaded = {"model": models.load(model)} | ({"other": models.load(against)} if against else {})
    folder = models.check_out(out) if out else None
    given = open_data(data, split, annotations, images, limit)
    loaded = {name: fitted(one, given) for name, one in loaded.items()}
    found, results = {}, {}
    for name, one in loaded.items():
        pairs = models.detect(one, given.stream())
        bar = tqdm(pairs, total=len(given.truth["images"]), desc=f"evaluate {one.folder}", unit="image")
        found[name] = [row for _, rows in bar for row in rows]
        results[name] = analyse(given.truth, found[name]) | {
            "path": str(one.folder),
            "params": complexity.parameters(one.variables[0]),
            "flops": complexity.flops(one.detector, one.image_size),
        }
    print(table(results))
    if folder:
        write_json(folder / "evaluation.json", {"data": given.name, "split": split} | results)
        for name, rows in found.items():
            write_json(folder / f"detections{'' if name == 'model' else '_against'}.json", rows)
        kept = {}
        for name, rows in found.items():
            truth, found = truth_by_image(given.truth), detections_by_image(given.truth, rows)
            kept[name] = tide.without_crowd(truth, tide.above_threshold(truth, found, thresholds(results[name])))
        text = evaluation.page(results, data=given.name, truth=given.truth, stream=given.stream, kept=kept)
        write_text(folder / "report.html", text)
        print(f"\n{folder / 'report.html'}")
    return 0


def open_data(data: str, split: str, annotations: str, images: str, limit: int) -> Data:
    """Finds, reads and checks images and boxes; every image is decoded once.

    Args:
      data: "scenes", or a folder in COCO layout.
      split, annotations, images: as `config.data.val_split`, `val_annotations`, `val_images` of a run.
      limit: only the first images; 0 takes all.

    Raises:
      ValueError, FileNotFoundError: one sentence on what is wrong.
    """
    if limit < 0:
        raise ValueError(f"--limit={limit} must be a number of images, or 0 for all.")
    if data == "scenes":
        if split != "val" or annotations or images:
            raise ValueError("--data=scenes has no --split, --annotations or --images: it is the split val.")
        count = min(limit or SCENES, SCENES)
        pairs, categories, log = scenes.stream("val", count), dict(enumerate(scenes.CLASSES, start=1)), []
    else:
        if not Path(data).expanduser().is_dir():
            raise ValueError(f"--data={data}: there is no such folder (a folder in COCO layout, or the word scenes).")
        json_path, folder = folders.find(data, split, annotations=annotations, images=images)
        listed, categories, log = folders.check(folders.read(json_path), json_path.name)
        listed = listed[: limit or None]
        pairs, count = folders.stream(listed, folder, json_path.name, log), len(listed)
    seen = [image for image, _ in tqdm(pairs, total=count, desc=f"read {data}", unit="image")]
    truth = {
        "images": [{"id": p.id, "file_name": p.file_name, "width": p.width, "height": p.height} for p in seen],
        "annotations": [row for p in seen for row in p.annotations],
        "categories": [{"id": k, "name": categories[k]} for k in sorted(categories)],
    }
    if all(row["iscrowd"] for row in truth["annotations"]):
        raise ValueError(f"--data={data}: its {len(seen)} images hold no object, so nothing can be measured.")
    files = {image.file_name for image in seen}
    dropped = [entry["reason"] for entry in log if entry["action"] == "dropped" and entry["file"] in files]
    if dropped:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in collections.Counter(dropped).most_common())
        print(f"{len(dropped)} boxes of {data} are left out, as in training: {reasons}")
    if data == "scenes":
        return Data(data, truth, lambda: ((image.id, encoded) for image, encoded in scenes.stream("val", count)))
    paths = {image.id: folders.located(image.file_name, folder) for image in seen}
    return Data(data, truth, lambda: ((key, path.read_bytes()) for key, path in paths.items()))


def fitted(model: models.Model, data: Data) -> models.Model:
    """The model with the category ids of the data.

    Raises:
      ValueError: the class maps differ.
    """
    ids = {entry["name"]: entry["id"] for entry in data.truth["categories"]}
    if set(ids) != set(model.classes):
        unknown = [name for name in ids if name not in model.classes]
        missing = [name for name in model.classes if name not in ids]
        what = f"the data has {unknown[0]!r}" if unknown else f"the data lacks {missing[0]!r}"
        theirs, mine = (", ".join([*names][:6]) + ", …" * (len(names) > 6) for names in (ids, model.classes))
        raise ValueError(f"the class map of {model.folder} ({mine}) is not that of {data.name} ({theirs}): {what}.")
    return model._replace(category_ids=tuple(ids[name] for name in model.classes))


def analyse(truth: Mapping, detections: Sequence[Mapping]) -> dict:
    """All that is told of one model, ready for json.

    Args:
      truth: COCO instances.
      detections: COCO results.

    Returns:
      metrics: COCO's 12; classes: {name: AP, AP50, objects, threshold (see `tide.best_thresholds`), precision f[101]
      at IoU .5 and the recalls 0, 0.01 .. 1, or None without objects}; errors: {kind: {AP50: loss, count: at the best
      thresholds}}; confusion: at the best thresholds, rows and columns in the order of the classes, then background.
    """
    curves = coco.curves(truth, detections)
    objects, found = truth_by_image(truth), detections_by_image(truth, detections)
    num_classes = len(truth["categories"])
    outcomes = tide.outcomes(objects, found, num_classes)
    best = tide.best_thresholds(outcomes)
    kept = tide.above_threshold(objects, found, best)
    ap, ap50 = coco.class_metrics(curves), coco.class_metrics(curves, threshold=0.5)
    number = np.bincount(outcomes.object_labels, minlength=num_classes)
    classes = {}
    for k, name in enumerate(ap):
        line = curves.precision[0, :, k, 0, -1].tolist() if number[k] else None
        classes[name] = {"AP": ap[name], "AP50": ap50[name], "objects": int(number[k]), "threshold": best[k]}
        classes[name]["precision"] = line
    cost = tide.ap_cost(outcomes)
    counts = tide.error_counts(tide.outcomes(objects, kept, num_classes))
    return {
        "metrics": coco.metrics(curves),
        "classes": classes,
        "errors": {kind: {"AP50": cost[kind], "count": counts[kind]} for kind in tide.KINDS},
        "confusion": tide.confusion(objects, kept, num_classes).tolist(),
    }


def thresholds(result: Mapping) -> list[dict | None]:
    """The best thresholds of the classes, as `tide.above_threshold` takes them."""
    return [entry["threshold"] for entry in result["classes"].values()]


# ------------------------------------------------------------------------------------------------------------ tables


def table(results: Mapping[str, Mapping]) -> str:
    """The metrics as text for a terminal, in points of 100."""
    two = len(results) > 1
    head = ["AP in points of 100", *(Path(one["path"]).as_posix() for one in results.values())]
    rows = [head + ["difference"] * two]
    for name in coco.METRICS:
        rows.append([name, *_beside([one["metrics"][name] for one in results.values()])])
    for name in ("params", "flops"):
        rows.append([name, *(f"{one[name]:,}" for one in results.values())] + [""] * two)
    text = [models.aligned(rows)]
    for one in results.values():
        rows = [["class", "objects", "AP", "AP50", "best score", "precision", "recall"]]
        for label, entry in one["classes"].items():
            best = entry["threshold"] or {}
            at = f"{best['score']:.2f}" if best else "–"
            metrics = [_points(entry["AP"]), _points(entry["AP50"]), at]
            metrics += [_points(best.get(key)) for key in ("precision", "recall")]
            rows.append([label, str(entry["objects"]), *metrics])
        text.append((f"{one['path']}\n" if two else "") + models.aligned(rows))
    names = [f"{one['path']} " * two for one in results.values()]
    rows = [["kind of error"] + [f"{name}{word}" for name in names for word in ("costs AP50", "times")]]
    for kind in tide.KINDS:
        costs = [(_points(one["errors"][kind]["AP50"]), str(one["errors"][kind]["count"])) for one in results.values()]
        rows.append([kind, *itertools.chain(*costs)])
    return "\n\n".join([*text, models.aligned(rows)])


def _points(value: float | None) -> str:
    return "–" if value is None or value < 0 else f"{100 * value:.1f}"


def _beside(values: list[float]) -> list[str]:
    """The values, and of two the difference."""
    both = len(values) > 1 and min(values) >= 0
    difference = [f"{100 * (values[0] - values[1]):+.1f}" if both else "–"] if len(values) > 1 else []
    return [_points(value) for value in values] + difference
