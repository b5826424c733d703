"""Kullback-Leibler divergences of the teacher's and the student's distributions."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from kdjax import shapes
from kdjax.losses import common
from kdjax.structs import AnyArray, Array


def channel_kl(
    student: AnyArray, teacher: AnyArray, *, temperature: float = 1.0, position_weight: AnyArray | None = None
) -> Array:
    """KL divergence of the teacher's and the student's softmax over space, channel by channel.

        p = softmax_hw(teacher / tau),  q = softmax_hw(student / tau),  e[b, c] = tau^2 sum_hw p (log p - log q)

    Args:
      student: f32[B, H, W, C], any range.
      teacher: f32[B, H, W, C].
      temperature: tau > 0.
      position_weight: f32[B, H, W, 1], factors of the terms of the sum over space, such as
        `joint_spatial_attention`; None is 1 everywhere. With weights the sum may be negative.

    Returns:
      f32[B, C], >= 0 without weights; zero if the two differ by a constant in each image and channel. Its mean is the
      loss of one level, tau^2/(B C) sum KL.

    Scope: image and channel.
    Peers: mmrazor's `ChannelWiseDivergence`, TorchDistiller; mmdetection-distiller leaves out the teacher's entropy.
    Reference: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", 2021, Eqs. 3-4; MKD Eq. 5.

    Raises:
      UserError: shapes differ, or the temperature is not > 0.

    Example:
      >>> x = jnp.arange(4.0).reshape(1, 2, 2, 1)
      >>> [round(float(channel_kl(y, x)[0, 0]), 4) for y in (x + 5, 2 * x)]
      [0.0, 0.2122]
    """
    student, teacher = common.float32_pair(student, teacher, "channel_kl", "B H W C")
    common.check_positive("channel_kl", temperature=temperature)
    log_p = jax.nn.log_softmax(teacher / temperature, (1, 2))
    log_q = jax.nn.log_softmax(student / temperature, (1, 2))
    divergence = jnp.exp(log_p) * (log_p - log_q)
    if position_weight is not None:
        shapes.check("channel_kl", student=(student, "B H W C"), position_weight=(position_weight, "B H W 1"))
        divergence = divergence * position_weight
    return temperature**2 * jnp.sum(divergence, (1, 2))


def softmax_kl(
    student: AnyArray, teacher: AnyArray, *, temperature: float = 1.0, class_reduction: Literal["sum", "mean"] = "sum"
) -> Array:
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
      UserError: shapes differ, the temperature is not > 0, or `class_reduction` is unknown.

    Example:
      >>> x = jnp.array([0.0, 1.0, 2.0])
      >>> [round(float(softmax_kl(y, x)), 4) for y in (x + 5, 2 * x)]
      [0.0, 0.1601]
    """
    student, teacher = common.float32_pair(student, teacher, "softmax_kl")
    common.check_choice("softmax_kl", ("sum", "mean"), class_reduction=class_reduction)
    common.check_positive("softmax_kl", temperature=temperature)
    log_p = jax.nn.log_softmax(teacher / temperature, -1)
    log_q = jax.nn.log_softmax(student / temperature, -1)
    reduce = jnp.sum if class_reduction == "sum" else jnp.mean
    return temperature**2 * reduce(jnp.exp(log_p) * (log_p - log_q), -1)


def sigmoid_kl(student: AnyArray, teacher: AnyArray, *, temperature: float = 1.0) -> Array:
    """KL divergence of the teacher's and the student's sigmoid, class by class: tau^2 KL(Bern(p) || Bern(q)).

    Args:
      student: f32[...], logits.
      teacher: f32[...].
      temperature: tau > 0, divides both logits.

    Returns:
      f32[...], >= 0, zero exactly where the logits agree; a shift of all logits is penalised.

    Scope: element.
    Peers: none; the sum over classes is the sigmoid form of Hinton's loss, the mean is K times smaller.
    Reference: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, for independent classes.

    Raises:
      UserError: shapes differ, or the temperature is not > 0.

    Example:
      >>> round(float(sigmoid_kl(jnp.array(0.0), jnp.array(50.0))), 4)  # log 2
      0.6931
    """
    student, teacher = common.float32_pair(student, teacher, "sigmoid_kl")
    common.check_positive("sigmoid_kl", temperature=temperature)
    student, teacher = student / temperature, teacher / temperature
    present = jax.nn.sigmoid(teacher) * (jax.nn.log_sigmoid(teacher) - jax.nn.log_sigmoid(student))
    absent = jax.nn.sigmoid(-teacher) * (jax.nn.log_sigmoid(-teacher) - jax.nn.log_sigmoid(-student))
    return temperature**2 * (present + absent)


def decoupled_kl(
    student: AnyArray, teacher: AnyArray, labels: AnyArray, *, temperature: float = 1.0
) -> tuple[Array, Array]:
    """KL of the target class against the rest, and KL among the other classes, for softmax heads (DKD).

        TCKD = tau^2 KL((p_y, 1 - p_y) || (q_y, 1 - q_y))
        NCKD = tau^2 KL(softmax_{k != y}(teacher / tau) || softmax_{k != y}(student / tau))

    The loss is alpha TCKD + beta NCKD; TCKD + (1 - p_y) NCKD is Hinton's.

    Args:
      student: f32[..., K], logits, background included.
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
      UserError: shapes differ, or the temperature is not > 0.

    Example:
      >>> student, teacher = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.0, 0.0, 2.0]])
      >>> [round(float(v[0]), 4) for v in decoupled_kl(student, teacher, jnp.array([2]))]
      [0.0989, 0.0]
    """
    student, teacher = common.float32_pair(student, teacher, "decoupled_kl")
    common.check_positive("decoupled_kl", temperature=temperature)
    common.check_labels("decoupled_kl", student, labels)
    (target_s, rest_s), (target_t, rest_t) = (_split(x / temperature, labels) for x in (student, teacher))
    # log p_y - log(1 - p_y) is a difference of logits, so p_y is a sigmoid and no logarithm of 1 - p is needed.
    odds_s = target_s - jax.nn.logsumexp(rest_s, -1)
    odds_t = target_t - jax.nn.logsumexp(rest_t, -1)
    scale = temperature**2
    return scale * sigmoid_kl(odds_s, odds_t), scale * _other_kl(rest_s, rest_t)


def decoupled_sigmoid_kl(
    student: AnyArray, teacher: AnyArray, labels: AnyArray, *, temperature: float = 1.0
) -> tuple[Array, Array]:
    """`decoupled_kl` for sigmoid heads, on positive priors.

        TCKD = KL(Bern(sigmoid(teacher_y)) || Bern(sigmoid(student_y))),   NCKD as in `decoupled_kl`

    Args:
      student: f32[..., K], logits without background.
      teacher: f32[..., K].
      labels: i32[...], the assigned class y, 0 .. K-1.
      temperature: tau > 0, of NCKD.

    Returns:
      (TCKD f32[...], NCKD f32[...]), both >= 0. NCKD is 0 for K = 1 and 2.

    Scope: prior.
    Peers: none.
    Reference: Zhao et al., "Decoupled Knowledge Distillation", 2022, Eqs. 5-7, with a sigmoid for the target.

    Example:
      >>> x = jnp.array([[0.0, 1.0, 2.0]])
      >>> [round(float(v[0]), 4) for v in decoupled_sigmoid_kl(x, x, jnp.array([2]))]
      [0.0, 0.0]
    """
    student, teacher = common.float32_pair(student, teacher, "decoupled_sigmoid_kl")
    common.check_positive("decoupled_sigmoid_kl", temperature=temperature)
    common.check_labels("decoupled_sigmoid_kl", student, labels)
    target_s, target_t = _split(student, labels)[0], _split(teacher, labels)[0]
    rest_s, rest_t = _split(student / temperature, labels)[1], _split(teacher / temperature, labels)[1]
    return sigmoid_kl(target_s, target_t), temperature**2 * _other_kl(rest_s, rest_t)


def _split(x: AnyArray, labels: AnyArray) -> tuple[Array, Array]:
    """Logit of the target; the logits with the target at -1e9, out of every softmax."""
    target = labels[..., None] == jnp.arange(x.shape[-1])
    return jnp.sum(jnp.where(target, x, 0.0), -1), jnp.where(target, -1e9, x)


def _other_kl(student: AnyArray, teacher: AnyArray) -> Array:
    """KL over the classes other than the target, whose probability is 0 on both sides."""
    log_p, log_q = jax.nn.log_softmax(teacher, -1), jax.nn.log_softmax(student, -1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)


def rank_kl(
    student: AnyArray, teacher: AnyArray, matched: AnyArray, positive: AnyArray, *, boxes: int, theta: float = 1.0
) -> Array:
    """KL divergence of the teacher's and the student's softmax over the positive priors of one object.

        p = softmax_{i in P_j}(teacher / theta),  q likewise,  e[b, j] = sum_{i in P_j} p_i (log p_i - log q_i)

    Priors are compared pair by pair, so a student that ranks them in reverse is penalised. (Ports that sort both sides
    do not penalise it.)

    Args:
      student: f32[B, N], the score of each prior in 0 .. 1 (`label_score`, or its product with an IoU).
      teacher: f32[B, N], on the same priors.
      matched: i32[B, N], index of the object of each prior, 0 .. boxes-1 where `positive`.
      positive: bool[B, N], the priors that belong to an object.
      boxes: M, the number of (padded) objects per image.
      theta: temperature, > 0; values below 1 sharpen the distribution, which is nearly flat for scores in 0 .. 1.

    Returns:
      f32[B, M], >= 0; for scores in 0 .. 1 and theta = 1 below 0.475. Zero for objects with one positive prior or none
      and where the score differences of both models agree. The loss is the sum divided by the number of objects with
      positives (`has_positives`).

    Scope: object.
    Peers: PaddleDetection's port, with the masked softmax. mmrazor's fork differs: it sorts first.
    Reference: Li et al., "Knowledge Distillation for Object Detection via Rank Mimicking and Prediction-guided Feature
      Imitation", 2022, Eqs. 3-5.

    Example:
      >>> student, teacher = jnp.array([[0.1, 0.5, 0.9]]), jnp.array([[0.9, 0.5, 0.1]])
      >>> owner, positive = jnp.zeros((1, 3), int), jnp.ones((1, 3), bool)
      >>> round(float(rank_kl(student, teacher, owner, positive, boxes=1)[0, 0]), 3)
      0.208
    """
    student, teacher = common.float32_pair(student, teacher, "rank_kl", "B N")
    shapes.check("rank_kl", student=(student, "B N"), matched=(matched, "B N"), positive=(positive, "B N"))
    common.check_positive("rank_kl", theta=theta)
    batch = student.shape[0]
    segment = _segments(matched, positive, boxes)

    def per_object(reduce: Callable[[Array, Array, int], Array], x: Array) -> Array:
        return reduce(x.ravel(), segment.ravel(), batch * (boxes + 1))

    def log_softmax(scores: Array) -> Array:
        scores = scores / theta
        peak = per_object(jax.ops.segment_max, jax.lax.stop_gradient(scores))
        scores = scores - peak[segment]
        total = per_object(jax.ops.segment_sum, jnp.exp(scores))
        return scores - jnp.log(jnp.where(total > 0, total, 1.0))[segment]

    log_p, log_q = log_softmax(teacher), log_softmax(student)
    divergence = per_object(jax.ops.segment_sum, jnp.exp(log_p) * (log_p - log_q))
    return divergence.reshape(batch, boxes + 1)[:, :boxes]


def has_positives(matched: AnyArray, positive: AnyArray, *, boxes: int) -> Array:
    """Whether each object has a positive prior: bool[B, M] from i32[B, N] and bool[B, N].

    Example:
      >>> has_positives(jnp.array([[1, 0]]), jnp.array([[True, False]]), boxes=2).tolist()
      [[False, True]]
    """
    batch = matched.shape[0]
    segment = _segments(matched, positive, boxes)
    count = jax.ops.segment_sum(jnp.ones(segment.size), segment.ravel(), batch * (boxes + 1))
    return count.reshape(batch, boxes + 1)[:, :boxes] > 0


def _segments(matched: AnyArray, positive: AnyArray, boxes: int) -> Array:
    """Index of each prior's object in the batch; the priors without an object share the last index of their image."""
    image = jnp.arange(matched.shape[0])[:, None]
    return image * (boxes + 1) + jnp.where(positive, matched, boxes)
