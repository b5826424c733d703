"""Numbers as text, and the names of models on a page."""

import math
from collections.abc import Iterable
from typing import TypeGuard

MODELS = ("teacher", "twin", "student")  # of a run
PAIRS = (("student", "twin"), ("model", "other"))  # pages show the first minus the second


def is_defined(value: float | None) -> TypeGuard[float]:
    """Whether a metric has a value; COCO's undefined metrics are -1."""
    return value is not None and math.isfinite(value) and value >= 0


def difference(value: float | None, other: float | None) -> float | None:
    """The first minus the second; None if one of them is undefined."""
    return value - other if is_defined(value) and is_defined(other) else None


def percent(value: float | None) -> str:
    """A fraction in percent, without the percent sign: 41.2; "–" if undefined."""
    return f"{100 * value:.1f}" if is_defined(value) else "–"


def sign(gain: float | None) -> str:
    """CSS class of a difference of fractions: "good" or "bad"; "" if it is shown as 0.0 or undefined."""
    return "" if gain is None or abs(gain) < 0.0005 else "good" if gain > 0 else "bad"


def signed(gain: float | None) -> str:
    """A difference of fractions in percentage points: +2.3."""
    if gain is None:
        return "–"
    return {"good": "+", "bad": "−", "": ""}[sign(gain)] + f"{abs(100 * gain):.1f}"


def compared(models: Iterable[str]) -> tuple[str, str] | None:
    """The pair of `PAIRS` that is among the models."""
    return next((pair for pair in PAIRS if set(pair) <= set(models)), None)


def heading(pair: tuple[str, str]) -> str:
    """The heading for the difference of a pair."""
    return "gain" if pair == PAIRS[0] else "difference"


def abbreviated(number: float | None) -> str:
    """Three digits and a letter: 4.87M, 8.09G.

    Example:
      >>> abbreviated(4_873_000), abbreviated(999_900), abbreviated(12), abbreviated(None)
      ('4.87M', '1M', '12', '–')
    """
    if not is_defined(number):
        return "–"
    for letter, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size * 0.9995:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def compact(value: float) -> str:
    """Four digits, or two and an exponent.

    Example:
      >>> compact(0.004), compact(1234.5), compact(1e-7), compact(0)
      ('0.004', '1234', '1e-7', '0')
    """
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2g}".split("e") if "e" in f"{value:.2g}" else (f"{value:.2g}", "0")
        return f"{mantissa}e{int(exponent)}".removesuffix("e0")
    return f"{value:.4g}"
