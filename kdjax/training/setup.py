"""From a config to models, initial states and compiled updates."""

import collections
import gc
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kdjax import compile_cache, data, detectors, machine, sharding
from kdjax.detectors.api import Detector, Tree
from kdjax.distill import Distiller, Distillers, Method
from kdjax.distill.teachers import RECORDED
from kdjax.errors import UserError, prefix
from kdjax.inference.onnx_teacher import OnnxTeacher
from kdjax.structs import FOUND, Array, PyTree
from kdjax.training import auto_weight, optim
from kdjax.training.augmentation import images
from kdjax.training.checkpoint import Checkpoints
from kdjax.training.config import Config, differences
from kdjax.training.models import (
    check_masks,
    check_size,
    in_precision,
    init_adapters,
    load_detector,
    precision,
)
from kdjax.training.step import UNLABELLED, Step, TrainState, init_state, make_probe, make_step
from kdjax.training.teachers import (
    TeacherOfRun,
    attached,
    check_unlabelled,
    distiller_in_precision,
    gives_boxes,
    hash_of,
    load_teachers,
    look_with,
    read_by_teacher,
    recorded,
    together,
    unlabelled_rows,
    with_detections,
)
from kdjax.weights.checkpoint import flat


class Setup(NamedTuple):
    """Everything that is known before the first update."""

    config: Config
    dataset: data.Dataset
    student: Detector
    teachers: tuple[TeacherOfRun, ...]  # none, that of config.teacher, or those of config.teachers
    distiller: Distiller | Distillers | None  # of all teachers, in float32 (a mean: in the precision of the run)
    variables: Any  # of all teachers, as the distiller takes them
    states: dict[str, TrainState]  # "student" and, with a twin, "twin"; on the devices
    steps: dict[str, Step]  # by role, of jitted programs
    programs: collections.Counter[str]  # how often each program was traced
    layout: sharding.Layout  # the devices, and where states and variables lie
    # variables, batch of images without labels -> what that batch is to be in a step; None without such images
    unlabelled: jax.stages.Wrapped | None = None
    measure: jax.stages.Wrapped | None = None  # `auto_weight.make_measure`; None if nothing is measured
    probe: jax.stages.Wrapped | None = None  # `step.make_probe`, with methods
    # What makes the images of a batch from their recipes; also by `UNLABELLED`, for those without labels
    augment: Mapping[str, jax.stages.Wrapped] = MappingProxyType({})

    @property
    def mesh(self) -> Mesh:
        """All devices of the run."""
        return self.layout.mesh

    @property
    def methods(self) -> Mapping[str, Method]:
        """The methods by name; with several teachers by "teacher/method"."""
        return {} if self.distiller is None else self.distiller.methods

    @property
    def evaluated(self) -> list[str]:
        """The roles that are evaluated at the end of the run."""
        return [*self.states, *(teacher.role for teacher in self.teachers if teacher.detects)]


def model(setup: Setup, role: str) -> tuple[Detector, tuple[Tree, Tree]]:
    """The detector of a role with the variables that are evaluated: a moving average, except for a teacher.

    Args:
      setup: of the run.
      role: "twin", "student", or the `role` of a teacher.

    Returns:
      The detector and its (params, stats).
    """
    for teacher in setup.teachers:
        if teacher.role == role:
            assert not teacher.on_host, "`onnx_of` tells those"
            return teacher.detector, (teacher.variables.params, teacher.variables.stats)
    average = setup.states[role].ema
    return setup.student, (average["params"], average["stats"])


def onnx_of(setup: Setup, role: str) -> OnnxTeacher | None:
    """The teacher of a role if it is an ONNX file."""
    return next((one.detector for one in setup.teachers if one.role == role and one.on_host), None)


def prepare_process(folder: str) -> None:
    """Sets up the compilation cache, malloc and the garbage collector; call it before any computation.

    Python's garbage collector would visit the objects of each program that is being traced many times, so it runs less
    often.

    Args:
      folder: of the compilation cache, as for `compile_cache.enable`; "off" = no cache.
    """
    gc.set_threshold(100_000, 50, 100)
    machine.keep_freed_memory()
    if folder == "off":
        return
    compile_cache.enable(folder)


def prepare(config: Config, dataset: data.Dataset) -> Setup:
    """Builds models, programs and the states at step 0; nothing is compiled for an accelerator yet.

    Args:
      config: the settings, checked by `checks.check_settings` and `checks.check_models`.
      dataset: of the run.

    Raises:
      UserError: weights cannot be loaded, the image size does not fit a model, a method cannot compare the models, or
        the student learns masks that the batches lack.
    """
    with sharding.on_host():
        return _prepare(config, dataset)


def _prepare(config: Config, dataset: data.Dataset) -> Setup:
    key = jax.random.PRNGKey(config.seed)
    image_size = tuple(config.data.image_size)
    dataset = with_detections(config, dataset)
    student, start = load_detector("student", config.student, dataset, key)
    check_masks(student, config)
    check_size("student", student, image_size)
    layout = sharding.Layout(sharding.make_mesh(), config.sharding)
    everywhere, rows = sharding.replicated(layout.mesh), sharding.batch_sharding(layout.mesh)
    programs = collections.Counter()

    def program(name: str, function: Callable[..., Any], *, label: str = "", **options: Any) -> jax.stages.Wrapped:
        def traced(*args: Any) -> PyTree:
            programs[name] += 1
            return function(*args)

        traced.__name__ = traced.__qualname__ = label or name.replace(" ", "_")  # in profiles and in the cache
        return jax.jit(traced, **options)

    found = load_teachers(config, dataset, key, student, layout, program)
    if config.data.augment_on == "device" and (asked := [one.setting for one in found if one.on_host]):
        raise UserError(
            f"config.data.augment_on: the teacher of {asked[0]} reads the images on the host: must be 'host'"
        )
    distiller, variables = together(found)
    adapters = init_adapters(distiller, key, image_size) if distiller else {}

    def no_decay(params: Tree) -> Tree:
        return {
            "student": student.no_decay(params["student"]),
            "adapters": jax.tree.map(lambda leaf: leaf.ndim <= 1, params["adapters"]),
        }

    optimizer, student_of_step = optim.optimizer(config, no_decay), in_precision(student, precision(config))

    def ema_rate(at: Array) -> Array:
        return optim.ema_rate(config, at)

    def step_of(role: str, distiller: Distiller | Distillers | None) -> Step:
        options = {"layout": layout, "most": bounds(config), "int8_from": int8_from(config, student)}
        step, where = make_step(student_of_step, optimizer, ema_rate, distiller=distiller, **options), shardings[role]
        # One in the cache for twin and supervised run.
        label = "distilled_gradients" if distiller else "supervised_gradients"
        after = where.params, where.stats, everywhere
        gradients = program(f"{role}'s gradients", step.gradients, label=label, out_shardings=after)
        options = {"label": "update", "donate_argnums": 0, "out_shardings": Step.changed(where)}
        return Step(gradients, program(f"{role}'s update", step.update, **options))

    unlabelled = None
    if config.data.unlabelled:
        check_unlabelled(found, distiller, image_size)
        shorter = [one._replace(distiller=distiller_in_precision(one, config)) for one in found]
        look = look_with(shorter, config, dataset)
        unlabelled = program("unlabelled images", layout.gathering(look), out_shardings=rows)
    weights = auto_weight.initial(config, list(distiller.methods)) if distiller else None
    states = {"student": init_state(student, key, start, adapters, optimizer, weights)}
    if config.twin:
        states["twin"] = init_state(student, key, start, {}, optimizer)
    trained, _ = together([teacher._replace(distiller=distiller_in_precision(teacher, config)) for teacher in found])
    shardings = {role: layout.shardings(state) for role, state in states.items()}
    steps = {role: step_of(role, trained if role == "student" else None) for role in states}
    measure = probe = None
    if trained is not None:
        probe = jax.jit(layout.gathering(make_probe(student_of_step, trained)))
        if weights is not None:
            shares = layout.gathering(auto_weight.make_measure(student_of_step, trained, config))
            measure = program("shares of the gradient", shares, out_shardings=everywhere)
    return Setup(
        config,
        dataset,
        student,
        found,
        distiller,
        variables,
        layout.put(states),
        steps,
        programs,
        layout,
        unlabelled,
        measure,
        probe,
        {name: program(f"augmentation {name}".strip(), images, out_shardings=rows) for name in ("", UNLABELLED)},
    )


def bounds(config: Config) -> dict[str, float]:
    """The metrics of a step above which it is bad, as for `step.make_step`."""
    most = {"total": config.bad_step.loss, "grad_norm": config.bad_step.grad_norm}
    return {name: float(bound) for name, bound in most.items() if bound}


def int8_from(config: Config, student: Detector) -> int | None:
    """The step from which on the student's values are rounded to 8 bits; None: it has no such option, or it is off."""
    return round(config.int8_start * config.steps) if student.options.get("int8") else None


def with_image(setup: Setup, batch: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """A batch on the devices with its images, which the device makes if the host has sent how.

    Args:
      setup: of the run.
      batch: on the devices.
      name: "", or `UNLABELLED` for a batch of images without labels.
    """
    if "recipe" not in batch:
        return dict(batch)
    found = {key: value for key, value in batch.items() if key != "recipe"}
    return found | {"image": setup.augment[name](batch["recipe"])}


def train_batches(
    setup: Setup,
    *,
    start_step: int = 0,
    shard: tuple[int, int] = (0, 1),
    attach: Callable[[np.ndarray], Any] | None = None,
) -> data.Batches | data.Beside:
    """The training batches of a run, those of images without labels as `unlabelled` of each.

    Args:
      setup: of the run.
      start_step, shard, attach: as for `data.train_batches`.
    """
    config = setup.config
    common: dict[str, Any] = dict(seed=config.seed, start_step=start_step, shard=shard, fit=setup.student.fit)
    with prefix("config.data"):
        batches = data.train_batches(setup.dataset, config.data, batch_size=config.batch_size, attach=attach, **common)
    if not config.data.unlabelled:
        return batches
    further, cfg = data.without_labels(setup.dataset), config.data.copy_and_resolve_references()
    cfg.keep = max(cfg.keep - data.forecast(setup.dataset, cfg).bytes / 2**30, 0.0)  # one budget for all
    more = data.train_batches(further, cfg, batch_size=unlabelled_rows(config), **common)
    detections = FOUND if further.splits["train"].found else ()
    image = "recipe" if config.data.augment_on == "device" else "image"
    return data.Beside(batches, more, UNLABELLED, (image, "image_size", *detections))


def placed(setup: Setup, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch on the devices, with what the teachers say about it, unless that is there or the step runs the teacher.

    Args:
      setup: of the run.
      batch: of the loader, the rows of this host.
    """
    arrays = with_image(setup, sharding.shard_batch(setup.mesh, with_host(setup, batch)))
    if UNLABELLED in arrays:
        arrays[UNLABELLED] = with_image(setup, arrays[UNLABELLED], UNLABELLED)
    said = recorded(arrays, setup.teachers)
    for teacher in setup.teachers:
        if teacher.observer is not None and teacher.name not in said:
            said[teacher.name] = teacher.observer.program(teacher.variables, read_by_teacher(arrays))
    if setup.unlabelled is not None and UNLABELLED in arrays:
        variables = {teacher.name: teacher.variables for teacher in setup.teachers}
        arrays[UNLABELLED] = setup.unlabelled(variables, arrays[UNLABELLED])
    return arrays | attached(said)


def given(setup: Setup, role: str, batch: Mapping[str, Any]) -> tuple[PyTree, dict[str, Any]]:
    """What the update of a role gets beside its state; that of the twin gets nothing of the teacher."""
    if role == "student":
        return setup.variables, dict(batch)
    return None, {name: value for name, value in batch.items() if name not in (RECORDED, UNLABELLED, *FOUND)}


def with_host(setup: Setup, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch on the host, with what the teachers that run there say about it, unless that is there.

    Args:
      setup: of the run.
      batch: of the loader, the rows of this host.
    """
    said = recorded(batch, setup.teachers)
    for teacher in setup.teachers:
        if teacher.on_host and teacher.observer is not None and teacher.name not in said:
            said[teacher.name] = teacher.observer.function(None, read_by_teacher(batch))
    found = {**batch, **attached(said)}
    if UNLABELLED in batch:
        found[UNLABELLED] = with_host(setup, batch[UNLABELLED])
        giver = gives_boxes(setup.teachers)
        if giver is not None and giver.on_host and "boxes" not in found[UNLABELLED]:
            found[UNLABELLED] |= _boxes_of_onnx(giver.detector, found[UNLABELLED], setup)
    return found


def _boxes_of_onnx(file: OnnxTeacher, batch: Mapping[str, Any], setup: Setup) -> dict[str, np.ndarray]:
    """The boxes that an ONNX file gives to images without labels, as `look_with` makes those of a detector."""
    found, places = file.program(None, batch["image"], batch["image_size"]), setup.dataset.max_boxes

    def fitted(value: Any) -> np.ndarray:  # noqa: ANN401 - of NumPy
        value = np.asarray(value)[:, :places]
        return np.pad(value, [(0, 0), (0, places - value.shape[1]), *[(0, 0)] * (value.ndim - 2)])

    valid = found.valid & (found.scores >= setup.config.data.unlabelled_score)
    return {"boxes": fitted(found.boxes), "labels": fitted(found.labels), "valid": fitted(valid)}


def run_fingerprint(setup: Setup) -> dict[str, Any]:
    """Everything in which a checkpoint must agree with the run that reads it, including hashes of data and teacher."""
    return {
        "student": setup.student.name,
        "options": setup.student.options,
        "classes": list(setup.dataset.classes),
        "methods": sorted(setup.methods),
        "twin": "twin" in setup.states,
        "seed": setup.config.seed,
        "batch_size": setup.config.batch_size,
        "dtype": precision(setup.config),
        "data": setup.dataset.fingerprint,
        "teacher": hash_of(setup.teachers),
    }


def check_extension(config: Config, before: int, done: int) -> None:
    """Checks that a run may go on for more steps than it was started with.

    Args:
      config: with the new number of steps.
      before: steps that the run was started with.
      done: steps that it has done.

    Raises:
      UserError: it has done more, or its learning rates so far are not those of the longer run.
    """
    if config.steps < done:
        raise UserError(f"config.steps is {config.steps}, but the run is already at step {done}: set more")
    shorter = ConfigDict(dict(config.items()))
    shorter.steps = before
    old, new = (jax.vmap(optim.learning_rate(one))(np.arange(done)) for one in (shorter, config))
    if config.student.options.get("int8"):
        before, after = (min(round(config.int8_start * one.steps), done) for one in (shorter, config))
        if before != after:
            raise UserError(
                f"config.extend: of the {done} steps that are done, those from {before} on are rounded to 8 bits, but "
                f"in a run of {config.steps} steps those from {after} on: start a new one from config.student.weights"
            )
    differ = np.flatnonzero(np.asarray(old) != np.asarray(new))
    if len(differ):
        raise UserError(
            f"config.extend: of the {done} steps that are done, those from {differ[0]} on had another learning rate "
            f"than they have in a run of {config.steps} steps: only runs with config.optimizer.flat=1 or "
            "config.optimizer.drops, and others before their decay, can be extended; start a new one from "
            "config.student.weights"
        )


def resume(setup: Setup, checkpoints: Checkpoints) -> tuple[int, Setup, dict[str, Any]]:
    """Restores the newest checkpoint, if there is one.

    Returns:
      The number of updates so far, the setup with the states after them, and what the loop was about to do then: the
      `loop` of the checkpoint's note.

    Raises:
      UserError: the checkpoint belongs to a different run, or none can be read.
    """
    note = checkpoints.note()
    if note is None:
        return 0, setup, {}
    # Older runs did not write options and precision.
    written = {"options": {}, "dtype": precision(setup.config)} | note["run"]
    for name, value in run_fingerprint(setup).items():
        before = written.get(name)
        if before != value:
            raise UserError(
                f"workdir: {checkpoints.directory} belongs to a different run: {name} was {before!r}, is {value!r}"
                f"{' (the hash of its images, boxes and classes)' * (name == 'data')}: choose another folder"
            )
    # Also without config.json; older checkpoints do not have the settings.
    differ = differences(note["config"], setup.config) if "config" in note else []
    if not differ and setup.config.extend:
        check_extension(setup.config, note["config"]["steps"], note["next_batch"])
    if differ:
        raise UserError(
            f"workdir: {checkpoints.directory} belongs to a run with other settings ({'; '.join(differ)}): choose "
            "another folder"
        )
    before = detectors.FORMER.get(setup.student.name)
    if before and set(note["sha256"]) != set(flat(setup.states, copy=False)):
        raise UserError(
            f"workdir: {checkpoints.directory} belongs to a run of what is {before} now, which was called "
            f"{setup.student.name} when it was started: choose another folder"
        )
    states, note = checkpoints.restore(setup.states)
    states = setup.layout.put(states)
    step = int(states["student"].step)
    steps = sharding.from_every_host(step)  # one may have skipped a checkpoint that it could not read
    if len(set(steps)) > 1:
        raise UserError(
            f"workdir: {checkpoints.directory}: the hosts have read checkpoints of the steps "
            f"{', '.join(map(str, steps))}: start all of them again"
        )
    if step != note["next_batch"]:
        raise UserError(
            f"workdir: {checkpoints.directory}: the state is at step {step}, but the data at batch "
            f"{note['next_batch']}: delete this folder to start again"
        )
    return step, setup._replace(states=states), note.get("loop", {})  # older checkpoints have none
