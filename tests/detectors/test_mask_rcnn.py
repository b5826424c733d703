"""Mask R-CNN: the mask head, what it learns, its loss, and whole steps; boxes are those of Faster R-CNN."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import weights
from kdjax.boxes import roi
from kdjax.detectors import build, mask_head, rpn
from kdjax.detectors.api import flatten, pure
from kdjax.errors import UserError
from kdjax.structs import Assignment, DetectorOutput, Regions, Targets
from tests.support.arrays import on_shards, quick_jit

SIDE, CLASSES, OBJECTS = 64, 3, 3
TINY = dict(base_channels=4, neck_channels=8, head_channels=16, proposals=20, region_samples=12, rpn_samples=16)
TINY |= dict(mask_channels=6, mask_convs=1)


@functools.cache
def detector(classes=CLASSES):
    return build("mask_rcnn_r18", classes, **TINY)


@functools.cache
def variables():
    return detector().init(jax.random.key(0))


def targets(batch, stride=4):
    """Ellipses in boxes of 16 to 34 pixels; the last row of each image is padding, and the last image is empty."""
    rng = np.random.default_rng(1)
    start = rng.uniform(0, 30, (batch, OBJECTS, 2))
    boxes = np.concatenate([start, start + rng.uniform(16, 34, start.shape)], -1).astype(np.float32)
    valid = np.ones((batch, OBJECTS), bool)
    valid[-1], valid[:, -1] = False, False
    boxes *= valid[..., None]
    x1, y1, x2, y2 = (boxes[..., i, None, None] for i in range(4))
    x = np.arange(SIDE) + 0.5
    wide, tall = np.maximum(x2 - x1, 1e-3), np.maximum(y2 - y1, 1e-3)
    masks = ((2 * x - x1 - x2) / wide) ** 2 + ((2 * x[:, None] - y1 - y2) / tall) ** 2 < 1
    masks = (masks & valid[..., None, None]).astype(np.float32)
    masks = masks.reshape(batch, OBJECTS, SIDE // stride, stride, SIDE // stride, stride).mean((3, 5))
    sizes = np.full((batch, 2), SIDE, np.int32)
    return Targets(boxes, rng.integers(0, CLASSES, valid.shape).astype(np.int32) * valid, valid, sizes, sizes, masks)


def images(batch):
    return jnp.asarray(np.random.default_rng(4).normal(size=(batch, SIDE, SIDE, 3)), jnp.float32)


def test_head_is_convolutions_a_deconvolution_and_the_output_of_the_class():
    """In PyTorch's layout: cell i, j of a deconvolution gives cells 2 i + a, 2 j + b by the weights [:, :, a, b]."""
    state = weights.to_torch(detector(), *variables())
    w = {n.removeprefix("roi_head.mask_head."): v for n, v in state.items() if n.startswith("roi_head.mask_head.")}
    assert {name: value.shape for name, value in w.items()} == {
        "convs.0.conv.weight": (6, 8, 3, 3), "convs.0.conv.bias": (6,), "upsample.weight": (6, 6, 2, 2),
        "upsample.bias": (6,), "conv_logits.weight": (3, 6, 1, 1), "conv_logits.bias": (3,),
    }  # fmt: skip
    head = pure(lambda: mask_head.MaskHead(CLASSES, 8, 6, 1))
    features, labels = np.random.default_rng(0).normal(size=(1, 2, 14, 14, 8)).astype(np.float32), np.array([[2, 0]])
    run = quick_jit(lambda params: head.call(params, {}, mask_head.MaskHead.__call__, features, labels)[0])
    got = np.asarray(run(variables()[0]["roi_head"]["mask_head"]))
    for row, label in enumerate(labels[0]):
        x = np.pad(features[0, row], ((1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (0, 1))  # [14, 14, C, 3, 3]
        x = np.maximum(np.einsum("ijcab,ocab->ijo", windows, w["convs.0.conv.weight"]) + w["convs.0.conv.bias"], 0)
        fine = np.zeros((28, 28, 6))
        for a, b in np.ndindex(2, 2):
            fine[a::2, b::2] = np.einsum("ijc,co->ijo", x, w["upsample.weight"][:, :, a, b]) + w["upsample.bias"]
        logits = np.maximum(fine, 0) @ w["conv_logits.weight"][label, :, 0, 0] + w["conv_logits.bias"][label]
        np.testing.assert_allclose(got[0, row], logits, rtol=1e-4, atol=1e-5)


def test_detections_have_the_masks_of_their_boxes_and_classes():
    """The second stage is a function here: the class by the place of the region, and masks that tell box and class."""

    def at(boxes):
        logits = jnp.where(jnp.arange(boxes.shape[1])[:, None] % 3 == jnp.arange(4), 4.0, 0.0)
        return Regions(jnp.broadcast_to(logits, (*boxes.shape[:2], 4)), jnp.zeros((*boxes.shape[:2], 12)))

    def masks_at(boxes, labels):
        return jnp.broadcast_to((boxes[..., 0] / 64 + labels)[..., None, None], (*labels.shape, 28, 28))

    rng, sides = np.random.default_rng(0), (16, 8, 4, 2, 1)
    maps = lambda channels: tuple(rng.normal(size=(2, s, s, channels)).astype(np.float32) for s in sides)  # noqa: E731
    output = DetectorOutput(strides=rpn.STRIDES, anchors=3, quality=maps(3), box_reg=maps(12), at=at, masks_at=masks_at)
    found = quick_jit(lambda: detector().decode(output, np.full((2, 2), SIDE), max_detections=30))()
    assert found.masks.shape == (2, 30, 28, 28) and found.valid.any() and not found.valid.all()
    wanted = 1 / (1 + np.exp(-(found.boxes[..., 0] / 64 + found.labels)))
    wanted = np.where(found.valid, wanted, 0)[..., None, None]
    np.testing.assert_allclose(found.masks, np.broadcast_to(wanted, found.masks.shape), rtol=1e-5)


def learned(masked):
    """Twelve regions of each of two images around its objects, of which some are learned."""
    truth = targets(3, stride=1)
    truth = jax.tree.map(lambda field: field[:2], truth)
    rng = np.random.default_rng(2)
    regions = np.repeat(truth.boxes[:, :2], 6, 1) + rng.uniform(-3, 3, (2, 12, 4)).astype(np.float32)
    matched = np.repeat(np.arange(2), 6)[None].repeat(2, 0).astype(np.int32)
    labels = np.take_along_axis(truth.labels, matched, 1)
    empty = np.zeros_like(masked)
    assignment = Assignment(matched, masked, empty, labels, regions, masked * 1.0, masked=masked, regions=regions)
    return truth, assignment


def test_loss_is_the_mean_cross_entropy_of_the_learned_masks(monkeypatch):
    """In several pieces, of which some are empty; only a quarter of the regions can be positive."""
    monkeypatch.setattr(mask_head, "PIECE", 2)
    masked = np.zeros((2, 12), bool)
    masked[0, 0], masked[0, 2], masked[1, 2] = True, True, True
    truth, assignment = learned(masked)

    def total(slope):
        def find(boxes, labels):
            at = jnp.arange(28.0)[:, None] - jnp.arange(28.0)
            return slope * (at + labels[..., None, None] + boxes[..., :1, None])

        return jnp.sum(mask_head.mask_losses(find, truth, assignment, stride=1))

    value, gradient = quick_jit(jax.value_and_grad(total))(0.01)
    losses, slopes = [], []
    for image, row in np.argwhere(masked):
        x1, y1, x2, y2 = assignment.regions[image, row]
        want = slow_crop(truth.instance_masks[image, assignment.matched[image, row]], (x1, y1, x2, y2)) >= 0.5
        raw = np.arange(28.0)[:, None] - np.arange(28.0) + assignment.labels[image, row] + x1
        p = 1 / (1 + np.exp(-0.01 * raw))
        losses.append(np.mean(-np.log(np.where(want, p, 1 - p))))
        slopes.append(np.mean((p - want) * raw))
    assert float(value) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(gradient) == pytest.approx(np.mean(slopes), rel=1e-4)


def slow_crop(mask, box):
    """Means of bilinear samples in 28 x 28 cells of a box, as many along a side as a cell has pixels, rounded up."""
    height, width = mask.shape
    x1, y1, x2, y2 = np.clip(box, 0, [width, height, width, height]) - 0.5
    down, across = (y2 - y1) / 28, (x2 - x1) / 28
    many_y, many_x = int(np.ceil(down)), int(np.ceil(across))
    out = np.zeros((28, 28))
    for i, j in np.ndindex(28, 28):
        for a, b in np.ndindex(many_y, many_x):
            y = np.clip(y1 + (i + (a + 0.5) / many_y) * down, 0, height - 1)
            x = np.clip(x1 + (j + (b + 0.5) / many_x) * across, 0, width - 1)
            low_y, low_x = int(y), int(x)
            high_y, high_x = min(low_y + 1, height - 1), min(low_x + 1, width - 1)
            upper = mask[low_y, low_x] * (1 - x + low_x) + mask[low_y, high_x] * (x - low_x)
            lower = mask[high_y, low_x] * (1 - x + low_x) + mask[high_y, high_x] * (x - low_x)
            out[i, j] += upper * (1 - y + low_y) + lower * (y - low_y)
    return out / (many_y * many_x)


def test_coarse_masks_give_nearly_the_targets_of_fine_ones():
    boxes, objects = targets(2).boxes[:, :2], np.tile(np.arange(2), (2, 1))
    crop = functools.partial(quick_jit(roi.crop_masks, static_argnames=("stride", "size")), size=28)
    fine, coarse = (crop(targets(2, s).instance_masks, boxes, objects, stride=s) >= 0.5 for s in (1, 4))
    assert np.mean(fine[0]) > 0.5 and not np.any(fine[1])
    assert 0 < np.mean(fine[0] != coarse[0]) < 0.05


@functools.cache
def step():
    """A step's losses, its gradient, and the detections; traced once."""

    def run(params, stats, image, truth, key):
        def total(params):
            output, _ = detector().apply(params, stats, image, train=True)
            assignment = detector().assign(output, truth, key)
            losses = detector().loss(output, truth, assignment)
            return sum(losses.values()), (losses, assignment.masked)

        gradient, aux = jax.grad(total, has_aux=True)(params)
        evaluated, _ = detector().apply(params, stats, image, train=False)
        found = detector().decode(evaluated, truth.image_size, score_threshold=0.0, max_detections=6)
        again = jax.nn.sigmoid(evaluated.masks_at(found.boxes, found.labels))
        return aux, gradient, found, again

    return jax.jit(run)


@pytest.mark.slow
def test_a_step_with_and_without_objects():
    truth = targets(8)
    (losses, masked), gradient, found, again = step()(*variables(), images(8), truth, jax.random.key(0))
    assert sorted(losses) == ["loss_box", "loss_cls", "loss_mask", "loss_rpn_box", "loss_rpn_cls"]
    assert all(value > 0 and np.isfinite(value) for value in losses.values())
    assert masked[:-1].any(1).all() and not masked[-1].any()
    moved = flatten(gradient["roi_head"]) | flatten(gradient["rpn_head"])
    assert len(moved) == 20 and all(np.abs(leaf).max() for leaf in moved.values())
    assert found.masks.shape == (8, 6, 28, 28) and found.valid.any() and detector().masks == "box"
    np.testing.assert_allclose(found.masks, np.where(found.valid[..., None, None], again, 0), atol=1e-6)
    assert 0 < found.masks[found.valid].min() and found.masks.max() < 1

    empty = truth._replace(valid=np.zeros_like(truth.valid))
    (losses, masked), gradient, _, _ = step()(*variables(), images(8), empty, jax.random.key(0))
    assert losses["loss_mask"] == 0 and not masked.any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_eight_devices_are_one():
    truth = targets(8)
    arrays, tree = jax.tree.flatten((images(8), truth))

    def run(*flat):
        image, truth = jax.tree.unflatten(tree, flat)
        return step()(*variables(), image, truth, jax.random.key(0))

    (losses, masked), gradient, found, _ = on_shards(run, *arrays)
    (one, of_one), slope, of_one_device, _ = step()(*variables(), images(8), truth, jax.random.key(0))
    np.testing.assert_array_equal(masked, of_one)
    chex.assert_trees_all_close(losses, one, rtol=1e-5)
    chex.assert_trees_all_close(gradient, slope, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(found.masks, of_one_device.masks, atol=1e-4)


def test_a_batch_without_masks_or_with_odd_ones_is_refused():
    output = jax.eval_shape(functools.partial(detector().apply, train=True), *detector().shapes, images(2))[0]
    truth = targets(2)
    with pytest.raises(UserError, match=r"^instance_masks: Mask R-CNN learns masks, but the targets have none"):
        detector().loss(output, truth._replace(instance_masks=None), None)
    odd = truth._replace(instance_masks=truth.instance_masks[..., 1:])
    with pytest.raises(UserError, match="needs masks of a whole stride of its 64x64 input, not 16x15"):
        detector().loss(output, odd, None)
    with pytest.raises(UserError, match="mask_convs of Mask R-CNN must be >= 1, not 0"):
        build("mask_rcnn_r18", 2, mask_convs=0)


def test_weights_there_and_back_and_for_other_classes():
    state = weights.to_torch(detector(), *variables())
    chex.assert_trees_all_equal(weights.from_torch(detector(), state), variables())
    with pytest.warns(UserWarning, match="re-initialised for 5 classes"):
        params, _ = weights.from_torch(detector(5), state, key=jax.random.key(2))
    fresh, old = (flatten(tree) for tree in (detector(5).init(jax.random.key(2))[0], variables()[0]))
    for path, value in flatten(params).items():
        of = fresh if "bbox_head/fc_" in path or "conv_logits" in path else old
        np.testing.assert_array_equal(value, of[path], err_msg=path)
