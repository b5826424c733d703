"""Throughput of the input: images/s decoded by one core, and images/s of batches, plain and with Mosaic and MixUp.

    python benchmarks/loader.py --root=DIR    # a folder in COCO layout; without it the embedded scenes

Batches are made with 0, 1 and 2 worker processes, and Mosaic and MixUp also without keeping earlier images in memory.
Variants take turns, so that other load on the machine affects all of them; the result is the median over the rounds.
The time that a run waits for its batches is `wait_share` in its metrics.jsonl.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from unittest import mock

from kdjax import data
from kdjax.data import build, plans, records
from kdjax.training import config as settings
from kdjax.training.config import Config

MIXED = dict(mosaic=True, mixup=1.0, scale=(0.1, 2.0))
VARIANTS = {  # name: settings of augment, workers, whether anything is kept
    "single images": ({}, 0, True),
    "single images, 1 worker": ({}, 1, True),
    "single images, 2 workers": ({}, 2, True),
    "Mosaic and MixUp, kept": (MIXED, 0, True),
    "Mosaic and MixUp, kept, 2 workers": (MIXED, 2, True),
    "Mosaic and MixUp, nothing kept": (MIXED, 0, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="")
    parser.add_argument("--size", type=int, default=640, help="side of the canvas in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=6, help="number of batches that are timed in a round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    config = settings.base().data
    config.image_size = (args.size, args.size)
    config.keep = 0.0  # as with a large data set, the images do not all fit into memory
    if args.root:
        config.update(dict(source="coco_folder", root=args.root))
    seconds, decoded = {name: [] for name in VARIANTS}, dict.fromkeys(VARIANTS, 0)
    alone = []
    with tempfile.TemporaryDirectory() as config.cache:
        for _ in range(args.rounds):
            alone.append(decode(config))
            for name, (augment, workers, kept) in VARIANTS.items():
                config.augment, config.workers = settings.augment(**augment), workers
                taken = measure(config, args.batch, args.batches, kept)
                seconds[name].append(taken[0] / args.batches / args.batch)
                decoded[name] += taken[1] / args.rounds / args.batches / args.batch
    base = statistics.median(seconds["single images"])
    print(f"{args.root or 'scenes'}, canvas {args.size}, batches of {args.batch}")
    print(f"{'':36}{'decoded a sample':>18}{'images/s':>10}{'of single':>11}")
    print(f"{'decoding alone, one core':36}{1:>18.2f}{statistics.median(alone):>10.1f}")
    for name in VARIANTS:
        middle = statistics.median(seconds[name])
        print(f"{name:36}{decoded[name]:>18.2f}{1 / middle:>10.1f}{base / middle:>11.2f}")


def decode(config: Config, count: int = 100) -> float:
    """Images/s that one thread decodes, the first `count` of the split over and over."""
    stored = data.open_dataset(config).splits["train"].records
    encoded = [stored.raw(i % len(stored))["image"] for i in range(count)]
    start = time.perf_counter()
    for one in encoded:
        records.decode(one)
    return count / (time.perf_counter() - start)


def measure(config: Config, batch: int, count: int, kept: bool) -> tuple[float, int]:
    """Seconds and decoded images of `count` batches, after those that fill the memory and those made ahead."""
    dataset = data.open_dataset(config)
    before = 4
    if kept and config.augment.mosaic:
        before += config.augment.cache * 3 // 2 // plans.STREAM
    with contextlib.ExitStack() as stack:
        if not kept:
            stack.enter_context(mock.patch.object(build, "memoized", lambda function, count: function))
        batches = data.train_batches(dataset, config, batch_size=batch, seed=0)
        stack.enter_context(contextlib.closing(batches))
        for _ in range(before):
            next(batches)
        decoded, start = batches.decoded, time.perf_counter()
        for _ in range(count):
            next(batches)
        return time.perf_counter() - start, batches.decoded - decoded


if __name__ == "__main__":
    main()
