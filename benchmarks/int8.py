r"""A student trained for int8 beside the same student quantised after training: AP, size and latency of the files.

    python benchmarks/int8.py --workdir=runs/int8 --seeds=3
    python benchmarks/int8.py --workdir=runs/int8_bccd --config=distill/coco_folder:mkd --data=DIR/bccd -- \
        --config.data.root=DIR/bccd "--config.data.image_size=(192,256)" --config.teacher.weights=DIR/teacher ...

For each seed the config is trained twice, in float and with `config.student.options.int8`; what follows `--` are flags
of both. The files of both, for each format, are measured on the validation images of `--data`, and those of the first
seed are timed with one thread. Runs and files that are there already are not made again. Needs `kdjax[export]`, and
`kdjax[openvino]` and `kdjax[litert]` for their formats.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdjax.commands import latency

# Row of the table: the run that the file is of, and its dtype.
FILES = {
    "float32": ("float", "float32"),
    "int8, quantised after training": ("float", "int8"),
    "int8, trained": ("int8", "int8"),
}
FORMATS = {"onnx": ("onnxruntime", ".onnx"), "openvino": ("OpenVINO", ".xml"), "litert": ("LiteRT", ".tflite")}
Scores = dict[tuple[str, str], list[float]]  # (format, row) -> AP of each seed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--data", default="scenes", help="as for kdjax export")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--formats", default=",".join(FORMATS), help="A,B: of those files")
    parser.add_argument("--runs", type=int, default=200, help="timed runs of a file")
    parser.add_argument("flags", nargs="*", help="of kdjax train, after --")
    args = parser.parse_args(arguments)
    if unknown := set(args.formats.split(",")) - set(FORMATS):
        parser.error(f"--formats: {', '.join(sorted(unknown))}: they are {', '.join(FORMATS)}")
    rows = [(format, name) for format in args.formats.split(",") for name in FILES]
    scores: Scores = {row: [] for row in rows}
    for seed in range(args.seeds):
        for format, name in rows:
            scores[format, name].append(average_precision(made(args, format, name, seed)))
    print(table(scores, times({row: made(args, *row, 0) for row in rows}, args)))


def made(args: argparse.Namespace, format: str, name: str, seed: int) -> Path:
    """The file of a row and a seed; trained and exported unless it is there."""
    kind, dtype = FILES[name]
    run = args.workdir / f"{kind}_{seed}"
    file = args.workdir / f"{kind}_{dtype}_{seed}_{format}{FORMATS[format][1]}"
    if not (run / "results.json").exists():
        options = ["--config.student.options.int8=True"] if kind == "int8" else []
        kdjax("train", f"--config={args.config}", f"--config.seed={seed}", "--config.twin=False", *options, *args.flags,
              f"--workdir={run}")  # fmt: skip
    if not file.exists():
        kdjax("export", f"--model={run / 'student'}", f"--format={format}", f"--out={file}", f"--data={args.data}",
              f"--dtype={dtype}", "--max-ap-loss=100")  # fmt: skip
    return file


def average_precision(file: Path) -> float:
    """AP in points, which the export has measured."""
    facts = latency.exported_file(file)[3]
    [score] = [value for name, value in facts.items() if re.match(r"AP[ _]of[ _]this[ _]file", name)]
    return float(score)


def times(files: dict[tuple[str, str], Path], args: argparse.Namespace) -> dict[tuple[str, str], tuple[float, float]]:
    """Size in bytes and median time in milliseconds of each file, with one thread."""
    out = args.workdir / "latency.json"
    models = [f"--model={file}" for file in files.values()]
    kdjax("latency", *models, "--threads=1", f"--runs={args.runs}", f"--out={out}")
    rows = {row["model"]: row for row in json.loads(out.read_text())["rows"]}
    return {row: (rows[str(file)]["bytes"], rows[str(file)]["median"]) for row, file in files.items()}


def table(scores: Scores, measured: dict[tuple[str, str], tuple[float, float]]) -> str:
    """A Markdown table, and what training for int8 is worth in each runtime; means over seeds ± standard deviations."""
    lines = ["| runtime | file | AP | size, MB | one image, ms |", "|---|---|---|---|---|"]
    for (format, name), values in scores.items():
        size, milliseconds = measured[format, name]
        lines.append(f"| {FORMATS[format][0]} | {name} | {spread(values)} | {size / 1e6:.2f} | {milliseconds:.2f} |")
    lines += ["", "Points of AP that int8 loses to float32 of the same seed and runtime, mean over the seeds:", ""]
    lines += ["| runtime | quantised after training | trained |", "|---|---|---|"]
    for format in dict.fromkeys(format for format, _ in scores):
        plain, after, trained = (np.array(scores[format, name]) for name in FILES)
        lines.append(f"| {FORMATS[format][0]} | {spread(plain - after)} | {spread(plain - trained)} |")
    return "\n".join(lines)


def spread(values: Sequence[float] | np.ndarray) -> str:
    """The mean, with the standard deviation where there are several."""
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def kdjax(*command: str) -> None:
    """Runs a command of kdjax, and stops with it if it fails."""
    print("kdjax", *command, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "kdjax", *command], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
