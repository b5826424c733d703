"""Batches for the trainer: batch k is a pure function of (seed, k), whatever the workers, shards or interruptions.

Grain shuffles, prefetches and runs the worker processes. It is imported where it is used, because Grain imports jax
by itself; nothing here touches an accelerator.
"""

import dataclasses
import os
import sys
from collections.abc import Mapping

import cv2
import numpy as np

from kdjax.data import transforms
from kdjax.data.dataset import Dataset, Split

_KEEP = 400 * 2**20  # bytes: a split that is smaller than this when decoded is decoded once and kept in memory


class Pictures:
    """Decoded examples of a split by position; keeps them in memory if the whole split is small."""

    def __init__(self, split: Split):
        self._split = split
        self._kept = {}

    def __reduce__(self):
        return Pictures, (self._split,)  # a worker process decodes for itself

    def __getitem__(self, index: int) -> dict:
        example = self._kept.get(index)
        if example is None:
            example = self._split.records[index]
            # Decided by the first picture: all or nothing keeps memory bounded without any bookkeeping.
            if self._split.size * example["image"].nbytes <= _KEEP:
                example["image"].flags.writeable = False
                self._kept[index] = example
        return example


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrainSource:
    """Batch k as element k: this host's rows of the global batch."""

    pictures: Pictures
    size: int
    order: object  # order[position] is the picture at that position of the endless shuffled stream
    seed: int
    global_batch: int
    rows: tuple[int, int]  # of the global batch, first and one past last
    canvas: tuple[int, int]
    max_boxes: int
    augment: dict

    def __len__(self) -> int:
        return sys.maxsize // self.global_batch

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return _stack([self._example(step * self.global_batch + row) for row in range(*self.rows)])

    def _example(self, position: int) -> dict[str, np.ndarray]:
        example = self.pictures[int(self.order[position])]
        rng = np.random.default_rng((self.seed, position))
        image, boxes, labels = transforms.augment(
            example["image"], example["boxes"], example["labels"], rng, canvas=self.canvas, **self.augment
        )
        return _padded(image, boxes, labels, self.canvas, self.max_boxes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EvalSource:
    """Batch k as element k; the last one is filled with empty rows, and only empty rows come after it."""

    pictures: Pictures
    size: int
    batch: int
    canvas: tuple[int, int]
    max_boxes: int

    def __len__(self) -> int:
        return sys.maxsize // self.batch

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        first = step * self.batch
        return _stack([self._example(position) for position in range(first, first + self.batch)])

    def _example(self, position: int) -> dict[str, np.ndarray]:
        real = position < self.size
        if real:
            example = self.pictures[position]
        else:
            example = dict(image=np.full((*self.canvas, 3), transforms.PAD, np.uint8), image_id=-1)
            example |= dict(boxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, np.int32))
        original = example["image"].shape[:2]
        factor, size = transforms.fitted(original, self.canvas)
        image, boxes = transforms.resize(example["image"], example["boxes"], size)
        return _padded(image, boxes, example["labels"], self.canvas, self.max_boxes) | {
            "image_id": np.int64(example["image_id"]),
            "scale": np.float32(factor),
            "original_size": np.array(original, np.int32),
            "real": np.bool_(real),
        }


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
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise ValueError(f"config.data.augment.scale is {scale}, but must be (low, high) with 0 < low <= high.")
    if len(hsv) != 3 or min(hsv) < 0:
        raise ValueError(f"config.data.augment.hsv is {hsv}, but must be three gains of at least 0.")
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
    rows = batch_size // count
    source = _TrainSource(
        pictures=Pictures(split),
        size=split.size,
        order=grain.MapDataset.range(split.size).seed(order_seed).shuffle().repeat(None),
        seed=seed,
        global_batch=batch_size,
        rows=(index * rows, (index + 1) * rows),
        canvas=canvas_of(cfg),
        max_boxes=dataset.max_boxes,
        augment=_augment(cfg),
    )
    return Batches(source, start_step, None, int(cfg.get("workers", 0)))


def eval_batches(dataset: Dataset, split: str, cfg: Mapping, *, batch_size: int, limit: int | None = None) -> "Batches":
    """The pictures of a split once, in order, resized to fit the canvas.

    Returns:
      An iterator with `close()` of the dicts of `train_batches` and image_id i64[B], scale f32[B] (canvas px = scale *
      original px, up to the rounding of image_size), original_size i32[B, 2], real bool[B]: False on the rows that only
      fill the last batch.
    """
    chosen = dataset.splits[split]
    source = _EvalSource(
        pictures=Pictures(chosen),
        size=chosen.size if limit is None else min(limit, chosen.size),
        batch=batch_size,
        canvas=canvas_of(cfg),
        max_boxes=dataset.max_boxes,
    )
    return Batches(source, 0, -(-source.size // batch_size), int(cfg.get("workers", 0)))


class Batches:
    """Iterates over source[start:], decoding ahead in threads, or in worker processes if there are any.

    It counts for itself (None: endless), because Grain's workers leave shared memory behind when a source runs dry.
    """

    def __init__(self, source, start: int, count: int | None, workers: int):
        import grain
        from absl import flags

        self._left = count
        ahead = grain.MapDataset.source(source)[start:].to_iter_dataset(
            grain.ReadOptions(num_threads=1 if workers else 2, prefetch_buffer_size=3)
        )
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain passes absl's flags on to its workers
                flags.FLAGS.mark_as_parsed()
            options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
            ahead = ahead.mp_prefetch(options, worker_init_fn=_in_worker)
        self._batches = iter(ahead)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._left == 0:
            self.close()
            raise StopIteration
        if self._left is not None:
            self._left -= 1
        return next(self._batches)

    def close(self) -> None:
        """Ends the threads or worker processes; may be called more than once."""
        self._left = 0
        self._batches.close()


def _in_worker(index: int, count: int) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # should anything in a worker initialise jax, then not on the accelerator
    cv2.setNumThreads(1)
