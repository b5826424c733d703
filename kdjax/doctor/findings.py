"""What the doctor says."""

from typing import NamedTuple

FINE, LOOK, FAULT = "fine", "look", "fault"


class Finding(NamedTuple):
    """One thing that was looked at."""

    level: str  # FINE, LOOK (worth a thought) or FAULT
    what: str  # a word or two
    said: str  # a sentence with the metrics, and what to do unless all is fine
