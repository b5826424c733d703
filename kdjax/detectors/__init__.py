"""Detectors by name: `build` finds the file of the family and calls its `make`.

A family is a file of this package, or of `FOLDER/detectors` of a folder that the environment variable KDJAX_PLUGINS
names, with a dict `VARIANTS` (one entry for each size) and a function
`make(variant, num_classes, *, option=default, ...) -> Detector`.
"""

import importlib
import inspect
import json
import pkgutil
from types import ModuleType
from typing import Any

from kdjax import plugins
from kdjax.detectors.api import Detector
from kdjax.detectors.keywords import annotations, check_types
from kdjax.errors import UserError

__all__ = ["Detector", "build", "families", "names", "options"]

# Names that kdjax's own widths had in older files, before published networks took them: then -> now.
FORMER = {"rtmdet_nano": "rtmdet_micro", "rtmdet_ins_nano": "rtmdet_ins_micro"}

_BUILT: dict[tuple[Any, ...], Detector] = {}


def families() -> list[str]:
    """Returns the names of the files that are families, in alphabetical order."""
    plugins.extend(__path__, "detectors")
    return sorted(part.name for part in pkgutil.iter_modules(__path__) if _is_family(_module(part.name)))


def names() -> list[str]:
    """Returns every name that `build` knows, in the order of each family's `VARIANTS`."""
    return [f"{family}_{variant}" for family in families() for variant in _module(family).VARIANTS]


def options(name: str) -> dict[str, Any]:
    """Returns the options of a detector with their defaults; a default of None stands for the variant's own value.

    Args:
      name: `family_variant`, such as "rtmdet_tiny".

    Raises:
      UserError: unknown name.

    Example:
      >>> options("yolox_tiny")["stacked_convs"]
      2
    """
    parameters = inspect.signature(_find(name)[0].make).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def build(name: str, num_classes: int, **overrides: Any) -> Detector:
    """Builds a detector, without any weights.

    Equal arguments give the same object, so that a program may be cached by its detector.

    Args:
      name: `family_variant`, such as "rtmdet_tiny": variant `tiny` of `kdjax.detectors.rtmdet`.
      num_classes: K >= 1.
      **overrides: options of the family's `make` (see `options`).

    Returns:
      The detector; `build(d.name, d.num_classes, **d.options)` gives the same one.

    Raises:
      UserError: unknown name or option, or a value of the wrong type or out of range.

    Example:
      >>> build("rtmdet_pico", 5).strides
      (8, 16, 32)
    """
    family, variant = _find(name)
    valid = options(name)
    unknown = sorted(set(overrides) - set(valid))
    if unknown:
        raise UserError(f"{name} has no option {', '.join(unknown)}: its options are {', '.join(valid)}")
    changed = {option: value for option, value in overrides.items() if value != valid[option]}
    check_types(name, changed, annotations(family.make))
    key = (family.make, variant, num_classes, json.dumps(changed, sort_keys=True))
    if key not in _BUILT:
        _BUILT[key] = family.make(variant, num_classes, **changed)
    return _BUILT[key]


def _module(family: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{family}")


def _is_family(module: ModuleType) -> bool:
    return hasattr(module, "VARIANTS") and hasattr(module, "make")


def _find(name: str) -> tuple[ModuleType, str]:
    """The module of a detector's family, and its variant."""
    for family in families():
        variant = name.removeprefix(f"{family}_")
        if variant != name and variant in _module(family).VARIANTS:
            return _module(family), variant
    now = f"it is called {FORMER[name]} now; " if name in FORMER else ""
    raise UserError(f"unknown detector {name!r}: {now}the detectors are {', '.join(names())}")
