"""Losses of class logits."""

import jax
import jax.numpy as jnp

from kdjax.losses import common
from kdjax.structs import AnyArray, Array


def _binary_cross_entropy(logits: AnyArray, target: Array) -> Array:
    target = target.astype(logits.dtype)
    return -target * jax.nn.log_sigmoid(logits) - (1.0 - target) * jax.nn.log_sigmoid(-logits)


def quality_focal(logits: AnyArray, labels: AnyArray, quality: AnyArray, *, beta: float = 2.0) -> Array:
    """Quality focal loss: cross-entropy against a soft label, weighted by the distance to that label.

    With the target t_c = quality where c is the label and 0 elsewhere, and p = sigmoid(logits):

      sum_c |t_c - p_c|^beta (-t_c log p_c - (1 - t_c) log(1 - p_c))

    Args:
      logits: f32[..., K].
      labels: i32[...], 0 .. K; K is background.
      quality: f32[...], soft label of the true class in 0 .. 1 (the IoU); not read at background.
      beta: strength of the focus, > 1.

    Returns:
      f32[...], >= 0; 0 where every probability equals its target.

    Scope: each prior on its own, summed over its classes.

    Peers: mmdetection's `QualityFocalLoss` with `reduction="none"`; the gradient flows through the weight as well.

    Reference: Li et al., Generalized Focal Loss, NeurIPS 2020, equation 2.

    Example:
      >>> import numpy as np
      >>> loss = quality_focal(np.array([[0.0, -20.0]]), np.array([0]), np.array([1.0]))
      >>> loss.shape, round(float(loss[0]), 4)
      ((1,), 0.1733)
    """
    common.check_labels("quality_focal", logits, labels)
    logits = jnp.asarray(logits).astype(jnp.float32)
    # The label K has no column, so its target is zero everywhere.
    target = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32) * quality[..., None]
    weight = jnp.abs(target - jax.nn.sigmoid(logits)) ** beta
    return jnp.sum(weight * _binary_cross_entropy(logits, target), axis=-1)


def varifocal(
    logits: AnyArray, labels: AnyArray, quality: AnyArray, *, alpha: float = 0.75, gamma: float = 2.0
) -> Array:
    """Varifocal loss: cross-entropy against a soft label, weighted by that label or, elsewhere, by the score.

    With the target t = quality at the label and 0 elsewhere, and p = sigmoid(logits), constants to the gradient:

      sum_c w_c (-t_c log p_c - (1 - t_c) log(1 - p_c)),  w_c = t_c at the label, alpha p_c^gamma elsewhere

    Args:
      logits: f32[..., K].
      labels: i32[...], 0 .. K; K is background.
      quality: f32[...], soft label of the true class in 0 .. 1 (the IoU), without gradient; not read at background.
      alpha: weight of the other classes, >= 0.
      gamma: strength of the focus, > 0.

    Returns:
      f32[...], >= 0. A row whose quality is 0 has no loss at its label.

    Scope: each row on its own, summed over its classes.

    Peers: `loss_labels_vfl` of RT-DETR, D-FINE and transformers, which sums rows and divides by the number of boxes.

    Reference: Zhang et al., VarifocalNet, CVPR 2021, equation 2.

    Example:
      >>> import numpy as np
      >>> round(float(varifocal(np.zeros((1, 2)), np.array([0]), np.array([1.0]))[0]), 4)
      0.8231
    """
    target, present, probs, logits = _soft_target("varifocal", logits, labels, quality)
    weight = jnp.where(present, target, alpha * probs**gamma)
    return jnp.sum(weight * _binary_cross_entropy(logits, target), axis=-1)


def matchability_aware(
    logits: AnyArray, labels: AnyArray, quality: AnyArray, *, alpha: float = 1.0, gamma: float = 1.5
) -> Array:
    """Matchability-aware loss: as `varifocal`, but a match of low quality is learned too.

    With the target t = quality^gamma at the label and 0 elsewhere, and p = sigmoid(logits), constants to the gradient:

      sum_c w_c (-t_c log p_c - (1 - t_c) log(1 - p_c)),  w_c = 1 at the label, alpha p_c^gamma elsewhere

    Args:
      logits: f32[..., K].
      labels: i32[...], 0 .. K; K is background.
      quality: f32[...], soft label of the true class in 0 .. 1 (the IoU), without gradient; not read at background.
      alpha: weight of the other classes, >= 0.
      gamma: strength of the focus, > 0.

    Returns:
      f32[...], >= 0.

    Scope: each row on its own, summed over its classes.

    Peers: `loss_labels_mal` of DEIM and RT-DETRv4, which sums rows and divides by the number of boxes.

    Reference: Huang et al., DEIM, CVPR 2025, section 3.3.

    Example:
      >>> import numpy as np
      >>> round(float(matchability_aware(np.zeros((1, 1)), np.array([0]), np.array([0.0]))[0]), 4)
      0.6931
    """
    target, present, probs, logits = _soft_target("matchability_aware", logits, labels, quality)
    target, weight = common.power(target, gamma), jnp.where(present, 1.0, alpha * probs**gamma)
    return jnp.sum(weight * _binary_cross_entropy(logits, target), axis=-1)


def _soft_target(loss: str, logits: AnyArray, labels: AnyArray, quality: AnyArray) -> tuple[Array, Array, Array, Array]:
    """The quality at the label, where that is, the scores without gradient, and the logits, all [..., K]."""
    common.check_labels(loss, logits, labels)
    logits = jnp.asarray(logits).astype(jnp.float32)
    present = jnp.asarray(labels)[..., None] == jnp.arange(logits.shape[-1])
    target = jnp.where(present, jax.lax.stop_gradient(jnp.asarray(quality, jnp.float32))[..., None], 0.0)
    return target, present, jax.lax.stop_gradient(jax.nn.sigmoid(logits)), logits


def sigmoid_focal(logits: AnyArray, labels: AnyArray, *, alpha: float = 0.25, gamma: float = 2.0) -> Array:
    """Focal loss of independent classes: cross-entropy with less weight where the prediction is already good.

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
    common.check_labels("sigmoid_focal", logits, labels)
    logits = jnp.asarray(logits).astype(jnp.float32)
    target = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    balance = alpha * target + (1 - alpha) * (1 - target)
    weight = balance * jnp.abs(target - jax.nn.sigmoid(logits)) ** gamma
    return weight * _binary_cross_entropy(logits, target)


def cross_entropy(logits: AnyArray, labels: AnyArray) -> Array:
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
    common.check_labels("cross_entropy", logits, labels)
    logits, labels = jnp.asarray(logits).astype(jnp.float32), jnp.asarray(labels)
    at_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - at_label


def binary_cross_entropy(logits: AnyArray, labels: AnyArray) -> Array:
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
    common.check_labels("binary_cross_entropy", logits, labels)
    logits = jnp.asarray(logits).astype(jnp.float32)
    return _binary_cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32))


def soft_binary_cross_entropy(logits: AnyArray, target: AnyArray) -> Array:
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
    return _binary_cross_entropy(jnp.asarray(logits).astype(jnp.float32), jnp.asarray(target))


def modulated_bce(student: AnyArray, teacher: AnyArray, *, beta: float = 1.0) -> Array:
    """Binary cross-entropy with the teacher's score as target, weighted by the distance of the scores.

        e = |sigmoid(student) - sigmoid(teacher)|^beta BCE(student, sigmoid(teacher))

    The weight is not detached.

    Args:
      student: f32[...], logits of the student (BCKD), or of the teacher's head on the student's features (CrossKD).
      teacher: f32[...], logits.
      beta: exponent of the weight, >= 1.

    Returns:
      f32[...], >= 0, zero exactly where the scores agree (for beta = 1 the loss has a kink there, and its
      gradient is 0).

    Scope: element.
    Peers: CrossKD's `KDQualityFocalLoss`; BCKD's class loss is its sum over classes.
    Reference: Wang et al., "CrossKD", 2024, Eq. 5; Yang et al., "Bridging Cross-task Protocol Inconsistency for
      Distillation in Dense Object Detection", 2023, Eq. 3.

    Example:
      >>> [round(float(modulated_bce(jnp.array(x), jnp.array(0.0))), 4) for x in (0.0, 2.0)]
      [0.0, 0.4291]
    """
    student, teacher = common.float32_pair(student, teacher, "modulated_bce")
    target = jax.nn.sigmoid(teacher)
    cross_entropy = jax.nn.softplus(student) - target * student
    difference = jax.nn.sigmoid(student) - target
    distance = common.absolute(difference) if beta == 1 else common.power(jnp.abs(difference), beta)
    return distance * cross_entropy


def label_score(logits: AnyArray, labels: AnyArray) -> Array:
    """Score of each prior for its label: sigmoid(logits[..., label]).

    Args:
      logits: f32[..., K].
      labels: i32[...]; values outside 0 .. K-1 (background) are clipped to the nearest class: mask them afterwards.

    Returns:
      f32[...] in 0 .. 1.

    Scope: prior.

    Example:
      >>> label_score(jnp.array([[0.0, 50.0]]), jnp.array([1])).tolist()
      [1.0]
    """
    common.check_labels("label_score", logits, labels)
    logits = jnp.asarray(logits).astype(jnp.float32)
    index = jnp.clip(labels, 0, logits.shape[-1] - 1)[..., None]
    return jax.nn.sigmoid(jnp.take_along_axis(logits, index, -1)[..., 0])
