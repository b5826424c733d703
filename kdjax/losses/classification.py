"""Classification losses of detectors."""

import jax
import jax.numpy as jnp
import optax

from kdjax.structs import Array


def quality_focal(logits: Array, labels: Array, quality: Array, *, beta: float = 2.0) -> Array:
    """Quality focal loss: cross-entropy against a soft label, weighted by the distance to that label.

    With the target t_c = quality where c is the label and 0 elsewhere, and p = sigmoid(logits):

      sum_c |t_c - p_c|^beta (-t_c log p_c - (1 - t_c) log(1 - p_c))

    Args:
      logits: f32[..., K].
      labels: i32[...], 0 .. K; K is background.
      quality: f32[...], soft label of the true class in 0 .. 1 (the IoU); not read at background.
      beta: strength of the focus, > 1.

    Returns:
      f32[...], >= 0; 0 only where every probability equals its target and is 0 or 1, or equals it (weight 0).

    Scope: each prior on its own, summed over its classes.

    Peers: mmdetection's `QualityFocalLoss` with `reduction="none"`; the gradient flows through the weight as well.

    Reference: Li et al., Generalized Focal Loss, NeurIPS 2020, equation 2.

    Example:
      >>> import numpy as np
      >>> loss = quality_focal(np.array([[0.0, -20.0]]), np.array([0]), np.array([1.0]))
      >>> loss.shape, round(float(loss[0]), 4)
      ((1,), 0.1733)
    """
    logits = jnp.asarray(logits).astype(jnp.float32)
    # A label of K has no column: its target is zero everywhere.
    target = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32) * quality[..., None]
    weight = jnp.abs(target - jax.nn.sigmoid(logits)) ** beta
    return jnp.sum(weight * optax.sigmoid_binary_cross_entropy(logits, target), axis=-1)
