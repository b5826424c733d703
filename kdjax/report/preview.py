"""Images of a run before it starts: training batches with their boxes, and the schedule."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from kdjax import data
from kdjax.data import cache
from kdjax.report import drawing
from kdjax.resources import Config

IMAGES = 8  # at most, of a batch


def save(
    dataset: data.Dataset, config: Config, curves: Mapping[str, np.ndarray], workdir: str | Path | None, fit: str
) -> dict[str, Path]:
    """Writes a contact sheet for a batch of each augmentation stage, and a plot of the schedule.

    The images are rows of a batch that the run would train on. With Mosaic or MixUp it is the first batch whose
    partners come from a full cache.

    Args:
      dataset: from `open_dataset`.
      config: of the run.
      curves: from `kdjax.training.schedule.schedule`.
      workdir: the folder for the images; None: a folder of the cache.
      fit: of the student (`Detector.fit`).

    Returns:
      {description: file}.
    """
    folder = Path(workdir) if workdir else cache.root(config.data.cache) / "check" / dataset.name
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for step in _steps(config):
        file = files[f"training images of batch {step}"] = folder / f"batch_{step:06d}.png"
        Image.fromarray(sheet(dataset, config, step, fit)).save(file)
    file = files["schedule of learning rate, moving average and weights"] = folder / "schedule.png"
    draw_schedule(config, curves).savefig(file)
    return files


def draw_schedule(config: Config, curves: Mapping[str, np.ndarray]) -> Figure:
    """Plots the curves of `kdjax.training.schedule.schedule`; the second stage is shaded."""
    steps, terms = curves["step"], {k.removeprefix("weight/"): v for k, v in curves.items() if k.startswith("weight/")}
    panels = [
        ("learning rate", {"lr": curves["lr"]}, "linear"),
        ("weight of new parameters in EMA", {"": curves["ema"]}, "log"),
    ]
    if terms:
        panels.append(("weight of terms", terms, "linear"))
    figure = Figure((9, 2.4 * len(panels)), layout="constrained")
    for axes, (label, lines, scale) in zip(figure.subplots(len(panels), sharex=True), panels, strict=True):
        for number, (name, values) in enumerate(lines.items()):
            axes.plot(steps, values, label=name, linestyle=("-", "--", "-.", ":")[number % 4])
        axes.set(ylabel=label, yscale=scale, xlim=(0, config.steps))
        axes.grid(alpha=0.3)
        if scale == "linear":
            axes.set_ylim(bottom=0)
        if (curves["stage"] == 2).any():
            axes.axvspan(config.data.stage2.start, config.steps, color="tab:orange", alpha=0.15, label="stage 2")
        if len(lines) > 1:
            axes.legend(fontsize="small")
    figure.axes[-1].set_xlabel("step")
    return figure


def sheet(dataset: data.Dataset, config: Config, step: int, fit: str) -> np.ndarray:
    """u8[H, W, 3]: up to `IMAGES` rows of the batch of a step, whole canvas, with boxes and, if it has them, masks."""
    rows = max(n for n in range(1, IMAGES + 1) if config.batch_size % n == 0)
    shard = (0, config.batch_size // rows)
    settings = config.data.copy_and_resolve_references()
    settings.workers, settings.augment_on = 0, "host"
    with contextlib.closing(
        data.train_batches(
            dataset, settings, batch_size=config.batch_size, seed=config.seed, start_step=step, shard=shard, fit=fit
        )
    ) as batches:
        batch = next(batches)
    boxes, labels, masks = (
        [values[valid] for values, valid in zip(batch[name], batch["valid"], strict=True)] if name in batch else ()
        for name in ("boxes", "labels", "masks")
    )
    return drawing.contact_sheet(list(batch["image"]), boxes, labels, dataset.classes, min(rows, 4), masks=masks)


def _steps(config: Config) -> list[int]:
    """One step of each stage of the run."""
    first, second = config.data.augment, config.data.stage2.start
    end = min(second or config.steps, config.steps)
    full = first.cache if first.mosaic or first.mixup else 0  # partners come from at most so many batches
    return [min(full, end - 1), *([second] if 0 < second < config.steps else [])]
