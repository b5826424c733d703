"""Is the set-up right? Looks at a run for a minute before hours are spent on it; every finding says what to do.

What is measured is measured on the run itself: its detectors with their start weights, its batches, its methods, its
compiled step. What is judged by a rule of thumb says so.
"""

import contextlib
import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from kdjax import data, weights
from kdjax.data.coco import CLIPPED
from kdjax.detectors.api import Detector, flatten
from kdjax.errors import prefix
from kdjax.evals import coco, complexity, tide
from kdjax.methods import api
from kdjax.train import loop, optim
from kdjax.train.step import compare, targets_of, weights_of

FINE, LOOK, FAULT = "fine", "look", "fault"
PRIOR = 0.1  # mean probability of a class at the start; a head with its focal prior has 0.01
DROWNED, NOTHING = 0.97, 1e-3  # share of the gradient at the neck that a method may have
FAR, MOST, FEW = 100, 0.5, 0.03  # a weight this many times the published one or its inverse, and the share it may have
# Where Linux tells the memory that is left, and the limit of a container.
MEMORY, GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
TINY = 4  # px on the canvas: the side of a box of half a cell of the finest level
# Ways in which images reach a detector, beside its own: f(u8[B, H, W, 3] RGB, its own input) -> input.
MISTAKES = {
    "its red and blue channels are swapped": lambda images, own: own[..., ::-1],
    "it wants pixels of 0 .. 255 as they are, RGB": lambda images, own: images.astype(jnp.float32),
    "it wants pixels of 0 .. 255 as they are, BGR": lambda images, own: images[..., ::-1].astype(jnp.float32),
    "it wants pixels of 0 .. 1, RGB": lambda images, own: images / 255.0,
    "it wants ImageNet's mean and deviation taken out, BGR": lambda images, own: _normalised(images)[..., ::-1],
    "it wants ImageNet's mean and deviation taken out, RGB": lambda images, own: _normalised(images),
}


class Finding(NamedTuple):
    """One thing that was looked at."""

    level: str  # FINE, LOOK (worth a thought) or FAULT
    what: str  # a word or two
    said: str  # a sentence with the metrics, and what to do unless all is fine


def examine(config: ConfigDict, *, image_count: int = 64) -> Iterator[Finding]:
    """Everything that can be known before the first step of a run.

    Args:
      config: of the run.
      image_count: of the validation split, on which a detector with weights is tried.

    Yields:
      The findings, as they come; of a run that would be refused that alone, and nothing on its losses if they would not
      fit.
    """
    try:
        loop.check_settings(config)
        loop.check_models(config)
        with prefix("config.data"):
            dataset = data.open_dataset(config.data)
        loop.check_truth(dataset)
        loop.prepare_process(config.compile_cache)
        setup = loop.prepare(config, dataset)
        batch = loop.first_batch_with_objects(setup)
    except (ValueError, OSError) as error:
        yield Finding(FAULT, "start", f"the run would be refused: {error}")
        return
    yield from of_data(setup)
    yield from of_schedule(config, dataset.splits["train"].size)
    if setup.teacher:
        yield of_classes("teacher", config.teacher, dataset)[0]
        yield from of_weights("teacher", setup.teacher, setup.variables, setup, image_count)
        yield from of_sizes(setup)
        yield from of_taps(setup)
    if config.student.weights:
        finding, kept = of_classes("student", config.student, dataset)
        yield finding
        if kept:
            yield from of_weights("student", setup.student, loop.ema(setup.states["student"]), setup, image_count)
    else:
        yield from of_frozen(setup.student)
    program = of_program(setup, batch)
    yield from program
    if any(finding.level == FAULT for finding in program):
        return  # what follows needs as much memory
    values, pulls, start = strengths(setup, batch)
    adapted = [name for name, params in setup.states["student"].params["adapters"].items() if params]
    if any(shares(setup, pulls)[name] < NOTHING for name in adapted):
        values, pulls, start = strengths(setup, batch, grown(setup, batch))
    yield from of_start(values, start)
    yield from of_terms(setup, values, pulls)


# ------------------------------------------------------------------------------------------------ data and schedule


def of_data(setup: loop.Setup) -> list[Finding]:
    """What was dropped, objects too small for the canvas, classes without objects."""
    dataset, found = setup.dataset, []
    truth = data.ground_truth(dataset, "train")
    by_id = {image["id"]: image for image in truth["images"]}
    objects = [entry for entry in truth["annotations"] if not entry["iscrowd"]]
    for role, split in dataset.splits.items():
        dropped = sum(entry["action"] == "dropped" for entry in split.log)
        total = len(data.ground_truth(dataset, role)["annotations"]) + dropped
        clipped = sum(entry["reason"] == CLIPPED for entry in split.log)
        lost = max(dropped, clipped / 2)
        level = FAULT if lost > 0.2 * total else LOOK if lost > 0.05 * total else FINE
        said = f"{split.size} images, {dropped} of {total} objects dropped, {clipped} clipped to the image"
        if level != FINE:
            said += (
                ": --config.data.check=True lists them, and draws boxes, which must be x, y, width, height in pixels"
            )
        found.append(Finding(level, f"{role} data", said))
    canvas = np.array(setup.config.data.image_size)
    sides = [
        min(entry["bbox"][2:]) * min(canvas / (by_id[entry["image_id"]]["height"], by_id[entry["image_id"]]["width"]))
        for entry in objects
    ]
    tiny = float(np.mean(np.array(sides) < TINY)) if sides else 0.0
    advice = ": a larger config.data.image_size shows more of them" if tiny > 0.2 else ""
    said = f"{tiny:.0%} of the objects are under {TINY} px on the canvas of {canvas[0]}x{canvas[1]}{advice}"
    found.append(Finding(LOOK if tiny > 0.2 else FINE, "small objects", said))
    seen = {entry["category_id"] for entry in objects}
    absent = [n for n, key in zip(dataset.classes, dataset.category_ids, strict=True) if key not in seen]
    if absent:
        found.append(Finding(LOOK, "classes", f"no training image holds {', '.join(absent)}: it cannot be learned"))
    return found


def of_schedule(config: ConfigDict, size: int) -> list[Finding]:
    """Learning rate, length, moving average and the methods' schedules; rules of thumb.

    Args:
      config: of the run.
      size: training images.
    """
    found = []
    rule = optim.linear_rule(config)
    rate, steps, sgd = config.optimizer.lr or rule, config.steps, config.optimizer.name == "sgd"
    norm = "mmdetection's 0.01 for 16" if sgd else "RTMDet's 0.004 for 256"
    times = f"{rate:.2g}, {rate / rule:.2g} times what {norm} images is for {config.batch_size}"
    # With AdamW small batches bear more than the linear rule gives them.
    if rate > max(4 * rule, 0.0 if sgd else 0.012):
        found.append(Finding(FAULT, "learning rate", f"{times}: too high, config.optimizer.lr=0.0 follows the rule"))
    elif rate > 4 * rule:
        said = f"{times}: small models that start from random numbers bear it; config.optimizer.lr=0.0 follows the rule"
        found.append(Finding(LOOK, "learning rate", said))
    elif rate < rule / 4 and config.student.weights:
        found.append(Finding(LOOK, "learning rate", f"{times}: low, which suits fine-tuning only"))
    elif rate < rule / 4:
        found.append(Finding(FAULT, "learning rate", f"{times}: too low, config.optimizer.lr=0.0 follows the rule"))
    else:
        found.append(Finding(FINE, "learning rate", times))
    path = float(jnp.sum(optim.learning_rate(config)(jnp.arange(steps))))
    if path < 0.5 and not sgd and not config.student.weights:
        said = (
            f"{steps} steps at this rate move a weight by at most {path:.2g}: too little to learn from random "
            "numbers; train longer, or raise config.optimizer.lr"
        )
        found.append(Finding(FAULT, "length", said))
    rounds = steps * config.batch_size / size
    if rounds < 2:
        said = f"{steps} steps of {config.batch_size} show each of the {size} images {rounds:.1f} times: train longer"
        found.append(Finding(LOOK, "rounds", said))
    old = _age(config)
    if old > 0.5:
        said = (
            f"{old:.0%} of what is handed out would be weights of the first half of the run: lengthen config.ema.ramp "
            f"(it is {config.ema.ramp}, the run has {steps} steps)"
        )
        found.append(Finding(FAULT, "moving average", said))
    else:
        found.append(Finding(FINE, "moving average", f"{old:.0%} of it is of the first half of the run"))
    for name, options in config.methods.items():
        active = float(np.mean(np.asarray(api.build(name, **options).scale(np.arange(steps)))))
        if active < 0.1:
            said = f"its start, stop, warmup and decay give it {active:.0%} of its weight over the {steps} steps"
            found.append(Finding(FAULT if active < 0.01 else LOOK, name, said))
    return found


def _age(config: ConfigDict) -> float:
    """The share of the weights from before half of the run in the moving average at its end."""
    rates = np.asarray(optim.ema_rate(config, np.arange(config.steps // 2, config.steps)))
    return float(np.prod(1 - rates))


# ------------------------------------------------------------------------------------------------ models with weights


def of_weights(role: str, detector, variables, setup: loop.Setup, image_count: int) -> list[Finding]:
    """A detector with weights, tried on the user's images: as it is, with its input changed, and without classes."""
    dataset = setup.dataset
    truth = data.ground_truth(dataset, "val", limit=image_count)
    ids = list(dataset.category_ids)
    here = jax.local_devices()[0]
    variables = jax.tree.map(lambda leaf: jax.device_put(leaf.addressable_data(0), here), tuple(variables))

    @jax.jit
    def predict(variables, x, image_size):
        return detector.decode(detector.apply(*variables, x, train=False)[0], image_size)

    def detections(change: Callable) -> list[dict]:
        found = []
        batches = data.eval_batches(
            dataset,
            "val",
            setup.config.data,
            batch_size=setup.config.eval.batch_size,
            limit=image_count,
            round_down=detector.round_down,
        )
        with contextlib.closing(batches):
            for batch in batches:
                images = jnp.asarray(batch["image"])
                output = predict(variables, change(images, detector.preprocess(images)), batch["image_size"])
                found += coco.to_coco(batch, jax.device_get(output), ids)
        return found

    own = detections(lambda images, own: own)
    metrics, loose = coco.coco_metrics(truth, own), coco.coco_metrics(truth, own, use_categories=False)
    ap, ap50 = metrics["AP"], metrics["AP50"]
    measured = f"AP {100 * ap:.1f}, AP50 {100 * ap50:.1f} on {len(truth['images'])} validation images"
    if min(ap50, loose["AP50"]) < 0:
        return [Finding(LOOK, role, f"the first {image_count} validation images hold no object to try it on")]
    ways = tqdm(MISTAKES.items(), desc=f"try the {role}'s input otherwise", unit="way", leave=False)
    others = {way: coco.coco_metrics(truth, detections(change))["AP50"] for way, change in ways}
    way = max(others, key=others.get)
    wrong = _confusions(truth, own, dataset)
    explained = others[way] > max(ap50 + 0.05, 1.1 * ap50)
    confused = bool(wrong) and loose["AP50"] > ap50 + 0.05
    if explained and not (confused and others[way] < 0.8 * loose["AP50"]):
        said = f"{measured}, but AP50 {100 * others[way]:.1f} if {way}: mend the detector's `preprocess`"
        return [Finding(FAULT, f"{role}'s input", said)]
    if confused:
        said = f"{measured}, but AP50 {100 * loose['AP50']:.1f} if classes are not told apart: the class map is wrong"
        return [Finding(FAULT, f"{role}'s classes", f"{said} ({'; '.join(wrong)})")]
    if ap50 < 0.1:
        said = f"{measured}: it does not know these images; its weights are of other data, or not trained, or the boxes"
        said += " are not where the objects are (--config.data.check=True draws them)"
        return [Finding(FAULT if role == "teacher" else LOOK, role, said)]
    return [Finding(LOOK if ap50 < 0.3 else FINE, role, measured)]


def _confusions(truth: dict, found: list[dict], dataset) -> list[str]:
    """The classes whose detections mostly lie on objects of another; each image's best count, as many as objects."""
    kept = []
    for image in truth["images"]:
        objects = sum(a["image_id"] == image["id"] and not a["iscrowd"] for a in truth["annotations"])
        kept += sorted((d for d in found if d["image_id"] == image["id"]), key=lambda d: -d["score"])[:objects]
    of_objects = tide.confusion(truth, kept)[:-1, :-1].T  # a row for each class of the detector
    most = of_objects.argmax(1)
    return [
        f"what it calls {dataset.classes[label]!r} is {dataset.classes[most[label]]!r}"
        for label in np.flatnonzero((of_objects.sum(1) >= 3) & (most != np.arange(len(most))))
    ]


def of_classes(role: str, chosen: ConfigDict, dataset) -> tuple[Finding, bool]:
    """The class map of a detector with weights beside that of the data.

    Args:
      role: "teacher" or "student".
      chosen: `config.teacher` or `config.student`; `loop.prepare` has found nothing against it.
      dataset: of the run.

    Returns:
      The finding, and whether the weights' classifiers are used: a student's may start anew.
    """
    named = loop.named_detector(chosen, len(dataset.classes)) if chosen.detector else None
    with warnings.catch_warnings(record=True) as told:  # where classifiers start anew
        warnings.simplefilter("always")
        theirs = weights.load(chosen.weights, named)[3]
    mine = f"the data's {len(dataset.classes)}: {_listed(dataset.classes)}"
    kept = not told if theirs is None else list(theirs) == list(dataset.classes)
    if not kept:
        others = f"the weights' {len(theirs)}, {_listed(theirs)}" if theirs else "those of the weights"
        said = f"its classifiers start anew for {mine}; {others}, are not used"
    elif theirs is None:
        said = f"the weights do not name their classes, which are taken for {mine}"
    else:
        said = f"the weights' are, in the same order, {mine}"
    return Finding(FINE, f"{role}'s class map", said), kept


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def of_sizes(setup: loop.Setup) -> list[Finding]:
    """A teacher is not smaller than its student."""
    counts = [complexity.parameters(detector.shapes[0]) for detector in (setup.teacher, setup.student)]
    said = f"the teacher has {counts[0] / 1e6:.2f} million parameters, the student {counts[1] / 1e6:.2f}"
    if counts[0] < counts[1]:
        return [Finding(LOOK, "sizes", f"{said}: have they changed places?")]
    return [Finding(FINE, "sizes", said)]


def of_taps(setup: loop.Setup) -> list[Finding]:
    """Which maps each method compares, with their shapes by stride; those that do not fit have been refused."""
    hw = tuple(setup.config.data.image_size)
    specs = {role: loop.output_spec(getattr(setup, role), hw) for role in ("student", "teacher")}
    found = []
    for name, options in setup.config.methods.items():
        options = api.options(name) | options.to_dict()
        sides, strides = [], []
        for role, spec in specs.items():
            maps = {}
            with contextlib.suppress(ValueError):  # a name that only the method understands
                maps = api.tap(spec, options[role])
            shapes = ", ".join(f"{stride}: {m.shape[1]}x{m.shape[2]}x{m.shape[3]}" for stride, m in maps.items())
            sides.append(f"{role} {options[role]}" + f" ({shapes})" * bool(shapes))
            strides.append(set(maps))
        alone = sorted(strides[0] ^ strides[1])
        said = ", ".join(sides) + f"; {', '.join(map(str, alone))} have no partner and are left out" * bool(alone)
        found.append(Finding(FINE, f"{name}'s taps", said))
    return found


# ------------------------------------------------------------------------------------------------- losses and terms


def strengths(setup: loop.Setup, batch: dict, adapters: dict | None = None) -> tuple[dict, dict, float]:
    """Every loss and term on one batch at step 0, unweighted, and how hard it pulls at the student's neck.

    Args:
      setup, batch: of the run, with objects.
      adapters: what the methods train beside the student, if not as it is at the start.

    Returns:
      (values, pulls, start): {name: value}, {name: norm of its gradient with respect to the neck's parameters}, and the
      mean probability that the student gives to a class.
    """
    student, state = setup.student, setup.states["student"]
    adapters = adapters or state.params["adapters"]

    def total(neck, state, adapters, variables, batch, chosen):
        params = state.params["student"] | {"neck": neck}
        output, _ = student.apply(params, state.stats, student.preprocess(batch["image"]), train=True)
        values, assignment = student.loss(output, targets_of(batch))
        if setup.methods:
            values |= compare(
                student,
                setup.teacher,
                setup.methods,
                adapters,
                variables,
                output,
                assignment,
                batch,
                0,
                state.key,
            )
        start = jnp.mean(jax.nn.sigmoid(student.class_logits(output)))
        return jnp.dot(chosen, jnp.stack([values[name] for name in sorted(values)])), (values, start)

    batch = loop.place(setup.mesh, batch)
    arguments = (state.params["student"]["neck"], state, adapters, setup.variables, batch)
    names = sorted(jax.eval_shape(total, *arguments, 0.0)[1][0])
    gradient, pulls = jax.jit(jax.grad(total, has_aux=True)), {}
    bar = tqdm(names, desc="losses and terms", unit="term", leave=False)
    for name, chosen in zip(bar, np.eye(len(names), dtype=np.float32), strict=True):
        grads, (values, start) = gradient(*arguments, chosen)
        pulls[name] = math.sqrt(sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(grads)))
    return {name: float(value) for name, value in values.items()}, pulls, float(start)


def grown(setup: loop.Setup, batch: dict) -> dict:
    """What the methods train beside the student, after 30 steps of Adam on one batch: {method: params}.

    Some adapters start near zero (FGFI, DeFeat) and let no gradient through before they have grown.
    """
    student, teacher, state, optimizer = setup.student, setup.teacher, setup.states["student"], optax.adam(1e-3)

    @jax.jit
    def grow(state, variables, batch):
        output, _ = student.apply(state.params["student"], state.stats, student.preprocess(batch["image"]), train=True)
        _, assignment = student.loss(output, targets_of(batch))
        seen = teacher.apply(*variables, teacher.preprocess(batch["image"]), train=False)
        fixed = dataclasses.replace(teacher, apply=lambda *_, train: seen)

        def total(adapters):
            terms = compare(student, fixed, setup.methods, adapters, variables, output, assignment, batch, 0, state.key)
            return sum(terms.values())

        def update(_, carry):
            adapters, moments = carry
            updates, moments = optimizer.update(jax.grad(total)(adapters), moments)
            return optax.apply_updates(adapters, updates), moments

        adapters = state.params["adapters"]
        return jax.lax.fori_loop(0, 30, update, (adapters, optimizer.init(adapters)))[0]

    return grow(state, setup.variables, loop.place(setup.mesh, batch))


def shares(setup: loop.Setup, pulls: dict) -> dict[str, float]:
    """The share of every loss, term and method, with its full weight, of the gradient at the student's neck.

    Args:
      setup: of the run.
      pulls: of `strengths`.
    """
    weights = weights_of({name: m._replace(scale=lambda step: 1.0) for name, m in setup.methods.items()}, 0)
    pulls = {name: float(weights.get(name, 1.0)) * pull for name, pull in pulls.items()}
    pulls |= {method: sum(pulls[f"{method}/{term}"] for term in m.weights) for method, m in setup.methods.items()}
    everything = sum(pulls[name] for name in pulls if name not in setup.methods)
    return {name: pull / everything if everything else 0.0 for name, pull in pulls.items()}


def of_frozen(student: Detector) -> list[Finding]:
    """Layers that training leaves as they are, of a student that starts from random numbers."""
    alone = flatten(student.no_decay(student.shapes[0]))  # of kernels: what is frozen
    frozen = [path for path, is_left_alone in alone.items() if is_left_alone and path.endswith("/kernel")]
    if not frozen:
        return []
    said = (
        f"it starts from random numbers, of which {len(frozen)} kernels ({frozen[0]} first) are frozen: set "
        "config.student.weights, or config.student.options.frozen_stages=-1, .frozen_norm=False and .norm_eval=False"
    )
    return [Finding(FAULT, "frozen layers", said)]


def of_start(values: dict, start: float) -> list[Finding]:
    """The student's head at the start: nearly all places are background."""
    said = f"classes start at a mean probability of {start:.2g}, loss_cls at {values['loss_cls']:.3g}"
    if start > PRIOR:
        said += ": the head lacks its focal prior (a bias of -4.6), and the background drowns the first steps"
        return [Finding(FAULT, "student's head", said)]
    return [Finding(FINE, "student's head", said)]


def of_terms(setup: loop.Setup, values: dict, pulls: dict) -> list[Finding]:
    """Every term with its value and its share of the gradient at the student's neck; methods are judged as a whole.

    Args:
      setup: of the run; its methods count with their full weight.
      values, pulls: of `strengths`.
    """
    found, share = [], shares(setup, pulls)
    published = {f"{name}/{term}": w for name in setup.methods for term, w in api.build(name).weights.items()}
    weights = {f"{name}/{term}": w for name, m in setup.methods.items() for term, w in m.weights.items()}
    times = {name: weights[name] / weight for name, weight in published.items() if weight}
    for name, value in values.items():
        said = f"value {value:.3g}, {share[name]:.1%} of the gradient at the neck"
        level, far = FINE, times.get(name, 1.0)
        if not (math.isfinite(value) and math.isfinite(pulls[name])):
            level, said = FAULT, f"its value is {value}, its gradient {pulls[name]}: it cannot be trained"
        elif (0 < far <= 1 / FAR and share[name] < FEW) or (far >= FAR and share[name] > MOST):
            level, effect = FAULT, "does next to nothing" if far < 1 else "drowns the others"
            said += f": with {far:.2g} times its published weight it {effect}, see config.methods.{name.split('/')[0]}"
        found.append(Finding(level, name, said))
    for method in setup.methods:
        key = f"config.methods.{method}.weight"
        if share[method] < NOTHING:
            said = f"{share[method]:.1e} of the gradient at the neck: it does next to nothing; raise {key}, or look"
            found.append(Finding(FAULT, method, f"{said} at its taps"))
        elif share[method] > DROWNED:
            said = (
                f"{share[method]:.1%} of the gradient at the neck: the detector's own losses are drowned; lower {key}"
            )
            found.append(Finding(FAULT, method, said))
    return found


# ------------------------------------------------------------------------------------------------------- the program


def of_program(setup: loop.Setup, batch: dict) -> list[Finding]:
    """How many programs the run compiles, and the memory that its largest one needs on each device."""
    step = setup.steps["student"].lower(setup.states["student"], setup.variables, loop.place(setup.mesh, batch))
    analysis = step.compile().memory_analysis()
    states = sum(leaf.nbytes for leaf in jax.tree.leaves((setup.states, setup.variables)))
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes  # the state is written where it was
    need = (analysis.temp_size_in_bytes + new + states) / 2**30
    have = available() / 2**30
    said = f"a step needs about {need:.2f} GiB of the {have:.1f} GiB of a device"
    if need > have:
        found = Finding(FAULT, "memory", f"{said}: lower config.batch_size or config.data.image_size")
    else:
        found = Finding(LOOK if need > 0.8 * have else FINE, "memory", said)
    programs = len(setup.steps) + len(set(map(id, setup.predict.values())))
    return [found, Finding(FINE, "programs", f"{programs} for the whole run")]


def available() -> int:
    """Bytes of memory of the first device: an accelerator's own, or its share of what this machine can give."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return limit
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if MEMORY.exists():
        lines = dict(line.split(":") for line in MEMORY.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    if GROUP.exists() and (limit := GROUP.read_text().strip()).isdigit():
        free = min(free, int(limit))
    return free // jax.local_device_count()


def _normalised(images):
    return (images.astype(jnp.float32) - jnp.array([123.675, 116.28, 103.53])) / jnp.array([58.395, 57.12, 57.375])
