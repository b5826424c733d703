"""Arithmetic that the losses share: float32, safe roots and powers, sums over devices."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kdjax import nn, shapes
from kdjax.errors import UserError
from kdjax.structs import AnyArray, Array


def float32_pair(student: AnyArray, teacher: AnyArray, loss: str, layout: str = "...") -> tuple[Array, Array]:
    """Casts student and teacher to float32; checks that they have the same shape.

    Args:
      student: f32[...] or another dtype.
      teacher: the same.
      loss: the caller's name, for the message.
      layout: the axes that they need, as in `kdjax.shapes.check`.

    Raises:
      UserError: the shapes differ, or have other axes than `layout`.
    """
    shapes.check(loss, student=(student, layout))
    student, teacher = jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)
    if student.shape != teacher.shape:
        raise UserError(
            f"{loss}: student and teacher must have the same shape, not {student.shape} and {teacher.shape}: "
            "an adapter must first bring the student to the teacher's shape"
        )
    return student, teacher


def check_positive(loss: str, **arguments: float) -> None:
    """Checks options that must be > 0, such as a temperature; traced values are not checked.

    Raises:
      UserError: one is not.
    """
    for name, value in arguments.items():
        if not isinstance(value, Tracer) and not value > 0:
            raise UserError(f"{loss}: {name} must be > 0, not {value}")


def check_choice(loss: str, choices: tuple[str, ...], **argument: str) -> None:
    """Checks an option that must be one of several words.

    Raises:
      UserError: it is not.
    """
    for name, value in argument.items():
        if value not in choices:
            raise UserError(f"{loss}: {name} must be one of {', '.join(choices)}, not {value!r}")


def check_labels(loss: str, logits: AnyArray, labels: AnyArray) -> None:
    """Checks that there is one label for each row of class logits.

    Raises:
      UserError: there is not.
    """
    if np.shape(logits)[:-1] != np.shape(labels):
        raise UserError(f"{loss}: labels must have the shape {np.shape(logits)[:-1]}, not {np.shape(labels)}")


def safe_sqrt(x: Array) -> Array:
    """sqrt(max(x, 1e-12)): the square root with slope 0 at 0."""
    return jnp.sqrt(jnp.maximum(x, 1e-12))


def absolute(x: Array) -> Array:
    """|x| with slope 0 at 0, as in PyTorch (the slope of `jnp.abs` is 1 there)."""
    return jnp.sign(x) * x


def power(x: Array, exponent: float, *, smallest: float = 0.0) -> Array:
    """x^exponent where x > smallest, else 0, with slope 0 there; x itself for exponent 1 and ones for exponent 0."""
    if exponent == 1:
        return x
    if exponent == 0:
        return jnp.ones_like(x)
    large = x > smallest
    return jnp.where(large, jnp.where(large, x, 1.0) ** exponent, 0.0)


def sum_over(x: Array, axes: tuple[int, ...], axis_name: str | None = None) -> Array:
    """Sum over array axes, which keep size 1, and over the devices of the mapped axis `axis_name`, if any."""
    total = jnp.sum(x, axes, keepdims=True)
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def count_over(x: Array, axes: tuple[int, ...], axis_name: str | None = None) -> Array | float:
    """Number of elements that `sum_over` adds."""
    count = float(np.prod([x.shape[a] for a in axes]))
    return count if axis_name is None else count * jax.lax.psum(1, axis_name)


def conv(x: Array, layer: Mapping[str, Array]) -> Array:
    """`kdjax.nn.conv2d` with the parameters {"kernel", "bias"}."""
    return nn.conv2d(x, layer["kernel"], layer["bias"])


def along_sides(x: AnyArray, rows: np.ndarray, columns: np.ndarray) -> Array:
    """Multiplies both sides of every map by a matrix: f32[B, H, W, C] -> f32[B, I, J, C], rows [I, H], columns [J, W].

    Batched products keep the layout; `einsum` moves the axes first, which takes twice as long.
    """
    batch, height, width, channels = x.shape
    exact = jax.lax.Precision.HIGHEST
    x = jnp.matmul(
        jnp.broadcast_to(rows, (batch, *rows.shape)), x.reshape(batch, height, width * channels), precision=exact
    )
    x = x.reshape(batch * len(rows), width, channels)
    x = jnp.matmul(jnp.broadcast_to(columns, (len(x), *columns.shape)), x, precision=exact)
    return x.reshape(batch, len(rows), len(columns), channels)


def moments(
    x: AnyArray, *, axes: tuple[int, ...] = (0, 1, 2), ddof: int = 0, axis_name: str | None = None
) -> tuple[Array, Array, Array]:
    """Mean, centred x and variance over `axes`, which keep size 1, in float32.

    The mean is computed twice: the second one removes the rounding error of the first. A constant is then centred to
    exactly 0. With `axis_name`, sums also run over the devices of that axis.
    """
    x = jnp.asarray(x, jnp.float32)
    count = count_over(x, axes, axis_name)
    pivot = jax.lax.stop_gradient(sum_over(x, axes, axis_name) / count)
    shifted = x - pivot
    rest = sum_over(shifted, axes, axis_name) / count
    centred = shifted - rest
    variance = sum_over(jnp.square(centred), axes, axis_name) / jnp.maximum(count - ddof, 1)
    return pivot + rest, centred, variance
