"""Every config resolves, and every train.py command that the docs and configs show is one that train.py understands."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from kdjax.methods import api
from kdjax.train import config as settings
from kdjax.train import optim

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
TEXTS = [
    *CONFIGS,
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*")),
]


def load(path: Path, *args: str):
    spec = importlib.util.spec_from_file_location("one_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*args)


def commands() -> list[str]:
    """Lines with train.py in them, their continuations joined."""
    found = []
    for path in TEXTS:
        if path.is_file() and path.suffix in (".py", ".md"):
            text = re.sub(r"\\+\n\s*", " ", path.read_text())
            found += [m.group(1).split("#")[0] for m in re.finditer(r"train\.py((?: --[^\s`]+)+)", text)]
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_config_has_known_keys_and_a_possible_schedule(path):
    config = load(path)
    assert settings.unknown_keys(config) == []
    optim.learning_rate(config)
    for name, options in config.methods.items():
        api.build(name, **options)
    has_teacher = bool(config.teacher.detector or config.teacher.weights)
    assert bool(config.methods) == has_teacher or path.parent.name == "distill", "there the command names the teacher"
    assert str(path.relative_to(ROOT)) in path.read_text(), "the docstring shows the command"


@pytest.mark.parametrize("command", commands())
def test_documented_command(command):
    config = None
    for flag in shlex.split(command):
        name, _, value = flag.removeprefix("--").partition("=")
        if "NAME" in value:
            pytest.skip("a pattern, not a command")
        if name == "config":
            path, _, argument = value.partition(":")
            config = load(ROOT / path, *([argument] if argument else []))
        elif name.startswith("config."):
            node = config
            for key in name.split(".")[1:]:
                assert key in node, f"{name} in: train.py {command}"
                node = node[key]
        else:
            assert name in ("workdir", "multihost"), name


def test_several_methods_add_up():
    config = load(ROOT / "configs" / "quickstart.py", "mkd+rtmdet_cwd")
    assert set(config.methods) == {"mkd", "rtmdet_cwd"}
