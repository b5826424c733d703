"""What does a method cost? The time of its step relative to a step without it, and the memory of its step.

    python benchmarks/method_cost.py --student=rtmdet_micro --teacher=rtmdet_tiny --size=320 --batch=8

Three programs are measured in turn, so that other load on the machine affects all of them:

- the twin's step: the same student's update without teacher and method;
- the teacher's forward pass alone, up to the taps that the method reads. The step contains no more of it either,
  because the compiler removes unused outputs. So the relative cost is that of the terms alone (adapters, losses and
  their gradients), for methods on the neck as well as for those on the predictions;
- the distillation step.

Relative cost: the time of the third divided by that of the first two together, the median over the rounds with the
quartiles. It can lie below 1: in one program parts of the teacher's pass and the student's run side by side.

Memory is the compiler's estimate for the distillation step: its temporaries, arguments (batch, weights and optimiser
state of the student, weights of the teacher) and results; buffers that results share with arguments count once. It is
not measured while the program runs.

Images, boxes and weights are random: the time does not depend on them. Compiled programs are kept on disk as train.py
keeps them. The last lines are a table and one JSON object; `--log FILE` appends both, with the versions, to a Markdown
file.
"""

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax import detectors
from kdjax import methods as zoo
from kdjax.distill import Distiller
from kdjax.report import study
from kdjax.training import config as settings
from kdjax.training import optim, provenance, setup
from kdjax.training.step import TeacherVariables, init_state, make_step

BOXES = 16  # padded boxes an image
WARM = 2  # rounds that are not counted


def pair_parser(about: str | None) -> argparse.ArgumentParser:
    """The arguments that say which student, teacher and batch."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="rtmdet_micro")
    parser.add_argument("--teacher", default="rtmdet_tiny")
    parser.add_argument("--size", type=int, default=320, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--classes", type=int, default=80)
    return parser


def main() -> None:
    parser = pair_parser(__doc__)
    parser.add_argument("--methods", default=",".join(zoo.names()), help="names, separated by commas; all by default")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--log", type=Path)
    args = parser.parse_args()
    names = args.methods.split(",")
    for name in names:
        if name not in zoo.names():
            parser.error(f"there is no method {name!r}; the methods are: {', '.join(zoo.names())}")
    setup.prepare_process("")
    bench = Bench(args)
    refused = {
        name: why for name in names if (why := zoo.refusal(name, bench.student, bench.teacher, bench.image_size))
    }
    rows = []
    for name in (name for name in names if name not in refused):
        rows.append(bench.measure(name))
        print(f"{name}: {rows[-1]['relative']:.3f}", flush=True)
        jax.clear_caches()
        gc.collect()
    notes = [f"Not on these detectors: {name} ({why})" for name, why in refused.items()]
    twin = f"memory of the twin's step {bench.twin_memory:.0f} MB, {args.rounds} rounds, {args.classes} classes"
    study.publish(
        f"python benchmarks/method_cost.py --student={args.student} --teacher={args.teacher} --size={args.size} "
        f"--batch={args.batch}",
        [table(rows), *notes, f"{study.facts(provenance.environment())}; {twin}"],
        {"rows": rows, "refused": refused},
        args.log,
    )


class Bench:
    """What all methods share: detectors, a batch, the teacher, the twin's program."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.rounds = args.rounds
        self.student, self.teacher = (detectors.build(name, args.classes) for name in (args.student, args.teacher))
        self.key, self.image_size = jax.random.PRNGKey(0), (args.size, args.size)
        self.batch = jax.tree.map(
            jax.numpy.asarray, made_up_batch(args.batch, args.size, args.classes, masks=bool(self.student.masks))
        )
        self.variables = TeacherVariables(*self.teacher.init(jax.random.PRNGKey(1)))
        config = settings.base()
        config.batch_size, config.steps = args.batch, 100_000
        self.ema_rate = functools.partial(optim.ema_rate, config)
        self.optimizer = optim.optimizer(config, lambda params: jax.tree.map(lambda leaf: leaf.ndim <= 1, params))
        self.twin = init_state(self.student, self.key, None, {}, self.optimizer)
        step = make_step(self.student, self.optimizer, self.ema_rate)
        self.twin_step = compiled(step, self.twin, None, self.batch, donate=True)
        self.twin_memory = megabytes(self.twin_step)
        self.forwards = {}  # taps that are read -> program

    def measure(self, name: str) -> dict:
        """Time and memory of one method; its program is freed on return."""
        distiller = Distiller(self.student, self.teacher, [zoo.build(name)])
        state = init_state(self.student, self.key, None, distiller.init(self.key, self.image_size), self.optimizer)
        forward = self.forward(distiller)
        step = make_step(self.student, self.optimizer, self.ema_rate, distiller=distiller)
        step = compiled(step, state, self.variables, self.batch, donate=True)
        rounds = []
        for _ in range(WARM + self.rounds):
            twin, (self.twin, _) = timed(self.twin_step, self.twin, None, self.batch)
            teacher, _ = timed(forward, self.variables, self.batch)
            distil, (state, _) = timed(step, state, self.variables, self.batch)
            rounds.append((distil, twin, teacher))
        return summarize(name, rounds[WARM:], megabytes(step))

    def forward(self, distiller: Distiller) -> jax.stages.Compiled:
        """The teacher's forward pass to the taps that are read; compiled once for each choice of them."""
        read = distiller.teacher_reads
        if read not in self.forwards:
            observe = jax.jit(lambda variables, batch: distiller.observe(batch, tuple(variables)))
            self.forwards[read] = observe.lower(self.variables, self.batch).compile()
        return self.forwards[read]


def made_up_batch(batch: int, size: int, classes: int, boxes: int = BOXES, *, masks: bool = False) -> dict:
    """Random images with random boxes, a quarter of the rows padding, as the loader gives them; masks are ellipses."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 0.7 * size, (batch, boxes, 2))
    corners = np.concatenate([corner, corner + rng.uniform(0.05 * size, 0.3 * size, corner.shape)], -1)
    valid = np.tile(np.arange(boxes) < 3 * boxes // 4, (batch, 1))
    made = {
        "image": rng.integers(0, 256, (batch, size, size, 3), np.uint8),
        "boxes": np.where(valid[..., None], corners, 0).astype(np.float32),
        "labels": np.where(valid, rng.integers(0, classes, valid.shape), 0).astype(np.int32),
        "valid": valid,
        "image_size": np.full((batch, 2), size, np.int32),
    }
    if masks:
        cells = 4 * np.arange(size // 4) + 2  # their middles
        x0, y0, x1, y1 = np.moveaxis(corners, -1, 0)[..., None]
        across, down = 2 * (cells - x0) / (x1 - x0) - 1, 2 * (cells - y0) / (y1 - y0) - 1
        inside = (down[..., :, None] ** 2 + across[..., None, :] ** 2 <= 1) & valid[..., None, None]
        made["masks"] = np.where(inside, 255, 0).astype(np.uint8)
    return made


def compiled(function: Callable[..., Any], *args: Any, donate: bool = False) -> jax.stages.Compiled:
    """The program, which may overwrite its first argument if `donate`."""
    return jax.jit(function, donate_argnums=(0,) if donate else ()).lower(*args).compile()


def timed(program: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Seconds until the results are there, and the results."""
    since = time.perf_counter()
    results = jax.block_until_ready(program(*args))
    return time.perf_counter() - since, results


def megabytes(program: jax.stages.Compiled) -> float:
    """What the compiler has planned: temporaries, arguments and results, shared places once."""
    plan = program.memory_analysis()
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return (plan.temp_size_in_bytes + held) / 1e6


def summarize(name: str, rounds: list[tuple[float, float, float]], memory: float) -> dict:
    """Medians of rounds (distillation step, twin step, teacher; in seconds), in milliseconds."""
    relative = [distil / (twin + teacher) for distil, twin, teacher in rounds]
    low, middle, high = statistics.quantiles(relative, n=4) if len(relative) > 1 else relative * 3
    step, twin, teacher = (round(1000 * statistics.median(column), 2) for column in zip(*rounds, strict=True))
    found = {"relative": middle, "low": low, "high": high}
    found = {key: round(value, 4) for key, value in found.items()}
    return (
        {"method": name}
        | found
        | {"step_ms": step, "twin_ms": twin, "teacher_ms": teacher, "memory_mb": round(memory, 1)}
    )


def table(rows: list[dict]) -> str:
    """The most expensive method first."""
    lines = [
        [
            row["method"],
            f"{row['relative']:.3f}",
            f"{row['low']:.3f} … {row['high']:.3f}",
            *(f"{row[key]:.1f}" for key in ("step_ms", "twin_ms", "teacher_ms")),
            f"{row['memory_mb']:.0f}",
        ]
        for row in sorted(rows, key=lambda row: -row["relative"])
    ]
    header = ["method", "relative", "quartiles", "step ms", "twin ms", "teacher ms", "memory MB"]
    return study.table(header, lines)


if __name__ == "__main__":
    main()
