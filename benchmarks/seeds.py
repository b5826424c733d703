"""Is the gain more than chance? Repeats a run over seeds and prints the mean gain with its standard error.

    python benchmarks/seeds.py --workdir=runs/seeds --seeds=5 -- --config=configs/quickstart.py

What stands behind `--` goes to train.py. Finished seeds are kept, interrupted ones resumed: run it again to go on. The
last lines are a table and one JSON object; `--log FILE` appends both, with the versions, to a Markdown file.
"""

import argparse
import sys
from pathlib import Path

from kdjax import study


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--log", type=Path)
    parser.add_argument("flags", nargs="+", help="flags of train.py")
    args = parser.parse_args()
    seeds = range(args.first, args.first + args.seeds)
    folders = {seed: args.workdir.absolute() / f"seed{seed}" for seed in seeds}
    rows = []
    for seed, folder in folders.items():
        try:
            results = study.train([*args.flags, f"--config.seed={seed}"], folder)
        except study.Failed as error:
            sys.exit(f"seed {seed}: {error}")
        rows.append(
            {"seed": seed}
            | {f"{r} {k}": results[r][k] for r in results if r != "voc" and results[r] for k in ("AP", "AP50")}
        )
    minutes = ", ".join(f"{study.minutes_of(folder):.1f}" for folder in folders.values())
    study.publish(
        f"python benchmarks/seeds.py --seeds={args.seeds} -- {' '.join(args.flags)}",
        [table(rows), f"{study.facts_of(folders[args.first])}; training minutes {minutes}"],
        summary(rows),
        args.log,
    )


def table(rows: list[dict]) -> str:
    """AP and AP50 in points, a line a seed, then mean and standard error."""
    columns = [name for name in rows[0] if name != "seed"]
    lines = [[str(row["seed"]), *(f"{100 * row[name]:.2f}" for name in columns)] for row in rows]
    means = [study.with_error([100 * row[name] for row in rows]) for name in columns]
    return study.table(["seed", *columns], [*lines, ["mean ± standard error", *means]])


def summary(rows: list[dict]) -> dict:
    """{column: (mean, standard error)} in points."""
    return {name: study.mean_and_error([100 * row[name] for row in rows]) for name in rows[0] if name != "seed"}


if __name__ == "__main__":
    main()
