"""Suppression and selection of detections against a slow loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.boxes import nms
from kdjax.errors import UserError

FAST = settings(deadline=None, max_examples=25, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32 - 1)
BATCH, CLASSES, LEVELS = 2, 3, (24, 6, 2)
OPTIONS = dict(score_threshold=0.3, iou_threshold=0.5, pre_nms=20, max_detections=12)
greedy = jax.jit(functools.partial(nms.greedy_nms, iou_threshold=0.5, max_detections=12))
IMAGE_SIZE = np.array([[64, 64], [40, 50]], np.int32)

select = jax.jit(functools.partial(nms.select_detections, level_sizes=LEVELS, **OPTIONS))


def some_predictions(seed: int):
    """Overlapping boxes, some outside the image; scores with two decimals, so that many are equal."""
    rng = np.random.default_rng(seed)
    centres = rng.choice(rng.uniform(0, 70, (6, 2)), (BATCH, sum(LEVELS))) + rng.normal(0, 3, (BATCH, sum(LEVELS), 2))
    sizes = rng.uniform(5, 30, (BATCH, sum(LEVELS), 2))
    boxes = np.concatenate([centres - sizes / 2, centres + sizes / 2], -1).astype(np.float32)
    scores = np.round(rng.uniform(0, 1, (BATCH, sum(LEVELS), CLASSES)), 2).astype(np.float32)
    return boxes, scores


def overlap(a, b) -> float:
    both = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def slow_select(boxes, scores, size):
    height, width = size
    boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    candidates, start = [], 0
    for count in LEVELS:
        pairs = [(-scores[n, c], n, c) for n in range(start, start + count) for c in range(CLASSES)]
        candidates += sorted(pairs)[: OPTIONS["pre_nms"]]
        start += count
    # Equal scores: finer levels first, and inside a level in the order of the candidates.
    kept = []
    for score, n, c in sorted(candidates, key=lambda pair: pair[0]):
        box = boxes[n]
        if -score <= OPTIONS["score_threshold"] or box[2] <= box[0] or box[3] <= box[1]:
            continue
        rivals = [boxes[other] for _, other, label in kept if label == c]
        if all(overlap(rival, box) <= OPTIONS["iou_threshold"] for rival in rivals):
            kept.append((score, n, c))
    kept = kept[: OPTIONS["max_detections"]]
    return np.array([boxes[n] for _, n, _ in kept]), [-s for s, _, _ in kept], [c for _, _, c in kept]


@FAST
@given(SEEDS)
def test_select_detections_equals_a_slow_loop(seed):
    boxes, scores = some_predictions(seed)
    got = jax.tree.map(np.asarray, select(boxes, scores, image_size=IMAGE_SIZE))
    for row in range(BATCH):
        want_boxes, want_scores, want_labels = slow_select(boxes[row], scores[row], IMAGE_SIZE[row])
        valid = got.valid[row]
        assert valid.sum() == len(want_scores) and np.all(valid[: len(want_scores)])
        np.testing.assert_array_equal(got.boxes[row][valid], want_boxes.reshape(-1, 4))
        np.testing.assert_array_equal(got.scores[row][valid], np.float32(want_scores))
        np.testing.assert_array_equal(got.labels[row][valid], want_labels)


@FAST
@given(SEEDS)
def test_greedy_nms_without_labels_compares_all_boxes(seed):
    boxes, scores = some_predictions(seed)
    index, valid = greedy(boxes, scores[..., 0])
    for row in range(BATCH):
        kept = []
        for n in np.argsort(-scores[row, :, 0], kind="stable"):
            if all(overlap(boxes[row, other], boxes[row, n]) <= 0.5 for other in kept):
                kept.append(n)
        assert np.asarray(index[row])[np.asarray(valid[row])].tolist() == kept[:12]


def test_empty_places_hold_zeros():
    boxes, scores = some_predictions(0)
    got = jax.tree.map(np.asarray, select(boxes, np.where(scores > 0.97, scores, 0), image_size=IMAGE_SIZE))
    assert 0 < got.valid.sum() < got.valid.size
    for values in (got.boxes, got.scores, got.labels):
        assert not values[~got.valid].any()
    at_threshold = np.full_like(scores, OPTIONS["score_threshold"])
    none = select(boxes, at_threshold, image_size=IMAGE_SIZE)
    assert not np.any(none.valid) and not np.any(none.boxes) and not np.any(none.scores)


def test_image_does_not_depend_on_its_neighbours():
    boxes, scores = some_predictions(1)
    both = select(boxes, scores, image_size=IMAGE_SIZE)
    scores[1] = 0
    one = select(boxes, scores, image_size=IMAGE_SIZE)
    for a, b in zip(both[:4], one[:4], strict=True):
        np.testing.assert_array_equal(a[0], b[0])
    assert not np.any(one.valid[1])


def test_without_image_size_nothing_is_clipped():
    boxes, scores = some_predictions(2)
    boxes = boxes - 20
    got = select(boxes, scores, image_size=None)
    assert np.any(np.asarray(got.boxes)[np.asarray(got.valid)] < 0)


def test_fewer_pairs_than_places():
    boxes, scores = some_predictions(3)
    got = nms.select_detections(
        boxes[:, :2],
        scores[:, :2],
        level_sizes=(2,),
        image_size=None,
        score_threshold=0.0,
        iou_threshold=1.0,
        pre_nms=100,
        max_detections=10,
    )
    assert got.boxes.shape == (BATCH, 10, 4) and np.all(np.sum(got.valid, axis=1) <= 2 * CLASSES)


def test_bfloat16_and_wrong_levels():
    boxes, scores = some_predictions(4)
    got = select(jnp.asarray(boxes, jnp.bfloat16), jnp.asarray(scores, jnp.bfloat16), image_size=IMAGE_SIZE)
    assert got.boxes.dtype == got.scores.dtype == jnp.float32 and np.all(np.isfinite(got.boxes))
    with pytest.raises(UserError, match="level_sizes must add up to the 32 priors, not 30"):
        nms.select_detections(boxes, scores, level_sizes=(24, 6), image_size=None, **OPTIONS)


def test_quality_multiplies_the_scores_that_go_on():
    boxes = np.array([[[0.0, 0, 8, 8], [0, 0, 8, 7], [20, 20, 30, 30]]], np.float32)
    scores, quality = np.array([[[0.8], [0.6], [0.2]]], np.float32), np.array([[0.1, 0.5, 1.0]], np.float32)
    options = {"level_sizes": (3,), "image_size": None, "score_threshold": 0.3, "iou_threshold": 0.5}
    found = nms.select_detections(boxes, scores, quality=quality, pre_nms=10, max_detections=3, **options)
    # The third scores too little although its quality is best; the first is suppressed by the second.
    np.testing.assert_array_equal(found.valid[0], [True, False, False])
    np.testing.assert_allclose(found.scores[0, 0], 0.3)
    np.testing.assert_array_equal(found.boxes[0, 0], boxes[0, 1])
    # Which pairs go on is decided by the scores alone.
    first = nms.select_detections(boxes, scores, quality=quality, pre_nms=1, max_detections=3, **options)
    np.testing.assert_allclose(first.scores[0], [0.08, 0, 0], rtol=1e-6)


def test_an_overlap_at_the_threshold_is_kept():
    boxes, scores = np.array([[[0.0, 0, 4, 4], [0, 0, 4, 2]]], np.float32), np.array([[0.9, 0.8]], np.float32)
    for threshold, count in ((0.5, 2), (0.49, 1)):
        _, valid = nms.greedy_nms(boxes, scores, iou_threshold=threshold, max_detections=2)
        assert valid.sum() == count


def test_indices_of_empty_places_are_zero():
    boxes = np.array([[[0.0, 0, 4, 4], [8, 8, 9, 9]]] * 2, np.float32)
    scores = np.array([[0.9, 0.8], [-np.inf, 0.8]], np.float32)
    index, valid = nms.greedy_nms(boxes, scores, iou_threshold=0.5, max_detections=3)
    assert index.tolist() == [[0, 1, 0], [1, 0, 0]] and valid.tolist() == [[True, True, False], [True, False, False]]
