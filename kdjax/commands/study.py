"""Runs of train.py compared: variants over seeds, each beside its seed's twin, ending in one table and one image.

    python -m kdjax.commands.study methods --workdir=runs/study --methods=mkd,rtmdet_cwd,ssim --seeds=3
    python -m kdjax.commands.study components --workdir=runs/study
    python -m kdjax.commands.study weight --workdir=runs/study --weights=0.1,1,5
    python -m kdjax.commands.study teacher --workdir=runs/study --teachers=runs/a/student,runs/b/student
    python -m kdjax.commands.study sizes --workdir=runs/study --students=rtmdet_pico,rtmdet_nano

`methods` compares methods, with the config's teacher or with each of `--teachers`; the others are MKD's tables: its
components taken out one by one (table 4), its weight (table 5), the size of its teacher (table 3), and parameters,
FLOPs, latency and AP over sizes of the student (table 1).
`--config` (the quickstart, if not given) takes methods' names as its argument, or as the last of several, as in
`--config=configs/distill/mkd_rtmdet.py:tiny,s`. What stands behind `--` goes to train.py for every run.

The gain of a run is its student's AP minus that of the twin: the same student from the same start on the same batches
without a teacher. It does not depend on method or teacher, to the bit, so it is trained once a seed, as a run of its
own, and studies in the same folder share it. Only the end counts: there is no evaluation on the way.

Finished runs are kept, interrupted ones resumed: run it again to go on, also with more variants or seeds. A run that
fails is told in the table, and the others go on. The last lines are the table and one JSON object; `--log FILE` appends
both, with the versions, to a Markdown file. The image is WORKDIR/NAME.png.

It starts the train.py of the checkout that kdjax is installed from.
"""

import argparse
import json
import math
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from kdjax import detectors, weights
from kdjax import methods as zoo

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("AP", "AP50")
MKD_PARTS = ("feature", "multiscale", "frequency", "alignment")


class Variant(NamedTuple):
    """One line of a study."""

    name: str
    methods: str  # argument of the config
    flags: tuple[str, ...] = ()
    student: tuple[str, ...] = ()  # flags of the twin too; variants with the same ones share it


class Failed(Exception):
    """A run of train.py that ended with an error; the message is its last sentence."""


def main(arguments: Sequence[str] | None = None):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kdjax.commands.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(STUDIES))
    parser.add_argument("--config", default="configs/quickstart.py", help="its (last) argument is the methods' names")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--methods", type=words, default=zoo.names(), help="of the study `methods`; all by default")
    parser.add_argument("--weights", type=words, default=["0.1", "1", "5"], help="of the study `weight`")
    parser.add_argument("--teachers", type=words, default=[], help="student/ folders")
    parser.add_argument("--students", type=words, default=["rtmdet_pico", "rtmdet_nano"], help="of the study `sizes`")
    parser.add_argument("--log", type=Path, help="a Markdown file that gets the results")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:end])
    args.flags = arguments[end + 1 :]  # of train.py
    if not (ROOT / "train.py").is_file():
        parser.error(f"there is no train.py beside {ROOT / 'kdjax'}: install kdjax from a checkout (make setup)")
    try:
        variants = STUDIES[args.name](args)
    except ValueError as error:
        parser.error(str(error))
    study(args, variants)


def words(text: str) -> list[str]:
    """ "a,b" -> ["a", "b"]."""
    return [word for word in text.split(",") if word]


# ------------------------------------------------------------------------------------------------------- the studies


def of_methods(args) -> list[Variant]:
    """Methods, or several together joined by "+", with each teacher."""
    for name in "+".join(args.methods).split("+"):
        zoo.options(name)
    return [
        Variant(f"{name}, {told}" if told else name, name, flags)
        for told, flags in teachers(args.teachers)
        for name in args.methods
    ]


def of_components(args) -> list[Variant]:
    """MKD whole, and without each of its parts."""
    without = [
        Variant(f"mkd without {part}", "mkd", (f"--config.methods.mkd.{part}_weight=0.0",)) for part in MKD_PARTS
    ]
    return [Variant("mkd", "mkd"), *without]


def of_weight(args) -> list[Variant]:
    """MKD with several weights; the default's runs are those of plain MKD, which other studies have too."""
    plain = zoo.options("mkd")["weight"]
    flags = {w: () if float(w) == plain else (f"--config.methods.mkd.weight={float(w)}",) for w in args.weights}
    return [Variant(f"mkd, weight {w}", "mkd", flags[w]) for w in args.weights]


def of_teacher(args) -> list[Variant]:
    """MKD with several teachers."""
    if not args.teachers:
        raise ValueError("name the teachers: --teachers=runs/a/student,runs/b/student")
    return [Variant(told, "mkd", flags) for told, flags in teachers(args.teachers)]


def teachers(folders: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """What a table calls each teacher, and the flags that choose it; the config's own, without a name, if none."""
    chosen = []
    for folder in folders:
        path = Path(folder).absolute()
        if not (path / "config.json").is_file():
            raise ValueError(f"{folder} is no student/ folder of a run (--teachers)")
        detector = json.loads((path / "config.json").read_text())["detector"]
        flags = ("--config.teacher.detector=", f"--config.teacher.weights={path}")
        chosen.append((f"{detector} ({folder})", flags))
    return chosen or [("", ())]


def of_sizes(args) -> list[Variant]:
    """MKD on students of several sizes, each with a twin of its own."""
    for name in args.students:
        detectors.build(name, 1)
    return [Variant(name, "mkd", (), (f"--config.student.detector={name}",)) for name in args.students]


STUDIES = {
    "methods": of_methods,
    "components": of_components,
    "weight": of_weight,
    "teacher": of_teacher,
    "sizes": of_sizes,
}


# --------------------------------------------------------------------------------------------------- from runs to table


def study(args, variants: list[Variant]) -> None:
    """Trains what is missing, then prints table and summary and draws the image."""
    workdir, seeds = args.workdir.absolute(), range(args.first, args.first + args.seeds)
    twins, students, failures, folders = {}, {variant.name: {} for variant in variants}, {}, {}
    for seed in seeds:
        for variant in variants:
            alone = (*args.flags, *variant.student)
            of_twin = workdir / f"seed{seed}" / label("twin", *variant.student)
            if (seed, variant.student) not in twins:
                try:
                    twins[seed, variant.student] = train(twin_flags(args.config, alone, seed), of_twin)["student"]
                except Failed as error:
                    sys.exit(f"the twin of seed {seed}, with which all are compared: {error}")
                folders.setdefault("twin", of_twin)
            folder = workdir / f"seed{seed}" / label(variant.methods, *variant.flags, *variant.student)
            try:
                results = train(run_flags(args.config, variant.methods, (*alone, *variant.flags), seed), folder)
            except Failed as error:
                failures.setdefault(variant.name, {})[seed] = str(error)
                continue
            folders.setdefault(variant.name, folder)
            twin = twins[seed, variant.student]
            students[variant.name][seed] = {"student": results["student"], "teacher": results["teacher"], "twin": twin}
            print(f"seed {seed}, {variant.name}: gain {gain(students[variant.name][seed], 'AP'):+.2f}", flush=True)
    rows = [summarize(name, runs, failures.get(name, {})) for name, runs in students.items()]
    if args.name == "sizes":
        for row in rows:
            if row["seeds"]:
                row["latency_ms"] = latency(folders[row["name"]] / "student")
    if args.name in ("methods", "teacher"):
        rows.sort(key=lambda row: -row.get("gain AP", [-math.inf])[0])
    draw(rows, args.name).savefig(workdir / f"{args.name}.png")
    print(f"image: {workdir / args.name}.png")
    command = f"python -m kdjax.commands.study {args.name} --config={args.config} --seeds={args.seeds}"
    command += f" --first={args.first}" if args.first else ""
    for option, name in (("methods", "methods"), ("weights", "weight"), ("students", "sizes")):
        command += f" --{option}={','.join(getattr(args, option))}" if args.name == name else ""
    command += f" --teachers={','.join(args.teachers)}" if args.teachers else ""
    publish(
        command + "".join(f" {flag}" for flag in ["--", *args.flags] if args.flags),
        [study_table(rows), str(facts_of(folders["twin"]))],
        {"study": args.name, "rows": rows},
        args.log,
    )


def label(name: str, *flags: str) -> str:
    """The folder of a run: the name and what its flags set."""
    return "_".join([name, *(re.sub(r"[^\w.=-]", "-", flag.removeprefix("--config.")) for flag in flags)])


def twin_flags(config: str, flags: Sequence[str], seed: int) -> list[str]:
    """A supervised run: the config without methods and without a teacher."""
    none = (f"--config.teacher.{key}=" for key in ("detector", "options", "weights"))
    return run_flags(config, "", (*flags, *none), seed)


def run_flags(config: str, methods: str, flags: Sequence[str], seed: int) -> list[str]:
    """A run with methods and without a twin of its own."""
    common = ["--config.twin=False", "--config.eval.every=0", f"--config.seed={seed}"]
    return [f"--config={config}{',' if ':' in config else ':'}{methods}", *flags, *common]


def gain(run: dict, figure: str) -> float:
    """In points."""
    return round(100 * (run["student"][figure] - run["twin"][figure]), 3)


def summarize(name: str, runs: dict[int, dict], failures: dict[int, str]) -> dict:
    """A row of the table: means with their standard errors in points, over the seeds that are finished."""
    row = {"name": name, "seeds": sorted(runs), "failed": failures}
    if runs:
        for figure in METRICS:
            row[f"gains {figure}"] = [gain(run, figure) for run in runs.values()]
            row[f"gain {figure}"] = mean_and_error(row[f"gains {figure}"])
        for model in ("teacher", "twin", "student"):
            row[model] = mean_and_error([100 * run[model]["AP"] for run in runs.values()])
        row["params"], row["flops"] = (next(iter(runs.values()))["student"][key] for key in ("params", "flops"))
    return row


def study_table(rows: list[dict]) -> str:
    """A line a variant."""
    header = ["", "gain in AP ± standard error", "by seed", "gain in AP50", "AP", "twin", "teacher", "seeds"]
    sizes = any("latency_ms" in row for row in rows)
    header += ["parameters", "MFLOPs", "latency in ms"] if sizes else []
    lines = []
    for row in rows:
        if row["seeds"]:
            gains, of_50 = row["gains AP"], row["gains AP50"]
            notes = [] if row["gain AP"][0] > 0 else ["does not help here"]
            cells = [
                with_error(gains, "+"),
                ", ".join(f"{value:+.2f}" for value in gains),
                with_error(of_50, "+"),
            ]
            cells += [shown(row["student"]), shown(row["twin"]), f"{row['teacher'][0]:.2f}", str(len(gains))]
            if sizes:
                cells += [str(row["params"]), f"{row['flops'] / 1e6:.1f}", f"{row['latency_ms']:.1f}"]
        else:
            notes, cells = [], ["–"] * 6 + ["0"] + ["–"] * (3 * sizes)
        reasons = {}
        for seed, why in row["failed"].items():
            reasons.setdefault(why, []).append(str(seed))
        notes += [f"seed {', '.join(seeds)} failed: {why}" for why, seeds in reasons.items()]
        lines.append([row["name"], *cells, "; ".join(notes)])
    return table([*header, "note"], lines)


def draw(rows: list[dict], title: str) -> Figure:
    """Mean gains with their standard errors as bars, every seed as a dot."""
    rows = [row for row in rows if row["seeds"]][::-1]
    figure = Figure((8, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for at, row in enumerate(rows):
        mean, error = row["gain AP"]
        axes.barh(at, mean, color="tab:green" if mean > 0 else "tab:red", alpha=0.5, xerr=error, capsize=3)
        axes.plot(row["gains AP"], [at] * len(row["gains AP"]), "k.", markersize=4)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="gain over the twin, AP points (bar: mean and standard error; dots: seeds)", title=title)
    axes.grid(axis="x", alpha=0.3)
    return figure


def latency(folder: Path, repeats: int = 50) -> float:
    """Median milliseconds from image to boxes under XLA: first device, batch 1, the size it was trained at."""
    detector, params, stats, _ = weights.load(folder, None)
    height, width = json.loads((folder / "config.json").read_text())["image_size"]
    image, hw = jnp.zeros((1, height, width, 3), jnp.uint8), jnp.array([[height, width]])

    @jax.jit
    def predict(params, stats, image, hw):
        return detector.decode(detector.apply(params, stats, detector.preprocess(image), train=False)[0], hw)

    times = []
    for _ in range(10 + repeats):
        before = time.perf_counter()
        jax.block_until_ready(predict(params, stats, image, hw))
        times.append(time.perf_counter() - before)
    return round(1000 * statistics.median(times[10:]), 3)


# ------------------------------------------------------------------------------- runs of train.py, tables, the log


def train(flags: list[str], workdir: Path) -> dict:
    """The results of a run: of a finished one as they are; otherwise it is trained, from its last checkpoint on.

    Raises:
      Failed: train.py refused or broke off.
      SystemExit: the run was stopped, and so is the benchmark; or the folder holds a run with other flags.
    """
    results = workdir / "results.json"
    if not results.exists():
        run([sys.executable, "train.py", *flags, f"--workdir={workdir}"])
    elif flags_of(workdir) != flags:
        raise SystemExit(
            f"{workdir} holds a run with other flags ({' '.join(flags_of(workdir))}): choose another folder"
        )
    return json.loads(results.read_text())


def run(command: list[str]) -> None:
    """Runs train.py, shows what it writes to stderr, and hands on a stop in both directions."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    written = b""
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        try:
            while chunk := process.stderr.read1(65536):
                sys.stderr.buffer.write(chunk)
                sys.stderr.flush()
                written = (written + chunk)[-65536:]
            code = process.wait()
        except BaseException:
            process.terminate()  # it saves its state
            process.communicate()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if code in (143, -signal.SIGTERM, -signal.SIGINT):
        print("stopped; the same command goes on from there", file=sys.stderr)
        sys.exit(143)
    if code:
        raise Failed(f"killed by signal {-code}" if code < 0 else last_sentence(written.decode(errors="replace")))


def last_sentence(text: str) -> str:
    """What train.py said when it gave up: its own line, or else the last one."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    own = [line.removeprefix("train.py: ") for line in lines if line.startswith("train.py: ")]
    return (own or lines or ["no message"])[-1]


def flags_of(workdir: Path) -> list[str]:
    """The flags that a run was started with, without its folder."""
    command = json.loads((workdir / "config.json").read_text())["runs"][0]["command"]
    return [flag for flag in command if not flag.startswith("--workdir=")]


def facts_of(workdir: Path) -> dict:
    """Versions, commit and devices of a run."""
    return facts(json.loads((workdir / "config.json").read_text())["runs"][0])


def facts(environment: dict) -> dict:
    """What of an environment a table quotes."""
    return {name: environment[name] for name in ("commit", "python", "jax", "flax", "devices")}


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """The mean and its standard error; one value alone has none."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return round(statistics.mean(values), 3), None if error is None else round(error, 3)


def with_error(values: list[float], sign: str = "") -> str:
    """ "1.20 ± 0.15"."""
    return shown(mean_and_error(values), sign)


def shown(mean_and_error: tuple[float, float | None], sign: str = "") -> str:
    """The same of what `mean_and_error` returns."""
    mean, error = mean_and_error
    return f"{mean:{sign}.2f}" + ("" if error is None else f" ± {error:.2f}")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def publish(command: str, parts: list[str], summary: dict, log: Path | None) -> None:
    """Prints the parts and one line of JSON, and appends both under the command to the log, if there is one."""
    parts = [*parts[:-1], f"{time.strftime('%Y-%m-%d')}; {parts[-1]}"]
    print("\n" + "\n\n".join(parts))
    print(json.dumps(summary))
    if log:
        with log.open("a") as file:
            file.write("\n" + "\n\n".join([f"`{command}`", *parts, f"    {json.dumps(summary)}"]) + "\n")


if __name__ == "__main__":
    main()
