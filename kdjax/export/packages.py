"""The optional packages that the formats need."""

import importlib.util
from collections.abc import Iterable, Sequence

from kdjax.errors import UserError

ONNX, LITERT = ("jax2onnx", "onnx", "onnxruntime"), ("litert_converter", "ai_edge_litert")
LITERT_INT8 = ("ai_edge_quantizer",)
OPENVINO, NCNN = ("openvino",), ("ncnn", "pnnx")  # their files are made from ONNX files
_EXTRAS = {"LiteRT": ("litert", (*LITERT, *LITERT_INT8)), "OpenVINO": ("openvino", OPENVINO), "NCNN": ("ncnn", NCNN)}


def missing(packages: Iterable[str] = ONNX) -> list[str]:
    """Those of the packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def check_installed(packages: Sequence[str]) -> None:
    """Raises UserError if one of the packages is not installed; all are of one format's."""
    if absent := missing(packages):
        of_format = ((name, extra) for name, (extra, needed) in _EXTRAS.items() if packages[0] in needed)
        name, extra = next(of_format, ("ONNX", "export"))
        raise UserError(f"{name} needs {', '.join(absent)}: pip install 'kdjax[{extra}]'")
