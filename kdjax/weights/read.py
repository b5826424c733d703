"""Reads state dicts from the files of other programs; code inside a file is never run."""

import codecs
import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

from kdjax import files
from kdjax.detectors.api import State
from kdjax.errors import UserError, prefix
from kdjax.weights import containers, folded, wrappers

TORCH = (".pth", ".pt", ".ckpt", ".bin", ".tar")
FORMATS = (".npz", ".safetensors", *TORCH, ".onnx")
INDEX = ".index.json"
# A part of sharded weights, as in model-00001-of-00002.safetensors.
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)")


def read_checkpoint(path: str | Path) -> tuple[State, list[str] | None]:
    """Reads a state dict, and the names of the classes if the file has them.

    What the file is, its content tells, not its suffix. Wrappers around the weights are removed
    (`kdjax.weights.wrappers.unwrap`). Where a checkpoint of mmengine holds `state_dict` and `ema_state_dict`, the first
    is taken: mmengine swaps them when it saves, so that the first holds the averaged weights.

    Args:
      path: `.npz`; `.safetensors`; `.pth`, `.pt`, `.ckpt`, `.bin` or `.tar` of PyTorch (needs the extra
        `kdjax[torch]`); the index of sharded ones (`model.safetensors.index.json`), or a folder with one; or `.onnx` of
        YOLOX or RTMDet (needs onnx).

    Returns:
      name -> array, and the classes in mmengine's or mmdetection 2's `meta` of a PyTorch file, else None.

    Raises:
      UserError: the file is missing, of another kind, or broken, or PyTorch or onnx is needed and not installed.

    Warns:
      UserWarning: the file holds the weights and an average of them, and it is not known which is better.
    """
    path = Path(path)
    if path.is_dir():
        path = find_index(path)
    name = path.name.lower()
    if not name.endswith((*FORMATS, INDEX)):
        raise UserError(f"{path}: unknown kind of weights: the kinds are {', '.join((*FORMATS, INDEX))}")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    if (part := _PART.fullmatch(path.name)) and int(part[3]) > 1:
        start, number, count, suffix = part.groups()
        raise UserError(
            f"{path}: it is part {int(number)} of {int(count)} of the weights: give their index, "
            f"{start}{suffix}{INDEX} beside it"
        )
    if name.endswith(INDEX):
        return _read_parts(path), None
    flat, classes = _read_file(path)
    with prefix(str(path)):
        state = {key: containers.array(key, value) for key, value in wrappers.unwrap(flat).items()}
        if not state:
            raise UserError("it holds no arrays by name")
    return state, classes


def find_index(folder: Path) -> Path:
    """The index of the sharded weights in a folder.

    Raises:
      UserError: the folder has none, or several.
    """
    found = sorted(folder.glob(f"*{INDEX}"))
    if len(found) != 1:
        what = "several indices" if found else "no index"
        raise UserError(f"{folder}: the folder has {what} of weights (*{INDEX}): choose a file of weights")
    return found[0]


def _read_file(path: Path) -> tuple[dict[str, Any], list[str] | None]:
    """All that one file holds by name (arrays, or tensors of PyTorch), and the names of the classes if it has them."""
    head = files.head(path, "weights")
    with prefix(str(path)):
        containers.check_size(path)
        if path.suffix.lower() == ".onnx" and not _text(head):
            return folded.load_onnx(path), None
        if head.startswith(b"PK"):
            members = containers.check_archive(path)
            if not any(name.split("/")[-1] == "data.pkl" for name in members):
                return containers.read_npz(path), None
            return _read_torch(path)
        if head[8:9] == b"{":
            return containers.read_safetensors(path), None
        if head[:1] == b"\x80" or head[257:262] == b"ustar":
            return _read_torch(path)
        if text := _text(head):
            raise UserError(f"it is a text file, not weights: it begins with {text!r}")
        raise UserError("it is not a file of npz, safetensors or PyTorch, or its beginning is damaged")


def _text(head: bytes) -> str:
    """The beginning of a text; "" if not all bytes are of printable text."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # the last letter may be cut
    except UnicodeDecodeError:
        return ""
    return text.strip()[:40] if all(letter.isprintable() or letter.isspace() for letter in text) else ""


def _read_parts(index: Path) -> State:
    """Sharded weights; every part holds exactly the arrays that the index lists for it."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise TypeError("weight_map is not a file for each array")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        files.head(index, "weights")  # tells what it is instead
        raise UserError(f"{index}: it cannot be read as the index of sharded weights: {error!r}") from error
    state: dict[str, Any] = {}
    for file in sorted(set(listed.values())):
        if Path(file).name != file or "\\" in file:
            raise UserError(f"{index}: it names {file!r}: the parts must lie beside their index")
        part = index.parent / file
        if not part.is_file():
            raise UserError(f"{part}: there is no such file, but {index.name} names it")
        found, _ = _read_file(part)
        names = {name for name, where in listed.items() if where == file}
        if odd := sorted(names ^ set(found)):
            what = "lacks" if odd[0] in names else "holds"
            raise UserError(f"{part}: it is not the file that {index.name} describes: it {what} {odd[0]}")
        state |= found
    with prefix(str(index)):
        return {key: containers.array(key, value) for key, value in wrappers.unwrap(state).items()}


def _read_torch(path: Path) -> tuple[dict[str, Any], list[str] | None]:
    try:
        import torch  # pyright: ignore[reportMissingImports] - optional, and missing on the newest Pythons
    except ImportError as error:
        raise UserError(
            "reading it needs PyTorch: install the extra kdjax[torch], or convert the file to .safetensors or .npz"
        ) from error
    try:
        # Warnings of old formats are left out: their content is checked all the same. PyTorch would go by the suffix of
        # a path.
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it needs {needed[1]}" if needed else "it is not a PyTorch file, or holds other objects"
        raise UserError(
            f"it cannot be loaded safely: {what}, and kdjax never runs code from a file: save only its state_dict, "
            "with the program that wrote it"
        ) from error
    except Exception as error:  # torch's exceptions differ from version to version
        if "TorchScript" in str(error):
            raise UserError(
                "it is a TorchScript program, and kdjax never runs code from a file: save only its state_dict"
            ) from error
        reason = str(error).partition(". ")[0].strip() or type(error).__name__
        raise UserError(f"the weights cannot be read: the file is damaged or of another kind: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"the file holds a {type(checkpoint).__name__}, not weights by name")
    tensors = wrappers.flatten(checkpoint, torch.Tensor)
    dense = [value for value in tensors.values() if value.layout == torch.strided and value.device.type != "meta"]
    containers.check_declared(path, sum(value.numel() * value.element_size() for value in dense))
    return tensors, _classes(checkpoint.get("meta"))


def _classes(meta: object) -> list[str] | None:
    """The names of the classes in the `meta` of mmengine (`dataset_meta`) or of mmdetection 2."""
    if not isinstance(meta, dict):
        return None
    data = meta.get("dataset_meta")
    data = data if isinstance(data, dict) else meta
    for key in ("classes", "CLASSES"):
        names = data.get(key)
        if isinstance(names, list | tuple) and names and all(isinstance(name, str | int) for name in names):
            return [str(name) for name in names]
    return None
