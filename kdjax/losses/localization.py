"""Where localisation distillation (LD) applies: the valuable region around the positives.

The divergence of the box edges itself is `logits.softmax_kl(student, teacher, temperature=10, class_reduction="mean")`
on f32[..., 4, bins].
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kdjax.boxes import iou
from kdjax.structs import Array


def candidates(
    anchors: Array, boxes: Array, level_sizes: Sequence[int], *, topk: int = 9
) -> tuple[Array, Array, Array]:
    """The anchors nearest to every box on every level, and the IoU that divides them (the candidates of ATSS).

    Args:
      anchors: f32[N, 4], x1 y1 x2 y2 in pixels, all levels, fine to coarse.
      boxes: f32[B, M, 4], the same.
      level_sizes: number of anchors of each level; they add up to N.
      topk: how many are taken a level (all where a level has fewer).

    Returns:
      (index i32[B, M, T] into the anchors, IoU f32[B, M, T], threshold f32[B, M] = mean + standard deviation (unbiased)
      of these IoUs).

    Scope: object.
    Peers: mmdetection's `ATSSAssigner`.
    Reference: Zhang et al., "ATSS", 2020, Algorithm 1.

    Example:
      >>> anchors = jnp.array([[0.0, 0, 8, 8], [8, 0, 16, 8], [16, 0, 24, 8]])
      >>> index, overlap, threshold = candidates(anchors, jnp.array([[[0.0, 0, 8, 8]]]), [3], topk=2)
      >>> index.tolist(), overlap.tolist(), round(float(threshold[0, 0]), 3)
      ([[[0, 1]]], [[[1.0, 0.0]]], 1.207)
    """
    anchors, boxes = jnp.asarray(anchors, jnp.float32), jnp.asarray(boxes, jnp.float32)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    distance = jnp.sqrt(jnp.sum(jnp.square((boxes[..., None, :2] + boxes[..., None, 2:]) / 2 - centres), -1))
    start, index = 0, []
    for size in level_sizes:
        _, nearest = jax.lax.top_k(-distance[..., start : start + size], min(topk, size))
        index.append(nearest + start)
        start += size
    index = jnp.concatenate(index, -1)
    overlap = iou.box_iou(boxes[..., None, :], anchors[index])
    deviation = jnp.std(overlap, -1, ddof=1) if overlap.shape[-1] > 1 else 0.0
    return index, overlap, jnp.mean(overlap, -1) + deviation


def valuable_region(anchors: Array, boxes: Array, valid: Array, threshold: Array, *, gamma: float = 0.25) -> Array:
    """Weights of the valuable localisation region: the largest IoU with a box whose DIoU lies in [gamma a, a).

    Args:
      anchors: f32[N, 4], x1 y1 x2 y2 in pixels.
      boxes: f32[B, M, 4], the same.
      valid: bool[B, M], False on padding.
      threshold: f32[B, M], a of every box, from `candidates`.
      gamma: lower bound of the region as a share of a, 0 .. 1; 1 leaves nothing.

    Returns:
      f32[B, N] in 0 .. 1, zero outside the region. A positive prior may lie in it too.

    Scope: image.
    Peers: the official LD code.
    Reference: Zheng et al., "Localization Distillation for Dense Object Detection", 2022, Algorithm 1.

    Example:
      >>> anchors = jnp.array([[0.0, 0, 8, 8], [2, 0, 10, 8], [40, 0, 48, 8]])
      >>> box, valid = jnp.array([[[0.0, 0, 8, 8]]]), jnp.array([[True]])
      >>> [round(float(u), 2) for u in valuable_region(anchors, box, valid, jnp.array([[0.8]]))[0]]
      [0.0, 0.6, 0.0]
    """
    anchors, boxes = jnp.asarray(anchors, jnp.float32), jnp.asarray(boxes, jnp.float32)
    overlap, distance = iou.pairwise(boxes, anchors), iou.pairwise(boxes, anchors, mode="diou", eps=1e-7)
    a = threshold[..., None]
    inside = (distance >= gamma * a) & (distance < a) & valid[..., None]
    return jnp.max(jnp.where(inside, overlap, 0.0), 1, initial=0.0)
