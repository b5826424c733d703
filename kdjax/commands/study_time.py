"""Equal time: how much longer a step takes with a method, and the twin that is trained for as much longer."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from kdjax import files
from kdjax.commands.study_layout import cache_of, folder_of, read_config, twin_flags, twin_folder
from kdjax.commands.study_runs import unreadable
from kdjax.commands.study_variants import Options, Variant
from kdjax.data import shards
from kdjax.errors import UserError
from kdjax.resources import Config
from kdjax.training import log

FILE = "times.json"  # in the folder of the study
LEAST = 3  # lines of metrics.jsonl
PAUSE = 2.0  # a line whose steps took this many times the median is left out: the machine did something else


def check(config: Config) -> None:
    """Checks that the runs log enough to measure their steps.

    Raises:
      UserError: they do not.
    """
    if config.steps < LEAST * config.log_every:
        most = max(config.steps // LEAST, 1)
        raise UserError(
            f"--equal=time: {config.steps} steps with a line every {config.log_every} are too few lines to measure a "
            f"step: set --config.log_every={most} or less"
        )


def relative(options: Options, variants: Sequence[Variant], variant: Variant, seed: int) -> dict[str, float]:
    """How long a step of a run takes, relative to its twin's. Measured once: then the study's folder has it.

    Args:
      options: arguments of the command.
      variants: all rows, which share the teacher's cache.
      variant: the row.
      seed: of the run and its twin, which are finished.

    Returns:
      "student", "twin", "cache": seconds of a step, the last one being the run's share of writing the cache; "ratio";
      "times": the ratio rounded up to tenths, at least 1.

    Raises:
      UserError: a log is too short, or the file is damaged.
    """
    path, folder = options.workdir / FILE, folder_of(options, variant, seed)
    known: dict[str, dict[str, float]] = {}
    if path.exists():
        with unreadable(path):
            known = json.loads(path.read_text())
            if files.altered(known):
                raise UserError(f"{path}: it was changed after it was written: delete it to have the times measured")
            known = {name: dict(entry) for name, entry in known.items() if name != "sha256"}
    if folder.name not in known:
        student = step_seconds(folder / "metrics.jsonl")
        twin = step_seconds(twin_folder(options, variant, seed) / "metrics.jsonl")
        cache = writing_seconds(options, variants, variant, seed)
        known[folder.name] = of_steps(student, twin, cache)
        files.write_json(path, files.sealed(known), indent=1)
    return known[folder.name]


def of_steps(student: float, twin: float, cache: float = 0.0) -> dict[str, float]:
    """What `relative` returns of seconds of a step.

    Example:
      >>> of_steps(0.121, 0.1)["times"], of_steps(0.09, 0.1)["times"], of_steps(0.13, 0.1)["times"]
      (1.3, 1.0, 1.3)
    """
    ratio = (student + cache) / twin
    times = max(math.ceil(round(10 * ratio, 6)), 10) / 10
    return {"student": student, "twin": twin, "cache": cache, "ratio": ratio, "times": times}


def step_seconds(path: Path) -> float:
    """Mean seconds of a step of a run, by its log.

    Left out are the first line of each process, whose steps start programs, and lines whose steps took more than
    `PAUSE` times the median: the machine did something else. Evaluations are not in the log's seconds.

    Args:
      path: metrics.jsonl.

    Raises:
      UserError: fewer than two lines are left.
    """
    spans: list[tuple[float, int]] = []
    before = None
    for row in log.read(path)[0]:
        if row["kind"] == "train":
            if before is not None and row["step"] > before:
                spans.append((row["seconds"], row["step"] - before))
            before = row["step"]
    if len(spans) < LEAST - 1:
        raise UserError(f"{path}: it has too few lines to measure a step: set config.log_every to less")
    usual = statistics.median(seconds / steps for seconds, steps in spans)
    kept = [(seconds, steps) for seconds, steps in spans if seconds / steps <= PAUSE * usual]
    return sum(seconds for seconds, _ in kept) / sum(steps for _, steps in kept)


def writing_seconds(options: Options, variants: Sequence[Variant], variant: Variant, seed: int) -> float:
    """A run's share of the seconds that writing its teacher's cache took, for each of its steps; 0 without a cache."""
    if not options.cache:
        return 0.0
    folder = cache_of(options, variant, seed)
    found = shards.find(Path(folder))
    written = sum(one.get("seconds", 0.0) for one in found.listed().values()) if found else 0.0
    readers = sum(cache_of(options, one, seed) == folder for one in variants) * (options.seeds if options.views else 1)
    return written / readers / read_config(twin_flags(options, variant, seed)).steps


def longer(options: Options, variant: Variant, seed: int, times: float) -> Variant:
    """The row whose twin is trained longer: the number of its steps, and the steps at which its schedule changes.

    Args:
      options: arguments of the command.
      variant: the row.
      seed: of the twin.
      times: how many times as long.
    """
    if times == 1:
        return variant
    config = read_config(twin_flags(options, variant, seed))
    flags = [f"--config.steps={scaled(config.steps, times)}"]
    if config.data.stage2.start:
        flags.append(f"--config.data.stage2.start={scaled(config.data.stage2.start, times)}")
    if config.optimizer.drops:
        drops = ",".join(str(scaled(step, times)) for step in config.optimizer.drops)
        flags.append(f"--config.optimizer.drops={drops}")
    return variant._replace(student=(*variant.student, *flags))


def scaled(steps: int, times: float) -> int:
    """Steps times a number of tenths, rounded up."""
    return -(-steps * round(10 * times) // 10)
