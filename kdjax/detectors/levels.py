"""Operations on the levels of an output that every family needs."""

import jax.numpy as jnp
import numpy as np

from kdjax.boxes import convert, priors
from kdjax.structs import Array, Assignment, DetectorOutput, Targets


def join(maps: tuple[Array, ...], width: int) -> Array:
    """L of f32[B, H, W, A * width] -> f32[B, N, width], one row per prior."""
    return jnp.concatenate([m.reshape(m.shape[0], -1, width) for m in maps], 1)


def input_size(output: DetectorOutput) -> tuple[int, int]:
    """Height and width in pixels of the image that an output belongs to; it has class logits, boxes or a neck."""
    height, width = (output.cls_logits or output.box_reg or output.neck)[0].shape[1:3]
    return height * output.strides[0], width * output.strides[0]


def grid(output: DetectorOutput) -> np.ndarray:
    """The points of all cells at their top left corners, f32[N, 4] in NumPy (`boxes.priors.grid_priors`)."""
    return priors.grid_priors(input_size(output), output.strides)


def level_sizes(output: DetectorOutput) -> tuple[int, ...]:
    """Number of priors of each level."""
    return tuple(m.shape[1] * m.shape[2] * output.anchors for m in output.cls_logits or output.box_reg)


def class_logits(output: DetectorOutput) -> Array:
    """Classification logits of all levels, f32[B, N, K]."""
    return join(output.cls_logits, output.cls_logits[0].shape[-1] // output.anchors)


def query_logits(output: DetectorOutput) -> Array:
    """Classification logits of the last layer's queries, f32[B, Q, K]."""
    return output.layers[-1].logits


def query_boxes(output: DetectorOutput) -> Array:
    """Boxes of the last layer's queries, f32[B, Q, 4], x1 y1 x2 y2 in pixels, not clipped."""
    height, width = input_size(output)
    return convert.from_cxcywh(output.layers[-1].boxes) * np.array([width, height, width, height], np.float32)


def row_weights(weights: Array | None, matched: Array) -> Array | float:
    """What the losses of rows are multiplied by: f32[..., B, N], or 1.

    Args:
      weights: f32[B, M + 1], `Targets.weights`, or None.
      matched: i32[..., B, N], the object that each row learns, -1 for none.
    """
    if weights is None:
        return 1.0
    weights = jnp.broadcast_to(weights, (*matched.shape[:-1], weights.shape[-1]))
    return jnp.take_along_axis(weights, jnp.where(matched < 0, weights.shape[-1] - 1, matched), -1)


def total(values: dict[str, Array], targets: Targets, assignment: Assignment) -> dict[str, Array]:
    """The sum of each loss of the rows, by their weights: {name: f32[B, N], or of the first rows} -> {name: f32[]}."""
    return {
        name: jnp.sum(value * row_weights(targets.weights, assignment.matched[:, : value.shape[1]]))
        for name, value in values.items()
    }
