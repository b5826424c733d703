"""StableHLO: portable programs of `jax.export`."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.export
import numpy as np

from kdjax.export import graphs
from kdjax.inference.model import Model
from kdjax.structs import Array


def write(model: Model, path: str | Path, *, raw: bool = False) -> None:
    """Writes the model as a portable program of `jax.export` for CPU, GPU and TPU, for one image.

    Its outputs are the head's maps, or boxes f32[1, D, 4], scores f32[1, D], labels i32[1, D] and valid bool[1, D].

    Args:
      model: from `kdjax.inference.load`.
      path: the file.
      raw: the head's maps instead of detections.

    Raises:
      UserError: see `graphs.check`.
    """
    graphs.check(model)

    def predict(images: Array, image_size: Array) -> tuple[Array, ...]:
        found = model.detector.decode(graphs.output(model, graphs.maps(model, images)), image_size)
        return found.boxes, found.scores, found.labels, found.valid

    function = functools.partial(graphs.maps, model) if raw else predict
    exported = jax.export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(*graphs.inputs(model, raw=raw))
    Path(path).write_bytes(exported.serialize())


def runner(path: str | Path) -> Callable[..., Sequence[np.ndarray]]:
    """A function from the inputs of an exported program to its outputs, both in order."""
    program = jax.jit(jax.export.deserialize(bytearray(Path(path).read_bytes())).call)

    def call(*inputs: np.ndarray) -> Sequence[np.ndarray]:
        outputs = [np.asarray(value) for value in program(*inputs)]
        if len(outputs) == 4:  # detections: as from ONNX, without padding
            *found, valid = (value[0] for value in outputs)
            return [value[valid] for value in found]
        return outputs

    return call
