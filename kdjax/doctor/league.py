"""What to try first: the methods' gains in studies of the same pair of families, nearest in the number of images.

`league.json`, beside this file, is a list of rows, one for each method and kind of weight in a study that
`benchmarks/README.md` logs; a test holds it against that log. The fields are those of `Row`.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from kdjax import detectors
from kdjax.doctor.findings import OK, Finding

SUBJECT = "what to try"
COMPARABLE = 10  # factor between two numbers of training images
SHOWN = 2  # data sets
HELPS, HURTS, NOT_SHOWN = "helps", "hurts", "not shown"


class Row(NamedTuple):
    """The gain of a method in a study."""

    data: str  # name of the data set
    images: int  # for training
    student: str
    teacher: str
    families: tuple[str, str]  # of student and teacher
    method: str
    weight: str | float  # "published", "auto", or a number
    seeds: int
    gain: float  # mean of student minus twin, AP points
    interval: tuple[float, float]  # of that mean, 95 %, by Student's t over the seeds
    verdict: str  # HELPS or HURTS if the interval is on one side of 0, else NOT_SHOWN
    log: str  # anchor of the section in benchmarks/README.md
    command: str

    @property
    def study(self) -> tuple[Any, ...]:
        """What rows that can be compared with each other have in common."""
        return self.data, self.images, self.student, self.teacher


def read() -> list[Row]:
    """The rows of `league.json`."""
    rows: list[dict[str, Any]] = json.loads(Path(__file__).with_name("league.json").read_text())
    for row in rows:
        row["families"], row["interval"] = tuple(row["families"]), tuple(row["interval"])
    return [Row(**row) for row in rows]


def check_methods(student: str, teacher: str, images: int, rows: Iterable[Row] | None = None) -> list[Finding]:
    """Says which methods helped where a like pair of detectors was studied.

    Args:
      student: name of a detector, such as "rtmdet_tiny".
      teacher: likewise; a teacher that is no detector of kdjax has no family, and so no comparable study.
      images: number of training images.
      rows: as `read` returns them, which are the default.

    Returns:
      A finding for each of the two data sets that are nearest in the number of images, within a factor of 10; the
      nearest one alone, or none, after the words that nothing comparable was measured.
    """
    pair = family_of(student), family_of(teacher)
    studies: dict[tuple[Any, ...], list[Row]] = {}
    for row in read() if rows is None else rows:
        if row.families == pair:
            studies.setdefault(row.study, []).append(row)
    if not studies:
        return [
            Finding(
                OK,
                SUBJECT,
                f"nothing comparable was measured: no study has a teacher like {teacher} and a student like {student}; "
                "compare methods with kdjax study methods",
            )
        ]

    def distance(study: list[Row]) -> float:
        return abs(math.log(study[0].images / max(images, 1)))

    nearest = sorted(studies.values(), key=distance)
    close = [study for study in nearest if distance(study) <= math.log(COMPARABLE)]
    if close:
        return [Finding(OK, SUBJECT, sentence(study)) for study in close[:SHOWN]]
    message = f"nothing comparable was measured with {images:,} training images; the nearest: {sentence(nearest[0])}"
    return [Finding(OK, SUBJECT, message)]


def sentence(study: list[Row]) -> str:
    """What a study shows: methods that help, best first, with their numbers; then the others."""
    ordered = sorted(study, key=lambda row: -row.gain)
    first = ordered[0]
    where = f"on {first.images:,} images of {first.data}, {first.teacher} teaching {first.student}"
    helps, others, hurts = ([row for row in ordered if row.verdict == one] for one in (HELPS, NOT_SHOWN, HURTS))
    if helps:
        parts = [f"{where}, {', '.join(map(numbers, helps))}: try {name(helps[0])} first"]
        parts += [f"not shown to help: {', '.join(map(name, others))}"] if others else []
    else:
        parts = [f"{where}, no method was shown to help", *([", ".join(map(numbers, others))] if others else [])]
    parts += [f"hurt: {', '.join(map(numbers, hurts))}"] if hurts else []
    logs = " and ".join(f"benchmarks/README.md#{log}" for log in dict.fromkeys(row.log for row in ordered))
    return f"{'; '.join(parts)} (AP points over the twin with their 95 % intervals: {logs})"


def name(row: Row) -> str:
    """A method with its weight, if that is not the published one."""
    return row.method if row.weight == "published" else f"{row.method} with weight={row.weight}"


def numbers(row: Row) -> str:
    """A method with what it gained: "cwd with weight=auto +4.1 [+2.0, +6.2], 3 seeds"."""
    low, high = row.interval
    return f"{name(row)} {row.gain:+.1f} [{low:+.1f}, {high:+.1f}] ({row.seeds} seeds)"


def family_of(detector: str) -> str:
    """The family of a detector by its name; "" if it is none of kdjax's."""
    return max((one for one in detectors.families() if detector.startswith(f"{one}_")), key=len, default="")
