"""Queries: the cells of the encoder's maps that become queries, and the decoder whose layers refine them.

The decoder of RT-DETR and of D-FINE; they differ in what they predict of a layer's states (`Heads`).

Reference: Zhao et al., DETRs Beat YOLOs on Real-time Object Detection, CVPR 2024, section 4.3; Zhu et al., Deformable
DETR, ICLR 2021, section A.4 (two stages, refinement of boxes).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax import nn
from kdjax.detectors.layers import FOCAL_BIAS, LayerNorm, Linear, constant, uniform_fan_in, uniform_fans
from kdjax.detectors.transformer import MLP, DecoderLayer, inverse_sigmoid, linear
from kdjax.structs import Array, Asked, Decoded, PyTree, Queries

SIZE = 0.05  # of the anchors of the finest level, as a share of the sides; each next level has twice the size
MARGIN = 0.01  # numbers of an anchor must lie within MARGIN .. 1 - MARGIN


def grid_anchors(shapes: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, np.ndarray]:
    """One box for each cell, as logits of cx cy w h.

    Args:
      shapes: height and width of each level, in cells, fine to coarse.

    Returns:
      (f32[N, 4], bool[N]) in NumPy: the anchors, and whether all their four numbers lie within 0.01 .. 0.99. The
      logits of those that do not are the largest float.

    Peers: transformers 5.24 `generate_anchors`; the authors' code has infinity instead of the largest float.
    """
    rows = []
    for level, (height, width) in enumerate(shapes):
        cells, extent = np.mgrid[:height, :width].reshape(2, -1), np.array([[height], [width]])
        y, x = (cells.astype(np.float32) + 0.5) / extent.astype(np.float32)
        sides = np.full_like(x, SIZE * 2.0**level)
        rows.append(np.stack([x, y, sides, sides], 1))
    boxes = np.concatenate(rows)
    valid = np.all((boxes > MARGIN) & (boxes < 1 - MARGIN), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        logits = np.log(boxes / (1 - boxes))
    return np.where(valid[:, None], logits, np.finfo(np.float32).max).astype(np.float32), valid


class Heads(Protocol):
    """What a family predicts of the states x [B, Q, C] of layer i; the carry goes from layer to layer."""

    def start(self, reference: Array, /) -> PyTree: ...  # reference f32[B, Q, 4], without gradient -> carry

    def refine(self, i: int, x: Array, carry: PyTree, /) -> tuple[Queries, PyTree]: ...

    def first(self, carry: PyTree, /) -> Queries | None: ...  # `Decoded.first`, of the last carry


class BoxHeads(nnx.Module):
    """The heads of RT-DETR: each layer moves the logits of the box before it.

        b_i = sigmoid(MLP_i(x_i) + inverse_sigmoid(b_(i-1)))

    The decoder looks around b_(i-1) without gradient, but the box that is returned sends gradient one layer back.

    Reference: Zhang et al., DINO, ICLR 2023, section 3.5 ("look forward twice"). Peers: the authors' RT-DETR;
    transformers 5.24 sends no gradient back.
    """

    def __init__(self, num_classes: int, channels: int, layers: int) -> None:
        self.class_embed = nnx.List([classifier(channels, num_classes) for _ in range(layers)])
        self.bbox_embed = nnx.List([MLP(channels, channels, channels, 4, zero_last=True) for _ in range(layers)])

    def start(self, reference: Array) -> Array:
        return reference

    def refine(self, i: int, x: Array, carry: Array) -> tuple[Queries, Array]:
        step = self.bbox_embed[i](x).astype(jnp.float32)
        once = jax.nn.sigmoid(step + inverse_sigmoid(jax.lax.stop_gradient(carry)))
        twice = jax.nn.sigmoid(step + inverse_sigmoid(carry))
        return Queries(self.class_embed[i](x).astype(jnp.float32), twice, hidden=x), once

    def first(self, carry: Array) -> None:
        del carry


def classifier(channels: int, num_classes: int) -> Linear:
    """A linear layer whose classes begin at a probability of 0.01."""
    return Linear(channels, num_classes, draw=uniform_fan_in, bias=constant(FOCAL_BIAS))


class ClassEmbedding(nnx.Module):
    """A learned state for each class, and for none: the last one, which begins at 0 and gets no gradient."""

    def __init__(self, num_classes: int, channels: int) -> None:
        def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
            return np.concatenate([rng.normal(size=(shape[0], shape[1] - 1)), np.zeros((shape[0], 1))], 1)

        self.kernel = nnx.Param(jnp.zeros((channels, num_classes + 1)), draw=draw)

    def __call__(self, labels: Array) -> Array:
        """i32[B, D] -> f32[B, D, C]."""
        kernel = self.kernel[...]
        kernel = jnp.concatenate([kernel[:, :-1], jax.lax.stop_gradient(kernel[:, -1:])], 1)
        return kernel.T[labels]


class Known(NamedTuple):
    """What further queries need of a decoder that ran on its own ones."""

    maps: tuple[Array, ...]  # L of [B, H, W, C]
    values: tuple[Array, ...]  # of each layer [B, N, heads, C / heads], what is sampled of the maps
    seen: tuple[tuple[Array, Array], ...]  # of each layer, projected keys and values [B, Q, C] of the own queries


class Selection(NamedTuple):
    """The cells that become queries."""

    scores: Array  # f32[B, N, K], logits of all cells
    index: Array  # i32[B, Q], best first
    content: Array  # [B, Q, C], the states that they begin with, with gradient
    queries: Queries  # logits, and boxes with gradient


class Decoder(nnx.Module):
    """From maps L of [B, H, W, C] to queries.

    `points`: samples of each level; `heads`: number of attention heads; `predict`: makes the family's `Heads`;
    `position_limit`: bound of the embedding of boxes, None for none (D-FINE: 10); `of_layer`: keywords of
    `DecoderLayer`.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        *,
        layers: int,
        queries: int,
        heads: int,
        hidden: int,
        points: tuple[int, ...],
        predict: Callable[[], Any],
        position_limit: float | None = None,
        **of_layer: Any,
    ) -> None:
        self.queries, self.position_limit = queries, position_limit
        self.enc_output = nnx.List([linear(channels, channels, draw=uniform_fans), LayerNorm(channels)])
        self.enc_score_head = classifier(channels, num_classes)
        self.enc_bbox_head = MLP(channels, channels, channels, 4, zero_last=True)
        self.denoising_class_embed = ClassEmbedding(num_classes, channels)
        self.query_pos_head = MLP(4, 2 * channels, channels, draw=uniform_fans)
        self.layers = nnx.List([DecoderLayer(channels, heads, hidden, points, **of_layer) for _ in range(layers)])
        self.heads = predict()

    def select(self, maps: tuple[Array, ...]) -> Selection:
        """Scores all cells and takes the best."""
        anchors, valid = grid_anchors(_shapes(maps))
        tokens = _tokens(maps)
        content = self._output(tokens * jnp.asarray(valid[:, None], tokens.dtype))
        scores = self.enc_score_head(content).astype(jnp.float32)
        _, index = jax.lax.top_k(jax.lax.stop_gradient(jnp.max(scores, -1)), min(self.queries, len(anchors)))
        content, logits = (jnp.take_along_axis(x, index[..., None], 1) for x in (content, scores))
        boxes = self.enc_bbox_head(content).astype(jnp.float32) + jnp.asarray(anchors)[index]
        return Selection(scores, index, content, Queries(logits, jax.nn.sigmoid(boxes)))

    def __call__(self, maps: tuple[Array, ...], layers: int | None = None) -> tuple[Decoded, Selection, Known]:
        """Selects queries and refines them in the first `layers` layers (None: all)."""
        chosen = self.select(maps)
        stop = jax.lax.stop_gradient
        tokens = _tokens(maps)
        values = tuple(layer.encoder_attn.values(tokens) for layer in self.layers[:layers])
        found, seen = self._run(stop(chosen.content), stop(chosen.queries.boxes), values, _shapes(maps))
        return found, chosen, Known(maps, values, seen)

    def ask(self, known: Known, asked: Asked) -> Decoded:
        """What the layers say of further queries, which see the own ones and, where not blocked, each other.

        Without labels a query begins with what `enc_output` says of the map at the centre of its box, on the level
        whose anchors are nearest to the box in size.
        """
        if asked.labels is None:
            content = jax.lax.stop_gradient(self._output(_at_centres(known.maps, asked.boxes)))
        else:
            content = self.denoising_class_embed(asked.labels).astype(known.maps[0].dtype)
        reference = jax.lax.stop_gradient(asked.boxes)
        count, own = reference.shape[1], known.seen[0][0].shape[1] if asked.sees_own else 0
        blocked = jnp.zeros((count, count), bool) if asked.blocked is None else asked.blocked
        blocked = jnp.pad(blocked, [(0, 0)] * (blocked.ndim - 1) + [(0, own)])
        others = known.seen if asked.sees_own else ()
        return self._run(content, reference, known.values, _shapes(known.maps), others, blocked)[0]

    def _output(self, tokens: Array) -> Array:
        return self.enc_output[1](self.enc_output[0](tokens))

    def _run(
        self,
        x: Array,
        reference: Array,
        values: tuple[Array, ...],
        shapes: tuple[tuple[int, int], ...],
        others: tuple[tuple[Array, Array], ...] = (),
        blocked: Array | None = None,
    ) -> tuple[Decoded, tuple[tuple[Array, Array], ...]]:
        carry = self.heads.start(reference)
        found, seen = [], []
        for i, sampled in enumerate(values):
            position = self.query_pos_head(reference.astype(x.dtype))
            if self.position_limit is not None:
                position = jnp.clip(position, -self.position_limit, self.position_limit)
            beside = others[i] if others else None
            x, own = self.layers[i](x, position, reference, sampled, shapes, beside, blocked)
            predicted, carry = self.heads.refine(i, x, carry)
            reference = jax.lax.stop_gradient(predicted.boxes)
            found.append(predicted)
            seen.append(own)
        return Decoded(tuple(found), self.heads.first(carry)), tuple(seen)


def _shapes(maps: tuple[Array, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((x.shape[1], x.shape[2]) for x in maps)


def _tokens(maps: tuple[Array, ...]) -> Array:
    """L of [B, H, W, C] -> [B, N, C], row by row, in level order."""
    return jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in maps], 1)


def _at_centres(maps: tuple[Array, ...], boxes: Array) -> Array:
    """[B, D, C]: the map at the centre of each box f32[B, D, 4], of the level whose anchors are nearest in size."""
    size = jnp.sqrt(jnp.maximum(boxes[..., 2] * boxes[..., 3], 1e-12))
    level = jnp.clip(jnp.round(jnp.log2(size / SIZE)), 0, len(maps) - 1)
    weights = (level[..., None] == np.arange(len(maps), dtype=np.float32)).astype(jnp.float32)
    centres = jnp.broadcast_to(boxes[:, :, None, None, :2], (*boxes.shape[:2], 1, len(maps), 2))
    form = {"shapes": _shapes(maps), "points": [1] * len(maps)}
    return nn.deformable_attention(_tokens(maps)[:, :, None], centres, weights[:, :, None], **form)
