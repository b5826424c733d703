"""Relations among the instances of an image or the cells of a map."""

import jax
import jax.numpy as jnp

from kdjax import nn, shapes
from kdjax.losses import common, distance, normalization
from kdjax.structs import AnyArray, Array

Params = dict[str, dict[str, Array]]


def pairwise_relation(student: AnyArray, teacher: AnyArray, valid: AnyArray, *, eps: float = 1e-6) -> Array:
    """Smooth L1 distance of the pairwise distances among an image's instances, each model's divided by their mean.

    Args:
      student: f32[B, R, D], one feature vector per instance.
      teacher: f32[B, R, D'].
      valid: bool[B, R], False where there is no instance.
      eps: smallest mean distance.

    Returns:
      f32[B], >= 0: the mean over pairs of different instances; 0 with fewer than three. A common scaling or rotation of
      the student's vectors changes nothing.

    Scope: image.
    Peers: a third-party Detectron2 port; no official code.
    Reference: Dai et al., "General Instance Distillation for Object Detection", 2021, Eq. 5.

    Example:
      >>> x = jnp.array([[[0.0], [1.0], [3.0]]])
      >>> pairwise_relation(4 * x, x, jnp.ones((1, 3), bool)).tolist()
      [0.0]
    """
    shapes.check("pairwise_relation", student=(student, "B R D"), teacher=(teacher, "B R E"), valid=(valid, "B R"))
    pair = valid[:, :, None] & valid[:, None, :] & ~jnp.eye(valid.shape[1], dtype=bool)
    pairs = jnp.maximum(jnp.sum(pair, (1, 2), keepdims=True), 1)

    def distances(x: AnyArray) -> Array:
        x = jnp.asarray(x, jnp.float32)
        square = jnp.sum(jnp.square(x[:, :, None] - x[:, None, :]), -1)
        apart = jnp.where(pair, common.safe_sqrt(square), 0.0)
        return apart / jnp.maximum(jnp.sum(apart, (1, 2), keepdims=True) / pairs, eps)

    smooth = distance.smooth_l1(distances(student), distances(teacher))
    mean = jnp.sum(jnp.where(pair, smooth, 0.0), (1, 2)) / pairs[:, 0, 0]
    return jnp.where(jnp.sum(valid, 1) >= 3, mean, 0.0)


def init_context(key: AnyArray, channels: int) -> Params:
    """Initial parameters of `context_block`, with which it is the identity: its last convolution is 0."""
    hidden = max(channels // 2, 1)
    key_attend, key_down = jax.random.split(key)
    kaiming = (2 / channels) ** 0.5 * jax.random.normal(key_attend, (1, 1, channels, 1), jnp.float32)
    return {
        "attend": {"kernel": kaiming, "bias": jnp.zeros(1)},
        "down": nn.init_conv2d(key_down, 1, channels, hidden),
        "norm": {"scale": jnp.ones(hidden), "bias": jnp.zeros(hidden)},
        "up": {"kernel": jnp.zeros((1, 1, hidden, channels)), "bias": jnp.zeros(channels)},
    }


def context_block(x: AnyArray, params: Params) -> Array:
    """Adds a global context to each cell (FGD): x + W2 relu(LN(W1 c)), c = sum_hw softmax_hw(conv1x1(x)) x.

    Args:
      x: f32[B, H, W, C], any range.
      params: of `init_context`: attend (C -> 1), down (C -> C/2), norm (over the C/2 channels), up (C/2 -> C).

    Returns:
      f32[B, H, W, C]. FGD has a block for the student and one for the teacher, trains both, and compares the outputs
      by `squared`.

    Scope: image.
    Peers: `FeatureLoss` of FGD (GcBlock).
    Reference: Yang et al., "Focal and Global Knowledge Distillation for Detectors", 2022, Eq. 12.

    Example:
      >>> context_block(jnp.ones((1, 2, 2, 4)), init_context(jax.random.key(0), 4)).mean().tolist()
      1.0
    """
    shapes.check("context_block", x=(x, "B H W C"))
    x = jnp.asarray(x, jnp.float32)
    weights = jax.nn.softmax(common.conv(x, params["attend"]), (1, 2))
    context = jnp.sum(weights * x, (1, 2), keepdims=True)
    hidden = common.conv(context, params["down"])
    hidden = normalization.standardize(hidden, axes=(1, 2, 3), eps=0.0, variance_eps=1e-5)
    hidden = jax.nn.relu(hidden * params["norm"]["scale"] + params["norm"]["bias"])
    return x + common.conv(hidden, params["up"])


def init_non_local(key: AnyArray, channels: int, *, reduction: int = 2) -> Params:
    """Initial parameters of `non_local_block`, with which it is the identity: the scale of its norm is 0."""
    hidden = max(channels // reduction, 1)
    keys = jax.random.split(key, 4)
    names = ("theta", "phi", "g")
    params = {name: nn.init_conv2d(k, 1, channels, hidden) for name, k in zip(names, keys[:3], strict=True)}
    params["out"] = nn.init_conv2d(keys[3], 1, hidden, channels)
    params["norm"] = {"scale": jnp.zeros(channels), "bias": jnp.zeros(channels)}
    return params


def non_local_block(x: AnyArray, params: Params, *, pool: int = 1, axis_name: str | None = None) -> Array:
    """Mixes each cell with all others (FKD): x + BN(W (theta(x) phi(x)^T / n) g(x)), n the number of pooled cells.

    Args:
      x: f32[B, H, W, C], any range.
      params: of `init_non_local`: theta, phi, g (C -> C/r), out (C/r -> C), norm (batch norm with batch statistics).
      pool: phi and g are max-pooled by it (at most by the smaller side of the map); FKD has 8, 4, 2, 2 at P2 .. P5.
      axis_name: under `pmap` or `shard_map`, the mapped axis that splits the batch.

    Returns:
      f32[B, H, W, C].

    Scope: image; the norm's statistics are those of the global batch.
    Peers: mmrazor's FKD port (mmcv's `NonLocal2d` in mode dot_product).
    Reference: Zhang and Ma, "Improve Object Detection with Feature-based Knowledge Distillation", 2021, Eq. 5.

    Example:
      >>> non_local_block(jnp.ones((1, 2, 2, 4)), init_non_local(jax.random.key(0), 4), pool=2).mean().tolist()
      1.0
    """
    shapes.check("non_local_block", x=(x, "B H W C"))
    x = jnp.asarray(x, jnp.float32)
    batch, height, width, _ = x.shape
    pool = min(pool, height, width)

    def cells(name: str, pooled: bool) -> Array:
        y = common.conv(x, params[name])
        if pooled and pool > 1:  # windows do not overlap; a rest at the border is dropped
            y = y[:, : height // pool * pool, : width // pool * pool]
            y = y.reshape(batch, height // pool, pool, width // pool, pool, -1).max((2, 4))
        return y.reshape(batch, -1, y.shape[-1])

    theta, phi, g = cells("theta", False), cells("phi", True), cells("g", True)
    # (theta phi^T) g = theta (phi^T g): the small product first avoids a matrix of all pairs of cells.
    mixed = jnp.einsum("bnk,bkc->bnc", theta, jnp.einsum("bmk,bmc->bkc", phi, g)) / phi.shape[1]
    y = common.conv(mixed.reshape(batch, height, width, -1), params["out"])
    y = normalization.standardize(y, eps=0.0, variance_eps=1e-5, axis_name=axis_name)
    return x + y * params["norm"]["scale"] + params["norm"]["bias"]
