"""Rules of the house that a machine can check (docs/architecture.md)."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import kdjax
from kdjax import methods

ROOT = Path(kdjax.__file__).parent
CORE = {"errors", "shapes", "structs", "nn", "boxes", "losses", "distill"}
ALLOWED = {
    "errors": set(),
    "plugins": set(),
    "shapes": {"errors"},
    "structs": {"errors"},
    "nn": {"errors", "shapes", "structs"},
    "boxes": {"errors", "shapes", "structs", "nn"},
    "losses": {"errors", "shapes", "structs", "nn", "boxes"},
    "distill": {"errors", "shapes", "structs", "nn", "boxes", "losses"},
    "methods": CORE | {"plugins"},
    "detectors": CORE - {"distill"} | {"plugins"},
    "data": {"errors"},
    "evals": CORE - {"distill"},
    "weights": CORE | {"detectors"},
    "inference": CORE | {"detectors", "weights", "data", "evals"},
    "report": CORE | {"methods", "detectors", "weights", "data", "evals", "inference"},
    "export": CORE | {"detectors", "weights", "data", "evals", "inference"},
    "training": CORE | {"methods", "detectors", "data", "evals", "weights", "inference", "report"},
    "doctor": CORE | {"methods", "detectors", "data", "evals", "weights", "inference", "training"},
}
ALLOWED = {part: used | {"files", "machine", "remote", "resources"} for part, used in ALLOWED.items()}
ALLOWED |= {"files": {"errors"}, "remote": {"errors", "files"}, "resources": {"errors", "remote"}}
ALLOWED |= {"machine": set(), "sharding": set(), "compile_cache": {"files"}}
for _part in ("inference", "training", "doctor"):
    ALLOWED[_part] |= {"sharding", "compile_cache"}
# The commands may import everything.
ALLOWED["commands"] = set(ALLOWED) - {"commands"}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, dotted; `from kdjax import nn` counts as kdjax.nn."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> list[str]:
    return [m.name for m in pkgutil.walk_packages([str(ROOT)], "kdjax.")]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if part in ("__init__", "__main__", "cli"):
        return
    used = {name.split(".")[1] for name in imported(path) if name.startswith("kdjax.")}
    assert used - {part} <= ALLOWED[part], f"{path} imports {used - {part} - ALLOWED[part]}"
    outside = {name.split(".")[0] for name in imported(path)}
    assert part != "data" or not outside & {"jax", "flax", "tensorflow"}
    assert part == "detectors" or "flax" not in outside, "NNX stays inside kdjax/detectors"
    assert part != "losses" or outside <= {
        "jax",
        "numpy",
        "kdjax",
        "math",
        "collections",
        "typing",
        "functools",
    }


def test_nothing_needs_unix_to_import():
    """`fcntl`, `resource` and `pwd` do not exist on Windows."""
    for path in ROOT.rglob("*.py"):
        assert not {"fcntl", "resource", "pwd", "grp", "termios"} & imported(path), path


def test_data_needs_neither_jax_nor_tensorflow():
    code = "import sys, kdjax.data; print(sorted({'jax', 'tensorflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", [n for n in modules() if not n.endswith("__main__")])
def test_public_functions_are_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__, name
    for attribute, value in vars(module).items():
        if not attribute.startswith("_") and inspect.isfunction(value) and value.__module__ == name:
            assert value.__doc__, f"{name}.{attribute} has no docstring"


@pytest.mark.parametrize("name", methods.names())
def test_methods_take_keywords_with_defaults(name):
    parameters = inspect.signature(importlib.import_module(f"kdjax.methods.{name}").make).parameters.values()
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters)
    assert {"weight", "start", "stop", "warmup", "decay"} <= set(methods.options(name))
