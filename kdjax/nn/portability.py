"""The mode in which primitives are traced for converters to other formats."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_portable: ContextVar[bool] = ContextVar("portable", default=False)


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
