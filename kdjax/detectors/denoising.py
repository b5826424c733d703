"""Contrastive denoising: noised objects that the decoder of a transformer learns to restore, beside its own queries."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from kdjax.boxes import convert
from kdjax.errors import UserError
from kdjax.structs import AnyArray, Array, Denoising

Inverted = Literal["clamp", "mirror"]
INVERTED = ("clamp", "mirror")


class Draws(NamedTuple):
    """What is drawn at random for D places."""

    relabel: Array  # f32[B, D], 0 .. 1: a place below half the share of noised labels gets another one
    labels: Array  # i32[B, D], 0 .. K-1, that label
    shift: Array  # f32[B, D, 4], 0 .. 1, how far each edge moves
    sign: Array  # f32[B, D, 4], -1 or 1, where to


def draw(key: Array, batch: int, places: int, num_classes: int) -> Draws:
    """What is drawn at random in a step."""
    of_relabel, of_labels, of_shift, of_sign = jax.random.split(key, 4)
    return Draws(
        jax.random.uniform(of_relabel, (batch, places)),
        jax.random.randint(of_labels, (batch, places), 0, num_classes),
        jax.random.uniform(of_shift, (batch, places, 4)),
        jax.random.rademacher(of_sign, (batch, places, 4), jnp.float32),
    )


def places(number: int, objects: int) -> int:
    """D, for `number` pairs of queries and at most `objects` objects in an image."""
    return 2 * max(number, objects)


def contrastive(
    draws: Draws,
    boxes: AnyArray,
    labels: AnyArray,
    valid: AnyArray,
    *,
    number: int,
    num_classes: int,
    label_noise: float = 0.5,
    box_noise: float = 1.0,
    inverted: Inverted = "clamp",
) -> Denoising:
    """Noises the objects of a batch, several times over, a little and then too much.

    With m the largest number of objects in an image of the batch, each of max(1, number // m) groups has m places for
    positives and m for negatives; place j of an image with fewer than j objects has no class and a box of zeros, and
    is a negative too. A label is replaced with probability `label_noise` / 2 by a class drawn from all. Each edge of a
    box moves by `box_noise` times a share of half the side: 0 .. 1 for positives, 1 .. 2 for negatives, then corners
    are clipped to 0 .. 1 (without noise they stay as they are). Queries of a group look at each other, not at those of
    other groups.

    Args:
      draws: of D = `places(number, M)` places.
      boxes: f32[B, M, 4], `x1 y1 x2 y2` as shares of the sides of the network input.
      labels: i32[B, M], 0 .. K-1.
      valid: bool[B, M], which objects there are.
      number: of pairs of a positive and a negative that all groups have together, at most; with more objects than that
        there is one group of all.
      num_classes: K.
      label_noise, box_noise: strength of the noise, 0 .. 1.
      inverted: what becomes of a box whose corners passed each other: "clamp" makes the side 0, "mirror" swaps them.

    Returns:
      The noised objects. Without objects in the batch no place is live.

    Scope: the global batch: m is its largest number of objects.

    Peers: `get_contrastive_denoising_training_group` of RT-DETR and transformers ("clamp") and of D-FINE ("mirror"),
      where m is that of a device and D = 2 m groups.

    Reference: Zhang et al., DINO, ICLR 2023, section 3.3.

    Raises:
      UserError: unknown `inverted`, or the draws are of another number of places.
    """
    boxes, labels, valid = jnp.asarray(boxes), jnp.asarray(labels), jnp.asarray(valid)
    size = places(number, valid.shape[1])
    if inverted not in INVERTED:
        raise UserError(f"contrastive: inverted must be one of {', '.join(INVERTED)}, not {inverted!r}")
    if draws.relabel.shape != (len(valid), size):
        raise UserError(f"contrastive: draws must be of {len(valid)} x {size} places, not {draws.relabel.shape}")

    counts = jnp.sum(valid, 1)
    most = jnp.maximum(jnp.max(counts), 1)
    groups = jnp.maximum(number // most, 1)
    place = jnp.arange(size)
    group, negative, rank = place // (2 * most), place % (2 * most) >= most, place % most
    live = (group < groups) & (jnp.max(counts) > 0)

    there = live & (rank < counts[:, None])
    order = jnp.argsort(~valid, 1, stable=True)  # the objects that there are come first
    index = jnp.where(there, jnp.take_along_axis(order, jnp.minimum(rank, order.shape[1] - 1)[None], 1), 0)
    own_labels = jnp.where(there, jnp.take_along_axis(labels, index, 1), num_classes)
    corners = jnp.where(there[..., None], jnp.take_along_axis(boxes, index[..., None], 1), 0.0)

    half = (corners[..., 2:] - corners[..., :2]) / 2 * box_noise
    moved = draws.sign * (draws.shift + negative[:, None]) * jnp.concatenate([half, half], -1)
    noised = convert.to_cxcywh(jnp.clip(corners + moved, 0, 1) if box_noise else corners)
    sides = jnp.abs(noised[..., 2:]) if inverted == "mirror" else jnp.maximum(noised[..., 2:], 0)
    denoising = Denoising(
        boxes=jnp.concatenate([noised[..., :2], sides], -1),
        labels=jnp.where(there & (draws.relabel < label_noise / 2), draws.labels, own_labels).astype(jnp.int32),
        blocked=((group[:, None] != group) | ~live) & (place[:, None] != place),
        matched=jnp.where(there & ~negative, index, -1).astype(jnp.int32),
        live=live,
        groups=groups,
    )
    return jax.lax.stop_gradient(denoising)
