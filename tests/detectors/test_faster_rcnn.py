"""Faster R-CNN: draws, proposals, losses and detections against the definitions; weights of all sizes; devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import weights
from kdjax.boxes import coding
from kdjax.detectors import box_head, build, resnet, rpn, two_stage
from kdjax.detectors.api import flatten, pure
from kdjax.errors import UserError
from kdjax.evals import complexity
from kdjax.structs import DetectorOutput, Regions, Targets
from kdjax.weights import fill
from tests.support.arrays import on_shards, quick_jit

SIDE, CLASSES = 64, 3
LEVELS = (16, 8, 4, 2, 1)
SIZES = [side * side * rpn.ANCHORS for side in LEVELS]
TINY = dict(base_channels=4, neck_channels=8, head_channels=16, proposals=20, region_samples=12, rpn_samples=16)


@functools.cache
def detector(classes=CLASSES, name="faster_rcnn_r18"):
    return build(name, classes, **TINY)


@functools.cache
def variables():
    """The norms at the end of residual blocks start at 0, which would keep gradients from what is before them."""
    params, stats = detector().init(jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf + 0.05, params), stats


def first_stage(seed=0, batch=2):
    """Random objectness and small deltas."""
    rng = np.random.default_rng(seed)

    def maps(channels, scale):
        return tuple(jnp.asarray(scale * rng.normal(size=(batch, s, s, channels)), jnp.float32) for s in LEVELS)

    return DetectorOutput(
        strides=rpn.STRIDES, anchors=rpn.ANCHORS, quality=maps(rpn.ANCHORS, 2.0), box_reg=maps(4 * rpn.ANCHORS, 0.2)
    )


def targets(batch=2, objects=3, empty=False):
    """Boxes of 10 to 34 pixels; the last row of each image is padding, and the last image is empty if asked for."""
    rng = np.random.default_rng(1)
    start = rng.uniform(0, 30, (batch, objects, 2))
    boxes = np.concatenate([start, start + rng.uniform(10, 34, start.shape)], -1).astype(np.float32)
    valid = np.ones((batch, objects), bool)
    valid[:, -1] = False
    valid[-1] &= not empty
    sizes = np.full((batch, 2), SIDE, np.int32)
    labels = rng.integers(0, CLASSES, valid.shape).astype(np.int32)
    return Targets(boxes * valid[..., None], labels * valid, valid, sizes, sizes)


def overlap(one, other):
    """IoU of two boxes."""
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = np.prod(np.maximum(high - low, 0))
    return shared / max(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - shared, 1e-6)


@pytest.mark.parametrize(("number", "most"), [(6, 3), (40, 20), (5, 5)])
def test_rows_are_drawn_once_and_positive_ones_first(number, most):
    rng = np.random.default_rng(0)
    positive = rng.random((50, 30)) < np.linspace(0, 1, 50)[:, None]
    negative = ~positive & (rng.random(positive.shape) < 0.5)
    draw = quick_jit(functools.partial(rpn.sample, positive, negative, number=number, most_positive=most))
    index, valid = map(np.asarray, draw(key=jax.random.key(0)))
    assert index.shape == valid.shape == (50, number)
    for row, there, yes, no in zip(index, valid, positive, negative, strict=True):
        chosen = row[there]
        count = min(most, yes.sum())
        assert len(set(chosen)) == len(chosen) == min(number, count + no.sum())
        assert yes[chosen[:count]].all() and no[chosen[count:]].all()
        assert not there[len(chosen) :].any()
    assert (np.asarray(draw(key=jax.random.key(1))[0]) != index).any()


def test_every_row_is_drawn_equally_often():
    positive = np.zeros((4000, 8), bool)
    positive[:, :4] = True
    index, _ = quick_jit(lambda: rpn.sample(positive, ~positive, number=4, most_positive=2, key=jax.random.key(0)))()
    counts = np.bincount(np.asarray(index).ravel(), minlength=8)
    np.testing.assert_allclose(counts, 2000, atol=5 * np.sqrt(2000 * 0.5))  # five standard deviations


def test_proposals_are_the_best_of_each_level_after_nms():
    output, size = first_stage(), np.array([[SIDE, SIDE], [SIDE, 40]], np.int32)
    found = quick_jit(lambda o: rpn.propose(o, size, pre_nms=30, number=25))(output)
    scores = 1 / (1 + np.exp(-np.concatenate([np.asarray(m).reshape(2, -1) for m in output.quality], 1)))
    deltas = np.concatenate([np.asarray(m).reshape(2, -1, 4) for m in output.box_reg], 1)
    boxes = np.array(coding.deltas_to_boxes(rpn.anchors(output), deltas))
    for image in range(2):
        height, width = size[image]
        of = np.clip(boxes[image], 0, [width, height, width, height])
        kept, start = [], 0
        for count in SIZES:
            best = start + np.argsort(-scores[image, start : start + count], kind="stable")[:30]
            chosen = []
            for row in best:
                has_area = (of[row, 2:] > of[row, :2]).all()
                if has_area and all(overlap(of[row], of[other]) <= 0.7 for other in chosen):
                    chosen.append(row)
            kept += chosen
            start += count
        kept = sorted(kept, key=lambda row: -scores[image, row])[:25]
        valid = np.asarray(found.valid[image])
        assert valid.sum() == len(kept) and not found.boxes[image][~valid].any()
        np.testing.assert_allclose(found.scores[image][valid], scores[image, kept], rtol=1e-5)
        np.testing.assert_allclose(found.boxes[image][valid], of[kept], atol=1e-3)


def test_regions_are_objects_and_proposals_with_their_labels():
    rng = np.random.default_rng(2)
    truth = targets(empty=True)
    near = np.repeat(truth.boxes[:, :2], 20, 1) + rng.normal(0, 4, (2, 40, 4)).astype(np.float32)
    proposals = rpn.Proposals(near, np.ones((2, 40), np.float32), rng.random((2, 40)) < 0.8)
    draw = quick_jit(lambda key: box_head.assign_regions(proposals, truth, num_classes=CLASSES, samples=16, key=key))
    found = jax.device_get(draw(jax.random.key(0)))
    assert found.positive.sum(1).tolist() == [4, 0]  # a quarter; none of an image without objects
    allowed = [[*truth.boxes[0, :2], *near[0][proposals.valid[0]]], list(near[1][proposals.valid[1]])]
    for image in range(2):
        for row in np.flatnonzero(~found.ignore[image]):
            region = found.regions[image, row]
            assert any(np.array_equal(region, box) for box in allowed[image])
            ious = [
                overlap(region, box) if ok else 0
                for box, ok in zip(truth.boxes[image], truth.valid[image], strict=True)
            ]
            if found.positive[image, row]:
                assert max(ious) >= 0.5 and found.matched[image, row] == np.argmax(ious)
                assert found.labels[image, row] == truth.labels[image, np.argmax(ious)]
            else:
                assert max(ious) < 0.5 and found.labels[image, row] == CLASSES
    assert (draw(jax.random.key(1)).regions != found.regions).any()


def test_losses_of_regions_are_the_formulas():
    rng = np.random.default_rng(3)
    truth = targets()
    proposals = rpn.Proposals(
        np.repeat(truth.boxes[:, :2], 6, 1) + 2, np.ones((2, 12), np.float32), np.ones((2, 12), bool)
    )
    drawn = quick_jit(
        lambda: box_head.assign_regions(proposals, truth, num_classes=CLASSES, samples=16, key=jax.random.key(0))
    )()
    drawn = jax.device_get(drawn)
    logits, deltas = rng.normal(size=(2, 16, CLASSES + 1)), rng.normal(size=(2, 16, 4 * CLASSES))
    found = Regions(jnp.asarray(logits, jnp.float32), jnp.asarray(deltas, jnp.float32))
    losses = box_head.region_losses(found, drawn)
    entropy, apart = 0.0, 0.0
    for image, row in np.argwhere(~drawn.ignore):
        label = drawn.labels[image, row]
        entropy += np.log(np.exp(logits[image, row]).sum()) - logits[image, row, label]
        if label < CLASSES:
            region, box = drawn.regions[image, row], drawn.boxes[image, row]
            side, of = region[2:] - region[:2], box[2:] - box[:2]
            shift = (box[:2] + box[2:] - region[:2] - region[2:]) / 2 / side
            wanted = np.concatenate([shift / 0.1, np.log(of / side) / 0.2])
            apart += np.abs(deltas[image, row, 4 * label : 4 * label + 4] - wanted).sum()
    count = (~drawn.ignore).sum()
    assert drawn.positive.any() and drawn.ignore.any()
    assert float(losses["loss_cls"].sum()) == pytest.approx(entropy / count, rel=1e-5)
    assert float(losses["loss_box"].sum()) == pytest.approx(apart / count, rel=1e-5)


@functools.cache
def step():
    """A step's losses, its gradient, and the detections; traced once."""

    def run(params, stats, image, truth, key):
        def total(params):
            output, _ = detector().apply(params, stats, image, train=True)
            assignment = detector().assign(output, truth, key)
            losses = detector().loss(output, truth, assignment)
            return sum(losses.values()), (losses, assignment.positive, assignment.first.positive)

        gradient, aux = jax.grad(total, has_aux=True)(params)
        evaluated, _ = detector().apply(params, stats, image, train=False)
        found = detector().decode(evaluated, truth.image_size, score_threshold=0.0, max_detections=10)
        return aux, gradient, found

    return jax.jit(run)


def images(batch=8):
    return jnp.asarray(np.random.default_rng(4).normal(size=(batch, SIDE, SIDE, 3)), jnp.float32)


def test_a_step_with_and_without_objects():
    truth = targets(8, empty=True)
    (losses, positive, first), gradient, found = step()(*variables(), images(), truth, jax.random.key(0))
    assert sorted(losses) == ["loss_box", "loss_cls", "loss_rpn_box", "loss_rpn_cls"]
    assert all(value > 0 and np.isfinite(value) for value in losses.values())
    assert positive[:-1].any(1).all() and first[:-1].any(1).all() and not positive[-1].any()
    still = [path for path, leaf in flatten(gradient).items() if not np.abs(leaf).max()]
    trained = [path for path in still if not resnet.is_frozen(path, 1)]
    # Objects of 10 to 34 pixels have no region on P5, and none of its few anchors is drawn.
    assert not [path for path in trained if not path.startswith("neck/fpn_convs/3/")], trained
    np.testing.assert_array_less(found.boxes[..., :2], found.boxes[..., 2:] + 1e-6)

    empty = truth._replace(valid=np.zeros_like(truth.valid))
    (losses, positive, _), gradient, _ = step()(*variables(), images(), empty, jax.random.key(0))
    assert losses["loss_box"] == losses["loss_rpn_box"] == 0 < losses["loss_cls"]
    assert not positive.any() and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_eight_devices_are_one():
    truth = targets(8, empty=True)
    arrays, tree = jax.tree.flatten((images(), truth))

    def run(*flat):
        image, truth = jax.tree.unflatten(tree, flat)
        return step()(*variables(), image, truth, jax.random.key(0))

    (losses, positive, _), gradient, found = on_shards(run, *arrays)
    (one, of_one, _), slope, of_one_device = step()(*variables(), images(), truth, jax.random.key(0))
    np.testing.assert_array_equal(positive, of_one)
    chex.assert_trees_all_close(losses, one, rtol=1e-5)
    chex.assert_trees_all_close(gradient, slope, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(found.boxes, of_one_device.boxes, atol=1e-2)


def test_detections_are_moved_by_the_deltas_of_their_class():
    boxes = np.array([[[8.0, 8, 24, 24], [30, 30, 60, 50], [8, 8, 24, 24]]], np.float32)
    proposals = rpn.Proposals(boxes, np.ones((1, 3), np.float32), np.array([[True, True, False]]))
    logits = np.full((1, 3, CLASSES + 1), -9.0, np.float32)
    logits[0, 0, 1] = logits[0, 1, 2] = logits[0, 2, 0] = 9.0
    deltas = np.zeros((1, 3, CLASSES, 4), np.float32)
    deltas[0, 0, 1, 0] = 5.0  # half of its width to the right
    deltas[0, 0, 0], deltas[0, 1, 0] = 7.0, -7.0  # of other classes
    found = two_stage.detections_of(
        proposals, Regions(logits, deltas.reshape(1, 3, -1)), np.array([[SIDE, SIDE]]), num_classes=CLASSES,
        score_threshold=0.5, iou_threshold=0.5, max_detections=4,
    )  # fmt: skip
    assert found.valid[0].tolist() == [True, True, False, False]
    got = {int(label): box.tolist() for label, box in zip(found.labels[0, :2], found.boxes[0, :2], strict=True)}
    assert got == {1: [16.0, 8.0, 32.0, 24.0], 2: [30.0, 30.0, 60.0, 50.0]}


@pytest.mark.parametrize("classes", [1, 3])
def test_weights_there_and_back_and_for_other_classes(classes):
    source = detector(classes)
    values = source.init(jax.random.key(1))
    state = weights.to_torch(source, *values)
    assert state["roi_head.bbox_head.fc_cls.weight"].shape == (classes + 1, 16)
    assert state["roi_head.bbox_head.shared_fcs.0.weight"].shape == (16, 8 * 49)
    chex.assert_trees_all_equal(weights.from_torch(source, state), values)
    assert fill.count_classes(source, state) == classes
    other = detector(5)
    with pytest.warns(UserWarning, match="re-initialised for 5 classes.*all classes start equally likely"):
        params, _ = weights.from_torch(other, state, key=jax.random.key(2))
    fresh, old = (flatten(tree) for tree in (other.init(jax.random.key(2))[0], values[0]))
    for path, value in flatten(params).items():
        of = fresh if "bbox_head/fc_" in path else old
        np.testing.assert_array_equal(value, of[path], err_msg=path)


@pytest.mark.parametrize(
    ("variant", "millions"),  # torchvision's ResNets and timm's ResNeXts without their last layer
    [
        ("r18", 11.176512),
        ("r34", 21.284672),
        ("r50", 23.508032),
        ("r101", 42.500160),
        ("x50-32x4d", 22.979904),
        ("x101-32x4d", 42.128704),
        ("x101-64x4d", 81.406272),
    ],
)
def test_backbones_have_the_published_sizes(variant, millions):
    params, _ = build(f"faster_rcnn_{variant}", 80).shapes
    assert complexity.parameters(params["backbone"]) == pytest.approx(millions * 1e6, abs=0.5)


def test_parameters_and_operations_are_those_that_mmdetection_states():
    """For images of 800 x 1280: 41.53 M that are not frozen, and 207.07 G, with the second stage on 1,000 proposals."""
    whole = build("faster_rcnn_r50", 80)
    trained = [leaf for path, leaf in flatten(whole.shapes[0]).items() if not resnet.is_frozen(path, 1)]
    assert complexity.parameters(trained) == pytest.approx(41.53e6, abs=5e3)
    assert complexity.flops(whole, (800, 1280)) == pytest.approx(207.07e9, rel=0.01)


def test_out_of_range_is_refused():
    for options, message in (
        ({"proposals": 0}, "proposals of Faster R-CNN must be >= 1, not 0"),
        ({"region_samples": 3}, "region_samples of Faster R-CNN must be >= 4, not 3"),
        ({"rpn_samples": 1}, "rpn_samples of Faster R-CNN must be >= 2, not 1"),
        ({"style": "torch"}, "style of Faster R-CNN must be one of pytorch, caffe, not 'torch'"),
        ({"frozen_stages": 5}, "frozen_stages of Faster R-CNN must be one of"),
    ):
        with pytest.raises(UserError, match=message):
            build("faster_rcnn_r18", 2, **options)
    with pytest.raises(UserError, match="num_classes of Faster R-CNN must be >= 1, not 0"):
        build("faster_rcnn_r18", 0)
    with pytest.raises(UserError, match=r"^assign: a two-stage detector draws anchors and regions: pass a PRNG key"):
        detector().assign(first_stage(), targets())


def test_a_resnext_of_one_group_is_no_resnet():
    """The width of the groups counts: 32 groups of 4 channels are 128, 64 of them 256."""

    def shapes(**groups):
        keywords = dict(base_channels=64, style="pytorch", frozen_stages=1, norm_eval=True, frozen_norm=False)
        params, _ = pure(lambda: resnet.ResNet(50, **keywords, **groups)).shapes
        return {name: params["layer1"]["0"][name]["kernel"].shape for name in ("conv1", "conv2", "conv3")}

    assert shapes()["conv2"] == (3, 3, 64, 64)
    assert shapes(groups=32, group_width=4) == {
        "conv1": (1, 1, 64, 128), "conv2": (3, 3, 4, 128), "conv3": (1, 1, 128, 256)
    }  # fmt: skip
    assert shapes(groups=64, group_width=4)["conv2"] == (3, 3, 4, 256)
