"""OpenVINO's files, a graph in .xml and its weights in a .bin beside it; needs `kdjax[openvino]`.

OpenVINO itself converts them from ONNX files.
"""

import functools
import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from kdjax.errors import UserError

SECTION = "kdjax"  # of the file's runtime information (rt_info) that holds the metadata


def write(source: str | Path, path: str | Path, *, half: bool = False) -> None:
    """Writes an ONNX file as OpenVINO's.

    Args:
      source: the ONNX file, in float32, or in int8, of a model that was trained for it or from
        `kdjax.export.onnx.quantise`.
      path: the .xml; the weights go to the .bin of the same name.
      half: whether weights are stored as float16; they are computed with in the precision of the device.

    Raises:
      UserError: OpenVINO cannot convert the ONNX file.
    """
    try:
        made = _package().convert_model(str(source))
    except Exception as error:  # its bindings raise many kinds of errors
        raise UserError(f"OpenVINO cannot convert it: {_reason(error)}") from error
    _package().save_model(made, str(path), compress_to_fp16=half)


def _package() -> Any:  # noqa: ANN401 - a module
    """The package without its telemetry, which would start processes that report to its makers.

    Some of its parts are imported only when a file is converted, so the telemetry stays away as long as Python runs.
    """
    sys.modules.setdefault("openvino_telemetry", cast(Any, None))  # which OpenVINO takes for not installed
    return importlib.import_module("openvino")


@functools.cache
def _core() -> Any:  # noqa: ANN401 - openvino.Core
    """One for all files: each brings a stack of its own for signals, and puts back the one it found when it goes.

    Of two, the second may put back that of the first, which is gone by then, and the next signal ends the process.
    """
    return _package().Core()


def _read(path: str | Path) -> Any:  # noqa: ANN401 - openvino.Model
    path = Path(path)
    # Of a file in no format that it knows OpenVINO asks the readers of all formats, which print what they think of it.
    if not re.match(rb"\s*(<\?xml[^>]*>\s*)?<net\b", path.read_bytes()[:1000]):
        raise UserError(f"{path}: OpenVINO cannot read it: it does not begin as a network in xml does")
    if not path.with_suffix(".bin").is_file():
        raise UserError(f"{path}: the weights, {path.with_suffix('.bin').name}, do not lie beside it")
    try:
        return _core().read_model(str(path))
    except Exception as error:  # its bindings raise many kinds of errors
        raise UserError(f"{path}: OpenVINO cannot read it: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The line of an error of OpenVINO that says what is wrong: the first ones name lines of its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not re.match(r"Exception from|Check '", line)), type(error).__name__)


def compiled(path: str | Path, *, threads: int = 0) -> Any:  # noqa: ANN401 - openvino.CompiledModel
    """A file that is ready to run on the CPU, in float32 where it is not int8.

    Args:
      path: the .xml.
      threads: that compute; 0 leaves it to OpenVINO.

    Raises:
      UserError: OpenVINO cannot read or compile it.
    """
    # Where the CPU has bfloat16, OpenVINO would compute with it.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    settings |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
    read = _read(path)
    try:
        return _core().compile_model(read, "CPU", settings)
    except Exception as error:  # its bindings raise many kinds of errors
        raise UserError(f"{path}: OpenVINO cannot compile it: {_reason(error)}") from error


def runner(path: str | Path) -> Callable[..., Sequence[np.ndarray]]:
    """A function from the inputs of an OpenVINO file to its outputs, both in order."""
    running = compiled(path)

    def call(*inputs: np.ndarray) -> Sequence[np.ndarray]:
        found = running(list(inputs))
        return [found[place] for place in range(len(running.outputs))]

    return call


def add_metadata(path: str | Path, facts: Mapping[str, str]) -> None:
    """Writes facts into a file's runtime information; names are words with _ between them."""
    path = Path(path)
    read = _read(path)
    for name, value in facts.items():
        read.set_rt_info(value, [SECTION, re.sub(r"\W+", "_", name)])
    told = path.with_name(f"told.{path.name}")
    _package().save_model(read, str(told), compress_to_fp16=False)  # weights stay as they are stored
    del read  # it has the weights open
    for suffix in (".bin", ".xml"):
        told.with_suffix(suffix).replace(path.with_suffix(suffix))


def metadata(path: str | Path) -> dict[str, str]:
    """The facts that `add_metadata` wrote into a file; {} if it is of another program."""
    read = _read(path)
    if not read.has_rt_info([SECTION]):
        return {}
    return {name: str(fact.value) for name, fact in read.get_rt_info([SECTION]).astype(dict).items()}
