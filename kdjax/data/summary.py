"""The text of the dry run: a description of the data."""

from typing import Any

import numpy as np

from kdjax.data.counts import counted
from kdjax.data.dataset import Dataset, Split, ground_truth
from kdjax.data.loader import forecast, source_size
from kdjax.data.sources import LOG
from kdjax.data.stages import Settings, canvas_size
from kdjax.errors import NAME, printable

SHOWN = 20  # entries of the list of dropped and repaired objects
_SMALL, _LARGE = 32**2, 96**2  # px², COCO's bounds of small and large


def summary(dataset: Dataset, cfg: Settings) -> str:
    """The text of `--config.data.check=True`: images, boxes by class and size, dropped and repaired objects.

    Args:
      dataset: from `open_dataset`.
      cfg: `config.data`; read here: image_size, keep, longest, augment_on, augment and stage2.

    Returns:
      Several lines of text. Sizes are COCO's, by the area in original pixels: small under 32², large from 96².

    Raises:
      UserError: the training images are too large for what the settings make of them.
    """
    height, width = canvas_size(cfg)
    lines = [
        f"{dataset.name}: {len(dataset.classes)} classes, canvas {height}x{width} px (height x width), "
        f"{dataset.max_boxes} padded boxes per image",
    ]
    truths = {role: ground_truth(dataset, role) for role in dataset.splits}
    told = {role: counted(dataset, role, cfg) for role in dataset.splits}
    lines += [first for first, *_ in told.values()]
    lines.append(f"an epoch is {dataset.splits['train'].size} images, each once, in a new order")
    lines.append(kept_line(dataset, cfg))
    if cfg["augment_on"] == "device":
        source_size(dataset.splits["train"], cfg)
    lines += ["", *_table(dataset, truths), ""]
    for role, split in dataset.splits.items():
        lines += _log(role, split, told[role][1:])
    return "\n".join(lines)


def kept_line(dataset: Dataset, cfg: Settings) -> str:
    """How many training images stay decoded in memory, and how many are shrunk, in one line."""
    split, longest = dataset.splits["train"], int(cfg["longest"])
    shrunk = int((split.sizes.max(1) > longest).sum()) if longest else 0
    told = f"; {shrunk:,} are shrunk to {longest} px (config.data.longest)" if shrunk else ""
    return f"train: {forecast(dataset, cfg)} (config.data.keep={cfg['keep']}){told}"


def _table(dataset: Dataset, truths: dict[str, dict[str, Any]]) -> list[str]:
    """Boxes by class and size, one line per class."""
    label = {category: index for index, category in enumerate(dataset.category_ids)}
    counts = np.zeros((len(dataset.classes), len(truths), 3), int)
    for column, truth in enumerate(truths.values()):
        for entry in truth["annotations"]:
            if not entry["iscrowd"]:
                size = int(entry["area"] >= _SMALL) + int(entry["area"] >= _LARGE)
                counts[label[entry["category_id"]], column, size] += 1
    names = [*(printable(name, NAME) for name in dataset.classes), "all"]
    counts = np.concatenate([counts, counts.sum(0, keepdims=True)])
    wide = max(len(name) for name in names)
    heads = [f"{role:>8}{'small':>8}{'medium':>8}{'large':>8}" for role in truths]
    lines = [f"{'boxes':<{wide}}" + "".join(heads)]
    for name, row in zip(names, counts, strict=True):
        cells = "".join(f"{split.sum():>8}" + "".join(f"{n:>8}" for n in split) for split in row)
        lines.append(f"{name:<{wide}}" + cells)
    return lines


def _log(role: str, split: Split, told: list[str]) -> list[str]:
    """Counts by reason, the first entries, and the file with the full list."""
    log = split.log
    lines = told or [f"{role}: nothing dropped, nothing repaired"]
    for entry in log[:SHOWN]:
        which = "" if entry["annotation"] is None else f" annotation {entry['annotation']}"
        which = f" ({entry['place']})" if "place" in entry else which
        lines.append(printable(f"  {entry['file']}{which}: {entry['action']}, {entry['reason']}"))
    if len(log) > SHOWN:
        lines.append(f"  … and {len(log) - SHOWN} more: full list in {split.folder / LOG}")
    return lines
