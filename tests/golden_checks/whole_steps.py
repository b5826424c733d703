"""Replays `kd/crosskd_*.npz` and `kd/ld_*.npz` from the images on: both networks, the method, losses and gradients.

The terms come out of `Distiller`, as in the trainer.
"""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import methods
from kdjax.boxes import coding
from kdjax.detectors import api, build, dense
from kdjax.distill import Distiller
from kdjax.structs import targets_of as targets_of_batch
from kdjax.training import step
from kdjax.weights import fill
from tests.golden_checks.api import Check, Checks, below, load, relative_error
from tests.golden_checks.dense import LOSSES, in_torch, options_of
from tests.golden_checks.model import QUICK, nhwc, targets_of


def detector_of(config: dict) -> api.Detector:
    """The detector of a configuration; its `preprocess` changes nothing, as the files' images are normalised."""
    name, classes, options = options_of(config)
    return dataclasses.replace(build(name, classes, **options), preprocess=lambda x: x)


def crosskd(path: Path) -> Checks:
    arrays, meta = load(path)
    config, kind = meta["kd_cfg"], meta["student_cfg"]["type"]
    chosen = {
        "crosskd": methods.build(
            "crosskd",
            rectify=True,  # the published code's ReLU works in place
            class_weight=config["loss_cls_kd"]["loss_weight"],
            box_weight=config["loss_reg_kd"]["loss_weight"],
            quality_weight=config["loss_center_kd"]["loss_weight"] if "loss_center_kd" in config else 0.0,
            box_loss="log_iou" if config["loss_reg_kd"]["type"] == "IoULoss" else "giou",
        ),
        "pkd": methods.build("pkd", weight=config["loss_feat_kd"]["loss_weight"], ddof=1),
    }
    terms = {
        "crosskd/classes": "loss_cls_kd",
        "crosskd/boxes": "loss_reg_kd",
        "crosskd/quality": "losses_center_kd",
        "pkd/correlation": "loss_feat_kd",
    }
    yield from whole_step(arrays, meta, chosen, terms, by_centreness=kind == "FCOS")


def ld(path: Path) -> Checks:
    arrays, meta = load(path)
    config = meta["loss_ld"]
    options = {"main_weight": config["loss_weight"], "temperature": config["T"], "normalizer": "sum"}
    chosen = {"ld": methods.build("ld", region_weight=0.0, class_weight=0.0, **options)}
    yield from whole_step(arrays, meta, chosen, {"ld/main": "loss_ld"})


def whole_step(arrays, meta, chosen: dict, terms: dict[str, str], *, by_centreness: bool = False) -> Checks:
    """`terms`: kdjax's name of a term -> the reference's loss; `by_centreness`: divide CrossKD's terms as FCOS does."""
    student, teacher = (detector_of(meta[f"{who}_cfg"]) for who in ("student", "teacher"))
    params, stats = fill.from_torch(student, below(arrays, "student"))
    frozen = step.TeacherVariables(*fill.from_torch(teacher, below(arrays, "teacher")))
    batch = {"image": nhwc(arrays["input"])} | targets_of(arrays)._asdict()
    points = student.priors(arrays["input"].shape[2:])[:, :2]
    key = jax.random.key(0)
    distiller = Distiller(student, teacher, chosen)
    adapters = distiller.init(key, batch["image"].shape[1:3])
    if jax.tree.leaves(adapters):
        raise ValueError("the networks are not equally wide")

    def run(params, stats, frozen, batch):
        def total(params):
            output, _ = student.apply(params, stats, batch["image"], train=True)
            targets = targets_of_batch(batch)
            assignment = student.assign(output, targets)
            losses = student.loss(output, targets, assignment)
            distilled = distiller.terms(adapters, output, batch, tuple(frozen), assignment=assignment, key=key)
            weights = distiller.weights(0)
            values = {terms[name]: weights[name] * value for name, value in distilled.items()}
            positives = dense.positives_of_images(assignment)
            if by_centreness:
                central = coding.centreness(coding.boxes_to_distance(points, assignment.boxes))
                ratio = positives / jnp.sum(jnp.where(assignment.positive, central, 0.0))
                values |= {name: values[name] * ratio for name in ("loss_cls_kd", "loss_reg_kd")}
            losses = {LOSSES[name]: value for name, value in losses.items()} | values
            return sum(losses.values()), (losses, positives)

        return jax.grad(total, has_aux=True)(params)

    gradient, (losses, positives) = jax.device_get(jax.jit(run, compiler_options=QUICK)(params, stats, frozen, batch))
    want: dict[str, float] = {}
    for name, value in below(arrays, "train/loss").items():
        name = re.sub(r"_\d+$", "", name)  # one file has a name a level
        want[name] = want.get(name, 0.0) + float(np.sum(value, dtype=np.float64))
    if meta["student_cfg"]["type"] == "RetinaNet":
        count = positives * losses["loss_cls_kd"] / want["loss_cls_kd"]
        if round(count) != positives and abs(count - round(count)) < 1e-4 * count:
            yield Check("whole step", skip="exact ties of overlaps: rounding decides which anchors are positive")
            return
    yield Check("whole step: losses of another name", float(len(set(want) - {"total"} ^ set(losses))), 0)
    for name, value in (losses | {"total": sum(losses.values())}).items():
        yield Check(f"whole step: {name}", relative_error(value, want[name]), 1e-3)
    got, tolerance = in_torch(student, gradient), 2e-2 if by_centreness else 1e-3
    for name, value in below(arrays, "grad").items():
        yield Check(f"whole step: grad/{name}", relative_error(got[name], value), tolerance)
    names = map(str, arrays["grad_norm/names"])
    norms = np.array([np.linalg.norm(np.asarray(got[name], np.float64)) for name in names])
    yield Check("whole step: grad_norm", relative_error(norms, arrays["grad_norm/values"]), tolerance)


CHECKS = [("kd/crosskd_*.npz", crosskd), ("kd/ld_*.npz", ld)]
