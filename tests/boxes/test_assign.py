"""The assigners of RTMDet and YOLOX against slow loops, and what must not change its result."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdjax.boxes import assign, coding, priors, topk
from kdjax.structs import Targets
from tests.support.boxes import slow_sim_ota

FAST = settings(deadline=None, max_examples=25, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32 - 1)
HW, CLASSES, ROWS = (64, 96), 4, 6
GRID = priors.grid_priors(HW, (8, 16, 32))

assigner = jax.jit(lambda logits, boxes, targets: assign.dynamic_soft_label(logits, boxes, GRID, targets))


def some_batch(seed: int, batch: int = 3):
    """Predictions near the truth and images of 0 .. ROWS boxes, among them tiny and equal ones."""
    rng = np.random.default_rng(seed)
    height, width = HW
    counts = rng.integers(0, ROWS + 1, batch)
    centres = rng.uniform(0, 1, (batch, ROWS, 2)) * [width, height]
    sizes = np.exp(rng.uniform(np.log(3), np.log(60), (batch, ROWS, 2)))
    boxes = np.clip(np.concatenate([centres - sizes / 2, centres + sizes / 2], -1), 0, [width, height] * 2)
    boxes[:, 2] = np.where(rng.random((batch, 1)) < 0.3, boxes[:, 1], boxes[:, 2])  # the same place twice
    valid = np.arange(ROWS) < counts[:, None]
    labels = rng.integers(0, CLASSES, (batch, ROWS))
    pad = np.stack([rng.integers(40, height + 1, batch), rng.integers(40, width + 1, batch)], -1)
    targets = Targets(
        boxes=np.where(valid[..., None], boxes, 0).astype(np.float32),
        labels=np.where(valid, labels, 0).astype(np.int32),
        valid=valid,
        image_size=pad.astype(np.int32),
        pad_size=pad.astype(np.int32),
    )
    logits = rng.normal(-1, 2, (batch, len(GRID), CLASSES)).astype(np.float32)
    distances = np.exp(rng.normal(2.5, 0.8, (batch, len(GRID), 4))).astype(np.float32)
    return logits, np.asarray(coding.distance_to_boxes(GRID[:, :2], distances)), targets


def slow_assigner(logits, boxes, targets: Targets, row: int, topk=13):
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
            cost[m, i] -= 3 * math.log(v + 1e-7)
            away = math.hypot(GRID[n, 0] - (box[0] + box[2]) / 2, GRID[n, 1] - (box[1] + box[3]) / 2)
            cost[m, i] += 10 ** (away / GRID[n, 2] - 3)
    takers = {}
    for m in range(len(truth) if candidates else 0):
        k = max(int(np.sort(overlap[m])[::-1][:topk].sum()), 1)
        for i in np.argsort(cost[m], kind="stable")[:k]:
            takers.setdefault(i, []).append(m)
    for i, boxes_of in takers.items():
        m = boxes_of[0] if len(boxes_of) == 1 else int(np.argmin(cost[:, i]))
        matched[candidates[i]], quality[candidates[i]] = m, overlap[m, i]
    return matched, quality


def test_k_smallest_is_a_stable_sort():
    rng = np.random.default_rng(0)
    search = jax.jit(topk.k_smallest, static_argnums=1)
    for size, k in ((5, 5), (208, 13), (209, 13), (700, 13), (37, 2)):
        for missing in (0.0, 0.9, 1.0):
            values = rng.integers(0, 40, (4, size)).astype(np.float32)
            values[rng.random(values.shape) < missing] = np.inf
            smallest, index = search(values, k)
            want = np.argsort(values, axis=-1, kind="stable")[:, :k]
            np.testing.assert_array_equal(index, want)
            np.testing.assert_array_equal(smallest, np.take_along_axis(values, want, -1))


@FAST
@given(SEEDS)
def test_equals_slow_loop(seed):
    logits, boxes, targets = some_batch(seed)
    got = assigner(logits, boxes, targets)
    for row in range(len(logits)):
        matched, quality = slow_assigner(logits, boxes, targets, row)
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
    found = assign.dynamic_soft_label(np.zeros((1, len(grid), 2), np.float32), spread, grid, targets)
    assert int((found.matched == 1).sum()) == 1 <= int((found.matched == 0).sum())


def test_equal_overlaps_stay_equal_when_compiled():
    """In `max_iou` they decide; every product is rounded by itself, as where each operation is a program."""
    anchors = priors.grid_anchors((96, 128), [8, 16, 32], ratios=[0.5, 1.0, 2.0], scales=[4.0])
    full = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}  # what users get
    compiled = jax.jit(assign.max_iou, static_argnames="num_classes", compiler_options=full)
    options = dict(num_classes=1, positive_iou=0.5, negative_iou=0.4, ignored_boxes=np.zeros((1, 1, 4), np.float32))
    rng, whole = np.random.default_rng(0), np.array([[96, 128]])
    for _ in range(10):
        centres, sizes = rng.uniform(8, 88, (1, 4, 2)), rng.uniform(1, 10, (1, 4, 2))
        boxes = np.concatenate([centres - sizes / 2, centres + sizes / 2], -1).astype(np.float32)
        all_of_one = dict(labels=np.zeros((1, 4), np.int32), valid=np.ones((1, 4), bool))
        targets = Targets(boxes=boxes, image_size=whole, pad_size=whole, **all_of_one)
        with jax.disable_jit():
            wanted = assign.max_iou(anchors, targets, **options)
        np.testing.assert_array_equal(compiled(anchors, targets, **options).matched, wanted.matched)


def test_images_without_boxes_are_background():
    logits, boxes, targets = some_batch(6)
    got = assigner(logits, boxes, targets._replace(valid=np.zeros_like(targets.valid)))
    assert not np.any(got.positive) and np.all(np.isfinite(got.quality))
    assert np.all(got.matched == -1) and np.all(got.labels == CLASSES)


MIDDLES = priors.grid_priors(HW, (8, 16, 32), offset=0.5)
sim_ota = jax.jit(lambda probs, boxes, targets: assign.sim_ota(probs, boxes, MIDDLES, targets))


@FAST
@given(SEEDS)
def test_sim_ota_equals_slow_loop(seed):
    logits, boxes, targets = some_batch(seed)
    probs = np.asarray(jax.nn.sigmoid(logits))
    got = sim_ota(probs, boxes, targets)
    for row in range(len(logits)):
        matched, quality = slow_sim_ota(probs[row], boxes[row], MIDDLES, targets, row)
        ours = np.asarray(got.matched[row])
        at = np.flatnonzero(matched != ours)
        # Boxes in the same place with the same class have equal costs up to rounding: either will do.
        assert np.all(ours[at] >= 0) and np.all(matched[at] >= 0)
        np.testing.assert_array_equal(targets.boxes[row][ours[at]], targets.boxes[row][matched[at]])
        np.testing.assert_array_equal(targets.labels[row][ours[at]], targets.labels[row][matched[at]])
        np.testing.assert_allclose(got.quality[row], quality, atol=1e-5)


ANCHORS = np.concatenate([GRID[:, :2] - 2 * GRID[:, 2:], GRID[:, :2] + 2 * GRID[:, 2:]], axis=1)
SIZES = (96, 24, 6)


def others(logits, boxes, targets: Targets) -> dict:
    """The assigners of other detectors on the same batch."""
    inside = assign.inside_padding(GRID, targets.pad_size)
    crowds = jnp.zeros((len(logits), 2, 4)).at[:, 0].set(jnp.array([0.0, 0, 20, 20]))
    retina = {"positive_iou": 0.5, "negative_iou": 0.4, "num_classes": CLASSES, "inside": inside}
    crowd = {"ignored_boxes": crowds, "ignore_iof": 0.5, "min_positive_iou": 0.3}
    return {
        "sim_ota": assign.sim_ota(jax.nn.sigmoid(logits), boxes, GRID, targets),
        "max_iou": assign.max_iou(ANCHORS, targets, **retina),
        "max_iou_crowd": assign.max_iou(ANCHORS, targets, **retina | crowd),
        "atss": assign.atss(ANCHORS, targets, num_classes=CLASSES, level_sizes=SIZES, inside=inside),
    }


def slow_max_iou(targets: Targets, row: int) -> list[int]:
    """For each anchor the matched box, -1 for background, -2 for ignored."""
    truth = np.float64(targets.boxes[row][targets.valid[row]])
    padded_height, padded_width = targets.pad_size[row]
    found = np.zeros((len(truth), len(ANCHORS)))
    takes_part = [y < padded_height and x < padded_width for x, y in GRID[:, :2]]
    for m, box in enumerate(truth):
        for n, a in enumerate(np.float64(ANCHORS)):
            both = max(min(a[2], box[2]) - max(a[0], box[0]), 0) * max(min(a[3], box[3]) - max(a[1], box[1]), 0)
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (a, box)]
            found[m, n] = both / max(sum(areas) - both, 1e-6) if takes_part[n] else -1
    matched = []
    for n in range(len(ANCHORS)):
        best = found[:, n].max() if len(truth) else 0
        index = int(found[:, n].argmax()) if best >= 0.5 else -1 if best < 0.4 else -2
        for m in range(len(truth)):
            if abs(found[m, n] - found[m].max()) < 1e-6:
                index = m
        matched.append(index if takes_part[n] else -2)
    return matched


def test_other_assigners():
    run = jax.jit(others)
    logits, boxes, targets = some_batch(9, batch=6)
    want = run(logits, boxes, targets)
    garbage = targets._replace(
        boxes=np.where(targets.valid[..., None], targets.boxes, [1, 2, 70, 60]).astype(np.float32)
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), want, run(logits, boxes, garbage)))
    outside = ~np.asarray(assign.inside_padding(GRID, targets.pad_size))
    for name, got in want.items():
        assert np.any(got.positive) and np.all(np.isfinite(got.quality)), name
        assert np.all(np.asarray(got.ignore)[outside]) and not np.any(got.positive & got.ignore), name
        assert np.all(np.asarray(got.labels)[~np.asarray(got.positive)] == CLASSES), name
        assert not np.any(np.asarray(got.positive) & ~targets.valid.any(1)[:, None]), name
    for name, got in run(logits, boxes, targets._replace(valid=np.zeros_like(targets.valid))).items():
        assert not np.any(got.positive), name
        np.testing.assert_array_equal(got.ignore, outside, err_msg=name)
    retina = want["max_iou"]
    for row in range(len(logits)):
        got = np.where(retina.ignore[row], -2, retina.matched[row])
        np.testing.assert_array_equal(got, slow_max_iou(targets, row))


def test_no_gradient_and_bfloat16():
    logits, boxes, targets = some_batch(7)

    def scalar(logits, boxes):
        got = assign.dynamic_soft_label(logits, boxes, GRID, targets)
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


POINTS = priors.grid_priors(HW, (8, 16, 32), offset=0.5)
RANGES = np.array([[-1.0, 16], [16, 32], [32, np.inf]])[[(8, 16, 32).index(s) for s in POINTS[:, 2]]]
smallest = {
    radius: jax.jit(
        lambda targets, radius=radius: assign.smallest_box(
            POINTS, targets, num_classes=CLASSES, ranges=RANGES, radius=radius
        )
    )
    for radius in (None, 1.5)
}


@FAST
@given(SEEDS, st.sampled_from([None, 1.5]))
def test_smallest_box_equals_slow_loop(seed, radius):
    _, _, targets = some_batch(seed)
    got = smallest[radius](targets)
    for row in range(len(targets.boxes)):
        for n, (x, y, stride, _) in enumerate(POINTS):
            best, least = -1, math.inf
            for m in np.flatnonzero(targets.valid[row]):
                x1, y1, x2, y2 = box = np.float64(targets.boxes[row, m])
                far = max(x - x1, y - y1, x2 - x, y2 - y)
                if radius is not None:
                    cx, cy, r = (x1 + x2) / 2, (y1 + y2) / 2, radius * stride
                    box = max(cx - r, x1), max(cy - r, y1), min(cx + r, x2), min(cy + r, y2)
                inside = box[0] < x < box[2] and box[1] < y < box[3]
                area = np.float32((x2 - x1) * (y2 - y1))
                if inside and RANGES[n, 0] <= far <= RANGES[n, 1] and area < least:
                    best, least = m, area
            assert got.matched[row, n] == best or np.isclose(
                *(np.prod(targets.boxes[row, m][2:] - targets.boxes[row, m][:2]) for m in (best, got.matched[row, n]))
            )
    assert not np.any(got.ignore)
    np.testing.assert_array_equal(got.labels == CLASSES, got.matched < 0)
