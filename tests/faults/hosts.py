"""`python -m tests.faults.hosts --kills=20 --workdir=DIR --seed=0`: kills of one of two and of four hosts.

Each host is a process of this machine; as root, each lies in a network of its own (`ip netns`), and some are cut off
instead of killed. The others must leave with `cluster.RESTART`, within the stated time, and the same command goes on;
after all kills the run is compared with an undisturbed one, bit for bit.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax import weights
from kdjax.files import cache_root
from kdjax.training.cluster import RESTART
from kdjax.training.provenance import environment
from tests.shared import ROOT

SAVES, TIMEOUT = 3, 10  # steps between two checkpoints; --host-timeout, s
# s, in which all others must have left; 120 with the default of --host-timeout, 60
STATED = 2 * TIMEOUT
HOW = ("SIGKILL", "SIGSTOP", "cut off")
PATIENCE = 600.0
_XLA = "--xla_cpu_multi_thread_eigen=false"  # several processes share the cores
_NET, _PORT, _ETC = "10.77.0.{}", 8476, Path("/etc/netns")


class Lost(NamedTuple):
    """A host that was taken away."""

    hosts: int
    host: int
    how: str
    step: int  # of the last line of the log
    seconds: float  # until the last of the others has left
    codes: list[int]  # of the others
    named: bool  # whether each of the others says which host it was


class Hosts:
    """The processes of a run."""

    def __init__(self, home: Path, workdir: Path, count: int, steps: int, networks: Sequence[str], start: int) -> None:
        """Starts them.

        Args:
          home: for logs and prepared data.
          workdir: of the run.
          count: number of hosts.
          steps: of the run.
          networks: the names of their networks; none: they share that of this machine.
          start: number of this start, for the names of the logs.
        """
        self.networks, self.logs = networks, []
        self.processes: list[subprocess.Popen[bytes]] = []
        settings = {
            "batch_size": 4, "steps": steps, "log_every": 1, "data.scenes_train": 16, "data.scenes_val": 12,
            "data.image_size": "(64, 64)", "data.cache": home / "cache", "optimizer.warmup": 4, "eval.every": 0,
            "eval.batch_size": 4, "checkpoint.every": SAVES, "compile_cache": cache_root() / "jax",
        }  # fmt: skip
        command = [sys.executable, "train.py", "--config=configs/supervised/scenes.py:rtmdet_pico"]
        command += [*(f"--config.{name}={value}" for name, value in settings.items()), f"--workdir={workdir}"]
        where = _NET.format(1) if networks else "localhost"
        command += ["--multihost", f"--coordinator={where}:{_PORT + start % 500}", f"--hosts={count}"]
        for host in range(count):
            log = home / f"{workdir.name}.{start}.{host}.log"
            around = ["ip", "netns", "exec", networks[host]] if networks else []
            own = [f"--host={host}", f"--host-timeout={TIMEOUT}"]
            with log.open("wb") as out:
                one = subprocess.Popen(
                    [*around, *command, *own],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", "XLA_FLAGS": _XLA},
                )
            self.processes.append(one)
            self.logs.append(log)

    def ended(self) -> list[int]:
        """Exit codes of all."""
        return [process.wait(PATIENCE) for process in self.processes]

    def take_away(self, host: int, how: str) -> None:
        """Kills or stops a host, or cuts it off from the others."""
        if how == "cut off":
            _ip("-n", self.networks[host], "link", "set", "eth0", "down")
        else:
            self.processes[host].send_signal(getattr(signal, how))

    def clear(self, host: int, how: str) -> None:
        """Removes what is left of a host that was taken away."""
        self.processes[host].kill()
        self.processes[host].wait()
        if how == "cut off":
            _ip("-n", self.networks[host], "link", "set", "eth0", "up")


@contextlib.contextmanager
def networked(count: int) -> Iterator[list[str]]:
    """Names of networks that a bridge connects; none if this user may not make them."""
    names = [f"kdjax{host}" for host in range(count)]
    if os.geteuid() or subprocess.run(["ip", "netns", "add", names[0]], check=False).returncode:
        yield []
        return
    try:
        _ip("link", "add", "kdjaxbr", "type", "bridge")
        _ip("link", "set", "kdjaxbr", "up")
        for host, name in enumerate(names):
            if host:
                _ip("netns", "add", name)
            _ip("link", "add", f"kdjax{host}v", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", f"kdjax{host}v", "master", "kdjaxbr", "up")
            _ip("-n", name, "addr", "add", f"{_NET.format(host + 1)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            # `ip netns exec` puts it in the place of /etc/hosts: Gloo listens at the address of the machine's name.
            names_of = _ETC / name / "hosts"
            names_of.parent.mkdir(parents=True, exist_ok=True)
            names_of.write_text(f"127.0.0.1 localhost\n{_NET.format(host + 1)} {socket.gethostname()}\n")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
            shutil.rmtree(_ETC / name, ignore_errors=True)
        subprocess.run(["ip", "link", "del", "kdjaxbr"], check=False, stderr=subprocess.DEVNULL)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def reached(workdir: Path) -> int:
    """The step of the last whole line of the log."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"\n")), default=0)


def outcome(workdir: Path) -> dict[str, Any]:
    """What a finished run leaves: arrays of the student, losses by step (of each the last line), detections."""
    _, params, stats, _ = weights.load(workdir / "student")
    flat = jax.tree_util.tree_leaves_with_path({"params": params, "stats": stats})
    found = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in flat}
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {f"loss of step {row['step']}": row["student/total"] for row in rows if row["kind"] == "train"}
    return found | losses | {"detections": (workdir / "detections" / "student.json").read_bytes()}


def disturbed(
    home: Path, count: int, steps: int, networks: Sequence[str], kills: int, drawn: random.Random
) -> list[Lost]:
    """One run that loses hosts and is started again, until it is finished; raises if anything is wrong."""
    workdir, lost, starts = home / f"hosts{count}", [], 0
    how = HOW if networks else HOW[:2]
    while True:
        running = Hosts(home, workdir, count, steps, networks, starts)
        starts += 1
        if len(lost) == kills:
            assert running.ended() == [0] * count, running.logs
            return lost
        # Not beyond what the kills that are left leave for a step each.
        first, last = reached(workdir) + 1, steps - 2 * (kills - len(lost))
        at, until = drawn.randint(first, max(first, min(last, first + 10))), time.monotonic() + PATIENCE
        before = (workdir / "metrics.jsonl").stat().st_size if starts > 1 else 0
        while reached(workdir) < at or (workdir / "metrics.jsonl").stat().st_size == before:
            assert time.monotonic() < until and all(one.poll() is None for one in running.processes), running.logs
            time.sleep(0.02)
        host, chosen = drawn.randrange(count), how[0] if drawn.random() < 0.7 else drawn.choice(how[1:])
        time.sleep(drawn.uniform(0, 0.3))
        running.take_away(host, chosen)
        since, step = time.monotonic(), reached(workdir)
        others = [one for number, one in enumerate(running.processes) if number != host]
        codes = [one.wait(PATIENCE) for one in others]
        seconds = time.monotonic() - since
        said = [log.read_text(errors="replace") for number, log in enumerate(running.logs) if number != host]
        named = all(f"host {host}" in text.rpartition("kdjax: ")[2] or f"host {host} " in text for text in said)
        running.clear(host, chosen)
        lost.append(Lost(count, host, chosen, step, seconds, codes, named))
        print(lost[-1], flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.hosts")
    parser.add_argument("--kills", type=int, default=20, help="hosts that are taken away, as many for each count")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4], help="numbers of hosts, at most 4")
    parser.add_argument("--steps", type=int, default=60, help="of a run")
    parser.add_argument("--workdir", type=Path, required=True, help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    chosen.workdir.mkdir(parents=True)
    lost, faults, drawn = [], [], random.Random(chosen.seed)
    with networked(4) as networks:
        print(f"networks: {networks or 'that of this machine'}", flush=True)
        for count in chosen.counts:
            whole = chosen.workdir / f"whole{count}"
            undisturbed = Hosts(chosen.workdir, whole, count, chosen.steps, networks, 400 + count)
            assert undisturbed.ended() == [0] * count, undisturbed.logs
            lost += disturbed(chosen.workdir, count, chosen.steps, networks, chosen.kills // len(chosen.counts), drawn)
            found, wanted = outcome(chosen.workdir / f"hosts{count}"), outcome(whole)
            faults += [f"{count} hosts: {name} differs" for name in wanted if found.get(name) != wanted[name]]
    faults += [f"{one}" for one in lost if set(one.codes) != {RESTART} or not one.named or one.seconds > STATED]
    times = sorted(one.seconds for one in lost)
    told = {"commit": environment()["commit"], "lost": len(lost), "longest_s": times[-1], "faults": len(faults)}
    told |= {"median_s": times[len(times) // 2], "how": {name: sum(o.how == name for o in lost) for name in HOW}}
    print(*faults, json.dumps(told), sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
