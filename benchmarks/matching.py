"""How long does the matching of queries with objects take, for all layers of a decoder and all images at once?

    python benchmarks/matching.py --queries=300 --objects=100 --outputs=7 --batch=8
    python benchmarks/matching.py --detector=rtdetr_r18 --size=640 --batch=2

Boxes lie at random, and the queries, as in training, around the objects: `noise` is how far from them, in shares of
the image. It prints the time of the costs and of the matching, of optax's solver with the same padding, and of scipy
without padding, which must find the same sums. With a detector it prints instead what part of its training step is
`assign`, with so many objects in every image: the costs, the matching and the drawing of the denoising queries.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import step_time
from scipy.optimize import linear_sum_assignment

from kdjax.boxes import matching
from kdjax.report import study
from kdjax.structs import Array, targets_of
from kdjax.training import provenance


def inputs(args: argparse.Namespace, live: float, noise: float) -> tuple[np.ndarray, ...]:
    """Logits, boxes and objects of every output, f32[S, B, ...], and which objects there are."""
    rng = np.random.default_rng(0)
    batch, objects = args.batch, args.objects
    truth = np.concatenate([rng.uniform(0, 1, (batch, objects, 2)), rng.uniform(0.03, 0.3, (batch, objects, 2))], -1)
    labels = rng.integers(0, args.classes, (batch, objects))
    valid = np.broadcast_to(np.arange(objects) < live * objects, (batch, objects))
    near = rng.integers(0, max(int(live * objects), 1), (args.outputs, batch, args.queries))
    boxes = np.take_along_axis(truth[None], near[..., None], 2)
    boxes = np.clip(boxes + rng.normal(0, noise, boxes.shape), 0.01, 1)
    logits = rng.normal(-4, 1, (args.outputs, batch, args.queries, args.classes))
    return logits.astype(np.float32), boxes.astype(np.float32), labels, truth.astype(np.float32), valid


def costs(logits: Array, boxes: Array, labels: Array, truth: Array) -> Array:
    """f32[S, B, Q, M]."""
    return jax.vmap(matching.matching_cost, (0, 0, None, None))(logits, boxes, labels, truth)


def by_optax(cost: Array, valid: Array) -> Array:
    """The sum of optax's solution, with constant costs for padding."""
    cost = jnp.where(valid[..., None, :], cost, 0.0).reshape(-1, *cost.shape[2:])
    return jax.vmap(lambda cost: jnp.sum(cost[optax.assignment.hungarian_algorithm(cost)]))(cost)


def timed(function: Callable[[], object], repeats: int) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def share(args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of `assign`, and of a whole training step."""
    boxes = -(-4 * args.objects // 3)  # a quarter of them is padding
    of_step = {"teacher": "", "method": "", "dtype": "float32", "boxes": boxes}
    built = step_time.build(argparse.Namespace(**vars(args) | of_step))
    student, state, batch, key = built.student, built.state, built.batch, jax.random.key(0)
    apply = jax.jit(functools.partial(student.apply, train=True))
    output, _ = apply(state.params["student"], state.stats, student.preprocess(batch["image"]))
    assign, targets = jax.jit(student.assign), targets_of(batch)
    jax.block_until_ready(assign(output, targets, key))
    assigning = timed(lambda: assign(output, targets, key), args.repeats)
    return assigning, statistics.median(seconds for seconds, _ in step_time.steps(built, args.repeats))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = {"queries": 300, "objects": 100, "outputs": 7, "batch": 8, "classes": 80, "repeats": 5}
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--detector", default="", help="a transformer; its queries and layers are its own")
    parser.add_argument("--size", type=int, default=640, help="side of its images in pixels")
    parser.add_argument("--log", type=Path)
    args = parser.parse_args(arguments)
    command = " ".join(["python benchmarks/matching.py", *(arguments or sys.argv[1:])])
    if args.detector:
        seconds = share(args)
        cells = [args.detector, *(f"{1000 * value:.1f}" for value in seconds), f"{100 * seconds[0] / seconds[1]:.2f}"]
        table = study.table(["", "assign ms", "step ms", "percent"], [cells])
        study.publish(command, [table, study.facts(provenance.environment())], {"seconds": seconds}, args.log)
        return

    rows, found = [], {}
    programs = [jax.jit(function) for function in (costs, matching.hungarian, by_optax)]
    for live in (1.0, 0.1):
        for noise in (0.3, 0.05, 0.01):
            *given, valid = inputs(args, live, noise)
            cost = programs[0](*given)
            valid = np.broadcast_to(valid, (len(cost), *valid.shape))
            queries = np.asarray(programs[1](cost, valid)).reshape(-1, args.objects)
            jax.block_until_ready(programs[2](cost, valid))
            calls = [lambda given=given: programs[0](*given)]
            calls += [lambda p=program, cost=cost, valid=valid: p(cost, valid) for program in programs[1:]]
            seconds = [timed(call, args.repeats) for call in calls]
            wrong, start = 0.0, time.perf_counter()
            count = int(valid[0, 0].sum())
            for matrix, query in zip(np.asarray(cost).reshape(-1, *cost.shape[2:]), queries, strict=True):
                row, column = linear_sum_assignment(matrix[:, :count])
                best = np.float64(matrix[row, column]).sum()
                wrong = max(wrong, np.float64(matrix[query[:count], np.arange(count)]).sum() - best)
            seconds.append(time.perf_counter() - start)
            name = f"{count} objects, noise {noise}"
            found[name] = {"seconds": seconds, "excess": wrong}
            rows.append([name, *(f"{1000 * value:.1f}" for value in seconds), f"{wrong:.1e}"])
    study.publish(
        command,
        [
            study.table(["", "costs ms", "matching ms", "optax ms", "scipy ms", "sum above scipy's"], rows),
            study.facts(provenance.environment()),
        ],
        found,
        args.log,
    )


if __name__ == "__main__":
    main()
