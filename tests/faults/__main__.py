"""`python -m tests.faults --kills=300 --corruptions=1000 --workdir=DIR --seed=0`: the long form of the harness.

It prints a line for each run that was disturbed, tables of what was done and what came of it, every fault, and one line
of json at the end. Exit code 1 if there was a fault.
"""

import argparse
import collections
import json
import os
import signal
import sys
import time
from pathlib import Path

from kdjax.files import cache_root
from kdjax.training.provenance import environment
from tests.faults import commands, corruptions, kills
from tests.faults.runs import make_home


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--kills", type=int, default=300, help="signals to running commands")
    parser.add_argument("--corruptions", type=int, default=1000, help="damaged files, read as a run reads them")
    parser.add_argument("--commands", type=int, default=20, help="damaged files, with whole commands")
    parser.add_argument("--disks", type=int, default=20, help="runs on a disk that becomes full")
    parser.add_argument("--workdir", type=Path, required=True, help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    if chosen.workdir.exists():
        parser.error(f"--workdir: {chosen.workdir} exists: choose a new folder")
    begun = time.time()
    home = make_home(chosen.workdir, cache_root() / "jax")
    known = kills.reference(home)
    print(f"undisturbed: {known.seconds:.1f} s, of which {known.trains:.1f} s from the first step on", flush=True)
    killed = kills.run(home, known, chosen.kills, chosen.seed, say=lambda text: print(text, flush=True))
    cases = corruptions.run(home, known.workdir, chosen.corruptions, chosen.seed)
    ended = commands.damaged(home, known, chosen.commands, chosen.seed)
    why = commands.no_disks() if chosen.disks else "none were asked for"
    disks = [] if why else commands.full_disk(home, known, chosen.disks, chosen.seed)
    whole = [*ended, *disks]
    faults = killed.faults + corruptions.faults(cases)
    faults += [f"{one.what}: {one.outcome}: {one.detail}" for one in whole if one.outcome not in commands.OUTCOMES]
    print(f"\n{len(killed.kills)} kills of {killed.runs} runs\n\n{kills.table(killed.kills)}")
    print(f"\n{len(cases)} damaged files\n\n{corruptions.table(cases)}\n")
    for one in whole:
        print(f"{one.what}: {one.outcome}: {one.detail}")
    if why:
        print(f"full disks: skipped: {why}")
    print(f"\n{len(faults)} faults", *faults, sep="\n")
    codes = collections.Counter(f"{kill.signal} {kill.code}" for kill in killed.kills)
    told = {
        "commit": environment()["commit"],
        "seed": chosen.seed,
        "kills": len(killed.kills),
        "runs": killed.runs,
        "moments": collections.Counter(kill.moment for kill in killed.kills),
        "codes": codes,
        "corruptions": collections.Counter(case.outcome for case in cases),
        "commands": collections.Counter(one.outcome for one in ended),
        "disks": why or collections.Counter(one.outcome for one in disks),
        "faults": len(faults),
        "seconds": round(time.time() - begun),
    }
    print(json.dumps(told))
    return 1 if faults else 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # A shell ignores it for what it starts in the background, and children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
