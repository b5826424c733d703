"""Primitives of detectors and adapters, in plain JAX: every layer is a function. Maps are NHWC, kernels HWIO."""

from kdjax.nn.conv import conv2d, init_conv2d
from kdjax.nn.deformable import deformable_attention, sample_points
from kdjax.nn.flops import count
from kdjax.nn.norm import batch_moments, batch_norm, group_norm, layer_norm
from kdjax.nn.portability import is_portable, portable, replaced, replacement
from kdjax.nn.quantise import affine, fake_quantise, fake_quantise_kernel, kernel_scale
from kdjax.nn.resample import avg_pool, global_average_pool, max_pool, resize_bilinear, upsample_nearest

__all__ = [
    "affine",
    "avg_pool",
    "batch_moments",
    "batch_norm",
    "conv2d",
    "count",
    "deformable_attention",
    "fake_quantise",
    "fake_quantise_kernel",
    "global_average_pool",
    "group_norm",
    "init_conv2d",
    "is_portable",
    "kernel_scale",
    "layer_norm",
    "max_pool",
    "portable",
    "replaced",
    "replacement",
    "resize_bilinear",
    "sample_points",
    "upsample_nearest",
]
