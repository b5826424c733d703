"""Two forms of greedy NMS with the same results: one box after the other, and a block of boxes at a time."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.structs import AnyArray, Array

ROWS = 512  # whose pairs are sorted at a time
PAIRS = 1024  # of a chunk, at most
BLOCK = 128  # pairs that are compared with each other at a time

State = tuple[Array, AnyArray, Array, Array]  # step, scores left, indices kept, valid


def one_by_one(
    boxes: AnyArray, scores: AnyArray, labels: AnyArray | None, *, iou_threshold: float, max_detections: int
) -> tuple[Array, Array]:
    """`kdjax.boxes.nms.greedy_nms` with a step over all candidates for each detection.

    It has no sort: on a batch that is split over devices `lax.top_k` gathers all rows on every device.
    """
    areas = _area(boxes)

    def unfinished(state: State) -> Array:
        step, scores, _, _ = state
        return (step < max_detections) & jnp.any(scores > -jnp.inf)

    def take_best(state: State) -> State:
        step, scores, kept, valid = state
        best = jnp.argmax(scores, axis=1, keepdims=True).astype(jnp.int32)
        drop = _overlap(boxes, _take(boxes, best), areas, _take(areas, best)) > iou_threshold
        if labels is not None:
            drop &= labels == _take(labels, best)
        drop |= jnp.arange(scores.shape[1]) == best
        exists = _take(scores, best) > -jnp.inf
        kept = jax.lax.dynamic_update_slice(kept, jnp.where(exists, best, 0), (0, step))
        valid = jax.lax.dynamic_update_slice(valid, exists, (0, step))
        return step + 1, jnp.where(drop, -jnp.inf, scores), kept, valid

    places = (scores.shape[0], max_detections)
    state = (jnp.int32(0), scores, jnp.zeros(places, jnp.int32), jnp.zeros(places, bool))
    _, _, kept, valid = jax.lax.while_loop(unfinished, take_best, state)
    return kept, valid


class Candidates(NamedTuple):
    """Candidates of NMS."""

    boxes: Array  # f32[B, n, 4]
    labels: Array  # i32[B, n]; boxes of different labels are not compared
    enters: Array  # bool[B, n]; False: it is passed over


class _Kept(NamedTuple):
    """What was kept so far."""

    count: Array  # i32[B, 1], up to D
    pairs: Array  # i32[B, D], anything from `count` on; so are
    boxes: Array  # f32[B, D, 4]
    labels: Array  # i32[B, D]


class _Position(NamedTuple):
    """How far the pairs of each image were taken in their order."""

    score: Array  # f32[B, 1], of the last pair that was taken
    pair: Array  # i32[B, 1], the last pair that was taken
    taken: Array  # i32[B, L], number of pairs of each level
    leaders: Array  # f32[B, N], best score of each row among the pairs that are left, -inf: none is


def in_chunks(
    scores: AnyArray,
    candidates: Callable[[Array], Candidates],
    *,
    iou_threshold: float,
    max_detections: int,
    score_threshold: float = -np.inf,
    level_sizes: Sequence[int] | None = None,
    pre_nms: int | None = None,
) -> tuple[Array, Array]:
    """Greedy NMS over pairs of a row and a class, of which as many are sorted as are needed.

    The order of the pairs is that of their scores, best first, and of their indices where scores are equal. A chunk is
    the next pairs in this order. They are in those rows whose best pairs are first, so only these rows are sorted.
    Inside a block of a chunk, a pair is kept if no pair before it that is kept drops it: this has one solution, which
    is found by repetition, from the first pair on.

    Args:
      scores: f32[B, N, K].
      candidates: of pairs i32[B, n], 0 .. NK-1, each a row times K plus a class.
      iou_threshold: boxes with an IoU above it are dropped, 0 .. 1.
      max_detections: D, the largest number of pairs to keep.
      score_threshold: pairs with a score at or below it are no candidates.
      level_sizes: number of rows of each level; None: there is one level.
      pre_nms: the first pairs of each level that are candidates, whether or not they enter; None: all.

    Returns:
      (pairs i32[B, D] in their order; valid bool[B, D]). Where `valid` is False, the pair is 0.

    Scope: each image on its own.
    """
    scores = jnp.asarray(scores)
    batch, rows, classes = scores.shape
    sizes = (rows,) if level_sizes is None else tuple(level_sizes)
    limit = rows * classes if pre_nms is None else pre_nms
    limited = any(size * classes > limit for size in sizes)
    chosen_rows = min(ROWS, rows)
    length = min(PAIRS, chosen_rows * classes)
    block = min(BLOCK, length)
    blocks = -(-length // block)
    ends = np.cumsum(sizes)
    level_of_row = np.repeat(np.arange(len(sizes)), sizes)

    def chunk(position: _Position) -> tuple[Array, Array, _Position]:
        """Pairs i32[B, blocks * block] in their order, bool, whether they are candidates, and the position after."""
        best = position.leaders
        if limited:
            best = jnp.where((position.taken < limit)[:, level_of_row], best, -jnp.inf)
        values, chosen = jax.lax.top_k(best, chosen_rows)
        # Not by their place: XLA would sort all rows.
        last_value = jnp.min(values, 1, keepdims=True)
        last_row = jnp.max(jnp.where(values == last_value, chosen, -1), 1, keepdims=True)
        chosen = jnp.sort(chosen, 1)  # so that equal scores come in their order
        of_rows = jnp.take_along_axis(scores, chosen[..., None], 1)
        pairs = chosen[..., None] * classes + jnp.arange(classes, dtype=jnp.int32)

        def is_left(score: Array, pair: Array) -> Array:
            score, pair = score[..., None], pair[..., None]
            return (of_rows > score_threshold) & ((of_rows < score) | ((of_rows == score) & (pairs > pair)))

        is_open = (_take(best, chosen) > -jnp.inf)[..., None]
        left = is_left(position.score, position.pair) & is_open
        if chosen_rows < rows:  # pairs behind the best one of the last row may come after those of other rows
            value, row = last_value[..., None], last_row[..., None]
            left &= (of_rows > value) | ((of_rows == value) & (chosen[..., None] <= row))
        ordered, index = jax.lax.top_k(jnp.where(left, of_rows, -jnp.inf).reshape(batch, -1), length)
        ordered_pairs = _take(chosen, index // classes) * classes + index % classes
        exists = ordered > -jnp.inf
        count = jnp.sum(exists, 1, keepdims=True, dtype=jnp.int32)
        final = jnp.arange(length) == count - 1
        score = jnp.where(count > 0, jnp.min(jnp.where(exists, ordered, jnp.inf), 1, keepdims=True), position.score)
        pair = jnp.where(count > 0, jnp.max(jnp.where(final, ordered_pairs, -1), 1, keepdims=True), position.pair)

        leaders = jnp.max(jnp.where(is_left(score, pair) & is_open, of_rows, -jnp.inf), 2)
        were_chosen = (best > last_value) | ((best == last_value) & (jnp.arange(rows) <= last_row))
        number = jnp.cumsum(were_chosen, axis=1, dtype=jnp.int32) - 1
        leaders = jnp.where(were_chosen, _take(leaders, jnp.maximum(number, 0)), best)
        taken, is_candidate = position.taken, exists
        if limited:
            level = jnp.sum(ordered_pairs[..., None] >= ends[:-1] * classes, 2)
            of_level = (level[..., None] == np.arange(len(sizes))) & exists[..., None]
            ranks = taken[:, None] + jnp.cumsum(of_level, axis=1, dtype=jnp.int32)
            is_candidate = exists & jnp.any(of_level & (ranks <= limit), 2)
            taken = taken + jnp.sum(of_level, 1, dtype=jnp.int32)
        missing = ((0, 0), (0, blocks * block - length))
        position = _Position(score, pair, taken, leaders)
        return jnp.pad(ordered_pairs, missing), jnp.pad(is_candidate, missing), position

    def unfinished(state: tuple[_Position, _Kept]) -> Array:
        position, kept = state
        return jnp.any((jnp.max(position.leaders, 1, keepdims=True) > -jnp.inf) & (kept.count < max_detections))

    def next_chunk(state: tuple[_Position, _Kept]) -> tuple[_Position, _Kept]:
        position, kept = state
        pairs, exists, position = chunk(position)
        found = candidates(pairs)
        enters = exists & found.enters

        def unfinished(state: tuple[Array, _Kept]) -> Array:
            step, kept = state
            later = enters & (jnp.arange(blocks * block) >= step * block)
            return jnp.any(later & (kept.count < max_detections))

        def next_block(state: tuple[Array, _Kept]) -> tuple[Array, _Kept]:
            step, kept = state
            cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=step * block, slice_size=block, axis=1)
            return step + 1, _add(
                kept, cut(pairs), Candidates(cut(found.boxes), cut(found.labels), cut(enters)), iou_threshold
            )

        return position, jax.lax.while_loop(unfinished, next_block, (jnp.int32(0), kept))[1]

    best = jnp.max(scores, 2)
    position = _Position(
        score=jnp.full((batch, 1), jnp.inf, scores.dtype),
        pair=jnp.full((batch, 1), -1, jnp.int32),
        taken=jnp.zeros((batch, len(sizes)), jnp.int32),
        leaders=jnp.where(best > score_threshold, best, -jnp.inf),
    )
    places = (batch, max_detections)
    kept = _Kept(
        count=jnp.zeros((batch, 1), jnp.int32),
        pairs=jnp.zeros(places, jnp.int32),
        boxes=jnp.zeros((*places, 4), jnp.float32),
        labels=jnp.zeros(places, jnp.int32),
    )
    _, kept = jax.lax.while_loop(unfinished, next_chunk, (position, kept))
    valid = jnp.arange(max_detections) < kept.count
    return jnp.where(valid, kept.pairs, 0), valid


def _add(kept: _Kept, pairs: Array, block: Candidates, iou_threshold: float) -> _Kept:
    """What is kept after a block of candidates, which come after those that were kept before."""
    places, size = kept.pairs.shape[1], pairs.shape[1]
    is_kept = jnp.arange(places) < kept.count
    enters = block.enters & ~jnp.any(_drops(kept, block, iou_threshold) & is_kept[..., None], 1)
    drops = _drops(block, block, iou_threshold) & np.triu(np.ones((size, size), bool), 1)

    def not_dropped(keep: Array) -> Array:
        return enters & ~jnp.any(drops & keep[..., None], 1)

    _, keep = jax.lax.while_loop(
        lambda state: jnp.any(state[0] != state[1]),
        lambda state: (state[1], not_dropped(state[1])),
        (enters, not_dropped(enters)),
    )
    # Place i gets the (i - count + 1)-th one that is kept of the block.
    number = jnp.cumsum(keep, axis=1, dtype=jnp.int32)
    rank = jnp.arange(places) - kept.count
    source = jnp.minimum(jnp.sum(number[:, None] <= rank[..., None], 2), size - 1)
    filled = (rank >= 0) & (rank < number[:, -1:])
    return _Kept(
        count=jnp.minimum(kept.count + number[:, -1:], places),
        pairs=jnp.where(filled, _take(pairs, source), kept.pairs),
        boxes=jnp.where(filled[..., None], _take(block.boxes, source), kept.boxes),
        labels=jnp.where(filled, _take(block.labels, source), kept.labels),
    )


def _drops(first: _Kept | Candidates, second: _Kept | Candidates, iou_threshold: float) -> Array:
    """bool[B, n, m]: whether each of the first, if it is kept, drops each of the second."""
    a, b = first.boxes[:, :, None], second.boxes[:, None]
    same = first.labels[:, :, None] == second.labels[:, None]
    return (_overlap(a, b, _area(a), _area(b)) > iou_threshold) & same


def _overlap(a: AnyArray, b: AnyArray, area_a: AnyArray, area_b: AnyArray) -> Array:
    """IoU of boxes and their areas; 0 for boxes without area."""
    width = jnp.minimum(a[..., 2], b[..., 2]) - jnp.maximum(a[..., 0], b[..., 0])
    height = jnp.minimum(a[..., 3], b[..., 3]) - jnp.maximum(a[..., 1], b[..., 1])
    overlap = _rounded(jnp.maximum(width, 0) * jnp.maximum(height, 0))
    union = area_a + area_b - overlap
    return overlap / jnp.where(union > 0, union, 1)


def _area(boxes: AnyArray) -> Array:
    return _rounded((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]))


def _rounded(product: AnyArray) -> Array:
    """A product that is not fused with a sum, so that all forms give the same numbers."""
    return jnp.where(product == product, product, jnp.nan)


def _take(values: AnyArray, index: AnyArray) -> Array:
    """values[B, n, ...] at index i32[B, m]."""
    return jnp.take_along_axis(values, index.reshape(*index.shape, *[1] * (values.ndim - 2)), axis=1)
