"""The mode in which primitives are traced for converters to other formats."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_portable: ContextVar[bool] = ContextVar("portable", default=False)
_replaced: ContextVar[Mapping[str, Callable[..., Any]] | None] = ContextVar("replaced", default=None)


@contextmanager
def portable() -> Iterator[None]:
    """Primitives that are traced inside take forms that converters to other formats support.

    Results are equal up to rounding. No form is chosen by platform, and no gradient rule is defined.

    Example:
      >>> with portable():
      ...     is_portable()
      True
    """
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def is_portable() -> bool:
    """Whether the code runs inside `portable()`.

    Example:
      >>> is_portable()
      False
    """
    return _portable.get()


@contextmanager
def replaced(**functions: Callable[..., Any]) -> Iterator[None]:
    """What is traced inside calls these functions in the place of kdjax's own of the same name.

    Other runtimes have operators for what JAX writes as loops: `greedy_nms` and `select_rows` of `kdjax.boxes.nms`,
    `roi_align` of `kdjax.boxes.roi`, `upsample_nearest` and `resize_bilinear` of `kdjax.nn`; or for what they compute
    with bytes: `fake_quantise` of `kdjax.nn`. A replacement gets the arguments of the function.

    Example:
      >>> with replaced(roi_align=max):
      ...     replacement("roi_align")
      <built-in function max>
    """
    token = _replaced.set({**(_replaced.get() or {}), **functions})
    try:
        yield
    finally:
        _replaced.reset(token)


def replacement(name: str) -> Callable[..., Any] | None:
    """What stands in the place of a function inside `replaced`.

    Example:
      >>> replacement("roi_align") is None
      True
    """
    return (_replaced.get() or {}).get(name)
