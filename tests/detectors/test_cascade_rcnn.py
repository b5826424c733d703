"""Cascade R-CNN: what its stages look at, learn and say together. Parts of it are those of Faster and Mask R-CNN.

mmdetection's own losses, gradients and detections of narrow models with random weights, with and without masks, were
compared once, when this was written: losses within 4e-6, gradients within 2e-5, every detection the same.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import weights
from kdjax.boxes import coding
from kdjax.detectors import box_head, build, cascade_rcnn, rpn
from kdjax.detectors.api import flatten
from kdjax.errors import UserError
from kdjax.losses import distance
from kdjax.structs import Assignment, DetectorOutput, Regions, Stage, Targets
from tests.support.arrays import on_shards, quick_jit

SIDE, CLASSES, LEVELS = 64, 3, (16, 8, 4, 2, 1)
TINY = dict(base_channels=4, neck_channels=8, head_channels=16, proposals=20, region_samples=12, rpn_samples=16)
TINY |= dict(mask_channels=4, mask_convs=1, train_proposals=30)


@functools.cache
def detector(classes=CLASSES, masks=True):
    return build("cascade_rcnn_r18", classes, masks=masks, **TINY)


def targets(batch=2, width=SIDE):
    """Objects of 20 to 34 pixels, whose masks are their boxes; the last row is padding."""
    rng = np.random.default_rng(1)
    start = rng.uniform(0, 30, (batch, 3, 2))
    boxes = np.concatenate([start, start + rng.uniform(20, 34, start.shape)], -1).astype(np.float32)
    boxes[..., 2] = np.minimum(boxes[..., 2], width)
    valid = np.tile([True, True, False], (batch, 1))
    boxes *= valid[..., None]
    place = 4 * np.arange(SIDE // 4) + 2
    x1, y1, x2, y2 = (boxes[..., i, None] for i in range(4))
    columns, rows = (place > x1) & (place < x2), (place > y1) & (place < y2)
    masks = (rows[..., None] & columns[..., None, :]).astype(np.float32)
    size, pad = np.tile([[SIDE, width]], (batch, 1)).astype(np.int32), np.full((batch, 2), SIDE, np.int32)
    return Targets(boxes, rng.integers(0, CLASSES, valid.shape).astype(np.int32) * valid, valid, size, pad, masks)


def first_stage(stages=(), seed=0):
    """Random objectness and small deltas, beside the stages."""
    rng = np.random.default_rng(seed)

    def maps(channels, scale):
        return tuple(jnp.asarray(scale * rng.normal(size=(2, s, s, channels)), jnp.float32) for s in LEVELS)

    maps_of = {"quality": maps(rpn.ANCHORS, 2.0), "box_reg": maps(4 * rpn.ANCHORS, 0.2)}
    return DetectorOutput(strides=rpn.STRIDES, anchors=rpn.ANCHORS, stages=stages, **maps_of)


def moving(shift, score):
    """A stage that moves boxes by `shift` widths to the right; its logits are `score` times the label, and x1 / 64."""

    def at(boxes):
        logits = score * jnp.arange(CLASSES + 1.0) + boxes[..., :1] / 64
        deltas = jnp.array([shift / 0.1, 0, 0, 0], jnp.float32)
        return Regions(logits, jnp.broadcast_to(deltas, boxes.shape))

    return Stage(jax.tree_util.Partial(at))


def test_a_stage_passes_on_what_it_moved_but_the_objects_own_boxes():
    rng = np.random.default_rng(0)
    regions = np.array([[[0, 0, 10, 20], [4, 4, 14, 24], [50, 8, 62, 28], [0, 0, 0, 0]]], np.float32)
    deltas = rng.normal(size=(1, 4, 4)).astype(np.float32)
    ignore, own = np.array([[False, False, False, True]]), np.array([[True, False, False, False]])
    none = np.zeros((1, 4), np.int32)
    drawn = Assignment(none - 1, own, ignore, none, 0 * regions, 1.0 * own, regions=regions)
    found = cascade_rcnn.next_proposals(Regions(None, deltas), drawn, own, np.array([[SIDE, 60]]))
    assert found.valid.tolist() == [[False, True, True, False]]
    for row in (1, 2):
        (x1, y1, x2, y2), (dx, dy, dw, dh) = regions[0, row], deltas[0, row] * [0.1, 0.1, 0.2, 0.2]
        width, height = (x2 - x1) * np.exp(dw), (y2 - y1) * np.exp(dh)
        x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
        moved = np.clip([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 0, [60, SIDE, 60, SIDE])
        np.testing.assert_allclose(found.boxes[0, row], moved, rtol=1e-5)
    assert not found.boxes[0, [0, 3]].any()


def test_each_stage_learns_of_higher_overlaps_and_looks_where_the_last_one_moved():
    truth = targets()
    stages = tuple(moving(shift, 0.0) for shift in (0.05, 0.0, 0.0))
    found = jax.device_get(
        quick_jit(lambda o, key: detector().assign(o, truth, key))(first_stage(stages), jax.random.key(0))
    )
    assert len(found.earlier) == 2 and found.first.positive.any()
    own = lambda region, image: any(np.array_equal(region, box) for box in truth.boxes[image, :2])  # noqa: E731
    before = None
    for stage, iou in zip((*found.earlier, found), (0.5, 0.6, 0.7), strict=True):
        np.testing.assert_array_equal(stage.masked, stage.positive)
        assert stage.positive.any(1).all()
        for image, row in np.argwhere(~stage.ignore):
            region = stage.regions[image, row]
            best = max(overlap(region, box) for box in truth.boxes[image, :2])
            assert (best >= iou) == stage.positive[image, row]
            if before is not None and not own(region, image):
                assert any(np.allclose(region, box, atol=1e-4) for box in before[image])
        shift = 0.05 if before is None else 0.0
        width = (stage.regions[..., 2] - stage.regions[..., 0])[..., None]
        moved = np.clip(stage.regions + shift * width * np.array([1, 0, 1, 0]), 0, SIDE)
        before = [
            [box for row, box in enumerate(moved[i]) if not stage.ignore[i, row] and not own(stage.regions[i, row], i)]
            for i in range(2)
        ]


def overlap(one, other):
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = np.prod(np.maximum(high - low, 0))
    return shared / max(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - shared, 1e-6)


def test_losses_have_the_distances_and_scales_of_the_stages():
    rng = np.random.default_rng(3)
    regions = np.array([[[4, 4, 24, 34], [10, 8, 40, 28], [0, 0, 20, 20]]], np.float32)
    boxes = regions + rng.uniform(-3, 3, regions.shape).astype(np.float32)
    labels, positive = np.array([[0, 2, 3]]), np.array([[True, True, False]])
    ignore, matched = ~np.ones_like(positive), np.array([[0, 1, -1]])
    drawn = Assignment(matched, positive, ignore, labels, boxes, 1.0 * positive, regions=regions)
    native, logits = rng.normal(size=(1, 3, 4)), jnp.zeros((1, 3, 4))
    for settings in cascade_rcnn.STAGES:
        found = Regions(logits, jnp.asarray(native * np.divide(settings.stds, box_head.STDS), jnp.float32))
        losses = box_head.region_losses(found, drawn, stds=settings.stds, apart=distance.smooth_l1)
        side, of = regions[..., 2:] - regions[..., :2], boxes[..., 2:] - boxes[..., :2]
        shift = (boxes[..., :2] + boxes[..., 2:] - regions[..., :2] - regions[..., 2:]) / 2 / side
        apart = np.abs(native - np.concatenate([shift, np.log(of / side)], -1) / settings.stds)
        apart = np.where(apart < 1, apart**2 / 2, apart - 0.5)
        assert float(losses["loss_box"].sum()) == pytest.approx(apart[positive].sum() / 3, rel=1e-4)
        assert float(losses["loss_cls"].sum()) == pytest.approx(np.log(4), rel=1e-5)


def test_anchors_inside_the_image_are_learned_by_smooth_l1():
    truth, output = targets(width=48), first_stage()
    matched = jax.device_get(quick_jit(lambda: rpn.match(output, truth, inside_image=True))())
    anchors = rpn.anchors(output)
    inside = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < 48) & (anchors[:, 3] < SIDE)
    assert matched.ignore[:, ~inside].all() and not matched.positive[:, ~inside].any()
    assert matched.positive[:, inside].any() and 0 < inside.sum() < len(inside)
    apart = functools.partial(distance.smooth_l1, beta=cascade_rcnn.RPN_BETA)
    got = rpn.anchor_losses(output, matched, apart=apart)["loss_rpn_box"].sum()
    deltas = np.concatenate([np.asarray(m).reshape(2, -1, 4) for m in output.box_reg], 1)
    with np.errstate(divide="ignore"):
        wanted = np.asarray(
            coding.boxes_to_deltas(anchors, np.where(matched.positive[..., None], matched.boxes, anchors))
        )
    far = np.abs(deltas - wanted)
    far = np.where(far < 1 / 9, 4.5 * far**2, far - 1 / 18)[matched.positive].sum()
    counts = matched.positive.sum(1) + (~matched.positive & ~matched.ignore).sum(1)
    assert float(got) == pytest.approx(far / counts.sum(), rel=1e-5)


def test_detections_have_the_mean_logits_and_the_boxes_of_the_last_stage():
    """Three stages that move boxes to the right, by 0.1, 0.2 and 0.3 of their width."""
    stages = tuple(moving(shift, score) for shift, score in ((0.1, 1.0), (0.2, -4.0), (0.3, 0.0)))
    boxes = np.array([[[8.0, 8, 18, 24], [30, 30, 40, 50]]], np.float32)
    proposals = rpn.Proposals(boxes, np.ones((1, 2), np.float32), np.ones((1, 2), bool))
    output = DetectorOutput(strides=(), stages=stages, at=stages[-1].at)
    looked, found = cascade_rcnn.look_through(output, proposals, np.array([[SIDE, SIDE]]))
    np.testing.assert_allclose(looked.boxes, boxes + np.array([3, 0, 3, 0]), rtol=1e-5)
    lefts = [boxes[..., :1] + shift for shift in (0, 1, 3)]
    wanted = -np.arange(CLASSES + 1.0) + sum(lefts) / 64 / 3
    np.testing.assert_allclose(found.logits, wanted, rtol=1e-4, atol=1e-5)
    decoded = quick_jit(lambda o: detector(masks=False).decode(o, np.full((2, 2), SIDE), max_detections=5))(
        first_stage(stages)
    )
    assert decoded.masks is None and decoded.valid.any()
    probs = np.exp(wanted[0, 0]) / np.exp(wanted[0, 0]).sum()
    np.testing.assert_allclose(decoded.scores[decoded.valid].max(), probs[0], atol=1e-5)  # whatever the box


def test_masks_are_the_mean_of_the_stages():
    heads = [
        lambda boxes, labels, c=c: jnp.full((*labels.shape, 28, 28), c) + labels[..., None, None]
        for c in (0.0, 1.0, 3.0)
    ]
    stages = tuple(Stage(moving(0.0, 1.0).at, jax.tree_util.Partial(find)) for find in heads)
    output = first_stage(stages)
    found = quick_jit(lambda o: detector().decode(o, np.full((2, 2), SIDE), max_detections=5))(output)
    wanted = np.mean([1 / (1 + np.exp(-c - np.asarray(found.labels, np.float64))) for c in (0, 1, 3)], 0) * found.valid
    assert found.valid.any()
    np.testing.assert_allclose(found.masks, np.broadcast_to(wanted[..., None, None], found.masks.shape), rtol=1e-5)


@pytest.mark.parametrize("masks", [False, True])
def test_weights_there_and_back_and_for_other_classes(masks):
    source = detector(masks=masks)
    values = source.init(jax.random.key(1))
    state = weights.to_torch(source, *values)
    for i in range(3):
        assert state[f"roi_head.bbox_head.{i}.fc_cls.weight"].shape == (CLASSES + 1, 16)
        assert state[f"roi_head.bbox_head.{i}.fc_reg.weight"].shape == (4, 16)
        assert (f"roi_head.mask_head.{i}.upsample.weight" in state) == masks
    chex.assert_trees_all_equal(weights.from_torch(source, state), values)
    with pytest.warns(UserWarning, match="re-initialised for 5 classes.*all classes start equally likely"):
        params, _ = weights.from_torch(detector(5, masks), state, key=jax.random.key(2))
    fresh, old = (flatten(tree) for tree in (detector(5, masks).init(jax.random.key(2))[0], values[0]))
    for path, value in flatten(params).items():
        of = fresh if "fc_cls" in path or "conv_logits" in path else old
        np.testing.assert_array_equal(value, of[path], err_msg=path)


def test_what_is_refused():
    with pytest.raises(UserError, match="train_proposals of Cascade R-CNN must be >= 1, not 0"):
        build("cascade_rcnn_r18", 2, train_proposals=0)
    with pytest.raises(UserError, match="mask_convs of Cascade R-CNN must be >= 1, not 0"):
        build("cascade_rcnn_r18", 2, mask_convs=0)
    with pytest.raises(UserError, match=r"^instance_masks: Cascade R-CNN learns masks, but the targets have none"):
        detector().loss(first_stage(), targets()._replace(instance_masks=None), None)


def images(batch):
    return jnp.asarray(np.random.default_rng(4).normal(size=(batch, SIDE, SIDE, 3)), jnp.float32)


@functools.cache
def step():
    """A step's losses, the positive regions of its stages, and its gradient; jitted once."""

    def run(params, stats, image, truth, key):
        def total(params):
            output, _ = detector().apply(params, stats, image, train=True)
            drawn = detector().assign(output, truth, key)
            losses = detector().loss(output, truth, drawn)
            return sum(losses.values()), (losses, [stage.positive for stage in (*drawn.earlier, drawn)])

        gradient, aux = jax.grad(total, has_aux=True)(params)
        return aux, gradient

    return jax.jit(run)


@pytest.mark.slow
def test_a_step_with_and_without_objects():
    variables, truth = detector().init(jax.random.key(0)), targets()
    (losses, _), gradient = step()(*variables, images(2), truth, jax.random.key(0))
    names = [f"loss_{name}_{i}" for name in ("box", "cls", "mask") for i in range(3)]
    assert sorted(losses) == [*names, "loss_rpn_box", "loss_rpn_cls"]
    assert all(value > 0 and np.isfinite(value) for value in losses.values())
    moved = flatten(gradient["roi_head"]) | flatten(gradient["rpn_head"])
    assert len(moved) == 3 * 14 + 6 and all(np.abs(leaf).max() for leaf in moved.values())
    empty = truth._replace(valid=np.zeros_like(truth.valid))
    (losses, positive), gradient = step()(*variables, images(2), empty, jax.random.key(0))
    assert all(losses[name] == 0 for name in names if "cls" not in name) and not np.any(positive)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_eight_devices_are_one():
    variables, truth = detector().init(jax.random.key(0)), targets(8)
    arrays, tree = jax.tree.flatten((images(8), truth))

    def run(*flat):
        return step()(*variables, *jax.tree.unflatten(tree, flat), jax.random.key(0))

    (losses, positive), gradient = on_shards(run, *arrays)
    (one, of_one), slope = step()(*variables, images(8), truth, jax.random.key(0))
    assert all(np.any(stage) for stage in of_one)
    chex.assert_trees_all_equal(positive, of_one)
    chex.assert_trees_all_close(losses, one, rtol=1e-5)
    chex.assert_trees_all_close(gradient, slope, rtol=1e-3, atol=1e-4)
