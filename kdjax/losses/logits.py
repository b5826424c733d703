"""Predictions compared as distributions: softened softmax and sigmoid (Hinton, LD), modulated BCE (CrossKD, BCKD)."""

import jax
import jax.numpy as jnp

from kdjax.losses import common
from kdjax.structs import Array


def softmax_kl(student: Array, teacher: Array, *, temperature: float = 1.0, class_reduction: str = "sum") -> Array:
    """KL divergence of the teacher's and the student's softmax over the last axis.

        p = softmax(teacher / tau),  q = softmax(student / tau),  e = tau^2 sum_k p_k (log p_k - log q_k)

    Args:
      student: f32[..., K], logits of classes or of the bins of a box edge.
      teacher: f32[..., K].
      temperature: tau > 0.
      class_reduction: "sum" over k, or "mean" (K times smaller).

    Returns:
      f32[...], >= 0, zero if the logits differ by a constant.

    Scope: the last axis.
    Peers: "sum": mdistiller KD, mmrazor `KLDivergence`, CrossKD's KL on box edges. "mean": mmdetection's
      `KnowledgeDistillationKLDivLoss` (LD's localisation and class terms).
    Reference: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, Eqs. 1-4; Zheng et al.,
      "Localization Distillation for Dense Object Detection", 2022, Eq. 3.

    Raises:
      ValueError: shapes differ, unknown reduction, or the temperature is not above 0.

    Example:
      >>> x = jnp.array([0.0, 1.0, 2.0])
      >>> [round(float(softmax_kl(y, x)), 4) for y in (x + 5, 2 * x)]
      [0.0, 0.1601]
    """
    student, teacher = common.float32_pair(student, teacher, "softmax_kl")
    if class_reduction not in ("sum", "mean"):
        raise ValueError(f"softmax_kl reduces classes by 'sum' or 'mean', not by {class_reduction!r}")
    if temperature <= 0:
        raise ValueError(f"softmax_kl needs a temperature above 0, not {temperature}")
    log_p = jax.nn.log_softmax(teacher / temperature, -1)
    log_q = jax.nn.log_softmax(student / temperature, -1)
    reduce = jnp.sum if class_reduction == "sum" else jnp.mean
    return temperature**2 * reduce(jnp.exp(log_p) * (log_p - log_q), -1)


def sigmoid_kl(student: Array, teacher: Array, *, temperature: float = 1.0) -> Array:
    """KL divergence of the teacher's and the student's sigmoid, class by class: tau^2 KL(Bern(p) || Bern(q)).

    Args:
      student: f32[...], logits.
      teacher: f32[...].
      temperature: tau > 0, divides both logits.

    Returns:
      f32[...], >= 0, zero exactly where the logits agree: a common shift is charged.

    Scope: element.
    Peers: none; the sum over classes is the sigmoid form of Hinton's loss, the mean is K times smaller.
    Reference: methods.md 3.14.

    Raises:
      ValueError: shapes differ, or the temperature is not above 0.

    Example:
      >>> round(float(sigmoid_kl(jnp.array(0.0), jnp.array(50.0))), 4)  # log 2
      0.6931
    """
    student, teacher = common.float32_pair(student, teacher, "sigmoid_kl")
    if temperature <= 0:
        raise ValueError(f"sigmoid_kl needs a temperature above 0, not {temperature}")
    student, teacher = student / temperature, teacher / temperature
    yes = jax.nn.sigmoid(teacher) * (jax.nn.log_sigmoid(teacher) - jax.nn.log_sigmoid(student))
    no = jax.nn.sigmoid(-teacher) * (jax.nn.log_sigmoid(-teacher) - jax.nn.log_sigmoid(-student))
    return temperature**2 * (yes + no)


def modulated_bce(student: Array, teacher: Array, *, beta: float = 1.0) -> Array:
    """Binary cross-entropy with the teacher's score as target, weighted by how far the scores are apart.

        e = |sigmoid(student) - sigmoid(teacher)|^beta BCE(student, sigmoid(teacher))

    The weight is not detached.

    Args:
      student: f32[...], logits: CrossKD's reused head, or BCKD's student.
      teacher: f32[...], logits.
      beta: exponent of the weight, >= 1.

    Returns:
      f32[...], >= 0, zero exactly where the scores agree (for beta = 1 with one-sided slopes; the gradient given there
      is 0).

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
    return _power(jax.nn.sigmoid(student) - target, beta) * cross_entropy


def _power(difference: Array, beta: float) -> Array:
    if beta == 1:
        return common.absolute(difference)
    apart = difference != 0  # the slope of |x|^beta at 0 is computed as 0 * inf otherwise
    return jnp.where(apart, jnp.abs(jnp.where(apart, difference, 1.0)) ** beta, 0.0)


def score_gap(student: Array, teacher: Array) -> Array:
    """Largest difference of the scores of a prior over the classes: max_k |sigmoid(teacher) - sigmoid(student)|.

    Args:
      student: f32[..., K], logits.
      teacher: f32[..., K].

    Returns:
      f32[...] in 0 .. 1: BCKD's weight of the box term (to be detached there), GID's score of an instance.

    Scope: prior.
    Peers: BCKD; GID.
    Reference: Yang et al., "Bridging Cross-task Protocol Inconsistency", 2023, Eq. 6.

    Example:
      >>> score_gap(jnp.array([0.0, 50.0]), jnp.array([0.0, -50.0])).tolist()
      1.0
    """
    student, teacher = common.float32_pair(student, teacher, "score_gap")
    return jnp.max(jnp.abs(jax.nn.sigmoid(teacher) - jax.nn.sigmoid(student)), -1)
