"""What several tests need: where the team's shared folder is, if this machine has it, flags of XLA, scripts."""

import importlib.metadata
import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Reference numbers and small data sets.
_SHARED = ROOT.parent / "shared"
SHARED = _SHARED if (_SHARED / "golden").is_dir() else None
# XLA's older way of emitting code compiles small programs in two thirds of the time, and code that is not split for
# several cores in nine tenths; jaxlib 0.12 lacks the first flag. XLA reads them when the first program is compiled.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
QUICK *= importlib.metadata.version("jaxlib").startswith("0.10.")


def script(path: Path):
    """A file that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
