"""Where the runs of a study lie, with which flags they are made, and the teacher's caches that they share."""

import dataclasses
import re
import sys
from pathlib import Path

from kdjax.commands import settings, study_runs
from kdjax.commands.study_runs import Failed
from kdjax.commands.study_variants import Options, Variant
from kdjax.errors import UserError
from kdjax.resources import Config


def label(name: str, *flags: str) -> str:
    """The folder of a run: the name and what its flags set."""
    return "_".join([name, *(re.sub(r"[^\w.=-]", "-", flag.removeprefix("--config.")) for flag in flags)])


def folder_of(options: Options, variant: Variant, seed: int) -> Path:
    """The folder of a run; `seed` is that of its twin."""
    if not variant.methods:
        return twin_folder(options, variant, seed + variant.shift)
    return options.workdir / f"seed{seed}" / label(variant.methods, *variant.flags, *variant.student)


def twin_folder(options: Options, variant: Variant, seed: int) -> Path:
    """The folder of a twin."""
    return options.workdir / f"seed{seed}" / label("twin", *variant.student)


def flags_of(options: Options, variant: Variant, seed: int) -> list[str]:
    """The flags of a run; `seed` is that of its twin."""
    if not variant.methods:
        return twin_flags(options, variant, seed + variant.shift)
    return run_flags(options, variant, seed)


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


def read_config(flags: list[str]) -> Config:
    """The config that the flags of a run make.

    Raises:
      UserError: they make none.
    """
    config, *overrides = flags
    return settings.read(config.removeprefix("--config="), overrides)


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
        if variant.methods:
            shared.setdefault(cache_of(options, variant, seed), []).append(variant)
    for group in shared.values():
        if all((folder_of(options, variant, seed) / "results.json").exists() for variant in group):
            continue
        names = "+".join(variant.methods for variant in group).split("+")
        teacher = tuple(flag for flag in group[0].flags if flag.startswith("--config.teacher."))
        together = group[0]._replace(methods="+".join(dict.fromkeys(names)), flags=teacher)
        try:
            study_runs.call([sys.executable, "-m", "kdjax", "cache", *run_flags(options, together, seed)])
        except Failed as error:
            raise UserError(f"the teacher's cache, which all runs need, was not written: {error}") from error
