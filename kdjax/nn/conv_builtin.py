"""XLA's own convolution and its gradients; all other forms agree with it up to rounding."""

import jax
from jax import lax

from kdjax.structs import Array

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv(x: Array, kernel: Array, stride: int, pads: tuple[int, int], groups: int) -> Array:
    """Convolves f32[B, H, W, C] with f32[kh, kw, C / groups, O]; `pads` zeros stand on each side, vertical first."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(pads[0], pads[0]), (pads[1], pads[1])],
        dimension_numbers=DIMENSIONS,
        feature_group_count=groups,
    )


def gradients(
    x: Array, kernel: Array, gradient: Array, *, stride: int, pads: tuple[int, int], groups: int
) -> tuple[Array, Array]:
    """Gradients with respect to x and kernel, from the gradient of the result."""
    return jax.vjp(lambda x, kernel: conv(x, kernel, stride, pads, groups), x, kernel)[1](gradient)
