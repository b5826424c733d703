"""Adapters bring the student's maps to the teacher's channels and size; they are trained beside the student."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import nn
from kdjax.distill.taps import Pair, check_sizes, map_size
from kdjax.structs import Array

Params = dict[str, dict[str, Array]]  # {stride: parameters of a convolution}


def init_adapters(
    key: Array,
    pairs: list[Pair],
    *,
    kernel_size: int = 1,
    bias: bool = True,
    always: bool = False,
    deviation: float | None = None,
) -> Params:
    """One convolution per level that takes the student's channels to the teacher's: {stride: params}.

    A level with equal channels has none (identity), unless `always`. Adapters are trained with the student and not
    exported. Also checks that the maps of a pair can be compared (see `adapt`). `bias`, `deviation`: see
    `kdjax.nn.init_conv2d`.
    """
    params: Params = {}
    for stride, student, teacher in pairs:
        check_sizes(stride, student.shape, teacher.shape)
        if always or student.shape[-1] != teacher.shape[-1]:
            params[str(stride)] = nn.init_conv2d(
                jax.random.fold_in(key, stride),
                kernel_size,
                student.shape[-1],
                teacher.shape[-1],
                bias=bias,
                deviation=deviation,
            )
    return params


def init_generators(key: Array, pairs: list[Pair]) -> dict[str, Params]:
    """Parameters of MGD's generator for each level, on the teacher's channels: {stride: params of `reconstruct`}.

    The key may be the one that `init_adapters` gets.
    """
    key = jax.random.fold_in(key, 0)  # no stride is 0: another branch than the adapters'
    params = {}
    for stride, _, teacher in pairs:
        channels = teacher.shape[-1]
        keys = jax.random.split(jax.random.fold_in(key, stride))
        params[str(stride)] = {
            name: nn.init_conv2d(k, 3, channels, channels) for name, k in zip(("first", "second"), keys, strict=True)
        }
    return params


def adapt(params: Mapping[str, Any], pairs: list[Pair]) -> list[Pair]:
    """The pairs in float32, the student's map with the teacher's channels and size.

    A student's map of another size is resized bilinearly before the convolution.
    """
    adapted: list[Pair] = []
    for stride, student, teacher in pairs:
        student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
        if student.shape[1:3] != teacher.shape[1:3]:
            student = nn.resize_bilinear(student, map_size(teacher))
        if str(stride) in params:
            student = nn.conv2d(student, params[str(stride)]["kernel"], params[str(stride)].get("bias"))
        adapted.append(Pair(stride, student, teacher))
    return adapted
