"""Adapters: what brings the student's maps to the teacher's channels and size, trained beside the student."""

import math

import jax
import jax.numpy as jnp

from kdjax import nn
from kdjax.distill.taps import Pair, check_sizes


def init_conv(
    key, kernel_size: int, inputs: int, outputs: int, *, bias: bool = True, deviation: float | None = None
) -> dict:
    """Parameters of a convolution: kernel and bias uniform in +-1/sqrt(fan in), the usual default of such adapters.

    With a `deviation`, the kernel is normal with it and the bias 0.
    """
    limit = 1 / math.sqrt(kernel_size * kernel_size * inputs)
    key_kernel, key_bias = jax.random.split(key)
    shape = (kernel_size, kernel_size, inputs, outputs)
    if deviation is not None:
        kernel = deviation * jax.random.normal(key_kernel, shape, jnp.float32)
        return {"kernel": kernel} | ({"bias": jnp.zeros(outputs)} if bias else {})
    params = {"kernel": jax.random.uniform(key_kernel, shape, jnp.float32, -limit, limit)}
    if bias:
        params["bias"] = jax.random.uniform(key_bias, (outputs,), jnp.float32, -limit, limit)
    return params


def init_adapters(
    key,
    pairs: list[Pair],
    *,
    kernel_size: int = 1,
    bias: bool = True,
    always: bool = False,
    deviation: float | None = None,
) -> dict:
    """One convolution a level that takes the student's channels to the teacher's: {stride: params}.

    A level whose channels agree gets none (identity), unless `always`. Adapters are trained with the student and not
    exported. Also checks that the maps of a pair can be compared (see `adapt`). `deviation`: see `init_conv`.
    """
    params: dict = {}
    for stride, student, teacher in pairs:
        check_sizes(stride, student.shape, teacher.shape)
        if always or student.shape[-1] != teacher.shape[-1]:
            params[str(stride)] = init_conv(
                jax.random.fold_in(key, stride),
                kernel_size,
                student.shape[-1],
                teacher.shape[-1],
                bias=bias,
                deviation=deviation,
            )
    return params


def init_generators(key, pairs: list[Pair]) -> dict:
    """Parameters of MGD's generator for each level, on the teacher's channels: {stride: for `generation.generate`}.

    The key may be the one that `init_adapters` gets.
    """
    key = jax.random.fold_in(key, 0)  # no stride is 0: another branch than the adapters'
    params = {}
    for stride, _, teacher in pairs:
        channels = teacher.shape[-1]
        keys = jax.random.split(jax.random.fold_in(key, stride))
        params[str(stride)] = {
            name: init_conv(k, 3, channels, channels) for name, k in zip(("first", "second"), keys, strict=True)
        }
    return params


def adapt(params: dict, pairs: list[Pair]) -> list[Pair]:
    """The pairs with the student's side brought to the teacher's channels and size, in float32.

    Another size is resized bilinearly, student to teacher, before the convolution.
    """
    adapted = []
    for stride, student, teacher in pairs:
        student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
        if student.shape[1:3] != teacher.shape[1:3]:
            student = nn.resize_bilinear(student, teacher.shape[1:3])
        if str(stride) in params:
            student = nn.conv2d(student, params[str(stride)]["kernel"], params[str(stride)].get("bias"))
        adapted.append(Pair(stride, student, teacher))
    return adapted
