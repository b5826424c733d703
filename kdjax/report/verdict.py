"""What paired differences over seeds show: their mean, its interval, and a verdict that is fixed beforehand.

The gain of a seed is the student's AP minus that of its twin. With n seeds, mean m and standard deviation s,

    m ± t(0.975, n - 1) s / sqrt(n)

is the 95 % interval of Student's t. The verdict is `helps` if the interval lies above 0, `hurts` if it lies below, and
otherwise `not shown`; with fewer than `LEAST` seeds it is always `not shown`. Of methods without any effect, whose
gains are then normally distributed around 0, 5 % get a verdict by chance, half of them `helps`, half `hurts`.
"""

import math
import statistics
from collections.abc import Sequence

from scipy.special import stdtrit

CONFIDENCE = 0.95
LEAST = 3  # seeds
HELPS, HURTS, NOT_SHOWN = "helps", "hurts", "not shown"


def interval(gains: Sequence[float]) -> tuple[float, float] | None:
    """The interval of the mean of paired differences; None with a single one.

    Args:
      gains: one for each seed, in any unit.

    Returns:
      Its ends, in the unit of the gains.

    Example:
      >>> [round(end, 2) for end in interval([1.0, 2.0, 3.0])]
      [-0.48, 4.48]
    """
    if len(gains) < 2:
        return None
    half = float(stdtrit(len(gains) - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(gains) / math.sqrt(len(gains))
    mean = statistics.mean(gains)
    return mean - half, mean + half


def verdict(gains: Sequence[float]) -> str:
    """`helps`, `hurts` or `not shown`.

    Args:
      gains: one for each seed.

    Example:
      >>> verdict([1.0, 1.2, 0.9]), verdict([1.0, 1.2]), verdict([-1.0, 3.0, 0.5])
      ('helps', 'not shown', 'not shown')
    """
    ends = interval(gains)
    if ends is None or len(gains) < LEAST:
        return NOT_SHOWN
    return HELPS if ends[0] > 0 else HURTS if ends[1] < 0 else NOT_SHOWN


def by_chance(rows: int) -> str:
    """The rate of false positives of the verdicts in words.

    Args:
      rows: number of those that may get one: with `LEAST` seeds or more.

    Example:
      >>> by_chance(8).endswith("0.4 of the 8 rows here that can have a verdict.")
      True
    """
    here = (
        f": that would be {0.05 * rows:.2g} of the {rows} row{'s' * (rows != 1)} here that can have a verdict"
        if rows
        else ""
    )
    return (
        "The verdict was fixed beforehand: helps or hurts if the 95 % interval of the mean gain (Student's t over "
        f"seeds) lies above or below 0, otherwise, and with fewer than {LEAST} seeds, not shown. Of rows without any "
        f"effect 5 % are called so by chance, 2.5 % helps and 2.5 % hurts{here}."
    )


def shown(ends: Sequence[float] | None) -> str:
    """An interval as text: "-0.48 to +4.48"; "–" if there is none."""
    return "–" if ends is None else f"{ends[0]:+.2f} to {ends[1]:+.2f}"
