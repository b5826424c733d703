"""How long does the matching of queries with objects take, for all layers of a decoder and all images at once?

    python benchmarks/matching.py --queries=300 --objects=100 --outputs=7 --batch=8

Boxes lie at random, and the queries, as in training, around the objects: `noise` is how far from them, in shares of
the image, and `live` how many of the objects are there. It prints the time of the costs and of the matching in one
program, and of scipy on the same costs, which must find the same sums.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment

from kdjax.boxes import matching
from kdjax.report import study
from kdjax.structs import Array
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


def match(logits: Array, boxes: Array, labels: Array, truth: Array, valid: Array) -> tuple[Array, Array]:
    """The costs and the query of each object."""
    cost = jax.vmap(matching.matching_cost, (0, 0, None, None))(logits, boxes, labels, truth)
    return cost, matching.hungarian(cost, np.broadcast_to(valid, (len(cost), *valid.shape)))


def timed(function: Callable[[], object], repeats: int) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = {"queries": 300, "objects": 100, "outputs": 7, "batch": 8, "classes": 80, "repeats": 5}
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--log", type=Path)
    args = parser.parse_args(arguments)

    rows, found, program = [], {}, jax.jit(match)
    for live in (1.0, 0.1):
        for noise in (0.3, 0.05, 0.01):
            given = inputs(args, live, noise)
            cost, queries = (np.asarray(x) for x in jax.block_until_ready(program(*given)))
            own = timed(lambda given=given: program(*given), args.repeats)
            wrong, start = 0.0, time.perf_counter()
            count = int(given[-1][0].sum())
            for matrix, query in zip(cost.reshape(-1, *cost.shape[2:]), queries.reshape(-1, args.objects), strict=True):
                row, column = linear_sum_assignment(matrix[:, :count])
                best = np.float64(matrix[row, column]).sum()
                wrong = max(wrong, np.float64(matrix[query[:count], np.arange(count)]).sum() - best)
            scipy = time.perf_counter() - start
            name = f"{count} objects, noise {noise}"
            found[name] = {"seconds": own, "scipy_seconds": scipy, "excess": wrong}
            rows.append([name, f"{1000 * own:.1f}", f"{1000 * scipy:.1f}", f"{wrong:.1e}"])
    study.publish(
        " ".join(["python benchmarks/matching.py", *(arguments or sys.argv[1:])]),
        [
            study.table(["", "kdjax ms", "scipy ms", "sum above scipy's"], rows),
            study.facts(provenance.environment()),
        ],
        found,
        args.log,
    )


if __name__ == "__main__":
    main()
