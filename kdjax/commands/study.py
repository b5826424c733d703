"""`kdjax study`: compares variants of a run over seeds with their twins, in one table and one chart.

    kdjax study methods --workdir=runs/study --methods=mkd,rtmdet_cwd,ssim --seeds=3
    kdjax study components --workdir=runs/study
    kdjax study mask --workdir=runs/study
    kdjax study weight --workdir=runs/study --weights=0.1,1,5
    kdjax study teacher --workdir=runs/study --teachers=runs/a/student,runs/b/student
    kdjax study sizes --workdir=runs/study --students=rtmdet_pico,rtmdet_micro
    kdjax study twins --workdir=runs/study --seeds=10

`methods` compares methods, with the config's teacher or with each of `--teachers`, and with their published weights or
with those that set themselves. Four follow tables of MKD's paper: `components` (without each of them, table 4),
`weight` (table 5), `teacher` (its size, table 3), and `sizes` of the student with parameters, FLOPs, latency and AP
(table 1). `mask` changes what the paper leaves open of MKD's mask over frequencies: how many it drops, whether they
come in pairs (u, -u), whether the mean of a channel is among them, and whether a generator follows. `twins` is a
control of the verdict: the student without a teacher under another seed. `--config` takes the names of methods as its
argument, or as the last of several, as in `--config=distill/mkd_rtmdet:tiny,s`. Any `--config.a.b=value` applies to
every run.

The gain of a run is its student's AP minus that of the twin: the same student from the same initial weights on the
same batches, without a teacher. The twin does not depend on method or teacher, to the bit, so it is trained once per
seed, as a run of its own, and studies in the same folder share it. Runs are evaluated only at their end. What the gains
show is said by a verdict (`kdjax/report/verdict.py`). `--equal=time` adds a twin that is trained for as long as the
student (`study_time.py`), `--tune=K` a tuning before the table (`study_tuning.py`).

With `--config.teacher.cache=DIR` what a teacher says is written once for all methods, and with `--config.data.views=V`
for all seeds.

Finished runs are kept, interrupted ones resumed: run the same command again to continue, also with more variants or
seeds. The table names a run that fails, and the others continue. The last lines of the output are the table and one
JSON object; `--log FILE` appends both, with the versions, to a Markdown file. The chart is WORKDIR/NAME.png, and
WORKDIR/study.json has the results of each seed, for `kdjax league`. A workdir has one study at a time.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import files
from kdjax import methods as zoo
from kdjax.commands import study_record, study_runs, study_time, study_tuning
from kdjax.commands.study_layout import (
    flags_of,
    folder_of,
    read_config,
    run_flags,
    twin_flags,
    twin_folder,
    write_caches,
)
from kdjax.commands.study_runs import Failed, facts_of
from kdjax.commands.study_variants import STUDIES, Options, Variant
from kdjax.errors import UserError
from kdjax.inference import load
from kdjax.inference import predict as prediction
from kdjax.report import study as report

Results = dict[str, Any]  # the content of results.json, or a part of it
Twins = dict[tuple[int, tuple[str, ...]], Results]  # by seed and flags of the student


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
    equal: str,
    tune: int,
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
      equal: "steps"; "time" adds a twin that is trained for as long.
      tune: runs of the tuning for each row; 0: there is none.
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
        equal=equal,
        tune=tune,
    )
    if seeds < 1:
        raise UserError(f"--seeds must be >= 1, not {seeds}")
    variants = STUDIES[name](options)
    chosen = read_config(run_flags(options, variants[0], first))
    if chosen.teachers:
        raise UserError(f"config.teachers.{next(iter(chosen.teachers))}: a study has one teacher: set config.teacher")
    study_tuning.check(options, chosen)
    if equal == "time":
        study_time.check(chosen)
    options = dataclasses.replace(options, cache=chosen.teacher.cache, views=bool(chosen.data.views))
    check_outputs(options)
    busy = f"--workdir: another study runs in {options.workdir}: wait until it ends, or choose another folder"
    with files.lock(options.workdir / ".lock", busy):
        return study(options, variants)


def check_outputs(options: Options) -> None:
    """Makes the workdir, and checks that chart, json and log can be written.

    Raises:
      UserError: they cannot, or the json of other studies is damaged.
    """
    for flag, folder, names in (
        ("--workdir", options.workdir, [f"{options.name}.png", study_record.FILE]),
        *([("--log", options.log.parent, [options.log.name])] if options.log else []),
    ):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{flag}: {folder} cannot be created ({error.strerror}): choose another folder") from None
        files.check_outputs(flag, folder, files=names)
    if (options.workdir / study_record.FILE).exists():
        study_record.read(options.workdir / study_record.FILE)


def words(text: str) -> list[str]:
    """Splits at commas: "a,b" -> ["a", "b"]."""
    return [word for word in text.split(",") if word]


def study(options: Options, variants: list[Variant]) -> int:
    """Trains the runs that are missing, prints table and summary, and draws the chart.

    Args:
      options: arguments of the command.
      variants: the rows.

    Returns:
      Exit code: 0, or 143 if a run was stopped.
    """
    tuned: dict[str, Mapping[str, Any]] = {}
    if options.tune:
        variants, content = study_tuning.tune(options, variants)
        tuned = {entry["name"]: entry for entry in content["rows"]}
    twins: Twins = {}
    results: dict[str, dict[int, Results]] = {variant.name: {} for variant in variants}
    failures: dict[str, dict[int, str]] = {variant.name: {} for variant in variants}
    for seed in range(options.first, options.first + options.seeds):
        write_caches(options, variants, seed)
        for variant in variants:
            try:
                result = train_pair(options, variants, variant, seed, twins)
            except Failed as error:
                failures[variant.name][seed] = str(error)
                continue
            results[variant.name][seed] = result
            print(f"seed {seed}, {variant.name}: gain {report.gain(result, 'AP'):+.2f}", flush=True)
    rows = []
    for variant in variants:
        row = report.summarize(variant.name, results[variant.name], failures[variant.name])
        if options.name == "sizes" and row["seeds"]:
            row["latency_ms"] = latency(folder_of(options, variant, row["seeds"][0]) / "student")
        if variant.name in tuned:
            row["tuned"] = study_tuning.shown(tuned[variant.name])
        rows.append(row)
    if options.name in ("methods", "teacher"):
        rows.sort(key=lambda row: -row.get("gain AP", [-math.inf])[0])
    folders = [twin_folder(options, variants[0], options.first)]
    for variant in variants:
        for seed in results[variant.name]:
            folders += [twin_folder(options, variant, seed), folder_of(options, variant, seed)]
    facts = facts_of(folders)
    recorded = [
        study_record.row(options, one, results[one.name], failures[one.name], tuned.get(one.name)) for one in variants
    ]
    failed: list[str] = []
    with files.attempt(failed):
        content = {"command": command_of(options), "versions": facts, "seconds": study_record.seconds_of(recorded)}
        study_record.write(options, content | {"rows": recorded})
    with files.attempt(failed):
        report.publish(
            command_of(options),
            [report.study_table(rows), report.by_chance(rows), str(facts)],
            {"study": options.name, "rows": rows},
            options.log,
        )
    with files.attempt(failed):
        report.draw(rows, options.name).savefig(options.workdir / f"{options.name}.png")
    files.finish(failed)
    return 0


def train_pair(options: Options, variants: list[Variant], variant: Variant, seed: int, twins: Twins) -> Results:
    """The results of a seed of a row: student, teacher and twin, at equal time also the longer twin.

    Args:
      options: arguments of the command.
      variants: all rows.
      variant: the row.
      seed: of the twin.
      twins: those that are known; gets the others.

    Raises:
      Failed: the run failed.
      UserError: a twin failed, or a folder has another run.
    """
    twin = twin_of(options, variant, seed, twins)
    found = study_runs.train(flags_of(options, variant, seed), folder_of(options, variant, seed))
    result = {"student": found["student"], "teacher": found["teacher"], "twin": twin}
    if options.equal == "time":
        relative = study_time.relative(options, variants, variant, seed)
        longer = study_time.longer(options, variant, seed, relative["times"])
        result |= {"time": relative, "at_equal_time": twin_of(options, longer, seed, twins)}
    return result


def twin_of(options: Options, variant: Variant, seed: int, twins: Twins) -> Results:
    """The results of the twin of a row.

    Raises:
      UserError: it failed, or the folder has another run.
    """
    if (seed, variant.student) not in twins:
        try:
            found = study_runs.train(twin_flags(options, variant, seed), twin_folder(options, variant, seed))
        except Failed as error:
            raise UserError(f"the twin of seed {seed}, which all runs need, failed: {error}") from error
        twins[seed, variant.student] = found["student"]
    return twins[seed, variant.student]


def command_of(options: Options) -> str:
    """The command that makes the study, for the log."""
    command = f"kdjax study {options.name} --config={options.config} --seeds={options.seeds}"
    command += f" --first={options.first}" if options.first else ""
    for option, name in (("methods", "methods"), ("weights", ""), ("students", "sizes")):
        chosen = getattr(options, option)
        command += f" --{option}={','.join(chosen)}" if chosen and name in ("", options.name) else ""
    command += f" --teachers={','.join(options.teachers)}" if options.teachers else ""
    command += f" --equal={options.equal}" if options.equal != "steps" else ""
    command += f" --tune={options.tune}" if options.tune else ""
    return " ".join([command, *options.flags])


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
