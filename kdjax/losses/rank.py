"""Rank mimicking (RM): the order in which a detector scores the priors of one object."""

import jax
import jax.numpy as jnp

from kdjax.losses import common
from kdjax.structs import Array


def label_score(logits: Array, labels: Array) -> Array:
    """Score of every prior for the class that it is assigned: sigmoid(logits[..., label]).

    Args:
      logits: f32[..., K].
      labels: i32[...]; what lies outside 0 .. K-1 (background) is read as the nearest class, for a caller who masks it.

    Returns:
      f32[...] in 0 .. 1.

    Scope: prior.

    Example:
      >>> label_score(jnp.array([[0.0, 50.0]]), jnp.array([1])).tolist()
      [1.0]
    """
    logits = jnp.asarray(logits, jnp.float32)
    index = jnp.clip(labels, 0, logits.shape[-1] - 1)[..., None]
    return jax.nn.sigmoid(jnp.take_along_axis(logits, index, -1)[..., 0])


def rank_kl(
    student: Array, teacher: Array, matched: Array, positive: Array, *, boxes: int, theta: float = 1.0
) -> Array:
    """KL divergence of the teacher's and the student's softmax over the positive priors of one object.

        p = softmax_{i in P_j}(teacher / theta),  q likewise,  e[b, j] = sum_{i in P_j} p_i (log p_i - log q_i)

    The pairing of priors stays: a student that ranks them in reverse is charged. (Ports that sort both sides are not.)

    Args:
      student: f32[B, N], one score in 0 .. 1 a prior (`label_score`, or times an IoU).
      teacher: f32[B, N], on the same priors.
      matched: i32[B, N], index of the object of each prior, 0 .. boxes-1 where `positive`.
      positive: bool[B, N], the priors that belong to an object.
      boxes: M, the number of (padded) objects an image.
      theta: temperature, > 0; below 1 it sharpens what is nearly flat for scores in 0 .. 1.

    Returns:
      f32[B, M], >= 0; for scores in 0 .. 1 and theta = 1 below 0.475. Zero for objects with one positive prior or none
      and wherever the score differences of both nets agree. The loss is the sum over the count of objects that have
      positives (`has_positives`).

    Scope: object.
    Peers: PaddleDetection's port has the masked softmax; mmrazor's fork sorts first, which is not followed.
    Reference: Li et al., "Knowledge Distillation for Object Detection via Rank Mimicking and Prediction-guided Feature
      Imitation", 2022, Eqs. 3-5.

    Example:
      >>> student, teacher = jnp.array([[0.1, 0.5, 0.9]]), jnp.array([[0.9, 0.5, 0.1]])
      >>> owner, positive = jnp.zeros((1, 3), int), jnp.ones((1, 3), bool)
      >>> round(float(rank_kl(student, teacher, owner, positive, boxes=1)[0, 0]), 3)
      0.208
    """
    student, teacher = common.float32_pair(student, teacher, "rank_kl")
    batch = student.shape[0]
    segment = _segments(matched, positive, boxes)

    def per_object(reduce, x):
        return reduce(x.ravel(), segment.ravel(), batch * (boxes + 1))

    def log_softmax(scores):
        scores = scores / theta
        peak = per_object(jax.ops.segment_max, jax.lax.stop_gradient(scores))
        scores = scores - peak[segment]
        total = per_object(jax.ops.segment_sum, jnp.exp(scores))
        return scores - jnp.log(jnp.where(total > 0, total, 1.0))[segment]

    log_p, log_q = log_softmax(teacher), log_softmax(student)
    divergence = per_object(jax.ops.segment_sum, jnp.exp(log_p) * (log_p - log_q))
    return divergence.reshape(batch, boxes + 1)[:, :boxes]


def has_positives(matched: Array, positive: Array, *, boxes: int) -> Array:
    """Which objects own a positive prior: bool[B, M] from i32[B, N] and bool[B, N].

    Example:
      >>> has_positives(jnp.array([[1, 0]]), jnp.array([[True, False]]), boxes=2).tolist()
      [[False, True]]
    """
    batch = matched.shape[0]
    segment = _segments(matched, positive, boxes)
    count = jax.ops.segment_sum(jnp.ones(segment.size), segment.ravel(), batch * (boxes + 1))
    return count.reshape(batch, boxes + 1)[:, :boxes] > 0


def _segments(matched: Array, positive: Array, boxes: int) -> Array:
    """One number an object of the batch; the priors of no object share the last one of their image."""
    image = jnp.arange(matched.shape[0])[:, None]
    return image * (boxes + 1) + jnp.where(positive, matched, boxes)
