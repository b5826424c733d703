"""Reconstruction of the teacher's map from a masked map of the student (MGD)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from kdjax import shapes
from kdjax.errors import UserError
from kdjax.losses import common
from kdjax.structs import AnyArray, Array


def keep_mask(uniform: AnyArray, drop: float) -> Array:
    """Binary mask from uniform draws: 1 where u < 1 - drop, so an entry is 0 with probability `drop`.

    Args:
      uniform: f32[...] in [0, 1), new draws for each step and level: [B, H, W, 1], or [B, 1, 1, C] to mask channels.
      drop: 0 (all ones) .. 1 (all zeros).

    Returns:
      f32[...] of 0 and 1. Kept values are not rescaled.

    Scope: element.
    Peers: MGD's `torch.where(mat > 1 - lambda, 0, 1)`.
    Reference: Yang et al., "Masked Generative Distillation", 2022, Eq. 2.

    Raises:
      UserError: `drop` is outside 0 .. 1.

    Example:
      >>> keep_mask(jnp.array([0.1, 0.4, 0.9]), 0.65).tolist()
      [1.0, 0.0, 0.0]
    """
    if not 0 <= drop <= 1:
        raise UserError(f"keep_mask: drop must be in 0 .. 1, not {drop}")
    return (jnp.asarray(uniform) < 1 - drop).astype(jnp.float32)


def reconstruct(x: AnyArray, params: Mapping[str, Mapping[str, Array]]) -> Array:
    """MGD's generator: 3x3 convolution, ReLU, 3x3 convolution, all with C channels.

    Args:
      x: f32[B, H, W, C], the student's map (adapted to the teacher's channels) times the mask.
      params: {"first", "second"}, each a 3x3 convolution {"kernel" f32[3, 3, C, C], "bias" f32[C]}.

    Returns:
      f32[B, H, W, C], to be compared with the teacher by `squared`; the generator has random initial weights.

    Scope: receptive field of 5 x 5 cells.
    Peers: MGD's `generation`.
    Reference: Yang et al., "Masked Generative Distillation", 2022, Eq. 3.

    Example:
      >>> same = {"kernel": jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0), "bias": jnp.zeros(1)}
      >>> reconstruct(jnp.array([-1.0, 2.0]).reshape(1, 1, 2, 1), {"first": same, "second": same}).ravel().tolist()
      [0.0, 2.0]
    """
    shapes.check("reconstruct", x=(x, "B H W C"))
    x = jax.nn.relu(common.conv(jnp.asarray(x, jnp.float32), params["first"]))
    return common.conv(x, params["second"])
