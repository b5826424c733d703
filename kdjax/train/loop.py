"""The one trainer: a run from its config to its report, top to bottom."""

import collections
import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent import futures
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter
from tqdm import tqdm

import kdjax
from kdjax import data, detectors, files, weights
from kdjax.errors import UserError, prefix
from kdjax.evals import coco, complexity, voc
from kdjax.methods import api
from kdjax.report import drawing, model_card, preview
from kdjax.report import run as run_report
from kdjax.structs import Detections
from kdjax.train import config as settings
from kdjax.train import optim
from kdjax.train.checkpoint import Checkpoints, fingerprint
from kdjax.train.schedule import schedule
from kdjax.train.step import (
    Teacher,
    TrainState,
    compare,
    init_adapters,
    init_state,
    make_step,
    targets_of,
    weights_of,
)

# What may differ between a run and its resumption: nothing that enters the numbers.
FREE_KEYS = {"log_every", "checkpoint", "compile_cache", "data.workers", "data.cache", "data.root", "eval"}
EXAMPLES = 8  # images in the report
# glibc's mallopt: one heap for all threads (M_ARENA_MAX), nothing mapped by itself (M_MMAP_MAX), never trimmed
# (M_TRIM_THRESHOLD).
MALLOC = {-8: 1, -4: 0, -1: -1}


class Setup(NamedTuple):
    """Everything that is known before the first update; making it finds every mistake of the user's."""

    config: ConfigDict
    dataset: object
    student: object  # Detector
    teacher: object | None
    methods: dict
    variables: Teacher | None  # on all devices
    states: dict[str, TrainState]  # "student", and "twin" if there is one; on all devices
    steps: dict[str, object]  # jitted updates
    predict: dict[str, object]  # jitted predictions by model
    programs: collections.Counter  # how often each program was traced
    mesh: Mesh


class BadInput(Exception):
    """The user's input cannot be used; the message is one sentence: what, where, what would be right."""


class Stopped(Exception):
    """The run was asked to stop and has saved its state."""


def run(config: ConfigDict, workdir: str) -> dict | None:
    """Trains, evaluates and reports; the same call resumes a run that was interrupted.

    Args:
      config: see `kdjax.train.config.base`.
      workdir: gets config.json, metrics.jsonl, tensorboard/, checkpoints/, student/, twin/, detections/,
        per_class.json, results.json and report.html.

    Returns:
      The content of results.json; None for a dry run (`config.data.check`).

    Raises:
      BadInput: before any training; later only if prepared data cannot be read any more.
      FloatingPointError: a loss or gradient is not finite; the message names it.
      Stopped: SIGTERM or SIGINT arrived; the state is saved.
    """
    try:
        check_settings(config)
        if config.data.check:
            with prefix("config.data"):
                dataset = data.open_dataset(config.data)
            print(data.summary(dataset, config.data))
            for what, file in preview.save(dataset, config, schedule(config), workdir).items():
                print(f"{what}: {file}")
            return None
        check_models(config)
        workdir = Path(workdir)
        check_workdir(config, workdir)
        with prefix("config.data"):
            dataset = data.open_dataset(config.data)
        check_truth(dataset)
        prepare_process(config.compile_cache)
        setup = prepare(config, dataset)
        checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
        start, setup = resume(setup, checkpoints)
        if start == 0:
            check_terms(setup, first_batch_with_objects(setup))
    except (ValueError, OSError) as error:
        raise BadInput(settings.sentence(error)) from error
    write_config(config, workdir)
    try:
        with contextlib.closing(checkpoints), Log(workdir, start) as log:
            states = train(setup, start, checkpoints, log)
            return finish(setup._replace(states=states), workdir, log)
    except data.Damaged as error:
        raise BadInput(str(error)) from error


# ---------------------------------------------------------------------------------------------------- before training


def check_settings(config: ConfigDict) -> None:
    """Refuses unknown keys and impossible values, naming what would be right."""
    unknown = settings.unknown_keys(config)
    if unknown:
        raise ValueError(f"{unknown[0]} is no setting; the settings are those of kdjax/train/config.py")
    missing = settings.unknown_keys(settings.base(), config)
    if missing:
        raise ValueError(f"{missing[0]} is missing; a config starts from kdjax.train.config.base()")
    settings.check_numbers(config)
    if config.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"config.dtype is {config.dtype!r}; it must be 'float32' or 'bfloat16'")
    with prefix("config.data"):
        data.check_settings(config.data)
    for name, options in config.methods.items():
        api.build(name, **options)
    devices = make_mesh().size
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
        raise ValueError(f"there is a teacher but no method: choose among {', '.join(api.names())}")
    if config.twin and not config.methods:
        raise ValueError("config.twin compares with distillation, but config.methods is empty")
    for role in ("student", "teacher"):
        if config[role].detector:
            with prefix(f"config.{role}"):
                named_detector(config[role], 1)
        elif config[role].options:
            raise UserError(f"config.{role}.options has no effect unless config.{role}.detector is set")
        if config[role].weights and not Path(config[role].weights).exists():
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


def prepare_process(folder: str) -> None:
    """Compiled programs are kept on disk, so that a second run starts in seconds, and freed memory by the process.

    XLA on the CPU asks for the memory of a whole step, and frees it, each time it runs; glibc hands that back to the
    system, whose fresh pages then cost a quarter of the step. It must come before the first computation. Python's
    collector would look again and again at the objects of every program that is being traced: it is made rare.
    """
    gc.set_threshold(100_000, 50, 100)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in MALLOC.items():
            libc.mallopt(option, value)
    if folder == "off":
        return
    jax.config.update("jax_compilation_cache_dir", folder or str(files.cache_root() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def named_detector(chosen: ConfigDict, num_classes: int):
    """The detector that `config.student` or `config.teacher` names."""
    return detectors.build(chosen.detector, num_classes, **chosen.options.to_dict())


def load_detector(role: str, chosen: ConfigDict, dataset, key):
    """The detector of a role with its start weights: (Detector, (params, stats) or None)."""
    detector = named_detector(chosen, len(dataset.classes)) if chosen.detector else None
    if not chosen.weights:
        return detector, None
    detector, params, stats, classes = weights.load(
        chosen.weights, detector, key=key, keep_classifiers=role == "teacher"
    )
    if classes is not None and list(classes) != list(dataset.classes):
        if role == "student":  # fine-tuning: weights of other data are a start
            detector = detectors.build(detector.name, len(dataset.classes), **detector.options)
            return detector, (weights.reset_classifiers(detector, params, key=key), stats)
        missing = [name for name in dataset.classes if name not in classes]
        what = f"{missing[0]!r} is unknown to the {role}" if missing else "the order or number of classes differs"
        raise ValueError(
            f"the class map of the {role} in {chosen.weights} does not fit the data: {what}; "
            f"{role}: {', '.join(classes)}; data: {', '.join(dataset.classes)} (where only the spelling differs, "
            "`kdjax import-weights --classes` gives the weights other names)"
        )
    if detector.num_classes != len(dataset.classes):
        raise ValueError(
            f"the {role} in {chosen.weights} has {detector.num_classes} classes, the data has {len(dataset.classes)}"
        )
    return detector, (params, stats)


def prepare(config: ConfigDict, dataset) -> Setup:
    """Builds the models, the programs and the states at step 0."""
    key = jax.random.PRNGKey(config.seed)
    height, width = config.data.image_size
    student, start = load_detector("student", config.student, dataset, key)
    teacher, loaded = None, None
    if config.teacher.weights:
        teacher, loaded = load_detector("teacher", config.teacher, dataset, key)
    for role, detector in (("student", student), ("teacher", teacher)):
        if detector and (height % detector.size_divisor or width % detector.size_divisor):
            raise ValueError(
                f"config.data.image_size is {height}x{width}; the {role} {detector.name} needs multiples of "
                f"{detector.size_divisor}"
            )
    methods = {name: api.build(name, **options) for name, options in config.methods.items()}
    adapters = {}
    if methods:
        specs = [output_spec(detector, (height, width)) for detector in (student, teacher)]
        adapters = init_adapters(methods, key, *specs)

    def no_decay(params):
        return {
            "student": student.no_decay(params["student"]),
            "adapters": jax.tree.map(lambda leaf: leaf.ndim <= 1, params["adapters"]),
        }

    optimizer = optim.optimizer(config, no_decay)
    mesh = make_mesh()
    everywhere = NamedSharding(mesh, PartitionSpec())
    programs = collections.Counter()

    def program(name, function, **options):
        def traced(*args):
            programs[name] += 1
            return function(*args)

        return jax.jit(traced, **options)

    def update(name, teacher=None, **options):
        trained, frozen = (in_precision(detector, config.dtype) for detector in (student, teacher))
        step = make_step(trained, optimizer, lambda at: optim.ema_rate(config, at), teacher=frozen, **options)
        return program(name, step, donate_argnums=0, out_shardings=everywhere)

    def predictor(name, detector):
        def predict(variables, images, image_size):
            output, _ = detector.apply(*variables, detector.preprocess(images), train=False)
            return detector.decode(output, image_size)

        return program(name, predict)

    roles = ["student", "twin"] if config.twin else ["student"]
    states = {role: init_state(student, key, start, adapters if role == "student" else {}, optimizer) for role in roles}
    steps = {role: update(role) for role in roles}
    predict = dict.fromkeys(roles, predictor("predict_student", student))
    if teacher:
        steps["student"] = update("student", teacher=teacher, methods=methods)
        predict["teacher"] = predictor("predict_teacher", teacher)
    variables = jax.device_put(Teacher(*loaded), everywhere) if teacher else None
    return Setup(
        config,
        dataset,
        student,
        teacher,
        methods,
        variables,
        jax.device_put(states, everywhere),
        steps,
        predict,
        programs,
        mesh,
    )


def in_precision(detector, dtype: str):
    """The detector with its images, and so all its maps up to the predictions, in another precision; None stays."""
    if detector is None or dtype == "float32":
        return detector
    return dataclasses.replace(detector, preprocess=lambda images: detector.preprocess(images).astype(dtype))


def make_mesh() -> Mesh:
    """All devices of all hosts along the one axis `data`, over which batches are spread."""
    return Mesh(np.array(jax.devices()), ("data",))


def output_spec(detector, hw: tuple[int, int]):
    """Shapes of all that a detector returns for one image, without computing anything."""
    image = jax.ShapeDtypeStruct((1, *hw, 3), jnp.float32)
    return jax.eval_shape(lambda variables, x: detector.apply(*variables, x, train=False)[0], detector.shapes, image)


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


def identity(setup: Setup) -> dict:
    """What a checkpoint must agree on with the run that reads it: also data and teacher themselves, not their paths."""
    return {
        "student": setup.student.name,
        "options": setup.student.options,
        "classes": list(setup.dataset.classes),
        "methods": sorted(setup.methods),
        "twin": "twin" in setup.states,
        "seed": setup.config.seed,
        "batch_size": setup.config.batch_size,
        "data": setup.dataset.fingerprint,
        "teacher": fingerprint(setup.variables) if setup.teacher else None,
    }


def resume(setup: Setup, checkpoints: Checkpoints) -> tuple[int, Setup]:
    """The step to go on from and the states at it."""
    note = checkpoints.note()
    if note is None:
        return 0, setup
    written = {"options": {}} | note["run"]  # which older runs did not write
    for key, value in identity(setup).items():
        theirs = written.get(key)
        if theirs != value:
            raise ValueError(
                f"the checkpoint in {checkpoints.manager.directory} is of another run: its {key} is {theirs!r}, this "
                f"run's is {value!r}; choose another --workdir"
            )
    states, note = checkpoints.restore(setup.states)
    states = jax.device_put(states, NamedSharding(setup.mesh, PartitionSpec()))
    step = int(states["student"].step)
    if step != note["next_batch"]:
        raise ValueError(f"the checkpoint's state is at step {step}, but its data position is {note['next_batch']}")
    return step, setup._replace(states=states)


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
    student, state = setup.student, setup.states["student"]

    def probe(state, variables, batch):
        params = state.params
        output, _ = student.apply(params["student"], state.stats, student.preprocess(batch["image"]), train=True)
        losses, assignment = student.loss(output, targets_of(batch))

        def terms(output):
            return compare(
                student,
                setup.teacher,
                setup.methods,
                params["adapters"],
                variables,
                output,
                assignment,
                batch,
                0,
                state.key,
            )

        values, back = jax.vjp(terms, output)
        pulls = {}
        for name in values:
            (grads,) = back({other: jnp.float32(other == name) for other in values})
            pulls[name] = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        return losses, values, pulls

    batch = place(setup.mesh, batch)
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
    given = weights_of(setup.methods, 0)
    for name, weight in given.items():
        if not np.isfinite(weight):
            raise ValueError(f"the weight of the term {name} is {weight}")
    missing = set(given) ^ set(values)
    if missing:
        raise ValueError(f"the terms {sorted(missing)} have a weight but no value, or a value but no weight")


# ----------------------------------------------------------------------------------------------------------- training


def place(mesh: Mesh, batch: dict) -> dict:
    """This host's rows of a batch, spread over all devices of all hosts."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def train(setup: Setup, start: int, checkpoints: Checkpoints, log: "Log") -> dict[str, TrainState]:
    """All updates from `start` to the end; returns the final states."""
    config, states = setup.config, dict(setup.states)
    rate = optim.learning_rate(config)
    batches = data.train_batches(
        setup.dataset,
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start,
        shard=(jax.process_index(), jax.process_count()),
    )

    def save(step):
        checkpoints.save(step, states, {"next_batch": step, "run": mine, "category_ids": ids})

    mine, ids = identity(setup), list(setup.dataset.category_ids)
    pending, window = collections.deque(), []
    waited, since, decoded = 0.0, time.perf_counter(), 0
    bar = tqdm(total=config.steps, initial=start, desc="train", unit="step", disable=jax.process_index() > 0)
    with contextlib.closing(batches), contextlib.closing(bar), Signals() as signals:
        for step in range(start + 1, config.steps + 1):
            before = time.perf_counter()
            batch = place(setup.mesh, next(batches))
            waited += time.perf_counter() - before
            metrics = {}
            if step == start + 1:
                compile_steps(setup, states, batch)
            for role in states:
                states[role], of_role = setup.steps[role](states[role], teacher_of(setup, role), batch)
                metrics |= {f"{role}/{name}": value for name, value in of_role.items()}
            pending.append((step, metrics))
            last = step == config.steps or agreed(signals.stop, step, config.log_every)
            logs, saves = last or step % config.log_every == 0, last or step % config.checkpoint.every == 0
            # One step behind, so that the device always has its next step before the host waits for metrics; but what
            # is written has been looked at.
            while len(pending) > (0 if logs or saves else 1):
                window.append(check_finite(*pending.popleft()))
            bar.update()
            if logs:
                seconds, images = time.perf_counter() - since, len(window) * config.batch_size
                row = {name: float(np.mean([m[name] for m in window])) for name in window[0]}
                row = {name: value for name, value in row.items() if not name.endswith("/finite")}
                row |= {f"weight/{name}": float(w) for name, w in weights_of(setup.methods, step - 1).items()}
                row |= {
                    "lr": float(rate(step - 1)),
                    "seconds": seconds,
                    "images_per_s": images / seconds,
                    "wait_share": waited / seconds,
                    "decoded_per_image": (batches.decoded - decoded) * jax.process_count() / images,
                }
                log.write(step, "train", row)
                bar.set_postfix({role: f"{row[f'{role}/total']:.3g}" for role in states})
                window, waited, since, decoded = [], 0.0, time.perf_counter(), batches.decoded
                check_programs(setup)
            if saves:
                save(step)
            if config.eval.every and step % config.eval.every == 0 and step < config.steps:
                begun = time.perf_counter()
                for role, state in states.items():
                    measured = evaluate(setup, role, ema(state), limit=config.eval.limit).metrics
                    log.write(step, "eval", {f"{role}/{name}": value for name, value in measured.items()})
                since += time.perf_counter() - begun
            if last and step < config.steps:
                checkpoints.close()
                raise Stopped(f"stopped at step {step} of {config.steps}, saved; the same command goes on from there")
    return states


def teacher_of(setup: Setup, role: str) -> Teacher | None:
    """The frozen side, which only the student has."""
    return setup.variables if role == "student" else None


def compile_steps(setup: Setup, states: dict[str, TrainState], batch: dict) -> None:
    """Compiles the roles' updates side by side, each on a core of its own; their first calls find them compiled."""
    with futures.ThreadPoolExecutor(len(states)) as pool:
        compiling = [
            pool.submit(setup.steps[role].lower(states[role], teacher_of(setup, role), batch).compile)
            for role in states
        ]
        for each in compiling:
            each.result()


def check_finite(step: int, metrics: dict) -> dict:
    """The metrics of a step on the host.

    Raises:
      FloatingPointError: names the first figure that is not finite.
    """
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if any(value == 0 for name, value in metrics.items() if name.endswith("/finite")):
        bad = [name for name, value in metrics.items() if not np.isfinite(value)]
        losses = [name for name in bad if not name.endswith(("/total", "/grad_norm"))]
        raise FloatingPointError(
            f"{(losses or bad)[0]} is not finite at step {step}: training cannot go on; checkpoints of earlier steps "
            "are sound. A lower learning rate or weight of that term usually helps"
        )
    return metrics


def agreed(stop: bool, step: int, every: int) -> bool:
    """Whether to stop at this step. Several hosts ask each other every so many steps: all must leave at one."""
    if jax.process_count() == 1:
        return stop
    return step % every == 0 and bool(multihost_utils.process_allgather(np.array(stop)).any())


def check_programs(setup: Setup) -> None:
    """One program a role: a second trace means that a shape changed and time is lost on every such step."""
    again = [name for name, times in setup.programs.items() if times > 1]
    if again:
        raise RuntimeError(
            f"the program {again[0]} was traced {setup.programs[again[0]]} times; its shapes must not change"
        )


class Signals:
    """Turns SIGTERM and SIGINT into a flag while training runs, so that the state is saved; a second Ctrl-C ends it."""

    def __enter__(self):
        self.stop = False
        self.before = {}
        with contextlib.suppress(ValueError):  # handlers can be set in the main thread alone
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number, frame):
        if self.stop and number == signal.SIGINT:  # asked twice: not even the state is wanted
            raise KeyboardInterrupt
        self.stop = True

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Log:
    """metrics.jsonl (appended, one object a line) and TensorBoard; only on the first host."""

    def __init__(self, workdir: Path, step: int):
        self.first = jax.process_index() == 0
        self.path = workdir / "metrics.jsonl"
        if self.first:
            # What a killed process left half-written would spoil the line that is appended to it.
            lines = self.path.read_bytes() if self.path.exists() else b""
            if not lines.endswith(b"\n"):
                self.path.write_bytes(lines[: lines.rfind(b"\n") + 1])
            self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step or None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.first:
            self.board.close()

    def write(self, step: int, kind: str, values: dict) -> None:
        if not self.first:
            return
        row = {"step": step, "kind": kind, "time": round(time.time(), 1)} | values
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name if kind == "train" else f"eval/{name}", value, step)

    def rows(self) -> list[dict]:
        """All lines; steps that a killed process had gone beyond its last checkpoint are there twice."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]


# -------------------------------------------------------------------------------------------------- after training


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
    if setup.teacher:
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
        results["voc"] = {role: voc.voc_metrics(truth, one.detections) for role, one in evaluations.items()}
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


def environment() -> dict:
    """Versions, devices and commit of this run."""
    commit, root = "", Path(kdjax.__file__).parents[1]
    if (root / ".git").exists():  # otherwise kdjax is installed, perhaps inside another project's checkout
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git on this machine, or one that hangs
            describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
            commit = subprocess.run(describe, cwd=root, capture_output=True, text=True, timeout=10).stdout.strip()
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "faster-coco-eval")
    return {
        "kdjax": kdjax.__version__,
        "commit": commit,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.process_count()} hosts)",
    }


def write_config(config: ConfigDict, workdir: Path) -> None:
    """The resolved config and the environment; a resumed run adds its environment to the list."""
    if jax.process_index():
        return
    path = workdir / "config.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    now = environment() | {"command": sys.argv[1:], "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    files.write_json(path, {"config": json.loads(config.to_json()), "runs": [*runs, now]}, indent=1)
