"""What a run leaves: evaluations, models, detections and the report."""

import collections
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from kdjax import data, files, weights
from kdjax.evals import coco, complexity, voc
from kdjax.evals.matching import detections_by_image, truth_by_image
from kdjax.report import drawing, model_card
from kdjax.report import run as run_report
from kdjax.structs import Detections
from kdjax.training.checkpoint import fingerprint
from kdjax.training.checks import check_programs
from kdjax.training.log import Log
from kdjax.training.provenance import environment
from kdjax.training.setup import Setup
from kdjax.training.step import Teacher, TrainState

EXAMPLES = 8  # images in the report


class Evaluation(NamedTuple):
    metrics: dict  # the 12 metrics of COCO
    per_class: dict  # class -> AP
    detections: list  # COCO results
    examples: list  # detections of the first images with objects, on the canvas


def ema(state: TrainState) -> tuple:
    """(params, stats) that are evaluated and handed out."""
    return state.ema["params"], state.ema["stats"]


def evaluate(setup: Setup, role: str, variables, *, limit: int = 0) -> Evaluation:
    """COCO's metrics on the validation split; the host works on a batch while the device computes the next."""
    config, dataset = setup.config, setup.dataset
    here = jax.local_devices()[0]
    variables = jax.tree.map(lambda leaf: jax.device_put(leaf.addressable_data(0), here), tuple(variables))
    found, examples, pending = [], [], collections.deque()

    def fetch():
        batch, output = pending.popleft()
        output = jax.device_get(output)
        found.extend(coco.to_coco(batch, output, dataset.category_ids))
        for row in np.flatnonzero(batch["real"] & batch["valid"].any(axis=1))[: EXAMPLES - len(examples)]:
            examples.append(example(batch, output, row))

    batches = data.eval_batches(
        dataset,
        "val",
        config.data,
        batch_size=config.eval.batch_size,
        limit=limit or None,
        round_down=(setup.teacher if role == "teacher" else setup.student).round_down,
    )
    for batch in tqdm(batches, desc=f"evaluate {role}", unit="batch", leave=False, disable=jax.process_index() > 0):
        output = setup.predict[role](variables, batch["image"], batch["image_size"])
        pending.append((batch, output))
        if len(pending) > 1:
            fetch()
    while pending:
        fetch()
    curves = coco.curves(data.ground_truth(dataset, "val", limit=limit or None), found)
    return Evaluation(coco.metrics(curves), coco.class_metrics(curves), found, examples)


def example(batch: dict, output, row: int) -> dict:
    """One image with its truth and detections, cut out of the canvas."""
    height, width = batch["image_size"][row]
    valid, kept = batch["valid"][row], output.valid[row]
    return {
        "image": batch["image"][row, :height, :width],
        "truth": {"boxes": batch["boxes"][row][valid], "labels": batch["labels"][row][valid]},
        "found": Detections(output.boxes[row][kept], output.scores[row][kept], output.labels[row][kept]),
    }


def finish(setup: Setup, workdir: Path, log: Log) -> dict:
    """Evaluates every model, and writes what the user takes away."""
    config, dataset = setup.config, setup.dataset
    hw = tuple(config.data.image_size)
    variables = {role: ema(state) for role, state in setup.states.items()}
    if setup.teacher_detects:
        variables["teacher"] = tuple(setup.variables)
    results = dict.fromkeys(("teacher", "twin", "student", "gain"))
    evaluations = {}
    for role in variables:
        detector = setup.teacher if role == "teacher" else setup.student
        evaluations[role] = evaluate(setup, role, variables[role])
        counts = {"params": complexity.parameters(variables[role][0]), "flops": complexity.flops(detector, hw)}
        results[role] = evaluations[role].metrics | counts
        log.write(config.steps, "eval", {f"{role}/{k}": v for k, v in evaluations[role].metrics.items()})
    check_programs(setup)
    if dataset.name == "voc":
        truth = data.ground_truth(dataset, "val")
        results["voc"] = {
            role: voc.voc_metrics(
                truth_by_image(truth), detections_by_image(truth, one.detections), len(dataset.classes)
            )
            for role, one in evaluations.items()
        }
    if results["twin"]:
        results["gain"] = {
            name: results["student"][name] - results["twin"][name]
            if -1 not in (results["student"][name], results["twin"][name])
            else -1
            for name in evaluations["student"].metrics
        }
    if jax.process_index():
        return results
    about = {"data": config.data.source, "steps": config.steps, "seed": config.seed, "methods": sorted(setup.methods)}
    about["category_ids"] = list(dataset.category_ids)
    for role in setup.states:
        params, stats = jax.device_get(variables[role])
        extra = about | {"metrics": evaluations[role].metrics} | ({"methods": []} if role == "twin" else {})
        weights.save(
            workdir / role, setup.student, params, stats, classes=list(dataset.classes), image_size=hw, extra=extra
        )
        fingerprints = {role: fingerprint(Teacher(params, stats))}
        if setup.teacher:
            fingerprints["teacher"] = fingerprint(setup.variables)
        text = model_card.card(
            role,
            student=setup.student.name,
            teacher=setup.teacher.name if setup.teacher else None,
            dataset=dataset,
            config=config,
            results=results,
            fingerprints=fingerprints,
            versions=environment(),
        )
        (workdir / role / "README.md").write_text(text, encoding="utf-8", errors="replace")
    (workdir / "detections").mkdir(exist_ok=True)
    for role, evaluation in evaluations.items():
        files.write_json(workdir / "detections" / f"{role}.json", evaluation.detections, indent=1)
    per_class = {role: evaluation.per_class for role, evaluation in evaluations.items()}
    files.write_json(workdir / "per_class.json", per_class, indent=1)
    examples = [
        drawing.Example(
            one["image"],
            one["truth"]["boxes"],
            one["truth"]["labels"],
            {r: evaluations[r].examples[i]["found"] for r in ("teacher", "twin", "student") if r in evaluations},
        )
        for i, one in enumerate(evaluations["student"].examples)
    ]
    method = " + ".join(setup.methods) or "no teacher"
    run_report.write_report(
        workdir / "report.html",
        title=f"{setup.student.name} on {dataset.name}, {method}",
        results=results,
        rows=log.rows(),
        per_class=per_class,
        examples=examples,
        class_names=list(dataset.classes),
        config_text=config.to_json(indent=2),
        notes=notes(setup, log.rows()),
    )
    files.write_json(workdir / "results.json", results, indent=1)  # last: where it is, everything is
    return results


def notes(setup: Setup, rows: list[dict]) -> list[str]:
    """Lines for the foot of the report."""
    config = setup.config
    seconds = sum({row["step"]: row["seconds"] for row in rows if row["kind"] == "train"}.values())
    lines = [
        f"Images: the first {EXAMPLES} of the validation split with objects, not selected by result.",
        "Metrics: COCO metrics of the moving-average weights on the whole validation split.",
    ]
    if "twin" in setup.states:
        lines.append("The twin has the student's initial weights and batches, but no teacher.")
    if config.eval.every and config.eval.limit:
        lines.append(
            f"AP during training: the first {config.eval.limit} validation images; the last value: all of them."
        )
    facts = {"seed": str(config.seed), "training": f"{seconds / 60:.1f} min"} | environment()
    return lines + [f"{name}: {value}" for name, value in facts.items() if value]
