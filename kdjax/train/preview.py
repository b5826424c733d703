"""A look at training batches before a run: what the detector will get, with its boxes."""

import contextlib
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from kdjax import data
from kdjax.data import cache
from kdjax.evals import pictures

PICTURES = 8  # at most, of a batch


def save(dataset: data.Dataset, config: ConfigDict, workdir: str | Path | None) -> dict[int, Path]:
    """Writes a contact sheet of a batch of every stage.

    The pictures are rows of the very batch that the run would train on. Of a stage with Mosaic or MixUp it is a batch
    that has as many pictures before it as partners may come from.

    Args:
      dataset: from `open_dataset`.
      config: of the run; read here: data, batch_size, seed, steps.
      workdir: where the sheets go; None: a folder of the cache.

    Returns:
      {step of the batch: file}.
    """
    folder = Path(workdir) if workdir else cache.root(config.data.cache) / "check" / dataset.name
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for step in _steps(config):
        files[step] = folder / f"batch_{step:06d}.png"
        Image.fromarray(sheet(dataset, config, step)).save(files[step])
    return files


def sheet(dataset: data.Dataset, config: ConfigDict, step: int) -> np.ndarray:
    """u8[H, W, 3]: up to `PICTURES` rows of the batch of a step on their whole canvas, boxes drawn."""
    rows = max(n for n in range(1, PICTURES + 1) if config.batch_size % n == 0)
    shard = (0, config.batch_size // rows)
    settings = config.data.copy_and_resolve_references()
    settings.workers = 0
    with contextlib.closing(
        data.train_batches(
            dataset, settings, batch_size=config.batch_size, seed=config.seed, start_step=step, shard=shard
        )
    ) as batches:
        batch = next(batches)
    boxes, labels = (
        [values[valid] for values, valid in zip(batch[name], batch["valid"], strict=True)]
        for name in ("boxes", "labels")
    )
    return pictures.contact_sheet(list(batch["image"]), boxes, labels, dataset.classes, min(rows, 4))


def _steps(config: ConfigDict) -> list[int]:
    """A step of every stage that the run has."""
    first, second = config.data.augment, config.data.stage2.start
    end = min(second or config.steps, config.steps)
    full = first.cache if first.mosaic or first.mixup else 0  # partners come from so many batches at most
    return [min(full, end - 1), *([second] if 0 < second < config.steps else [])]
