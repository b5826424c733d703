"""The assigners of RetinaNet, ATSS and FCOS against slow loops, and what must not change their result."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kdjax.boxes import assign, dynamic, priors
from kdjax.structs import Targets
from tests.support.boxes import CLASSES, GRID, HW, slow_iou, some_batch

FAST = settings(deadline=None, max_examples=25, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32 - 1)


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


ANCHORS = np.concatenate([GRID[:, :2] - 2 * GRID[:, 2:], GRID[:, :2] + 2 * GRID[:, 2:]], axis=1)
SIZES = (96, 24, 6)
CROWD = np.array([0.0, 0, 20, 20])


def others(logits, boxes, targets: Targets) -> dict:
    """The assigners of other detectors on the same batch."""
    inside = assign.inside_padding(GRID, targets.pad_size)
    crowds = jnp.zeros((len(logits), 2, 4)).at[:, 0].set(CROWD)
    retina = {"positive_iou": 0.5, "negative_iou": 0.4, "num_classes": CLASSES, "inside": inside}
    crowd = {"ignored_boxes": crowds, "ignore_iof": 0.5, "min_positive_iou": 0.3}
    high = {"positive_iou": 0.2, "negative_iou": 0.1, "match_low_quality": False}
    return {
        "sim_ota": dynamic.sim_ota(jax.nn.sigmoid(logits), boxes, GRID, targets),
        "max_iou": assign.max_iou(ANCHORS, targets, **retina),
        "max_iou_crowd": assign.max_iou(ANCHORS, targets, **retina | crowd),
        "max_iou_high": assign.max_iou(ANCHORS, targets, **retina | high),
        "atss": assign.atss(ANCHORS, targets, num_classes=CLASSES, level_sizes=SIZES, inside=inside),
    }


def slow_max_iou(targets: Targets, row: int, *, high: bool = False, crowd: bool = False) -> list[int]:
    """For each anchor the matched box, -1 for background, -2 for ignored."""
    least = 0.3 if crowd else 0.0
    positive, negative = (0.2, 0.1) if high else (0.5, 0.4)
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
        if crowd and slow_iou(ANCHORS[n], CROWD, "iof") > 0.5:
            found[:, n] = -1
    for n in range(len(ANCHORS)):
        best = found[:, n].max() if len(truth) else 0
        index = int(found[:, n].argmax()) if best >= positive else -1 if 0 <= best < negative else -2
        for m in range(0 if high else len(truth)):
            if abs(found[m, n] - found[m].max()) < 1e-6 and found[m].max() >= least:
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
    slow = {"max_iou": {}, "max_iou_crowd": {"crowd": True}, "max_iou_high": {"high": True}}
    for name, options in slow.items():
        found = want[name]
        for row in range(len(logits)):
            got = np.where(found.ignore[row], -2, found.matched[row])
            np.testing.assert_array_equal(got, slow_max_iou(targets, row, **options), err_msg=name)


def of_anchors(anchors, boxes) -> tuple[np.ndarray, Targets]:
    """Anchors, and one image with these boxes."""
    boxes, size = np.array([boxes], np.float32), np.array([[64, 64]])
    valid = np.ones(boxes.shape[:2], bool)
    return np.array(anchors, np.float32), Targets(boxes, valid.astype(np.int32) - 1, valid, size, size)


def test_max_iou_at_its_thresholds():
    """Overlaps of exactly 3/4, 1/2 and 1/4 of the box, and one that touches it."""
    anchors, targets = of_anchors([[0, 0, 4, 3], [0, 0, 4, 2], [0, 0, 4, 1], [4, 0, 8, 4]], [[0, 0, 4, 4]])

    def found(**options):
        options = {"positive_iou": 0.5, "negative_iou": 0.25, "match_low_quality": False} | options
        got = assign.max_iou(anchors, targets, num_classes=1, **options)
        return np.where(got.ignore[0], -2, got.matched[0]).tolist()

    assert found() == [0, 0, -2, -1]  # at least positive_iou: matched; below negative_iou: background
    assert found(positive_iou=0.9) == [-2, -2, -2, -1]
    low = {"positive_iou": 0.9, "match_low_quality": True}
    assert found(**low, min_positive_iou=0.75) == [0, -2, -2, -1]
    assert found(**low, min_positive_iou=0.76) == [-2, -2, -2, -1]
    region = {"ignored_boxes": np.array([[[0.0, 0, 2, 4]]], np.float32)}  # half of each of the first three
    assert found(**region, ignore_iof=0.5) == [0, 0, -2, -1]
    assert found(**region, ignore_iof=0.49) == [-2, -2, -2, -1]
    assert found(**region) == [0, 0, -2, -1]


def test_of_several_boxes_the_last_takes_an_anchor_of_low_quality():
    anchors, targets = of_anchors([[0, 0, 4, 4]], [[0, 0, 4, 1], [0, 0, 1, 4]])
    got = assign.max_iou(anchors, targets, num_classes=1, positive_iou=0.9, negative_iou=0.1)
    assert got.matched.tolist() == [[1]]


def slow_atss(targets: Targets, row: int, inside) -> list[int]:
    """For each anchor the matched box or -1, in float64."""
    best = np.full(len(ANCHORS), -1.0)
    matched = np.full(len(ANCHORS), -1)
    centres = (np.float64(ANCHORS[:, :2]) + ANCHORS[:, 2:]) / 2
    for m in np.flatnonzero(targets.valid[row]):
        box = np.float64(targets.boxes[row, m])
        apart = np.where(inside, np.hypot(*(centres - (box[:2] + box[2:]) / 2).T), np.inf)
        near, start = [], 0
        for size in SIZES:
            order = start + np.argsort(np.float32(apart[start : start + size]), kind="stable")[:9]
            near += [n for n in order if np.isfinite(apart[n])]
            start += size
        overlap = np.array([slow_iou(box, ANCHORS[n]) for n in near])
        threshold = overlap.mean() + overlap.std(ddof=1)
        for n, v in zip(near, overlap, strict=True):
            x, y = centres[n]
            border = min(x - box[0], y - box[1], box[2] - x, box[3] - y)
            if v >= threshold and border > 0.01 and v > best[n]:
                matched[n], best[n] = m, v
    return matched.tolist()


atss = jax.jit(
    lambda targets, inside: assign.atss(ANCHORS, targets, num_classes=CLASSES, level_sizes=SIZES, inside=inside)
)


@FAST
@given(SEEDS)
def test_atss_equals_slow_loop(seed):
    _, _, targets = some_batch(seed)
    inside = np.asarray(assign.inside_padding(GRID, targets.pad_size))
    got = atss(targets, inside)
    np.testing.assert_array_equal(got.ignore, ~inside)
    for row in range(len(inside)):
        assert got.matched[row].tolist() == slow_atss(targets, row, inside[row])


def test_atss_at_its_borders():
    """A centre on the side of a box, or less than 0.01 px inside, is not in it; one candidate is its own threshold."""
    for left, matched in ((0.0, -1), (-0.005, -1), (-0.02, 0)):
        anchors, targets = of_anchors([[-4, 0, 4, 8]], [[left, 0, 8, 8]])
        got = assign.atss(anchors, targets, num_classes=1, level_sizes=(1,))
        assert got.matched.tolist() == [[matched]], left


def test_assignments_have_no_gradient_and_no_quality_of_background():
    matched, (_, targets) = np.array([[0, -1]]), of_anchors([[0, 0, 4, 4]] * 2, [[0, 0, 4, 4]])

    def total(quality, boxes):
        got = assign.assignment_of(matched, matched < 0, quality, 1, targets._replace(boxes=boxes))
        return got.quality.sum() + got.boxes.sum(), got

    gradients, got = jax.grad(total, (0, 1), has_aux=True)(jnp.array([[0.5, 0.7]]), jnp.asarray(targets.boxes))
    assert not any(np.any(gradient) for gradient in gradients)
    np.testing.assert_array_equal(got.quality, np.array([[0.5, 0]], np.float32))


def test_smallest_box_at_its_borders():
    points = np.array([[4.0, 4, 8, 8]], np.float32)

    def found(box, low=0.0, high=64.0, radius=None):
        _, targets = of_anchors([[0, 0, 8, 8]], [box])
        ranges = np.array([[low, high]])
        return assign.smallest_box(points, targets, num_classes=1, ranges=ranges, radius=radius).matched.item()

    assert found([4, 0, 8, 8]) == found([0, 4, 8, 8]) == -1 and found([3, 3, 8, 8]) == 0  # strictly inside
    assert found([0, 0, 8, 8], high=4.0) == found([0, 0, 8, 8], low=4.0) == 0  # the range is inclusive
    assert found([0, 0, 8, 8], high=3.9) == found([0, 0, 8, 8], low=4.1) == -1
    assert found([0, 0, 24, 8], radius=1.0) == -1 and found([0, 0, 23.9, 8], radius=1.0) == 0  # the region as well


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


def test_priors_inside_the_padding():
    grid = priors.grid_priors((32, 32), [8], offset=0.5)
    inside = np.asarray(assign.inside_padding(grid, np.array([[32, 32], [17, 8]])))
    assert inside[0].all()
    # ceil(17 / 8) rows of ceil(8 / 8) columns.
    np.testing.assert_array_equal(
        inside[1].reshape(4, 4), np.arange(16).reshape(4, 4) % 4 < np.array([[1], [1], [1], [0]])
    )
