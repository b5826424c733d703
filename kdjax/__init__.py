"""kdjax distils big object detectors into small ones, in JAX.

    import kdjax

    student = kdjax.detectors.build("rtmdet_tiny", num_classes=80)
    model = kdjax.load("runs/mkd/student")
    kdjax.train(config, "runs/mkd")

Names are imported when they are first used: `import kdjax` imports neither JAX nor anything else that is heavy.
"""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdjax import boxes, detectors, losses, methods
    from kdjax.errors import UserError
    from kdjax.inference.model import load
    from kdjax.structs import Detections

    __version__: str

__all__ = ["Detections", "UserError", "__version__", "boxes", "detectors", "load", "losses", "methods"]

# Name -> the module that has it; None: the name is itself a module of kdjax.
_HOMES = {
    "Detections": "kdjax.structs",
    "UserError": "kdjax.errors",
    "boxes": None,
    "detectors": None,
    "load": "kdjax.inference.model",
    "losses": None,
    "methods": None,
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            value = metadata.version("kdjax")
        except metadata.PackageNotFoundError:  # a checkout that is not installed
            value = "0+unknown"
    elif name in _HOMES:
        home = _HOMES[name]
        value = getattr(importlib.import_module(home), name) if home else importlib.import_module(f"kdjax.{name}")
    else:
        raise AttributeError(f"module 'kdjax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
