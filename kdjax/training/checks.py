"""What can be wrong with a run is found before its first update, and named in one sentence."""

import contextlib
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kdjax import data, detectors, methods, resources
from kdjax.errors import UserError, prefix
from kdjax.structs import targets_of
from kdjax.training import config as settings
from kdjax.training import optim, sharding
from kdjax.training.setup import Setup, named_detector

# What may differ between a run and its resumption: nothing that enters the numbers.
FREE_KEYS = {"log_every", "checkpoint", "compile_cache", "data.workers", "data.cache", "data.root", "eval"}


def check_settings(config: ConfigDict) -> None:
    """Refuses unknown keys and impossible values, naming what would be right."""
    unknown = settings.unknown_keys(config)
    if unknown:
        raise ValueError(f"{unknown[0]} is no setting; the settings are those of kdjax/training/config.py")
    missing = settings.unknown_keys(settings.base(), config)
    if missing:
        raise ValueError(f"{missing[0]} is missing; a config starts from kdjax.training.config.base()")
    settings.check_numbers(config)
    if config.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"config.dtype is {config.dtype!r}; it must be 'float32' or 'bfloat16'")
    with prefix("config.data"):
        data.check_settings(config.data)
    for name, options in config.methods.items():
        methods.build(name, **options)
    devices = sharding.make_mesh().size
    if config.batch_size % devices:
        raise ValueError(f"config.batch_size is {config.batch_size}; it must be divisible by the {devices} devices")
    optim.learning_rate(config)


def check_models(config: ConfigDict) -> None:
    """Refuses what cannot be a run: impossible combinations of models and methods, missing names and files."""
    if not (config.student.detector or config.student.weights):
        raise ValueError(f"there is no student: set config.student.detector, one of {', '.join(detectors.names())}")
    has_teacher = bool(config.teacher.detector or config.teacher.weights)
    if config.methods and not has_teacher:
        raise ValueError(
            f"config.methods has {', '.join(config.methods)}, but there is no teacher: set config.teacher.weights"
        )
    if has_teacher and not config.teacher.weights:
        raise ValueError(f"the teacher {config.teacher.detector} has no weights: set config.teacher.weights")
    if has_teacher and not config.methods:
        raise ValueError(f"there is a teacher but no method: choose among {', '.join(methods.names())}")
    if config.twin and not config.methods:
        raise ValueError("config.twin compares with distillation, but config.methods is empty")
    for role in ("student", "teacher"):
        if config[role].detector:
            with prefix(f"config.{role}"):
                named_detector(config[role], 1)
        elif config[role].options:
            raise UserError(f"config.{role}.options has no effect unless config.{role}.detector is set")
        if config[role].weights and not resources.model_path(config[role].weights).exists():
            raise ValueError(f"there are no weights at {config[role].weights} (config.{role}.weights)")


def check_truth(dataset) -> None:
    """Refuses a validation split on which nothing could be measured."""
    if all(entry["iscrowd"] for entry in data.ground_truth(dataset, "val")["annotations"]):
        split = dataset.splits["val"]
        raise ValueError(
            f"the validation split '{split.name}' of {dataset.name} holds no object in its {split.size} images"
            f"{dropped_from(split)}, so nothing could be measured"
        )


def dropped_from(split) -> str:
    """A clause on the objects that a split has lost, or ""."""
    reasons = [entry["reason"] for entry in split.log if entry["action"] == "dropped"]
    return f" ({len(reasons)} were dropped: {', '.join(sorted(set(reasons)))})" if reasons else ""


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """A workdir can be written and belongs to one run: another config in it is refused, naming what differs."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--workdir={workdir} cannot be made ({error.strerror}): choose another") from None
    if not os.access(workdir, os.W_OK):
        raise ValueError(f"--workdir={workdir} cannot be written: choose another")
    path = workdir / "config.json"
    if not path.exists():
        return
    # A setting that is newer than the run was at its default, which is made to change nothing.
    before = flat_config(json.loads(settings.base().to_json()))
    try:
        before |= flat_config(json.loads(path.read_text())["config"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is not the config of a run: choose another --workdir") from None
    now = flat_config(json.loads(config.to_json()))
    differ = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
    ]
    if differ:
        raise ValueError(f"{workdir} holds a run with other settings ({'; '.join(differ)}): choose another --workdir")


def flat_config(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        flat |= flat_config(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def first_batch_with_objects(setup: Setup) -> dict:
    """Raises ValueError if 100 batches of the training data hold no object."""
    config = setup.config
    batches = data.train_batches(setup.dataset, config.data, batch_size=config.batch_size, seed=config.seed)
    with contextlib.closing(batches):
        for _ in range(100):
            batch = next(batches)
            if batch["valid"].any():
                return batch
    lost = dropped_from(setup.dataset.splits["train"])
    raise ValueError(
        f"the first 100 batches of the training data hold no object{lost}, so there is nothing to learn from"
    )


def check_terms(setup: Setup, batch: dict) -> None:
    """Every declared term must be finite and pull at the student, on a batch with objects and at full weight.

    The pull is measured at the student's outputs, where the terms read them: behind those lies the detector, whose own
    losses use the same way back.

    Raises:
      ValueError: names the term, its value and the size of its gradient.
    """
    if not setup.methods:
        return
    for name, method in setup.methods.items():
        if not method.weights:
            raise ValueError(f"config.methods.{name} would do nothing: the weights of all its terms are 0")
    student, distiller, state = setup.student, setup.distiller, setup.states["student"]

    def probe(state, variables, batch):
        params = state.params
        output, _ = student.apply(params["student"], state.stats, student.preprocess(batch["image"]), train=True)
        targets = targets_of(batch)
        assignment = student.assign(output, targets, state.key)
        losses = student.loss(output, targets, assignment)

        def terms(output):
            return distiller.terms(
                params["adapters"], output, batch, tuple(variables), assignment=assignment, key=state.key
            )

        values, back = jax.vjp(terms, output)
        pulls = {}
        for name in values:
            (grads,) = back({other: jnp.float32(other == name) for other in values})
            pulls[name] = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        return losses, values, pulls

    batch = sharding.shard_batch(setup.mesh, batch)
    losses, values, pulls = jax.device_get(jax.jit(probe)(state, setup.variables, batch))
    for name, value in (losses | values).items():
        if not np.isfinite(value):
            raise ValueError(f"the term {name} is {value} on the first batch with objects: it cannot be trained")
    for name, pull in pulls.items():
        if not (np.isfinite(pull) and pull > 0):
            raise ValueError(
                f"the term {name} (value {values[name]:.3g}) gives the student a gradient of size {pull}: it would do "
                "nothing; check its taps and options"
            )
    given = distiller.weights(0)
    for name, weight in given.items():
        if not np.isfinite(weight):
            raise ValueError(f"the weight of the term {name} is {weight}")
    missing = set(given) ^ set(values)
    if missing:
        raise ValueError(f"the terms {sorted(missing)} have a weight but no value, or a value but no weight")


def check_programs(setup: Setup) -> None:
    """One program a role: a second trace means that a shape changed and time is lost on every such step."""
    again = [name for name, times in setup.programs.items() if times > 1]
    if again:
        raise RuntimeError(
            f"the program {again[0]} was traced {setup.programs[again[0]]} times; its shapes must not change"
        )
