"""From a config to models, initial states and compiled updates."""

import collections
import ctypes
import dataclasses
import gc
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from kdjax import data, detectors, files, methods, resources, sharding, weights
from kdjax.detectors.api import Detector, Tree
from kdjax.distill import Distiller, Distillers, Method, pairing, teachers
from kdjax.distill.distiller import method_key
from kdjax.distill.teachers import RECORDED, functions_of, without_places
from kdjax.errors import UserError, listed, prefix
from kdjax.inference.onnx_teacher import OnnxTeacher, on_host
from kdjax.inference.onnx_teacher import load_teacher as open_onnx
from kdjax.structs import FOUND, Array, DetectorOutput, PyTree
from kdjax.training import optim
from kdjax.training.checkpoint import Checkpoints
from kdjax.training.config import Config, differences
from kdjax.training.step import UNLABELLED, Batch, TeacherVariables, TrainState, init_state, make_step
from kdjax.weights.checkpoint import fingerprint, flat

# Options of glibc's mallopt: one arena (M_ARENA_MAX), no mmap for large blocks (M_MMAP_MAX), no trimming
# (M_TRIM_THRESHOLD).
MALLOC = {-8: 1, -4: 0, -1: -1}


class Observer(NamedTuple):
    """A teacher as a program of its own, ahead of the student's step."""

    # (variables of the teacher, batch) -> what the methods read of it; every array has a batch axis
    function: Callable[[Any, Batch], DetectorOutput]
    # the function, jitted for the devices of the run; of a teacher on the host the function itself
    program: Callable[[Any, Batch], DetectorOutput]
    output: DetectorOutput  # shapes of what it returns for a batch of the run


class TeacherOfRun(NamedTuple):
    """A teacher of a run, with the methods that compare the student with it."""

    name: str  # of config.teachers; "" of config.teacher
    detector: Any  # a `Detector`, an `OnnxTeacher`, or for a mean of others and for a file of detections a `Custom`
    detects: bool  # it is a detector with the classes of the data, so that it can be evaluated
    distiller: Distiller  # of student, teacher and methods, in float32
    variables: Any  # of a detector `TeacherVariables`, of an ONNX file its hash, of a mean a tuple, of detections ()
    # None: it runs inside the step, because its output holds functions or is read from the batch
    observer: Observer | None
    file: data.Found | None = None  # of detections, if it is one

    @property
    def model(self) -> str:
        """What it is: the name of its detector, or what else."""
        return "file of detections" if self.file else getattr(self.detector, "name", "mean")

    @property
    def hash(self) -> str:
        """The hash of its weights, or of its file."""
        return self.file.sha256 if self.file else fingerprint(self.variables)

    @property
    def methods(self) -> Mapping[str, Method]:
        """The methods by name."""
        return self.distiller.methods

    @property
    def on_host(self) -> bool:
        """Whether it runs on the host, ahead of the step."""
        return isinstance(self.detector, OnnxTeacher)

    @property
    def setting(self) -> str:
        """Where its settings are."""
        return f"config.teachers.{self.name}" if self.name else "config.teacher"

    def settings(self, config: Config) -> Config:
        """Its settings in the config of the run."""
        return config.teachers[self.name] if self.name else config.teacher

    @property
    def role(self) -> str:
        """What its evaluation is called."""
        return f"teacher/{self.name}" if self.name else "teacher"


class Setup(NamedTuple):
    """Everything that is known before the first update."""

    config: Config
    dataset: data.Dataset
    student: Detector
    teachers: tuple[TeacherOfRun, ...]  # none, that of config.teacher, or those of config.teachers
    distiller: Distiller | Distillers | None  # of all teachers, in float32
    variables: Any  # of all teachers, as the distiller takes them
    states: dict[str, TrainState]  # "student" and, with a twin, "twin"; on all devices
    steps: dict[str, jax.stages.Wrapped]  # role -> jitted `Update`
    programs: collections.Counter[str]  # how often each program was traced
    mesh: Mesh
    # variables, batch of images without labels -> what that batch is to be in a step; None without such images
    unlabelled: jax.stages.Wrapped | None = None

    @property
    def methods(self) -> Mapping[str, Method]:
        """The methods by name; with several teachers by "teacher/method"."""
        return {} if self.distiller is None else self.distiller.methods


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


def build_methods(chosen: Config, where: str = "config.methods") -> dict[str, Method]:
    """Methods by name.

    Args:
      chosen: {method: its options}, as `config.methods`.
      where: begins the message of an error.

    Raises:
      UserError: unknown method or option, or a value out of its range.
    """
    built = {}
    for name, options in chosen.items():
        try:
            built[name] = methods.build(name, **options)
        except UserError as error:
            text = str(error)
            raise UserError(f"{where}{'.' if text.startswith(f'{name}: ') else ': '}{text}") from error
    return built


def all_methods(config: Config) -> dict[str, Method]:
    """The methods of a run by name, with several teachers by "teacher/method".

    Raises:
      UserError: unknown method or option, or a value out of its range.
    """
    several = {
        f"{name}/{method}": built
        for name, chosen in config.teachers.items()
        for method, built in build_methods(chosen.methods, f"config.teachers.{name}.methods").items()
    }
    return several | build_methods(config.methods)


def teacher_configs(config: Config) -> dict[str, tuple[Config, Config]]:
    """The settings and the options of the methods of every teacher, by name.

    Returns:
      {"": (config.teacher, config.methods)} or one entry for each of config.teachers; empty without a teacher.
    """
    if config.teachers:
        return {name: (chosen, chosen.methods) for name, chosen in config.teachers.items()}
    return {"": (config.teacher, config.methods)} if config.teacher.weights else {}


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
    role: str, chosen: Config, dataset: data.Dataset, key: Array, where: str = ""
) -> tuple[Detector, tuple[Tree, Tree] | None]:
    """The detector of a role with its initial weights.

    Args:
      role: "student" or "teacher". The classifiers of a student's weights for other classes are re-initialised.
      chosen: `config.student` or `config.teacher`.
      dataset: of the run.
      key: PRNG key for what the weights lack.
      where: begins messages; "" = "config.ROLE".

    Returns:
      The detector, and (params, stats) or None if there are no weights.

    Raises:
      UserError: the weights cannot be read, or do not fit the detector or, for a teacher, the classes of the data.
    """
    where = where or f"config.{role}"
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
            tqdm.write(f"{where}.weights: {told}", file=sys.stderr)
            detector = detectors.build(detector.name, len(dataset.classes), **detector.options)
            return detector, (weights.reset_classifiers(detector, params, key=key), stats)
        missing = [name for name in dataset.classes if name not in classes]
        what = f"{missing[0]!r} is unknown to the {role}" if missing else "the order or number of classes differs"
        raise UserError(
            f"{where}.weights: the class map of {chosen.weights} does not fit the data: {what}; "
            f"{role}: {listed(classes)}; data: {listed(dataset.classes)} (if only the spelling differs, "
            "rename the classes with `kdjax import-weights --classes`)"
        )
    if detector.num_classes != len(dataset.classes):
        raise UserError(
            f"{where}.weights: {chosen.weights} has {detector.num_classes} classes, the data has {len(dataset.classes)}"
        )
    return detector, (params, stats)


def members(chosen: Config) -> list[str]:
    """The teachers whose mean a teacher is; none if it is a model of its own."""
    return chosen.mean.split("+") if "mean" in chosen and chosen.mean else []


def of_file(chosen: Config) -> bool:
    """Whether a teacher is a file of detections.

    Args:
      chosen: its settings.
    """
    return chosen.weights.lower().endswith(".json")


def with_detections(config: Config, dataset: data.Dataset) -> data.Dataset:
    """The data with the detections of the teacher that is a file, if there is one; says how many they are.

    Raises:
      UserError: the file cannot be used.
    """
    for name, (chosen, _) in teacher_configs(config).items():
        if of_file(chosen):
            with prefix(f"{f'config.teachers.{name}' if name else 'config.teacher'}.weights"):
                dataset = data.with_found(dataset, resources.model_path(chosen.weights))
            parts = {"training images": dataset.splits["train"], "images without labels": dataset.unlabelled}
            if not jax.process_index():
                print("\n".join(one.found.told(what) for what, one in parts.items() if one and one.found))
    return dataset


def load_teacher(
    where: str, chosen: Config, dataset: data.Dataset, key: Array, *, predictions: bool
) -> tuple[Detector, tuple[Tree, Tree] | None, bool]:
    """A teacher with its weights.

    Its classes may differ from those of the data if the methods read only its feature maps; it is then not evaluated.

    Args:
      where: "config.teacher" or "config.teachers.NAME"; begins messages.
      chosen: its settings.
      dataset: of the run.
      key: PRNG key for what the weights lack.
      predictions: whether a method reads predictions of it.

    Returns:
      The detector, (params, stats), and whether its classes are those of the data.

    Raises:
      UserError: the weights cannot be read, or do not fit the detector or the classes of the data.
    """
    try:
        return *load_detector("teacher", chosen, dataset, key, where), True
    except UserError:
        if predictions:
            raise
    detector = named_detector(chosen, len(dataset.classes)) if chosen.detector else None
    detector, params, stats, _ = weights.load(chosen.weights, detector, key=key)
    tqdm.write(
        f"{where}.weights: the classes of {chosen.weights} are not those of the data: only its feature maps "
        "are used; it is not evaluated",
        file=sys.stderr,
    )
    return detector, (params, stats), False


def load_onnx(where: str, chosen: Config, dataset: data.Dataset, *, predictions: bool) -> tuple[OnnxTeacher, bool]:
    """A teacher that is an ONNX file.

    Args:
      where: "config.teacher" or "config.teachers.NAME"; begins messages.
      chosen: its settings.
      dataset: of the run, with whose classes those of the file are matched by name.
      predictions: whether a method reads predictions of it; if not, its classes may be others.

    Returns:
      The teacher, and whether it finds objects of all classes of the data.

    Raises:
      UserError: the file cannot be read, does not fit its description, or lacks a class of the data.
    """
    with prefix(where):
        teacher = open_onnx(resources.model_path(chosen.weights), chosen.layout, chosen.options.to_dict())
        if not teacher.detects:
            return teacher, False
        try:
            return teacher.matched(dataset.classes), True
        except UserError as error:
            if predictions:
                raise
            tqdm.write(f"{where}.weights: {error}: only its maps are used; it is not evaluated", file=sys.stderr)
            return teacher, False


def host_observer(teacher: TeacherOfRun, config: Config) -> Observer:
    """The observer of a teacher that runs on the host; its program takes and returns arrays of the host."""

    def observe(variables: Any, batch: Batch) -> DetectorOutput:  # noqa: ANN401 - a tree of arrays
        del variables
        return on_host(teacher.distiller, {name: np.asarray(value) for name, value in batch.items()})

    one = {name: np.zeros((1, *leaf.shape[1:]), leaf.dtype) for name, leaf in batch_spec(config).items()}
    one["image_size"] += np.array(one["image"].shape[1:3], np.int32)
    output = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((config.batch_size, *leaf.shape[1:]), leaf.dtype), observe(None, one)
    )
    return Observer(observe, observe, output)


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
    image_size = tuple(config.data.image_size)
    dataset = with_detections(config, dataset)
    student, start = load_detector("student", config.student, dataset, key)
    check_masks(student, config)
    check_size("student", student, image_size)
    mesh = sharding.make_mesh()
    everywhere = sharding.replicated(mesh)
    programs = collections.Counter()

    def program(name: str, function: Callable[..., Any], **options: Any) -> jax.stages.Wrapped:
        def traced(*args: Any) -> PyTree:
            programs[name] += 1
            return function(*args)

        return jax.jit(traced, **options)

    found = _load_teachers(config, dataset, key, student, mesh, program)
    distiller, variables = _together(found)
    adapters = init_adapters(distiller, key, image_size) if distiller else {}

    def no_decay(params: Tree) -> Tree:
        return {
            "student": student.no_decay(params["student"]),
            "adapters": jax.tree.map(lambda leaf: leaf.ndim <= 1, params["adapters"]),
        }

    optimizer = optim.optimizer(config, no_decay)

    def update(name: str, distiller: Distiller | Distillers | None) -> jax.stages.Wrapped:
        trained = in_precision(student, config.dtype)
        step = make_step(trained, optimizer, lambda at: optim.ema_rate(config, at), distiller=distiller)
        return program(name, step, donate_argnums=0, out_shardings=everywhere)

    unlabelled = None
    if config.data.unlabelled:
        check_unlabelled(found, distiller, image_size)
        look = look_with([one._replace(distiller=_in_precision(one, config)) for one in found], config, dataset)
        unlabelled = program("unlabelled images", look, out_shardings=sharding.batch_sharding(mesh))
    roles = ["student", "twin"] if config.twin else ["student"]
    states = {role: init_state(student, key, start, adapters if role == "student" else {}, optimizer) for role in roles}
    trained, _ = _together([teacher._replace(distiller=_in_precision(teacher, config)) for teacher in found])
    steps = {role: update(role, trained if role == "student" else None) for role in roles}
    return Setup(
        config,
        dataset,
        student,
        found,
        distiller,
        variables,
        jax.device_put(states, everywhere),
        steps,
        programs,
        mesh,
        unlabelled,
    )


def _load_teachers(
    config: Config,
    dataset: data.Dataset,
    key: Array,
    student: Detector,
    mesh: Mesh,
    program: Callable[..., jax.stages.Wrapped],
) -> tuple[TeacherOfRun, ...]:
    """All teachers, also those that have no methods and are only a part of a mean."""
    image_size, rule, chosen = tuple(config.data.image_size), pairing.RULES[config.pairing], teacher_configs(config)
    found: dict[str, TeacherOfRun] = {}
    averaged = {member for own, _ in chosen.values() for member in members(own)}
    # Means come last.
    for name, (own, options) in sorted(chosen.items(), key=lambda item: bool(members(item[1][0]))):
        where, of_methods = (f"config.teachers.{name}", f"config.teachers.{name}.methods") if name else _ONE
        built, file = build_methods(options, of_methods), None
        if averaging := [found[member] for member in members(own)]:
            with prefix(where):
                detector = teachers.mean([in_precision(member.detector, config.dtype) for member in averaging])
                detector.spec(image_size)
            detects, variables = False, tuple(member.variables for member in averaging)
        elif of_file(own):
            detector, detects, variables, file = teachers.from_file(), False, (), dataset.splits["train"].found
        elif own.layout:
            detector, detects = load_onnx(where, own, dataset, predictions=reads_predictions(built))
            variables = jax.device_put(detector.variables, sharding.replicated(mesh))
        else:
            predictions = reads_predictions(built) or name in averaged
            detector, loaded, detects = load_teacher(where, own, dataset, key, predictions=predictions)
            check_size("teacher", detector, image_size)
            assert loaded is not None, "check_models refuses teachers without weights"
            variables = jax.device_put(TeacherVariables(*loaded), sharding.replicated(mesh))
        teacher = TeacherOfRun(
            name, detector, detects, Distiller(student, detector, built, rule), variables, None, file
        )
        if built and teacher.on_host:
            # Whether the methods can compare the two; what is read of the file depends on it.
            _init_adapters(teacher.distiller, key, image_size, of_methods)
            with prefix(where):
                teacher = teacher._replace(observer=host_observer(teacher, config))
        elif built and file is None:
            observe = observe_with(_in_precision(teacher, config))
            output = jax.eval_shape(observe, variables, batch_spec(config))
            if not functions_of(output):
                run = program(teacher.role, observe, out_shardings=sharding.batch_sharding(mesh))
                teacher = teacher._replace(observer=Observer(observe, run, output))
        found[name] = teacher
    return tuple(found[name] for name in chosen)


_ONE = ("config.teacher", "config.methods")


def _in_precision(teacher: TeacherOfRun, config: Config) -> Distiller:
    """The distiller of a teacher, with both models in the precision of the run."""
    student, built = teacher.distiller.student, teacher.distiller.methods
    if isinstance(teacher.detector, Detector):
        detector: Any = in_precision(teacher.detector, config.dtype)
    else:
        detector = teacher.detector
    return Distiller(in_precision(student, config.dtype), detector, built, pairing.RULES[config.pairing])


def _together(found: Sequence[TeacherOfRun]) -> tuple[Distiller | Distillers | None, Any]:
    """The distiller of all teachers with methods, and the variables that it takes."""
    if not found:
        return None, None
    if not found[0].name:
        return found[0].distiller, found[0].variables
    used = [teacher for teacher in found if teacher.methods]
    return Distillers({one.name: one.distiller for one in used}), {one.name: one.variables for one in used}


def observe_with(distiller: Distiller) -> Callable[[Any, Batch], DetectorOutput]:
    """`Observer.function`."""

    def observe(variables: Any, batch: Batch) -> DetectorOutput:  # noqa: ANN401 - a tree of arrays
        return without_places(distiller.observe(batch, variables))

    return observe


def unlabelled_rows(config: Config) -> int:
    """Number of images without labels in a batch."""
    return round(config.data.unlabelled_ratio * config.batch_size) if config.data.unlabelled else 0


def gives_boxes(found: Sequence[TeacherOfRun]) -> TeacherOfRun | None:
    """The teacher whose detections are the boxes of images without labels: the first that has the data's classes."""
    return next((teacher for teacher in found if teacher.detects or teacher.file), None)


def sitting_out(found: Sequence[TeacherOfRun], image_size: tuple[int, int]) -> list[str]:
    """The methods that do not see images without labels: they read boxes, and no teacher gives any."""
    if gives_boxes(found):
        return []
    return [
        f"{teacher.name}/{name}" if teacher.name else name
        for teacher in found
        for name in teacher.methods.keys() - teacher.distiller.without_boxes(image_size).methods.keys()
    ]


def check_unlabelled(
    found: Sequence[TeacherOfRun], distiller: Distiller | Distillers | None, image_size: tuple[int, int]
) -> None:
    """Checks that some method sees the images without labels.

    Raises:
      UserError: none does.
    """
    out = sitting_out(found, image_size)
    if distiller is not None and len(out) == len(distiller.methods):
        raise UserError(
            f"config.data.unlabelled: {', '.join(sorted(out))} read boxes, and no teacher has the classes of the data, "
            "so that it could give some: leave it empty, or take methods that compare maps or rows"
        )


def look_with(
    found: Sequence[TeacherOfRun], config: Config, dataset: data.Dataset
) -> Callable[[Mapping[str, Any], Batch], dict[str, Any]]:
    """What makes a batch of images without labels into what a step takes: with all that the teachers say about it."""
    giver = gives_boxes(found)

    def look(variables: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
        said = recorded(batch, found)
        said |= {
            one.name: without_places(one.distiller.observe(batch, variables[one.name]))
            for one in found
            if one.observer is not None and not one.on_host
        }
        boxes = {}
        if giver and not giver.on_host:
            output = giver.detector.observe(variables[giver.name], batch)
            best = output.detections or giver.detector.decode(
                output, batch["image_size"], pre_nms=1000, max_detections=dataset.max_boxes
            )
            valid = best.valid & (best.scores >= config.data.unlabelled_score)
            boxes = {"boxes": best.boxes, "labels": best.labels, "valid": valid}
        return dict(batch) | boxes | attached(said)

    return look


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
    batches = data.train_batches(setup.dataset, config.data, batch_size=config.batch_size, attach=attach, **common)
    if not config.data.unlabelled:
        return batches
    further = data.without_labels(setup.dataset)
    more = data.train_batches(further, config.data, batch_size=unlabelled_rows(config), **common)
    detections = FOUND if further.splits["train"].found else ()
    return data.Beside(batches, more, UNLABELLED, ("image", "image_size", *detections))


def batch_spec(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what a teacher reads of a batch."""
    rows, size = config.batch_size, tuple(config.data.image_size)
    return {
        "image": jax.ShapeDtypeStruct((rows, *size, 3), np.uint8),
        "image_size": jax.ShapeDtypeStruct((rows, 2), np.int32),
    }


def placed(setup: Setup, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch on the devices, with what the teachers say about it, unless that is there or the step runs the teacher.

    Args:
      setup: of the run.
      batch: of the loader, the rows of this host.
    """
    arrays = sharding.shard_batch(setup.mesh, with_host(setup, batch))
    said = recorded(arrays, setup.teachers)
    for teacher in setup.teachers:
        if teacher.observer is not None and teacher.name not in said:
            said[teacher.name] = teacher.observer.program(teacher.variables, read_by_teacher(arrays))
    if setup.unlabelled is not None and UNLABELLED in arrays:
        variables = {teacher.name: teacher.variables for teacher in setup.teachers}
        arrays[UNLABELLED] = setup.unlabelled(variables, arrays[UNLABELLED])
    return arrays | attached(said)


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


def recorded(batch: Batch, found: Sequence[TeacherOfRun]) -> dict[str, DetectorOutput]:
    """What a batch holds of the teachers, by name."""
    if RECORDED not in batch:
        return {}
    return dict(batch[RECORDED]) if found and found[0].name else {"": batch[RECORDED]}


def attached(said: Mapping[str, DetectorOutput]) -> dict[str, Any]:
    """The entry of a batch for what its teachers say, as the distiller takes it; by the names of the teachers."""
    if not said:
        return {}
    return {RECORDED: said[""] if "" in said else dict(said)}


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


def init_adapters(distiller: Distiller | Distillers, key: Array, image_size: tuple[int, int]) -> dict[str, Any]:
    """`Distiller.init`; an error also lists the methods that can compare this student and teacher.

    If the method itself can, with its default options, there is no list.

    Raises:
      UserError: a method cannot compare these two.
    """
    if isinstance(distiller, Distillers):
        return {
            name: _init_adapters(one, method_key(key, name), image_size, f"config.teachers.{name}.methods")
            for name, one in distiller.by_teacher.items()
        }
    return _init_adapters(distiller, key, image_size, "config.methods")


def _init_adapters(distiller: Distiller, key: Array, image_size: tuple[int, int], where: str) -> dict[str, Any]:
    try:
        return distiller.init(key, image_size)
    except UserError as error:
        sides = distiller.student, distiller.teacher
        able = [n for n in methods.names() if not methods.refusal(n, *sides, image_size, distiller.pairing)]
        name = str(error).partition(":")[0]
        others = "" if name in able else f"; methods that run on this student and teacher: {', '.join(able)}"
        raise UserError(f"{where}.{error}{others}") from error


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
        "teacher": teacher_hash(setup),
    }


def teacher_hash(setup: Setup) -> Any:  # noqa: ANN401 - as json holds it
    """The hash of the teacher's weights or file; of several teachers by name; None without."""
    found = {one.name: one.hash for one in setup.teachers}
    return found.get("", found or None)


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
    differ = np.flatnonzero(np.asarray(old) != np.asarray(new))
    if len(differ):
        raise UserError(
            f"config.extend: of the {done} steps that are done, those from {differ[0]} on had another learning rate "
            f"than they have in a run of {config.steps} steps: only runs with config.optimizer.flat=1 or "
            "config.optimizer.drops, and others before their decay, can be extended; start a new one from "
            "config.student.weights"
        )


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
    states = jax.device_put(states, sharding.replicated(setup.mesh))
    step = int(states["student"].step)
    if step != note["next_batch"]:
        raise UserError(
            f"workdir: {checkpoints.directory}: the state is at step {step}, but the data at batch "
            f"{note['next_batch']}: delete this folder to start again"
        )
    return step, setup._replace(states=states)
