"""Batches for the trainer: batch k is a pure function of (seed, k), whatever the workers, shards or interruptions.

Grain shuffles and works ahead. It is imported where it is used, because Grain imports jax by itself; worker processes
only decode and augment, and import neither.

Mosaic and MixUp take their partners from the last positions of the same virtual stream: `STREAM` neighbouring rows of
every batch are one stream. Whole streams belong to a worker, which keeps what it has decoded and made for the last
positions in memory, so that a partner costs nothing. Nothing of that is saved: what is no longer there is made again,
and is the same.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from kdjax.data import transforms
from kdjax.data.dataset import Dataset, Split
from kdjax.data.transforms import Sample

STREAM = 4  # neighbouring rows of a batch that make a virtual stream: 64 streams for a batch of 256
CENTRE = (0.5, 1.5)  # where the four images of a Mosaic may meet, of the canvas' sides; the Mosaic is twice as large
_KEEP = 400 * 2**20  # bytes of decoded images that are kept in memory, so that a small split is decoded once


class Images:
    """Decoded examples of a split by position; keeps those of small splits in memory."""

    def __init__(self, split: Split):
        self._split = split
        self._kept = {}
        self._own = threading.local()

    def __reduce__(self):
        return Images, (self._split,)  # a worker process decodes for itself

    def __getitem__(self, index: int) -> dict:
        example = self._kept.get(index)
        if example is None:
            example = self._split.records[index]
            self._own.decoded = getattr(self._own, "decoded", 0) + 1
            # No more than its share of the bytes: that bounds the memory without any bookkeeping between threads.
            if self._split.size * example["image"].nbytes <= _KEEP:
                example["image"].flags.writeable = False
                self._kept[index] = example
        return example

    def newly_decoded(self) -> int:
        """How many images the calling thread has decoded since it last asked."""
        count, self._own.decoded = getattr(self._own, "decoded", 0), 0
        return count


class _Stage(NamedTuple):
    """What config.data.augment says of a stage."""

    mosaic: bool
    mixup: float  # probability
    cache: int  # positions of its stream among which a Mosaic finds its partners; MixUp looks at half as many
    single: dict  # options of transforms.augment


class _Row(NamedTuple):
    """All that decides what a row of a training batch shows, apart from the draws of `transforms.augment`."""

    position: int  # in the endless stream of images; seeds those draws
    stage: int
    images: tuple[int, ...]  # one, or the four of a Mosaic
    centre: tuple[float, float] = (1.0, 1.0)  # y, x of a Mosaic, of the canvas' sides
    partner: "_Row | None" = None  # what MixUp adds, itself without partner
    mirrored: bool = False  # whether the partner is, once more


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrainPlans:
    """What goes where: element k lists this host's rows of batch k."""

    order: Sequence[int]  # image at every position
    seed: int
    batch: int  # rows of the global batch
    rows: range  # those of this host
    stages: tuple[_Stage, ...]
    starts: tuple[int, ...]  # first step of each stage, ascending

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch)

    def __getitem__(self, step: int) -> list[_Row]:
        stage = sum(step >= start for start in self.starts) - 1
        return [self._mixed(step * self.batch + row, stage) for row in self.rows]

    def _mixed(self, position: int, stage: int) -> _Row:
        row = self._single(position, stage)
        if not self.stages[stage].mixup:
            return row
        rng = np.random.default_rng((self.seed, position, 2))  # 0 would be the generator of transforms.augment
        chosen, mirrored = rng.uniform() < self.stages[stage].mixup, rng.uniform() < 0.5
        [partner] = self._earlier(position, max(self.stages[stage].cache // 2, 1), rng, 1)
        return row._replace(partner=self._single(partner, stage), mirrored=mirrored) if chosen else row

    def _single(self, position: int, stage: int) -> _Row:
        images, centre = [int(self.order[position])], (1.0, 1.0)
        if self.stages[stage].mosaic:
            rng = np.random.default_rng((self.seed, position, 1))
            centre = tuple(rng.uniform(*CENTRE, 2).tolist())
            earlier = self._earlier(position, self.stages[stage].cache, rng, 3)
            images += [int(self.order[p]) for p in earlier]
        return _Row(position, stage, tuple(images), centre)

    def _earlier(self, position: int, reach: int, rng: np.random.Generator, count: int) -> list[int]:
        """`count` of the last `reach` positions before this one in its stream; itself where the stream begins."""
        step, row = divmod(position, self.batch)
        first = row - row % STREAM
        width = min(STREAM, self.batch - first)
        place = step * width + row - first  # in the stream
        if place == 0:
            return [position] * count
        places = place - 1 - rng.integers(0, min(reach, place), count)
        return [p // width * self.batch + first + p % width for p in places.tolist()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrainBuilder:
    """Makes the rows of a batch of their plan."""

    images: Images
    seed: int
    canvas: tuple[int, int]
    max_boxes: int
    stages: tuple[_Stage, ...]
    streams: int  # that this process has

    def __call__(self, plan: list[_Row]) -> list[dict[str, np.ndarray]]:
        return [_padded(self._mixed(row), self.canvas, self.max_boxes) for row in plan]

    def _mixed(self, row: _Row) -> Sample:
        make = self._kept if self.stages[row.stage].mixup else self._single
        sample = make(row._replace(partner=None, mirrored=False))
        if row.partner is None:
            return sample
        partner = transforms.pad(make(row.partner), self.canvas)
        if row.mirrored:
            partner = transforms.flip(partner)
        return transforms.mixup(transforms.pad(sample, self.canvas), partner)

    def _single(self, row: _Row) -> Sample:
        options = self.stages[row.stage]
        if options.mosaic:
            centre = tuple(int(share * side) for share, side in zip(row.centre, self.canvas, strict=True))
            twice = (2 * self.canvas[0], 2 * self.canvas[1])
            sample = transforms.mosaic([self._tile(image) for image in row.images], centre, twice)
            # The scale is relative to what a Mosaic is made for, which is twice the canvas.
            single = options.single | {"scale": tuple(2 * factor for factor in options.single["scale"])}
        else:
            sample, single = _sample(self.images[row.images[0]]), options.single
        return transforms.augment(
            sample, np.random.default_rng((self.seed, row.position)), canvas=self.canvas, **single
        )

    @functools.cached_property
    def _tile(self) -> Callable[[int], Sample]:
        """The image of a Mosaic, as large as fits the canvas; the last ones are kept."""

        def tile(image):
            sample = _sample(self.images[image])
            return transforms.resize(sample, transforms.fitted(sample.image.shape[:2], self.canvas)[1])

        # A partner of MixUp looks back from its own place.
        return _last(self.streams * (self._cache + self._cache // 2 + 2 * STREAM), tile)

    @functools.cached_property
    def _kept(self) -> Callable[[_Row], Sample]:
        """`_single`, of which the last are kept for MixUp."""

        def single(row):
            sample = self._single(row)
            return sample._replace(image=sample.image.copy())  # a window would keep all of its image in memory

        return _last(self.streams * (self._cache // 2 + 2 * STREAM), single)

    @property
    def _cache(self) -> int:
        return max(stage.cache for stage in self.stages if stage.mosaic or stage.mixup)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EvalPlans:
    """The images in order: element k lists those of batch k, None for a row that only fills the last batch."""

    size: int
    batch: int

    def __len__(self) -> int:
        return -(-self.size // self.batch)

    def __getitem__(self, step: int) -> list[int | None]:
        return [p if p < self.size else None for p in range(step * self.batch, (step + 1) * self.batch)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EvalBuilder:
    """Makes the rows of a batch of their plan."""

    images: Images
    canvas: tuple[int, int]
    max_boxes: int
    round_down: bool

    def __call__(self, plan: list[int | None]) -> list[dict[str, np.ndarray]]:
        return [self._row(image) for image in plan]

    def _row(self, image: int | None) -> dict[str, np.ndarray]:
        if image is None:
            example = dict(image=np.full((*self.canvas, 3), transforms.PAD, np.uint8), image_id=-1)
            example |= dict(boxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, np.int32))
        else:
            example = self.images[image]
        original = example["image"].shape[:2]
        _, size = transforms.fitted(original, self.canvas, round_down=self.round_down)
        return _padded(transforms.resize(_sample(example), size), self.canvas, self.max_boxes) | {
            "image_id": np.int64(example["image_id"]),
            "original_size": np.array(original, np.int32),
            "real": np.bool_(image is not None),
        }


def _last(count: int, function: Callable) -> Callable:
    """The function with its last `count` results kept in memory."""
    return functools.lru_cache(count)(function)


def _sample(example: Mapping) -> Sample:
    return Sample(example["image"], example["boxes"], example["labels"])


def _padded(sample: Sample, canvas: tuple[int, int], max_boxes: int) -> dict[str, np.ndarray]:
    """One row of a batch. Of more than `max_boxes` boxes the largest are kept, in their order."""
    boxes, labels = sample.boxes, sample.labels
    if len(boxes) > max_boxes:
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
        largest = np.sort(np.argsort(-areas, kind="stable")[:max_boxes])
        boxes, labels = boxes[largest], labels[largest]
    count = len(boxes)
    row = {
        "image": transforms.pad(sample, canvas).image,
        "boxes": np.zeros((max_boxes, 4), np.float32),
        "labels": np.zeros(max_boxes, np.int32),
        "valid": np.arange(max_boxes) < count,
        "image_size": np.array(sample.image.shape[:2], np.int32),
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
    _stages(cfg)


def canvas_of(cfg: Mapping) -> tuple[int, int]:
    """Height and width of the canvas, checked."""
    size = tuple(int(side) for side in cfg.get("image_size", (128, 128)))
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"config.data.image_size is {size}, but must be (height, width) of the canvas in pixels.")
    return size


def _stage(options: Mapping, name: str) -> _Stage:
    """The settings of a stage, checked; `name` is theirs in the config."""
    scale = tuple(float(s) for s in options.get("scale", (1.0, 1.0)))
    hsv = tuple(float(g) for g in options.get("hsv", (0, 0, 0)))
    flip, mixup = float(options.get("flip", 0.5)), float(options.get("mixup", 0.0))
    cache = int(options.get("cache", 40))
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] < np.inf:
        raise ValueError(f"{name}.scale is {scale}, but must be (low, high) with 0 < low <= high.")
    if len(hsv) != 3 or not all(0 <= gain <= 255 for gain in hsv):
        raise ValueError(f"{name}.hsv is {hsv}, but must be three gains in 0 .. 255.")
    for key, share in (("flip", flip), ("mixup", mixup)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}.{key} is {share}, but must be a probability in 0 .. 1.")
    if cache < 1:
        raise ValueError(f"{name}.cache is {cache}, but must be at least 1 image.")
    single = dict(flip_share=flip, scale=scale, random_crop=bool(options.get("crop", True)), hsv=hsv)
    return _Stage(bool(options.get("mosaic", False)), mixup, cache, single)


def _stages(cfg: Mapping) -> tuple[tuple[_Stage, ...], tuple[int, ...]]:
    """The settings of the stages and the first step of each."""
    stages, starts = [_stage(cfg.get("augment", {}), "config.data.augment")], [0]
    second = cfg.get("stage2", {})
    start = int(second.get("start", 0))
    if start < 0:
        raise ValueError(f"config.data.stage2.start is {start}, but must be a step, or 0 for no second stage.")
    if start:
        stages.append(_stage(second.get("augment", {}), "config.data.stage2.augment"))
        starts.append(start)
    return tuple(stages), tuple(starts)


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
      cfg: `config.data`; read here: image_size, workers, augment, and stage2, whose settings hold from the step
        stage2.start on.
      batch_size: rows of the global batch, over all shards.
      seed: with the step it determines a batch entirely.
      start_step: the step of the first batch.
      shard: (index, count): this host gets rows index·n .. (index + 1)·n of the global batch, n = batch_size / count.

    Returns:
      An iterator with `close()` of dicts: image u8[B, H, W, 3] RGB, boxes f32[B, M, 4] px of the canvas, labels
      i32[B, M], valid bool[B, M], image_size i32[B, 2] (height, width of the image at the canvas' top left).
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
    workers = int(cfg.get("workers", 0))
    stages, starts = _stages(cfg)
    plans = _TrainPlans(
        order=order,
        seed=seed,
        batch=batch_size,
        rows=range(index * rows, (index + 1) * rows),
        stages=stages,
        starts=starts,
    )
    builder = _TrainBuilder(
        images=Images(split),
        seed=seed,
        canvas=canvas_of(cfg),
        max_boxes=dataset.max_boxes,
        stages=stages,
        streams=-(-rows // (STREAM * max(workers, 1))) + 1,  # a host's rows may begin inside a stream
    )
    mixing = any(stage.mosaic or stage.mixup for stage in stages)
    plans = grain.MapDataset.source(plans)[start_step:]
    return Batches(plans, builder, workers=workers, together=STREAM if mixing else 1)


def eval_batches(
    dataset: Dataset, split: str, cfg: Mapping, *, batch_size: int, limit: int | None = None, round_down: bool = False
) -> "Batches":
    """The images of a split once, in order, resized to fit the canvas (`transforms.fitted`).

    Returns:
      An iterator with `close()` of the dicts of `train_batches` and image_id i64[B], original_size i32[B, 2] (height,
      width), real bool[B]: False on the rows that only fill the last batch.
    """
    import grain

    chosen = dataset.splits[split]
    size = chosen.size if limit is None else min(limit, chosen.size)
    plans = _EvalPlans(size=size, batch=batch_size)
    builder = _EvalBuilder(
        images=Images(chosen), canvas=canvas_of(cfg), max_boxes=dataset.max_boxes, round_down=round_down
    )
    return Batches(grain.MapDataset.source(plans), builder, workers=int(cfg.get("workers", 0)))


class Batches:
    """Iterator over the batches that `builder` makes of Grain's `plans`, ahead of time in threads or worker processes.

    `decoded` is the number of images that were decoded for the batches handed out so far.

    The workers are processes of our own, each with the same part of every batch. Neighbouring rows, `together` of them,
    stay in one worker, and without workers in one thread if they are more than one: they share what the builder keeps.
    Grain's own workers leave shared memory behind or take long to end when an iterator is closed early.
    """

    def __init__(self, plans, builder: Callable, *, workers: int, together: int = 1):
        import grain

        self.decoded = 0
        self._pools = [
            concurrent.futures.ProcessPoolExecutor(
                1,
                mp_context=multiprocessing.get_context("spawn"),  # a fork would copy the trainer's threads and devices
                initializer=_start_worker,
                initargs=(builder,),
            )
            for _ in range(workers)
        ]
        make, threads = functools.partial(_here, builder), 2 if together == 1 else 1
        if workers:
            # The threads only wait; no worker needs to wait for another to finish its part of a batch.
            make, threads = functools.partial(_remotely, self._pools, together), 3
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
        self._batches = iter(plans.map(make).to_iter_dataset(options))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            batch, decoded = next(self._batches)
        except StopIteration:
            self._end_workers()
            raise
        self.decoded += decoded
        return batch

    def close(self) -> None:
        """End the threads and worker processes; may be called more than once."""
        self._batches.close()
        self._end_workers()

    def _end_workers(self) -> None:
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)


def _here(builder: Callable, plan: list) -> tuple[dict[str, np.ndarray], int]:
    """The batch of a plan, and how many images were decoded for it."""
    return _stack(builder(plan)), builder.images.newly_decoded()


def _remotely(pools: list[concurrent.futures.Executor], together: int, plan: list) -> tuple[dict, int]:
    """As `_here`; every worker makes a part of the rows."""
    count = -(-len(plan) // together)
    bounds = [min(count * i // len(pools) * together, len(plan)) for i in range(len(pools) + 1)]
    futures = [pool.submit(_build, plan[a:b]) for pool, a, b in zip(pools, bounds, bounds[1:], strict=False)]
    parts = [future.result() for future in futures]
    return _stack([row for rows, _ in parts for row in rows]), sum(decoded for _, decoded in parts)


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


def _build(plan: list) -> tuple[list[dict[str, np.ndarray]], int]:
    return _builder(plan), _builder.images.newly_decoded()
