"""The settings of batches, checked: the canvas, and the augmentation of each stage of training."""

from typing import Any, NamedTuple, Protocol

import numpy as np

from kdjax.data.masks import STRIDE
from kdjax.errors import UserError


class Settings(Protocol):
    """`config.data`, or a part of it: a ConfigDict, or nested dicts with the same keys."""

    def __getitem__(self, key: str, /) -> Any: ...  # noqa: ANN401 - a setting has any type


class Stage(NamedTuple):
    """The augmentation from one step on: `config.data.augment`, or `config.data.stage2.augment`."""

    mosaic: bool
    mixup: float  # probability
    cache: int  # Mosaic draws its partners from so many earlier positions of the stream, MixUp from half as many
    augment: dict[str, Any]  # keyword arguments of `transforms.augment`
    ssd: dict[str, float]  # probabilities of the functions of `ssd`


def check_settings(cfg: Settings) -> None:
    """Checks the settings of batches, before there is any data.

    Args:
      cfg: `config.data`; read here: image_size, masks, views, longest, augment_on, augment, stage2.

    Raises:
      UserError: names the setting, its value and what would be right.
    """
    size = canvas_size(cfg)
    if cfg["masks"] and any(side % STRIDE for side in size):
        raise UserError(f"image_size must be multiples of {STRIDE} px where masks is True, not {size}")
    if int(cfg["views"]) < 0:
        raise UserError(f"views must be a number of views of each image, or 0 for endless draws, not {cfg['views']}")
    if 0 < int(cfg["longest"]) < SMALLEST:
        raise UserError(f"longest must be at least {SMALLEST} px, or 0 for images as they are, not {cfg['longest']}")
    stages, _ = read_stages(cfg)
    if cfg["augment_on"] not in ("host", "device"):
        raise UserError(f"augment_on must be 'host' or 'device', not {cfg['augment_on']!r}")
    if cfg["augment_on"] == "device" and any(any(stage.ssd.values()) for stage in stages):
        raise UserError(
            "augment_on: distort, zoom_out and iou_crop are made on the host alone: set them to 0, or augment_on=host"
        )


SMALLEST = 32  # px, of the longer side of an image that is shrunk
LARGEST = 16_384  # px, of a side of the canvas


def canvas_size(cfg: Settings) -> tuple[int, int]:
    """Height and width of the canvas in pixels.

    Raises:
      UserError: `image_size` is not two numbers in 1 .. 16,384.
    """
    try:
        size = tuple(int(side) for side in cfg["image_size"])
    except (TypeError, ValueError, OverflowError):
        wrong = cfg["image_size"]
        raise UserError(f"image_size must be (height, width) of the canvas in pixels, not {wrong!r}") from None
    if len(size) != 2 or min(size) < 1 or max(size) > LARGEST:
        most = f": at most {LARGEST:,} a side" if max(size, default=0) > LARGEST else ""
        raise UserError(f"image_size must be (height, width) of the canvas in pixels, not {size}{most}")
    return size


def read_stages(cfg: Settings) -> tuple[tuple[Stage, ...], tuple[int, ...]]:
    """The stages in order, and the first step of each.

    Raises:
      UserError: a setting is out of its range.
    """
    stages, starts = [_stage(cfg["augment"], "augment")], [0]
    start = int(cfg["stage2"]["start"])
    if start < 0:
        raise UserError(f"stage2.start must be a step, or 0 for no second stage, not {start}")
    if start:
        stages.append(_stage(cfg["stage2"]["augment"], "stage2.augment"))
        starts.append(start)
    return tuple(stages), tuple(starts)


def _stage(options: Settings, name: str) -> Stage:
    """Reads one stage from its options; `name` is their name in the config."""
    scale = tuple(float(factor) for factor in options["scale"])
    hsv = tuple(float(gain) for gain in options["hsv"])
    flip, mixup, cache = float(options["flip"]), float(options["mixup"]), int(options["cache"])
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] < np.inf:
        raise UserError(f"{name}.scale must be (low, high) with 0 < low <= high, not {scale}")
    if len(hsv) != 3 or not all(0 <= gain <= 255 for gain in hsv):
        raise UserError(f"{name}.hsv must be three gains in 0 .. 255, not {hsv}")
    ssd = {key: float(options[key]) for key in ("distort", "zoom_out", "iou_crop")}
    for key, probability in (("flip", flip), ("mixup", mixup), *ssd.items()):
        if not 0 <= probability <= 1:
            raise UserError(f"{name}.{key} must be a probability in 0 .. 1, not {probability}")
    if cache < 1:
        raise UserError(f"{name}.cache must be at least 1 image, not {cache}")
    single = dict(flip_share=flip, scale=scale, random_crop=bool(options["crop"]), hsv=hsv)
    return Stage(bool(options["mosaic"]), mixup, cache, single, ssd)
