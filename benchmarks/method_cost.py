"""What does a method cost? The time of its step relative to a step without it, and the memory of its step.

    python benchmarks/method_cost.py --student=rtmdet_nano --teacher=rtmdet_tiny --size=320 --batch=8

Measured are three programs, in turn, so that a machine that changes its pace changes it for all of them:

- the twin's step: the same student's update without teacher and method;
- the teacher's forward pass alone, to those of its taps that the method reads and no further. The step itself contains
  no more of it, because the compiler removes what nobody reads, so in the quotient the teacher cancels for a method on
  the neck as well as for one on the predictions, and only the terms remain: adapters, losses and their gradients;
- the distillation step.

Relative cost: the time of the third by that of the first two together, the median over the rounds with the quartiles.
It can lie below 1: in one program parts of the teacher's pass and the student's run side by side.

Memory is what the compiler has planned for the distillation step: its temporaries, arguments (batch, weights and
optimiser state of the student, weights of the teacher) and results, those in the arguments' place counted once. It is
not measured while the program runs.

Images, boxes and weights are random: the time does not depend on them. Compiled programs are kept on disk as train.py
keeps them. The last lines are a table and one JSON object; `--log FILE` appends both, with the versions, to a Markdown
file.
"""

import argparse
import dataclasses
import functools
import gc
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from kdjax import detectors
from kdjax.commands import study
from kdjax.methods import api
from kdjax.train import config as settings
from kdjax.train import optim, provenance, setup
from kdjax.train.step import Teacher, compare, init_adapters, init_state, make_step, targets_of

BOXES = 16  # padded boxes an image
WARM = 2  # rounds that are not counted


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="rtmdet_nano")
    parser.add_argument("--teacher", default="rtmdet_tiny")
    parser.add_argument("--size", type=int, default=320, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--methods", default=",".join(api.names()), help="names, separated by commas; all by default")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--log", type=Path)
    args = parser.parse_args()
    names = args.methods.split(",")
    for name in names:
        if name not in api.names():
            parser.error(f"there is no method {name!r}; the methods are: {', '.join(api.names())}")
    setup.prepare_process("")
    bench = Bench(args)
    refused = {name: why for name in names if (why := api.refusal(name, *bench.specs))}
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

    def __init__(self, args):
        self.rounds = args.rounds
        self.student, self.teacher = (detectors.build(name, args.classes) for name in (args.student, args.teacher))
        self.specs = [setup.output_spec(detector, (args.size, args.size)) for detector in (self.student, self.teacher)]
        self.key = jax.random.PRNGKey(0)
        self.batch = jax.tree.map(jax.numpy.asarray, made_up_batch(args.batch, args.size, args.classes))
        self.variables = Teacher(*self.teacher.init(jax.random.PRNGKey(1)))
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
        methods = {name: api.build(name)}
        adapters = init_adapters(methods, self.key, *self.specs)
        state = init_state(self.student, self.key, None, adapters, self.optimizer)
        forward = self.forward(tuple(self.leaves_read(methods, state)))
        step = make_step(self.student, self.optimizer, self.ema_rate, teacher=self.teacher, methods=methods)
        step = compiled(step, state, self.variables, self.batch, donate=True)
        rounds = []
        for _ in range(WARM + self.rounds):
            twin, (self.twin, _) = timed(self.twin_step, self.twin, None, self.batch)
            teacher, _ = timed(forward, self.variables, self.batch["image"])
            distil, (state, _) = timed(step, state, self.variables, self.batch)
            rounds.append((distil, twin, teacher))
        return summarize(name, rounds[WARM:], megabytes(step))

    def leaves_read(self, methods: dict, state) -> list[bool]:
        """Which leaves of the teacher's output the terms depend on."""
        spec = jax.eval_shape(self.look, self.variables, self.batch["image"])

        def terms(seen, state, variables, batch):
            teacher = dataclasses.replace(self.teacher, apply=lambda *args, train: (seen, None))
            student, images = self.student, self.student.preprocess(batch["image"])
            output, _ = student.apply(state.params["student"], state.stats, images, train=True)
            _, assignment = student.loss(output, targets_of(batch))
            adapters, key = state.params["adapters"], state.key
            return compare(student, teacher, methods, adapters, variables, output, assignment, batch, state.step, key)

        return reads(terms, spec, state, self.variables, self.batch)

    def look(self, variables, images):
        return self.teacher.apply(*variables, self.teacher.preprocess(images), train=False)[0]

    def forward(self, read: tuple[bool, ...]):
        """The teacher's forward pass to the leaves that are read; compiled once for each choice of them."""
        if read not in self.forwards:

            def forward(variables, images):
                leaves = jax.tree.leaves(self.look(variables, images))
                return [leaf for leaf, needed in zip(leaves, read, strict=True) if needed]

            self.forwards[read] = compiled(forward, self.variables, self.batch["image"])
        return self.forwards[read]


def made_up_batch(batch: int, size: int, classes: int, boxes: int = BOXES) -> dict:
    """Random images with random boxes, a quarter of the rows padding, as the loader gives them."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 0.7 * size, (batch, boxes, 2))
    corners = np.concatenate([corner, corner + rng.uniform(0.05 * size, 0.3 * size, corner.shape)], -1)
    valid = np.tile(np.arange(boxes) < 3 * boxes // 4, (batch, 1))
    return {
        "image": rng.integers(0, 256, (batch, size, size, 3), np.uint8),
        "boxes": np.where(valid[..., None], corners, 0).astype(np.float32),
        "labels": np.where(valid, rng.integers(0, classes, valid.shape), 0).astype(np.int32),
        "valid": valid,
        "image_size": np.full((batch, 2), size, np.int32),
    }


def reads(function, first, *rest) -> list[bool]:
    """Which leaves of its first argument the results of a function depend on; all are shapes or arrays."""
    jaxpr = jax.make_jaxpr(function)(first, *rest).jaxpr
    needed = {id(v) for v in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if any(id(v) in needed for v in equation.outvars):
            needed |= {id(v) for v in equation.invars}
    return [id(v) in needed for v in jaxpr.invars[: len(jax.tree.leaves(first))]]


def compiled(function, *args, donate: bool = False):
    """The program, which may overwrite its first argument if `donate`."""
    return jax.jit(function, donate_argnums=(0,) if donate else ()).lower(*args).compile()


def timed(program, *args):
    """Seconds until the results are there, and the results."""
    since = time.perf_counter()
    results = jax.block_until_ready(program(*args))
    return time.perf_counter() - since, results


def megabytes(program) -> float:
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
