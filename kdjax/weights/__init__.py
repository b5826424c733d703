"""Reads and writes weights: kdjax folders, PyTorch state dicts, ONNX files of YOLOX and RTMDet."""

from kdjax.weights.fill import count_classes, from_torch, reset_classifiers, to_torch
from kdjax.weights.folder import CONFIG, WEIGHTS, infer_options, load, save, stored_detector
from kdjax.weights.read import INDEX, read_checkpoint
from kdjax.weights.torch_names import foreign, plain

__all__ = [
    "CONFIG",
    "INDEX",
    "WEIGHTS",
    "count_classes",
    "foreign",
    "from_torch",
    "infer_options",
    "load",
    "plain",
    "read_checkpoint",
    "reset_classifiers",
    "save",
    "stored_detector",
    "to_torch",
]
