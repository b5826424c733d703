"""Compare kdjax with numbers that the reference implementations in PyTorch have produced.

    python -m tests.golden_replay PATH [--only PREFIX]

PATH is a folder with the layout of `tests/golden` (its README describes the files). Prints one line per check, then
`N passed, M failed, K skipped`. The exit status is 0 only if nothing failed; it is 2 for an empty selection. A file
with neither a check nor a reason to skip it counts as failed.
"""

import argparse
import fnmatch
import importlib
import pkgutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax

from tests import golden_checks
from tests.golden_checks.api import Check, failure


def known_checks() -> list[tuple]:
    """The `CHECKS` of all modules in `tests/golden_checks`."""
    names = sorted(module.name for module in pkgutil.iter_modules(golden_checks.__path__) if module.name != "api")
    modules = [importlib.import_module(f"{golden_checks.__name__}.{name}") for name in names]
    return [entry for module in modules for entry in module.CHECKS]


def files_of(root: Path, only: str = "") -> list[str]:
    """The files to replay, as sorted paths relative to `root`; README files and hidden ones are left out."""
    paths = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    names = (path.as_posix() for path in paths if path.name != "README.md" and not path.name.startswith("."))
    return sorted(name for name in names if name.startswith(only))


def replay_file(root: Path, name: str, checks: list[tuple]) -> Iterator[Check]:
    """All checks of one file. An exception becomes a failed check."""
    functions = [function for pattern, function in checks if fnmatch.fnmatchcase(name, pattern)]
    if not functions:
        yield Check("whole file", message="unknown file: there is neither a check nor a reason to skip it")
    for function in functions:
        count = 0
        try:
            for check in function(root / name):
                count += 1
                yield check
            if not count:
                yield Check("whole file", message="nothing in it was checked")
        except Exception as error:  # the run goes on with the next function
            yield failure("whole file", error)


def line(name: str, check: Check) -> str:
    numbers = ("-" if x is None else f"{x:.2e}" for x in (check.error, check.tolerance))
    reason = check.skip or check.message
    return "  ".join([f"{name:30}", f"{check.name:60}", *(f"{x:>9}" for x in numbers), check.verdict]) + (
        f": {reason}" if reason else ""
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden_replay", description=__doc__.split("\n\n")[0])
    parser.add_argument("path", type=Path, help="folder with reference files")
    parser.add_argument("--only", default="", metavar="PREFIX", help="only files whose relative path begins so")
    options = parser.parse_args(arguments)
    if not options.path.is_dir():
        print(f"there is no folder {options.path}", file=sys.stderr)
        return 2
    files = files_of(options.path, options.only)
    if not files:
        print(f"no file below {options.path} has a path that begins with {options.only!r}", file=sys.stderr)
        return 2

    # The models take long to compile; a second run finds them here.
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).resolve().parents[1] / ".cache" / "jax"))
    checks, verdicts = known_checks(), Counter()
    print("  ".join([f"{'file':30}", f"{'check':60}", f"{'error':>9}", f"{'tolerance':>9}", "verdict"]))
    for name in files:
        for check in replay_file(options.path, name, checks):
            verdicts[check.verdict] += 1
            print(line(name, check), flush=True)
    print(f"{verdicts['passed']} passed, {verdicts['failed']} failed, {verdicts['skipped']} skipped")
    return 1 if verdicts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
