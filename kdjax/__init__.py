"""kdjax distils big object detectors into small ones, in JAX.

    import kdjax

    student = kdjax.detectors.build("rtmdet_tiny", num_classes=80)
    teacher = kdjax.load("runs/teacher")
    distiller = kdjax.Distiller(student, teacher, [kdjax.methods.cwd(weight=10.0)])
    kdjax.train(config, "runs/mkd")

Names are imported when they are first used: `import kdjax` imports neither JAX nor anything else that is heavy.
"""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdjax import boxes, detectors, losses, methods
    from kdjax.distill import Distiller
    from kdjax.errors import UserError
    from kdjax.inference.model import load
    from kdjax.structs import Detections
    from kdjax.training.run import run as train

    __version__: str

__all__ = [
    "Detections",
    "Distiller",
    "UserError",
    "__version__",
    "boxes",
    "detectors",
    "load",
    "losses",
    "methods",
    "train",
]

# Name -> the module that has it, and its name there; without the latter the name is a module of kdjax.
_HOMES = {
    "Detections": ("kdjax.structs", "Detections"),
    "Distiller": ("kdjax.distill", "Distiller"),
    "UserError": ("kdjax.errors", "UserError"),
    "boxes": ("kdjax.boxes", ""),
    "detectors": ("kdjax.detectors", ""),
    "load": ("kdjax.inference.model", "load"),
    "losses": ("kdjax.losses", ""),
    "methods": ("kdjax.methods", ""),
    "train": ("kdjax.training.run", "run"),
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - each name has a type of its own
    if name == "__version__":
        try:
            value = metadata.version("kdjax")
        except metadata.PackageNotFoundError:  # a checkout that is not installed
            value = "0+unknown"
    elif name in _HOMES:
        home, attribute = _HOMES[name]
        value = importlib.import_module(home)
        value = getattr(value, attribute) if attribute else value
    else:
        raise AttributeError(f"module 'kdjax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
