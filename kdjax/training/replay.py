"""The cache of what a teacher says about training batches: written once, then read instead of running the teacher.

A row of a training batch is always the same for the same entry (`kdjax/data/plans.py`), so what is stored is what the
teacher says about exactly this row. The teacher is a program of its own ahead of the step (`TeacherOfRun.observer`),
whether it runs or is read, so that the step is the same program, and a cache of float32 changes no bit of it.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from kdjax import data, files, sharding
from kdjax.data import shards
from kdjax.data.plans import TrainPlans, ViewPlans
from kdjax.data.shards import Leaf, Missing, Shards
from kdjax.distill import Method
from kdjax.distill.teachers import RECORDED
from kdjax.errors import UserError, prefix
from kdjax.structs import DetectorOutput, PyTree
from kdjax.training import cluster
from kdjax.training import config as settings
from kdjax.training.augmentation import images
from kdjax.training.config import Config
from kdjax.training.models import precision
from kdjax.training.setup import Setup, with_image
from kdjax.training.teachers import TeacherOfRun, attached, read_by_teacher
from kdjax.weights.checkpoint import flat

_LATER = {"longest": 0, "augment_on": "host"}  # settings of `config.data` that the first caches lack


class Needs(NamedTuple):
    """What a run needs of a cache."""

    facts: dict[str, Any]  # what the entries depend on; values that json can hold
    output: DetectorOutput  # shapes of what the methods read of a batch
    leaves: tuple[Leaf, ...]  # its arrays, of one entry
    entries: list[range]


def check(config: Config) -> None:
    """Checks the settings of the caches.

    Raises:
      UserError: names the setting and what it must be.
    """
    folders = [Path(one.cache).expanduser().absolute() for one in config.teachers.values() if one.cache]
    if double := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise UserError(f"config.teachers: two of them have the cache {double}: choose a folder for each")
    several = {f"config.teachers.{name}": (chosen, chosen.methods) for name, chosen in config.teachers.items()}
    for where, (chosen, methods) in ({"config.teacher": (config.teacher, config.methods)} | several).items():
        if chosen.cache_dtype not in shards.DTYPES:
            raise UserError(
                f"{where}.cache_dtype must be one of {', '.join(shards.DTYPES)}, not {chosen.cache_dtype!r}"
            )
        if chosen.cache_dtype != "float32" and not chosen.cache:
            raise UserError(f"{where}.cache_dtype has no effect without {where}.cache: set its folder")
        if chosen.cache and not methods:
            raise UserError(f"{where}.cache has no effect without a teacher and its methods")
        if "://" in chosen.cache:
            raise UserError(f"{where}.cache: {chosen.cache} is a URL: choose a folder of this machine")


def needs(setup: Setup, teacher: TeacherOfRun) -> Needs:
    """What the run needs of the cache of a teacher.

    Raises:
      UserError: the teacher cannot be cached: the methods ask it inside the step.
    """
    if teacher.observer is None:
        asking = [name for name, method in teacher.methods.items() if _asks(method)] or list(teacher.methods)
        raise UserError(
            f"{_where(teacher)}: {', '.join(asking)} asks the second stage or the decoder of the teacher "
            f"{teacher.detector.name} about boxes of the student, which no cache can answer: leave it empty, or take "
            "methods that read maps or rows"
        )
    config = setup.config
    output = teacher.observer.output
    leaves = tuple(Leaf(name, leaf.shape[1:], str(leaf.dtype)) for name, leaf in flat(output, copy=False).items())
    if teacher.settings(config).cache_dtype == "sparse" and shards.LOGITS not in [leaf.name for leaf in leaves]:
        raise UserError(
            f"{teacher.setting}.cache_dtype: sparse stores the best logits of rows, and {', '.join(teacher.methods)} "
            "reads none: take float32, bfloat16 or int8"
        )
    return Needs(facts(setup, teacher), output, leaves, _plans(setup).needed(config.steps))


def facts(setup: Setup, teacher: TeacherOfRun) -> dict[str, Any]:
    """What the stored values depend on, by the names that a user knows."""
    config, own, detector = setup.config, teacher.settings(setup.config), teacher.detector
    cfg = config.data
    found = {
        "the hash of the teacher's weights": teacher.hash,
        "config.teacher.detector": getattr(detector, "name", ""),
        "config.teacher.options": getattr(detector, "options", {}),
        "the hash of the training images, boxes and classes": setup.dataset.splits["train"].fingerprint,
        "config.data.exif_orientation": cfg.exif_orientation,
        "config.data.masks": cfg.masks,
        "config.data.image_size": cfg.image_size,
        "how an image fits the canvas": "stretched" if setup.student.fit == "stretch" else "with its aspect ratio",
        "config.data.views": cfg.views,
        "config.dtype": "float32" if teacher.on_host else precision(config),
        "config.teacher.cache_dtype": own.cache_dtype,
    }
    found |= {f"config.data.{key}": cfg[key] for key in _LATER}
    augmentations = {"config.data.augment": cfg.augment}
    if cfg.stage2.start:
        augmentations["config.data.stage2.augment"] = cfg.stage2.augment
    for name, chosen in augmentations.items():
        found |= {f"{name}.{key}": value for key, value in settings.flat(chosen.to_dict()).items()}
    if not cfg.views:  # an entry is a position in the run's own stream
        found |= {
            "config.seed": config.seed,
            "config.batch_size": config.batch_size,
            "config.data.stage2.start": cfg.stage2.start,
        }
    return json.loads(json.dumps(found))


def ready(setup: Setup) -> dict[str, Shards]:
    """The caches of a run by teacher, with all that it needs, written first as far as it is missing.

    The first host writes, the others wait.

    Raises:
      UserError: a teacher cannot be cached, the cache does not fit the run or is damaged, the disk cannot hold it, or
        another host cannot read it.
    """
    return {one.name: _ready(setup, one) for one in setup.teachers if one.settings(setup.config).cache}


def _ready(setup: Setup, teacher: TeacherOfRun) -> Shards:
    problem, where = "", _where(teacher)
    if jax.process_count() > 1:  # the first host cannot gather alone what is split over all of them
        here = sharding.mesh_of(jax.local_devices())
        teacher = teacher._replace(variables=sharding.replicate(teacher.variables, here))
    if not jax.process_index():
        try:
            write(setup, teacher)
        except UserError as error:
            if jax.process_count() == 1:
                raise
            problem = str(error)
    if jax.process_count() > 1 and multihost_utils.process_allgather(np.array(bool(problem))).any():
        raise UserError(problem or f"{where}: the first host could not write it: see what it says")
    needed, folder = needs(setup, teacher), _folder(setup, teacher)
    with prefix(where):
        found = shards.find(folder)
        if found is None or found.missing(needed.entries):
            raise UserError(f"{folder} is not the folder that the first host has written: share one")
        return found


def write(setup: Setup, teacher: TeacherOfRun) -> Shards:
    """Writes what the cache of a teacher lacks of what a run needs, and says how much it will be.

    Raises:
      UserError: the teacher cannot be cached, the cache does not fit the run or is damaged, or the disk cannot hold it.
    """
    needed, folder, where = needs(setup, teacher), _folder(setup, teacher), _where(teacher)
    with prefix(where):
        found = shards.find(folder) or new(setup, teacher, needed)
        check_fit(found, needed)
        if missing := found.missing(needed.entries):
            check_room(teacher.setting, found, missing)
            shards.make_folder(folder)
            busy = f"{where}: waiting for another process, which writes {folder}"
            with files.lock(folder / ".lock", busy, wait=True):
                found = shards.find(folder) or shards.create(new(setup, teacher, needed))
                check_fit(found, needed)
                if missing := found.missing(needed.entries):
                    _fill(setup, teacher, found, missing)
    _tell_origin(setup, teacher, found)
    return found


def new(setup: Setup, teacher: TeacherOfRun, needed: Needs) -> Shards:
    """An empty cache of a teacher for a run, not yet on disk."""
    config, kind, folder = setup.config, teacher.settings(setup.config).cache_dtype, _folder(setup, teacher)
    plans = _plans(setup)
    entry = Shards(folder, needed.leaves, kind, 1, 0, needed.facts, {})
    span = plans.size if isinstance(plans, ViewPlans) else 0
    shard = shards.file_entries(entry.entry_bytes, config.batch_size)
    return Shards(folder, needed.leaves, kind, shard, span, needed.facts, _origin(setup))


def check_fit(found: Shards, needed: Needs) -> None:
    """Checks that a cache holds what a run needs.

    Raises:
      UserError: names what differs.
    """
    before = {f"config.data.{key}": value for key, value in _LATER.items()} | dict(found.facts)
    names = dict.fromkeys([*before, *needed.facts])
    differ = [
        f"{name} was {_short(before.get(name))}, is {_short(needed.facts.get(name))}"
        for name in names
        if before.get(name) != needed.facts.get(name)
    ]
    if differ:
        more = f", and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise UserError(
            f"{found.folder} was written for other runs ({'; '.join(differ[:3])}{more}): choose another folder, or "
            "delete it to have it written again"
        )
    stored = {leaf.name: leaf for leaf in found.leaves}
    if lacking := [leaf.name for leaf in needed.leaves if stored.get(leaf.name) != leaf]:
        raise UserError(
            f"{found.folder} lacks taps of the teacher that the methods read ({_listed(lacking)}); it has "
            f"{_listed(stored)}: choose another folder, or write it for all methods (kdjax cache --config=NAME:mkd+rm)"
        )


def check_room(setting: str, found: Shards, missing: list[Missing]) -> None:
    """Checks that the disk can hold the files that are missing.

    Args:
      setting: of the teacher, "config.teacher" or "config.teachers.NAME".
      found: the cache.
      missing: its files that are to be written.

    Raises:
      UserError: it cannot.
    """
    size, free = shards.forecast(found.entry_bytes, missing), shards.room(found.folder)
    if size > free:
        entries = sum(one.count for one in missing)
        smaller = f", {setting}.cache_dtype=int8" * (found.kind in ("float32", "bfloat16"))
        fewer = "a smaller config.data.views" if found.span else "config.data.views, which runs can share"
        raise UserError(
            f"{entries:,} entries of {found.entry_bytes:,} bytes take {_size(size)}, and {found.folder} has "
            f"{_size(free)} free: choose another disk, {fewer}{smaller}, or methods that read less"
        )


def attach(setup: Setup, stored: Mapping[str, Shards]) -> Callable[[np.ndarray], Any] | None:
    """What the loader calls with the entries of a batch: reads what the teachers say about them.

    Args:
      setup: of the run.
      stored: of `ready`; teachers that are not in it run.
    """
    if not stored:
        return None
    readers = {one.name: _reader(one, stored[one.name]) for one in setup.teachers if one.name in stored}

    def read(entries: np.ndarray) -> Any:  # noqa: ANN401 - as the distiller takes it
        return attached({name: reader(entries) for name, reader in readers.items()})[RECORDED]

    return read


def _reader(teacher: TeacherOfRun, found: Shards) -> Callable[[np.ndarray], DetectorOutput]:
    assert teacher.observer is not None, "`needs` refuses such teachers"
    output = teacher.observer.output
    structure, names = jax.tree.structure(output), list(flat(output, copy=False))

    def read(entries: np.ndarray) -> DetectorOutput:
        arrays = found.read(entries, names)
        return jax.tree.unflatten(structure, [arrays[name] for name in names])

    return read


def _fill(setup: Setup, teacher: TeacherOfRun, found: Shards, missing: list[Missing]) -> None:
    """Writes files. The teacher sees batches of the run's size: on some devices other sizes are rounded otherwise."""
    config, hosts = setup.config, jax.process_count()
    rows = config.batch_size // hosts
    batches = [
        range(first, min(first + rows, one.first + one.count))
        for one in missing
        for first in range(one.first, one.first + one.count, rows)
    ]
    assert teacher.observer is not None, "`needs` refuses such teachers"
    observe, mesh, variables = teacher.observer.program, setup.mesh, teacher.variables
    if hosts > 1:  # the others wait: programs for the devices of this host, on which `_ready` has put the variables
        setup = setup._replace(augment={"": jax.jit(images)})
        mesh = sharding.mesh_of(jax.local_devices())
        if not teacher.on_host:
            observe = jax.jit(teacher.observer.function, out_shardings=sharding.batch_sharding(mesh))

    def said() -> Iterator[dict[str, np.ndarray]]:
        """The arrays of one entry after the other. The next batch is computed while one is stored."""
        pending: tuple[range, PyTree] | None = None
        for batch, loaded in zip(batches, loader, strict=True):
            arrays = with_image(setup, sharding.shard_batch(mesh, loaded))
            cluster.at("writes a teacher's cache before")
            before, pending = pending, (batch, observe(variables, read_by_teacher(arrays)))
            if before:
                yield from _rows(*before)
        assert pending is not None, "there is something to write"
        yield from _rows(*pending)

    loader = data.entry_batches(
        setup.dataset,
        config.data,
        batches,
        batch_size=config.batch_size,
        rows=rows,
        seed=config.seed,
        fit=setup.student.fit,
    )
    total = sum(one.count for one in missing)
    told = f"{total:,} entries of {found.entry_bytes:,} bytes, {_size(shards.forecast(found.entry_bytes, missing))}"
    print(f"{found.folder}: writing what the teacher says: {told} ({_size(shards.room(found.folder))} are free)")
    with contextlib.closing(loader), tqdm(total=total, desc="teacher cache", unit="entry") as bar:
        entries = said()
        for one in missing:
            with found.writer(one) as file:
                for arrays in itertools.islice(entries, one.count):
                    file.add(arrays)
                    bar.update()


def _rows(batch: range, output: PyTree) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of each entry of a batch."""
    arrays = {name: np.asarray(leaf) for name, leaf in flat(output, copy=False).items()}
    for row in range(len(batch)):
        yield {name: value[row] for name, value in arrays.items()}


def _plans(setup: Setup) -> TrainPlans | ViewPlans:
    config = setup.config
    return data.train_plans(setup.dataset, config.data, batch_size=config.batch_size, seed=config.seed)


def _asks(method: Method) -> bool:
    return any(one in ("ask", "proposals") or one.startswith("rows.") for one in method.reads.teacher)


def _where(teacher: TeacherOfRun) -> str:
    return f"{teacher.setting}.cache"


def _folder(setup: Setup, teacher: TeacherOfRun) -> Path:
    return Path(teacher.settings(setup.config).cache).expanduser().absolute()


def _origin(setup: Setup) -> dict[str, Any]:
    """Where values were computed: elsewhere they would be rounded otherwise."""
    rows = setup.config.batch_size // setup.mesh.size
    return {"jax": jax.__version__, "platform": jax.default_backend(), "rows of a device": rows}


def _tell_origin(setup: Setup, teacher: TeacherOfRun, found: Shards) -> None:
    """Notes where a cache need not equal the teacher of this run to the bit."""
    now = _origin(setup)
    if differ := [
        f"{name} {found.origin.get(name)}, now {now[name]}" for name in now if found.origin.get(name) != now[name]
    ]:
        told = "equal to the bit only where these are the same, and up to rounding here"
        print(f"{_where(teacher)}: {found.folder} was written with {'; '.join(differ)}: {told}")


def _listed(names: Mapping[str, Any] | list[str]) -> str:
    names = [*names]
    return ", ".join(names[:8]) + ", …" * (len(names) > 8)


def _short(value: object) -> str:
    """A hash by its beginning, any other value as it is."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else repr(value)


def _size(count: int) -> str:
    """Bytes in words."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1000:.1f} kB"
