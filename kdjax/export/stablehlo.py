"""StableHLO: portable programs of `jax.export`."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.export
import numpy as np

from kdjax.export import graphs
from kdjax.inference.model import Model


def write(model: Model, path: str | Path, *, raw: bool = False) -> None:
    """Writes the model as a portable program of `jax.export` for CPU, GPU and TPU, for one image.

    Its outputs are the head's maps, or boxes f32[1, D, 4], scores f32[1, D], labels i32[1, D], valid bool[1, D] and, of
    a detector of masks, masks f32[1, D, h, w].

    Args:
      model: from `kdjax.inference.load`.
      path: the file.
      raw: the head's maps instead of detections.

    Raises:
      UserError: see `graphs.check`.
    """
    graphs.check(model, raw=raw)
    function = functools.partial(graphs.maps if raw else graphs.detections, model)
    exported = jax.export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(*graphs.inputs(model, raw=raw))
    Path(path).write_bytes(exported.serialize())


def runner(path: str | Path, *, raw: bool = False) -> Callable[..., Sequence[np.ndarray]]:
    """A function from the inputs of an exported program to its outputs, both in order; detections without padding."""
    program = jax.jit(jax.export.deserialize(bytearray(Path(path).read_bytes())).call)

    def call(*inputs: np.ndarray) -> Sequence[np.ndarray]:
        outputs = [np.asarray(value) for value in program(*inputs)]
        if raw:
            return outputs
        found = dict(zip(graphs.DETECTIONS, (value[0] for value in outputs), strict=False))
        valid = found.pop("valid")
        return [value[valid] for value in found.values()]

    return call
