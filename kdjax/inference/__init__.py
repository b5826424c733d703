"""Prediction: loading a model and detecting objects in images; ONNX files of other programs as teachers."""

from kdjax.inference.model import Model, load
from kdjax.inference.onnx_teacher import OnnxTeacher, load_teacher

__all__ = ["Model", "OnnxTeacher", "load", "load_teacher"]
