"""Folders of images without a json: their images, the file of labels that belongs to each, and what a folder is."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdjax.data import coco, data_yaml, hashes
from kdjax.data.images import SUFFIXES
from kdjax.data.stages import Settings
from kdjax.errors import UserError

VERSION = "1"  # of how labels are read; part of every cache key

SHARED = "its labels are also those of another image with the same name but for the suffix"  # reasons in the log
ORPHAN = "labels without an image"
UNLABELLED = "without a file of labels: taken as an image without objects"

Log = list[dict[str, Any]]
Size = tuple[int, int]  # height, width, px
Parsed = tuple[dict[str, Any], Log, dict[int, str]]  # COCO instances, the log, file and line by annotation id


class Found(NamedTuple):
    """The files of a split. Names are paths relative to `base`, as it is written in messages and in the log."""

    name: str  # of the split's folder, for messages
    base: Path
    images: dict[str, str]  # path by name, in order
    labels: dict[str, str]  # name of the file of labels by name of the image, where there is one
    files: dict[str, str]  # path by name of all other files that are read
    facts: dict[str, Any]  # what the content depends on beside these files, as json can hold it
    notes: Log


def aliases(split: str) -> tuple[str, ...]:
    """The names under which a split is looked for.

    Example:
      >>> aliases("val"), aliases("test")
      (('val', 'valid', 'validation'), ('test',))
    """
    return (split, "valid", "validation") if split == "val" else (split,)


def check_root(root: str) -> Path:
    """The folder that `root` names.

    Raises:
      UserError: there is none.
    """
    base = Path(root).expanduser()
    if not root:
        raise UserError("root is empty: it must name a folder with images and labels")
    if not base.is_dir():
        raise UserError(f"root: there is no folder {base}")
    return base


def below(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> list[str]:
    """The files in a folder and those below it that have a suffix, sorted; also behind links. Hidden ones are left out.

    Raises:
      UserError: a folder cannot be searched.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be searched ({error.strerror})") from None

    found, seen = [], set[str]()
    for where, inside, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(where) in seen:
            inside.clear()
            continue
        seen.add(os.path.realpath(where))
        inside[:] = [name for name in inside if not name.startswith((".", "__MACOSX"))]
        chosen = (name for name in names if name.lower().endswith(tuple(suffixes)) and not name.startswith("."))
        found += [os.path.join(where, name) for name in chosen]
    return sorted(found)


def named(files: Iterable[str], base: Path) -> dict[str, str]:
    """Files by their names relative to a folder; what is outside begins with ../ ."""
    start = os.path.abspath(base)
    names = (Path(os.path.relpath(os.path.abspath(path), start)).as_posix() for path in files)
    return {name: os.path.join(start, name) for name in names}


def beside(path: str, suffix: str, swaps: Mapping[str, Sequence[str]], others: Sequence[str] = ()) -> str | None:
    """The file of labels of an image: in the folder that stands beside that of the images, or with the image.

    Args:
      path: of the image.
      suffix: of files of labels.
      swaps: names of folders of images -> names of folders of labels: the last such part of the path is replaced.
      others: further folders, in which the file has just the image's name.
    """
    folder, name = os.path.split(path)
    name = os.path.splitext(name)[0] + suffix
    parts = folder.split(os.sep)
    place = next((i for i in reversed(range(len(parts))) if parts[i] in swaps), None)
    folders = [folder, *others]
    if place is not None:
        folders[:0] = [os.sep.join([*parts[:place], other, *parts[place + 1 :]]) for other in swaps[parts[place]]]
    return next(filter(os.path.isfile, (os.path.join(one, name) for one in folders)), None)


def paired(images: Mapping[str, str], label: Callable[[str], str | None], base: Path) -> tuple[dict[str, str], Log]:
    """The name of the file of labels of each image that has one, and notes on those that are shared or missing.

    Args:
      images: path by name.
      label: the path of the labels of an image, given that of the image.
      base: the folder to which names are relative.
    """
    start = os.path.abspath(base)
    labels = {name: found for name, path in images.items() if (found := label(path))}
    labels = {name: Path(os.path.relpath(path, start)).as_posix() for name, path in labels.items()}
    log, first = [], {}
    for name in images:
        if name not in labels:
            log += coco.noted(name, [UNLABELLED])
        elif first.setdefault(labels[name], name) != name:
            log += coco.noted(name, [SHARED])
    return labels, log


def orphans(found: Iterable[str], labels: Mapping[str, str], base: Path) -> Log:
    """Notes on files of labels that belong to no image.

    Args:
      found: paths of files of labels.
      labels: the names of those that belong to images.
      base: the folder to which names are relative.
    """
    used = set(labels.values())
    return [note for name in named(found, base) if name not in used for note in coco.noted(name, [ORPHAN])]


def folder_of_images(base: Path, split: str, patterns: Sequence[str], explicit: str) -> Path:
    """The folder of images of a split.

    Args:
      base: the root.
      split: its name.
      patterns: where it is looked for: "images/{}", "{}", ….
      explicit: a path, absolute or relative to the root; "" searches.

    Raises:
      UserError: there is none.
    """
    folders = [base / pattern.format(name) for pattern in patterns for name in aliases(split)]
    if explicit:
        folders = [base / Path(explicit).expanduser()]
    folder = next((one for one in folders if one.is_dir()), None)
    if folder is None:
        searched = ", ".join(map(str, folders))
        raise UserError(
            f"split '{split}': no folder of images: searched {searched}: --images=DIR names it (in a run, "
            "config.data.train_images and val_images)"
        )
    return folder


def text(content: bytes, path: str) -> list[str]:
    """The lines of a text in UTF-8.

    Raises:
      UserError: it is another encoding; with the line.
    """
    try:
        decoded = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: byte {content[error.start]:#04x} is not UTF-8: must be in UTF-8") from None
    return decoded.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def content(path: str, expected: str) -> bytes:
    """The content of a file, which must have a hash.

    Raises:
      UserError: it cannot be read, or has changed.
    """
    try:
        found = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if hashes.of_bytes(found) != expected:
        raise hashes.changed(path)
    return found


def recognised(cfg: Settings, roles: Sequence[str]) -> str:
    """The source that reads `root`, by what lies in it; "coco_folder", which says what is missing, if nothing is known.

    In this order: directories of TFDS, COCO's json, a data.yaml, VOC's xml, YOLO's txt.

    Args:
      cfg: `config.data`; read here: root, and of every split {split}_split and {split}_annotations.
      roles: the splits: 'train', 'val'.
    """
    base = Path(cfg["root"]).expanduser()
    if cfg["root"] and base.is_file() and base.suffix.lower() in data_yaml.SUFFIXES:
        return "yolo_folder"
    if not cfg["root"] or not base.is_dir():
        return "coco_folder"
    given = [cfg[f"{role}_annotations"] for role in roles if cfg[f"{role}_annotations"]]
    if not (base / "annotations").is_dir() and _any(base, ["*/" * depth + "features.json" for depth in range(4)]):
        return "tfds"
    if given:
        kinds = {_kind(base / Path(path).expanduser()) for path in given}
        if len(kinds) == 1:
            return kinds.pop()
    splits = [name for role in roles for name in aliases(cfg[f"{role}_split"]) if _plain(name)]
    if _any(base, ("annotations/*.json", "*/_annotations.coco.json")):
        return "coco_folder"
    if any(base.glob(f"data{suffix}") for suffix in data_yaml.SUFFIXES) and data_yaml.find(base):
        return "yolo_folder"
    folders = [f"{place}{name}" for place in ("", "*/", "VOCdevkit/*/") for name in ("Annotations", "annotations")]
    if _any(base, [f"{folder}/{deep}*.xml" for folder in folders for deep in ("", "*/")]):
        return "voc_folder"
    places = ["", *(f"{split}/" for split in splits), *(f"{split}/*/" for split in splits), "labels/", "labels/*/"]
    if _any(base, [f"{place}*.xml" for place in places]):
        return "voc_folder"
    names = ("labels/*.txt", "labels/*/*.txt", "*.names", "classes.txt")
    if _any(base, [*names, *(f"{split}/{deep}*.txt" for split in splits for deep in ("", "labels/"))]):
        return "yolo_folder"
    return "coco_folder"


def _plain(name: str) -> bool:
    return bool(name) and not set(name) & set("/\\*?[+") and name not in (".", "..")


def _any(base: Path, patterns: Iterable[str]) -> bool:
    return any(True for pattern in patterns for path in base.glob(pattern) if not path.name.startswith("."))


def _kind(path: Path) -> str:
    """The source whose labels a path names."""
    if path.is_dir():
        return "voc_folder" if any(name.endswith(".xml") for name in below(path, (".xml",))[:1]) else "yolo_folder"
    return "coco_folder"
