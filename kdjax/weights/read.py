"""Reads PyTorch state dicts from files; code inside a file is never run."""

import pickle
import re
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_safetensors

from kdjax.detectors.api import State
from kdjax.errors import UserError
from kdjax.structs import PyTree
from kdjax.weights import yolox

FORMATS = (".npz", ".safetensors", ".pth", ".onnx")


def read_checkpoint(path: str | Path) -> tuple[State, list[str] | None]:
    """Reads a state dict, and the names of the classes if the file has them.

    Where a checkpoint of mmengine holds `state_dict` and `ema_state_dict`, the first is taken: mmengine swaps them when
    it saves, so that the first holds the averaged weights.

    Args:
      path: `.npz`, `.safetensors`, `.pth` (needs the extra `kdjax[torch]`), or `.onnx` of YOLOX (needs onnx).

    Returns:
      name -> array, and the classes in mmengine's or mmdetection 2's `meta` of a `.pth`, else None.

    Raises:
      UserError: the file is missing, of another kind, or broken, or PyTorch or onnx is needed and not installed.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: unknown kind of weights: the kinds are {', '.join(FORMATS)}")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    if path.suffix == ".onnx":
        return yolox.load_onnx(path), None
    if path.suffix == ".pth":
        return _read_pth(path)
    try:
        return _unwrap(_read_npz(path) if path.suffix == ".npz" else load_safetensors(path)), None
    except (OSError, ValueError, KeyError, EOFError, SafetensorError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: the weights cannot be read: {error}") from error


def _read_npz(path: Path) -> State:
    if not zipfile.is_zipfile(path):  # a single array, or a pickle; neither is opened
        raise ValueError("it is not an npz file, or it is truncated")
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        state = {name: arrays[name] for name in arrays.files}
    odd = [name for name, value in state.items() if value.dtype.kind not in "biuf"]
    if odd:
        raise ValueError(f"{odd[0]} is not an array of numbers")
    return state


def _read_pth(path: Path) -> tuple[State, list[str] | None]:
    try:
        import torch  # pyright: ignore[reportMissingImports] - optional, and missing on the newest Pythons
    except ImportError as error:
        raise UserError(
            f"{path}: reading it needs PyTorch: install the extra kdjax[torch], or convert the file to .safetensors or "
            ".npz"
        ) from error
    try:
        with warnings.catch_warnings(action="ignore"):  # of old formats; their content is checked all the same
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it needs {needed[1]}" if needed else "it is not a PyTorch file, or holds other objects"
        raise UserError(
            f"{path}: it cannot be read as weights alone: {what}, and kdjax never runs code from a file: save its "
            "state_dict by itself where it was written"
        ) from error
    except Exception as error:  # torch's exceptions differ from version to version
        reason = str(error).partition(". ")[0].strip() or "it is empty"
        raise UserError(f"{path}: the weights cannot be read: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: the file holds a {type(checkpoint).__name__}, not weights by name")

    def arrays(tree: PyTree) -> PyTree:
        if isinstance(tree, dict):
            return {name: arrays(value) for name, value in tree.items() if isinstance(value, dict | torch.Tensor)}
        return (tree.float() if tree.is_floating_point() else tree).detach().numpy()

    meta = checkpoint.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    data = meta.get("dataset_meta")
    data = data if isinstance(data, dict) else meta
    classes = data.get("classes") or data.get("CLASSES")
    names = [str(name) for name in classes] if isinstance(classes, list | tuple) else None
    return _unwrap(arrays(checkpoint)), names


def _unwrap(checkpoint: dict[str, Any]) -> State:
    """The state dict inside a checkpoint, nested or with its name as a prefix."""
    for wrapper in ("state_dict", "ema_state_dict", "model"):  # the last one is YOLOX's authors'
        if isinstance(checkpoint.get(wrapper), dict):
            return checkpoint[wrapper]
        inner = {
            name[len(wrapper) + 1 :]: value
            for name, value in checkpoint.items()
            if name.startswith((f"{wrapper}.", f"{wrapper}/"))
        }
        if inner:
            return inner
    return checkpoint
