"""Prediction: loading a model and detecting objects in images."""

from kdjax.inference.model import Model, load

__all__ = ["Model", "load"]
