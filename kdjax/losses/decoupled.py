"""Decoupled knowledge distillation (DKD): the target class apart from all others."""

import jax
import jax.numpy as jnp

from kdjax.losses import common, logits
from kdjax.structs import Array


def _split(x: Array, labels: Array) -> tuple[Array, Array, Array]:
    """Logit of the target; the logits with the target pushed out of every softmax; whether a class is the target."""
    target = labels[..., None] == jnp.arange(x.shape[-1])
    return jnp.sum(jnp.where(target, x, 0.0), -1), jnp.where(target, -1e9, x), target


def _other_kl(student: Array, teacher: Array) -> Array:
    """KL over the non-target classes; the masked one has probability 0 on both sides."""
    log_p, log_q = jax.nn.log_softmax(teacher, -1), jax.nn.log_softmax(student, -1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)


def decoupled(student: Array, teacher: Array, labels: Array, *, temperature: float = 1.0) -> tuple[Array, Array]:
    """KL of "target or not", and KL among the other classes, for softmax heads.

        TCKD = tau^2 KL((p_y, 1 - p_y) || (q_y, 1 - q_y))
        NCKD = tau^2 KL(softmax_{k != y}(teacher / tau) || softmax_{k != y}(student / tau))

    The loss is alpha TCKD + beta NCKD; TCKD + (1 - p_y) NCKD is Hinton's.

    Args:
      student: f32[..., K], logits, the background among the classes.
      teacher: f32[..., K].
      labels: i32[...], the target y, 0 .. K-1.
      temperature: tau > 0, in every softmax.

    Returns:
      (TCKD f32[...], NCKD f32[...]), both >= 0; both zero if and only if the logits differ by a constant. NCKD is 0 for
      K = 2.

    Scope: sample.
    Peers: mdistiller's `dkd_loss` (its mean over samples); mmrazor's port always sums.
    Reference: Zhao et al., "Decoupled Knowledge Distillation", 2022, Eqs. 5-7.

    Raises:
      ValueError: shapes differ, or the temperature is not above 0.

    Example:
      >>> student, teacher = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.0, 0.0, 2.0]])
      >>> [round(float(v[0]), 4) for v in decoupled(student, teacher, jnp.array([2]))]
      [0.0989, 0.0]
    """
    student, teacher = common.float32_pair(student, teacher, "decoupled")
    if temperature <= 0:
        raise ValueError(f"decoupled needs a temperature above 0, not {temperature}")
    (of_s, rest_s, _), (of_t, rest_t, _) = _split(student / temperature, labels), _split(teacher / temperature, labels)
    # log p_y - log(1 - p_y) is a difference of logits: target or not is a sigmoid, with no logarithm of 1 - p.
    odds_s = of_s - jax.nn.logsumexp(rest_s, -1)
    odds_t = of_t - jax.nn.logsumexp(rest_t, -1)
    scale = temperature**2
    return scale * logits.sigmoid_kl(odds_s, odds_t), scale * _other_kl(rest_s, rest_t)


def decoupled_sigmoid(
    student: Array, teacher: Array, labels: Array, *, temperature: float = 1.0
) -> tuple[Array, Array]:
    """The same split for sigmoid heads, on positive priors.

        TCKD = KL(Bern(sigmoid(teacher_y)) || Bern(sigmoid(student_y))),   NCKD as in `decoupled`

    Args:
      student: f32[..., K], logits without background.
      teacher: f32[..., K].
      labels: i32[...], the assigned class y, 0 .. K-1.
      temperature: tau > 0, of NCKD.

    Returns:
      (TCKD f32[...], NCKD f32[...]), both >= 0. NCKD is 0 for K = 1 and 2.

    Scope: prior.
    Peers: none; derived from the abstract of the paper alone.
    Reference: Yao et al., 2025 (methods.md 2.2, Y3).

    Example:
      >>> x = jnp.array([[0.0, 1.0, 2.0]])
      >>> [round(float(v[0]), 4) for v in decoupled_sigmoid(x, x, jnp.array([2]))]
      [0.0, 0.0]
    """
    student, teacher = common.float32_pair(student, teacher, "decoupled_sigmoid")
    if temperature <= 0:
        raise ValueError(f"decoupled_sigmoid needs a temperature above 0, not {temperature}")
    target_s, target_t = _split(student, labels)[0], _split(teacher, labels)[0]
    rest_s, rest_t = _split(student / temperature, labels)[1], _split(teacher / temperature, labels)[1]
    return logits.sigmoid_kl(target_s, target_t), temperature**2 * _other_kl(rest_s, rest_t)
