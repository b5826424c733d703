"""The result of a check of the doctor."""

from typing import NamedTuple

OK, WARNING, ERROR = "ok", "warning", "error"


class Finding(NamedTuple):
    """The result of one check."""

    level: str  # OK, WARNING or ERROR
    subject: str  # one to three words
    message: str  # a sentence with the measured values and, unless OK, what to do
