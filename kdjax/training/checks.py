"""Checks of config, data, models and workdir before the first update."""

import contextlib
import glob
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax import data, detectors, files, methods, resources, sharding
from kdjax.distill import pairing
from kdjax.errors import UserError, prefix
from kdjax.inference import layouts
from kdjax.training import auto_weight, optim, replay, trackers
from kdjax.training import config as settings
from kdjax.training.config import Config
from kdjax.training.models import all_methods, build_methods, check_masks, check_size, named_detector
from kdjax.training.setup import Setup, placed, prepare, prepare_process, train_batches, with_image
from kdjax.training.step import UNLABELLED
from kdjax.training.teachers import members, of_file, teacher_configs, unlabelled_rows

# What a run writes into its workdir, and into the folder of a model.
MODEL = ("model.safetensors", "config.json", "README.md")
FILES = ("config.json", "metrics.jsonl", "per_class.json", "results.json", "report.html", "time.json", ".lock",
          trackers.STATE,
          *(f"{role}/{name}" for role in ("student", "twin") for name in MODEL),
          *(f"detections/{role}.json" for role in ("student", "twin", "teacher")))  # fmt: skip
_FOLDERS = ("tensorboard", "checkpoints", "student", "twin", "detections", "blackbox", "wandb", "mlflow")


def check_settings(config: Config) -> None:
    """Checks the keys, types and ranges of all settings.

    Raises:
      UserError: names the setting and what it must be.
    """
    settings.check_keys(config)
    settings.check_values(config)
    if config.batch_size == settings.AUTO:
        raise UserError(f"config.batch_size='{settings.AUTO}': only a training run finds it: give a number here")
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"config.dtype must be 'auto', 'float32' or 'bfloat16', not {config.dtype!r}")
    if config.sharding not in sharding.KINDS:
        raise UserError(f"config.sharding must be {' or '.join(map(repr, sharding.KINDS))}, not {config.sharding!r}")
    if config.on_bad_step not in ("stop", "skip", "rollback"):
        raise UserError(f"config.on_bad_step must be 'stop', 'skip' or 'rollback', not {config.on_bad_step!r}")
    if config.checkpoint.keep_best and not config.eval.every:
        raise UserError(
            "config.checkpoint.keep_best has no effect without evaluations during training: set config.eval.every"
        )
    with prefix("config.data"):
        data.check_settings(config.data)
    for name, method in all_methods(config).items():
        if not method.weights:
            raise UserError(f"{where_of(name)}: it has no effect: the weights of all its terms are 0")
        if bad := {term: weight for term, weight in method.weights.items() if not 0 <= weight < math.inf}:
            term, weight = next(iter(bad.items()))
            raise UserError(f"{where_of(name)}: the weight of its term {term} is {weight}: it must be finite and >= 0")
    replay.check(config)
    trackers.check(config)
    if config.pairing not in pairing.RULES:
        raise UserError(f"config.pairing must be one of {', '.join(pairing.RULES)}, not {config.pairing!r}")
    devices = sharding.make_mesh().size
    if config.batch_size % devices:
        raise UserError(f"config.batch_size must be divisible by the {devices} devices, not {config.batch_size}")
    optim.learning_rate(config)
    auto_weight.check(config)
    if config.int8_start != settings.base().int8_start and not config.student.options.get("int8"):
        raise UserError("config.int8_start has no effect without config.student.options.int8=True")
    if config.data.unlabelled:
        if not (config.methods or config.teachers):
            raise UserError("config.data.unlabelled has no effect without a teacher and methods")
        rows = unlabelled_rows(config)
        if not rows or rows % devices:
            raise UserError(
                f"config.data.unlabelled_ratio: {config.data.unlabelled_ratio} of {config.batch_size} images is "
                f"{rows}: it must be a positive multiple of the {devices} devices"
            )


def check_models(config: Config) -> None:
    """Checks which of student, teacher and methods are set, the detectors with the image size, and paths.

    Raises:
      UserError: names the setting and what it must be.
    """
    if not (config.student.detector or config.student.weights):
        raise UserError(f"config.student.detector: there is no student: choose one of {', '.join(detectors.names())}")
    has_teacher = bool(config.teacher.detector or config.teacher.weights)
    if config.teachers:
        check_teachers(config)
    elif config.methods and not has_teacher:
        raise UserError(f"config.methods: {', '.join(config.methods)} without a teacher: set config.teacher.weights")
    if has_teacher and not config.teacher.weights:
        raise UserError(f"config.teacher.weights: the teacher {config.teacher.detector} has no weights: set a path")
    if has_teacher and not config.methods:
        raise UserError(f"config.methods: there is a teacher but no method: choose among {', '.join(methods.names())}")
    if config.twin and not (config.methods or config.teachers):
        raise UserError("config.twin has no effect without config.methods: it is for comparison with distillation")
    check_files(config)
    check_detectors(config)
    for where, chosen in _models(config):
        if chosen.weights and not resources.model_path(chosen.weights).exists():
            raise UserError(f"{where}.weights: there is no file or folder {chosen.weights}")


def check_teachers(config: Config) -> None:
    """Checks which settings of several teachers are set.

    Raises:
      UserError: names the setting and what it must be.
    """
    if config.teacher.detector or config.teacher.weights or config.methods:
        raise UserError(
            "config.teachers: there are also config.teacher or config.methods: make it one of config.teachers, with "
            "its methods"
        )
    averaged = {member for chosen in config.teachers.values() for member in members(chosen)}
    for name, chosen in config.teachers.items():
        where, of_mean = f"config.teachers.{name}", members(chosen)
        if bool(of_mean) == bool(chosen.weights):
            both = "both weights and mean" if of_mean else "neither weights nor mean"
            raise UserError(f"{where}: it has {both}: set one of them")
        if of_mean and (chosen.detector or chosen.layout or chosen.options):
            raise UserError(f"{where}: a mean of other teachers has no detector, layout and options: leave them out")
        for member in of_mean:
            if member not in config.teachers or members(config.teachers[member]) or of_mean.count(member) > 1:
                raise UserError(
                    f"{where}.mean: {chosen.mean!r} must be different names of config.teachers with weights, joined "
                    "by +"
                )
            if config.teachers[member].layout:
                raise UserError(
                    f"{where}.mean: {member} is an ONNX file, which runs on the host, and means are computed in the "
                    "step: take detectors, or import its weights with config.teachers.NAME.detector"
                )
        if len(of_mean) == 1:
            raise UserError(f"{where}.mean: {chosen.mean!r} is one teacher: it needs two or more, joined by +")
        if not chosen.methods and name not in averaged:
            raise UserError(f"{where}.methods: there is no method: choose among {', '.join(methods.names())}")
        if "/" in name or not name:
            raise UserError(f"config.teachers: {name!r} is not a name: choose one without /")


def check_files(config: Config) -> None:
    """Checks the teachers that are files of detections: their other settings and their methods.

    Raises:
      UserError: names the setting and what it must be.
    """
    chosen = {name: both for name, both in teacher_configs(config).items() if of_file(both[0])}
    averaged = {member for one in config.teachers.values() for member in members(one)}
    for name, (own, options) in chosen.items():
        where = f"config.teachers.{name}" if name else "config.teacher"
        for setting in ("detector", "layout", "cache"):
            if own[setting]:
                raise UserError(f"{where}.{setting} has no effect with a file of detections: leave it empty")
        for method, built in build_methods(options).items():
            if lacking := sorted(set(built.reads.teacher) - {"detections"}):
                every = ((other, methods.build(other)) for other in methods.names())
                able = [other for other, one in every if set(one.reads.teacher) == {"detections"}]
                raise UserError(
                    f"{where_of(f'{name}/{method}' if name else method)}: a file of detections has no "
                    f"{', '.join(lacking)}, which it reads of the teacher: methods that can use a file are "
                    f"{', '.join(able)}"
                )
        if name in averaged:
            raise UserError(f"{where}: a file of detections has no rows: leave it out of every mean")
    if len(chosen) > 1:
        raise UserError(f"config.teachers: {', '.join(chosen)} are files of detections: a run can have one")


def _models(config: Config) -> list[tuple[str, Config]]:
    """The settings of student and teachers, by where they are."""
    several = [(f"config.teachers.{name}", chosen) for name, chosen in config.teachers.items()]
    return [("config.student", config.student), ("config.teacher", config.teacher), *several]


def check_detectors(config: Config) -> None:
    """Checks the options of student and teacher, and that they can take the images and masks of the batches.

    Raises:
      UserError: names the setting and what it must be.
    """
    for where, chosen in _models(config):
        if "layout" in chosen and chosen.layout:
            check_layout(where, chosen)
        elif chosen.detector:
            with prefix(where):
                detector = named_detector(chosen, 1)
            check_size(where.removeprefix("config."), detector, tuple(config.data.image_size))
            if chosen is config.student:
                check_masks(detector, config)
        elif chosen.options:
            either = f"{where}.detector" + f" or {where}.layout" * ("layout" in chosen)
            raise UserError(f"{where}.options has no effect unless {either} is set")
        elif "layout" in chosen and Path(chosen.weights).suffix.lower() == ".onnx":
            raise UserError(
                f"{where}.weights: {chosen.weights} does not say what it is: set {where}.layout to run the file as it "
                f"is ({', '.join(layouts.READY)}), or {where}.detector to import its weights"
            )


def check_layout(where: str, chosen: Config) -> None:
    """Checks the description of a teacher that is an ONNX file.

    Args:
      where: "config.teacher" or "config.teachers.NAME".
      chosen: its settings.

    Raises:
      UserError: names the setting and what it must be.
    """
    with prefix(where):
        if chosen.detector:
            raise UserError(f"detector: with a layout, {chosen.weights} runs as it is: leave one of them out")
        layouts.layout(chosen.layout, chosen.options.to_dict())


def check_truth(dataset: data.Dataset, cfg: Mapping[str, Any]) -> None:
    """Checks that both splits have objects.

    Args:
      dataset: of the run.
      cfg: `config.data`.

    Raises:
      UserError: one has none.
    """
    for role, purpose in (("val", "metrics need some"), ("train", "training needs some")):
        counts, split = data.count(dataset, role, cfg), dataset.splits[role]
        if not counts.objects:
            setting = "holdout" if split.part else f"{role}_split"
            raise UserError(
                f"config.data.{setting}: the {counts.images} images of the split '{split.name}' of {dataset.name} "
                f"have no objects{_lost(counts)}: {purpose}"
            )


def _lost(counts: data.Counts) -> str:
    """How many objects do not reach training and why, in parentheses; "" if all do."""
    lost = data.reasons(counts, ("dropped", "ignored", "left out"))
    crowd = [f"{counts.crowd} crowd regions or difficult objects"] if counts.crowd else []
    return f" ({'; '.join([*crowd, *lost])})" if crowd or lost else ""


def check_workdir(config: Config, workdir: str | Path | None) -> Path:
    """Creates the folder of a run, and checks that it can be written and does not hold a different run.

    Args:
      config: the settings of the run.
      workdir: the folder.

    Returns:
      The folder.

    Raises:
      UserError: it cannot be used, or its config.json has other settings; names those that differ.
    """
    if not workdir:
        raise UserError("workdir: it is missing: choose a folder for the run")
    if "://" in str(workdir):
        raise UserError(f"workdir: {workdir} is an address of a store: here it must be a folder of this machine")
    folder = Path(workdir).expanduser()
    if glob.has_magic(str(folder.absolute())):
        raise UserError(
            f"workdir: {folder.absolute()} contains *, ? or [, which the library that writes checkpoints takes as a "
            "pattern: choose a path without them"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"workdir: {folder} cannot be created ({error.strerror}): choose another folder") from None
    files.check_outputs("workdir", folder, files=FILES, folders=_FOLDERS)
    path = folder / "config.json"
    if not path.exists():
        return folder
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        differ = settings.differences(written["config"], config)
        changed = "sha256" in written and files.altered(written)  # older versions wrote none
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"workdir: {path} is not the config of a run: choose another folder") from None
    if changed:
        raise UserError(
            f"workdir: {path} was changed after it was written (its SHA-256 differs): delete it: the checkpoints have "
            "the settings too"
        )
    if differ:
        raise UserError(
            f"workdir: {folder} holds a run with other settings ({'; '.join(differ)}): choose another folder"
        )
    return folder


def checked(config: Config) -> Setup:
    """The setup of a run at step 0, checked, for commands that do not train.

    Raises:
      UserError: the run could not start.
    """
    check_settings(config)
    check_models(config)
    with prefix("config.data"):
        dataset = data.open_dataset(config.data)
    check_truth(dataset, config.data)
    prepare_process(config.compile_cache)
    return prepare(config, dataset)


def first_batch_with_objects(setup: Setup) -> dict[str, np.ndarray]:
    """The first training batch that contains an object, the rows of this host.

    Raises:
      UserError: the first 100 batches contain none.
    """
    with contextlib.closing(train_batches(setup)) as batches:
        for _ in range(100):
            batch = next(batches)
            if batch["valid"].any():
                return sharding.rows_of_host(on_host(setup, batch))
    lost = _lost(data.count(setup.dataset, "train", setup.config.data))
    raise UserError(f"config.data.train_split: the first 100 training batches have no objects{lost}")


def on_host(setup: Setup, batch: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """A batch of NumPy arrays with its images, also where the device makes them; `name` as for `with_image`."""
    found = dict(batch)
    if "recipe" in batch:
        recipe = jax.tree.map(lambda value: sharding.split(value, setup.mesh), found.pop("recipe"))
        found |= sharding.gather(with_image(setup, {"recipe": recipe}, name))
    if UNLABELLED in found:
        found[UNLABELLED] = on_host(setup, found[UNLABELLED], UNLABELLED)
    return found


def check_terms(setup: Setup, batch: Mapping[str, np.ndarray]) -> None:
    """Checks that each term of the methods is finite and has a gradient, on one batch at full weight.

    The gradient is taken with respect to the student's output, from which the terms are computed.

    Args:
      setup: of the run, at step 0.
      batch: with objects.

    Raises:
      UserError: names the term, its value and the norm of its gradient.
    """
    distiller = setup.distiller
    if distiller is None:
        return
    assert setup.probe is not None, "there is one with every distiller"
    labelled = placed(setup, {name: value for name, value in batch.items() if name != UNLABELLED})
    losses, values, grad_norms = jax.device_get(setup.probe(setup.states["student"], setup.variables, labelled))
    for name, value in (losses | values).items():
        if not np.isfinite(value):
            raise UserError(f"term {name} is {value} on the first batch with objects: it cannot be trained")
    for name, norm in grad_norms.items():
        if norm == 0:
            raise UserError(
                f"term {name} (value {values[name]:.3g}) has zero gradient with respect to the student: check its taps "
                "and options"
            )
        if not np.isfinite(norm):
            raise UserError(f"term {name} (value {values[name]:.3g}) has a gradient that is not finite")
    with sharding.on_host():
        weights = distiller.weights(0)
    for name, weight in weights.items():
        if not np.isfinite(weight):
            raise UserError(f"term {name}: its weight is {weight}: it must be finite")
    mismatch = set(weights) ^ set(values)
    if mismatch:
        raise RuntimeError(f"terms with a weight but no value, or the reverse: {sorted(mismatch)}")


def where_of(name: str) -> str:
    """Where the options of a method are, "config.methods.NAME", or of several teachers of "TEACHER/NAME"."""
    teacher, _, method = name.rpartition("/")
    return f"config.teachers.{teacher}.methods.{method}" if teacher else f"config.methods.{method}"


def check_programs(setup: Setup) -> None:
    """Checks that each program was traced once: another trace means that shapes changed and compilation was repeated.

    Raises:
      RuntimeError: names the program.
    """
    for name, times in setup.programs.items():
        if times > 1:
            raise RuntimeError(f"the program {name} was traced {times} times: its shapes must not change")
