"""Whole commands on damaged files, and on a disk that is full."""

import random
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from tests.faults.corruptions import DAMAGES, damage
from tests.faults.kills import Reference
from tests.faults.runs import PATIENCE, Home, Life, differences, outcome, unsound

OUTCOMES = ("equal", "refused")
# What a run reads when it is started again; the other files it writes anew.
_READ = ("checkpoints/*/**/*", "config.json", "metrics.jsonl")


class Ended(NamedTuple):
    """How a command ended."""

    what: str  # was done to its files
    outcome: str  # "equal", "refused", or else a fault
    detail: str


def damaged(home: Home, known: Reference, count: int, seed: int) -> list[Ended]:
    """The same command on a workdir whose run was killed, after one of the files that it reads was damaged."""
    drawn, ended = random.Random(f"{seed} commands"), []
    workdir, newest = home.folder / "damaged" / "workdir", max(known.steps)
    while len(ended) < count:
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(known.workdir, workdir)
        shutil.rmtree(workdir / "checkpoints" / str(newest))
        (workdir / "results.json").unlink()
        files = sorted(path for path in workdir.glob(drawn.choice(_READ)) if path.is_file())
        path, how = drawn.choice(files), drawn.choice(list(DAMAGES))
        if damage(path, how, drawn):
            what = f"{path.relative_to(workdir)}, {how}"
            life = Life(home, workdir, home.folder / "damaged.log")
            ended.append(Ended(what, *_finished(life, known, _unread(path.relative_to(workdir), known))))
    return ended


def _unread(damaged: Path, known: Reference) -> str:
    """How `unsound` names a checkpoint that the command does not read, as there is a newer one; "" if it reads it."""
    step = damaged.parts[1] if damaged.parts[0] == "checkpoints" else ""
    return f"checkpoint {step} " if step.isdigit() and int(step) < known.steps[-2] else ""


def _finished(life: Life, known: Reference, unread: str) -> tuple[str, str]:
    """How a command ends that may be refused: outcome and detail of `Ended`; `unread` is left out of the faults."""
    if not life.ended(PATIENCE):
        life.process.kill()
        return "hangs", life.said()[-500:]
    told = [line.strip() for line in life.said().splitlines()]
    warned = [line for line in told if "damaged" in line or "cannot be read" in line or "is missing" in line]
    if life.process.returncode == 2:
        said = [line for line in told if line.startswith("kdjax: ")]
        if len(said) == 1 and str(life.workdir) in said[0] and "Traceback" not in life.said():
            return "refused", said[0]
        return "refused without a sentence", life.said()[-500:]
    if life.process.returncode:
        return f"exit code {life.process.returncode}", life.said()[-500:]
    differ = [*differences(outcome(life.workdir), known.outcome), *unsound(life.workdir)]
    differ = [part for part in differ if not unread or unread not in part]
    if warned and all(part.startswith("metrics.jsonl") for part in differ):
        differ = []  # lines are missing, and the report says so
    return ("differs", "; ".join(differ)) if differ else ("equal", "; ".join(warned))


# A disk of a given size in a namespace of its own, so that it vanishes with the process; then one with room.
_ON_SMALL_DISK = """
disk=$1 size=$2 copy=$3; shift 3
mount -t tmpfs -o size=$size tmpfs "$disk" || exit 99
"$@"; code=$?
echo; echo "exit code $code on a disk of $size bytes"
if [ $code -ne 0 ]; then
    mount -o remount,size=1g "$disk"
    "$@"; code=$?
fi
cp -r "$disk/run" "$copy"
exit $code
"""
_LINES = 40  # of output that a full disk may cost beside the progress bars


def no_disks() -> str:
    """Why no small disk can be made here; "" if one can."""
    try:
        tried = ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
        done = subprocess.run(tried, capture_output=True, text=True, timeout=20)
    except OSError as error:
        return str(error)
    return " ".join(done.stderr.split()) if done.returncode else ""


def full_disk(home: Home, known: Reference, count: int, seed: int) -> list[Ended]:
    """A run whose disk is full at some moment, and the same command again with more room."""
    drawn, ended = random.Random(f"{seed} disks"), []
    needed = sum(path.stat().st_size for path in known.workdir.rglob("*") if path.is_file())
    disk, copy, log = (home.folder / name for name in ("disk", "disk.copy", "disk.log"))
    disk.mkdir(exist_ok=True)
    for _ in range(count):
        size = max(4096, int(drawn.uniform(0, 1.3 * needed)))
        shutil.rmtree(copy, ignore_errors=True)
        around = ["unshare", "--mount", "sh", "-c", _ON_SMALL_DISK, "sh", str(disk), str(size), str(copy)]
        life = Life(home, disk / "run", log, around=around)
        ended.append(Ended(f"a disk of {size:,} bytes", *_with_more_room(life, copy, known)))
    return ended


def _with_more_room(life: Life, copy: Path, known: Reference) -> tuple[str, str]:
    """How a run on a full disk ends: outcome and detail of `Ended`."""
    if not life.ended(2 * PATIENCE):
        life.process.kill()
        return "hangs", life.said()[-500:]
    first, _, _ = life.said().partition("\nexit code ")
    if life.process.returncode:
        return f"exit code {life.process.returncode}", life.said()[-500:]
    if differ := [*differences(outcome(copy), known.outcome), *unsound(copy)]:
        return "differs", "; ".join(differ)
    said = [line for line in first.splitlines() if line.startswith("kdjax: ")]
    if "\nexit code 0 " in life.said():
        return "equal", "; ".join(said)
    bars = ("train: ", "compile: ", "evaluate ", "scenes")
    lines = [line for line in first.splitlines() if line.strip() and not line.startswith(bars)]
    # The last one is the error; before it, the page of the run and TensorBoard may each have said that they fail.
    if not 1 <= len(said) <= 3 or not all("make room" in line for line in said) or "again" not in said[-1]:
        return "no sentence", first[-500:]
    if len(lines) > _LINES:
        return "too many lines", f"{len(lines)} lines: {said[-1]}"
    return "equal", "; ".join(said)
