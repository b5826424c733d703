"""The results of a run: evaluations, models with their cards, detections and the report."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from kdjax import data, files, sharding, weights
from kdjax.evals import coco, complexity, voc
from kdjax.evals.matching import Truth, masks_by_image, truth_by_image
from kdjax.inference.predict import predict, traces
from kdjax.report import drawing, model_card
from kdjax.report import run as run_report
from kdjax.report.live import Progress
from kdjax.structs import Detections, PyTree
from kdjax.training import cluster, compiling
from kdjax.training.checks import check_programs
from kdjax.training.goodput import KINDS, Clock
from kdjax.training.log import Log
from kdjax.training.models import precision
from kdjax.training.provenance import environment
from kdjax.training.setup import Setup, model, onnx_of
from kdjax.training.step import TeacherVariables
from kdjax.training.teachers import gives_boxes, members, sitting_out, unlabelled_rows
from kdjax.weights.checkpoint import fingerprint

EXAMPLES = 8  # images in the report
COLUMNS = 4  # of the sheet of detections for trackers
REPORT = "report.html"


class Evaluation(NamedTuple):
    """A model on the validation split."""

    metrics: dict[str, float]  # COCO's 12, and those of masks where data and detector have them
    per_class: dict[str, float]  # class -> AP
    detections: dict[int, Detections]  # by image id, see `coco.collect`
    examples: list[drawing.Example]  # the first images of this host with objects, on the canvas


def evaluate(setup: Setup, roles: Sequence[str], clock: Clock, *, limit: int = 0) -> dict[str, Evaluation]:
    """Evaluates models on all devices; several hosts share the images, and all get all detections.

    Each image is decoded once for all models, or once for each way of resizing, where theirs differ. All hosts call
    this function.

    Args:
      setup: of the run.
      roles: each "twin", "student", or the `role` of a teacher.
      clock: told what is compilation.
      limit: number of validation images; 0 = all.

    Returns:
      The evaluations by role.
    """
    cluster.at("evaluates after")
    models = {role: _model(setup, role) for role in roles}
    new = [role for role, (detector, *_, run) in models.items() if run is None and not traces(detector)]
    with clock.during("compile"):
        compiling.compile_all(compiling.of_evaluation(setup, new))
    found: dict[str, tuple[dict[int, Detections], list[tuple[Any, int]]]] = {}
    for fit in dict.fromkeys(one[0].fit for one in models.values()):
        alike = {role: one for role, one in models.items() if one[0].fit == fit}
        found |= _detect(setup, alike, fit, limit)
    everyones = sharding.from_every_host({role: by_image for role, (by_image, _) in found.items()})
    truth = data.ground_truth(setup.dataset, "val", limit=limit or None)
    objects = truth_by_image(truth)
    evaluations = {}
    for role in roles:
        by_image, shown = {image: one for of_host in everyones for image, one in of_host[role].items()}, found[role][1]
        curves = coco.curves(truth, by_image)
        metrics = coco.metrics(curves) | coco.mask_metrics(truth, by_image)
        masks = masks_by_image(truth) if coco.has_masks(truth, by_image) else {}
        examples = [_example(role, batch, row, objects, masks, by_image) for batch, row in shown]
        evaluations[role] = Evaluation(metrics, coco.class_metrics(curves), by_image, examples)
    return evaluations


def _model(setup: Setup, role: str) -> tuple[Any, Any, Callable[..., Any] | None]:
    """The detector of a role, its variables on this host's devices, None; or an ONNX file, nothing, what runs it."""
    if file := onnx_of(setup, role):
        return file, ({}, {}), file.program
    detector, variables = model(setup, role)
    return detector, sharding.replicate(variables, sharding.mesh_of(jax.local_devices())), None


def _detect(
    setup: Setup, models: Mapping[str, tuple[Any, Any, Callable[..., Any] | None]], fit: str, limit: int
) -> dict[str, tuple[dict[int, Detections], list[tuple[Any, int]]]]:
    """This host's part of the images: its detections and first rows with objects, (batch, row), by role.

    The models see the same images.
    """
    config, dataset = setup.config, setup.dataset
    batches = data.eval_batches(
        dataset,
        "val",
        config.data,
        batch_size=config.eval.batch_size,
        limit=limit or None,
        fit=fit,
        shard=(jax.process_index(), jax.process_count()),
    )
    bar = tqdm(
        batches, desc=f"evaluate {', '.join(models)}", unit="batch", leave=False, disable=jax.process_index() > 0
    )
    streams = [
        predict(detector, variables, batches, run=run, category_ids=dataset.category_ids)
        for (detector, variables, run), batches in zip(models.values(), itertools.tee(bar, len(models)), strict=True)
    ]
    found: dict[str, dict[int, Detections]] = {role: {} for role in models}
    shown: list[tuple[Any, int]] = []
    for of_models in zip(*streams, strict=True):
        cluster.at("evaluates after")
        for role, pair in zip(models, of_models, strict=True):
            found[role] |= coco.collect([pair])
        batch = of_models[0][0]
        for row in np.flatnonzero(batch["real"] & batch["valid"].any(axis=1))[: EXAMPLES - len(shown)]:
            shown.append((batch, int(row)))
    return {role: (by_image, shown) for role, by_image in found.items()}


def _example(
    role: str,
    batch: Mapping[str, np.ndarray],
    row: int,
    objects: Mapping[int, Truth],
    masks: Mapping[int, Sequence[Any]],
    detections: Mapping[int, Detections],
) -> drawing.Example:
    """One image without the padding of the canvas, with its objects and detections."""
    height, width = batch["image_size"][row]
    scale = (batch["image_size"][row] / batch["original_size"][row])[[1, 0, 1, 0]]
    image_id = int(batch["image_id"][row])
    truth, found = objects[image_id], detections[image_id]
    real = ~truth.crowd
    return drawing.Example(
        image=batch["image"][row, :height, :width],
        boxes=truth.boxes[real] * scale,
        labels=truth.labels[real],
        detections={role: dataclasses.replace(found, boxes=(found.boxes * scale).astype(np.float32))},
        masks=[mask for mask, shown in zip(masks[image_id], real, strict=True) if shown] if masks else (),
    )


def finish(setup: Setup, workdir: Path, log: Log, clock: Clock) -> dict[str, Any]:
    """Evaluates all models, and writes everything that a finished run has.

    Args:
      setup: of the run, with the final states.
      workdir: the folder of the run.
      log: gets the final metrics.
      clock: of the run, for the report.

    Returns:
      The content of results.json apart from its hash: for "teacher", "twin" and "student" COCO's metrics with `params`
      and `flops`, or None; for "gain" the differences of student and twin, or None; for "voc", with VOC's data, its
      metrics by model; for "teachers", with several, the metrics of each by name. "teacher" is the best of them.
    """
    config, dataset = setup.config, setup.dataset
    image_size = tuple(config.data.image_size)
    detecting = [teacher for teacher in setup.teachers if teacher.detects]
    roles = setup.evaluated
    results: dict[str, Any] = dict.fromkeys(("teacher", "twin", "student", "gain"))
    failed: list[str] = []
    evaluations = evaluate(setup, roles, clock)
    cluster.at("writes the results of")
    for role in roles:
        counts = {}
        if not onnx_of(setup, role):
            detector, (params, _) = model(setup, role)
            counts = {"params": complexity.parameters(params), "flops": complexity.flops(detector, image_size)}
        results[role] = evaluations[role].metrics | counts
        with files.attempt(failed):
            log.write(config.steps, "eval", {f"{role}/{k}": v for k, v in evaluations[role].metrics.items()})
        if not jax.process_index():
            with files.attempt(failed):
                (workdir / "detections").mkdir(exist_ok=True)
                path = workdir / "detections" / f"{role.replace('/', '_')}.json"
                files.write_json(path, coco.results(evaluations[role].detections), indent=1)
                if role == "student":
                    log.image(config.steps, lambda: sheet(setup, evaluations["student"].examples))
    several = {teacher.name: results.pop(teacher.role) for teacher in detecting if teacher.name}
    if several:
        best = max(several, key=lambda name: several[name]["AP"])
        results |= {"teacher": several[best], "teachers": several}
        evaluations["teacher"] = evaluations.pop(f"teacher/{best}")
    if dataset.name == "voc" or dataset.source == "voc_folder":
        truth = data.ground_truth(dataset, "val")
        results["voc"] = {
            role: voc.voc_metrics(truth_by_image(truth), one.detections, len(dataset.classes))
            for role, one in evaluations.items()
        }
    if results["twin"]:
        results["gain"] = {
            name: results["student"][name] - results["twin"][name]
            if -1 not in (results["student"][name], results["twin"][name])
            else -1
            for name in evaluations["student"].metrics
            if name in results["twin"]
        }
    finals = {role: sharding.gather(model(setup, role)[1]) for role in setup.states}  # by all hosts
    if jax.process_index():
        return results
    # Results before the report; what cannot be written does not lose the rest.
    for role in setup.states:
        with files.attempt(failed):
            save_model(setup, role, finals[role], workdir / role, results, evaluations[role].metrics)
            if role == "student":
                log.model(workdir / role, evaluations[role].metrics)
    per_class = {role: evaluation.per_class for role, evaluation in evaluations.items()}
    with files.attempt(failed):
        files.write_json(workdir / "per_class.json", per_class, indent=1)
    with files.attempt(failed):
        files.write_json(workdir / "results.json", files.sealed(results), indent=1)  # if it exists, so do the models
    with files.attempt(failed):
        rows = log.rows()
        told = notes(setup, rows, log.damaged, log.missing)
        write_report(setup, workdir / REPORT, results, evaluations, rows, notes=told, seconds=clock.total())
    files.finish(failed)
    check_programs(setup)
    return results


def sheet(setup: Setup, examples: Sequence[drawing.Example]) -> np.ndarray | None:
    """u8[H, W, 3] RGB: validation images with what one model detects in them; None without images."""
    return drawing.detection_sheet(examples, setup.dataset.classes, COLUMNS) if examples else None


def save_model(
    setup: Setup,
    role: str,
    variables: PyTree,
    folder: Path,
    results: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> None:
    """Writes the weights of the student or the twin, with their model card.

    Args:
      setup: of the run.
      role: "student" or "twin".
      variables: its (params, stats), on the host.
      folder: for the files.
      results: of `finish`, for the card.
      metrics: of the model, stored with the weights.
    """
    config, dataset = setup.config, setup.dataset
    (params, stats), detector = variables, setup.student
    extra = {
        "data": config.data.source,
        "steps": config.steps,
        "seed": config.seed,
        "methods": sorted(setup.methods) if role == "student" else [],
        "category_ids": list(dataset.category_ids),
        "exif_orientation": config.data.exif_orientation,
        "metrics": dict(metrics),
    }
    weights.save(
        folder,
        detector,
        params,
        stats,
        classes=list(dataset.classes),
        image_size=tuple(config.data.image_size),
        extra=extra,
    )
    fingerprints = {role: fingerprint(TeacherVariables(params, stats))}
    fingerprints |= {teacher.role: teacher.hash for teacher in setup.teachers}
    text = model_card.card(
        role,
        student=setup.student.name,
        teachers={teacher.role: teacher.model for teacher in setup.teachers},
        dataset=dataset,
        config=ConfigDict(dict(config.items()) | {"dtype": precision(config)}),
        results=results,
        fingerprints=fingerprints,
        versions=environment(),
    )
    files.write_text(folder / "README.md", text)


def write_report(
    setup: Setup,
    path: Path,
    results: Mapping[str, Any],
    evaluations: Mapping[str, Evaluation],
    rows: Sequence[Mapping[str, Any]],
    *,
    notes: Sequence[str],
    seconds: Mapping[str, float],
    progress: Progress | None = None,
) -> None:
    """Writes report.html.

    Args:
      setup: of the run.
      path: the file.
      results: of `finish`, or those of an evaluation during training.
      evaluations: by role.
      rows: of the log.
      notes: see `notes`.
      seconds: where the time of the run went so far, by kind.
      progress: of a run that has not ended.
    """
    config, dataset = setup.config, setup.dataset
    shown = [evaluations[role].examples for role in ("teacher", "twin", "student") if role in evaluations]
    examples = [
        same[0]._replace(
            detections={role: found for one in same for role, found in one.detections.items()},
            masks=next((one.masks for one in same if one.masks), ()),
        )
        for same in zip(*shown, strict=True)
    ]
    run_report.write_report(
        path,
        title=f"{setup.student.name} on {dataset.name}, {' + '.join(setup.methods) or 'no teacher'}",
        results=results,
        rows=rows,
        per_class={role: evaluation.per_class for role, evaluation in evaluations.items()},
        examples=examples,
        class_names=list(dataset.classes),
        config_text=config.to_json(indent=2),
        notes=notes,
        seconds=seconds,
        meanings=KINDS,
        progress=progress,
    )


def without_labels(setup: Setup) -> str:
    """A sentence on the images without labels: how many, and which boxes they have."""
    config = setup.config
    assert setup.dataset.unlabelled is not None, "the run has none"
    told = f"Images without labels: {setup.dataset.unlabelled.size}, {unlabelled_rows(config)} in a batch beside "
    told += f"{config.batch_size} with labels; they have the terms of distillation alone. "
    if giver := gives_boxes(setup.teachers):
        score = config.data.unlabelled_score
        return f"{told}Methods that read boxes take the detections of {giver.named}, from score {score:g} on."
    out = sitting_out(setup.teachers, tuple(config.data.image_size))
    alone = f"; {', '.join(out)} reads boxes and sees none of these images" if out else ", and no method reads any"
    return f"{told}No teacher can give them boxes{alone}."


def notes(setup: Setup, rows: Sequence[Mapping[str, Any]], damaged: int, missing: int = 0) -> list[str]:
    """Sentences on the run for its report, and facts of the form "name: value".

    Args:
      setup: of the run.
      rows: of the log.
      damaged, missing: numbers of lines of the log that are not among the rows.
    """
    config, dataset = setup.config, setup.dataset
    seconds = sum({row["step"]: row["seconds"] for row in rows if row["kind"] == "train"}.values())
    lines = [
        f"Images: the first {EXAMPLES} of the validation split with objects, not selected by result.",
        "Metrics: COCO metrics of the moving-average weights on the whole validation split.",
    ]
    if "twin" in setup.states:
        lines.append("The twin has the student's initial weights and batches, but no teacher.")
    for teacher in setup.teachers:
        if members(teacher.settings(config)):
            lines.append(f"The {teacher.role} is the mean of the rows of {teacher.settings(config).mean}.")
        elif teacher.file:
            lines.append(f"The {teacher.role} is a file of detections on the training images; it is not evaluated.")
        elif not teacher.detects:
            boxes = teacher.detector.detects if teacher.on_host else True
            why = "has other classes than the data" if boxes else "finds no boxes"
            lines.append(f"The {teacher.role} {why}; only its maps are used, and it is not evaluated.")
    if any(teacher.name and teacher.detects for teacher in setup.teachers):
        lines.append("The teacher in tables and images is the best of the teachers by AP.")
    if dataset.unlabelled:
        lines.append(without_labels(setup))
    if config.eval.every and config.eval.limit:
        lines.append(
            f"AP during training: the first {config.eval.limit} validation images; the last value: all of them."
        )
    if damaged:
        lines.append(f"Lines of metrics.jsonl that are damaged and left out: {damaged}.")
    if missing:
        lines.append(f"Lines of metrics.jsonl that are missing: {missing}.")
    counts = {f"{role} data": data.counted_in_one_line(dataset, role, config.data) for role in dataset.splits}
    facts = counts | {"seed": str(config.seed), "training": f"{seconds / 60:.1f} min"} | environment()
    return lines + [f"{name}: {value}" for name, value in facts.items() if value]
