r"""A student trained for int8 beside the same student quantised after training: AP, size and latency of the files.

    python benchmarks/int8.py --workdir=runs/int8 --seeds=3
    python benchmarks/int8.py --workdir=runs/int8_bccd --config=distill/coco_folder:mkd --data=DIR/bccd -- \
        --config.data.root=DIR/bccd "--config.data.image_size=(192,256)" --config.teacher.weights=DIR/teacher ...

For each seed the config is trained twice, in float and with `config.student.options.int8`; what follows `--` are flags
of both. The files of both are measured on the validation images of `--data`, and timed with one thread on the first
seed. Runs and files that are there already are not made again. Needs `kdjax[export]`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from kdjax.export import onnx

# Row of the table: the run that the file is of, and its dtype.
FILES = {
    "float32": ("float", "float32"),
    "int8, quantised after training": ("float", "int8"),
    "int8, trained": ("int8", "int8"),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--data", default="scenes", help="as for kdjax export")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=200, help="timed runs of a file")
    parser.add_argument("flags", nargs="*", help="of kdjax train, after --")
    args = parser.parse_args(arguments)
    scores: dict[str, list[float]] = {name: [] for name in FILES}
    for seed in range(args.seeds):
        for name in FILES:
            scores[name].append(average_precision(made(args, name, seed)))
    print(table(scores, times([made(args, name, 0) for name in FILES], args)))


def made(args: argparse.Namespace, name: str, seed: int) -> Path:
    """The file of a row and a seed; trained and exported unless it is there."""
    kind, dtype = FILES[name]
    run = args.workdir / f"{kind}_{seed}"
    file = args.workdir / f"{kind}_{dtype}_{seed}.onnx"
    if not (run / "results.json").exists():
        options = ["--config.student.options.int8=True"] if kind == "int8" else []
        kdjax("train", f"--config={args.config}", f"--config.seed={seed}", "--config.twin=False", *options, *args.flags,
              f"--workdir={run}")  # fmt: skip
    if not file.exists():
        kdjax("export", f"--model={run / 'student'}", "--format=onnx", f"--out={file}", f"--data={args.data}",
              f"--dtype={dtype}", "--max-ap-loss=100")  # fmt: skip
    return file


def average_precision(file: Path) -> float:
    """AP in points, which the export has measured."""
    facts = onnx.session(file).get_modelmeta().custom_metadata_map
    return float(facts[f"AP of this file, {facts['dtype']}"])


def times(files: list[Path], args: argparse.Namespace) -> list[tuple[float, float]]:
    """Size in bytes and median time in milliseconds of each file, with one thread."""
    out = args.workdir / "latency.json"
    models = [f"--model={file}" for file in files]
    kdjax("latency", *models, "--threads=1", f"--runs={args.runs}", f"--out={out}")
    rows = {row["model"]: row for row in json.loads(out.read_text())["rows"]}
    return [(rows[str(file)]["bytes"], rows[str(file)]["median"]) for file in files]


def table(scores: dict[str, list[float]], measured: list[tuple[float, float]]) -> str:
    """A Markdown table; AP is the mean over the seeds with their standard deviation, where there are several."""
    lines = ["| file | AP | size, MB | one image, ms |", "|---|---|---|---|"]
    for (name, values), (size, milliseconds) in zip(scores.items(), measured, strict=True):
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        lines.append(f"| {name} | {np.mean(values):.2f}{spread} | {size / 1e6:.2f} | {milliseconds:.2f} |")
    return "\n".join(lines)


def kdjax(*command: str) -> None:
    """Runs a command of kdjax, and stops with it if it fails."""
    print("kdjax", *command, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "kdjax", *command], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
