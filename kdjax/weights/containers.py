"""The arrays in npz and safetensors files and in tensors of PyTorch, none larger than the file can hold."""

import math
import os
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize

from kdjax.errors import UserError

# The types of safetensors. Those that NumPy lacks come from ml_dtypes, which JAX brings; float4 and float6 share bytes.
_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    **{f"{sign}{bits}": np.dtype(f"{sign.lower()}{bits // 8}") for sign in "IU" for bits in (8, 16, 32, 64)},
    "BOOL": np.bool_,
}
# A file may unpack to this many bytes, or to this many times its size. Weights that were trained shrink by less than a
# half.
_SMALL, _RATIO = 2**26, 32
_NPY = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def check_size(path: Path) -> None:
    """Checks that a file fits into the memory of the machine.

    Raises:
      UserError: it does not.
    """
    size = path.stat().st_size
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    if size > have:
        raise UserError(f"the file has {_bytes(size)}, more than the memory of this machine ({_bytes(have)})")


def check_declared(path: Path, size: int) -> None:
    """Checks that the arrays which a file declares are not far larger than the file.

    Args:
      path: the file.
      size: of all its arrays in bytes.

    Raises:
      UserError: they are.
    """
    have = path.stat().st_size
    if size > max(_SMALL, _RATIO * have):
        raise UserError(f"its arrays would take {_bytes(size)}, but the file has {_bytes(have)}: these are no weights")


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def check_archive(path: Path) -> list[str]:
    """Checks a zip archive before anything is unpacked, and every byte in it with the checksums that it holds.

    Returns:
      The names of its members.

    Raises:
      UserError: it is damaged, has two members of one name, or would be far larger than the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            check_declared(path, sum(member.file_size for member in members))
            # PyTorch does not verify the checksums, and can leave them out: all are 0 then.
            damaged = archive.testzip() if any(member.CRC for member in members) else None
    except UserError:
        raise
    except Exception as error:  # zipfile raises many types for a damaged archive
        raise UserError(f"the weights cannot be read: the file is damaged or cut off: {error}") from error
    if damaged is not None:
        raise UserError(f"the weights cannot be read: the file is damaged: the checksum of {damaged} differs")
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise UserError(f"the weights cannot be read: two of its arrays have the name {double.removesuffix('.npy')}")
    return names


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file that `check_archive` has seen; no pickle is opened.

    Raises:
      UserError: a member is not an array of numbers, or its header does not fit its size.
    """
    state = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name == member.filename:
                raise UserError(f"it is not an npz file: it holds {name}, which is no .npy: unpack it if it is a zip")
            with archive.open(member) as file:
                try:
                    version = np.lib.format.read_magic(file)
                    if version not in _NPY:
                        raise ValueError(f"version {version} of npy is not used for numbers")
                    shape, fortran, dtype = _NPY[version](file)
                except Exception as error:  # tokenize, SyntaxError, MemoryError, ...
                    raise UserError(f"the weights cannot be read: the header of {name} is damaged: {error}") from error
                if dtype.hasobject:
                    raise UserError(f"{name} holds Python objects, and kdjax never runs code from a file")
                if dtype.kind not in "biuf":
                    raise UserError(
                        f"{name} is not an array of numbers but of {dtype}: store bfloat16 and float8 as float32"
                    )
                declared, stored = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
                if declared != stored or min(shape, default=0) < 0:
                    sizes = f"{_bytes(declared)} ({shape} of {dtype}), but the file holds {_bytes(stored)}"
                    raise UserError(f"the header of {name} declares {sizes}")
                values = np.frombuffer(file.read(), dtype)
            state[name] = values.reshape(shape, order="F" if fortran else "C")
    return state


def read_safetensors(source: Path | bytes) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file.

    Args:
      source: the file, or its content.

    Raises:
      UserError: it is damaged, or an array has a type that cannot be read.
    """
    content = source if isinstance(source, bytes) else source.read_bytes()
    try:
        stored = deserialize(content)
    except SafetensorError as error:
        raise UserError(f"the weights cannot be read: the file is damaged or cut off: {error}") from error
    state = {}
    for name, entry in stored:
        if entry["dtype"] not in _TYPES:
            raise UserError(f"{name} has the type {entry['dtype']}, which kdjax does not read: store it as float32")
        try:
            state[name] = np.frombuffer(entry["data"], _TYPES[entry["dtype"]]).reshape(entry["shape"])
        except (ValueError, OverflowError) as error:  # an empty array with a side beyond 2^63
            raise UserError(f"the weights cannot be read: {name}: {error}") from error
    return state


def array(name: str, value: Any) -> np.ndarray:  # noqa: ANN401 - a tensor of PyTorch, which is optional
    """The array of a value that a file has by name.

    Args:
      name: for the message.
      value: an array, or a tensor of PyTorch.

    Raises:
      UserError: a tensor holds no numbers that NumPy could have.
    """
    if isinstance(value, np.ndarray):
        return value
    kind = str(value.layout).removeprefix("torch.")
    if value.device.type == "meta":
        raise UserError(f"{name} is a tensor without values (device meta): save the weights after they are loaded")
    if kind != "strided":
        raise UserError(f"{name} is a sparse tensor ({kind}): save it dense, with tensor.to_dense()")
    if value.is_quantized or value.is_complex():
        raise UserError(f"{name} has the type {str(value.dtype).removeprefix('torch.')}: save it as float32")
    try:
        value = value.detach()
        return (value.float() if value.is_floating_point() and value.element_size() < 4 else value).numpy()
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{name} is not a tensor of numbers: {error}") from error
