"""How much memory and time do the features of regions need (RoIAlign on a pyramid, 7 x 7 cells)?

    python benchmarks/regions.py --batch=8 --regions=1000 --size=640

`planned` is the compiler's estimate beside the arguments, `peak` the largest memory of the process.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.detectors import box_head, rpn
from kdjax.report import study
from kdjax.training import provenance

Maps = tuple[jax.Array, ...]


def features(maps: Maps, boxes: jax.Array) -> jax.Array:
    """As the box head of a two-stage detector has them."""
    return box_head.features(maps, jax.lax.stop_gradient(boxes), box_head.SIZE)


def gradient(maps: Maps, boxes: jax.Array) -> Maps:
    """Of the sum of their squares."""
    return jax.grad(lambda maps: jnp.sum(features(maps, boxes) ** 2))(maps)


def inputs(batch: int, regions: int, size: int, channels: int) -> tuple[Maps, jax.Array]:
    """Random maps, and boxes of 16 to 400 pixels with sides of different lengths."""
    rng = np.random.default_rng(0)
    maps = tuple(
        jnp.asarray(rng.normal(size=(batch, size // s, size // s, channels)), jnp.float32) for s in rpn.STRIDES[:4]
    )
    side = np.exp(rng.uniform(np.log(16), np.log(400), (batch, regions, 1)))
    side = side * np.exp(rng.normal(0, 0.4, side.shape) * np.array([1, -1]))
    centre = rng.uniform(0, size, (batch, regions, 2))
    boxes = np.clip(np.concatenate([centre - side / 2, centre + side / 2], -1), 0, size)
    return maps, jnp.asarray(boxes, jnp.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 8), ("regions", 1000), ("size", 640), ("channels", 256), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--log", type=Path)
    args = parser.parse_args()

    given, rows, found = inputs(args.batch, args.regions, args.size, args.channels), [], {}
    for name, function in (("features", features), ("features and gradient of the maps", gradient)):
        program = jax.jit(function).lower(*given).compile()
        memory = program.memory_analysis()
        jax.block_until_ready(program(*given))
        seconds = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            jax.block_until_ready(program(*given))
            seconds.append(time.perf_counter() - start)
        megabytes = [
            memory.argument_size_in_bytes / 2**20,
            memory.output_size_in_bytes / 2**20,
            memory.temp_size_in_bytes / 2**20,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        ]
        found[name] = {"megabytes": megabytes, "seconds": seconds}
        rows.append([name, *(f"{value:.0f}" for value in megabytes), f"{np.median(seconds):.2f}"])
    study.publish(
        " ".join(["python benchmarks/regions.py", *sys.argv[1:]]),
        [
            study.table(["", "arguments MB", "results MB", "planned MB", "peak MB", "seconds"], rows),
            study.facts(provenance.environment()),
        ],
        found,
        args.log,
    )


if __name__ == "__main__":
    main()
