"""Which method helps? Trains methods over seeds beside one twin a seed, and prints the table of their gains.

    python benchmarks/compare_methods.py --methods=mkd,rtmdet_cwd --seeds=3 --workdir=runs/compare

The gain of a run is its student's AP minus that of the twin: the same student from the same start on the same batches
without a teacher. It does not depend on the method, to the bit, so it is trained once a seed, as a run of its own.
Names joined by "+" are trained together. What stands behind `--` goes to train.py for every run, twins included.
Only the end counts: there is no evaluation on the way.

Finished runs are kept, interrupted ones resumed: run it again to go on, also with more methods or seeds. A run that
fails is told in the table, and the others go on. The last lines are the table and one JSON object; `--log FILE` appends
both, with the versions, to a Markdown file.
"""

import argparse
import statistics
import sys
from pathlib import Path

import common

from kdjax.methods import api

FIGURES = ("AP", "AP50")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py", help="takes the methods' names as its argument")
    parser.add_argument("--methods", default=",".join(api.names()), help="names, separated by commas; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--log", type=Path)
    parser.add_argument("flags", nargs="*", help="flags of train.py")
    args = parser.parse_args()
    methods = args.methods.split(",")
    for name in "+".join(methods).split("+"):
        if name not in api.names():
            parser.error(f"there is no method {name!r}; the methods are: {', '.join(api.names())}")

    twins, students, teachers, failures, minutes = [], {method: {} for method in methods}, [], {}, 0.0
    for seed in range(args.first, args.first + args.seeds):
        folder = args.workdir.absolute() / f"seed{seed}"
        try:
            twins.append(common.train(twin_flags(args.config, args.flags, seed), folder / "twin")["student"])
        except common.Failed as error:
            sys.exit(f"the twin of seed {seed}, with which all are compared: {error}")
        minutes += common.minutes_of(folder / "twin")
        for method in methods:
            try:
                results = common.train(method_flags(args.config, method, args.flags, seed), folder / method)
            except common.Failed as error:
                failures.setdefault(method, {})[seed] = str(error)
                continue
            minutes += common.minutes_of(folder / method)
            teachers.append(results["teacher"]["AP"])
            students[method][seed] = results["student"]
            print(f"seed {seed}, {method}: gain {100 * (results['student']['AP'] - twins[-1]['AP']):+.2f}", flush=True)
    found = gains(students, dict(zip(range(args.first, args.first + args.seeds), twins, strict=True)))
    base = f"Twin: AP {common.with_error([100 * twin['AP'] for twin in twins])}"
    base += f"; teacher: AP {100 * statistics.mean(teachers):.2f}." if teachers else "."
    facts = common.facts_of(args.workdir / f"seed{args.first}" / "twin")
    command = (
        f"python benchmarks/compare_methods.py --config={args.config} --methods={args.methods} --seeds={args.seeds}"
    )
    common.publish(
        command
        + (f" --first={args.first}" if args.first else "")
        + "".join(f" {flag}" for flag in ["--", *args.flags]),
        [table(found, students, failures), base, f"{facts}; training minutes {minutes:.0f}"],
        {"twin": {k: [100 * twin[k] for twin in twins] for k in FIGURES}, "gains": found, "failed": failures},
        args.log,
    )


def twin_flags(config: str, flags: list[str], seed: int) -> list[str]:
    """A supervised run: the config without methods and without a teacher."""
    alone = ["--config.teacher.detector=", "--config.teacher.weights="]
    return [f"--config={config}:", *flags, *alone, *common_flags(seed)]


def method_flags(config: str, method: str, flags: list[str], seed: int) -> list[str]:
    return [f"--config={config}:{method}", *flags, *common_flags(seed)]


def common_flags(seed: int) -> list[str]:
    return ["--config.twin=False", "--config.eval.every=0", f"--config.seed={seed}"]


def gains(students: dict[str, dict[int, dict]], twins: dict[int, dict]) -> dict[str, dict[str, list[float]]]:
    """In points, by method and figure, one a seed; of the methods that have a finished run."""
    return {
        method: {
            figure: [round(100 * (run[figure] - twins[seed][figure]), 3) for seed, run in runs.items()]
            for figure in FIGURES
        }
        for method, runs in students.items()
        if runs
    }


def table(found: dict, students: dict, failures: dict[str, dict[int, str]]) -> str:
    """A line a method, the largest mean gain first, then those without any finished run."""
    rows = []
    for method in sorted(found, key=lambda name: -statistics.mean(found[name]["AP"])):
        values, of_50 = (found[method][figure] for figure in FIGURES)
        notes = [] if statistics.mean(values) > 0 else ["does not help here"]
        notes += [f"seed {seed} failed: {why}" for seed, why in failures.get(method, {}).items()]
        student = common.with_error([100 * run["AP"] for run in students[method].values()])
        spread = f"{min(values):+.2f} … {max(values):+.2f}"
        gain = common.with_error(values, "+")
        rows.append([method, gain, spread, common.with_error(of_50, "+"), student, str(len(values)), "; ".join(notes)])
    for method, sentences in failures.items():
        if method not in found:
            rows.append([method, "–", "–", "–", "–", "0", "; ".join(dict.fromkeys(sentences.values()))])
    header = ["method", "gain in AP ± standard error", "lowest … highest", "gain in AP50", "AP", "seeds", "note"]
    return common.table(header, rows)


if __name__ == "__main__":
    main()
