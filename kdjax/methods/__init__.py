"""Distillation methods: one published method per file, which applies losses to taps.

`kdjax.methods.cwd(weight=10.0)` makes a method; its name is the name of its file. The files beside this one, and those
in `FOLDER/methods` of the folders that the environment variable KDJAX_PLUGINS names, are the methods.
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax

from kdjax import plugins
from kdjax.distill.distiller import Distiller, Loaded
from kdjax.distill.method import Method, schedule
from kdjax.distill.pairing import Rule, auto
from kdjax.distill.teachers import Custom, Student, Teacher
from kdjax.errors import UserError

__all__ = ["Method", "build", "names", "options", "refusal"]


def names() -> list[str]:
    """Returns the names of all methods, in alphabetical order."""
    plugins.extend(__path__, "methods")
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def options(name: str) -> dict[str, Any]:
    """Returns the options of a method with their defaults: those of its `make`, and those of its schedule.

    Args:
      name: of a method.

    Raises:
      UserError: there is no such method.

    Example:
      >>> options("cwd")["weight"]
      10.0
    """
    return {option: p.default for option, p in _parameters(name).items()}


def build(name: str, **chosen: Any) -> Method:
    """Makes a method with the chosen options and its schedule; terms of weight 0 are left out.

    Args:
      name: of a method.
      **chosen: options of its `make`, and `start`, `stop`, `warmup`, `decay` of its schedule.

    Returns:
      The method.

    Raises:
      UserError: unknown method or option, or a value out of range.

    Example:
      >>> dict(build("cwd", weight=5.0).weights)
      {'cwd': 5.0}
    """
    valid = _parameters(name)
    for option in sorted(set(chosen) - set(valid)):
        raise UserError(f"{name}: unknown option {option!r}: its options are {', '.join(valid)}")
    times = {k: chosen.pop(k) for k in inspect.signature(schedule).parameters if k in chosen}
    method = _module(name).make(**chosen)
    weights = {term: float(weight) for term, weight in method.weights.items() if weight}
    try:
        scale = schedule(**times)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return method._replace(weights=weights, scale=scale, name=name)


def refusal(
    name: str,
    student: Student | Loaded,
    teacher: Teacher | Custom | Loaded,
    image_size: tuple[int, int],
    pairing: Rule = auto,
) -> str:
    """The error with which a method with default options refuses a student and a teacher; "" if it accepts them.

    Args:
      name: of a method.
      student, teacher: as `Distiller` takes them.
      image_size: height and width of the network input in pixels.
      pairing: which rows are compared.
    """
    distiller = Distiller(student, teacher, [build(name)], pairing)
    try:
        jax.eval_shape(lambda key: distiller.init(key, image_size), jax.ShapeDtypeStruct((2,), jax.numpy.uint32))
    except UserError as error:
        return str(error)
    return ""


def __getattr__(name: str) -> Callable[..., Method]:
    """The constructor of a method that did not exist when this package was imported."""
    if name.startswith("_") or name not in names():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _module(name)
    return globals()[name]


def _module(name: str) -> ModuleType:
    """The file of a method; its constructor takes the place of the module of the same name in this package."""
    if name not in names():
        raise UserError(f"unknown method {name!r}: the methods are {', '.join(names())}")
    module = importlib.import_module(f"kdjax.methods.{name}")
    if globals().get(name) is module:
        make: Any = functools.wraps(module.make)(functools.partial(build, name))
        parameters = [p for f in (module.make, schedule) for p in inspect.signature(f).parameters.values()]
        make.__signature__ = inspect.Signature(parameters, return_annotation=Method)
        globals()[name] = make
    return module


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    functions = (_module(name).make, schedule)
    return {k: p for f in functions for k, p in inspect.signature(f).parameters.items()}


for _name in names():
    _module(_name)
