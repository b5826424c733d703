"""Convolution, in the form that is fastest on the platform.

The form is chosen when the program is lowered. XLA on the CPU has no fast path for grouped convolution and a slow one
for 1x1. There a depthwise convolution is a sum of shifted products, a 1x1 convolution is a matrix product, other
ungrouped convolutions have the gradients of `conv_cpu`, and other grouped ones are batches of matrix products. GPU and
TPU use the built-in operation and its gradients. (Measurements: "The forms of convolution" in
benchmarks/README.md.) All forms but the built-in one define `custom_vjp`: they can be differentiated any number of
times in reverse mode, but not in forward mode.
"""

import functools
import math
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax import lax

from kdjax.errors import UserError
from kdjax.nn import conv_builtin, conv_cpu
from kdjax.nn.flops import record
from kdjax.nn.portability import is_portable
from kdjax.structs import Array


def conv2d(
    x: Array,
    kernel: Array,
    bias: Array | None = None,
    *,
    stride: int = 1,
    padding: Literal["same"] | int = "same",
    groups: int = 1,
    in_loop: bool = False,
) -> Array:
    """Convolves a batch of maps with a kernel (strictly, cross-correlates them).

        y[b, h, w, o] = bias[o] + sum_{i, j, c} x[b, s h + i - p, s w + j - p, c] kernel[i, j, c, o],

    with s the stride and p the padding.

    Args:
      x: f32[B, H, W, C] or bf16, the maps.
      kernel: f32[kh, kw, C / groups, O].
      bias: f32[O] or None.
      stride: step in both directions, in cells.
      padding: zeros on each side, in cells; "same" is (kh - 1) / 2 and (kw - 1) / 2, for odd kernels only.
      groups: number of channel groups; the convolution is depthwise if groups = C = O.
      in_loop: whether it is differentiated inside of a loop or a condition: there XLA's gradient at the kernel takes up
        to 70 times as long on the CPU, and matrix products replace it.

    Returns:
      f32[B, H', W', O] with H' = floor((H + 2 padding - kh) / stride) + 1.

    Raises:
      UserError: the kernel does not fit the channels, or is even with padding "same".

    Scope: one map.

    Peers: torch.nn.functional.conv2d with `padding` the same number.

    Example:
      >>> import jax.numpy as jnp
      >>> conv2d(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)))[0, :, :, 0].tolist()[0]
      [4.0, 6.0, 6.0, 4.0]
    """
    if x.ndim != 4 or kernel.ndim != 4:
        raise UserError(
            f"conv2d: x must be [B, H, W, C] and kernel [kh, kw, C / groups, O], not {x.shape} and {kernel.shape}"
        )
    height, width, channels, outputs = kernel.shape
    if channels * groups != x.shape[-1] or outputs % groups:
        raise UserError(
            f"conv2d: kernel {kernel.shape} in {groups} groups needs {channels * groups} input channels and a number "
            f"of outputs that {groups} divides, but x is {x.shape}"
        )
    if padding == "same":
        if height % 2 == 0 or width % 2 == 0:
            raise UserError(f'conv2d: padding "same" needs an odd kernel, not {height}x{width}: pass it in cells')
        pads = (height // 2, width // 2)
    else:
        pads = (int(padding), int(padding))
    if is_portable():
        y = conv_builtin.conv(x, kernel, stride, pads, groups)
    elif groups > 1 and groups == x.shape[-1] == outputs:
        y = _depthwise(x, kernel, stride, pads)
    elif (height, width) == (1, 1) and groups == 1 and pads == (0, 0):
        y = _pointwise(x[:, ::stride, ::stride] if stride > 1 else x, kernel)
    elif groups == 1:
        y = _dense(x, kernel, stride, pads, in_loop)
    else:
        y = _grouped(x, kernel, stride, pads, groups)
    y = cast(Array, y)  # pyright loses the type of functions with a `custom_vjp`
    record("conv", y.size * height * width * channels)
    return y if bias is None else y + bias


def init_conv2d(
    key: Array, size: int, inputs: int, outputs: int, *, bias: bool = True, deviation: float | None = None
) -> dict[str, Array]:
    """Initial parameters of a convolution: kernel and bias uniform in +-1 / sqrt(size^2 inputs), as in PyTorch.

    Args:
      key: PRNG key.
      size: side of the kernel.
      inputs: C.
      outputs: O.
      bias: whether there is one.
      deviation: if set, the kernel is normal with this standard deviation and the bias is 0.

    Returns:
      {"kernel": f32[size, size, C, O], "bias": f32[O]}, the arguments of `conv2d`; without `bias` the kernel alone.

    Peers: torch.nn.Conv2d.

    Example:
      >>> {name: value.shape for name, value in init_conv2d(jax.random.key(0), 3, 2, 4).items()}
      {'kernel': (3, 3, 2, 4), 'bias': (4,)}
    """
    limit = 1 / math.sqrt(size * size * inputs)
    key_kernel, key_bias = jax.random.split(key)
    shape = (size, size, inputs, outputs)
    if deviation is not None:
        kernel = deviation * jax.random.normal(key_kernel, shape, jnp.float32)
        return {"kernel": kernel} | ({"bias": jnp.zeros(outputs)} if bias else {})
    params = {"kernel": jax.random.uniform(key_kernel, shape, jnp.float32, -limit, limit)}
    if bias:
        params["bias"] = jax.random.uniform(key_bias, (outputs,), jnp.float32, -limit, limit)
    return params


# The platform is chosen inside the forward and the backward rule, never around them: differentiating through the choice
# would keep the residuals of all its branches. The backward rules are jitted, so that equal shapes are traced once.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _dense(x: Array, kernel: Array, stride: int, pads: tuple[int, int], in_loop: bool) -> Array:
    return conv_builtin.conv(x, kernel, stride, pads, 1)


def _dense_forward(
    x: Array, kernel: Array, stride: int, pads: tuple[int, int], in_loop: bool
) -> tuple[Array, tuple[Array, Array]]:
    return _dense(x, kernel, stride, pads, in_loop), (x, kernel)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _dense_backward(
    stride: int, pads: tuple[int, int], in_loop: bool, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    def cpu(x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        of_kernel = conv_cpu.kernel_gradient_in_loop if in_loop else conv_cpu.kernel_gradient
        dx = conv_cpu.input_gradient(x, kernel, gradient, stride, pads)
        return dx, of_kernel(x, kernel, gradient, stride, pads)

    builtin = functools.partial(conv_builtin.gradients, stride=stride, pads=pads, groups=1)
    return lax.platform_dependent(*saved, gradient, cpu=cpu, default=builtin)


_dense.defvjp(_dense_forward, _dense_backward)


@jax.custom_vjp
def _pointwise(x: Array, kernel: Array) -> Array:
    return lax.platform_dependent(x, kernel, cpu=conv_cpu.pointwise, default=_pointwise_builtin)


def _pointwise_builtin(x: Array, kernel: Array) -> Array:
    return conv_builtin.conv(x, kernel, 1, (0, 0), 1)


def _pointwise_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _pointwise(x, kernel), (x, kernel)


@jax.jit
def _pointwise_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    def matmul(x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        return jax.vjp(conv_cpu.pointwise, x, kernel)[1](gradient)

    builtin = functools.partial(conv_builtin.gradients, stride=1, pads=(0, 0), groups=1)
    return lax.platform_dependent(*saved, gradient, cpu=matmul, default=builtin)


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x: Array, kernel: Array, stride: int, pads: tuple[int, int]) -> Array:
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(conv_cpu.depthwise, stride=stride, pads=pads),
        default=functools.partial(conv_builtin.conv, stride=stride, pads=pads, groups=x.shape[-1]),
    )


def _depthwise_forward(
    x: Array, kernel: Array, stride: int, pads: tuple[int, int]
) -> tuple[Array, tuple[Array, Array]]:
    return _depthwise(x, kernel, stride, pads), (x, kernel)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _depthwise_backward(
    stride: int, pads: tuple[int, int], saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    shifted = functools.partial(conv_cpu.depthwise_gradients, stride=stride, pads=pads)
    builtin = functools.partial(conv_builtin.gradients, stride=stride, pads=pads, groups=saved[0].shape[-1])
    return lax.platform_dependent(*saved, gradient, cpu=shifted, default=builtin)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _grouped(x: Array, kernel: Array, stride: int, pads: tuple[int, int], groups: int) -> Array:
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(conv_cpu.grouped, stride=stride, pads=pads, groups=groups),
        default=functools.partial(conv_builtin.conv, stride=stride, pads=pads, groups=groups),
    )


def _grouped_forward(
    x: Array, kernel: Array, stride: int, pads: tuple[int, int], groups: int
) -> tuple[Array, tuple[Array, Array]]:
    return _grouped(x, kernel, stride, pads, groups), (x, kernel)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _grouped_backward(
    stride: int, pads: tuple[int, int], groups: int, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    parts = functools.partial(conv_cpu.grouped_gradients, stride=stride, pads=pads, groups=groups)
    builtin = functools.partial(conv_builtin.gradients, stride=stride, pads=pads, groups=groups)
    return lax.platform_dependent(*saved, gradient, cpu=parts, default=builtin)


_grouped.defvjp(_grouped_forward, _grouped_backward)
