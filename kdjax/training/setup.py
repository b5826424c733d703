"""From a config to models, initial states and compiled updates."""

import collections
import ctypes
import dataclasses
import gc
import platform
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from kdjax import data, detectors, files, methods, sharding, weights
from kdjax.detectors.api import Detector, Tree
from kdjax.distill import Distiller, Method, pairing
from kdjax.distill.teachers import RECORDED, functions_of, without_places
from kdjax.errors import UserError, listed
from kdjax.structs import Array, DetectorOutput, PyTree
from kdjax.training import optim
from kdjax.training.checkpoint import Checkpoints
from kdjax.training.config import Config, differences
from kdjax.training.step import Batch, TeacherVariables, TrainState, init_state, make_step
from kdjax.weights.checkpoint import fingerprint, flat

# Options of glibc's mallopt: one arena (M_ARENA_MAX), no mmap for large blocks (M_MMAP_MAX), no trimming
# (M_TRIM_THRESHOLD).
MALLOC = {-8: 1, -4: 0, -1: -1}


class Setup(NamedTuple):
    """Everything that is known before the first update."""

    config: Config
    dataset: data.Dataset
    student: Detector
    teacher: Detector | None
    methods: dict[str, Method]
    distiller: Distiller | None  # of student, teacher and methods, in float32
    teacher_detects: bool  # the teacher has the classes of the data, so that it can be evaluated
    variables: TeacherVariables | None  # on all devices
    observer: "Observer | None"  # None: there is no teacher, or its output holds functions and it runs inside the step
    states: dict[str, TrainState]  # "student" and, with a twin, "twin"; on all devices
    steps: dict[str, jax.stages.Wrapped]  # role -> jitted `Update`
    programs: collections.Counter[str]  # how often each program was traced
    mesh: Mesh


class Observer(NamedTuple):
    """The teacher as a program of its own, ahead of the student's step."""

    # (teacher variables, batch) -> what the methods read of the teacher; every array has a batch axis
    function: Callable[[TeacherVariables, Batch], DetectorOutput]
    program: jax.stages.Wrapped  # the function, jitted for the devices of the run
    output: DetectorOutput  # shapes of what it returns for a batch of the run


def model(setup: Setup, role: str) -> tuple[Detector, tuple[Tree, Tree]]:
    """The detector of a role with the variables that are evaluated: a moving average, except for the teacher.

    Args:
      setup: of the run.
      role: "teacher", "twin" or "student".

    Returns:
      The detector and its (params, stats).
    """
    if role == "teacher":
        assert setup.teacher is not None, "the run has no teacher"
        assert setup.variables is not None, "the run has no teacher"
        return setup.teacher, (setup.variables.params, setup.variables.stats)
    average = setup.states[role].ema
    return setup.student, (average["params"], average["stats"])


def prepare_process(folder: str) -> None:
    """Sets up the compilation cache, and tunes malloc and the garbage collector; call it before any computation.

    On the CPU, XLA allocates and frees the memory of a whole step in each step. By default glibc returns that memory to
    the system, and the page faults of fresh memory take a quarter of the step. Python's garbage collector would visit
    the objects of each program that is being traced many times, so it runs less often.

    Args:
      folder: of the compilation cache; "" = `files.cache_root() / "jax"`, "off" = no cache.
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


def build_methods(config: Config) -> dict[str, Method]:
    """The methods of `config.methods` by name.

    Raises:
      UserError: unknown method or option, or a value out of its range.
    """
    built = {}
    for name, options in config.methods.items():
        try:
            built[name] = methods.build(name, **options)
        except UserError as error:
            text = str(error)
            raise UserError(f"config.methods{'.' if text.startswith(f'{name}: ') else ': '}{text}") from error
    return built


def named_detector(chosen: Config, num_classes: int) -> Detector:
    """The detector that `config.student` or `config.teacher` names.

    Raises:
      UserError: unknown detector or option, or a value out of its range.
    """
    return detectors.build(chosen.detector, num_classes, **chosen.options.to_dict())


def check_size(role: str, detector: Detector, image_size: tuple[int, int]) -> None:
    """Checks that the images of a run fit a detector.

    Raises:
      UserError: height or width is not a multiple of its `size_divisor`.
    """
    height, width = image_size
    if height % detector.size_divisor or width % detector.size_divisor:
        raise UserError(
            f"config.data.image_size must be multiples of {detector.size_divisor} for the {role} {detector.name}, not "
            f"{height}x{width}"
        )


def check_masks(student: Detector, config: Config) -> None:
    """Checks that the batches have masks if the student learns them.

    Raises:
      UserError: they have none.
    """
    if student.masks and not config.data.masks:
        raise UserError(
            f"config.data.masks: the student {student.name} learns masks, but the batches have none: set it to True, "
            "or choose a student without masks"
        )


def load_detector(
    role: str, chosen: Config, dataset: data.Dataset, key: Array
) -> tuple[Detector, tuple[Tree, Tree] | None]:
    """The detector of a role with its initial weights.

    Args:
      role: "student" or "teacher". The classifiers of a student's weights for other classes are re-initialised.
      chosen: `config.student` or `config.teacher`.
      dataset: of the run.
      key: PRNG key for what the weights lack.

    Returns:
      The detector, and (params, stats) or None if there are no weights.

    Raises:
      UserError: the weights cannot be read, or do not fit the detector or, for a teacher, the classes of the data.
    """
    detector = named_detector(chosen, len(dataset.classes)) if chosen.detector else None
    if not chosen.weights:
        assert detector is not None, "check_models refuses a config without detector and weights"
        return detector, None
    detector, params, stats, classes = weights.load(
        chosen.weights, detector, key=key, keep_classifiers=role == "teacher"
    )
    if classes is not None and not data.same_names(classes, dataset.classes):
        if role == "student":
            told = f"the classes of {chosen.weights} are not those of the data: the classifiers are re-initialised"
            tqdm.write(f"config.student.weights: {told}", file=sys.stderr)
            detector = detectors.build(detector.name, len(dataset.classes), **detector.options)
            return detector, (weights.reset_classifiers(detector, params, key=key), stats)
        missing = [name for name in dataset.classes if name not in classes]
        what = f"{missing[0]!r} is unknown to the {role}" if missing else "the order or number of classes differs"
        raise UserError(
            f"config.{role}.weights: the class map of {chosen.weights} does not fit the data: {what}; "
            f"{role}: {listed(classes)}; data: {listed(dataset.classes)} (if only the spelling differs, "
            "rename the classes with `kdjax import-weights --classes`)"
        )
    if detector.num_classes != len(dataset.classes):
        raise UserError(
            f"config.{role}.weights: {chosen.weights} has {detector.num_classes} classes, the data has "
            f"{len(dataset.classes)}"
        )
    return detector, (params, stats)


def load_teacher(
    chosen: Config, dataset: data.Dataset, key: Array, chosen_methods: Mapping[str, Method]
) -> tuple[Detector, tuple[Tree, Tree] | None, bool]:
    """The teacher with its weights.

    Its classes may differ from those of the data if the methods read only its feature maps; it is then not evaluated.

    Args:
      chosen: `config.teacher`.
      dataset: of the run.
      key: PRNG key for what the weights lack.
      chosen_methods: of the run, by name.

    Returns:
      The detector, (params, stats), and whether its classes are those of the data.

    Raises:
      UserError: the weights cannot be read, or do not fit the detector or the classes of the data.
    """
    try:
        return *load_detector("teacher", chosen, dataset, key), True
    except UserError:
        if reads_predictions(chosen_methods):
            raise
    detector = named_detector(chosen, len(dataset.classes)) if chosen.detector else None
    detector, params, stats, _ = weights.load(chosen.weights, detector, key=key)
    tqdm.write(
        f"config.teacher.weights: the classes of {chosen.weights} are not those of the data: only its feature maps "
        "are used; it is not evaluated",
        file=sys.stderr,
    )
    return detector, (params, stats), False


def prepare(config: Config, dataset: data.Dataset) -> Setup:
    """Builds models, programs and the states at step 0.

    Args:
      config: the settings, checked by `checks.check_settings` and `checks.check_models`.
      dataset: of the run.

    Raises:
      UserError: weights cannot be loaded, the image size does not fit a model, a method cannot compare the models, or
        the student learns masks that the batches lack.
    """
    key = jax.random.PRNGKey(config.seed)
    height, width = config.data.image_size
    student, start = load_detector("student", config.student, dataset, key)
    check_masks(student, config)
    teacher, loaded, teacher_detects = None, None, False
    chosen = build_methods(config)
    if config.teacher.weights:
        teacher, loaded, teacher_detects = load_teacher(config.teacher, dataset, key, chosen)
    for role, detector in (("student", student), ("teacher", teacher)):
        if detector:
            check_size(role, detector, (height, width))
    rule = pairing.RULES[config.pairing]
    distiller = Distiller(student, cast(Detector, teacher), chosen, rule) if chosen else None
    adapters = init_adapters(distiller, key, (height, width)) if distiller else {}

    def no_decay(params: Tree) -> Tree:
        return {
            "student": student.no_decay(params["student"]),
            "adapters": jax.tree.map(lambda leaf: leaf.ndim <= 1, params["adapters"]),
        }

    optimizer = optim.optimizer(config, no_decay)
    mesh = sharding.make_mesh()
    everywhere = sharding.replicated(mesh)
    programs = collections.Counter()

    def program(name: str, function: Callable[..., Any], **options: Any) -> jax.stages.Wrapped:
        def traced(*args: Any) -> PyTree:
            programs[name] += 1
            return function(*args)

        return jax.jit(traced, **options)

    def update(name: str, teacher: Detector | None = None) -> jax.stages.Wrapped:
        trained = in_precision(student, config.dtype)
        distiller = Distiller(trained, in_precision(teacher, config.dtype), chosen, rule) if teacher else None
        step = make_step(trained, optimizer, lambda at: optim.ema_rate(config, at), distiller=distiller)
        return program(name, step, donate_argnums=0, out_shardings=everywhere)

    roles = ["student", "twin"] if config.twin else ["student"]
    states = {role: init_state(student, key, start, adapters if role == "student" else {}, optimizer) for role in roles}
    steps = {role: update(role) for role in roles}
    if teacher:
        steps["student"] = update("student", teacher=teacher)
    variables = jax.device_put(TeacherVariables(*loaded), everywhere) if loaded else None
    observer = None
    if teacher:
        trained, frozen = (in_precision(detector, config.dtype) for detector in (student, teacher))
        observe = observe_with(Distiller(trained, frozen, chosen, rule))
        output = jax.eval_shape(observe, variables, batch_spec(config))
        if not functions_of(output):
            run = program("teacher", observe, out_shardings=sharding.batch_sharding(mesh))
            observer = Observer(observe, run, output)
    return Setup(
        config,
        dataset,
        student,
        teacher,
        chosen,
        distiller,
        teacher_detects,
        variables,
        observer,
        jax.device_put(states, everywhere),
        steps,
        programs,
        mesh,
    )


def observe_with(distiller: Distiller) -> Callable[[TeacherVariables, Batch], DetectorOutput]:
    """`Observer.function`."""

    def observe(variables: TeacherVariables, batch: Batch) -> DetectorOutput:
        return without_places(distiller.observe(batch, tuple(variables)))

    return observe


def batch_spec(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what a teacher reads of a batch."""
    rows, size = config.batch_size, tuple(config.data.image_size)
    return {
        "image": jax.ShapeDtypeStruct((rows, *size, 3), np.uint8),
        "image_size": jax.ShapeDtypeStruct((rows, 2), np.int32),
    }


def placed(setup: Setup, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch on the devices, with what the teacher says about it, unless that is there or the step runs the teacher.

    Args:
      setup: of the run.
      batch: of the loader, the rows of this host.
    """
    arrays = sharding.shard_batch(setup.mesh, batch)
    if setup.observer is None or RECORDED in arrays:
        return arrays
    return arrays | {RECORDED: setup.observer.program(setup.variables, read_by_teacher(arrays))}


def read_by_teacher(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a teacher reads of a batch, as `batch_spec`."""
    return {name: batch[name] for name in ("image", "image_size")}


def in_precision(detector: Detector, dtype: str) -> Detector:
    """The detector with images, and so all feature maps up to the predictions, in the given precision."""
    if dtype == "float32":
        return detector
    return dataclasses.replace(detector, preprocess=lambda images: detector.preprocess(images).astype(dtype))


def reads_predictions(chosen: Mapping[str, Method]) -> bool:
    """Whether a method reads predictions of the teacher, so that teacher and student must have the same classes."""
    reads = {name for method in chosen.values() for name in method.reads.teacher}
    predictions = ("rows.", "cls_logits", "box_reg", "quality", "head", "layers", "ask", "proposals", "detections")
    return any(name.startswith(predictions) for name in reads)


def init_adapters(distiller: Distiller, key: Array, image_size: tuple[int, int]) -> dict[str, Any]:
    """`Distiller.init`; an error also lists the methods that can compare this student and teacher.

    If the method itself can, with its default options, there is no list.

    Raises:
      UserError: a method cannot compare these two.
    """
    try:
        return distiller.init(key, image_size)
    except UserError as error:
        sides = distiller.student, distiller.teacher
        able = [n for n in methods.names() if not methods.refusal(n, *sides, image_size, distiller.pairing)]
        name = str(error).partition(":")[0]
        others = "" if name in able else f"; methods that run on this student and teacher: {', '.join(able)}"
        raise UserError(f"config.methods.{error}{others}") from error


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
        "data": setup.dataset.fingerprint,
        "teacher": fingerprint(setup.variables) if setup.teacher else None,
    }


def resume(setup: Setup, checkpoints: Checkpoints) -> tuple[int, Setup]:
    """Restores the newest checkpoint, if there is one.

    Returns:
      The number of updates so far, and the setup with the states after them.

    Raises:
      UserError: the checkpoint belongs to a different run, or none can be read.
    """
    note = checkpoints.note()
    if note is None:
        return 0, setup
    written = {"options": {}} | note["run"]  # older runs did not write options
    for name, value in run_fingerprint(setup).items():
        before = written.get(name)
        if before != value:
            raise UserError(
                f"workdir: {checkpoints.directory} belongs to a different run: {name} was {before!r}, is {value!r}"
                f"{' (the hash of its images, boxes and classes)' * (name == 'data')}: choose another folder"
            )
    # Also without config.json; older checkpoints do not have the settings.
    differ = differences(note["config"], setup.config) if "config" in note else []
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
    states = jax.device_put(states, sharding.replicated(setup.mesh))
    step = int(states["student"].step)
    if step != note["next_batch"]:
        raise UserError(
            f"workdir: {checkpoints.directory}: the state is at step {step}, but the data at batch "
            f"{note['next_batch']}: delete this folder to start again"
        )
    return step, setup._replace(states=states)
