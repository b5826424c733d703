"""Reading and writing weights: a kdjax folder, PyTorch state dicts, ONNX files of YOLOX."""

from kdjax.weights.folder import CONFIG, WEIGHTS, load, save

__all__ = ["CONFIG", "WEIGHTS", "load", "save"]
