"""What D-FINE predicts of queries: distributions of the distances of each box's edges, which layers refine.

Reference: Peng et al., D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement, ICLR 2025,
section 4.1. Peers: transformers 5.24.0 DFineDecoder.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.boxes import edges
from kdjax.detectors.query_decoder import classifier
from kdjax.detectors.transformer import MLP, inverse_sigmoid
from kdjax.structs import Array, Queries

TOP = 4  # probabilities of each edge that tell of the quality of a box
WIDTH = 64  # of the perceptron that reads them


class Bins(NamedTuple):
    """What the distributions are over (`kdjax.boxes.edge_bins`)."""

    number: int  # n; there are n + 1
    up: float
    scale: float

    def distances(self) -> Array:
        """f32[n + 1]."""
        return edges.edge_bins(self.number, up=self.up, scale=self.scale)


class Quality(nnx.Module):
    """What the distributions of a box's edges add to the logits of its classes: f32[B, Q, 4, n + 1] -> f32[B, Q, 1].

    A perceptron reads the four largest probabilities of each edge and their mean. (The paper's location quality
    estimator, after Li et al., Generalized Focal Loss V2, CVPR 2021.)
    """

    def __init__(self) -> None:
        self.reg_conf = MLP(4 * (TOP + 1), WIDTH, 1, zero_last=True)

    def __call__(self, corners: Array) -> Array:
        top, _ = jax.lax.top_k(jax.nn.softmax(corners, -1), TOP)
        told = jnp.concatenate([top, jnp.mean(top, -1, keepdims=True)], -1)
        return self.reg_conf(told.reshape(*told.shape[:2], -1))


class Refined(NamedTuple):
    """What goes from one layer to the next."""

    first: Queries | None  # before the first layer None
    reference: Array  # f32[B, Q, 4]: the boxes where the queries begin, from the first layer on the first boxes
    states: Array | float  # [B, Q, C], of the layer before, without gradient
    corners: Array | float  # f32[B, Q, 4, n + 1]


class EdgeHeads(nnx.Module):
    """The heads of D-FINE, `query_decoder.Heads`.

    The first layer's states give the first boxes r, which all layers refine:

        r = sigmoid(MLP(x_0) + inverse_sigmoid(start)),  c_i = c_(i-1) + MLP_i(x_i + x_(i-1)),
        box_i = r with its edges moved by sum_n W(n) softmax(c_i)_n,  logits_i = W_i x_i + b_i + Quality_i(c_i)

    No gradient flows through r there and through x_(i-1).
    """

    def __init__(self, num_classes: int, channels: int, layers: int, bins: Bins) -> None:
        self.bins = bins
        widths = (channels, channels, channels)
        self.class_embed = nnx.List([classifier(channels, num_classes) for _ in range(layers)])
        self.pre_bbox_head = MLP(*widths, 4, zero_last=True)
        self.bbox_embed = nnx.List([MLP(*widths, 4 * (bins.number + 1), zero_last=True) for _ in range(layers)])
        self.lqe_layers = nnx.List([Quality() for _ in range(layers)])

    def start(self, reference: Array) -> Refined:
        return Refined(None, reference, 0.0, 0.0)

    def refine(self, i: int, x: Array, carry: Refined) -> tuple[Queries, Refined]:
        logits = self.class_embed[i](x).astype(jnp.float32)
        first, reference = carry.first, carry.reference
        if first is None:
            step = self.pre_bbox_head(x).astype(jnp.float32)
            first = Queries(logits, jax.nn.sigmoid(step + inverse_sigmoid(reference)), hidden=x)
            reference = jax.lax.stop_gradient(first.boxes)
        step = self.bbox_embed[i](x + carry.states).astype(jnp.float32)
        corners = carry.corners + step.reshape(*x.shape[:2], 4, -1)
        moved = edges.expected_edges(corners, self.bins.distances())
        boxes = edges.edges_to_boxes(reference, moved, scale=self.bins.scale)
        found = Queries(logits + self.lqe_layers[i](corners), boxes, x, corners, reference)
        return found, Refined(first, reference, jax.lax.stop_gradient(x), corners)

    def first(self, carry: Refined) -> Queries | None:
        return carry.first
