"""Plain-JAX primitives for detectors and adapters alike: maps are NHWC, kernels HWIO, everything is a function.

Convolution takes the form that suits the platform, chosen when the program is lowered: XLA on the CPU has no fast path
for grouped convolution and a slow one for 1x1, so there a depthwise convolution is a sum of shifted products, a 1x1
convolution is a matrix product, and all others have the built-in operation with gradients written otherwise. GPU and
TPU keep the built-in operation and its gradients. (Metrics: "The forms of convolution" in benchmarks/README.md.) All
have a gradient rule of their own, so they can be differentiated in reverse mode any number of times, but not in
forward mode.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
_LARGE_MAP = 128 * 128  # cells
_FEW_OUTPUTS = 16


def conv2d(
    x: Array, kernel: Array, bias: Array | None = None, *, stride: int = 1, padding: str | int = "same", groups: int = 1
) -> Array:
    """Convolves (cross-correlates, as every deep learning library) a batch of maps with a kernel.

    y[b, h, w, o] = bias[o] + sum_{i, j, c} x[b, h stride + i - padding, w stride + j - padding, c] kernel[i, j, c, o]

    Args:
      x: f32[B, H, W, C], the maps.
      kernel: f32[kh, kw, C / groups, O].
      bias: f32[O] or None.
      stride: step in both directions, in cells.
      padding: zeros on each side, in cells; "same" is (kh - 1) / 2 and (kw - 1) / 2, for odd kernels only.
      groups: number of channel groups; depthwise if groups = C = O.

    Returns:
      f32[B, H', W', O] with H' = floor((H + 2 padding - kh) / stride) + 1.

    Raises:
      ValueError: if the kernel does not fit the channels, or "same" meets an even kernel.

    Scope: one map.

    Peers: torch.nn.functional.conv2d with `padding` the same number.

    Example:
      >>> import jax.numpy as jnp
      >>> conv2d(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)))[0, :, :, 0].tolist()[0]
      [4.0, 6.0, 6.0, 4.0]
    """
    height, width, channels, outputs = kernel.shape
    if x.ndim != 4 or channels * groups != x.shape[-1] or outputs % groups:
        raise ValueError(
            f"A convolution of {x.shape} with a kernel {kernel.shape} in {groups} groups needs maps of "
            f"{channels * groups} channels (B, H, W, C) and outputs that divide by the groups."
        )
    if padding == "same":
        if height % 2 == 0 or width % 2 == 0:
            raise ValueError(f'The padding "same" needs an odd kernel, not {height}x{width}; give a number of cells.')
        pads = (height // 2, width // 2)
    else:
        pads = (int(padding), int(padding))
    if _portable.get():
        y = _builtin_conv(x, kernel, stride, pads, groups)
    elif groups > 1 and groups == x.shape[-1] == outputs:
        y = _depthwise(x, kernel, stride, pads)
    elif (height, width) == (1, 1) and groups == 1 and pads == (0, 0):
        y = _pointwise(x[:, ::stride, ::stride] if stride > 1 else x, kernel)
    elif groups == 1:
        y = _dense(x, kernel, stride, pads)
    else:
        y = _builtin_conv(x, kernel, stride, pads, groups)
    _record("conv", y.size * height * width * channels)
    return y if bias is None else y + bias


def _builtin_conv(x: Array, kernel: Array, stride: int, pads: tuple[int, int], groups: int) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(pads[0], pads[0]), (pads[1], pads[1])],
        dimension_numbers=_DIMENSIONS,
        feature_group_count=groups,
    )


def _builtin_gradients(
    x: Array, kernel: Array, gradient: Array, *, stride: int, pads: tuple[int, int], groups: int
) -> tuple[Array, Array]:
    return jax.vjp(lambda x, kernel: _builtin_conv(x, kernel, stride, pads, groups), x, kernel)[1](gradient)


# The platform is chosen inside the forward and the backward rule, never around them: differentiating through the choice
# would keep the residuals of all its branches. The backward rules are jitted, so that equal shapes are traced once.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dense(x: Array, kernel: Array, stride: int, pads: tuple[int, int]) -> Array:
    return _builtin_conv(x, kernel, stride, pads, 1)


def _dense_forward(x: Array, kernel: Array, stride: int, pads: tuple[int, int]) -> tuple[Array, tuple[Array, Array]]:
    return _dense(x, kernel, stride, pads), (x, kernel)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _dense_backward(
    stride: int, pads: tuple[int, int], saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    def cpu(x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        return _input_gradient(x, kernel, gradient, stride, pads), _kernel_gradient(x, kernel, gradient, stride, pads)

    builtin = functools.partial(_builtin_gradients, stride=stride, pads=pads, groups=1)
    return lax.platform_dependent(*saved, gradient, cpu=cpu, default=builtin)


_dense.defvjp(_dense_forward, _dense_backward)


def _input_gradient(x: Array, kernel: Array, gradient: Array, stride: int, pads: tuple[int, int]) -> Array:
    """As forward convolutions, one for each of the stride x stride phases of the input's cells.

    XLA would spread the gradient with zeros instead (up to 5 times as long), and oneDNN's bfloat16 knows only these.
    """
    if min(kernel.shape[:2]) < stride:  # some phases meet no tap
        return _builtin_gradients(x, kernel, gradient, stride=stride, pads=pads, groups=1)[0]
    batch, *lengths, channels = x.shape
    cells = [-(-length // stride) for length in lengths]
    turned = kernel.swapaxes(2, 3)

    def met(axis: int, phase: int) -> tuple[slice, tuple[int, int]]:
        # Input cell stride a + phase met the output cells a + first, a + first + 1, ... by taps last, last - stride ...
        size = kernel.shape[axis]
        last = size - 1 - (size - 1 - phase - pads[axis]) % stride
        first = (phase + pads[axis] - last) // stride
        count = last // stride + 1
        return slice(last, None, -stride), (-first, cells[axis] + first + count - 1 - gradient.shape[1 + axis])

    def part(row: int, column: int) -> Array:
        (rows, pad_rows), (columns, pad_columns) = met(0, row), met(1, column)
        # Behind the barrier the kernel stays as it is: oneDNN does not know one that is turned after a conversion.
        taps = lax.optimization_barrier(turned[rows, columns])
        return lax.conv_general_dilated(gradient, taps, (1, 1), (pad_rows, pad_columns), dimension_numbers=_DIMENSIONS)

    if stride == 1:
        return part(0, 0)
    parts = jnp.stack([jnp.stack([part(row, column) for column in range(stride)], 3) for row in range(stride)], 2)
    return parts.reshape(batch, stride * cells[0], stride * cells[1], channels)[:, : lengths[0], : lengths[1]]


def _kernel_gradient(x: Array, kernel: Array, gradient: Array, stride: int, pads: tuple[int, int]) -> Array:
    """XLA's own, of a few outputs at a time where it is slow otherwise: in float32 on large maps (up to 8 times)."""

    def own(kernel: Array, gradient: Array) -> Array:
        return _builtin_gradients(x, kernel, gradient, stride=stride, pads=pads, groups=1)[1]

    if x.dtype != jnp.float32 or gradient.shape[1] * gradient.shape[2] < _LARGE_MAP:
        return own(kernel, gradient)
    starts = range(0, kernel.shape[-1], _FEW_OUTPUTS)
    return jnp.concatenate(
        [own(kernel[..., i : i + _FEW_OUTPUTS], gradient[..., i : i + _FEW_OUTPUTS]) for i in starts], -1
    )


@jax.custom_vjp
def _pointwise(x: Array, kernel: Array) -> Array:
    return lax.platform_dependent(x, kernel, cpu=_pointwise_matmul, default=_pointwise_builtin)


def _pointwise_builtin(x: Array, kernel: Array) -> Array:
    return _builtin_conv(x, kernel, 1, (0, 0), 1)


def _pointwise_matmul(x: Array, kernel: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    return (rows @ kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])


def _pointwise_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _pointwise(x, kernel), (x, kernel)


@jax.jit
def _pointwise_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    def matmul(x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        return jax.vjp(_pointwise_matmul, x, kernel)[1](gradient)

    builtin = functools.partial(_builtin_gradients, stride=1, pads=(0, 0), groups=1)
    return lax.platform_dependent(*saved, gradient, cpu=matmul, default=builtin)


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x: Array, kernel: Array, stride: int, pads: tuple[int, int]) -> Array:
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_depthwise_shifted, stride=stride, pads=pads),
        default=functools.partial(_builtin_conv, stride=stride, pads=pads, groups=x.shape[-1]),
    )


def _shifts(x: Array, size: tuple[int, int], out: tuple[int, int], stride: int) -> Iterator[tuple[int, int, Array]]:
    """The views of a padded map that meet the kernel's cells (i, j), each of the output's size."""
    batch, _, _, channels = x.shape
    for i in range(size[0]):
        for j in range(size[1]):
            stop = (batch, i + (out[0] - 1) * stride + 1, j + (out[1] - 1) * stride + 1, channels)
            yield i, j, lax.slice(x, (0, i, j, 0), stop, (1, stride, stride, 1))


def _output_size(x: Array, kernel_size: tuple[int, int], stride: int, pads: tuple[int, int]) -> tuple[int, int]:
    return (
        (x.shape[1] + 2 * pads[0] - kernel_size[0]) // stride + 1,
        (x.shape[2] + 2 * pads[1] - kernel_size[1]) // stride + 1,
    )


def _pad(x: Array, pads: tuple[int, int]) -> Array:
    return jnp.pad(x, ((0, 0), (pads[0], pads[0]), (pads[1], pads[1]), (0, 0)))


def _depthwise_shifted(x: Array, kernel: Array, *, stride: int, pads: tuple[int, int]) -> Array:
    out = _output_size(x, kernel.shape[:2], stride, pads)
    terms = (_wide(view) * kernel[i, j, 0] for i, j, view in _shifts(_pad(x, pads), kernel.shape[:2], out, stride))
    return functools.reduce(jnp.add, terms).astype(x.dtype)


def _wide(x: Array) -> Array:
    """Sums of narrow types run in float32, as they do inside the built-in operation."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _add_all(left: Sequence[Array], right: Sequence[Array]) -> list[Array]:
    return [a + b for a, b in zip(left, right, strict=True)]


def _depthwise_forward(
    x: Array, kernel: Array, stride: int, pads: tuple[int, int]
) -> tuple[Array, tuple[Array, Array]]:
    return _depthwise(x, kernel, stride, pads), (x, kernel)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _depthwise_backward(
    stride: int, pads: tuple[int, int], saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    def shifted(x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        # With respect to the input: the gradient, spread by the stride, meets the flipped kernel.
        config = [(0, 0, 0)]
        for size, length, out, pad in zip(kernel.shape[:2], x.shape[1:3], gradient.shape[1:3], pads, strict=True):
            low = size - 1 - pad
            config.append((low, length + size - 1 - low - (out - 1) * stride - 1, stride - 1))
        spread = lax.pad(gradient, jnp.zeros((), gradient.dtype), [*config, (0, 0, 0)])
        dx = _depthwise_shifted(spread, kernel[::-1, ::-1], stride=1, pads=(0, 0))
        # With respect to the kernel: one pass that keeps one row of accumulators per cell of the kernel. (XLA collects
        # a spread batch on every device for it. A row for every image would not need that and is faster on large
        # maps, but then 8 devices and 1 part by 1.5e-5 on jax 0.12.)
        views = _shifts(_pad(x, pads), kernel.shape[:2], gradient.shape[1:3], stride)
        products = [_wide(view) * gradient for _, _, view in views]
        rows = lax.reduce(products, [jnp.zeros((), products[0].dtype)] * len(products), _add_all, (0, 1))
        return dx, jnp.stack(rows).sum(1).reshape(kernel.shape).astype(kernel.dtype)

    builtin = functools.partial(_builtin_gradients, stride=stride, pads=pads, groups=saved[0].shape[-1])
    return lax.platform_dependent(*saved, gradient, cpu=shifted, default=builtin)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def batch_moments(x: Array) -> tuple[Array, Array]:
    """Returns mean and biased variance of every channel over all other axes.

    mean = sum x / n, var = sum (x - mean)^2 / n, in float32 whatever x is.

    Args:
      x: f32[..., C].

    Returns:
      f32[C], f32[C] >= 0.

    Scope: the global batch, all cells: under `jax.jit` over a mesh the sums run over all devices.

    Example:
      >>> import jax.numpy as jnp
      >>> [float(v[0]) for v in batch_moments(jnp.array([[1.0], [3.0]]))]
      [2.0, 1.0]
    """
    x = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    return mean, jnp.mean(jnp.square(x - mean), axes)


def batch_norm(x: Array, scale: Array, bias: Array, mean: Array, var: Array, *, eps: float = 1e-5) -> Array:
    """Normalises every channel with the given statistics.

    y = (x - mean) / sqrt(var + eps) * scale + bias

    Args:
      x: f32[..., C].
      scale, bias, mean, var: f32[C]; var >= 0.
      eps: added to the variance.

    Returns:
      Array of x's shape and dtype.

    Scope: that of the statistics.

    Peers: torch.nn.BatchNorm2d.

    Example:
      >>> import jax.numpy as jnp
      >>> one, zero = jnp.ones(1), jnp.zeros(1)
      >>> float(batch_norm(jnp.array([[3.0]]), 2 * one, one, one, 4 * one, eps=0.0)[0, 0])
      3.0
    """
    _record("norm", 2 * x.size)
    if _portable.get():  # other runtimes fold a product and a sum into the convolution before it
        factor = lax.rsqrt(var + eps) * scale
        return (x * factor + (bias - mean * factor)).astype(x.dtype)
    return ((x - mean) * (lax.rsqrt(var + eps) * scale) + bias).astype(x.dtype)


def group_norm(x: Array, scale: Array, bias: Array, *, groups: int, eps: float = 1e-5) -> Array:
    """Normalises groups of neighbouring channels of each map with their own mean and biased variance.

    y = (x - mean) / sqrt(var + eps) * scale + bias, the statistics in float32 whatever x is.

    Args:
      x: f32[B, H, W, C].
      scale, bias: f32[C].
      groups: G, divides C; channels 0 .. C/G - 1 are the first group.
      eps: added to the variance.

    Returns:
      Array of x's shape and dtype.

    Raises:
      ValueError: if the channels do not divide into the groups.

    Scope: one map, the channels of a group.

    Peers: torch.nn.GroupNorm.

    Reference: Wu and He, Group Normalization, ECCV 2018, equation 7.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([1.0, 3.0, 10.0, 30.0]).reshape(1, 1, 1, 4)
      >>> group_norm(x, jnp.ones(4), jnp.zeros(4), groups=2, eps=0.0).ravel().tolist()
      [-1.0, 1.0, -1.0, 1.0]
    """
    channels = x.shape[-1]
    if channels % groups:
        raise ValueError(f"{channels} channels do not divide into {groups} groups.")
    # mmengine's rule for norms that compute their statistics.
    _record("norm", 5 * x.size)
    grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, channels // groups)
    centred = grouped - jnp.mean(grouped, (1, 2, 4), keepdims=True)
    variance = jnp.mean(jnp.square(centred), (1, 2, 4), keepdims=True)
    normed = (centred * lax.rsqrt(variance + eps)).reshape(x.shape)
    return (normed * scale + bias).astype(x.dtype)


def global_average_pool(x: Array) -> Array:
    """Averages every channel of every map over its cells: f32[B, H, W, C] -> f32[B, 1, 1, C]."""
    _record("pool", x.size)
    return jnp.mean(x, (1, 2), keepdims=True)


def max_pool(x: Array, window: int, *, stride: int = 1, padding: int = 0) -> Array:
    """Returns the largest value of each window; cells outside the map never win.

    Args:
      x: f32[B, H, W, C].
      window: side of the window, in cells.
      stride: step of the window.
      padding: cells on each side.

    Returns:
      f32[B, H', W', C] with H' = floor((H + 2 padding - window) / stride) + 1.

    Scope: one map. Where values tie, the gradient goes to one of them.

    Peers: torch.nn.functional.max_pool2d.

    Example:
      >>> import jax.numpy as jnp
      >>> max_pool(jnp.arange(4.0).reshape(1, 2, 2, 1), 3, padding=1)[0, :, :, 0].tolist()
      [[3.0, 3.0], [3.0, 3.0]]
    """
    low = -jnp.inf
    pads = (padding, padding)
    # Rows, then columns: 2k comparisons a cell instead of k^2.
    x = lax.reduce_window(x, low, lax.max, (1, window, 1, 1), (1, stride, 1, 1), ((0, 0), pads, (0, 0), (0, 0)))
    return lax.reduce_window(x, low, lax.max, (1, 1, window, 1), (1, 1, stride, 1), ((0, 0), (0, 0), pads, (0, 0)))


def avg_pool(x: Array, size: int) -> Array:
    """Averages windows of size x size cells that do not overlap.

    Windows that the border cuts are averaged over the cells that they have.

    Args:
      x: f32[B, H, W, C].
      size: side and stride of the window, in cells.

    Returns:
      f32[B, ceil(H / size), ceil(W / size), C].

    Scope: one map.

    Peers: torch.nn.functional.avg_pool2d(x, size, ceil_mode=True).

    Example:
      >>> import jax.numpy as jnp
      >>> avg_pool(jnp.arange(9.0).reshape(1, 3, 3, 1), 2)[0, :, :, 0].tolist()
      [[2.0, 3.5], [6.5, 8.0]]
    """
    batch, height, width, channels = x.shape
    rows, columns = math.ceil(height / size), math.ceil(width / size)
    x = jnp.pad(x, ((0, 0), (0, rows * size - height), (0, columns * size - width), (0, 0)))
    sums = x.reshape(batch, rows, size, columns, size, channels).sum((2, 4))
    tall = jnp.minimum(size, height - size * jnp.arange(rows))
    wide = jnp.minimum(size, width - size * jnp.arange(columns))
    return sums / (tall[:, None, None] * wide[None, :, None]).astype(x.dtype)


def upsample_nearest(x: Array, factor: int = 2) -> Array:
    """Repeats every cell factor x factor times: f32[B, H, W, C] -> f32[B, H factor, W factor, C]."""
    batch, height, width, channels = x.shape
    if _portable.get():
        return jax.image.resize(x, (batch, height * factor, width * factor, channels), "nearest")
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, factor, width, factor, channels))
    _record("upsample", x.size)
    return x.reshape(batch, height * factor, width * factor, channels)


def resize_bilinear(x: Array, size: tuple[int, int]) -> Array:
    """Resizes maps by linear interpolation between cell centres, without smoothing before.

    Output cell i samples the input at (i + 0.5) H / H' - 0.5, kept inside the map.

    Args:
      x: f32[B, H, W, C].
      size: height and width of the result.

    Returns:
      f32[B, H', W', C].

    Scope: one map.

    Peers: torch.nn.functional.interpolate(mode="bilinear", align_corners=False).

    Example:
      >>> import jax.numpy as jnp
      >>> resize_bilinear(jnp.array([0.0, 1.0]).reshape(1, 1, 2, 1), (1, 4))[0, 0, :, 0].tolist()
      [0.0, 0.25, 0.75, 1.0]
    """
    shape = (x.shape[0], *size, x.shape[-1])
    _record("upsample", math.prod(shape))
    return jax.image.resize(x, shape, "linear", antialias=False)


_portable: ContextVar[bool] = ContextVar("portable", default=False)


@contextmanager
def portable() -> Iterator[None]:
    """What is traced inside takes forms that converters to other formats know, the same to rounding.

    No choice by platform and no gradient rule.

    Example:
      >>> import jax.numpy as jnp
      >>> with portable():
      ...     upsample_nearest(jnp.ones((1, 1, 1, 1))).shape
      (1, 2, 2, 1)
    """
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


_counter: ContextVar[dict[str, int] | None] = ContextVar("counter", default=None)


def _record(kind: str, flops: int) -> None:
    counts = _counter.get()
    if counts is not None:
        counts[kind] += flops


@contextmanager
def _counting() -> Iterator[dict[str, int]]:
    counts = dict.fromkeys(("conv", "norm", "pool", "upsample"), 0)
    token = _counter.set(counts)
    try:
        yield counts
    finally:
        _counter.reset(token)


def count(function: Callable, *args) -> dict[str, int]:
    """Counts the floating-point operations of a function of this module's primitives, without computing anything.

    The rule is mmengine's: one multiply-add of a convolution is one; two per output element of a batch norm, five of a
    group norm; the input elements of a global average pool; the output elements of an up-sampling; everything else is
    free.

    Args:
      function: what to count; it is traced anew, but parts of it that are jitted and were traced before are not seen.
      *args: arrays or `jax.ShapeDtypeStruct`s, trees of them.

    Returns:
      Whole numbers: `flops`, the total, and its parts `conv`, `norm`, `pool` and `upsample`.

    Example:
      >>> import jax.numpy as jnp
      >>> count(lambda x: conv2d(x, jnp.ones((1, 1, 2, 3))), jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32))["flops"]
      96
    """
    with _counting() as counts:
        jax.eval_shape(lambda *a: function(*a), *args)
    return {"flops": sum(counts.values()), **counts}


def is_portable() -> bool:
    """Whether this is inside of `portable`.

    Example:
      >>> is_portable()
      False
    """
    return _portable.get()
