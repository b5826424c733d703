"""The parts of detection transformers: attention, perceptrons, layers, the sine embedding, boxes as logits.

Initial values are those of the authors' code. Tokens are [B, N, C]; boxes are cx cy w h as shares of the sides.

Reference: Vaswani et al., Attention Is All You Need, NeurIPS 2017, section 3; Zhu et al., Deformable DETR, ICLR 2021.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax import nn
from kdjax.detectors.layers import Draw, LayerNorm, Linear, constant, uniform_fan_in, uniform_fans
from kdjax.nn.flops import record

Array = jax.Array

BLOCKED = -1e9  # logit of a key that a query may not look at; finite, so that a row without keys is no NaN
LARGEST_HALF = 65504.0  # of float16


def uniform(bound: float) -> Draw:
    """Uniform within the bound."""
    return lambda rng, shape: rng.uniform(-bound, bound, shape)


def linear(inputs: int, outputs: int, *, draw: Draw = uniform_fan_in) -> Linear:
    """A linear layer whose biases begin as PyTorch's, within 1 / sqrt(inputs)."""
    return Linear(inputs, outputs, draw=draw, bias=uniform(1 / math.sqrt(inputs)))


class MLP(nnx.Module):
    """Linear layers of the given widths with ReLU between them; with `zero_last` the last begins at 0."""

    def __init__(self, *widths: int, draw: Draw = uniform_fan_in, zero_last: bool = False) -> None:
        layers = [linear(*pair, draw=draw) for pair in itertools.pairwise(widths)]
        if zero_last:
            layers[-1] = Linear(*widths[-2:], draw=constant(0.0))
        self.layers = nnx.List(layers)

    def __call__(self, x: Array) -> Array:
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def sine_embedding(shape: tuple[int, int], channels: int, *, temperature: float = 10000.0) -> np.ndarray:
    """The position of each cell of a map, row by row: [sin y w_i, cos y w_i, sin x w_i, cos x w_i].

    w_i = temperature^(-4 i / channels), i < channels / 4; each of the four is a block of channels.

    Args:
      shape: height and width of the map, in cells.
      channels: a multiple of 4.
      temperature: > 1.

    Returns:
      f32[H * W, channels] in NumPy.

    Peers: transformers 5.24. The authors' RT-DETR and D-FINE add the table of the transposed map: equal where the map
      is square.

    Reference: Carion et al., End-to-End Object Detection with Transformers, ECCV 2020, section A.4.
    """
    quarter = channels // 4
    omega = 1.0 / temperature ** (np.arange(quarter) / quarter)
    y, x = (place.ravel()[:, None] * omega for place in np.mgrid[: shape[0], : shape[1]])
    return np.concatenate([np.sin(y), np.cos(y), np.sin(x), np.cos(x)], 1).astype(np.float32)


def inverse_sigmoid(x: Array, eps: float = 1e-5) -> Array:
    """The logit log(max(x, eps) / max(1 - x, eps)) of x, moved into 0 .. 1.

    Peers: transformers 5.24 `inverse_sigmoid` with PyTorch 2.14's gradient, 0 at the bounds.

    Example:
      >>> [round(float(inverse_sigmoid(jnp.float32(x))), 2) for x in (-1, 0.5, 1)]
      [-11.51, 0.0, 11.51]
    """
    x = jnp.where(x <= 0, 0.0, jnp.where(x >= 1, 1.0, x))
    rest = 1 - x
    return jnp.log(jnp.where(x <= eps, eps, x)) - jnp.log(jnp.where(rest <= eps, eps, rest))


class Attention(nnx.Module):
    """Attention with several heads over keys and values that are projected apart (`project`)."""

    def __init__(self, channels: int, heads: int) -> None:
        self.heads = heads
        draw = uniform(math.sqrt(6 / (4 * channels)))  # PyTorch draws the three projections as one matrix
        self.q_proj = Linear(channels, channels, draw=draw)
        self.k_proj = Linear(channels, channels, draw=draw)
        self.v_proj = Linear(channels, channels, draw=draw)
        self.out_proj = Linear(channels, channels, draw=uniform_fan_in)

    def project(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """Keys and values [B, N, C] as `__call__` wants them."""
        return self.k_proj(keys), self.v_proj(values)

    def __call__(self, queries: Array, keys: Array, values: Array, blocked: Array | None = None) -> Array:
        """Queries [B, Q, C] over projected keys and values [B, N, C]; blocked: bool[Q, N] or bool[B, Q, N]."""
        q, k, v = (x.reshape(*x.shape[:2], self.heads, -1) for x in (self.q_proj(queries), keys, values))
        logits = jnp.einsum("bqhc,bkhc->bhqk", q, k) * (1 / math.sqrt(q.shape[-1]))
        logits = logits.astype(jnp.float32)
        if blocked is not None:
            blocked = blocked[:, None] if blocked.ndim == 3 else blocked
            logits = jnp.where(blocked, BLOCKED, logits)
        weights = jax.nn.softmax(logits, -1).astype(v.dtype)
        record("linear", 2 * weights.size * q.shape[-1])
        found = jnp.einsum("bhqk,bkhc->bqhc", weights, v)
        return self.out_proj(found.reshape(queries.shape))


def gelu(x: Array) -> Array:
    """The exact GELU, x (1 + erf(x / sqrt 2)) / 2; ONNX has no operator for `jax.nn.gelu` before opset 20.

    Example:
      >>> [round(float(gelu(jnp.float32(x))), 3) for x in (-1, 0, 2)]
      [-0.159, 0.0, 1.954]
    """
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


class EncoderLayer(nnx.Module):
    """Attention of tokens to each other, then a perceptron with exact GELU; each is added and normed."""

    def __init__(self, channels: int, heads: int, hidden: int) -> None:
        self.self_attn = Attention(channels, heads)
        self.self_attn_layer_norm = LayerNorm(channels)
        self.fc1, self.fc2 = linear(channels, hidden), linear(hidden, channels)
        self.final_layer_norm = LayerNorm(channels)

    def __call__(self, x: Array, position: Array) -> Array:
        placed = x + position
        x = self.self_attn_layer_norm(x + self.self_attn(placed, *self.self_attn.project(placed, x)))
        return self.final_layer_norm(x + self.fc2(gelu(self.fc1(x))))


def directions(heads: int, points: Sequence[int]) -> Draw:
    """Initial offsets: head h looks along the angle 2 pi h / heads, point i of each level at the distance i + 1."""
    angles = 2 * np.pi * np.arange(heads) / heads
    along = np.stack([np.cos(angles), np.sin(angles)], 1)
    along /= np.abs(along).max(1, keepdims=True)
    distances = np.concatenate([1 + np.arange(count) for count in points])
    return lambda rng, shape: (along[:, None] * distances[:, None]).reshape(shape)


class DeformableAttention(nnx.Module):
    """Attention to samples of the maps around each query's box (`nn.deformable_attention`).

    `points`: samples of each level. Without `projected`, the maps' own channels are the values, and nothing follows.
    """

    def __init__(
        self, channels: int, heads: int, points: tuple[int, ...], *, projected: bool = True, discrete: bool = False
    ) -> None:
        self.heads, self.points, self.discrete = heads, points, discrete
        count = heads * sum(points)
        self.sampling_offsets = Linear(channels, 2 * count, draw=constant(0.0), bias=directions(heads, points))
        self.attention_weights = Linear(channels, count, draw=constant(0.0))
        self.value_proj = Linear(channels, channels, draw=uniform_fans) if projected else None
        self.output_proj = Linear(channels, channels, draw=uniform_fans) if projected else None

    def values(self, memory: Array) -> Array:
        """What is sampled of the maps [B, N, C]: [B, N, heads, C / heads]."""
        memory = memory if self.value_proj is None else self.value_proj(memory)
        return memory.reshape(*memory.shape[:2], self.heads, -1)

    def __call__(self, queries: Array, reference: Array, values: Array, shapes: Sequence[tuple[int, int]]) -> Array:
        """Queries [B, Q, C] with reference f32[B, Q, 4], or f32[B, Q, 1 or L, 2 or 4] (`nn.sample_points`)."""
        places = (*queries.shape[:2], self.heads, sum(self.points))
        offsets = self.sampling_offsets(queries).astype(jnp.float32).reshape(*places, 2)
        logits = self.attention_weights(queries).astype(jnp.float32).reshape(places)
        reference = reference[:, :, None] if reference.ndim == 3 else reference
        found = nn.deformable_attention(
            values,
            nn.sample_points(reference, offsets, shapes=shapes, points=self.points),
            jax.nn.softmax(logits, -1),
            shapes=shapes,
            points=self.points,
            discrete=self.discrete,
        )
        return found if self.output_proj is None else self.output_proj(found)


class Gate(nnx.Module):
    """LayerNorm(g1 * x + g2 * y) with the gates (g1, g2) = sigmoid(W [x, y] + b), which begin at a half.

    Reference: Peng et al., D-FINE, ICLR 2025, section 4.3 ("target gating layer").
    """

    def __init__(self, channels: int) -> None:
        self.gate = Linear(2 * channels, 2 * channels, draw=constant(0.0))
        self.norm = LayerNorm(channels)

    def __call__(self, x: Array, y: Array) -> Array:
        first, second = jnp.split(jax.nn.sigmoid(self.gate(jnp.concatenate([x, y], -1))), 2, -1)
        return self.norm(first * x + second * y)


class DecoderLayer(nnx.Module):
    """Attention of queries to each other, to the maps, then a perceptron; each is added and normed.

    `gated`: a `Gate` in the place of the second sum (D-FINE). `draw`: initial values of the perceptron.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        hidden: int,
        points: tuple[int, ...],
        *,
        gated: bool = False,
        projected: bool = True,
        discrete: bool = False,
        draw: Draw = uniform_fan_in,
    ) -> None:
        self.self_attn = Attention(channels, heads)
        self.self_attn_layer_norm = LayerNorm(channels)
        self.encoder_attn = DeformableAttention(channels, heads, points, projected=projected, discrete=discrete)
        self.gateway = Gate(channels) if gated else None
        self.encoder_attn_layer_norm = None if gated else LayerNorm(channels)
        self.fc1, self.fc2 = linear(channels, hidden, draw=draw), linear(hidden, channels, draw=draw)
        self.final_layer_norm = LayerNorm(channels)

    def __call__(
        self,
        x: Array,
        position: Array,
        reference: Array,
        values: Array,
        shapes: Sequence[tuple[int, int]],
        others: tuple[Array, Array] | None = None,
        blocked: Array | None = None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """One step of the queries.

        Args:
          x, position: [B, Q, C].
          reference: f32[B, Q, 4].
          values: of `DeformableAttention.values`.
          shapes: of the levels.
          others: projected keys and values [B, N, C] of further queries, which these look at too.
          blocked: bool[Q, Q + N] or bool[B, Q, Q + N], True where query i may not look at query j.

        Returns:
          The new x, and the projected keys and values of these queries.
        """
        placed = x + position
        own = self.self_attn.project(placed, x)
        seen = own
        if others is not None:
            seen = jnp.concatenate([own[0], others[0]], 1), jnp.concatenate([own[1], others[1]], 1)
        x = self.self_attn_layer_norm(x + self.self_attn(placed, *seen, blocked))
        sampled = self.encoder_attn(x + position, reference, values, shapes)
        if self.gateway is not None:
            x = self.gateway(x, sampled)
        else:
            assert self.encoder_attn_layer_norm is not None
            x = self.encoder_attn_layer_norm(x + sampled)
        x = x + self.fc2(jax.nn.relu(self.fc1(x)))
        if self.gateway is not None:
            x = jnp.clip(x, -LARGEST_HALF, LARGEST_HALF)
        return self.final_layer_norm(x), own
