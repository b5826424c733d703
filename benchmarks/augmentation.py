"""The training loop with images made on the host and on the device: steps/s, the share of waiting, the step alone.

    python benchmarks/augmentation.py --size=128 --batch=8           # the quickstart's data
    python benchmarks/augmentation.py --root=DIR --size=640 --workers=8

A supervised step on generated scenes, or on a folder in COCO layout. Variants take turns, so that other load on the
machine affects all of them; the result is the median over the rounds. As in a run, metrics are read one step late, and
waiting is the time for the next batch and its way to the device. "Step alone" repeats the step on one batch.
The last line is one JSON object.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax

from kdjax import data, detectors, sharding
from kdjax.resources import Config
from kdjax.training import config as settings
from kdjax.training import provenance, setup

VARIANTS = {"single": {}, "Mosaic and MixUp": dict(mosaic=True, mixup=0.5, cache=20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="rtmdet_pico", choices=detectors.names())
    parser.add_argument("--root", default="", help="a folder in COCO layout; without it generated scenes")
    parser.add_argument("--size", type=int, default=128, help="side of the canvas in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=200, help="number of generated scenes")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    setup.prepare_process("")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    print(f"{'':28}{'steps/s':>10}{'of the step alone':>20}{'wait share':>12}")
    for name, one in found.items():
        print(f"{name:28}{one['steps_per_s']:>10.2f}{one['of_step_alone']:>20.2f}{one['wait_share']:>12.3f}")
    print(json.dumps(vars(args) | found | provenance.environment()))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Of each variant the medians over the rounds."""
    runs = {}
    for name, augment in VARIANTS.items():
        for on in ("host", "device"):
            config = config_of(args, folder, augment, on)
            runs[f"{name}, {on}"] = setup.prepare(config, data.open_dataset(config.data))
    rates: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
    for turn in range(args.rounds + 1):
        for name, one in runs.items():
            taken = timed(one, args)
            if turn:  # the first round compiles
                rates[name].append(taken)
    found = {}
    for name, rows in rates.items():
        loop, alone, waited = (statistics.median(column) for column in zip(*rows, strict=True))
        ratio = statistics.median(row[0] / row[1] for row in rows)
        found[name] = {
            "steps_per_s": round(loop, 3),
            "step_alone_per_s": round(alone, 3),
            "of_step_alone": round(ratio, 3),
            "wait_share": round(waited, 3),
        }
    return found


def config_of(args: argparse.Namespace, folder: Path, augment: dict[str, object], on: str) -> Config:
    config = settings.base()
    config.update(dict(batch_size=args.batch, steps=10_000))
    config.student.detector = args.student
    shape = dict(scenes_train=args.images, scenes_val=2, image_size=(args.size, args.size), max_boxes=32)
    config.data.update(shape | dict(cache=str(folder), workers=args.workers, augment_on=on))
    config.data.augment.update(augment)
    if args.root:
        config.data.update(dict(source="coco_folder", root=args.root))
    return config


def timed(run: setup.Setup, args: argparse.Namespace) -> tuple[float, float, float]:
    """Steps/s of the loop and of the step alone, and the share of the loop that is waiting for batches."""
    state = jax.device_put(jax.device_get(run.states["student"]), sharding.replicated(run.mesh))
    update, metrics, waited = run.steps["student"], None, 0.0
    with contextlib.closing(setup.train_batches(run)) as batches:
        for _ in range(3):
            batch = setup.placed(run, next(batches))
        state, metrics = update(state, None, batch)
        jax.block_until_ready((state, metrics))
        begun = time.perf_counter()
        for _ in range(args.steps):
            asked = time.perf_counter()
            batch = setup.placed(run, next(batches))
            waited += time.perf_counter() - asked
            before, (state, metrics) = metrics, update(state, None, batch)
            jax.device_get(before)
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    for _ in range(args.steps):
        before, (state, metrics) = metrics, update(state, None, batch)
        jax.device_get(before)
    jax.block_until_ready((state, metrics))
    return args.steps / seconds, args.steps / (time.perf_counter() - begun), waited / seconds


if __name__ == "__main__":
    main()
