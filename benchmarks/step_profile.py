"""Where does the time of a training step go? The most expensive operations, shares by class, and a roofline line.

    python benchmarks/step_profile.py --detector=rtmdet_tiny --batch=8 --size=320

Times are those of all threads together on the CPU, of all streams on a GPU, as XLA's own profiler takes them. The
roofline line compares the step's arithmetic (two operations per multiply-add of convolutions and norms: the student's
forward pass three times, because each gradient costs about as much, the teacher's once) with the largest matrix product
of the machine, timed in the same session. `--log FILE` appends the tables, with the versions, to a Markdown file.
"""

import argparse
import collections
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import step_time
from jax.profiler import ProfileData

from kdjax.evals import complexity
from kdjax.report import study
from kdjax.training import provenance, setup

DEAREST = 10
SIDE = 4096  # of the matrices
# Class of an operation by what it was in the source, then by what XLA calls it.
CLASSES = {
    "convolution, gradient": r"transpose\(.*conv_general_dilated",
    "convolution, forward": r"conv_general_dilated",
    "convolution, oneDNN": r"onednn\$convolution",
    "matrix product": r"dot_general|^dot",
    "sum or maximum": r"reduce",
    "copy or transposition": r"transpose|copy|concatenate|pad|slice|gather|scatter|iota|broadcast_in_dim",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = step_time.parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--log", type=Path)
    args = step_time.parse(parser, arguments)
    setup.prepare_process("")
    built = step_time.build(args)
    sources = operations(built.program.as_text())
    seconds, spent = profile(built, args.steps)
    dearest = [
        [name, *sources.get(name, ("", ""))[::-1], f"{ms:.1f}", f"{ms / sum(spent.values()):.1%}"]
        for name, ms in spent.most_common(DEAREST)
    ]
    shares = collections.Counter()
    for name, ms in spent.items():
        shares[class_of(name, sources)] += ms / sum(spent.values())
    study.publish(
        f"python benchmarks/step_profile.py --detector={args.detector} --batch={args.batch} --size={args.size} "
        f"--dtype={args.dtype}" + (f" --teacher={args.teacher} --method={args.method}" if args.method else ""),
        [
            study.table(["operation", "of", "result", "ms a step, all threads or streams", "share"], dearest),
            study.table(["class", "share"], [[name, f"{share:.1%}"] for name, share in shares.most_common()]),
            roofline(built, args, statistics.median(seconds)),
            study.facts(provenance.environment()),
        ],
        {"median_s": statistics.median(seconds), "shares": shares, "dearest": dict(spent.most_common(DEAREST))},
        args.log,
    )


def operations(text: str) -> dict[str, tuple[str, str]]:
    """Of a compiled program's text: operation -> (shape of its result, what it was in the source)."""
    found = {}
    for name, shape, rest in re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\([^=]*\)|\S+) (.*)$", text, re.MULTILINE):
        source = re.search(r'op_name="([^"]*)"', rest)
        found[name] = (re.sub(r"\{[^}]*\}", "", shape)[:40], source.group(1) if source else "")
    return found


def class_of(name: str, sources: dict) -> str:
    """A key of CLASSES, or "elementwise"."""
    for text in (sources.get(name, ("", ""))[1], name):
        for label, pattern in CLASSES.items():
            if re.search(pattern, text):
                return label
    return "elementwise"


def profile(built: step_time.Built, count: int) -> tuple[list[float], collections.Counter]:
    """Seconds of the steps without the profiler, and milliseconds a step by operation with it."""
    seconds, spent = [], collections.Counter()
    running = step_time.steps(built, 2 * count)
    for _ in range(count):
        seconds.append(next(running)[0])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(count):
                next(running)
        [file] = Path(folder).rglob("*.xplane.pb")
        for name, ms in times(ProfileData.from_file(str(file))).items():
            spent[name] = ms / count
    return seconds, spent


def times(trace: ProfileData) -> collections.Counter[str]:
    """Milliseconds by operation: on the streams of GPUs if the trace has any, else on all threads.

    Events of a stream are kernels and copies; where XLA does not say which operation they belong to, as in CUDA graphs,
    they have their own names. The host's rows of a GPU's trace also name operations, but only their launches.
    """
    spent: collections.Counter[str] = collections.Counter()
    planes = list(trace.planes)
    cards = [plane for plane in planes if (plane.name or "").startswith("/device:GPU:")]
    for plane in cards or planes:
        for line in plane.lines:
            if cards and not (line.name or "").startswith("Stream"):
                continue  # sums over a step or a module
            for event in line.events:
                name = dict(event.stats).get("hlo_op") or (event.name if cards else "")
                if name:
                    spent[str(name)] += event.duration_ns / 1e6
    return spent


def roofline(built: step_time.Built, args: argparse.Namespace, median: float) -> str:
    """Achieved operations a second beside those of the largest matrix product."""
    hw = (args.size, args.size)
    flops = 3 * complexity.flops(built.student, hw) + (complexity.flops(built.teacher, hw) if built.teacher else 0)
    achieved = args.batch * 2 * flops / median / 1e9
    matrix = jnp.ones((SIDE, SIDE), args.dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(matrix, matrix))
    least = []
    for _ in range(5):
        since = time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        least.append(time.perf_counter() - since)
    largest = 2 * SIDE**3 / min(least) / 1e9
    return (
        f"{step_time.title(args)}: {1000 * median:.0f} ms a step without the profiler, {achieved:.0f} GFLOP/s, "
        f"{achieved / largest:.0%} of the {largest:.0f} GFLOP/s of a {args.dtype} matrix product of {SIDE}x{SIDE}."
    )


if __name__ == "__main__":
    main()
