"""Handling of options, shared by the families' `make` functions."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from kdjax.errors import UserError


def own_values(title: str, variants: Mapping[str, Mapping[str, Any]], variant: str) -> dict[str, Any]:
    """Returns the values of one variant.

    Raises:
      UserError: unknown variant.
    """
    if variant not in variants:
        raise UserError(f"unknown variant {variant!r} of {title}: the variants are {', '.join(variants)}")
    return dict(variants[variant])


def resolve(given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces options that are None by the variant's own value, if it has one.

    Example:
      >>> resolve({"widen": None, "deepen": 0.5}, {"widen": 0.375, "deepen": 0.167})
      {'widen': 0.375, 'deepen': 0.5}
    """
    return {name: own.get(name) if value is None else value for name, value in given.items()}


def changed(make: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that differ from the defaults of `make`: those that `Detector.options` holds."""
    parameters = inspect.signature(make).parameters
    return {name: value for name, value in given.items() if value != parameters[name].default}


def annotations(make: Callable[..., Any]) -> dict[str, Any]:
    """Returns the types that `make` declares for its options."""
    return typing.get_type_hints(make)


def check_types(name: str, given: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Checks the types of options; those without a declared type may have any.

    Args:
      name: of the detector, for messages.
      given: option -> value.
      kinds: option -> type.

    Raises:
      UserError: a value is of another type.

    Example:
      >>> check_types("rtmdet_tiny", {"widen": 1}, {"widen": float | None})
    """
    for option, value in given.items():
        if option in kinds and not _has_type(value, kinds[option]):
            expected = inspect.formatannotation(kinds[option]).replace("typing.", "")
            raise UserError(f"{name}: option {option} must be {expected}, not {value!r}")


def _has_type(value: object, kind: Any) -> bool:  # noqa: ANN401 - a type, as `typing.get_type_hints` gives it
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, part) for part in typing.get_args(kind))
    if origin is typing.Literal:
        return value in typing.get_args(kind)
    if kind is Any:
        return True
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, origin or kind)
