"""Folders of the user's own methods and detectors, named by the environment variable KDJAX_PLUGINS."""

import os
import warnings
from collections.abc import MutableSequence
from pathlib import Path

VARIABLE = "KDJAX_PLUGINS"


def extend(package_path: MutableSequence[str], kind: str) -> None:
    """Appends the user's folders to the `__path__` of a package, so that their modules are imported as its own.

    KDJAX_PLUGINS holds one folder, or several separated by `os.pathsep`. Files in `FOLDER/methods` are methods, files
    in `FOLDER/detectors` are families of detectors. A module of kdjax hides a module of the same name in a folder.

    Args:
      package_path: `__path__` of the package; changed in place. Folders that it has already are not repeated.
      kind: name of the subfolder, "methods" or "detectors".

    Warns:
      UserWarning: a folder does not exist.
    """
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        folder = Path(name).expanduser().absolute()
        if not folder.is_dir():
            warnings.warn(f"{VARIABLE}: there is no folder {folder}", stacklevel=2)
        elif (folder / kind).is_dir() and str(folder / kind) not in package_path:
            package_path.append(str(folder / kind))
