"""`import kdjax`: what it offers and what it costs."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import types

import pytest

import kdjax
from tests.shared import ROOT


def test_import_is_lazy():
    code = "import sys, kdjax; print(sorted({'jax', 'numpy', 'flax', 'ml_collections'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", kdjax.__all__)
def test_every_name_is_there(name):
    value = getattr(kdjax, name)
    assert name in dir(kdjax) and value is getattr(kdjax, name)
    assert isinstance(value, types.ModuleType) == (name in ("boxes", "detectors", "losses", "methods"))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'kdjax' has no attribute 'distil'"):
        kdjax.distil  # noqa: B018


def test_names_for_type_checkers_are_those_of_the_face():
    """What is imported under TYPE_CHECKING, what is imported when used, and `__all__` are the same."""
    text = (ROOT / "kdjax" / "__init__.py").read_text()
    block = text.partition("if TYPE_CHECKING:\n")[2].partition("__all__")[0]
    space: dict = {}
    exec("\n".join(line.strip() for line in block.splitlines()), space)
    typed = {name for name in space if not name.startswith("__") or name == "__annotations__"}
    assert typed - {"__annotations__"} == set(kdjax._HOMES) == set(kdjax.__all__) - {"__version__"}
    for name in kdjax._HOMES:
        assert space[name] is getattr(kdjax, name)


def test_the_version_is_said_once():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert kdjax.__version__ == importlib.metadata.version("kdjax") == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_example_of_the_readme_runs():
    text = (ROOT / "README.md").read_text()
    [block] = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(block, names)
    assert set(names["adapters"]) == {"cwd", "pfi"}
