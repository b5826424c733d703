"""Configs and models that come with kdjax, by name.

A wheel holds them as `kdjax/configs` and `kdjax/assets`; in a checkout they are `configs/` and `assets/` beside the
package.
"""

import contextlib
import difflib
import importlib.util
import inspect
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from kdjax import remote
from kdjax.errors import UserError


class Config(Protocol):
    """The settings of a run, or a part of them: a `ConfigDict`; each setting is an attribute."""

    def __getattr__(self, name: str, /) -> Any: ...  # noqa: ANN401 - a setting has any type

    def __setattr__(self, name: str, value: Any, /) -> None: ...  # noqa: ANN401

    def __getitem__(self, key: str, /) -> Any: ...  # noqa: ANN401

    def __setitem__(self, key: str, value: Any, /) -> None: ...  # noqa: ANN401

    def __contains__(self, key: str, /) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...


def _folder(name: str) -> Path:
    installed = Path(__file__).parent / name
    return installed if installed.is_dir() else Path(__file__).parents[1] / name


CONFIGS, ASSETS = _folder("configs"), _folder("assets")


def config_names() -> list[str]:
    """The configs that come with kdjax.

    Returns:
      Names such as "quickstart" and "distill/dense", sorted.
    """
    files = (path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob("*.py"))
    return sorted(path.as_posix() for path in files if not path.name.startswith("_"))


def config_file(text: str) -> tuple[Path, str | None]:
    """Finds a config by its name or file.

    Args:
      text: "NAME" or "FILE.py", with ":ARGUMENT" if the config takes one. "configs/NAME.py" is also understood where
        there is no such file.

    Returns:
      The file, and the argument or None.

    Raises:
      UserError: there is no such config.

    Example:
      >>> config_file("distill/mkd_rtmdet:tiny,s")[1]
      'tiny,s'
    """
    name, *argument = re.split(r":(?![\\/])", text, maxsplit=1)  # not the colon of a drive
    if name.endswith(".py") and Path(name).is_file():
        return Path(name), argument[0] if argument else None
    short = name.replace("\\", "/").removeprefix("./").removeprefix("configs/").removesuffix(".py")
    names = config_names()
    if short in names:
        return CONFIGS / f"{short}.py", argument[0] if argument else None
    close = difflib.get_close_matches(short, names, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    if name.endswith(".py"):
        raise UserError(f"there is no file {name}{hint}")
    raise UserError(f"unknown config {name!r}{hint}: configs are files FILE.py, or one of {', '.join(names)}")


def load_config(text: str) -> Config:
    """Calls `get_config` of a config; configs use it to start from another config.

    Args:
      text: as for `config_file`.

    Returns:
      The config.

    Raises:
      UserError: there is no such config, it is not valid Python or has no `get_config`, or that refuses its argument.
    """
    path, argument = config_file(text)
    spec = importlib.util.spec_from_file_location(f"kdjax_config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _mistakes_of(path, text):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path}: it does not define get_config()")
    if argument is not None and not inspect.signature(module.get_config).parameters:
        raise UserError(f"{path}: it takes no argument, but was given {argument!r}")
    with _mistakes_of(path, text):
        return module.get_config() if argument is None else module.get_config(argument)


@contextlib.contextmanager
def _mistakes_of(path: Path, text: str) -> Iterator[None]:
    """Turns what Python raises of a mistake in a config into a sentence, with the line where it helps.

    Raises:
      UserError: the config is not valid Python, refuses its argument, or sets what does not exist or has another type.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(f"{text}: {error}") from error
    except SyntaxError as error:
        raise UserError(f"{path}: line {error.lineno}: {error.msg}") from error
    except (AttributeError, ImportError, KeyError, NameError, TypeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        of_config = str(path.absolute())  # Python names a file by its absolute path
        lines = [frame.lineno for frame in frames if frame.filename == of_config]
        if not lines or (
            frames[-1].filename != of_config and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)
        ):
            raise  # a mistake of kdjax
        raise UserError(f"{path}: line {lines[-1]}: {type(error).__name__}: {error}") from error


def model_path(path: str | Path) -> Path:
    """The folder of a model that comes with kdjax, or the path unchanged.

    Args:
      path: a path, the name of such a model, "quickstart_teacher", or an address in an object store.

    Returns:
      The path itself if it exists or is not such a name; of an address its copy on this machine.

    Raises:
      UserError: there is nothing at an address, or it cannot be read.

    Example:
      >>> model_path("quickstart_teacher").name, str(model_path("runs/a/student"))
      ('quickstart_teacher', 'runs/a/student')
    """
    path = Path(remote.local(path))
    bundled = ASSETS / (path.name if path.parent == Path("assets") else path)
    known = not path.exists() and not path.is_absolute() and len(bundled.relative_to(ASSETS).parts) == 1
    return bundled if known and bundled.is_dir() else path
