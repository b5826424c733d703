"""Denoising queries: who restores what, how strong the noise is, and what must not change them."""

import functools

import jax
import numpy as np
import pytest

from kdjax.boxes import convert
from kdjax.detectors import denoising
from kdjax.errors import UserError
from tests.support.arrays import quick_jit
from tests.support.queries import CLASSES, NUMBER, SIZE, reordered, some_targets, widened

SIDES = np.float32([SIZE[1], SIZE[0]] * 2)


@functools.cache
def program(**settings):
    def run(draws, targets):
        of_all = {"number": NUMBER, "num_classes": CLASSES} | settings
        return denoising.contrastive(draws, targets.boxes / SIDES, targets.labels, targets.valid, **of_all)

    return quick_jit(run)


def noised(targets, draws=None, **settings):
    """With other draws for each place if there are none."""
    batch, size = len(targets.valid), denoising.places(settings.get("number", NUMBER), targets.valid.shape[1])
    rng = np.random.default_rng(0)
    uniform, sign = rng.random((batch, size, 4), np.float32), rng.choice(np.float32([-1, 1]), (batch, size, 4))
    made = denoising.Draws(uniform[..., 0], np.int32(uniform[..., 1] * CLASSES), uniform, sign)
    return jax.tree.map(np.asarray, program(**settings)(draws or made, targets))


def test_groups_of_positives_and_negatives():
    targets = some_targets(0, [2, 0, 1], 4)
    found = noised(targets)
    # Two objects at most: three groups of two positives and two negatives.
    assert found.groups == 3 and found.live.all() and found.live.shape == (12,)
    np.testing.assert_array_equal(found.matched[0], [0, 1, -1, -1] * 3)
    np.testing.assert_array_equal(found.matched[1], [-1] * 12)
    np.testing.assert_array_equal(found.matched[2], [0, -1, -1, -1] * 3)
    # A place without an object has no class and no box.
    assert (found.labels[1] == CLASSES).all() and not found.boxes[1].any()
    np.testing.assert_array_equal(found.labels[2] == CLASSES, [False, True] * 6)
    group = np.arange(12) // 4
    np.testing.assert_array_equal(found.blocked, group[:, None] != group)


def test_places_that_are_not_used_are_seen_by_themselves_alone():
    found = noised(some_targets(0, [1, 4], 4))
    assert found.groups == 1 and found.live.sum() == 8 and found.live[:8].all()
    blocked = found.blocked[:, 8:]
    np.testing.assert_array_equal(blocked, ~np.eye(12, dtype=bool)[:, 8:])
    assert (found.matched[:, 8:] == -1).all() and (found.labels[:, 8:] == CLASSES).all()
    assert not found.boxes[:, 8:].any()


def test_more_objects_than_pairs_make_one_group_of_all():
    targets = some_targets(0, [5, 3], 5)
    found = noised(targets, number=2)
    assert found.groups == 1 and found.live.all() and found.live.shape == (10,)
    np.testing.assert_array_equal(found.matched[0], [0, 1, 2, 3, 4] + [-1] * 5)


def test_a_batch_without_objects_has_no_denoising_queries():
    found = noised(some_targets(0, [0, 0], 3))
    assert not found.live.any() and (found.matched == -1).all() and not found.boxes.any()
    assert not found.blocked.diagonal().any()


def test_strength_of_the_noise():
    targets = some_targets(1, [4] * 64, 4)
    middle = np.concatenate([targets.boxes[..., :2] + targets.boxes[..., 2:]] * 2, -1) / 2
    targets = targets._replace(boxes=np.float32(middle + np.float32([-5, -4, 5, 4])))  # noise does not leave the image
    draws = denoising.draw(jax.random.key(0), 64, 80, CLASSES)
    found = noised(targets, draws, number=40, label_noise=0.5, box_noise=0.6)
    assert found.live.all()
    index = np.arange(80) % 4
    own, negative = targets.boxes[:, index] / SIDES, np.arange(80) % 8 >= 4
    corners = np.asarray(convert.from_cxcywh(found.boxes))
    size = np.concatenate([own[..., 2:] - own[..., :2]] * 2, -1)
    moved = (corners - own) / (size / 2 * 0.6)
    solid = (found.boxes[..., 2:] > 0).all(-1)
    for row, low in ((negative, 1.0), (~negative, 0.0)):
        shift = np.abs(moved[:, row][solid[:, row]])
        assert shift.min() >= low - 1e-3 and shift.max() <= low + 1 + 1e-3
        assert shift.mean() == pytest.approx(low + 0.5, abs=0.02)
        assert np.mean(moved[:, row] > 0) == pytest.approx(0.5, abs=0.03)
    # A quarter of the labels is drawn anew, of all classes.
    changed = found.labels != targets.labels[:, index]
    assert changed.mean() == pytest.approx(0.25 * (1 - 1 / CLASSES), abs=0.02)
    assert set(np.unique(found.labels)) == set(range(CLASSES))
    calm = noised(targets, number=40, label_noise=0.0, box_noise=0.0)
    np.testing.assert_array_equal(calm.labels, targets.labels[:, index])
    np.testing.assert_allclose(calm.boxes[..., 2:], size[..., 2:], atol=1e-6)


def test_corners_that_pass_each_other():
    targets = some_targets(2, [4] * 16, 4)
    clamped, mirrored = (noised(targets, inverted=inverted) for inverted in ("clamp", "mirror"))
    passed = clamped.boxes[..., 2:] < mirrored.boxes[..., 2:]
    assert passed.any() and not clamped.boxes[..., 2:][passed].any() and (clamped.boxes >= 0).all()
    np.testing.assert_array_equal(mirrored.boxes[..., 2:][~passed], clamped.boxes[..., 2:][~passed])
    np.testing.assert_array_equal(mirrored.boxes[..., :2], clamped.boxes[..., :2])


def test_padding_and_the_order_of_images_and_objects():
    targets = some_targets(3, [2, 3, 0], 4)
    found = noised(targets)
    wide = noised(widened(targets, 2))
    np.testing.assert_array_equal(wide.boxes, found.boxes)
    np.testing.assert_array_equal(wide.matched, found.matched)
    # Padding between the objects: the same objects in the same order.
    order = np.array([3, 0, 1, 2])
    apart = noised(reordered(targets, order))
    np.testing.assert_array_equal(apart.boxes, found.boxes)
    np.testing.assert_array_equal(apart.labels, found.labels)
    np.testing.assert_array_equal(apart.matched, np.where(found.matched < 0, -1, found.matched + 1))


def test_wrong_options_are_refused():
    targets = some_targets(0, [1], 2)
    draws = denoising.draw(jax.random.key(0), 1, 4, CLASSES)
    arrays = (targets.boxes, targets.labels, targets.valid)
    with pytest.raises(UserError, match="inverted must be one of clamp, mirror"):
        denoising.contrastive(draws, *arrays, number=2, num_classes=CLASSES, inverted="swap")
    with pytest.raises(UserError, match="draws must be of 1 x 6 places"):
        denoising.contrastive(draws, *arrays, number=3, num_classes=CLASSES)
