"""Damages files of a finished run and of its caches, and reads them with the functions with which a run reads them.

A damage must be harmless (what is read is the same), passed over with a warning, or refused in a sentence that names
the file or its folder. All else is a fault: something else is read without a word, or the error is not a sentence.
"""

import collections
import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import data, weights
from kdjax.commands import settings, study_runs
from kdjax.data import shards
from kdjax.errors import UserError, fault
from kdjax.resources import Config
from kdjax.training import checks
from kdjax.training.checkpoint import Checkpoints
from kdjax.training.log import Log
from kdjax.weights.checkpoint import arrays, digest, flat
from tests.faults.runs import Home

OUTCOMES = ("harmless", "made again", "passed over", "refused")


class Case(NamedTuple):
    """A damaged file and what came of it."""

    kind: str  # of file
    damage: str
    outcome: str  # of `OUTCOMES`, or else a fault
    detail: str  # the file, and what was said


class Read(NamedTuple):
    """What a reader makes of some files."""

    content: Any
    made_again: bool = False  # a file is missing, and the run would write it again


class Kind(NamedTuple):
    """Files that a run reads, and how it reads them."""

    source: Path  # the folder that holds them
    files: Callable[[Path], list[Path]]  # those of a copy of it that are to be damaged
    read: Callable[[Path], Read]
    # Whether something that was read with a warning may stand for the whole: (read, whole)
    is_part: Callable[[Any, Any], bool] = lambda found, whole: False
    weight: int = 1  # of how often it is drawn


# ---- damages


def _flip(content: bytearray, drawn: random.Random) -> bytes:
    content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
    return bytes(content)


def _garbage(content: bytearray, drawn: random.Random) -> bytes:
    start = drawn.randrange(len(content))
    end = min(start + drawn.randint(2, 64), len(content))
    content[start:end] = drawn.randbytes(end - start)
    return bytes(content)


def _zeros(content: bytearray, drawn: random.Random) -> bytes:
    """A block that never reached the disk."""
    block = 4096 if len(content) > 8192 else max(len(content) // 4, 1)
    start = drawn.randrange(0, len(content), block)
    end = min(start + block, len(content))
    content[start:end] = bytes(end - start)
    return bytes(content)


def _cut(content: bytearray, drawn: random.Random) -> bytes:
    return bytes(content[: drawn.randrange(len(content))])


DAMAGES: dict[str, Callable[[bytearray, random.Random], bytes | None]] = {
    "flipped bit": _flip,
    "garbage": _garbage,
    "zeros": _zeros,
    "cut": _cut,
    "empty": lambda content, drawn: b"",
    "deleted": lambda content, drawn: None,
}


def damage(path: Path, how: str, drawn: random.Random) -> bool:
    """Damages a file; whether its content has changed."""
    before = path.read_bytes()
    after = DAMAGES[how](bytearray(before), drawn) if before else None
    path.unlink()  # copies share their files with the original
    if after is not None:
        path.write_bytes(after)
    return after != before


# ---- kinds of files


def kinds(home: Home, workdir: Path) -> dict[str, Kind]:
    """The kinds of files of a finished run and its caches.

    Args:
      home: of the runs.
      workdir: of a finished run, with at least two checkpoints.
    """
    flags = study_runs.flags_of(workdir)
    config = _config(flags)
    note, state = arrays(workdir / "checkpoints", "")
    steps = int(note["next_batch"])
    return {
        "checkpoints": Kind(
            workdir / "checkpoints", _every, functools.partial(_checkpoints, state), _is_earlier(workdir), weight=8
        ),
        "config.json": Kind(
            workdir, lambda folder: [folder / "config.json"], functools.partial(_settings, config), weight=2
        ),
        "metrics.jsonl": Kind(
            workdir,
            lambda folder: [folder / "metrics.jsonl"],
            functools.partial(_metrics, steps, note["lines"]),
            lambda found, whole: all(row in whole for row in found),
            weight=2,
        ),
        "results.json": Kind(
            workdir, lambda folder: [folder / "results.json"], functools.partial(_results, flags), weight=2
        ),
        "student/": Kind(workdir / "student", _read_back, _model, weight=2),
        "prepared data": Kind(home.cache / "data", _every, functools.partial(_prepared, config), weight=3),
        "a teacher's cache": Kind(_cache_of_teacher(home.folder / "entries"), _every, _entries, weight=2),
        "compiled programs": Kind(_programs(home.folder / "programs"), _every, _compiled, weight=1),
    }


def _every(folder: Path) -> list[Path]:
    """All files of a folder but locks, which are empty; those of the newest checkpoint three times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    newest = folder / str(max(steps, default=0))
    return files + 2 * [path for path in files if newest in path.parents]


def _read_back(folder: Path) -> list[Path]:
    """The files of a model that are read; its card is for people."""
    return [folder / "config.json", folder / "model.safetensors"]


def _config(flags: Sequence[str]) -> Config:
    return settings.read(flags[0].removeprefix("--config="), flags[1:])


def _checkpoints(state: dict[str, np.ndarray], folder: Path) -> Read:
    """As `setup.resume` reads them."""
    with contextlib.closing(Checkpoints(folder, keep=3)) as store:
        note = store.note()
        if note is None:
            return Read(None)
        restored, note = store.restore(state)
    return Read((note["next_batch"], note["run"], {name: digest(value) for name, value in flat(restored).items()}))


def _is_earlier(workdir: Path) -> Callable[[Any, Any], bool]:
    """Whether a state is that of an earlier checkpoint of the run."""
    known = {}
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdigit():
            note, state = arrays(path.parent, "", step=int(path.name))
            known[note["next_batch"]] = (note["next_batch"], note["run"], {k: digest(v) for k, v in state.items()})
    return lambda found, whole: found is not None and known.get(found[0]) == found


def _settings(config: Config, folder: Path) -> Read:
    """As a resumed run and a study read them."""
    checks.check_workdir(config, folder)
    if not (folder / "config.json").exists():
        return Read(None, made_again=True)
    return Read((json.loads((folder / "config.json").read_text())["config"], study_runs.start_of(folder)))


def _metrics(step: int, lines: int, folder: Path) -> Read:
    """As the report reads them, without those of the last evaluation, which the same command writes again."""
    with Log(folder, step, lines) as log:
        return Read([row for row in log.rows() if (row["step"], row["kind"]) != (step, "eval")])


def _results(flags: Sequence[str], folder: Path) -> Read:
    """As a study reads them."""
    if not (folder / "results.json").exists():
        return Read(None, made_again=True)
    return Read(study_runs.train(list(flags), folder))


def _model(folder: Path) -> Read:
    """As every command reads weights."""
    detector, params, stats, classes = weights.load(folder)
    values = {name: digest(value) for name, value in flat({"params": params, "stats": stats}).items()}
    return Read((detector.name, detector.options, classes, values))


def _prepared(config: Config, folder: Path) -> Read:
    """As a run reads them: all images with their boxes, the truth of the evaluation, and the counts."""
    cfg = config.data.copy_and_resolve_references()
    cfg.update(dict(cache=str(folder.parent), keep=0.0))
    dataset = data.open_dataset(cfg)
    seen = hashlib.sha256()
    for split in ("train", "val"):
        with contextlib.closing(data.eval_batches(dataset, split, cfg, batch_size=8)) as batches:
            for batch in batches:
                for name in sorted(batch):
                    seen.update(np.ascontiguousarray(batch[name]).tobytes())
        seen.update(json.dumps(data.ground_truth(dataset, split), sort_keys=True).encode())
        seen.update(repr(data.count(dataset, split, cfg)).encode())
    return Read((dataset.fingerprint, tuple(dataset.classes), seen.hexdigest()))


_LEAVES = (shards.Leaf("neck/0", (4, 4, 8), "float32"), shards.Leaf("rows/logits", (21, 6), "float32"))
_ENTRIES = 24


def _cache_of_teacher(folder: Path) -> Path:
    made = shards.Shards(folder, _LEAVES, "float32", 8, 0, {"of": "the harness"}, {})
    shards.make_folder(folder)
    made, drawn = shards.create(made), np.random.default_rng(0)
    for one in made.missing([range(_ENTRIES)]):
        with made.writer(one) as writer:
            for _ in range(one.count):
                writer.add({leaf.name: drawn.normal(size=leaf.shape).astype(leaf.dtype) for leaf in _LEAVES})
    return folder


def _entries(folder: Path) -> Read:
    """As the loader of a run reads them."""
    found = shards.find(folder)
    if found is None or found.missing([range(_ENTRIES)]):
        return Read(None, made_again=True)
    read = found.read(np.arange(_ENTRIES), [leaf.name for leaf in _LEAVES])
    return Read((found.leaves, found.facts, {name: digest(value) for name, value in read.items()}))


def _programs(folder: Path) -> Path:
    """A cache with one compiled program."""
    folder.mkdir(exist_ok=True)
    _compiled(folder)
    assert list(folder.iterdir()), "JAX has written no program"
    return folder


def _compiled(folder: Path) -> Read:
    """A program that JAX finds there, or compiles again."""
    from jax.experimental.compilation_cache import compilation_cache

    options = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        program = jax.jit(lambda x: jnp.tanh(x @ x).sum())  # a new function, so that JAX looks for it on the disk
        return Read(np.asarray(program(jnp.arange(16.0).reshape(4, 4) / 16)).tobytes())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


# ---- one corruption after the other


def run(home: Home, workdir: Path, count: int, seed: int) -> list[Case]:
    """Damages one file at a time.

    Args:
      home: of the runs.
      workdir: of a finished run.
      count: number of damaged files.
      seed: of files and damages.
    """
    known = kinds(home, workdir)
    whole = {name: kind.read(_copy(kind, home, name)).content for name, kind in known.items()}
    drawn, cases = random.Random(f"{seed} corruptions"), []
    names = [name for name, kind in known.items() for _ in range(kind.weight)]
    while len(cases) < count:
        name = names[len(cases) % len(names)]
        folder = _copy(known[name], home, name)
        path, how = drawn.choice(known[name].files(folder)), drawn.choice(list(DAMAGES))
        if damage(path, how, drawn):
            shown = path.relative_to(folder.parent).as_posix()
            cases.append(_case(name, known[name], folder, whole[name], how, shown))
    return cases


def _copy(kind: Kind, home: Home, name: str) -> Path:
    """A copy of the folder, whose files are links to those of the original; a reader replaces files, or only reads."""
    place = home.folder / "damaged" / name.strip("/").replace(" ", "_").replace("'", "")
    shutil.rmtree(place, ignore_errors=True)
    skip = () if kind.source.name == "checkpoints" else ("checkpoints", "tensorboard")
    ignore = shutil.ignore_patterns(*skip)
    shutil.copytree(kind.source, place / kind.source.name, copy_function=_linked, ignore=ignore)
    return place / kind.source.name


def _linked(source: str, target: str) -> None:
    if Path(source).name == "metrics.jsonl":  # which is written in place
        shutil.copy(source, target)
    else:
        os.link(source, target)


def _case(name: str, kind: Kind, folder: Path, whole: Any, how: str, shown: str) -> Case:
    with _heard() as told:
        try:
            content, made_again = kind.read(folder)
        except UserError as error:
            text = str(error)
            found = "refused" if str(folder.parent) in text else "refused without the name of the file"
            return Case(name, how, found, f"{shown}: {text}")
        except Exception as error:
            text = fault(error)
            return Case(name, how, "refused" if text else "not a sentence", f"{shown}: {text or repr(error)}")
    said = " ".join("".join(told).split())
    if made_again:
        return Case(name, how, "made again", shown)
    if content == whole:
        return Case(name, how, "harmless", f"{shown}: {said}")
    if said and kind.is_part(content, whole):
        return Case(name, how, "passed over", f"{shown}: {said}")
    return Case(name, how, "used silently" if not said else "used with a warning", f"{shown}: {said}")


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """Collects warnings, whatever they are given with."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    loggers = [logging.getLogger(), logging.getLogger("kdjax")]
    stream = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(stream):
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield told
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            told += [str(one.message) for one in caught] + [stream.getvalue()]


def table(cases: Sequence[Case]) -> str:
    """The number of cases by kind of file and outcome, in Markdown; outcomes that are faults have columns too."""
    counts = collections.Counter((case.kind, case.outcome) for case in cases)
    columns = [*OUTCOMES, *sorted({case.outcome for case in cases} - {*OUTCOMES})]
    lines = [f"| file | {' | '.join(columns)} | all |", "|---" * (len(columns) + 2) + "|"]
    for kind in dict.fromkeys(case.kind for case in cases):
        row = [counts[kind, column] for column in columns]
        lines.append(f"| {kind} | {' | '.join(map(str, row))} | {sum(row)} |")
    totals = [sum(case.outcome == column for case in cases) for column in columns]
    return "\n".join([*lines, f"| all | {' | '.join(map(str, totals))} | {len(cases)} |"])


def faults(cases: Sequence[Case]) -> list[str]:
    """The cases that are faults, a sentence each."""
    bad = [case for case in cases if case.outcome not in OUTCOMES]
    return [f"{case.kind}, {case.damage}: {case.outcome}: {case.detail}" for case in bad]
