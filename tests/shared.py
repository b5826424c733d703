"""Where the team's shared folder (reference numbers, small data sets) is, if this machine has it."""

from pathlib import Path

_SHARED = Path(__file__).resolve().parents[1].parent / "shared"
SHARED = _SHARED if (_SHARED / "golden").is_dir() else None
