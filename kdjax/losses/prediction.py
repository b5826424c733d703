"""Prediction-guided feature imitation (PFI): imitate features where the two nets predict differently."""

import jax
import jax.numpy as jnp

from kdjax.losses import common
from kdjax.structs import Array


def disagreement(student: Array, teacher: Array, *, space: str = "logits") -> Array:
    """Mean squared difference of class predictions in every cell: P = mean_{a,k} (p_s - p_t)^2.

    Args:
      student: f32[B, H, W, A*K], class logits.
      teacher: f32[B, H, W, A*K].
      space: "logits", or "probs" for their sigmoids (P is then about 1e-6 in the background).

    Returns:
      f32[B, H, W, 1], >= 0, zero where the predictions agree. Not detached: the published codes let PFI pull the
      predictions too.

    Scope: cell.
    Peers: logits as in mmrazor's RetinaNet fork; probabilities as in SparseML and PaddleDetection.
    Reference: Li et al., "Rank Mimicking and Prediction-guided Feature Imitation", 2022, Eq. 7.

    Raises:
      ValueError: shapes differ, or unknown space.

    Example:
      >>> disagreement(jnp.array([1.0, 3.0]).reshape(1, 1, 1, 2), jnp.zeros((1, 1, 1, 2))).ravel().tolist()
      [5.0]
    """
    student, teacher = common.float32_pair(student, teacher, "disagreement")
    if space not in ("logits", "probs"):
        raise ValueError(f"disagreement has the spaces 'logits' and 'probs', not {space!r}")
    if space == "probs":
        student, teacher = jax.nn.sigmoid(student), jax.nn.sigmoid(teacher)
    return jnp.mean(jnp.square(student - teacher), -1, keepdims=True)


def unit_mean(x: Array, *, axis_name: str | None = None, eps: float = 1e-12) -> Array:
    """Scales a nonnegative array to mean 1 over the whole batch: x / max(mean x, eps).

    Args:
      x: f32[B, ...], >= 0.
      axis_name: under `pmap` or `shard_map`, the mapped axis that splits the batch.
      eps: smallest divisor.

    Returns:
      f32[B, ...]; zeros stay zeros.

    Scope: global batch.

    Example:
      >>> unit_mean(jnp.array([1.0, 3.0])).tolist()
      [0.5, 1.5]
    """
    x = jnp.asarray(x, jnp.float32)
    axes = tuple(range(x.ndim))
    mean = common.sum_over(x, axes, axis_name) / common.count_over(x, axes, axis_name)
    return x / jnp.maximum(mean, eps)


def prediction_guided(student: Array, teacher: Array, guide: Array) -> Array:
    """Mean squared feature difference of every cell times its guide: P * mean_c (student - teacher)^2.

    Args:
      student: f32[B, H, W, C], any range.
      teacher: f32[B, H, W, C].
      guide: f32[B, H, W, 1], the P of `disagreement` (or `unit_mean` of it).

    Returns:
      f32[B, H, W, 1], >= 0, zero where features or predictions agree. A guide of ones gives the mean squared error.

    Scope: cell.
    Peers: mean(P F) as in mmrazor's fork and SparseML; PaddleDetection takes a norm of P F instead.
    Reference: Li et al., "Rank Mimicking and Prediction-guided Feature Imitation", 2022, Eqs. 6-8.

    Example:
      >>> student, teacher, guide = jnp.ones((1, 1, 1, 4)), jnp.zeros((1, 1, 1, 4)), jnp.full((1, 1, 1, 1), 5.0)
      >>> prediction_guided(student, teacher, guide).ravel().tolist()
      [5.0]
    """
    student, teacher = common.float32_pair(student, teacher, "prediction_guided")
    return guide * jnp.mean(jnp.square(student - teacher), -1, keepdims=True)
