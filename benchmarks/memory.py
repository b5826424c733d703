"""How much memory does a step need, and how does it grow with the boxes of an image?

    python benchmarks/memory.py --detector=rtmdet_tiny --batch=8 --size=640

Each number of boxes has a process of its own, which compiles the step of train.py and runs it: `planned` is the
compiler's estimate, `peak` the largest memory of the process, compilation and Python included.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from kdjax.report import study
from kdjax.training import provenance


def words(text: str) -> list[str]:
    """Splits at commas: "a,b" -> ["a", "b"]."""
    return [word for word in text.split(",") if word]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=words, default=["16", "100", "300", "1000"])
    parser.add_argument("--log", type=Path)
    args, flags = parser.parse_known_args()  # what is left over describes the step: see step_time.py
    rows, found = [], []
    for boxes in args.boxes:
        script = Path(__file__).with_name("step_time.py")
        run = [sys.executable, str(script), *flags, f"--boxes={boxes}", "--steps=3"]
        found.append(json.loads(subprocess.run(run, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1]))
        keys = ("memory_mb", "peak_rss_mb", "median_s")
        rows.append(
            [boxes, *(f"{found[-1][key]:.2f}" if key == "median_s" else f"{found[-1][key]:.0f}" for key in keys)]
        )
        print(f"{boxes} boxes: {rows[-1][1]} MB planned", flush=True)
    study.publish(
        " ".join(["python benchmarks/memory.py", *flags]),
        [
            study.table(["boxes an image", "planned MB", "peak MB", "s a step"], rows),
            study.facts(provenance.environment()),
        ],
        {"rows": found},
        args.log,
    )


if __name__ == "__main__":
    main()
