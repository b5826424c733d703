"""Prediction: loading a model and running it on images."""
