"""What several tests need: where the team's shared folder is, if this machine has it, and the repository's scripts."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Reference numbers and small data sets.
_SHARED = ROOT.parent / "shared"
SHARED = _SHARED if (_SHARED / "golden").is_dir() else None


def script(path: Path):
    """A file that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
