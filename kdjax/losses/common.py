"""What all distillation losses share: float32 arithmetic, one shape check, sums over devices."""

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.structs import Array


def float32_pair(student: Array, teacher: Array, loss: str) -> tuple[Array, Array]:
    """Both arrays in float32.

    Raises:
      ValueError: the shapes differ; `loss` names the caller in the sentence.
    """
    student, teacher = jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)
    if student.shape != teacher.shape:
        raise ValueError(
            f"{loss} compares arrays of one shape; the student has {student.shape}, the teacher {teacher.shape}: "
            "an adapter must bring the student to the shape of the teacher first"
        )
    return student, teacher


def safe_sqrt(x: Array) -> Array:
    """sqrt(max(x, 1e-12)): the square root with a finite slope at 0 (which is 0, as the maximum is flat there)."""
    return jnp.sqrt(jnp.maximum(x, 1e-12))


def absolute(x: Array) -> Array:
    """|x| with slope 0 at 0, as PyTorch has it (`jnp.abs` has slope 1 there)."""
    return jnp.sign(x) * x


def sum_over(x: Array, axes: tuple[int, ...], axis_name: str | None = None) -> Array:
    """Sum over array axes (kept with size 1), and over the devices of the mapped axis `axis_name` if given."""
    total = jnp.sum(x, axes, keepdims=True)
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def count_over(x: Array, axes: tuple[int, ...], axis_name: str | None = None) -> Array | float:
    """How many elements `sum_over` adds up."""
    count = float(np.prod([x.shape[a] for a in axes]))
    return count if axis_name is None else count * jax.lax.psum(1, axis_name)


def along_sides(x: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    """Multiplies both sides of every map by a matrix: f32[B, H, W, C] -> f32[B, I, J, C], rows [I, H], columns [J, W].

    Batched products on the layout as it is; `einsum` would move the axes first, which takes twice the time.
    """
    batch, height, width, channels = x.shape
    products = {"precision": jax.lax.Precision.HIGHEST}
    x = jnp.matmul(jnp.broadcast_to(rows, (batch, *rows.shape)), x.reshape(batch, height, width * channels), **products)
    x = x.reshape(batch * len(rows), width, channels)
    x = jnp.matmul(jnp.broadcast_to(columns, (len(x), *columns.shape)), x, **products)
    return x.reshape(batch, len(rows), len(columns), channels)


def moments(
    x: Array, *, axes: tuple[int, ...] = (0, 1, 2), ddof: int = 0, axis_name: str | None = None
) -> tuple[Array, Array, Array]:
    """Mean, centred x and variance over `axes` (kept with size 1), in float32.

    A first mean serves as a pivot whose rounding the second one takes out, so a constant is centred to 0 and not to
    the rounding of its mean, which a small deviation would blow up. With `axis_name` the sums run over its devices too.
    """
    x = jnp.asarray(x, jnp.float32)
    count = count_over(x, axes, axis_name)
    pivot = jax.lax.stop_gradient(sum_over(x, axes, axis_name) / count)
    shifted = x - pivot
    rest = sum_over(shifted, axes, axis_name) / count
    centred = shifted - rest
    variance = sum_over(jnp.square(centred), axes, axis_name) / jnp.maximum(count - ddof, 1)
    return pivot + rest, centred, variance
