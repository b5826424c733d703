"""Detectors by name: `build` finds the file of the family and calls its `make`."""

import importlib

from kdjax.detectors.api import Detector

# Family (the name of the file) -> its variants. Listed here so that names can be shown without importing every family.
_FAMILIES = {
    "rtmdet": ("pico", "nano", "tiny", "s", "m", "l", "x"),
    "retinanet": ("r18", "r34", "r50", "r101"),
    "fcos": ("r18", "r34", "r50", "r101", "r18-center", "r34-center", "r50-center", "r101-center"),
    "gfl": ("r18", "r34", "r50", "r101"),
    "atss": ("r18", "r34", "r50", "r101"),
    "yolox": ("pico", "nano", "tiny", "s", "m", "l", "x"),
}


def names() -> list[str]:
    """Returns every name that `build` knows, small to large within a family."""
    return [f"{family}_{variant}" for family, variants in _FAMILIES.items() for variant in variants]


def build(name: str, num_classes: int, **overrides) -> Detector:
    """Builds a detector, without any weights.

    Args:
      name: `family_variant`, such as "rtmdet_tiny": variant `tiny` of `kdjax.detectors.rtmdet`.
      num_classes: K >= 1.
      **overrides: options of the family's `make` that differ from the variant's own.

    Returns:
      The detector; `build(d.name, d.num_classes, **d.options)` gives the same one.

    Raises:
      ValueError: for an unknown name, or options that the family does not have or cannot use.

    Example:
      >>> build("rtmdet_pico", 5).strides
      (8, 16, 32)
    """
    if name not in names():
        raise ValueError(f"There is no detector {name!r}; the detectors are {', '.join(names())}.")
    family, variant = name.rsplit("_", 1)
    return importlib.import_module(f"kdjax.detectors.{family}").make(variant, num_classes, **overrides)
