"""The data.yaml of YOLO folders: names of classes, and where the images of each split are."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from kdjax import files
from kdjax.errors import UserError, listed, printable

SUFFIXES = (".yaml", ".yml")

Node = Any  # of PyYAML
Text = tuple[str, int]  # and its line


class DataYaml(NamedTuple):
    """What a data.yaml says. Each text has its line, from 1."""

    path: Path
    names: list[Text]  # of the classes by index; [] if it has none
    folder: str  # `path`: where the splits are, as it is written there
    splits: dict[str, list[Text]]  # folders and lists of images, by name of the split
    keypoints: int  # numbers of the keypoints that follow each box


def find(folder: Path) -> Path | None:
    """The data.yaml of a folder, or another yaml file with names of classes; None if it has none.

    Raises:
      UserError: it has several.
    """
    usual = [folder / f"data{suffix}" for suffix in SUFFIXES]
    found = next((path for path in usual if path.is_file()), None)
    if found:
        return found
    others = [p for p in sorted(folder.glob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
    others = [p for p in others if not p.name.startswith(".") and _names_classes(p)]
    if len(others) > 1:
        raise UserError(f"{folder}: it has {listed(p.name for p in others)}: name the one to read as root")
    return others[0] if others else None


def _names_classes(path: Path) -> bool:
    try:
        return re.search(rb"^names[ \t]*:", path.read_bytes(), re.MULTILINE) is not None
    except OSError:
        return False


def read(path: Path) -> DataYaml:
    """Reads a data.yaml. Nothing in it is executed or downloaded; names are text, also `no` and `1`.

    Raises:
      UserError: it cannot be read, or is no data.yaml; with its line where that is known.
    """
    import yaml

    try:
        files.head(path, "a data.yaml")
        node: Node = yaml.compose(path.read_bytes(), Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise UserError(f"{where}: not valid yaml: {printable(str(error.problem or error.context), 80)}") from None
    except UserError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # of its characters
        raise UserError(f"{path}: not valid yaml: {printable(' '.join(str(error).split()), 120)}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid yaml: it is nested too deeply") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:1: must have names of classes and splits, as in names: [cat, dog]")
    entries: dict[str, Node] = {}
    for key, value in _pairs(node, path):
        if key in entries and key != "<<":
            raise UserError(f"{path}:{_line(value)}: {key} appears twice")
        entries[key] = value
    names = _names(entries["names"], path) if "names" in entries else []
    if "nc" in entries and names and entries["nc"].value != str(len(names)):
        count = entries["nc"].value if isinstance(entries["nc"].value, str) else "no number"
        raise UserError(
            f"{path}:{_line(entries['nc'])}: nc is {printable(count, 40)}, but names has {len(names)} names"
        )
    folder = entries["path"].value if "path" in entries and isinstance(entries["path"].value, str) else ""
    splits = {key: texts for key, value in entries.items() if key not in _OTHER and (texts := _texts(value))}
    return DataYaml(path, names, folder, splits, _keypoints(entries.get("kpt_shape"), path))


_OTHER = ("names", "nc", "path", "kpt_shape", "download")


def _line(node: Node) -> int:
    return node.start_mark.line + 1


def _pairs(node: Node, path: Path) -> list[tuple[str, Node]]:
    """Keys and values of a mapping."""
    for key, _ in node.value:
        if not isinstance(key.value, str):
            raise UserError(f"{path}:{_line(key)}: a key must be text")
    return [(key.value, value) for key, value in node.value]


def _texts(node: Node) -> list[Text]:
    """A text, or those of a list; none if it is something else."""
    if isinstance(node.value, str):
        return [(node.value, _line(node))] if node.value else []
    if node.id != "sequence" or not all(isinstance(entry.value, str) for entry in node.value):
        return []
    return [(entry.value, _line(entry)) for entry in node.value]


def _names(node: Node, path: Path) -> list[Text]:
    """Names by index, from a list or from a mapping of 0, 1, …."""
    if node.id == "mapping":
        named = _pairs(node, path)
        for key, value in named:
            if not re.fullmatch("[0-9]{1,9}", key):
                raise UserError(f"{path}:{_line(value)}: names has the key {printable(key, 40)!r}: must be 0, 1, …")
        numbered = sorted(((int(key), value) for key, value in named), key=lambda pair: pair[0])
        for place, (number, value) in enumerate(numbered):
            if number != place:
                what = f"has {number} twice" if number < place else f"has no entry {place}"
                raise UserError(f"{path}:{_line(value)}: names {what}: must have 0, 1, … {len(numbered) - 1}")
        nodes = [value for _, value in numbered]
    elif node.id == "sequence":
        nodes = node.value
    else:
        raise UserError(f"{path}:{_line(node)}: names must be a list, or names by number")
    for entry in nodes:
        if not isinstance(entry.value, str):
            raise UserError(f"{path}:{_line(entry)}: a name of a class must be text")
    return [(entry.value.strip(), _line(entry)) for entry in nodes]


def _keypoints(node: Node | None, path: Path) -> int:
    if node is None:
        return 0
    shape = [text for text, _ in _texts(node)]
    if len(shape) != 2 or not re.fullmatch("[0-9]{1,4}", shape[0]) or shape[1] not in ("2", "3"):
        raise UserError(f"{path}:{_line(node)}: kpt_shape must be [number of keypoints, 2 or 3]")
    return int(shape[0]) * int(shape[1])
