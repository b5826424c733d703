"""`kdjax evaluate`: the metrics and the errors of a model, and the difference between two models."""

import contextlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kdjax import files
from kdjax.commands import arguments
from kdjax.errors import NAME, UserError, printable
from kdjax.evals import coco, complexity, tide
from kdjax.evals.matching import Truth, truth_by_image
from kdjax.inference.model import BATCH, Model
from kdjax.report import evaluation
from kdjax.structs import Detections

DETECTIONS = {"model": "detections.json", "other": "detections_against.json"}


def run(
    *,
    model: str,
    against: str | None,
    data: str,
    split: str,
    annotations: str,
    images: str,
    limit: int,
    exif: str | None,
    classes: str = "",
    out: str | None,
) -> int:
    """Evaluates a model and prints tables; with `out`, also writes them as json and HTML, and the detections.

    Args:
      model: see `kdjax.inference.load`.
      against: another one, or None.
      data: see `arguments.open_data`.
      split: the split of the data.
      annotations: the json, where it is not at its usual place.
      images: the images, where they are not at their usual place.
      limit: only the first images; 0 takes all.
      classes: see `arguments.open_data`.
      exif: see `arguments.open_data`; None: as the models were trained.
      out: a folder for evaluation.json, report.html, detections.json (COCO results) and, of the other model,
        detections_against.json; or None.

    Returns:
      Exit code 0.

    Raises:
      UserError: before any compute: no such model or data, a broken image, other classes.
    """
    models = {"model": arguments.load_model(model)}
    if against:
        models["other"] = arguments.load_model(against, "--against")
    named = ("evaluation.json", "report.html", *DETECTIONS.values())
    if out and all((Path(out).expanduser() / name).exists() for name in ("images.json", DETECTIONS["model"])):
        raise UserError(f"--out: {out} is the folder of a `kdjax predict`: choose another folder")
    folder = arguments.make_folder(out, outputs=named) if out else None
    exif = exif or arguments.exif_of(models.values())
    masks = any(one.detector.masks for one in models.values())
    opened = arguments.open_data(data, split, annotations, images, limit, exif, classes=classes, masks=masks)
    models = {name: arguments.match_classes(one, opened) for name, one in models.items()}
    found = detect_all(models, opened)
    results: dict[str, Any] = {}
    failed: list[str] = []
    if folder and not against:
        (folder / DETECTIONS["other"]).unlink(missing_ok=True)  # of an earlier evaluation
    for name, one in models.items():
        if folder:
            with files.attempt(failed):
                files.write_json(folder / DETECTIONS[name], coco.results(found[name]))
        results[name] = analyse(opened.truth, found[name]) | {
            "path": str(one.path),
            "params": complexity.parameters(one.variables[0]),
            "flops": complexity.flops(one.detector, one.image_size),
        }
    if folder:
        with files.attempt(failed):
            files.write_json(folder / "evaluation.json", {"data": opened.name, "split": split} | results)
    print(table(results))
    if folder:
        with files.attempt(failed):
            files.write_text(folder / "report.html", page(opened, found, results))
            print(f"\n{folder / 'report.html'}")
    files.finish(failed)
    return 0


def page(opened: arguments.Data, found: Mapping[str, Mapping[int, Detections]], results: Mapping[str, Any]) -> str:
    """The page of the results.

    Args:
      opened: the data.
      found: what `detect` returns, by name of the model.
      results: what `analyse` returns, by name of the model.
    """
    truth = truth_by_image(opened.truth)
    kept = {
        name: tide.without_crowd(truth, tide.above_threshold(truth, by_image, thresholds(results[name])))
        for name, by_image in found.items()
    }
    return evaluation.page(results, data=opened.name, truth=opened.truth, stream=opened.stream, kept=kept)


def detect(model: Model, opened: arguments.Data) -> dict[int, Detections]:
    """The detections of a model on all images of the data, by image id."""
    return detect_all({"model": model}, opened)["model"]


def detect_all(models: Mapping[str, Model], opened: arguments.Data) -> dict[str, dict[int, Detections]]:
    """The detections of models on all images of the data, by name and image id.

    Each image is decoded once for all models with the same canvas and way of resizing.
    """
    found: dict[str, dict[int, Detections]] = {name: {} for name in models}
    for canvas in dict.fromkeys((one.image_size, one.detector.fit) for one in models.values()):
        alike = {name: one for name, one in models.items() if (one.image_size, one.detector.fit) == canvas}
        first, *_ = alike.values()
        with contextlib.closing(opened.batches(first, batch_size=BATCH)) as batches:
            told = f"evaluate {', '.join(str(one.path) for one in alike.values())}"
            bar = tqdm(batches, total=-(-opened.split.size // BATCH), desc=told, unit="batch")
            tees = itertools.tee(bar, len(alike))
            streams = [one.predict(tee) for one, tee in zip(alike.values(), tees, strict=True)]
            for pairs in zip(*streams, strict=True):
                for name, pair in zip(alike, pairs, strict=True):
                    found[name] |= coco.collect([pair])
    return found


def analyse(truth: Mapping[str, Any], detections: Mapping[int, Detections]) -> dict[str, Any]:
    """The metrics, errors and confusions of one model, ready for json.

    Args:
      truth: COCO instances.
      detections: of each image, see `coco.collect`.

    Returns:
      metrics: COCO's 12, and those of masks (`coco.mask_metrics`); classes: {name: AP, AP50, objects, threshold (see
      `tide.best_thresholds`), precision f[101] at IoU .5 and the recalls 0, 0.01 .. 1, or None without objects};
      errors: {kind: {AP50: loss, count: at the best thresholds}}; where data and detector have masks, mask_errors: the
      same by the IoU of masks; confusion: at the best thresholds, rows and columns in the order of the classes, then
      background.
    """
    curves = coco.curves(truth, detections)
    objects = truth_by_image(truth)
    num_classes = len(truth["categories"])
    outcomes, best, kept, errors = _errors(objects, detections, num_classes)
    ap, ap50 = coco.class_metrics(curves), coco.class_metrics(curves, threshold=0.5)
    number = np.bincount(outcomes.object_labels, minlength=num_classes)
    classes = {}
    for k, name in enumerate(ap):
        line = curves.precision[0, :, k, 0, -1].tolist() if number[k] else None
        classes[name] = {"AP": ap[name], "AP50": ap50[name], "objects": int(number[k]), "threshold": best[k]}
        classes[name]["precision"] = line
    of_masks = {}
    if coco.has_masks(truth, detections):
        of_masks["mask_errors"] = _errors(truth_by_image(truth, masks=True), detections, num_classes)[-1]
    return {
        "metrics": coco.metrics(curves) | coco.mask_metrics(truth, detections),
        "classes": classes,
        "errors": errors,
        **of_masks,
        "confusion": tide.confusion(objects, kept, num_classes).tolist(),
    }


def _errors(
    objects: Mapping[int, Truth], detections: Mapping[int, Detections], num_classes: int
) -> tuple[tide.Outcomes, list[dict[str, float] | None], dict[int, Detections], dict[str, dict[str, float]]]:
    """Outcomes, the best thresholds, the detections above them, and what each kind of error costs and its number."""
    outcomes = tide.outcomes(objects, detections, num_classes)
    best = tide.best_thresholds(outcomes)
    kept = tide.above_threshold(objects, detections, best)
    cost, counts = tide.ap_cost(outcomes), tide.error_counts(tide.outcomes(objects, kept, num_classes))
    return outcomes, best, kept, {kind: {"AP50": cost[kind], "count": counts[kind]} for kind in tide.KINDS}


def thresholds(result: Mapping[str, Any]) -> list[dict[str, float] | None]:
    """The best thresholds of the classes, as `tide.above_threshold` takes them."""
    return [entry["threshold"] for entry in result["classes"].values()]


# ------------------------------------------------------------------------------------------------------------ tables


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The metrics as text for a terminal, in points of 100."""
    two = len(results) > 1
    head = ["AP in points of 100", *(Path(one["path"]).as_posix() for one in results.values())]
    rows = [head + ["difference"] * two]
    for name in (*coco.METRICS, *coco.MASK_METRICS):
        values = [one["metrics"].get(name, -1.0) for one in results.values()]
        if any(name in one["metrics"] for one in results.values()):
            rows.append([name.replace("_", " "), *_beside(values)])
    for name in ("params", "flops"):
        rows.append([name, *(f"{one[name]:,}" for one in results.values())] + [""] * two)
    text = [arguments.aligned(rows)]
    for one in results.values():
        rows = [["class", "objects", "AP", "AP50", "threshold", "precision", "recall"]]
        for label, entry in one["classes"].items():
            best = entry["threshold"] or {}
            at = f"{best['score']:.2f}" if best else "–"
            metrics = [_points(entry["AP"]), _points(entry["AP50"]), at]
            metrics += [_points(best.get(key)) for key in ("precision", "recall")]
            rows.append([printable(label, NAME), str(entry["objects"]), *metrics])
        text.append((f"{one['path']}\n" if two else "") + arguments.aligned(rows))
    names = [f"{one['path']} " * two for one in results.values()]
    for key, title in (("errors", "error"), ("mask_errors", "error of masks")):
        if not all(key in one for one in results.values()):
            continue
        rows = [[title] + [f"{name}{word}" for name in names for word in ("AP50 cost", "count")]]
        for kind in tide.KINDS:
            costs = [(_points(one[key][kind]["AP50"]), str(one[key][kind]["count"])) for one in results.values()]
            rows.append([kind, *itertools.chain(*costs)])
        text.append(arguments.aligned(rows))
    return "\n\n".join(text)


def _points(value: float | None) -> str:
    return "–" if value is None or value < 0 else f"{100 * value:.1f}"


def _beside(values: list[float]) -> list[str]:
    """The values, followed by their difference if there are two."""
    both = len(values) > 1 and min(values) >= 0
    difference = [f"{100 * (values[0] - values[1]):+.1f}" if both else "–"] if len(values) > 1 else []
    return [_points(value) for value in values] + difference
