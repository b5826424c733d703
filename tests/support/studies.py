"""Studies whose training is a stand-in: their APs and seconds are functions of what the flags say."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from kdjax import cli
from kdjax.commands import study_runs

FACTS = {"commit": "c", "python": "3", "jax": "1", "flax": "2", "devices": "cpu"}


def stand_in(
    monkeypatch,
    ap: Callable[[Mapping[str, str]], float],
    *,
    seconds: Mapping[str, float] | None = None,
    data: str = "d",
) -> list[tuple[Path, Mapping[str, str]]]:
    """Replaces training; returns the list that gets folder and settings of each run that is asked for.

    Args:
      monkeypatch: of pytest.
      ap: what the flags say, by setting without "config." ("method": those of the argument) -> AP; may raise `Failed`.
      seconds: of a step by methods, 0.1 of those that are not named.
      data: the fingerprint of the data.
    """
    asked = []

    def train(flags: list[str], workdir: Path) -> dict:
        said = {flag.partition("=")[0].removeprefix("--config."): flag.partition("=")[2] for flag in flags}
        said["method"] = said.pop("--config").rpartition(":")[2]
        asked.append((workdir, said))
        value = ap(said)
        metrics = {"AP": value, "AP50": value + 0.1, "params": 10, "flops": 2e6}
        if not workdir.exists():
            workdir.mkdir(parents=True)
            run = FACTS | {"command": [*flags, f"--workdir={workdir}"], "data": data}
            (workdir / "config.json").write_text(json.dumps({"config": {}, "runs": [run]}))
            step = (seconds or {}).get(said["method"], 0.1)
            lines = [dict(step=20 * i, kind="train", seconds=20 * step * (9 if i == 1 else 1)) for i in range(1, 6)]
            (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {"student": metrics, "teacher": metrics | {"AP": 0.9} if said["method"] else None}

    monkeypatch.setattr(study_runs, "train", train)
    return asked


def run_study(*arguments: str, workdir: Path) -> int:
    """The exit code of `kdjax study`."""
    return cli.main(["study", *arguments, f"--workdir={workdir}"])


def cells(text: str) -> list[dict[str, str]]:
    """The rows of the last table of a text, by heading; the first column is "name"."""
    tables = [part for part in text.split("\n\n") if part.startswith("| ")]
    lines = [line for line in tables[-1].splitlines() if line.startswith("| ")]
    head, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(["name", *head[1:]], row, strict=True)) for row in rows]
