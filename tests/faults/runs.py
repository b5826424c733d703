"""The run that is disturbed: its command, what it is doing at a moment, what it leaves, and how that is compared."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax import detectors, weights
from kdjax.files import altered
from kdjax.training import log
from kdjax.weights.checkpoint import arrays
from tests.faults.config import DETECTOR, IMAGE_SIZE, OPTIONS
from tests.shared import QUICK, ROOT

CONFIG = Path(__file__).with_name("config.py")
CLASSES = ["disc", "wedge", "star", "cross", "striped", "checked"]
MOMENTS = ("start", "compile", "step", "save", "evaluation", "report", "end")
# What differs between two runs that are otherwise equal: times, and numbers of lines, some of which are written twice.
OF_TIME = ("time", "seconds", "images_per_s", "wait_share", "decoded_per_image", "line", "crc32")
PATIENCE = 300.0  # s, after which a process that should end counts as hanging
_TEMPORARY = (".tmp", ".partial", ".lock.owner")


class Home(NamedTuple):
    """Where the runs of the harness lie, and their caches."""

    folder: Path
    cache: Path  # of prepared data
    programs: Path  # of compiled programs
    flags: tuple[str, ...] = ()  # of every run

    def command(self, workdir: Path) -> list[str]:
        """The command of a run, as a user types it."""
        return [
            sys.executable, "-m", "kdjax", "train", f"--config={CONFIG}", f"--workdir={workdir}",
            f"--config.teacher.weights={self.folder / 'teacher'}", f"--config.data.cache={self.cache}",
            f"--config.compile_cache={self.programs}", *self.flags,
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """One device, and less optimisation by XLA, so that a start is short."""
        less = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": QUICK}
        return os.environ | less | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def make_home(folder: Path, programs: Path) -> Home:
    """Creates the folder, with a teacher of random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    detector = detectors.build(DETECTOR, len(CLASSES), **OPTIONS)
    params, stats = detector.init(jax.random.PRNGKey(99))
    weights.save(folder / "teacher", detector, params, stats, classes=CLASSES, image_size=IMAGE_SIZE)
    return Home(folder.absolute(), folder.absolute() / "cache", programs.absolute())


class Life:
    """One process of a run, in a session of its own; its output goes to a file."""

    def __init__(self, home: Home, workdir: Path, log: Path, *, around: Sequence[str] = ()) -> None:
        self.workdir, self.log, self.begun = workdir, log, time.time()
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*around, *home.command(workdir)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=home.environment(),
                cwd=home.folder,
                start_new_session=True,
            )

    def said(self) -> str:
        """All output so far, each state of a progress bar as a line."""
        return self.log.read_text(errors="replace").replace("\r", "\n")

    def ended(self, within: float) -> bool:
        """Waits until the process ends, at most some seconds."""
        try:
            self.process.wait(max(within, 0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def doing(self) -> str:
        """What the process is doing: one of `MOMENTS`, by its files and by the end of its output."""

        def is_new(path: Path) -> bool:
            return path.exists() and path.stat().st_mtime >= self.begun

        page, results = self.workdir / "report.html", self.workdir / "results.json"
        if is_new(page) and is_new(results) and page.stat().st_mtime_ns >= results.stat().st_mtime_ns:
            return "end"  # the page before that is of a run that goes on
        if any((self.workdir / "checkpoints").glob("*tmp*")):
            return "save"
        said = self.said()
        last = {name: said.rfind(text) for name, text in _BARS.items()}
        if any(map(is_new, (self.workdir / "detections").glob("*"))):
            return "report"
        return max(last, key=lambda name: last[name]) if max(last.values()) >= 0 else "start"

    def leftovers(self) -> list[int]:
        """Processes of the session that still run, some seconds after the end of the first one."""
        for _ in range(100):
            if not (left := _of_session(self.process.pid)):
                break
            time.sleep(0.1)
        return left


_BARS = {"compile": "\ncompile: ", "step": "\ntrain: ", "evaluation": "\nevaluate "}


def _of_session(session: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended meanwhile
            continue
        if int(of) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def outcome(workdir: Path) -> dict[str, Any]:
    """What a finished run leaves, by part: two runs are equal to the bit if all parts are."""
    note, state = arrays(workdir / "checkpoints", "")
    results = json.loads((workdir / "results.json").read_text())
    assert not altered(results), "results.json does not match its hash"
    parts: dict[str, Any] = {"steps": note["next_batch"], "results.json": results, "metrics.jsonl": metrics(workdir)}
    for name, digest in note["sha256"].items():  # which `arrays` has verified
        role, kind = name.split("/")[:2]
        parts.setdefault(f"{role}'s {kind}", {})[name] = digest
    assert note["sha256"].keys() == state.keys()
    for role in {"student", "twin"} & {name.partition("/")[0] for name in state}:
        _, params, stats, _ = weights.load(workdir / role)
        flat = jax.tree_util.tree_leaves_with_path({"params": params, "stats": stats})
        parts[f"{role}/"] = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in flat}
    for path in sorted((workdir / "detections").iterdir()):
        parts[f"detections/{path.name}"] = path.read_bytes()
    parts["per_class.json"] = (workdir / "per_class.json").read_bytes()
    return parts


def metrics(workdir: Path) -> dict[tuple[int, str, str], float]:
    """What readers see of metrics.jsonl: of each step, kind and name the last value; those of time are left out."""
    rows, _ = log.read(workdir / "metrics.jsonl")
    return {
        (row["step"], row["kind"], name): value
        for row in rows
        for name, value in row.items()
        if name not in ("step", "kind", *OF_TIME)
    }


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The parts of `outcome` that differ."""
    differ = []
    for part in sorted(found.keys() | wanted.keys()):
        ours, theirs = found.get(part), wanted.get(part)
        if ours == theirs:
            continue
        detail = ""
        if isinstance(ours, dict) and isinstance(theirs, dict):
            lost, more = theirs.keys() - ours.keys(), ours.keys() - theirs.keys()
            other = {key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]}
            counts = [f"{len(keys)} {what} ({min(keys)})" for keys, what in
                      ((lost, "lost"), (more, "added"), (other, "changed")) if keys]  # fmt: skip
            detail = f": {', '.join(counts)}"
        differ.append(f"{part} differs{detail}")
    return differ


def unsound(workdir: Path, others: Sequence[Path] = ()) -> list[str]:
    """What a finished run should not leave: files that cannot be read, and temporary ones.

    Args:
      workdir: of the run.
      others: further folders that must not have temporary files.
    """
    found = [
        f"a temporary file is left: {path}"
        for folder in (workdir, *others)
        for path in folder.rglob("*")
        if path.name.endswith(_TEMPORARY) or "orbax-checkpoint-tmp" in path.name
    ]
    if damaged := log.read(workdir / "metrics.jsonl")[1]:
        found.append(f"metrics.jsonl has {damaged} damaged lines")
    for path in workdir.rglob("*.json"):
        if "checkpoints" not in path.parts:
            try:
                json.loads(path.read_text())
            except ValueError as error:
                found.append(f"{path} cannot be read: {error}")
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    for step in steps:
        try:
            arrays(workdir / "checkpoints", "", step=step)
        except ValueError as error:
            found.append(str(error))
    if not (workdir / "report.html").read_text().rstrip().endswith("</html>"):
        found.append("report.html is not whole")
    return found
