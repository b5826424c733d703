"""From a config to everything that is known before the first update: models, programs and states."""

import collections
import ctypes
import dataclasses
import gc
import platform
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kdjax import detectors, files, methods, weights
from kdjax.distill import Distiller, Method
from kdjax.errors import UserError
from kdjax.training import optim, sharding
from kdjax.training.checkpoint import Checkpoints, fingerprint
from kdjax.training.step import Teacher, TrainState, init_state, make_step

# glibc's mallopt: one heap for all threads (M_ARENA_MAX), nothing mapped by itself (M_MMAP_MAX), never trimmed
# (M_TRIM_THRESHOLD).
MALLOC = {-8: 1, -4: 0, -1: -1}


class Setup(NamedTuple):
    """Everything that is known before the first update; making it finds every mistake of the user's."""

    config: ConfigDict
    dataset: object
    student: object  # Detector
    teacher: object | None
    methods: dict[str, Method]
    distiller: Distiller | None  # of student, teacher and methods, in float32
    teacher_detects: bool  # its classes are the data's, so that it can be evaluated
    variables: Teacher | None  # on all devices
    states: dict[str, TrainState]  # "student", and "twin" if there is one; on all devices
    steps: dict[str, object]  # jitted updates
    predict: dict[str, object]  # jitted predictions by model
    programs: collections.Counter  # how often each program was traced
    mesh: Mesh


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
    """The detector of a role with its initial weights: (Detector, (params, stats) or None)."""
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
        raise UserError(
            f"the class map of the {role} in {chosen.weights} does not fit the data: {what}; "
            f"{role}: {', '.join(classes)}; data: {', '.join(dataset.classes)} (where only the spelling differs, "
            "`kdjax import-weights --classes` gives the weights other names)"
        )
    if detector.num_classes != len(dataset.classes):
        raise UserError(
            f"the {role} in {chosen.weights} has {detector.num_classes} classes, the data has {len(dataset.classes)}"
        )
    return detector, (params, stats)


def load_teacher(chosen: ConfigDict, dataset, key, chosen_methods: dict[str, Method]):
    """The teacher: (Detector, (params, stats), whether its classes are the data's).

    Where the methods read only its maps, it may have other classes; it is then not evaluated.
    """
    try:
        return *load_detector("teacher", chosen, dataset, key), True
    except UserError:
        if reads_predictions(chosen_methods):
            raise
    detector = named_detector(chosen, len(dataset.classes)) if chosen.detector else None
    detector, params, stats, _ = weights.load(chosen.weights, detector, key=key)
    return detector, (params, stats), False


def prepare(config: ConfigDict, dataset) -> Setup:
    """Builds the models, the programs and the states at step 0."""
    key = jax.random.PRNGKey(config.seed)
    height, width = config.data.image_size
    student, start = load_detector("student", config.student, dataset, key)
    teacher, loaded, teacher_detects = None, None, False
    chosen = {name: methods.build(name, **options) for name, options in config.methods.items()}
    if config.teacher.weights:
        teacher, loaded, teacher_detects = load_teacher(config.teacher, dataset, key, chosen)
    for role, detector in (("student", student), ("teacher", teacher)):
        if detector and (height % detector.size_divisor or width % detector.size_divisor):
            raise UserError(
                f"config.data.image_size is {height}x{width}; the {role} {detector.name} needs multiples of "
                f"{detector.size_divisor}"
            )
    distiller = Distiller(student, teacher, chosen) if chosen else None
    adapters = init_adapters(distiller, key, (height, width)) if distiller else {}

    def no_decay(params):
        return {
            "student": student.no_decay(params["student"]),
            "adapters": jax.tree.map(lambda leaf: leaf.ndim <= 1, params["adapters"]),
        }

    optimizer = optim.optimizer(config, no_decay)
    mesh = sharding.make_mesh()
    everywhere = sharding.replicated(mesh)
    programs = collections.Counter()

    def program(name, function, **options):
        def traced(*args):
            programs[name] += 1
            return function(*args)

        return jax.jit(traced, **options)

    def update(name, teacher=None):
        trained, frozen = (in_precision(detector, config.dtype) for detector in (student, teacher))
        distiller = Distiller(trained, frozen, chosen) if teacher else None
        step = make_step(trained, optimizer, lambda at: optim.ema_rate(config, at), distiller=distiller)
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
        steps["student"] = update("student", teacher=teacher)
        predict["teacher"] = predictor("predict_teacher", teacher)
    variables = jax.device_put(Teacher(*loaded), everywhere) if teacher else None
    return Setup(
        config,
        dataset,
        student,
        teacher,
        chosen,
        distiller,
        teacher_detects,
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


def reads_predictions(chosen: dict[str, Method]) -> bool:
    """Whether a method reads what the teacher's head predicts, so that the classes of both sides must agree."""
    reads = {name for method in chosen.values() for name in method.reads.teacher}
    return any(name.startswith(("rows.", "cls_logits", "box_reg", "quality", "head")) for name in reads)


def init_adapters(distiller: Distiller, key, image_size: tuple[int, int]) -> dict:
    """`Distiller.init`; a refusal names the methods that can compare this student and teacher.

    Raises:
      UserError: a method cannot compare these two.
    """
    try:
        return distiller.init(key, image_size)
    except UserError as error:
        able = [n for n in methods.names() if not methods.refusal(n, distiller.student, distiller.teacher, image_size)]
        raise UserError(
            f"config.methods.{error}; methods that run on this student and teacher: {', '.join(able)}"
        ) from error


def run_fingerprint(setup: Setup) -> dict:
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
    for key, value in run_fingerprint(setup).items():
        theirs = written.get(key)
        if theirs != value:
            raise UserError(
                f"the checkpoint in {checkpoints.manager.directory} is of another run: its {key} is {theirs!r}, this "
                f"run's is {value!r}; choose another --workdir"
            )
    states, note = checkpoints.restore(setup.states)
    states = jax.device_put(states, sharding.replicated(setup.mesh))
    step = int(states["student"].step)
    if step != note["next_batch"]:
        raise UserError(f"the checkpoint's state is at step {step}, but its data position is {note['next_batch']}")
    return step, setup._replace(states=states)
