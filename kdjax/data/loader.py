"""Batches for training and evaluation: batch k is a pure function of (seed, k).

Neither the number of workers or shards nor an interruption changes a batch. `plans.py` decides which images a batch
shows, `build.py` makes it, and `workers.py` does so ahead of time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kdjax.data import kept
from kdjax.data.build import Arrays, EvalBuilder, Images, TrainBuilder, sizes_of
from kdjax.data.dataset import Dataset, Split
from kdjax.data.kept import Forecast
from kdjax.data.plans import STREAM, VIEWS_SEED, EntryPlans, EvalPlans, Row, TrainPlans, ViewPlans
from kdjax.data.recipes import Form
from kdjax.data.stages import Settings, canvas_size, read_stages
from kdjax.data.workers import Batches
from kdjax.errors import UserError

LARGEST_SOURCE = 4  # times as many pixels as the canvas has an image for the device at most


def train_batches(
    dataset: Dataset,
    cfg: Settings,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    shard: tuple[int, int] = (0, 1),
    fit: str = "round",
    attach: Callable[[np.ndarray], Any] | None = None,
) -> Batches:
    """Endless training batches from `start_step` on; every epoch is shuffled anew.

    Args:
      dataset: from `open_dataset`, with the split 'train'.
      cfg: `config.data`; read here: image_size, workers, keep, longest, views, augment_on, augment, and stage2, whose
        settings hold from the step stage2.start on.
      batch_size: rows of the global batch, over all shards.
      seed: at least 0; with the step it determines a batch.
      start_step: the step of the first batch.
      shard: (index, count): this host gets rows index·n .. (index + 1)·n of the global batch, n = batch_size / count.
      fit: of the detector that is trained (`Detector.fit`): with "stretch" images get the aspect ratio of the canvas.
      attach: entries i64[B] of a batch (`kdjax/data/plans.py`) -> what is stored about them, which the batch has as
        `teacher`; called ahead of time, in the threads that make the batches.

    Returns:
      An iterator with `close()` of dicts: image u8[B, H, W, 3] RGB, boxes f32[B, M, 4] x1 y1 x2 y2 in pixels of the
      canvas, labels i32[B, M], valid bool[B, M], image_size i32[B, 2] (height, width of the image at the canvas' top
      left). If the data set was opened with `masks`: masks u8[B, M, H/4, W/4], of each 4 x 4 pixels of the canvas the
      share that the object covers, 0 .. 255; objects without a mask are left out then. If it has a file of detections
      (`with_found`): found_boxes f32[B, 100, 4], found_labels i32[B, 100], found_scores f32[B, 100] in 0 .. 1, best
      first, and found_valid bool[B, 100], moved by the augmentation as the objects. With augment_on="device" there is
      `recipe` instead of image, from which `kdjax.training.augmentation.images` makes it.

    Raises:
      UserError: batch_size, seed or a setting is out of its range.
    """
    import grain

    plans = train_plans(dataset, cfg, batch_size=batch_size, seed=seed, shard=shard)

    def attached(rows: list[Row], batch: Arrays) -> dict[str, Any]:
        assert attach is not None
        return batch | {"teacher": attach(np.array([plans.entry(row) for row in rows], np.int64))}

    return Batches(
        grain.MapDataset.source(plans)[start_step:],
        _train_builder(dataset, cfg, plans, seed, fit),
        workers=int(cfg["workers"]),
        together=_together(plans),
        attach=attached if attach else None,
    )


def entry_batches(
    dataset: Dataset,
    cfg: Settings,
    entries: Sequence[Sequence[int]],
    *,
    batch_size: int,
    rows: int,
    seed: int,
    fit: str = "round",
) -> Batches:
    """Batches of given entries, each once: the rows that `train_batches` makes of them.

    Args:
      dataset, cfg, seed, fit: as for `train_batches`.
      entries: of each batch, 1 .. `rows` of them; see `kdjax/data/plans.py`.
      batch_size: of the run, whose rows they are.
      rows: of every batch; a batch of fewer entries is filled up with its last one.

    Returns:
      An iterator like that of `train_batches`.

    Raises:
      UserError: a setting is out of its range.
    """
    import grain

    plans = train_plans(dataset, cfg, batch_size=batch_size, seed=seed)
    return Batches(
        grain.MapDataset.source(EntryPlans(of=plans, batches=entries, batch=rows)),
        _train_builder(dataset, cfg, plans, seed, fit),
        workers=int(cfg["workers"]),
        together=_together(plans),
    )


def train_plans(
    dataset: Dataset, cfg: Settings, *, batch_size: int, seed: int, shard: tuple[int, int] = (0, 1)
) -> TrainPlans | ViewPlans:
    """Which images make which row of which batch, and the entries of the rows.

    Args:
      dataset, cfg, batch_size, seed, shard: as for `train_batches`.

    Raises:
      UserError: batch_size, seed or a setting is out of its range.
    """
    index, count = shard
    if batch_size < 1 or batch_size % count:
        raise UserError(f"batch_size must be a positive multiple of the {count} shards, not {batch_size}")
    if seed < 0:
        raise UserError(f"seed must be at least 0, not {seed}")
    import grain

    size = dataset.splits["train"].size
    # Grain's epoch e shuffles with seed + e: neighbouring seeds would repeat each other's epochs one later.
    order_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    order = grain.MapDataset.range(size).seed(order_seed).shuffle().repeat(None)
    rows = batch_size // count
    stages, starts = read_stages(cfg)
    common: Any = dict(
        order=order,
        batch=batch_size,
        rows=range(index * rows, (index + 1) * rows),
        stages=stages,
        starts=starts,
    )
    views = int(cfg["views"])
    return ViewPlans(size=size, views=views, **common) if views else TrainPlans(seed=seed, **common)


def _train_builder(dataset: Dataset, cfg: Settings, plans: TrainPlans | ViewPlans, seed: int, fit: str) -> TrainBuilder:
    """What makes the rows of these plans."""
    of_views = isinstance(plans, ViewPlans)
    # A host's rows may begin inside a stream. The partners of views are drawn from all images: nothing is kept.
    streams = -(-len(plans.rows) // (STREAM * max(int(cfg["workers"]), 1))) + 1
    form = None
    if cfg["augment_on"] == "device":
        form = Form(
            source_size(dataset.splits["train"], cfg),
            canvas_size(cfg),
            any(stage.mosaic for stage in plans.stages),
            any(stage.mixup for stage in plans.stages),
        )
    return TrainBuilder(
        form=form,
        images=Images(dataset.splits["train"], keep=float(cfg["keep"]), longest=int(cfg["longest"])),
        seed=VIEWS_SEED if of_views else seed,
        canvas=canvas_size(cfg),
        max_boxes=dataset.max_boxes,
        stages=plans.stages,
        stretch=fit == "stretch",
        streams=0 if of_views else streams,
    )


def source_size(split: Split, cfg: Settings) -> tuple[int, int]:
    """Height and width in which all training images of the split have room.

    Raises:
      UserError: they are much larger than the canvas.
    """
    height, width = (int(side) for side in sizes_of(split, int(cfg["longest"])).max(0))
    canvas = canvas_size(cfg)
    if height * width > LARGEST_SOURCE * canvas[0] * canvas[1]:
        raise UserError(
            f"augment_on: each image is sent to the device as {height}x{width} px (height x width), the largest sides "
            f"of the training images; more than {LARGEST_SOURCE} times the pixels of the canvas "
            f"{canvas[0]}x{canvas[1]} are too many: set config.data.longest={2 * min(canvas)}, or "
            "config.data.augment_on=host"
        )
    return height, width


def forecast(dataset: Dataset, cfg: Settings) -> Forecast:
    """How many training images `train_batches` keeps decoded in memory, for all processes of a host together.

    Args:
      dataset: from `open_dataset`, with the split 'train'.
      cfg: `config.data`; read here: keep, longest.

    Raises:
      UserError: they do not fit the memory of the machine.
    """
    expected = kept.forecast(sizes_of(dataset.splits["train"], int(cfg["longest"])), float(cfg["keep"]))
    kept.check_memory(expected)
    return expected


def _together(plans: TrainPlans | ViewPlans) -> int:
    """Neighbouring rows that share what the builder keeps in memory."""
    mixing = any(stage.mosaic or stage.mixup for stage in plans.stages)
    return STREAM if mixing and isinstance(plans, TrainPlans) else 1


def eval_batches(
    dataset: Dataset,
    split: str,
    cfg: Settings,
    *,
    batch_size: int,
    limit: int | None = None,
    fit: str = "round",
    shard: tuple[int, int] = (0, 1),
) -> Batches:
    """The images of a split once, in order, resized to fit the canvas (`transforms.fitted`).

    Args:
      dataset: from `open_dataset`.
      split: 'train' or 'val'.
      cfg: `config.data`; read here: image_size, workers.
      batch_size: rows of every batch; the last batch is padded to it with grey images.
      limit: only the first images of the split; None takes all.
      fit: how an image is resized, see `transforms.fitted`.
      shard: (index, count): this host gets the index-th of `count` runs of successive batches, which may be empty.

    Returns:
      An iterator with `close()` of the dicts of `train_batches` without masks and detections, and image_id i64[B],
      original_size i32[B, 2] (height, width), real bool[B]. On rows that only fill the last batch `real` is False and
      image_id -1.

    Raises:
      UserError: batch_size or image_size is out of its range.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")
    import grain

    chosen = dataset.splits[split]
    size = chosen.size if limit is None else min(limit, chosen.size)
    plans = EvalPlans(size=size, batch=batch_size, shard=shard)
    builder = EvalBuilder(
        images=Images(dataclasses.replace(chosen, masks=None, found=None)),
        canvas=canvas_size(cfg),
        max_boxes=dataset.max_boxes,
        fit=fit,
    )
    return Batches(grain.MapDataset.source(plans), builder, workers=int(cfg["workers"]))
