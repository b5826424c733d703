"""Reading a config and the settings that the command line overrides."""

import ast
import math
import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from kdjax import resources
from kdjax.errors import UserError, prefix
from kdjax.training import config as settings
from kdjax.training.config import AUTO, Config, unknown_setting

Value = Any  # of a setting

_OVERRIDE = re.compile(r"--config\.([\w-]+(?:\.[\w-]+)*)(?:=(.*))?", re.DOTALL)
# Sub-configs whose keys are those of a detector; the detector checks them.
_OPEN = re.compile(r"(student|teacher|teachers\.[\w-]+)\.options")
# The weight of a method, which may be "auto".
_WEIGHT = re.compile(r"(teachers\.[\w-]+\.)?methods\.[\w-]+\.weight")
# The settings of one of several teachers, which exists once it is named.
_TEACHER = re.compile(r"teachers\.([\w-]+)\.(.+)")


def read(config: str, overrides: Sequence[str] = ()) -> Config:
    """Loads a config and applies overrides of the command line.

    Args:
      config: NAME[:ARGUMENT] of a config that comes with kdjax, or FILE.py[:ARGUMENT].
      overrides: "--config.a.b=value", each setting at most once.

    Returns:
      The config.

    Raises:
      UserError: there is no such config or setting, a value does not have the setting's type, an argument is not an
        override, or the config's `get_config` raised a ValueError.
    """
    made: object = resources.load_config(config)
    if not isinstance(made, ConfigDict):
        raise UserError(f"--config={config}: get_config() returns {type(made).__name__}, not a ConfigDict")
    seen = set()
    for text in overrides:
        matched = _OVERRIDE.fullmatch(text)
        if not matched:
            raise UserError(f"unexpected argument {text!r}; override settings with --config.a.b=value")
        name, value = matched.groups()
        if value is None:
            raise UserError(f"--config.{name}: it has no value: write --config.{name}=value")
        if name in seen:
            raise UserError(f"--config.{name} appears more than once: keep one")
        seen.add(name)
        _override(made, name, value)
    return made


def _override(config: ConfigDict, name: str, text: str) -> None:
    parent, _, key = name.rpartition(".")
    if (of_teacher := _TEACHER.fullmatch(name)) and "teachers" in config:
        teachers: Any = config.teachers
        if of_teacher[1] not in teachers:
            teachers[of_teacher[1]] = settings.teacher()
        if of_teacher[2] == "methods":
            with prefix(f"--config.{name}"):
                teachers[of_teacher[1]].methods = settings.methods(text)
            return
    node: Any = config
    for part in filter(None, parent.split(".")):
        if not isinstance(node, ConfigDict) or part not in node:
            raise unknown_setting(name, config)
        node = node[part]
    if _OPEN.fullmatch(parent) and isinstance(node, ConfigDict):
        node[key] = _literal(text)
        return
    if not isinstance(node, ConfigDict) or key not in node:
        raise unknown_setting(name, config)
    current: Any = node[key]
    if isinstance(current, ConfigDict):
        raise UserError(f"--config.{name}: it is a group of settings: override one of {', '.join(current)}")
    if name == "batch_size":
        node[key] = text if text == AUTO else _parse(f"--config.{name}", text, 1, f"an integer or {AUTO}")
        return
    if _WEIGHT.fullmatch(name):
        node[key] = text if text == AUTO else _weight(f"--config.{name}", text)
        return
    node[key] = _parse(f"--config.{name}", text, current)


def _weight(where: str, text: str) -> float:
    value = _literal(text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: it must be a number or {AUTO}, not {text!r}")
    return float(value)


def _parse(where: str, text: str, current: Value, kind: str = "") -> Value:
    """The value that `text` stands for, of the type that the setting has; `kind` names it in an error."""
    if isinstance(current, str):
        return text
    if isinstance(current, bool):
        if text.lower() not in ("true", "false"):
            raise UserError(f"{where}: it must be True or False, not {text!r}")
        return text.lower() == "true"
    value = _literal(text)
    if settings.of_texts(current):
        given = value if isinstance(value, tuple | list) else text.split(",")
        return tuple(str(entry).strip() for entry in given if str(entry).strip())
    if isinstance(current, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(current, tuple) and not isinstance(value, tuple):
        value = tuple(value) if isinstance(value, list) else (value,)
    if isinstance(current, tuple) and isinstance(value, tuple):
        _check_entries(where, text, value, current)
    kinds = {int: "an integer", float: "a number", tuple: "values between commas"}
    if current is not None and type(value) is not type(current):
        kind = kind or kinds.get(type(current), type(current).__name__)
        raise UserError(f"{where}: it must be {kind}, not {text!r}")
    return value


def _check_entries(where: str, text: str, value: tuple[Value, ...], current: tuple[Value, ...]) -> None:
    """Checks that the entries of a tuple are numbers where those of the setting are."""
    for kinds, what in (((int,), "integers"), ((int, float), "numbers")):
        if current and all(type(entry) in kinds for entry in current):
            if not all(type(entry) in kinds for entry in value):
                raise UserError(f"{where}: it must be {what} between commas, not {text!r}")
            return


def _literal(text: str) -> Value:
    """A Python literal, or the text itself."""
    if text in ("inf", "nan"):
        return math.inf if text == "inf" else math.nan
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
