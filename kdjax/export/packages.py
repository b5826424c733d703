"""The optional packages that the formats need."""

import importlib.util
from collections.abc import Iterable, Sequence

from kdjax.errors import UserError

ONNX, LITERT = ("jax2onnx", "onnx", "onnxruntime"), ("litert_converter", "ai_edge_litert")


def missing(packages: Iterable[str] = ONNX) -> list[str]:
    """Those of the packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def check_installed(packages: Sequence[str]) -> None:
    """Raises UserError if one of the packages is not installed; all are of `ONNX` or of `LITERT`."""
    if absent := missing(packages):
        name, extra = ("LiteRT", "litert") if packages[0] in LITERT else ("ONNX", "export")
        raise UserError(f"{name} needs {', '.join(absent)}: pip install 'kdjax[{extra}]'")
