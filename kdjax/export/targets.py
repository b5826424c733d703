"""Common devices, and the format and precision that suits each."""

from typing import NamedTuple


class Target(NamedTuple):
    """What is written for a device."""

    format: str
    dtype: str
    batch: str  # images: a number, or "dynamic"
    runs: str  # what runs the file on the device


TARGETS = {
    "cpu": Target("onnx", "int8", "1", "onnxruntime"),
    "intel_cpu": Target("openvino", "int8", "1", "OpenVINO, device CPU"),
    "intel_gpu": Target("openvino", "float16", "1", "OpenVINO, device GPU"),
    "nvidia_gpu": Target("onnx", "float32", "dynamic", "onnxruntime with CUDA, or TensorRT"),
    "nvidia_jetson": Target("onnx", "float16", "1", "TensorRT, or onnxruntime with CUDA"),
    "raspberry_pi": Target("ncnn", "float16", "1", "NCNN"),
    "phone": Target("litert", "int8", "1", "LiteRT (Android, iOS)"),
    "browser": Target("onnx", "float32", "1", "onnxruntime-web"),
    "tpu": Target("stablehlo", "float32", "1", "JAX or XLA"),
}
ALL = "all"  # of them, into one folder
NMS = {
    "onnx": "in the file",
    "openvino": "in the file",
    "stablehlo": "in the file",
    "litert": "outside: boxes and scores",
    "ncnn": "outside: maps",
}


def table() -> list[list[str]]:
    """The targets as rows of text, the first one with the names of the columns."""
    head = ["target", "format", "precision", "NMS", "batch", "runs in"]
    return [head] + [
        [name, one.format, one.dtype, NMS[one.format], one.batch, one.runs] for name, one in TARGETS.items()
    ]


def told() -> str:
    """The table for a terminal."""
    rows = table()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
