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


def sigmoid_focal(logits: Array, labels: Array, *, alpha: float = 0.25, gamma: float = 2.0) -> Array:
    """Focal loss of independent classes: cross-entropy, weighted down where the prediction is already good.

    With the target t_c = 1 where c is the label and 0 elsewhere, and p = sigmoid(logits):

      (alpha t_c + (1 - alpha)(1 - t_c)) |t_c - p_c|^gamma (-t_c log p_c - (1 - t_c) log(1 - p_c))

    Args:
      logits: f32[..., K].
      labels: i32[...], 0 .. K; K is background.
      alpha: weight of the true class against 1 - alpha of the others, 0 .. 1.
      gamma: strength of the focus, >= 1.

    Returns:
      f32[..., K], >= 0; 0 where a probability equals its target.

    Scope: each entry on its own.

    Peers: mmdetection's `FocalLoss` with `use_sigmoid=True`, `reduction="none"`.

    Reference: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 5.

    Example:
      >>> import numpy as np
      >>> sigmoid_focal(np.zeros((1, 2)), np.array([2])).round(4).tolist()
      [[0.12999999523162842, 0.12999999523162842]]
    """
    logits = jnp.asarray(logits).astype(jnp.float32)
    target = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    balance = alpha * target + (1 - alpha) * (1 - target)
    weight = balance * jnp.abs(target - jax.nn.sigmoid(logits)) ** gamma
    return weight * optax.sigmoid_binary_cross_entropy(logits, target)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Softmax cross-entropy: `-log softmax(logits)[label]`.

    Args:
      logits: f32[..., K + 1], the last column is background.
      labels: i32[...], 0 .. K.

    Returns:
      f32[...], >= 0.

    Scope: each row on its own.

    Peers: mmdetection's `CrossEntropyLoss` with `use_sigmoid=False`, `reduction="none"`.

    Example:
      >>> import numpy as np
      >>> round(float(cross_entropy(np.zeros((1, 2)), np.array([0]))[0]), 4)
      0.6931
    """
    return optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits).astype(jnp.float32), jnp.asarray(labels))


def binary_cross_entropy(logits: Array, labels: Array) -> Array:
    """Cross-entropy of independent classes: `-t_c log p_c - (1 - t_c) log(1 - p_c)`, t_c = 1 where c is the label.

    Args:
      logits: f32[..., K].
      labels: i32[...], 0 .. K; K is background. (For a region proposal network K = 1: 0 is an object, 1 is none.)

    Returns:
      f32[..., K], >= 0.

    Scope: each entry on its own.

    Peers: mmdetection's `CrossEntropyLoss` with `use_sigmoid=True`, `reduction="none"`.

    Example:
      >>> import numpy as np
      >>> round(float(binary_cross_entropy(np.zeros((1, 1)), np.array([1]))[0, 0]), 4)
      0.6931
    """
    logits = jnp.asarray(logits).astype(jnp.float32)
    return optax.sigmoid_binary_cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32))


def soft_binary_cross_entropy(logits: Array, target: Array) -> Array:
    """Cross-entropy of a probability against a soft label: `-t log p - (1 - t) log(1 - p)`, p = sigmoid(logits).

    Args:
      logits: f32[...].
      target: f32[...], t in 0 .. 1, such as a centreness.

    Returns:
      f32[...], >= 0; at least the entropy of the label.

    Scope: each entry on its own.

    Peers: mmdetection's `CrossEntropyLoss` with `use_sigmoid=True` on centreness, `reduction="none"`.

    Example:
      >>> import numpy as np
      >>> round(float(soft_binary_cross_entropy(np.array(0.0), np.array(0.3))), 4)
      0.6931
    """
    return optax.sigmoid_binary_cross_entropy(jnp.asarray(logits).astype(jnp.float32), jnp.asarray(target))
