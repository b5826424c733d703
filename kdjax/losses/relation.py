"""Global relations within a feature map: FGD's context block and FKD's non-local block, as functions of parameters."""

import jax
import jax.numpy as jnp

from kdjax import nn
from kdjax.losses import feature
from kdjax.structs import Array


def _init_conv(key: Array, inputs: int, outputs: int) -> dict:
    """A 1x1 convolution, kernel and bias uniform in +-1/sqrt(inputs)."""
    limit = inputs**-0.5
    key_kernel, key_bias = jax.random.split(key)
    return {
        "kernel": jax.random.uniform(key_kernel, (1, 1, inputs, outputs), jnp.float32, -limit, limit),
        "bias": jax.random.uniform(key_bias, (outputs,), jnp.float32, -limit, limit),
    }


def init_context(key: Array, channels: int) -> dict:
    """Parameters of `context_block`; with these it is the identity, because its last convolution starts at 0."""
    hidden = max(channels // 2, 1)
    key_attend, key_down = jax.random.split(key)
    kaiming = (2 / channels) ** 0.5 * jax.random.normal(key_attend, (1, 1, channels, 1), jnp.float32)
    return {
        "attend": {"kernel": kaiming, "bias": jnp.zeros(1)},
        "down": _init_conv(key_down, channels, hidden),
        "norm": {"scale": jnp.ones(hidden), "bias": jnp.zeros(hidden)},
        "up": {"kernel": jnp.zeros((1, 1, hidden, channels)), "bias": jnp.zeros(channels)},
    }


def context_block(x: Array, params: dict) -> Array:
    """Adds a global context to every cell: x + W2 relu(LN(W1 c)), c = sum_hw softmax_hw(conv1x1(x)) x.

    Args:
      x: f32[B, H, W, C], any range.
      params: of `init_context`: attend (C -> 1), down (C -> C/2), norm (over the C/2 channels), up (C/2 -> C).

    Returns:
      f32[B, H, W, C]. Student and teacher have a block each, both trained; FGD compares the outputs by `squared`.

    Scope: image.
    Peers: `FeatureLoss` of FGD (GcBlock).
    Reference: Yang et al., "Focal and Global Knowledge Distillation for Detectors", 2022, Eq. 12.

    Example:
      >>> context_block(jnp.ones((1, 2, 2, 4)), init_context(jax.random.key(0), 4)).mean().tolist()
      1.0
    """
    x = jnp.asarray(x, jnp.float32)
    weights = jax.nn.softmax(nn.conv2d(x, **params["attend"]), (1, 2))
    context = jnp.sum(weights * x, (1, 2), keepdims=True)
    hidden = nn.conv2d(context, **params["down"])
    hidden = feature.standardize(hidden, axes=(1, 2, 3), eps=0.0, variance_eps=1e-5)
    hidden = jax.nn.relu(hidden * params["norm"]["scale"] + params["norm"]["bias"])
    return x + nn.conv2d(hidden, **params["up"])


def init_non_local(key: Array, channels: int, *, reduction: int = 2) -> dict:
    """Parameters of `non_local_block`; with these it is the identity, because its norm's scale starts at 0."""
    hidden = max(channels // reduction, 1)
    keys = jax.random.split(key, 4)
    params = {name: _init_conv(k, channels, hidden) for name, k in zip(("theta", "phi", "g"), keys, strict=False)}
    params["out"] = _init_conv(keys[3], hidden, channels)
    params["norm"] = {"scale": jnp.zeros(channels), "bias": jnp.zeros(channels)}
    return params


def non_local_block(x: Array, params: dict, *, pool: int = 1, axis_name: str | None = None) -> Array:
    """Mixes every cell with all others: x + BN(W (theta(x) phi(x)^T / n) g(x)), n the number of pooled cells.

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
    x = jnp.asarray(x, jnp.float32)
    batch, height, width, channels = x.shape
    pool = min(pool, height, width)

    def cells(name, pooled):
        y = nn.conv2d(x, **params[name])
        if pooled and pool > 1:  # windows side by side, what they leave at the border is dropped
            y = y[:, : height // pool * pool, : width // pool * pool]
            y = y.reshape(batch, height // pool, pool, width // pool, pool, -1).max((2, 4))
        return y.reshape(batch, -1, y.shape[-1])

    theta, phi, g = cells("theta", False), cells("phi", True), cells("g", True)
    # (theta phi^T) g = theta (phi^T g): the small product first, no matrix of all pairs of cells.
    mixed = jnp.einsum("bnk,bkc->bnc", theta, jnp.einsum("bmk,bmc->bkc", phi, g)) / phi.shape[1]
    y = nn.conv2d(mixed.reshape(batch, height, width, -1), **params["out"])
    y = feature.standardize(y, eps=0.0, variance_eps=1e-5, axis_name=axis_name)
    return x + y * params["norm"]["scale"] + params["norm"]["bias"]
