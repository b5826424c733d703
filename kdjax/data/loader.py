"""Batches for the trainer: batch k is a pure function of (seed, k), whatever the workers, shards or interruptions.

Grain shuffles and works ahead. It is imported where it is used, because Grain imports jax by itself; worker processes
only decode and augment, and import neither.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence

import cv2
import numpy as np

from kdjax.data import transforms
from kdjax.data.dataset import Dataset, Split

_KEEP = 400 * 2**20  # bytes of decoded pictures that are kept in memory, so that a small split is decoded once


class Pictures:
    """Decoded examples of a split by position; keeps those of small splits in memory."""

    def __init__(self, split: Split):
        self._split = split
        self._kept = {}

    def __reduce__(self):
        return Pictures, (self._split,)  # a worker process decodes for itself

    def __getitem__(self, index: int) -> dict:
        example = self._kept.get(index)
        if example is None:
            example = self._split.records[index]
            # No more than its share of the bytes: that bounds the memory without any bookkeeping between threads.
            if self._split.size * example["image"].nbytes <= _KEEP:
                example["image"].flags.writeable = False
                self._kept[index] = example
        return example


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrainBuilder:
    """Makes a batch of its plan: (position in the endless stream, picture) of every row."""

    pictures: Pictures
    seed: int
    canvas: tuple[int, int]
    max_boxes: int
    augment: dict

    def __call__(self, plan: list[tuple[int, int]]) -> dict[str, np.ndarray]:
        return _stack([self._row(*entry) for entry in plan])

    def _row(self, position: int, picture: int) -> dict[str, np.ndarray]:
        example = self.pictures[picture]
        rng = np.random.default_rng((self.seed, position))
        image, boxes, labels = transforms.augment(
            example["image"], example["boxes"], example["labels"], rng, canvas=self.canvas, **self.augment
        )
        return _padded(image, boxes, labels, self.canvas, self.max_boxes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EvalBuilder:
    """Makes a batch of its plan: (position, picture) of every row, no picture for a row that only fills."""

    pictures: Pictures
    canvas: tuple[int, int]
    max_boxes: int

    def __call__(self, plan: list[tuple[int, int | None]]) -> dict[str, np.ndarray]:
        return _stack([self._row(picture) for _, picture in plan])

    def _row(self, picture: int | None) -> dict[str, np.ndarray]:
        if picture is None:
            example = dict(image=np.full((*self.canvas, 3), transforms.PAD, np.uint8), image_id=-1)
            example |= dict(boxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, np.int32))
        else:
            example = self.pictures[picture]
        original = example["image"].shape[:2]
        _, size = transforms.fitted(original, self.canvas)
        image, boxes = transforms.resize(example["image"], example["boxes"], size)
        return _padded(image, boxes, example["labels"], self.canvas, self.max_boxes) | {
            "image_id": np.int64(example["image_id"]),
            "original_size": np.array(original, np.int32),
            "real": np.bool_(picture is not None),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plans:
    """Which picture goes where: element k lists (position, picture) of this host's rows of batch k."""

    order: Sequence[int]  # picture at every position
    batch: int  # rows of the global batch
    rows: range  # those of this host

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch)

    def __getitem__(self, step: int) -> list[tuple[int, int | None]]:
        positions = [step * self.batch + row for row in self.rows]
        return [(p, int(self.order[p]) if p < len(self.order) else None) for p in positions]


def _padded(image, boxes, labels, canvas, max_boxes) -> dict[str, np.ndarray]:
    """One row of a batch. Of more than `max_boxes` boxes the largest are kept, in their order."""
    if len(boxes) > max_boxes:
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
        largest = np.sort(np.argsort(-areas, kind="stable")[:max_boxes])
        boxes, labels = boxes[largest], labels[largest]
    count = len(boxes)
    row = {
        "image": transforms.pad(image, canvas),
        "boxes": np.zeros((max_boxes, 4), np.float32),
        "labels": np.zeros(max_boxes, np.int32),
        "valid": np.arange(max_boxes) < count,
        "image_size": np.array(image.shape[:2], np.int32),
    }
    row["boxes"][:count], row["labels"][:count] = boxes, labels
    return row


def _stack(rows: list[dict]) -> dict[str, np.ndarray]:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def check_settings(cfg: Mapping) -> None:
    """What batches are made by, before there is any data.

    Raises:
      ValueError: names the setting, its value and what would be right.
    """
    canvas_of(cfg)
    _augment(cfg)


def canvas_of(cfg: Mapping) -> tuple[int, int]:
    """Height and width of the canvas, checked."""
    size = tuple(int(side) for side in cfg.get("image_size", (128, 128)))
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"config.data.image_size is {size}, but must be (height, width) of the canvas in pixels.")
    return size


def _augment(cfg: Mapping) -> dict:
    options = cfg.get("augment", {})
    scale = tuple(float(s) for s in options.get("scale", (1.0, 1.0)))
    hsv = tuple(float(g) for g in options.get("hsv", (0, 0, 0)))
    share = float(options.get("flip", 0.5))
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] < np.inf:
        raise ValueError(f"config.data.augment.scale is {scale}, but must be (low, high) with 0 < low <= high.")
    if len(hsv) != 3 or not all(0 <= gain <= 255 for gain in hsv):
        raise ValueError(f"config.data.augment.hsv is {hsv}, but must be three gains in 0 .. 255.")
    if not 0 <= share <= 1:
        raise ValueError(f"config.data.augment.flip is {share}, but must be a probability in 0 .. 1.")
    return dict(flip_share=share, scale=scale, random_crop=bool(options.get("crop", True)), hsv=hsv)


def train_batches(
    dataset: Dataset,
    cfg: Mapping,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> "Batches":
    """Endless training batches from `start_step` on; every epoch is shuffled anew.

    Args:
      dataset: from `open_dataset`.
      cfg: `config.data`; read here: image_size, workers, augment.
      batch_size: rows of the global batch, over all shards.
      seed: with the step it determines a batch entirely.
      start_step: the step of the first batch.
      shard: (index, count): this host gets rows index·n .. (index + 1)·n of the global batch, n = batch_size / count.

    Returns:
      An iterator with `close()` of dicts: image u8[B, H, W, 3] RGB, boxes f32[B, M, 4] px of the canvas, labels
      i32[B, M], valid bool[B, M], image_size i32[B, 2] (height, width of the picture at the canvas' top left).
    """
    index, count = shard
    if batch_size < 1 or batch_size % count:
        raise ValueError(f"batch_size {batch_size} does not divide into {count} equal shards.")
    if seed < 0:
        raise ValueError(f"The seed of the data is {seed}, but must be at least 0.")
    import grain

    split = dataset.splits["train"]
    # Grain's epoch e shuffles with seed + e: neighbouring seeds would repeat each other's epochs one later.
    order_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    order = grain.MapDataset.range(split.size).seed(order_seed).shuffle().repeat(None)
    rows = batch_size // count
    plans = _Plans(order=order, batch=batch_size, rows=range(index * rows, (index + 1) * rows))
    builder = _TrainBuilder(
        pictures=Pictures(split),
        seed=seed,
        canvas=canvas_of(cfg),
        max_boxes=dataset.max_boxes,
        augment=_augment(cfg),
    )
    return Batches(grain.MapDataset.source(plans)[start_step:], builder, workers=int(cfg.get("workers", 0)))


def eval_batches(dataset: Dataset, split: str, cfg: Mapping, *, batch_size: int, limit: int | None = None) -> "Batches":
    """The pictures of a split once, in order, resized to fit the canvas.

    Returns:
      An iterator with `close()` of the dicts of `train_batches` and image_id i64[B], original_size i32[B, 2] (height,
      width), real bool[B]: False on the rows that only fill the last batch.
    """
    import grain

    chosen = dataset.splits[split]
    size = chosen.size if limit is None else min(limit, chosen.size)
    plans = _Plans(order=range(size), batch=batch_size, rows=range(batch_size))
    builder = _EvalBuilder(pictures=Pictures(chosen), canvas=canvas_of(cfg), max_boxes=dataset.max_boxes)
    return Batches(grain.MapDataset.source(plans), builder, workers=int(cfg.get("workers", 0)))


class Batches:
    """Iterator over the batches that `builder` makes of Grain's `plans`, ahead of time in threads or worker processes.

    The workers are a pool of our own: a plan goes out, its batch comes back, any worker will do. Grain's own workers
    leave shared memory behind or take long to end when an iterator is closed early.
    """

    def __init__(self, plans, builder: Callable, *, workers: int):
        import grain

        self._pool = None
        threads = 2
        if workers:
            threads = workers + 1  # they only wait; one more batch than workers keeps all of them busy
            self._pool = concurrent.futures.ProcessPoolExecutor(
                workers,
                mp_context=multiprocessing.get_context("spawn"),  # a fork would copy the trainer's threads and devices
                initializer=_start_worker,
                initargs=(builder,),
            )
            builder = functools.partial(_remotely, self._pool)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
        self._batches = iter(plans.map(builder).to_iter_dataset(options))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            return next(self._batches)
        except StopIteration:
            self._end_workers()
            raise

    def close(self) -> None:
        """End the threads and worker processes; may be called more than once."""
        self._batches.close()
        self._end_workers()

    def _end_workers(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _remotely(pool: concurrent.futures.Executor, plan: list) -> dict[str, np.ndarray]:
    return pool.submit(_build, plan).result()


_builder = None  # of this worker process


def _start_worker(builder: Callable) -> None:
    global _builder
    _builder = builder
    os.environ["JAX_PLATFORMS"] = "cpu"  # should anything here ever initialise jax, then not on the accelerator
    os.setpgrp()  # Ctrl-C, or a signal to the whole group, is for the trainer
    cv2.setNumThreads(1)
    # A trainer that is killed cannot end its workers.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _build(plan: list) -> dict[str, np.ndarray]:
    return _builder(plan)
