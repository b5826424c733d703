"""A training step with the teacher inside of it, ahead of it, and read from a cache; and the size of the cache.

    python benchmarks/teacher_cache.py --student=rtmdet_tiny --teacher=rtmdet_s --methods=mkd --size=320 --batch=4

Generated scenes, random weights, one view an image, the loader of a run. Times are whole steps, from asking for a batch
until the update is there: medians after two warm-up steps. The last line is one JSON object.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import jax

from kdjax import data, detectors, sharding, weights
from kdjax import methods as zoo
from kdjax.data import shards
from kdjax.resources import Config
from kdjax.training import config as settings
from kdjax.training import provenance, replay, setup
from kdjax.training.run import given

WARM = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="rtmdet_tiny", choices=detectors.names())
    parser.add_argument("--teacher", default="rtmdet_s", choices=detectors.names())
    parser.add_argument("--methods", default="mkd", metavar="A+B", help=f"of {', '.join(zoo.names())}")
    parser.add_argument("--size", type=int, default=320, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    setup.prepare_process("off")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    for name, one in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in one.items()))
    print(json.dumps(vars(args) | found | provenance.environment()))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """Seconds of steps and of compilation, and sizes, by where the teacher's output comes from."""
    config = config_of(args, folder)
    dataset = data.open_dataset(config.data)
    teacher = detectors.build(args.teacher, len(dataset.classes))
    classes, size = list(dataset.classes), (args.size, args.size)
    weights.save(folder / "teacher", teacher, *teacher.init(jax.random.PRNGKey(1)), classes=classes, image_size=size)
    live = setup.prepare(config, dataset)
    [of_run] = live.teachers
    inside = live._replace(teachers=(of_run._replace(observer=None),))
    found = {"in the step": timed(inside, args), "ahead": timed(live, args)}
    logits = any(name == "rows.logits" for method in live.methods.values() for name in method.reads.teacher)
    for kind in shards.DTYPES:
        if kind == "sparse" and not logits:
            continue
        config.teacher.cache, config.teacher.cache_dtype = str(folder / kind), kind
        begun = time.perf_counter()
        stored = replay.write(live, of_run)
        seconds = time.perf_counter() - begun
        size = sum(one["bytes"] for one in stored.listed().values())
        found[f"cache, {kind}"] = timed(live, args, {"": stored}) | {
            "entry_bytes": stored.entry_bytes,
            "bytes_on_disk": size,
            "write_s_per_image": round(seconds / args.images, 3),
        }
    return found


def config_of(args: argparse.Namespace, folder: Path) -> Config:
    config = settings.base()
    config.update(dict(batch_size=args.batch, steps=10_000))
    config.student.detector, config.teacher.weights = args.student, str(folder / "teacher")
    config.methods = settings.methods(args.methods)
    shape = dict(cache=str(folder), scenes_train=args.images, scenes_val=2, image_size=(args.size, args.size), views=1)
    config.data.update(shape)
    return config


def timed(
    run: setup.Setup, args: argparse.Namespace, stored: Mapping[str, shards.Shards] | None = None
) -> dict[str, float]:
    """The median step of a run, the share that the host waits for batches, and the compilation of the first step."""
    config = run.config
    state = jax.device_put(jax.device_get(run.states["student"]), sharding.replicated(run.mesh))
    loader = data.train_batches(
        run.dataset, config.data, batch_size=args.batch, seed=0, attach=replay.attach(run, stored or {})
    )
    seconds, waits = [], []
    with contextlib.closing(loader):
        for _ in range(1 + WARM + args.steps):
            begun = time.perf_counter()
            batch = next(loader)
            waits.append(time.perf_counter() - begun)
            state, metrics = run.steps["student"](state, *given(run, "student", setup.placed(run, batch)))
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - begun)
    steps, middle = seconds[1 + WARM :], statistics.median(seconds[1 + WARM :])
    return {
        "median_ms": round(1000 * middle),
        "least_ms": round(1000 * min(steps)),
        "wait_share": round(sum(waits[1 + WARM :]) / sum(steps), 3),
        "first_step_s": round(seconds[0], 1),
    }


if __name__ == "__main__":
    main()
