"""Masked generative distillation (MGD): rebuild the teacher's map from a student's map with holes."""

import jax
import jax.numpy as jnp

from kdjax import nn
from kdjax.structs import Array


def keep_mask(uniform: Array, drop: float) -> Array:
    """Binary mask from uniform draws: 1 where u < 1 - drop, so a place is 0 with probability `drop`.

    Args:
      uniform: f32[...] in [0, 1), fresh every step and level: [B, H, W, 1], or [B, 1, 1, C] to mask channels.
      drop: 0 (all ones) .. 1 (all zeros).

    Returns:
      f32[...] of 0 and 1; what is kept is not scaled up.

    Scope: place.
    Peers: MGD's `torch.where(mat > 1 - lambda, 0, 1)`.
    Reference: Yang et al., "Masked Generative Distillation", 2022, Eq. 2.

    Raises:
      ValueError: drop outside 0 .. 1.

    Example:
      >>> keep_mask(jnp.array([0.1, 0.4, 0.9]), 0.65).tolist()
      [1.0, 0.0, 0.0]
    """
    if not 0 <= drop <= 1:
        raise ValueError(f"keep_mask needs a drop probability within 0 .. 1, not {drop}")
    return (jnp.asarray(uniform) < 1 - drop).astype(jnp.float32)


def generate(x: Array, params: dict) -> Array:
    """MGD's generator: conv3x3, relu, conv3x3, with as many channels out as in.

    Args:
      x: f32[B, H, W, C], the student's map (adapted to the teacher's channels) times the mask.
      params: {"first", "second"}, each a 3x3 convolution {"kernel" f32[3, 3, C, C], "bias" f32[C]}.

    Returns:
      f32[B, H, W, C], to be compared with the teacher by `feature.squared`; not zero at equality, as the generator is
      random at first.

    Scope: receptive field of 5 x 5 cells.
    Peers: MGD's `generation`.
    Reference: Yang et al., "Masked Generative Distillation", 2022, Eq. 3.

    Example:
      >>> same = {"kernel": jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0), "bias": jnp.zeros(1)}
      >>> generate(jnp.array([-1.0, 2.0]).reshape(1, 1, 2, 1), {"first": same, "second": same}).ravel().tolist()
      [0.0, 2.0]
    """
    x = jax.nn.relu(nn.conv2d(jnp.asarray(x, jnp.float32), **params["first"]))
    return nn.conv2d(x, **params["second"])
