"""How long until the first step? From the command to the first logged loss, with an empty compile cache and a full one.

    python benchmarks/startup.py    # the quickstart; other flags go to train.py

The data is prepared before the clock starts. Each start is a run of train.py that is stopped after its first line in
metrics.jsonl; cold and warm take turns, each round with a cache of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kdjax.report import study
from kdjax.training import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--log", type=Path)
    args, flags = parser.parse_known_args()
    command = [sys.executable, "-m", "kdjax", "train", f"--config={args.config}", *flags]
    seconds = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command, "--config.data.check=True", f"--workdir={folder}/check"], check=True)
        for i in range(args.rounds):
            for kind, taken in seconds.items():
                taken.append(start([*command, f"--config.compile_cache={folder}/{i}"], Path(folder) / f"{kind}{i}"))
                print(f"{kind}: {taken[-1]:.1f} s", flush=True)
    rows = [
        [kind, f"{statistics.median(taken):.1f}", ", ".join(f"{s:.1f}" for s in taken)]
        for kind, taken in seconds.items()
    ]
    study.publish(
        " ".join(["python benchmarks/startup.py", *sys.argv[1:]]),
        [
            study.table(["compile cache", "s to the first step, median", "all"], rows),
            study.facts(provenance.environment()),
        ],
        seconds,
        args.log,
    )


def start(command: list[str], workdir: Path) -> float:
    """Seconds until the first loss of a run is written; the run is stopped then."""
    lines, since = workdir / "metrics.jsonl", time.perf_counter()
    with subprocess.Popen([*command, "--config.log_every=1", f"--workdir={workdir}"]) as process:
        while not (lines.exists() and any('"kind": "train"' in line for line in lines.read_text().splitlines())):
            if process.poll() is not None:
                raise SystemExit(f"the run ended with {process.returncode} before its first step")
            time.sleep(0.05)
        taken = time.perf_counter() - since
        process.terminate()
    assert json.loads(lines.read_text().splitlines()[0])["step"] == 1
    return taken


if __name__ == "__main__":
    main()
