"""What Mosaic and MixUp cost with the late pictures kept in memory and without: decoded pictures a sample, images/s.

    python benchmarks/augmentation.py --root=DIR    # a folder in COCO layout; without it the embedded scenes

Variants take turns, so that other work on the machine hits all alike; of each the median over the rounds counts.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from unittest import mock

from kdjax import data
from kdjax.data import loader
from kdjax.train import config as settings

VARIANTS = {  # name: settings of augment, whether anything is kept
    "single pictures": (dict(), True),
    "Mosaic and MixUp, kept": (dict(mosaic=True, mixup=1.0, scale=(0.1, 2.0)), True),
    "Mosaic and MixUp, nothing kept": (dict(mosaic=True, mixup=1.0, scale=(0.1, 2.0)), False),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="")
    parser.add_argument("--size", type=int, default=640, help="of the canvas, px")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=6, help="that are timed in a round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    config = settings.base().data
    config.image_size = (args.size, args.size)
    if args.root:
        config.update(dict(source="coco_folder", root=args.root))
    seconds, decoded = {name: [] for name in VARIANTS}, dict.fromkeys(VARIANTS, 0)
    with tempfile.TemporaryDirectory() as config.cache:
        for _ in range(args.rounds):
            for name, (augment, kept) in VARIANTS.items():
                config.augment = settings.augment(**augment)
                taken = measure(config, args.batch, args.batches, kept)
                seconds[name].append(taken[0] / args.batches / args.batch)
                decoded[name] += taken[1] / args.rounds / args.batches / args.batch
    base = statistics.median(seconds["single pictures"])
    print(f"{args.root or 'scenes'}, canvas {args.size}, batches of {args.batch}, one process")
    print(f"{'':32}{'decoded a sample':>18}{'images/s':>10}{'of single':>11}")
    for name in VARIANTS:
        middle = statistics.median(seconds[name])
        print(f"{name:32}{decoded[name]:>18.2f}{1 / middle:>10.1f}{base / middle:>11.2f}")


def measure(config, batch: int, count: int, kept: bool) -> tuple[float, int]:
    """Seconds and decoded pictures of `count` batches, after those that fill the memory and those made ahead."""
    dataset = data.open_dataset(config)
    before = 4
    if kept and config.augment.mosaic:
        before += config.augment.cache * 3 // 2 // loader.STREAM
    with contextlib.ExitStack() as stack:
        # As with a large data set, the pictures do not all fit into memory.
        stack.enter_context(mock.patch.object(loader, "_KEEP", 0))
        if not kept:
            stack.enter_context(mock.patch.object(loader, "_last", lambda count, function: function))
        batches = loader.train_batches(dataset, config, batch_size=batch, seed=0)
        stack.enter_context(contextlib.closing(batches))
        for _ in range(before):
            next(batches)
        decoded, start = batches.decoded, time.perf_counter()
        for _ in range(count):
            next(batches)
        return time.perf_counter() - start, batches.decoded - decoded


if __name__ == "__main__":
    main()
