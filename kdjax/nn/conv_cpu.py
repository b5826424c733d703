"""The forms of convolution and of its gradients that are fast on the CPU."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from kdjax.nn import conv_builtin
from kdjax.structs import Array

_LARGE_MAP = 128 * 128  # cells
_FEW_OUTPUTS = 16


def input_gradient(x: Array, kernel: Array, gradient: Array, stride: int, pads: tuple[int, int]) -> Array:
    """Gradient with respect to x: one forward convolution for each of the stride x stride phases of the input's cells.

    XLA's own form dilates the gradient with zeros instead, which takes up to 5 times as long; in bfloat16 oneDNN has a
    fast path for forward convolutions only.
    """
    if min(kernel.shape[:2]) < stride:  # no kernel cell reaches some phases
        return conv_builtin.gradients(x, kernel, gradient, stride=stride, pads=pads, groups=1)[0]
    batch, *lengths, channels = x.shape
    cells = [-(-length // stride) for length in lengths]
    transposed = kernel.swapaxes(2, 3)

    def of_phase(axis: int, phase: int) -> tuple[slice, tuple[int, int]]:
        # The kernel's cells and the padding of one phase along one axis. The input cell stride a + phase contributes to
        # the output cells a + first, a + first + 1, ... through the kernel's cells last, last - stride, ...
        size = kernel.shape[axis]
        last = size - 1 - (size - 1 - phase - pads[axis]) % stride
        first = (phase + pads[axis] - last) // stride
        count = last // stride + 1
        return slice(last, None, -stride), (-first, cells[axis] + first + count - 1 - gradient.shape[1 + axis])

    def part(row: int, column: int) -> Array:
        (rows, pad_rows), (columns, pad_columns) = of_phase(0, row), of_phase(1, column)
        # The barrier keeps XLA from merging the transposition into the convolution: oneDNN has no fast path for a
        # kernel that is transposed after a conversion of the type.
        cells_of_kernel = lax.optimization_barrier(transposed[rows, columns])
        pads_of_phase = (pad_rows, pad_columns)
        return lax.conv_general_dilated(
            gradient, cells_of_kernel, (1, 1), pads_of_phase, dimension_numbers=conv_builtin.DIMENSIONS
        )

    if stride == 1:
        return part(0, 0)
    parts = jnp.stack([jnp.stack([part(row, column) for column in range(stride)], 3) for row in range(stride)], 2)
    return parts.reshape(batch, stride * cells[0], stride * cells[1], channels)[:, : lengths[0], : lengths[1]]


def kernel_gradient(x: Array, kernel: Array, gradient: Array, stride: int, pads: tuple[int, int]) -> Array:
    """Gradient with respect to the kernel: the built-in form, a few outputs at a time in float32 on large maps.

    There the built-in form of all outputs at once takes up to 8 times as long.
    """

    def builtin(kernel: Array, gradient: Array) -> Array:
        return conv_builtin.gradients(x, kernel, gradient, stride=stride, pads=pads, groups=1)[1]

    if x.dtype != jnp.float32 or gradient.shape[1] * gradient.shape[2] < _LARGE_MAP:
        return builtin(kernel, gradient)
    starts = range(0, kernel.shape[-1], _FEW_OUTPUTS)
    return jnp.concatenate(
        [builtin(kernel[..., i : i + _FEW_OUTPUTS], gradient[..., i : i + _FEW_OUTPUTS]) for i in starts], -1
    )


def kernel_gradient_in_loop(x: Array, kernel: Array, gradient: Array, stride: int, pads: tuple[int, int]) -> Array:
    """Gradient with respect to the kernel as a matrix product for each of its cells."""
    views = _shifts(_pad(x, pads), kernel.shape[:2], gradient.shape[1:3], stride)
    products = [jnp.einsum("bhwc,bhwo->co", view, gradient) for _, _, view in views]
    return jnp.stack(products).reshape(kernel.shape)


def pointwise(x: Array, kernel: Array) -> Array:
    """A 1x1 convolution as a matrix product."""
    rows = x.reshape(-1, x.shape[-1])
    return (rows @ kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])


def _shifts(x: Array, size: Sequence[int], out: Sequence[int], stride: int) -> Iterator[tuple[int, int, Array]]:
    """Yields (i, j, the part of the padded map that the kernel's cell (i, j) multiplies), each of the output's size."""
    batch, _, _, channels = x.shape
    for i in range(size[0]):
        for j in range(size[1]):
            stop = (batch, i + (out[0] - 1) * stride + 1, j + (out[1] - 1) * stride + 1, channels)
            yield i, j, lax.slice(x, (0, i, j, 0), stop, (1, stride, stride, 1))


def _output_size(x: Array, kernel_size: Sequence[int], stride: int, pads: tuple[int, int]) -> tuple[int, int]:
    return (
        (x.shape[1] + 2 * pads[0] - kernel_size[0]) // stride + 1,
        (x.shape[2] + 2 * pads[1] - kernel_size[1]) // stride + 1,
    )


def _pad(x: Array, pads: tuple[int, int]) -> Array:
    return jnp.pad(x, ((0, 0), (pads[0], pads[0]), (pads[1], pads[1]), (0, 0)))


def depthwise(x: Array, kernel: Array, *, stride: int, pads: tuple[int, int]) -> Array:
    """A depthwise convolution as a sum of shifted products, one for each cell of the kernel."""
    out = _output_size(x, kernel.shape[:2], stride, pads)
    terms = (_wide(view) * kernel[i, j, 0] for i, j, view in _shifts(_pad(x, pads), kernel.shape[:2], out, stride))
    return functools.reduce(jnp.add, terms).astype(x.dtype)


def _wide(x: Array) -> Array:
    """Casts to at least float32, in which the built-in operation accumulates too."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _add_all(left: Sequence[Array], right: Sequence[Array]) -> list[Array]:
    return [a + b for a, b in zip(left, right, strict=True)]


def depthwise_gradients(
    x: Array, kernel: Array, gradient: Array, *, stride: int, pads: tuple[int, int]
) -> tuple[Array, Array]:
    """Gradients of `depthwise` with respect to x and kernel, from the gradient of the result."""
    # With respect to x: the gradient, dilated by the stride, convolved with the flipped kernel.
    config = [(0, 0, 0)]
    for size, length, out, pad in zip(kernel.shape[:2], x.shape[1:3], gradient.shape[1:3], pads, strict=True):
        low = size - 1 - pad
        config.append((low, length + size - 1 - low - (out - 1) * stride - 1, stride - 1))
    spread = lax.pad(gradient, jnp.zeros((), gradient.dtype), [*config, (0, 0, 0)])
    dx = depthwise(spread, kernel[::-1, ::-1], stride=1, pads=(0, 0))
    # With respect to the kernel: one pass over the map with a row of accumulators for each cell of the kernel. XLA
    # gathers a sharded batch on every device for it. A row for each image would avoid that and is faster on large maps,
    # but then the results of 8 devices and of 1 differ by 1.5e-5 on jax 0.12.
    views = _shifts(_pad(x, pads), kernel.shape[:2], gradient.shape[1:3], stride)
    products = [_wide(view) * gradient for _, _, view in views]
    rows = lax.reduce(products, [jnp.zeros((), products[0].dtype)] * len(products), _add_all, (0, 1))
    return dx, jnp.stack(rows).sum(1).reshape(kernel.shape).astype(kernel.dtype)


def grouped(x: Array, kernel: Array, *, stride: int, pads: tuple[int, int], groups: int) -> Array:
    """A grouped convolution as a batch of matrix products, one for each group."""
    outputs = kernel.shape[-1]
    out = _output_size(x, kernel.shape[:2], stride, pads)
    parts = jnp.moveaxis(x.reshape(*x.shape[:-1], groups, -1), -2, 0)
    shifts = jax.vmap(lambda part: jnp.stack([v for *_, v in _shifts(_pad(part, pads), kernel.shape[:2], out, stride)]))
    rows = jnp.moveaxis(shifts(parts), 1, -2).reshape(groups, len(x) * out[0] * out[1], -1)
    blocks = jnp.moveaxis(kernel.reshape(-1, groups, outputs // groups), 1, 0)
    return jnp.moveaxis(rows @ blocks, 0, 1).reshape(len(x), *out, outputs)


def grouped_gradients(
    x: Array, kernel: Array, gradient: Array, *, stride: int, pads: tuple[int, int], groups: int
) -> tuple[Array, Array]:
    """Gradients of `grouped` with respect to x and kernel, from the gradient of the result."""
    form = functools.partial(grouped, stride=stride, pads=pads, groups=groups)
    return jax.vjp(form, x, kernel)[1](gradient)
