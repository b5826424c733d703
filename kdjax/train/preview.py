"""A look at a run before it: what the detector will get, with its boxes, and every rate and weight over the steps."""

import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from PIL import Image

from kdjax import data
from kdjax.data import cache
from kdjax.methods import api
from kdjax.report import drawing
from kdjax.train import optim
from kdjax.train.step import weights_of

IMAGES = 8  # at most, of a batch
POINTS = 2000  # at most, of a curve


def save(dataset: data.Dataset, config: ConfigDict, workdir: str | Path | None) -> dict[str, Path]:
    """Writes a contact sheet of a batch of every stage, and an image of the schedule.

    The images are rows of the very batch that the run would train on. Of a stage with Mosaic or MixUp it is a batch
    that has as many images before it as partners may come from.

    Args:
      dataset: from `open_dataset`.
      config: of the run.
      workdir: where the images go; None: a folder of the cache.

    Returns:
      {what it shows: file}.
    """
    folder = Path(workdir) if workdir else cache.root(config.data.cache) / "check" / dataset.name
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for step in _steps(config):
        file = files[f"images of batch {step} as they are trained on"] = folder / f"batch_{step:06d}.png"
        Image.fromarray(sheet(dataset, config, step)).save(file)
    file = files["learning rate, moving average and weights over the steps"] = folder / "schedule.png"
    draw_schedule(config).savefig(file)
    return files


def schedule(config: ConfigDict) -> dict[str, np.ndarray]:
    """Everything that changes over the steps of a run, by the very functions that the trainer uses.

    Returns:
      f64[P] each, P <= `POINTS`: `step`, `lr`, `ema` (share of the new weights), `stage` (1 or 2), and
      `weight/METHOD/TERM`.
    """
    steps = np.unique(np.linspace(0, config.steps - 1, POINTS).round().astype(int))
    methods = {name: api.build(name, **options) for name, options in config.methods.items()}
    curves = jax.vmap(
        lambda step: {
            "lr": optim.learning_rate(config)(step),
            "ema": optim.ema_rate(config, step),
            **{f"weight/{name}": weight for name, weight in weights_of(methods, step).items()},
        }
    )(jnp.asarray(steps))
    start = config.data.stage2.start
    stage = np.where((start > 0) & (steps >= start), 2, 1)
    return {"step": steps.astype(float), "stage": stage} | {k: np.asarray(v, float) for k, v in curves.items()}


def draw_schedule(config: ConfigDict) -> Figure:
    """The curves of `schedule` above one another, the second stage shaded."""
    curves = schedule(config)
    steps, terms = curves["step"], {k.removeprefix("weight/"): v for k, v in curves.items() if k.startswith("weight/")}
    panels = [
        ("learning rate", {"lr": curves["lr"]}, "linear"),
        ("share of new weights in EMA", {"": curves["ema"]}, "log"),
    ]
    if terms:
        panels.append(("weight of the term", terms, "linear"))
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
    axes.set_xlabel("step")
    return figure


def sheet(dataset: data.Dataset, config: ConfigDict, step: int) -> np.ndarray:
    """u8[H, W, 3]: up to `IMAGES` rows of the batch of a step on their whole canvas, boxes drawn."""
    rows = max(n for n in range(1, IMAGES + 1) if config.batch_size % n == 0)
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
    return drawing.contact_sheet(list(batch["image"]), boxes, labels, dataset.classes, min(rows, 4))


def _steps(config: ConfigDict) -> list[int]:
    """A step of every stage that the run has."""
    first, second = config.data.augment, config.data.stage2.start
    end = min(second or config.steps, config.steps)
    full = first.cache if first.mosaic or first.mixup else 0  # partners come from so many batches at most
    return [min(full, end - 1), *([second] if 0 < second < config.steps else [])]
