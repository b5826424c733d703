"""The rows of each study of `kdjax study`: what its runs differ in."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from kdjax import detectors, resources
from kdjax import methods as zoo
from kdjax.commands.study_runs import unreadable
from kdjax.errors import UserError
from kdjax.training.auto_weight import AUTO

PUBLISHED = "published"  # a kind of weight, beside "auto"
WEIGHTS = ("0.1", "1", "5")
# Of MKD's mask over frequencies: what the paper leaves open, and what it draws.
MKD_MASKS = ("zeta=0.25", "zeta=0.75", "hermitian=False", "keep_dc=True", "generator=True")
MKD_PARTS = ("feature", "multiscale", "frequency", "alignment")
OTHER_SEED = 1_000_000  # added to the seed of a twin that is compared with another twin


class Variant(NamedTuple):
    """One row of a study."""

    name: str
    methods: str  # argument of the config; "": a student without a teacher
    flags: tuple[str, ...] = ()
    student: tuple[str, ...] = ()  # flags of the twin too; variants with the same ones share it
    what: str = ""  # the name without that of teacher or student, for tables in which these are columns; "": the name
    shift: int = 0  # added to the seed


@dataclasses.dataclass(frozen=True)
class Options:
    """Arguments of the command; lists are given as "a,b"."""

    name: str
    config: str
    workdir: Path
    seeds: int
    first: int
    methods: list[str]
    weights: list[str]
    teachers: list[str]
    students: list[str]
    log: Path | None
    flags: list[str]  # --config.a.b=value, for every run
    equal: str = "steps"  # or time
    tune: int = 0  # runs for each row before the table
    cache: str = ""  # folder of what the teachers say; "": they run
    views: bool = False  # whether seeds can share it


def of_methods(options: Options) -> list[Variant]:
    """Methods, or several together joined by "+", with each teacher and each kind of weight."""
    for name in "+".join(options.methods).split("+"):
        zoo.options(name)
    for kind in options.weights:
        if kind not in (PUBLISHED, AUTO):
            raise UserError(f"--weights: {kind!r} is not {PUBLISHED} or {AUTO}, which the study methods takes")
    variants = []
    for teacher, of_teacher in teachers(options.teachers):
        for name in options.methods:
            for kind in options.weights or [PUBLISHED]:
                what = f"{name}, {AUTO}" if kind == AUTO else name
                flags = of_teacher + (weights_auto(name) if kind == AUTO else ())
                variants.append(Variant(f"{what}, {teacher}" if teacher else what, name, flags, what=what))
    return variants


def weights_auto(methods: str) -> tuple[str, ...]:
    """The flags with which methods that are joined by "+" set their weights themselves."""
    return tuple(f"--config.methods.{name}.weight={AUTO}" for name in methods.split("+"))


def of_components(options: Options) -> list[Variant]:
    """MKD whole, and without each of its parts."""
    without = [
        Variant(f"mkd without {part}", "mkd", (f"--config.methods.mkd.{part}_weight=0.0",)) for part in MKD_PARTS
    ]
    return [Variant("mkd", "mkd"), *without]


def of_mask(options: Options) -> list[Variant]:
    """MKD, and with other masks over the frequencies."""
    others = [Variant(f"mkd, {change}", "mkd", (f"--config.methods.mkd.{change}",)) for change in MKD_MASKS]
    return [Variant("mkd", "mkd"), *others]


def of_weight(options: Options) -> list[Variant]:
    """MKD with several weights; with the default weight it is plain MKD, whose runs other studies share."""
    if options.tune:
        raise UserError("--tune: the weights of the study weight are given: leave it out")
    plain = zoo.options("mkd")["weight"]
    variants = []
    for text in options.weights or WEIGHTS:
        try:
            weight = float(text)
        except ValueError:
            raise UserError(f"--weights: {text!r} is not a number") from None
        flags = () if weight == plain else (f"--config.methods.mkd.weight={weight}",)
        variants.append(Variant(f"mkd, weight {text}", "mkd", flags))
    return variants


def of_teacher(options: Options) -> list[Variant]:
    """MKD with several teachers."""
    if not options.teachers:
        raise UserError("--teachers is missing: name student/ folders, as in --teachers=runs/a/student,runs/b/student")
    return [Variant(teacher, "mkd", flags, what="mkd") for teacher, flags in teachers(options.teachers)]


def teachers(folders: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Name of each teacher in the table, and the flags that choose it; without folders the config's own, unnamed."""
    chosen = []
    for folder in folders:
        path = resources.model_path(folder).absolute()
        if not (path / "config.json").is_file():
            raise UserError(f"--teachers: {folder} is not a student/ folder of a run")
        with unreadable(path / "config.json"):
            detector = json.loads((path / "config.json").read_text())["detector"]
        flags = ("--config.teacher.detector=", f"--config.teacher.weights={path}")
        chosen.append((f"{detector} ({folder})", flags))
    return chosen or [("", ())]


def of_sizes(options: Options) -> list[Variant]:
    """MKD on students of several sizes, each with a twin of its own."""
    for name in options.students:
        detectors.build(name, 1)
    return [Variant(name, "mkd", (), (f"--config.student.detector={name}",), what="mkd") for name in options.students]


def of_twins(options: Options) -> list[Variant]:
    """The twin under another seed, whose gain is that of nothing: a control of the verdict."""
    if options.equal != "steps":
        raise UserError("--equal: twins have no teacher, so their steps take the same time: leave it out")
    return [Variant("twin under another seed", "", shift=OTHER_SEED)]


STUDIES: dict[str, Callable[[Options], list[Variant]]] = {
    "methods": of_methods,
    "components": of_components,
    "mask": of_mask,
    "weight": of_weight,
    "teacher": of_teacher,
    "sizes": of_sizes,
    "twins": of_twins,
}
