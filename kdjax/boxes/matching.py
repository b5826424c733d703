"""One-to-one matching of queries with objects at the lowest total cost. No gradient flows through it.

Boxes here are `cx cy w h` as shares of the sides of the network input, as the losses of transformers have them.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kdjax import shapes
from kdjax.boxes import convert
from kdjax.boxes.iou import pairwise_iou
from kdjax.structs import AnyArray, Array

LARGEST = 1e4  # of costs that are no numbers


def matching_cost(
    logits: AnyArray,
    boxes: AnyArray,
    labels: AnyArray,
    truth: AnyArray,
    *,
    class_weight: float = 2.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Array:
    """What it costs to match each query with each object.

    With p = sigmoid(logit of the object's class), b the query's box and t the object's:

        class_weight (alpha (1 - p)^gamma (-log(p + 1e-8)) - (1 - alpha) p^gamma (-log(1 - p + 1e-8)))
        + l1_weight |b - t|_1 - giou_weight GIoU(b, t)

    Args:
      logits: f32[..., Q, K].
      boxes: f32[..., Q, 4], `cx cy w h`; negative sides count as 0 in the GIoU.
      labels: i32[..., M], 0 .. K-1.
      truth: f32[..., M, 4], boxes of the objects.
      class_weight, l1_weight, giou_weight: of the three costs.
      alpha, gamma: of the focal cost.

    Returns:
      f32[..., Q, M], without gradient.

    Scope: each pair on its own.

    Peers: the matchers of RT-DETR, D-FINE and transformers, with the focal cost.

    Reference: Carion et al., DETR, ECCV 2020, section 3.1, with the focal cost of Zhu et al., Deformable DETR, ICLR
      2021, section 4.

    Example:
      >>> import numpy as np
      >>> box = np.array([[0.5, 0.5, 0.2, 0.2]])
      >>> round(float(matching_cost(np.zeros((1, 1)), box, np.array([0]), box)[0, 0]), 4)
      -2.1733
    """
    layouts = {"logits": "... Q K", "boxes": "... Q 4", "labels": "... M", "truth": "... M 4"}
    given = {"logits": logits, "boxes": boxes, "labels": labels, "truth": truth}
    shapes.check("matching_cost", **{name: (given[name], layout) for name, layout in layouts.items()})
    logits, boxes, truth = (jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for x in (logits, boxes, truth))
    probs = jax.nn.sigmoid(logits)
    present = -alpha * (1 - probs) ** gamma * jnp.log(probs + 1e-8)
    absent = -(1 - alpha) * probs**gamma * jnp.log(1 - probs + 1e-8)
    of_class = jnp.take_along_axis(present - absent, jnp.asarray(labels)[..., None, :], -1)
    l1 = jnp.sum(jnp.abs(boxes[..., :, None, :] - truth[..., None, :, :]), -1)
    giou = pairwise_iou(corners(boxes), corners(truth), mode="giou", eps=1e-12)
    return class_weight * of_class + l1_weight * l1 - giou_weight * giou


def corners(boxes: AnyArray) -> Array:
    """`cx cy w h` to `x1 y1 x2 y2`; negative sides count as 0."""
    return convert.from_cxcywh(jnp.concatenate([boxes[..., :2], jnp.maximum(boxes[..., 2:], 0)], -1))


def hungarian(cost: AnyArray, valid: AnyArray) -> Array:
    """The query of each object, so that the sum of their costs is the smallest that there is.

    Args:
      cost: f32[..., Q, M]; NaN and infinity count as 1e4.
      valid: bool[..., M], which objects there are.

    Returns:
      i32[..., M], 0 .. Q-1, each query at most once; -1 where `valid` is False. Of more objects than queries some are
      left out (-1).

    Scope: each matrix on its own.

    Peers: `scipy.optimize.linear_sum_assignment`, up to sums that float32 cannot tell apart.

    Reference: Kuhn, The Hungarian method for the assignment problem, 1955.

    Example:
      >>> import numpy as np
      >>> cost = np.array([[1.0, 2, 9], [1, 4, 9], [5, 5, 9]])
      >>> hungarian(cost, np.array([True, True, False])).tolist()
      [1, 0, -1]
    """
    shapes.check("hungarian", cost=(cost, "... Q M"), valid=(valid, "... M"))
    *batch, queries, objects = cost.shape
    if not objects:
        return jnp.zeros((*batch, 0), jnp.int32)
    cost, valid = jnp.asarray(cost, jnp.float32), jnp.asarray(valid)
    cost = jnp.nan_to_num(jax.lax.stop_gradient(cost), nan=LARGEST, posinf=LARGEST, neginf=-LARGEST)
    flat = jnp.swapaxes(cost, -1, -2).reshape(math.prod(batch), objects, queries)
    there = valid.reshape(len(flat), objects)
    if objects > queries:
        # Queries that stand for none: so dear that as many objects as can be have one of the others.
        real = jnp.where(there[..., None], flat, 0)
        low, high = jnp.min(real, (1, 2), keepdims=True), jnp.max(real, (1, 2), keepdims=True)
        dear = high + 1 + objects * (high - low)
        none = jnp.broadcast_to(dear, (len(flat), objects, objects - queries))
        flat = jnp.concatenate([flat, none], -1)
    found = jax.vmap(_assign)(flat, there).reshape(*batch, objects)
    return jnp.where(found < queries, found, -1)


class _Search(NamedTuple):
    """The assignment so far, and a search for the shortest way from an object without a query to a free query."""

    waiting: Array  # bool[M], objects that have no query yet; the first of them is searched for
    owner: Array  # i32[Q], the object of each query, -1 for none
    price: Array  # f32[Q], the dual variables, <= 0, and 0 of free queries
    place: Array  # i32[], the object that the search has reached
    offset: Array  # f32[], makes cost - price the length of the ways from there
    last: Array  # i32[], the query of that object, -1 at the beginning of the search
    length: Array  # f32[Q], of the shortest way to each query
    before: Array  # i32[Q], the query before it on that way, -1 for none
    seen: Array  # bool[Q], where the search has been


def _assign(cost: Array, valid: Array) -> Array:
    """The query of each object, i32[M], of finite costs f32[M, Q], M <= Q.

    Shortest augmenting paths (Crouse, On implementing 2D rectangular assignment algorithms, 2016). Each step of the one
    loop goes to the next query of a search or ends it, so that under `vmap` no problem waits for others between
    searches, and objects that are not there take no step. `optax.assignment.hungarian_algorithm` finds the same, but
    walks through the padding, whose costs are all equal: 1.5 s instead of 20 ms on two cores for 56 problems of 300
    queries and 10 of 100 objects (benchmarks/matching.py).
    """
    objects, queries = cost.shape
    index = jnp.arange(objects, dtype=jnp.int32)
    # The first object that likes a query best has it.
    best = jnp.argmin(cost, 1)
    first = jnp.full(queries, objects, jnp.int32).at[jnp.where(valid, best, queries)].min(index, mode="drop")
    waiting = valid & (first[best] != index)

    def begin(waiting: Array, owner: Array, price: Array) -> _Search:
        none = jnp.full(queries, -1, jnp.int32)
        start, far = jnp.argmax(waiting).astype(jnp.int32), jnp.full(queries, jnp.inf)
        return _Search(waiting, owner, price, start, jnp.float32(0), jnp.int32(-1), far, none, jnp.zeros(queries, bool))

    def step(now: _Search) -> _Search:
        reach = now.offset + cost[now.place] - now.price
        closer = ~now.seen & (reach < now.length)
        length, before = jnp.where(closer, reach, now.length), jnp.where(closer, now.last, now.before)
        query = jnp.argmin(jnp.where(now.seen, jnp.inf, length)).astype(jnp.int32)
        shortest, place = length[query], now.owner[query]
        ended = place < 0

        root = jnp.argmax(now.waiting).astype(jnp.int32)
        owner, _ = jax.lax.while_loop(
            lambda way: way[1] >= 0,
            lambda way: (
                way[0].at[way[1]].set(jnp.where(before[way[1]] < 0, root, way[0][before[way[1]]])),
                before[way[1]],
            ),
            (now.owner, jnp.where(ended, query, -1)),
        )
        done = begin(
            now.waiting.at[root].set(False), owner, jnp.where(now.seen, now.price + length - shortest, now.price)
        )
        onward = now._replace(
            place=place,
            offset=shortest - cost[place, query] + now.price[query],
            last=query,
            length=length,
            before=before,
            seen=now.seen.at[query].set(True),
        )
        return jax.tree.map(lambda a, b: jnp.where(ended, a, b), done, onward)

    start = begin(waiting, jnp.where(first < objects, first, -1), jnp.zeros(queries))
    owner = jax.lax.while_loop(lambda now: jnp.any(now.waiting), step, start).owner
    place = jnp.where(owner < 0, objects, owner)
    return jnp.full(objects, -1, jnp.int32).at[place].set(jnp.arange(queries, dtype=jnp.int32), mode="drop")


def objects_of(found: AnyArray, queries: int) -> Array:
    """The object of each query; of several matchings the one that it was matched with most often.

    Args:
      found: i32[S, ..., M], S matchings: the query of each object, -1 for none.
      queries: Q.

    Returns:
      i32[..., Q], 0 .. M-1, of objects that were met equally often the first; -1 where there is none. With S > 1
      several queries may have the same object.

    Scope: each image on its own.

    Peers: D-FINE's `_get_go_indices`, which leaves open what it takes of objects that were met equally often.

    Reference: Peng et al., D-FINE, ICLR 2025, section 4.2.

    Example:
      >>> import numpy as np
      >>> objects_of(np.array([[0, 1], [0, 2], [1, 2]]), 4).tolist()
      [0, 0, 1, -1]
    """
    counts = jnp.sum(jax.nn.one_hot(found, queries, dtype=jnp.int32), 0)
    return jnp.where(jnp.max(counts, -2) > 0, jnp.argmax(counts, -2), -1).astype(jnp.int32)
