"""`kdjax study`: compares variants of a run over seeds with their twins, in one table and one chart.

    kdjax study methods --workdir=runs/study --methods=mkd,rtmdet_cwd,ssim --seeds=3
    kdjax study components --workdir=runs/study
    kdjax study weight --workdir=runs/study --weights=0.1,1,5
    kdjax study teacher --workdir=runs/study --teachers=runs/a/student,runs/b/student
    kdjax study sizes --workdir=runs/study --students=rtmdet_pico,rtmdet_micro

`methods` compares methods, with the config's teacher or with each of `--teachers`. The others follow tables of MKD's
paper: without each of its components (table 4), its weight (table 5), the size of its teacher (table 3), and
parameters, FLOPs, latency and AP over sizes of the student (table 1). `--config` takes the names of methods as its
argument, or as the last of several, as in `--config=distill/mkd_rtmdet:tiny,s`. Any `--config.a.b=value` applies to
every run.

The gain of a run is its student's AP minus that of the twin: the same student from the same initial weights on the
same batches, without a teacher. The twin does not depend on method or teacher, to the bit, so it is trained once per
seed, as a run of its own, and studies in the same folder share it. Runs are evaluated only at their end.

With `--config.teacher.cache=DIR` what a teacher says is written once for all methods, and with `--config.data.views=V`
for all seeds.

Finished runs are kept, interrupted ones resumed: run the same command again to continue, also with more variants or
seeds. The table names a run that fails, and the others continue. The last lines of the output are the table and one
JSON object; `--log FILE` appends both, with the versions, to a Markdown file. The chart is WORKDIR/NAME.png. A
workdir has one study at a time.
"""

import dataclasses
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax import detectors, files, resources
from kdjax import methods as zoo
from kdjax.commands import settings
from kdjax.commands.study_runs import Failed, call, facts_of, train, unreadable
from kdjax.errors import UserError
from kdjax.inference import load
from kdjax.inference import predict as prediction
from kdjax.report import study as report
from kdjax.training.auto_weight import AUTO

PUBLISHED = "published"  # a kind of weight, beside "auto"
WEIGHTS = ("0.1", "1", "5")
MKD_PARTS = ("feature", "multiscale", "frequency", "alignment")

Results = dict[str, Any]  # the content of results.json, or a part of it


class Variant(NamedTuple):
    """One row of a study."""

    name: str
    methods: str  # argument of the config
    flags: tuple[str, ...] = ()
    student: tuple[str, ...] = ()  # flags of the twin too; variants with the same ones share it


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
    cache: str = ""  # folder of what the teachers say; "": they run
    views: bool = False  # whether seeds can share it


def run(
    *,
    name: str,
    config: str,
    workdir: str,
    seeds: int,
    first: int,
    methods: str,
    weights: str,
    teachers: str,
    students: str,
    log: str,
    overrides: list[str],
) -> int:
    """Trains the runs of a study that are missing, and prints its table.

    Args:
      name: a key of `STUDIES`.
      config: NAME[:ARGUMENT] or FILE.py[:ARGUMENT]; the names of methods become its last argument.
      workdir: the folder of all runs.
      seeds, first: how many seeds, and the first of them.
      methods, weights, teachers, students: values between commas.
      log: a Markdown file to which the results are appended; "" has none.
      overrides: "--config.a.b=value", for every run.

    Returns:
      Exit code: 0, or 143 if a run was stopped.

    Raises:
      UserError: before any run, for an argument that cannot be used; later if the folder has a run with other flags, or
        a twin fails.
    """
    options = Options(
        name=name,
        config=config,
        workdir=Path(workdir).absolute(),
        seeds=seeds,
        first=first,
        methods=words(methods) or zoo.names(),
        weights=words(weights),
        teachers=words(teachers),
        students=words(students),
        log=Path(log) if log else None,
        flags=overrides,
    )
    if seeds < 1:
        raise UserError(f"--seeds must be >= 1, not {seeds}")
    variants = STUDIES[name](options)
    config_flag, *flags = run_flags(options, variants[0], first)
    chosen = settings.read(config_flag.removeprefix("--config="), flags)
    if chosen.teachers:
        raise UserError(f"config.teachers.{next(iter(chosen.teachers))}: a study has one teacher: set config.teacher")
    options = dataclasses.replace(options, cache=chosen.teacher.cache, views=bool(chosen.data.views))
    check_outputs(options)
    busy = f"--workdir: another study runs in {options.workdir}: wait until it ends, or choose another folder"
    with files.lock(options.workdir / ".lock", busy):
        return study(options, variants)


def check_outputs(options: Options) -> None:
    """Makes the workdir, and checks that chart and log can be written.

    Raises:
      UserError: they cannot.
    """
    for flag, folder, name in (
        ("--workdir", options.workdir, f"{options.name}.png"),
        *([("--log", options.log.parent, options.log.name)] if options.log else []),
    ):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{flag}: {folder} cannot be created ({error.strerror}): choose another folder") from None
        files.check_outputs(flag, folder, files=[name])


def words(text: str) -> list[str]:
    """Splits at commas: "a,b" -> ["a", "b"]."""
    return [word for word in text.split(",") if word]


# ------------------------------------------------------------------------------------------------------- the studies


def of_methods(options: Options) -> list[Variant]:
    """Methods, or several together joined by "+", with each teacher and each kind of weight."""
    for name in "+".join(options.methods).split("+"):
        zoo.options(name)
    for kind in options.weights:
        if kind not in (PUBLISHED, AUTO):
            raise UserError(f"--weights: {kind!r} is not {PUBLISHED} or {AUTO}, which the study methods takes")
    return [
        Variant(", ".join([name, *([AUTO] if kind == AUTO else []), *([teacher] if teacher else [])]), name, flags)
        for teacher, of_teacher in teachers(options.teachers)
        for name in options.methods
        for kind in options.weights or [PUBLISHED]
        for flags in [of_teacher + (weights_auto(name) if kind == AUTO else ())]
    ]


def weights_auto(methods: str) -> tuple[str, ...]:
    """The flags with which methods that are joined by "+" set their weights themselves."""
    return tuple(f"--config.methods.{name}.weight={AUTO}" for name in methods.split("+"))


def of_components(options: Options) -> list[Variant]:
    """MKD whole, and without each of its parts."""
    without = [
        Variant(f"mkd without {part}", "mkd", (f"--config.methods.mkd.{part}_weight=0.0",)) for part in MKD_PARTS
    ]
    return [Variant("mkd", "mkd"), *without]


def of_weight(options: Options) -> list[Variant]:
    """MKD with several weights; with the default weight it is plain MKD, whose runs other studies share."""
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
    return [Variant(teacher, "mkd", flags) for teacher, flags in teachers(options.teachers)]


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
    return [Variant(name, "mkd", (), (f"--config.student.detector={name}",)) for name in options.students]


STUDIES: dict[str, Callable[[Options], list[Variant]]] = {
    "methods": of_methods,
    "components": of_components,
    "weight": of_weight,
    "teacher": of_teacher,
    "sizes": of_sizes,
}


# --------------------------------------------------------------------------------------------------- from runs to table


def study(options: Options, variants: list[Variant]) -> int:
    """Trains the runs that are missing, prints table and summary, and draws the chart.

    Args:
      options: arguments of the command.
      variants: the rows.

    Returns:
      Exit code: 0, or 143 if a run was stopped.
    """
    workdir = options.workdir
    twins: dict[tuple[int, tuple[str, ...]], Results] = {}
    students: dict[str, dict[int, Results]] = {variant.name: {} for variant in variants}
    failures: dict[str, dict[int, str]] = {}
    folders: dict[str, Path] = {}
    for seed in range(options.first, options.first + options.seeds):
        write_caches(options, variants, seed)
        for variant in variants:
            of_twin = workdir / f"seed{seed}" / label("twin", *variant.student)
            if (seed, variant.student) not in twins:
                try:
                    twins[seed, variant.student] = train(twin_flags(options, variant, seed), of_twin)["student"]
                except Failed as error:
                    raise UserError(f"the twin of seed {seed}, which all runs need, failed: {error}") from error
                folders.setdefault("twin", of_twin)
            folder = folder_of(options, variant, seed)
            try:
                results = train(run_flags(options, variant, seed), folder)
            except Failed as error:
                failures.setdefault(variant.name, {})[seed] = str(error)
                continue
            folders.setdefault(variant.name, folder)
            twin = twins[seed, variant.student]
            result = {"student": results["student"], "teacher": results["teacher"], "twin": twin}
            students[variant.name][seed] = result
            print(f"seed {seed}, {variant.name}: gain {report.gain(result, 'AP'):+.2f}", flush=True)
    rows = [report.summarize(name, runs, failures.get(name, {})) for name, runs in students.items()]
    if options.name == "sizes":
        for row in rows:
            if row["seeds"]:
                row["latency_ms"] = latency(folders[row["name"]] / "student")
    if options.name in ("methods", "teacher"):
        rows.sort(key=lambda row: -row.get("gain AP", [-math.inf])[0])
    failed: list[str] = []
    with files.attempt(failed):
        report.publish(
            command_of(options),
            [report.study_table(rows), str(facts_of(folders["twin"]))],
            {"study": options.name, "rows": rows},
            options.log,
        )
    with files.attempt(failed):
        report.draw(rows, options.name).savefig(workdir / f"{options.name}.png")
    files.finish(failed)
    return 0


def command_of(options: Options) -> str:
    """The command that makes the study, for the log."""
    command = f"kdjax study {options.name} --config={options.config} --seeds={options.seeds}"
    command += f" --first={options.first}" if options.first else ""
    for option, name in (("methods", "methods"), ("weights", ""), ("students", "sizes")):
        chosen = getattr(options, option)
        command += f" --{option}={','.join(chosen)}" if chosen and name in ("", options.name) else ""
    command += f" --teachers={','.join(options.teachers)}" if options.teachers else ""
    return " ".join([command, *options.flags])


def label(name: str, *flags: str) -> str:
    """The folder of a run: the name and what its flags set."""
    return "_".join([name, *(re.sub(r"[^\w.=-]", "-", flag.removeprefix("--config.")) for flag in flags)])


def folder_of(options: Options, variant: Variant, seed: int) -> Path:
    """The folder of a run."""
    return options.workdir / f"seed{seed}" / label(variant.methods, *variant.flags, *variant.student)


def cache_of(options: Options, variant: Variant, seed: int) -> str:
    """The folder of what the teacher of a run says: one for each teacher and, without views, for each seed."""
    teacher = [flag for flag in variant.flags if flag.startswith("--config.teacher.")]
    parts = [label("teacher", *teacher)] * bool(teacher) + [f"seed{seed}"] * (not options.views)
    return str(Path(options.cache).expanduser().absolute().joinpath(*parts))


def write_caches(options: Options, variants: list[Variant], seed: int) -> None:
    """Writes what the unfinished runs of a seed read of each teacher, once for all methods.

    Args:
      options: arguments of the command.
      variants: the rows.
      seed: of the runs.

    Raises:
      UserError: one cannot be written.
    """
    shared: dict[str, list[Variant]] = {}
    for variant in variants if options.cache else []:
        shared.setdefault(cache_of(options, variant, seed), []).append(variant)
    for group in shared.values():
        if all((folder_of(options, variant, seed) / "results.json").exists() for variant in group):
            continue
        names = "+".join(variant.methods for variant in group).split("+")
        teacher = tuple(flag for flag in group[0].flags if flag.startswith("--config.teacher."))
        together = group[0]._replace(methods="+".join(dict.fromkeys(names)), flags=teacher)
        try:
            call([sys.executable, "-m", "kdjax", "cache", *run_flags(options, together, seed)])
        except Failed as error:
            raise UserError(f"the teacher's cache, which all runs need, was not written: {error}") from error


def run_flags(options: Options, variant: Variant, seed: int) -> list[str]:
    """The flags of a run with methods and without a twin of its own; if one is repeated, the last one counts."""
    common = ("--config.twin=False", "--config.eval.every=0", f"--config.seed={seed}")
    if options.cache and variant.methods:
        common += (f"--config.teacher.cache={cache_of(options, variant, seed)}",)
    config = f"--config={options.config}{',' if ':' in options.config else ':'}{variant.methods}"
    flags = (config, *options.flags, *variant.student, *variant.flags, *common)
    return list({flag.partition("=")[0]: flag for flag in flags}.values())


def twin_flags(options: Options, variant: Variant, seed: int) -> list[str]:
    """The flags of a supervised run: the config without methods, teacher and images without labels."""
    of_teaching = ("--config.teacher.", "--config.methods.", "--config.data.unlabelled")
    kept = [flag for flag in options.flags if not flag.startswith(of_teaching)]
    none = ("--config.teacher.detector=", "--config.teacher.weights=")
    alone = variant._replace(methods="", flags=none)
    return run_flags(dataclasses.replace(options, flags=kept), alone, seed)


def latency(folder: Path, repeats: int = 50) -> float:
    """Median milliseconds from image to boxes under XLA: first device, batch 1, the size it was trained at."""
    model, device = load(folder), jax.devices()[:1]
    image, image_size = jnp.zeros((1, *model.image_size, 3), jnp.uint8), jnp.array([model.image_size])
    run_model = prediction.program(model.detector, devices=device)
    variables = jax.device_put(model.variables, device[0])
    times = []
    for _ in range(10 + repeats):
        before = time.perf_counter()
        jax.block_until_ready(run_model(variables, image, image_size))
        times.append(time.perf_counter() - before)
    return round(1000 * statistics.median(times[10:]), 3)
