"""Kills a run at random moments, starts the same command again, and compares what comes out with an undisturbed run."""

import collections
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.runs import MOMENTS, PATIENCE, Home, Life, differences, outcome, unsound

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP")
MOST = 6  # kills of one run, before it may finish
# Exit codes that a signal may lead to; 0: it came too late, or Python was in a place where Ctrl-C is ignored.
_CODES = {"SIGKILL": (-9,), "SIGTERM": (143, -15, 0), "SIGINT": (130, 143, -2, 0)}
_POLL = 0.005  # s
EARLY = 1.0  # s


class Reference(NamedTuple):
    """A run that nobody disturbs."""

    workdir: Path
    outcome: dict[str, Any]
    steps: list[int]  # of its checkpoints
    seconds: float  # from the start of the process to its end, with all programs in the cache
    trains: float  # the part of them from the first step on


class Kill(NamedTuple):
    """A signal that a process got."""

    signal: str
    moment: str  # of `MOMENTS`
    code: int  # with which the process ended


class Report(NamedTuple):
    """What came of some runs."""

    kills: list[Kill]
    runs: int
    faults: list[str]  # one sentence each; none if all is well


def reference(home: Home, *, again: bool = True) -> Reference:
    """Makes an undisturbed run.

    Args:
      home: of the runs.
      again: do so twice, because the first run compiles: the second tells how long a run takes, and must be equal to
        the first. Otherwise it has compiled, its time says nothing, and signals come within `EARLY` s.
    """
    outcomes, workdir = [], home.folder / "reference"
    for name in ("first", "reference") if again else ("reference",):
        life = Life(home, home.folder / name, home.folder / f"{name}.log")
        begun = time.monotonic()
        trains = 0.0
        while not life.ended(_POLL):
            if time.monotonic() > begun + 4 * PATIENCE:  # the first compiles
                life.process.kill()
            if not trains and "\ntrain: " in life.said():
                trains = time.monotonic()
        seconds, trains = time.monotonic() - begun, time.monotonic() - trains
        if life.process.returncode:
            raise RuntimeError(f"the undisturbed run failed with code {life.process.returncode}: {life.said()[-2000:]}")
        outcomes.append(outcome(home.folder / name))
    if differ := differences(outcomes[0], outcomes[-1]):
        raise RuntimeError(f"two undisturbed runs are not equal: {'; '.join(differ)}")
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    return Reference(workdir, outcomes[-1], steps, *((seconds, trains) if again else (EARLY, EARLY)))


def run(home: Home, known: Reference, kills: int, seed: int, *, say: Callable[[str], None] = print) -> Report:
    """Disturbs runs until there were so many kills.

    Args:
      home: of the runs.
      known: the undisturbed run.
      kills: number of signals.
      seed: of the signals and their moments.
      say: gets a line for each run.
    """
    done, faults, runs = [], [], 0
    while len(done) < kills:
        drawn = random.Random(f"{seed} {runs}")
        # Now and then without anything that earlier runs have prepared and compiled.
        cold = runs % 20 == 19
        ours, wrong = disturbed(home, known, f"run{runs}", drawn, min(MOST, kills - len(done)), cold=cold)
        done, faults, runs = done + ours, faults + wrong, runs + 1
        told = ", ".join(f"{kill.signal} in {kill.moment}: {kill.code}" for kill in ours)
        say(f"run {runs - 1}{' (cold)' * cold}: {told or 'not disturbed'}: {'; '.join(wrong) or 'equal'}")
    return Report(done, runs, faults)


def disturbed(
    home: Home,
    known: Reference,
    name: str,
    drawn: random.Random,
    most: int,
    *,
    cold: bool = False,
    signals: Iterable[str] = (),
) -> tuple[list[Kill], list[str]]:
    """One run that is started again after every kill, until it is finished.

    A moment is drawn uniformly over the time of the undisturbed run, counted from the start of the process; every other
    one over the time that it trained and evaluated, counted from the first step, because a start takes most of a life.

    Args:
      home: of the runs.
      known: the undisturbed run.
      name: of its workdir; deleted if the outcome is equal.
      drawn: random numbers.
      most: number of kills, after which it may finish.
      cold: with an empty cache of prepared data and compiled programs.
      signals: those of the first kills; random ones follow.

    Returns:
      The kills, and what was wrong, one sentence each.
    """
    workdir, kills, faults, lives = home.folder / "runs" / name, [], [], 0
    signals = iter(signals)
    caches = workdir.with_name(f"{name}.caches")
    if cold:
        home = home._replace(cache=caches, programs=caches / "jax")
    workdir.parent.mkdir(exist_ok=True)
    while True:
        life = Life(home, workdir, workdir.with_name(f"{name}.{lives}.log"))
        lives += 1
        chosen, late = next(signals, None) or drawn.choice(SIGNALS), drawn.random() < 0.5
        wait = drawn.uniform(0, known.trains if late else (1 + 2 * cold) * known.seconds)
        moment = _disturb(life, chosen, wait, late=late, drawn=drawn) if len(kills) < most else ""
        hangs = not life.ended(PATIENCE)
        if hangs:
            life.process.kill()
            life.process.wait()
            faults.append(f"{name}: the process did not end within {PATIENCE:.0f} s after {chosen} in {moment}")
        code = life.process.returncode
        if left := life.leftovers():
            faults.append(f"{name}: processes are left after {chosen}: {left}")
        if moment:
            kills.append(Kill(chosen, moment, code))
        allowed = _CODES.get(chosen, (0,)) if moment else (0,)
        if code not in allowed and not hangs:
            faults.append(f"{name}: exit code {code} after {chosen if moment else 'no signal'} {moment}: {life.log}")
        if "Traceback" in life.said() and chosen != "SIGINT":
            faults.append(f"{name}: a traceback after {chosen if moment else 'no signal'} {moment}: {life.log}")
        if code == 0 or faults:
            break
    if not faults:
        faults = [f"{name}: {what}" for what in differences(outcome(workdir), known.outcome)]
        faults += [f"{name}: {what}" for what in unsound(workdir, [caches] if cold else [])]
    if not faults:
        for path in workdir.parent.glob(f"{name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return kills, faults


def _disturb(life: Life, chosen: str, wait: float, *, late: bool, drawn: random.Random) -> str:
    """Sends a signal some seconds after the start or the first step; the moment, "" if the process ended first."""
    while late and "\ntrain: " not in life.said():
        if life.ended(_POLL):
            return ""
    if life.ended(wait):
        return ""
    life.process.send_signal(signal.SIGSTOP)  # so that what it is doing does not change while we look
    time.sleep(_POLL)
    moment = life.doing()
    if chosen == "SIGSTOP":
        time.sleep(drawn.uniform(0, 2))
    else:
        life.process.send_signal(getattr(signal, chosen))
    life.process.send_signal(signal.SIGCONT)
    return moment


def table(kills: Sequence[Kill]) -> str:
    """The number of kills by moment and signal, in Markdown."""
    counts = collections.Counter((kill.moment, kill.signal) for kill in kills)
    lines = [f"| moment | {' | '.join(SIGNALS)} | all |", "|---" * (len(SIGNALS) + 2) + "|"]
    for moment in MOMENTS:
        row = [counts[moment, name] for name in SIGNALS]
        lines.append(f"| {moment} | {' | '.join(map(str, row))} | {sum(row)} |")
    totals = [sum(counts[moment, name] for moment in MOMENTS) for name in SIGNALS]
    return "\n".join([*lines, f"| all | {' | '.join(map(str, totals))} | {sum(totals)} |"])
