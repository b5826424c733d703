"""The assigners of RTMDet and YOLOX against slow loops, and what must not change their result."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdjax.boxes import assign, coding, dynamic, priors
from kdjax.structs import Targets
from tests.support.boxes import CLASSES, GRID, HW, slow_sim_ota, some_batch

FAST = settings(deadline=None, max_examples=25, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32 - 1)


assigner = jax.jit(lambda logits, boxes, targets: dynamic.dynamic_soft_label(logits, boxes, GRID, targets))


def slow_assigner(logits, boxes, targets: Targets, row: int, topk=13, iou_weight=3.0, radius=3.0):
    """One image, prior by prior and box by box, in float64; also how close the decisions were."""
    logits, boxes = np.float64(logits[row]), np.float64(boxes[row])
    truth = np.float64(targets.boxes[row][targets.valid[row]])
    labels = targets.labels[row][targets.valid[row]]
    padded_height, padded_width = targets.pad_size[row]
    matched, quality = np.full(len(GRID), -1), np.zeros(len(GRID))

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    candidates = []
    for n, (x, y, stride, _) in enumerate(GRID):
        column, line = round(x / stride), round(y / stride)
        in_padding = line < math.ceil(padded_height / stride) and column < math.ceil(padded_width / stride)
        if in_padding and any(b[0] < x < b[2] and b[1] < y < b[3] for b in truth):
            candidates.append(n)
    cost, overlap = np.zeros((len(truth), len(candidates))), np.zeros((len(truth), len(candidates)))
    for m, (box, label) in enumerate(zip(truth, labels, strict=True)):
        for i, n in enumerate(candidates):
            a = boxes[n]
            both = max(min(a[2], box[2]) - max(a[0], box[0]), 0) * max(min(a[3], box[3]) - max(a[1], box[1]), 0)
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (a, box)]
            v = overlap[m, i] = both / max(sum(areas) - both, 1e-6)
            for c in range(CLASSES):
                t, p = (v if c == label else 0.0), sigmoid(logits[n, c])
                cost[m, i] += (t - p) ** 2 * -(t * math.log(p) + (1 - t) * math.log1p(-p))
            cost[m, i] -= iou_weight * math.log(v + 1e-7)
            away = math.hypot(GRID[n, 0] - (box[0] + box[2]) / 2, GRID[n, 1] - (box[1] + box[3]) / 2)
            cost[m, i] += 10 ** (away / GRID[n, 2] - radius)
    takers = {}
    for m in range(len(truth) if candidates else 0):
        k = max(int(np.sort(overlap[m])[::-1][:topk].sum()), 1)
        for i in np.argsort(cost[m], kind="stable")[:k]:
            takers.setdefault(i, []).append(m)
    for i, boxes_of in takers.items():
        m = boxes_of[0] if len(boxes_of) == 1 else int(np.argmin(cost[:, i]))
        matched[candidates[i]], quality[candidates[i]] = m, overlap[m, i]
    return matched, quality


OTHER = {"topk": 4, "iou_weight": 1.0, "radius": 0.5}
other = jax.jit(lambda logits, boxes, targets: dynamic.dynamic_soft_label(logits, boxes, GRID, targets, **OTHER))


@FAST
@given(SEEDS, st.booleans())
def test_equals_slow_loop(seed, usual):
    logits, boxes, targets = some_batch(seed)
    got = (assigner if usual else other)(logits, boxes, targets)
    for row in range(len(logits)):
        matched, quality = slow_assigner(logits, boxes, targets, row, **{} if usual else OTHER)
        # Boxes in the same place with the same class have equal costs up to rounding: either will do.
        same = matched == np.asarray(got.matched[row])
        at = np.flatnonzero(~same)
        ours, theirs = np.asarray(got.matched[row])[at], matched[at]
        assert np.all(ours >= 0) and np.all(theirs >= 0)
        np.testing.assert_array_equal(targets.boxes[row][ours], targets.boxes[row][theirs])
        np.testing.assert_array_equal(targets.labels[row][ours], targets.labels[row][theirs])
        np.testing.assert_allclose(got.quality[row], quality, atol=1e-5)


@FAST
@given(SEEDS)
def test_fields_agree_with_each_other(seed):
    logits, boxes, targets = some_batch(seed)
    got = jax.tree.map(np.asarray, assigner(logits, boxes, targets))
    np.testing.assert_array_equal(got.positive, got.matched >= 0)
    np.testing.assert_array_equal(got.ignore, ~np.asarray(assign.inside_padding(GRID, targets.pad_size)))
    assert not np.any(got.positive & got.ignore)
    for row in range(len(logits)):
        index = got.matched[row][got.positive[row]]
        assert np.all(targets.valid[row][index])
        np.testing.assert_array_equal(got.labels[row][got.positive[row]], targets.labels[row][index])
        np.testing.assert_array_equal(got.boxes[row][got.positive[row]], targets.boxes[row][index])
        assert got.positive[row].any() <= targets.valid[row].any()
    background = ~got.positive
    assert np.all(got.labels[background] == CLASSES)
    assert not got.boxes[background].any() and not got.quality[background].any()
    assert np.all((got.quality >= 0) & (got.quality <= 1 + 1e-6))


def test_padding_rows_change_nothing():
    logits, boxes, targets = some_batch(5)
    want = assigner(logits, boxes, targets)
    # Whatever stands in padding rows, and however many there are.
    garbage = targets._replace(
        boxes=np.where(targets.valid[..., None], targets.boxes, [1, 2, 70, 60]).astype(np.float32),
        labels=np.where(targets.valid, targets.labels, 2).astype(np.int32),
    )
    more = targets._replace(
        boxes=np.pad(targets.boxes, [(0, 0), (0, 5), (0, 0)]),
        labels=np.pad(targets.labels, [(0, 0), (0, 5)]),
        valid=np.pad(targets.valid, [(0, 0), (0, 5)]),
    )
    for other in (garbage, more):
        for name, a, b in zip(want._fields, want, assigner(logits, boxes, other), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_a_box_without_a_prior_inside_takes_one_however_far_away():
    grid = priors.grid_priors((16, 1024), (8,))
    boxes = np.array([[[3.0, 0, 60, 16], [1001, 5, 1003, 7]]], np.float32)  # the second lies between the cells' corners
    whole, labels = np.array([[16, 1024]]), np.array([[0, 1]])
    targets = Targets(boxes=boxes, labels=labels, valid=labels >= 0, image_size=whole, pad_size=whole)
    spread = coding.distance_to_boxes(grid[:, :2], np.full((1, len(grid), 4), 4.0, np.float32))
    found = dynamic.dynamic_soft_label(np.zeros((1, len(grid), 2), np.float32), spread, grid, targets)
    assert int((found.matched == 1).sum()) == 1 <= int((found.matched == 0).sum())


def test_images_without_boxes_are_background():
    logits, boxes, targets = some_batch(6)
    got = assigner(logits, boxes, targets._replace(valid=np.zeros_like(targets.valid)))
    assert not np.any(got.positive) and np.all(np.isfinite(got.quality))
    assert np.all(got.matched == -1) and np.all(got.labels == CLASSES)


MIDDLES = priors.grid_priors(HW, (8, 16, 32), offset=0.5)


sim_ota = jax.jit(lambda probs, boxes, targets: dynamic.sim_ota(probs, boxes, MIDDLES, targets))


OTHER_OTA = {"topk": 4, "radius": 1.0, "iou_weight": 1.0, "class_weight": 2.0}
other_ota = jax.jit(lambda probs, boxes, targets: dynamic.sim_ota(probs, boxes, MIDDLES, targets, **OTHER_OTA))


@FAST
@given(SEEDS, st.booleans())
def test_sim_ota_equals_slow_loop(seed, usual):
    logits, boxes, targets = some_batch(seed)
    probs = np.asarray(jax.nn.sigmoid(logits))
    got = (sim_ota if usual else other_ota)(probs, boxes, targets)
    for row in range(len(logits)):
        matched, quality = slow_sim_ota(probs[row], boxes[row], MIDDLES, targets, row, **{} if usual else OTHER_OTA)
        ours = np.asarray(got.matched[row])
        at = np.flatnonzero(matched != ours)
        # Boxes in the same place with the same class have equal costs up to rounding: either will do.
        assert np.all(ours[at] >= 0) and np.all(matched[at] >= 0)
        np.testing.assert_array_equal(targets.boxes[row][ours[at]], targets.boxes[row][matched[at]])
        np.testing.assert_array_equal(targets.labels[row][ours[at]], targets.labels[row][matched[at]])
        np.testing.assert_allclose(got.quality[row], quality, atol=1e-5)


def test_no_gradient_and_bfloat16():
    logits, boxes, targets = some_batch(7)

    def scalar(logits, boxes):
        got = dynamic.dynamic_soft_label(logits, boxes, GRID, targets)
        return jnp.sum(got.quality) + jnp.sum(got.boxes)

    for gradient in jax.jit(jax.grad(scalar, argnums=(0, 1)))(logits, boxes):
        assert not np.any(gradient)
    got = assigner(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(boxes, jnp.bfloat16), targets)
    assert got.quality.dtype == jnp.float32 and np.all(np.isfinite(got.quality)) and np.any(got.positive)


def test_sharded_batch_gives_the_same_without_moving_images():
    logits, boxes, targets = some_batch(8, batch=8)
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:8]), ("data",)), PartitionSpec("data"))
    arguments = jax.device_put((logits, boxes, targets), sharding)
    compiled = assigner.lower(*arguments).compile()
    for name, a, b in zip(Targets._fields, compiled(*arguments), assigner(logits, boxes, targets), strict=False):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert "all-gather" not in compiled.as_text()
