"""RTMDet-Ins: the masks' networks, their loss, what is sampled, and a step; the rest is that of RTMDet."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import nn
from kdjax.boxes import dynamic
from kdjax.detectors import build, rtmdet_ins
from kdjax.detectors.api import flatten
from kdjax.errors import UserError
from kdjax.structs import DetectorOutput, Targets, targets_of
from kdjax.weights import fill
from tests.support.arrays import on_shards, quick_jit

SIDE, BATCH, CLASSES, OBJECTS = 64, 8, 2, 3
LEVELS = (8, 4, 2)
PRIORS = sum(side * side for side in LEVELS)


@functools.cache
def detector():
    return build("rtmdet_ins_pico", CLASSES, widen=0.0625, stacked_convs=1)


def output(seed=0, batch=BATCH):
    """Random predictions, boxes of about two cells."""
    rng = np.random.default_rng(seed)

    def maps(channels, scale=1.0):
        return tuple(jnp.asarray(scale * rng.normal(size=(batch, s, s, channels)), jnp.float32) for s in LEVELS)

    distances = tuple(2.0 * SIDE / side + 0.1 * jnp.abs(m) for side, m in zip(LEVELS, maps(4), strict=True))
    return DetectorOutput(
        strides=(8, 16, 32),
        cls_logits=maps(CLASSES),
        box_reg=distances,
        kernels=maps(169, 0.3),
        prototypes=maps(8)[0],
    )


def targets(stride=1, batch=BATCH):
    """Ellipses in boxes; the first image has no object, the last row of each image is padding."""
    rng = np.random.default_rng(1)
    start = rng.uniform(0, 30, (batch, OBJECTS, 2))
    boxes = np.concatenate([start, start + rng.uniform(12, 30, (batch, OBJECTS, 2))], -1).astype(np.float32)
    valid = np.ones((batch, OBJECTS), bool)
    valid[0], valid[:, -1] = False, False
    boxes *= valid[..., None]
    x1, y1, x2, y2 = (boxes[..., i, None, None] for i in range(4))
    place = np.arange(SIDE) + 0.5
    x, y = place, place[:, None]
    wide, tall = np.maximum(x2 - x1, 1e-3), np.maximum(y2 - y1, 1e-3)
    masks = ((2 * x - x1 - x2) / wide) ** 2 + ((2 * y - y1 - y2) / tall) ** 2 < 1
    masks = (masks & valid[..., None, None]).astype(np.float32)
    masks = masks.reshape(*masks.shape[:2], SIDE // stride, stride, SIDE // stride, stride).mean((3, 5))
    sizes = np.full((batch, 2), SIDE, np.int32)
    return Targets(boxes, rng.integers(0, CLASSES, valid.shape).astype(np.int32) * valid, valid, sizes, sizes, masks)


def slow_mask(kernel, point, prototypes):
    """One mask by the definition, f64[h, w]."""
    sizes = (80, 64, 8, 8, 8, 1)
    w1, w2, w3, b1, b2, b3 = np.split(np.float64(kernel), np.cumsum(sizes)[:-1])
    height, width, _ = prototypes.shape
    y, x = np.mgrid[:height, :width] * 8.0
    relative = np.stack([point[0] - x, point[1] - y], -1) / (8 * point[2])
    maps = np.concatenate([relative, prototypes], -1)
    for weights, bias in ((w1.reshape(8, 10), b1), (w2.reshape(8, 8), b2)):
        maps = np.maximum(maps @ weights.T + bias, 0)
    return maps @ w3 + b3[0]


def slow_dice(logits, truth):
    """Of one mask at stride 8 and the truth at stride 4."""
    fine = np.asarray(nn.resize_bilinear(logits[None, ..., None].astype(np.float32), truth.shape))[0, ..., 0]
    p = 1 / (1 + np.exp(-np.float64(fine)))
    return 1 - 2 * (p * truth).sum() / ((p**2).sum() + (truth**2).sum() + 1e-5)


mask_loss = quick_jit(lambda *a: rtmdet_ins.loss(*a)["loss_mask"])


@functools.cache
def scored():
    """Predictions, targets, their assignment, the loss of masks with its slope at kernels and prototypes."""
    found, truth = output(), targets()
    assignment = quick_jit(rtmdet_ins.assign_targets)(found, truth, jax.random.key(0))
    return found, truth, jax.device_get(assignment)


def test_masks_and_their_loss_are_the_formulas():
    found, truth, assignment = scored()
    priors = detector().priors((SIDE, SIDE))
    kernels = np.concatenate([np.asarray(k).reshape(BATCH, -1, 169) for k in found.kernels], 1)
    losses = []
    for image, row in np.argwhere(assignment.positive):
        logits = slow_mask(kernels[image, row], priors[row], np.asarray(found.prototypes[image]))
        got = rtmdet_ins.mask_logits(kernels[image, None, [row]], priors[None, [row]], found.prototypes[image, None])
        np.testing.assert_allclose(got[0, 0], logits, rtol=1e-4, atol=1e-4)
        truth_mask = truth.instance_masks[image, assignment.matched[image, row], 2::4, 2::4]
        losses.append(slow_dice(logits, truth_mask))
    assert len(losses) > 20
    assert float(mask_loss(found, truth, assignment)) == pytest.approx(2 * np.mean(losses), rel=1e-4)


def test_chosen_rows_are_learned_and_no_others(monkeypatch):
    """In several pieces, of which some are empty."""
    monkeypatch.setattr(rtmdet_ins, "CHUNK", 2)
    found, truth, assignment = scored()
    masked = np.zeros_like(assignment.positive)
    image = int(np.argmax(assignment.positive.sum(1)))
    rows = np.flatnonzero(assignment.positive[image])[:3]
    masked[image, rows] = True
    run = quick_jit(
        jax.value_and_grad(
            lambda f, t, a: rtmdet_ins.loss(f, t, a)["loss_mask"],
        )
    )
    value, slope = run(found, truth, assignment._replace(masked=masked))
    kernels = np.concatenate([np.asarray(k).reshape(BATCH, -1, 169) for k in found.kernels], 1)
    priors = detector().priors((SIDE, SIDE))
    losses = [
        slow_dice(
            slow_mask(kernels[image, row], priors[row], np.asarray(found.prototypes[image])),
            truth.instance_masks[image, assignment.matched[image, row], 2::4, 2::4],
        )
        for row in rows
    ]
    assert float(value) == pytest.approx(2 * np.mean(losses), rel=1e-4)
    moved = np.concatenate([np.asarray(k).reshape(BATCH, -1, 169) for k in slope.kernels], 1).any(-1)
    np.testing.assert_array_equal(moved, masked)
    assert np.flatnonzero(np.asarray(slope.prototypes).any((1, 2, 3))).tolist() == [image]


def test_masks_of_an_image_are_sampled_with_the_key(monkeypatch):
    found, truth, whole = scored()
    np.testing.assert_array_equal(whole.masked, whole.positive)  # none has more than the limit
    monkeypatch.setattr(rtmdet_ins, "MASKS", 4)
    assign = quick_jit(lambda key: rtmdet_ins.assign_targets(found, truth, key).masked)
    one, again, other = (np.asarray(assign(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any() and not (one & ~whole.positive).any()
    np.testing.assert_array_equal(one.sum(1), np.minimum(whole.positive.sum(1), 4))
    first = np.asarray(quick_jit(lambda: rtmdet_ins.assign_targets(found, truth).masked)())
    for masked, positive in zip(first, whole.positive, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(masked), np.flatnonzero(positive)[:4])
    assert np.isfinite(mask_loss(found, truth, whole))  # those beyond the limit are left out


def test_coarse_masks_serve_as_fine_ones():
    found, _, assignment = scored()
    coarse = targets(stride=4)
    fine = coarse._replace(instance_masks=np.repeat(np.repeat(coarse.instance_masks, 4, 2), 4, 3))
    middle = coarse._replace(instance_masks=np.repeat(np.repeat(coarse.instance_masks, 2, 2), 2, 3))
    values = [float(mask_loss(found, truth, assignment)) for truth in (coarse, middle, fine)]
    assert values[0] == values[1] == values[2]
    centers = [dynamic.mask_centers(t.instance_masks, stride=s) for t, s in ((coarse, 4), (middle, 2), (fine, 1))]
    chex.assert_trees_all_close(*centers[:2], rtol=1e-5)
    chex.assert_trees_all_close(*centers[1:], rtol=1e-5)
    # A solid rectangle has its centre in the middle, less half a pixel: pixels are counted at their centres.
    block = np.zeros((1, 16, 16), np.float32)
    block[0, 4:8, 8:16] = 1
    np.testing.assert_allclose(dynamic.mask_centers(block, stride=1), [[11.5, 5.5]])


def test_the_batch_of_a_loader_has_coarse_masks():
    truth = targets(stride=4)
    batch = {"image": np.zeros((BATCH, SIDE, SIDE, 3), np.uint8), "boxes": truth.boxes, "labels": truth.labels,
             "valid": truth.valid, "image_size": truth.image_size}  # fmt: skip
    assert targets_of(batch).instance_masks is None
    masks = np.round(255 * truth.instance_masks).astype(np.uint8)
    got = targets_of(batch | {"masks": jnp.asarray(masks)})
    np.testing.assert_allclose(got.instance_masks, truth.instance_masks, atol=0.002)


def test_eight_devices_are_one():
    found, truth, _ = scored()

    def run(logits, boxes, labels, valid, sizes, masks, kernels, prototypes, distances):
        out = DetectorOutput(
            strides=(8, 16, 32), cls_logits=logits, box_reg=distances, kernels=kernels, prototypes=prototypes
        )
        given = Targets(boxes, labels, valid, sizes, sizes, masks)
        assignment = rtmdet_ins.assign_targets(out, given, jax.random.key(3))
        return rtmdet_ins.loss(out, given, assignment), assignment.masked

    arrays = (found.cls_logits, *truth[:4], truth.instance_masks, found.kernels, found.prototypes, found.box_reg)
    leaves, tree = jax.tree.flatten(arrays)
    split = on_shards(lambda *flat: run(*jax.tree.unflatten(tree, flat)), *leaves)
    whole = jax.jit(run)(*arrays)
    chex.assert_trees_all_close(split, whole, rtol=1e-5, atol=1e-6)


def test_a_step_teaches_the_whole_head_and_is_traced_once():
    """From random maps of the neck on; what is below is RTMDet's."""
    options = dict(widen=0.0625, deepen=0.1, expand_ratio=0.5, attention=True, neck_channels=16, neck_blocks=1)
    net = rtmdet_ins.network(CLASSES, head_channels=16, stacked_convs=1, share_conv=True, **options)
    params, stats = net.init(jax.random.key(0))
    rng = np.random.default_rng(3)
    neck = tuple(jnp.asarray(rng.normal(size=(2, s, s, 16)), jnp.float32) for s in LEVELS)
    traces = []

    @quick_jit
    def step(head, neck, truth, key):
        traces.append(1)

        def total(head, neck):
            whole = params | {"bbox_head": head}
            found, moved = net.call(whole, stats, lambda module: module.outputs((), neck, (), True))
            losses = rtmdet_ins.loss(found, truth, rtmdet_ins.assign_targets(found, truth, key))
            return sum(losses.values()), (losses, moved)

        (_, aux), slope = jax.value_and_grad(total, (0, 1), has_aux=True)(head, neck)
        return aux, slope

    truth = jax.tree.map(lambda a: a[1:3], targets(stride=4))
    (losses, moved), slope = step(params["bbox_head"], neck, truth, jax.random.key(0))
    assert all(value > 0 and np.isfinite(value) for value in losses.values())
    # Levels without a positive prior teach neither boxes nor masks.
    still = [path for path, leaf in flatten(slope[0]).items() if not np.abs(leaf).max()]
    assert all(re.match("(rtm_reg|rtm_kernel|kernel_convs)/[12]/", path) for path in still), still
    empty = truth._replace(valid=np.zeros_like(truth.valid), instance_masks=np.zeros_like(truth.instance_masks))
    (losses, _), slope = step(params["bbox_head"], neck, empty, jax.random.key(1))
    assert losses["loss_mask"] == losses["loss_box"] == 0 < losses["loss_cls"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope)) and len(traces) == 1

    # In PyTorch the tower has two names, and its statistics move twice: old 0 becomes 0.19 of the batch's.
    weights = params["bbox_head"]["cls_convs"]["0"]["0"]["conv"]["kernel"]
    batch = np.mean(nn.conv2d(neck[1], weights), (0, 1, 2))
    state = fill.to_torch(detector(), params, moved)
    for branch in ("cls", "reg"):
        mean = state[f"bbox_head.{branch}_convs.1.0.bn.running_mean"]
        np.testing.assert_allclose(mean, 0.19 * batch, rtol=1e-3, atol=1e-6)
    chex.assert_trees_all_equal((params, moved), fill.from_torch(detector(), state))


def test_decode_gives_the_masks_of_the_rows_that_are_left():
    found = output(batch=1)
    fine = jnp.full_like(found.cls_logits[0], -20.0).at[0, 1, 2, 0].set(3.0).at[0, 6, 6, 1].set(2.0)
    others = tuple(jnp.full_like(m, -20.0) for m in found.cls_logits[1:])
    found = DetectorOutput(strides=found.strides, cls_logits=(fine, *others), box_reg=found.box_reg,
                           kernels=found.kernels, prototypes=found.prototypes)  # fmt: skip
    decode = quick_jit(functools.partial(detector().decode, max_detections=40))
    got = decode(found, np.array([[SIDE, SIDE]]))
    assert got.masks.shape == (1, 40, 8, 8) and got.valid.sum() == 2 and not got.masks[0, 2:].any()
    for place, (row, column) in enumerate([(1, 2), (6, 6)]):
        point = np.array([8.0 * column, 8.0 * row, 8, 8])
        want = slow_mask(np.asarray(found.kernels[0][0, row, column]), point, np.asarray(found.prototypes[0]))
        np.testing.assert_allclose(got.masks[0, place], want, rtol=1e-4, atol=1e-4)


def test_without_masks_or_with_others_is_refused():
    found, truth, assignment = scored()
    with pytest.raises(UserError, match=r"^instance_masks: RTMDet-Ins learns masks, but the targets have none"):
        jax.eval_shape(rtmdet_ins.loss, found, truth._replace(instance_masks=None), assignment)
    for shape in ((8, 8), (21, 21), (16, 32)):
        odd = truth._replace(instance_masks=np.zeros((BATCH, OBJECTS, *shape), np.float32))
        with pytest.raises(
            UserError, match=r"^instance_masks: RTMDet-Ins needs masks of stride 1, 2 or 4 of its 64x64"
        ):
            rtmdet_ins.loss(found, odd, assignment)
    with pytest.raises(UserError, match="prototypes of RTMDet-Ins must be >= 1, not 0"):
        build("rtmdet_ins_pico", 2, prototypes=0)
    with pytest.raises(UserError, match="num_classes of RTMDet-Ins must be >= 1"):
        build("rtmdet_ins_pico", 0)
