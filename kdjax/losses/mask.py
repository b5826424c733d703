"""Losses of instance masks: one number for each object's mask, from the logits and the truth of its pixels."""

import jax
import jax.numpy as jnp

from kdjax import shapes
from kdjax.losses import common
from kdjax.losses.classification import soft_binary_cross_entropy
from kdjax.structs import AnyArray, Array


def dice(logits: AnyArray, target: AnyArray, *, naive: bool = False, eps: float = 1e-3) -> Array:
    """Dice loss of a mask: one minus the overlap of probabilities and truth, relative to their size.

    With p = sigmoid(logits) and t = target, sums over the pixels of a mask:

      1 - 2 sum p t / ((sum p^2 + eps) + (sum t^2 + eps))        (V-Net)
      1 - (2 sum p t + eps) / (sum p + sum t + eps)              (naive)

    Args:
      logits: f32[..., H, W].
      target: f32[..., H, W], share of each pixel that the object covers, 0 .. 1.
      naive: which form.
      eps: > 0, keeps the quotient finite.

    Returns:
      f32[...], 0 (probabilities that equal a target of zeros and ones, up to eps) to 1. In the first form an empty
      target always has the loss 1, without a gradient.

    Scope: each mask on its own.

    Peers: mmdetection's `DiceLoss` with `use_sigmoid=True`, `activate=True`, `reduction="none"`.

    Reference: Milletari et al., V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image Segmentation,
      3DV 2016, section 3.

    Raises:
      UserError: the shapes differ, or eps is not positive.

    Example:
      >>> logits = jnp.array([[[0.0, 0.0], [50.0, -50.0]]])
      >>> round(float(dice(logits, jnp.array([[[1.0, 0.0], [1.0, 0.0]]]))[0]), 3)
      0.143
    """
    shapes.check("dice", logits=(logits, "... H W"), target=(target, "... H W"))
    common.check_positive("dice", eps=eps)
    probs = jax.nn.sigmoid(jnp.asarray(logits).astype(jnp.float32))
    target = jnp.asarray(target).astype(jnp.float32)
    if naive:
        overlap, size = 2 * jnp.sum(probs * target, (-2, -1)) + eps, jnp.sum(probs + target, (-2, -1)) + eps
    else:
        overlap = 2 * jnp.sum(probs * target, (-2, -1))
        size = jnp.sum(jnp.square(probs) + jnp.square(target), (-2, -1)) + 2 * eps
    return 1 - overlap / size


def mask_cross_entropy(logits: AnyArray, target: AnyArray, labels: AnyArray) -> Array:
    """Cross-entropy of a region's mask: the mean over the pixels of `-t log p - (1 - t) log(1 - p)`.

    p = sigmoid of the column of the region's class; the columns of other classes do not compete.

    Args:
      logits: f32[..., H, W, K], the masks of all classes (K = 1, labels 0: one mask whatever the class).
      target: f32[..., H, W], share of each pixel that the object covers, 0 .. 1.
      labels: i32[...], class of the region, 0 .. K-1; others are clipped to the nearest: mask them afterwards.

    Returns:
      f32[...], >= 0.

    Scope: each region on its own.

    Peers: mmdetection's `CrossEntropyLoss` with `use_mask=True` is the mean over its regions.

    Reference: He et al., Mask R-CNN, ICCV 2017, section 3.

    Raises:
      UserError: the shapes do not fit.

    Example:
      >>> logits = jnp.stack([jnp.zeros((1, 4, 4)), jnp.full((1, 4, 4), 50.0)], -1)
      >>> [round(float(mask_cross_entropy(logits, jnp.ones((1, 4, 4)), jnp.array([c]))[0]), 4) for c in (0, 1)]
      [0.6931, 0.0]
    """
    shapes.check("mask_cross_entropy", logits=(logits, "... H W K"), target=(target, "... H W"))
    common.check_labels("mask_cross_entropy", logits[..., 0, 0, :], labels)
    columns = jnp.clip(jnp.asarray(labels), 0, logits.shape[-1] - 1)[..., None, None, None]
    of_class = jnp.take_along_axis(jnp.asarray(logits), columns, axis=-1)[..., 0]
    return jnp.mean(soft_binary_cross_entropy(of_class, target), (-2, -1))
