"""An ONNX file in onnxruntime: its inputs and outputs, inner tensors as further outputs, batches of any size."""

import dataclasses
import glob
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdjax.errors import UserError, listed

if TYPE_CHECKING:
    import onnxruntime

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """An input of the graph."""

    name: str
    dtype: Any  # of NumPy
    shape: tuple[int | None, ...]  # None: any

    def __str__(self) -> str:
        sides = ", ".join("?" if side is None else str(side) for side in self.shape)
        return f"{self.name!r} {np.dtype(self.dtype)}[{sides}]"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OnnxFile:
    """An ONNX file that is ready to run on the CPU; see `open_file`."""

    path: Path
    image: Entry  # the input of the images, of four axes
    other: Entry | None  # a second input, of the sizes of the images
    channels: int  # axis of the colours: 1 or 3
    outputs: tuple[str, ...]  # names of all outputs, then of the inner tensors that were asked for
    facts: Mapping[str, str]  # the metadata in the file
    fingerprint: str  # hash of the file and of the files in which it keeps weights
    session: "onnxruntime.InferenceSession"

    @property
    def size(self) -> tuple[int | None, int | None]:
        """Height and width of the input; None: any."""
        _, *sides = (side for axis, side in enumerate(self.image.shape) if axis != self.channels)
        return sides[0], sides[1]

    def run(self, images: np.ndarray, sizes: np.ndarray) -> list[dict[str, np.ndarray]]:
        """Runs the file, as often as its batch needs.

        Args:
          images: [B, H, W, 3] in the type and with the colours of the input.
          sizes: i32[B, 2], what the second input gets, if there is one.

        Returns:
          The outputs by name of one part of the batch after the other. Of a file for a fixed number of images the last
          part is filled up; what it says of the filling is cut off, where an output has an axis of images.

        Raises:
          UserError: onnxruntime cannot compute it.
        """
        batch = self.image.shape[0] or len(images)
        parts = []
        for first in range(0, len(images), batch):
            rows = np.minimum(np.arange(first, first + batch), len(images) - 1)
            real = min(batch, len(images) - first)
            taken = images[rows] if self.channels == 3 else np.moveaxis(images[rows], 3, 1)
            feed = {self.image.name: np.ascontiguousarray(taken, self.image.dtype)}
            if self.other is not None:
                feed[self.other.name] = sizes[rows].astype(self.other.dtype)
            try:
                found = list(self.session.run(list(self.outputs), feed))
            except Exception as error:  # its bindings raise many kinds of errors
                raise UserError(f"{self.path}: onnxruntime cannot run it: {str(error).splitlines()[0]}") from error
            whole = [np.asarray(value) for value in found]
            found = (value[:real] if value.ndim and len(value) == batch > real else value for value in whole)
            parts.append(dict(zip(self.outputs, found, strict=True)))
        return parts


def open_file(path: str | Path, *, tensors: Sequence[str] = ()) -> OnnxFile:
    """Opens an ONNX file whose input is images.

    Args:
      path: the file.
      tensors: names of tensors inside the graph that become outputs; those that are outputs already stay as they are.

    Returns:
      The file, with a session on the CPU.

    Raises:
      UserError: onnxruntime is missing or cannot read the file, there is no such tensor, or the inputs are not one of
        images and at most one of their sizes.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path}: running it needs onnxruntime: install the extra kdjax[export]") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # The threads share the cores with the training step: they must not wait actively.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def session(source: str | bytes) -> "onnxruntime.InferenceSession":
        try:
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its bindings raise many kinds of errors
            raise UserError(f"{path}: onnxruntime cannot read it: {str(error).splitlines()[0]}") from error

    opened = session(str(path))
    outputs = [entry.name for entry in opened.get_outputs()]
    if inner := [name for name in tensors if name not in outputs]:
        opened = session(_with_outputs(path, inner))
    image, other, channels = _inputs(path, opened)
    return OnnxFile(
        path=path,
        image=image,
        other=other,
        channels=channels,
        outputs=(*outputs, *inner),
        facts=dict(opened.get_modelmeta().custom_metadata_map),
        fingerprint=_fingerprint(path),
        session=opened,
    )


def _inputs(path: Path, session: "onnxruntime.InferenceSession") -> tuple[Entry, Entry | None, int]:
    """The input of the images, that of sizes if there is one, and the axis of the colours."""
    entries = []
    for entry in session.get_inputs():
        if entry.type not in DTYPES:
            raise UserError(f"{path}: its input {entry.name!r} is of {entry.type}: it must be numbers")
        shape = tuple(side if isinstance(side, int) and side > 0 else None for side in entry.shape)
        entries.append(Entry(entry.name, DTYPES[entry.type], shape))
    images = [entry for entry in entries if len(entry.shape) == 4]
    others = [entry for entry in entries if len(entry.shape) == 2 and entry.shape[1] in (2, None)]
    told = ", ".join(map(str, entries))
    if len(images) != 1 or len(others) > 1 or len(entries) != 1 + len(others):
        raise UserError(f"{path}: its inputs are {told}: they must be one of images and at most one of sizes [B, 2]")
    axes = [axis for axis in (1, 3) if images[0].shape[axis] == 3]
    if len(axes) != 1:
        raise UserError(f"{path}: its input is {told}: it must be [B, 3, H, W] or [B, H, W, 3]")
    if np.issubdtype(images[0].dtype, np.integer) and images[0].dtype != np.uint8:
        raise UserError(f"{path}: its input is {told}: images must be of bytes or floats")
    return images[0], others[0] if others else None, axes[0]


def _with_outputs(path: Path, names: Sequence[str]) -> bytes:
    """The file with inner tensors as further outputs."""
    try:
        import onnx
    except ImportError as error:
        raise UserError(f"{path}: reading inner tensors needs onnx: install the extra kdjax[export]") from error
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf raises many types
        raise UserError(f"{path}: onnx cannot read it: {str(error).splitlines()[0]}") from error
    known = [name for node in model.graph.node for name in node.output]
    for name in names:
        if name not in known:
            outputs = [entry.name for entry in model.graph.output]
            raise UserError(
                f"{path}: there is no tensor {name!r} in it: its outputs are {listed(outputs)}, its last inner tensors "
                f"{listed(list(dict.fromkeys(reversed(known))))}"
            )
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    try:
        return model.SerializeToString()
    except ValueError as error:  # protobuf's limit of 2 GB
        raise UserError(f"{path}: it is too large for reading inner tensors: export it with these outputs") from error


def parts_of(path: Path) -> list[Path]:
    """The files beside an ONNX file that have its weights, where they are not inside."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}*data*"))


def _fingerprint(path: Path) -> str:
    """The hash of the file, and of the names, sizes and contents of files with its weights beside it."""
    digest = hashlib.sha256()
    for part in (path, *parts_of(path)):
        with open(part, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def as_input(
    file: OnnxFile, images: np.ndarray, *, colors: str, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """Images u8[B, H, W, 3] RGB as the file takes them, channels last: (colour - mean) / std, unless it takes bytes."""
    images = images if colors == "RGB" else images[..., ::-1]
    if file.image.dtype == np.uint8:
        return images
    found = images.astype(np.float32)
    if any(mean):
        found -= np.array(mean, np.float32)
    if set(std) != {1.0}:
        found /= np.array(std, np.float32)
    return found
