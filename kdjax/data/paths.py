"""The files behind the names of images in a json."""

import functools
import os
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterable
from pathlib import Path

from kdjax.errors import UserError

_Found = Callable[[str], str | None]


def located(file_names: Iterable[str], folder: Path, name: str) -> dict[str, str]:
    """The path of every image, by its file_name; some tools write names that begin with the folder of the split.

    A name whose file has the same text in another Unicode form (macOS decomposes letters) is that file.

    Args:
      file_names: of the json.
      folder: of the images.
      name: the json's name, for messages.

    Raises:
      UserError: images are missing, or two names are one file.
    """
    paths, missing, folders = {}, [], (str(folder), str(folder.parent))

    def exact(file_name: str) -> str | None:
        # Strings, because a Path takes longer than the file system.
        return next(filter(os.path.isfile, (os.path.join(where, file_name) for where in folders)), None)

    listing = functools.cache(_listing)
    for file_name in file_names:
        path = exact(file_name)
        if path is None and not file_name.isascii():
            path = next(filter(None, (_in_another_form(where, file_name, listing) for where in folders)), None)
        if path is None:
            missing.append(file_name)
        else:
            paths[file_name] = path
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{name}: {missing[0]}{more}: no such file in {folder}{_hint(missing[0], exact, folders)}")
    _refuse_twins(paths, name)
    return paths


def in_another_form(file_name: str, path: str) -> bool:
    """Whether a path from `located` has the name in another Unicode form."""
    return not path.endswith(file_name)


def _listing(folder: str) -> dict[str, str | None]:
    """Paths in a folder by their composed names; None where two have the same."""
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    paths: dict[str, str | None] = {}
    for name in names:
        composed = unicodedata.normalize("NFC", name)
        paths[composed] = None if composed in paths else os.path.join(folder, name)
    return paths


def _in_another_form(where: str, file_name: str, listing: Callable[[str], dict[str, str | None]]) -> str | None:
    """The file that a name means if Unicode forms do not matter."""
    path: str | None = where
    for part in Path(file_name).parts:
        exact = os.path.join(path, part)
        path = exact if os.path.exists(exact) else listing(path).get(unicodedata.normalize("NFC", part))
        if path is None:
            return None
    return path if os.path.isfile(path) else None


def _hint(file_name: str, exact: _Found, folders: Iterable[str]) -> str:
    """What a name without a file is instead, or what would be right, if that can be told."""
    for path in (os.path.join(where, file_name) for where in folders):
        if os.path.isdir(path):
            return ": it is a folder"
        if os.path.islink(path):
            return ": it is a link to no file"
    if "\\" in file_name:
        slashed = file_name.replace("\\", "/")
        return f": the name has backslashes: write {slashed}" if exact(slashed) else ": the name has backslashes"
    others = (file_name.strip(), urllib.parse.unquote(file_name), file_name.rpartition("/")[2], file_name.lstrip("/"))
    return next((f": there is {other}: write this name" for other in others if other and exact(other)), "")


def _refuse_twins(paths: dict[str, str], name: str) -> None:
    """Refuses one file under two names, as a.png and ./a.png; links and copies are other files."""
    seen: dict[str, list[str]] = {}
    for file_name, path in paths.items():
        like = seen.setdefault(unicodedata.normalize("NFC", os.path.normpath(path)).casefold(), [])
        for other in like:
            if os.path.samefile(path, paths[other]):
                raise UserError(f"{name}: {other} and {file_name} are one file: list each image once")
        like.append(file_name)
