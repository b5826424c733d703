"""Is the gain more than chance? Repeats a run over seeds and prints the mean gain with its standard error.

    python benchmarks/seeds.py --workdir=runs/seeds --seeds=5 -- --config=configs/quickstart.py

What stands behind `--` goes to train.py. Finished seeds are kept, interrupted ones resumed: run it again to go on. The
last lines are a table and one JSON object; `--log FILE` appends both, with the versions, to a Markdown file.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--log", type=Path)
    parser.add_argument("flags", nargs="+", help="flags of train.py")
    args = parser.parse_args()
    rows = []
    for seed in range(args.first, args.first + args.seeds):
        workdir = args.workdir.absolute() / f"seed{seed}"
        if not (workdir / "results.json").exists():
            command = [sys.executable, "train.py", *args.flags, f"--workdir={workdir}", f"--config.seed={seed}"]
            subprocess.run(command, cwd=ROOT, check=True)
        results = json.loads((workdir / "results.json").read_text())
        rows.append({"seed": seed} | {f"{r} {k}": results[r][k] for r in results if results[r] for k in ("AP", "AP50")})
    text = table(rows)
    config = json.loads((args.workdir / f"seed{args.first}" / "config.json").read_text())
    facts = {k: config["runs"][0][k] for k in ("commit", "python", "jax", "flax", "devices")}
    minutes = [minutes_of(args.workdir / f"seed{row['seed']}") for row in rows]
    heading = f"`python benchmarks/seeds.py --seeds={args.seeds} -- {' '.join(args.flags)}`"
    closing = f"{time.strftime('%Y-%m-%d')}; {facts}; training minutes {', '.join(f'{m:.1f}' for m in minutes)}"
    print(f"\n{text}\n{closing}")
    print(json.dumps(summary(rows)))
    if args.log:
        with args.log.open("a") as file:
            file.write(f"\n{heading}\n\n{text}\n\n{closing}\n\n    {json.dumps(summary(rows))}\n")


def minutes_of(workdir: Path) -> float:
    """Time spent in training steps, of all sittings."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return sum({row["step"]: row["seconds"] for row in rows if row["kind"] == "train"}.values()) / 60


def table(rows: list[dict]) -> str:
    """AP and AP50 in points, a line a seed, then mean and standard error."""
    columns = [name for name in rows[0] if name != "seed"]
    lines = ["| seed | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        lines.append(f"| {row['seed']} | " + " | ".join(f"{100 * row[name]:.2f}" for name in columns) + " |")
    means = summary(rows)
    lines.append(
        "| mean ± standard error | " + " | ".join("{:.2f} ± {:.2f}".format(*means[name]) for name in columns) + " |"
    )
    return "\n".join(lines)


def summary(rows: list[dict]) -> dict:
    """{column: (mean, standard error)} in points."""
    found = {}
    for name in rows[0]:
        if name != "seed":
            values = [100 * row[name] for row in rows]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            found[name] = (round(statistics.mean(values), 3), round(error, 3))
    return found


if __name__ == "__main__":
    main()
