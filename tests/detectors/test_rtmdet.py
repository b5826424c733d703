"""Detectors as the rest of the house sees them: building, initialisation, taps, training, devices, decoding."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdjax.detectors import build, names, rtmdet
from kdjax.detectors import options as detector_options
from kdjax.detectors.api import flatten, pure, unflatten
from kdjax.detectors.layers import SeparableConv
from kdjax.errors import UserError
from kdjax.structs import Assignment, DetectorOutput, Targets

SIDE, BATCH, CLASSES = 64, 8, 3
# A program that runs once spends its time in the compiler.
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def detector():
    return build("rtmdet_pico", CLASSES, widen=0.0625)


@functools.cache
def variables(seed=0):
    """Weights with statistics that are not those of a new network."""
    params, stats = detector().init(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    noise = {path: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32) for path, leaf in flatten(stats).items()}
    return params, unflatten(noise)


@functools.cache
def images():
    rng = np.random.default_rng(1)
    return detector().preprocess(rng.integers(0, 255, (BATCH, SIDE, SIDE, 3)).astype(np.uint8))


def targets(valid=True):
    rng = np.random.default_rng(2)
    corners = rng.uniform(0, 32, (BATCH, 4, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(8, 32, (BATCH, 4, 2))], -1).astype(np.float32)
    mask = np.full((BATCH, 4), valid)
    mask[0] = False
    sizes = np.full((BATCH, 2), SIDE, np.int32)
    labels = rng.integers(0, CLASSES, (BATCH, 4)).astype(np.int32)
    return Targets(np.where(mask[..., None], boxes, 0), np.where(mask, labels, 0), mask, sizes, sizes)


@functools.cache
def evaluated():
    """The output in evaluation mode, the new statistics, and the head entered everywhere."""

    def run(params, stats, x):
        output, new_stats = detector().apply(params, stats, x, train=False)
        entries = {}
        for branch, tower in (("cls", output.cls_tower), ("reg", output.reg_tower)):
            for start in range(3):
                maps = tower[start - 1] if start else output.neck
                entries[branch, start] = detector().head(params, stats, maps, branch=branch, start=start)
        return output, new_stats, entries

    return jax.device_get(jax.jit(run, compiler_options=QUICK)(*variables(), images()))


def gradient_step(params, stats, x, truth):
    def loss(params):
        output, new_stats = detector().apply(params, stats, x, train=True)
        assignment = detector().assign(output, truth)
        losses = detector().loss(output, truth, assignment)
        return sum(losses.values()), (losses, assignment, new_stats)

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.cache
def compiled_step():
    return jax.jit(gradient_step, compiler_options=QUICK)


def on_devices(count, state, batch):
    """The state on each of so many devices, the batch in shares over them."""
    mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
    everywhere, shares = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    return *jax.device_put(state, everywhere), jax.device_put(batch, shares)


def test_names_are_in_the_order_of_their_sizes():
    assert [name for name in names() if name.startswith("rtmdet")][:3] == ["rtmdet_pico", "rtmdet_nano", "rtmdet_micro"]


@pytest.mark.slow  # with 80 classes the test of docs/zoo.md builds them, too
def test_names_build():
    for name in names():
        assert build(name, 2).name == name


def test_options_build_the_same_again():
    one = build("rtmdet_micro", 4, stacked_convs=1, share_conv=False)
    again = build(one.name, one.num_classes, **one.options)
    assert one is again and one.shapes != build("rtmdet_micro", 4).shapes
    assert build("rtmdet_micro", 4, stacked_convs=2, widen=None) is build("rtmdet_micro", 4) != build("rtmdet_micro", 5)


def test_options_are_listed_with_their_defaults():
    assert detector_options("fcos_r18-center")["style"] == "caffe"
    assert detector_options("rtmdet_tiny")["exp_on_reg"] is None  # the variant's own
    with pytest.raises(UserError, match="unknown detector 'rtmdet'"):
        detector_options("rtmdet")


@pytest.mark.parametrize(
    ("name", "classes", "options", "message"),
    [
        ("rtmdet_huge", 3, {}, "unknown detector 'rtmdet_huge': the detectors are atss_r18"),
        ("yolo", 3, {}, "unknown detector 'yolo'"),
        ("rtmdet_pico", 0, {}, "num_classes of RTMDet must be >= 1, not 0"),
        ("rtmdet_pico", 3, {"wide": 1}, "rtmdet_pico has no option wide: its options are widen, deepen"),
        ("rtmdet_pico", 3, {"widen": 0.01}, "widen >= 1/32"),
        ("rtmdet_pico", 3, {"stacked_convs": 0}, "stacked_convs >= 1"),
        ("rtmdet_pico", 3, {"stacked_convs": True}, "rtmdet_pico: option stacked_convs must be int, not True"),
        ("rtmdet_pico", 3, {"widen": "0.5"}, r"rtmdet_pico: option widen must be float \| None, not '0.5'"),
    ],
)
def test_build_errors(name, classes, options, message):
    with pytest.raises(UserError, match=message):
        build(name, classes, **options)


def test_make_lists_its_sizes():
    with pytest.raises(UserError, match="'xxl' of RTMDet: the variants are pico, nano, micro, tiny, s, m, l, x"):
        rtmdet.make("xxl", 3)


def test_init_depends_on_the_key_alone():
    one, again, other = (detector().init(jax.random.key(seed)) for seed in (3, 3, 4))
    chex.assert_trees_all_equal(one, again)
    chex.assert_trees_all_equal(one, detector().init(jax.random.PRNGKey(3)))
    assert not np.array_equal(
        one[0]["backbone"]["stem"]["0"]["conv"]["kernel"], other[0]["backbone"]["stem"]["0"]["conv"]["kernel"]
    )
    # Arrays that two networks share by name and shape start alike, whatever else the networks hold.
    small = build("rtmdet_pico", CLASSES, widen=0.0625, stacked_convs=1).init(jax.random.key(3))[0]
    chex.assert_trees_all_equal(small["neck"], one[0]["neck"])
    kernel = "bbox_head/cls_convs/0/0/conv/kernel"
    np.testing.assert_array_equal(flatten(small)[kernel], flatten(one[0])[kernel])


def test_init_follows_the_peers():
    params, stats = (flatten(tree) for tree in build("rtmdet_pico", CLASSES).init(jax.random.key(0)))
    assert {leaf.dtype for leaf in (*params.values(), *stats.values())} == {jnp.dtype("float32")}
    assert all((leaf == (0 if path.endswith("mean") else 1)).all() for path, leaf in stats.items())
    for level in range(3):
        np.testing.assert_allclose(jax.nn.sigmoid(params[f"bbox_head/rtm_cls/{level}/bias"]), 0.01, rtol=1e-5)
        assert (params[f"bbox_head/rtm_reg/{level}/bias"] == 1).all()  # two cells wide
    exponential = build("rtmdet_pico", CLASSES, exp_on_reg=True).init(jax.random.key(0))[0]
    assert (exponential["bbox_head"]["rtm_reg"]["0"]["bias"] == 0).all()  # exp(0) cells
    kernel = np.asarray(params["backbone/stage3/0/conv/kernel"])
    bound = 1 / math.sqrt(np.prod(kernel.shape[:3]))
    assert 0.99 * bound < np.abs(kernel).max() <= bound and abs(kernel.std() - bound / math.sqrt(3)) < 0.02 * bound
    assert np.asarray(params["bbox_head/cls_convs/0/0/conv/kernel"]).std() == pytest.approx(0.01, rel=0.05)


def test_weight_decay_spares_norms_and_biases():
    params = detector().shapes[0]
    spared = flatten(detector().no_decay(params))
    assert jax.tree.structure(detector().no_decay(params)) == jax.tree.structure(params)
    assert all(spared[path] == (len(leaf.shape) == 1) for path, leaf in flatten(params).items())


def test_preprocess_is_bgr_and_normalised():
    got = detector().preprocess(np.array([[[[123, 116, 103]]], [[[255, 0, 0]]]], np.uint8))
    np.testing.assert_allclose(
        got[0, 0, 0], [(103 - 103.53) / 57.375, (116 - 116.28) / 57.12, (123 - 123.675) / 58.395], rtol=1e-4
    )
    np.testing.assert_allclose(got[1, 0, 0, 2], (255 - 123.675) / 58.395, rtol=1e-6)


def test_taps_have_their_shapes():
    output, stats, _ = evaluated()
    sides = (8, 4, 2)
    assert output.strides == output.backbone_strides == (8, 16, 32)
    for maps, channels in (
        (output.neck, 16),
        (output.neck_conv, 16),
        (output.cls_logits, CLASSES),
        (output.box_reg, 4),
    ):
        assert [m.shape for m in maps] == [(BATCH, side, side, channels) for side in sides]
    assert [m.shape for m in output.backbone] == [(BATCH, s, s, c) for s, c in zip(sides, (16, 32, 64), strict=True)]
    for tower in (output.cls_tower, output.reg_tower):
        assert [[m.shape[1:] for m in maps] for maps in tower] == [[(s, s, 16) for s in sides]] * 2
    assert output.quality == ()
    chex.assert_trees_all_equal(stats, variables()[1])  # evaluation changes nothing


def test_neck_conv_is_before_norm_and_activation():
    output, _, _ = evaluated()
    params, stats = (tree["neck"]["out_convs"] for tree in variables())
    for level in range(3):
        scale, mean = params[str(level)]["bn"], stats[str(level)]["bn"]
        normed = (output.neck_conv[level] - mean["mean"]) / np.sqrt(mean["var"] + 1e-5) * scale["scale"] + scale["bias"]
        np.testing.assert_allclose(jax.nn.silu(normed), output.neck[level], rtol=1e-3, atol=1e-5)


def test_head_can_be_entered_anywhere():
    output, _, entries = evaluated()
    for (branch, _), got in entries.items():
        want = output.cls_logits if branch == "cls" else output.box_reg
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("branch", "start"), [("box", 0), ("cls", 3), ("reg", -1)])
def test_head_errors(branch, start):
    with pytest.raises(ValueError, match=r"of the head of RTMDet: branch must be one of cls, reg, start in 0 .. 2"):
        detector().head(*variables(), evaluated()[0].neck, branch=branch, start=start)


@pytest.mark.parametrize("shape", [(1, 48, 64, 3), (1, 64, 64, 1), (64, 64, 3)])
def test_apply_errors(shape):
    with pytest.raises(ValueError, match=r"images of RTMDet must be .* multiples of 32, not"):
        detector().apply(*variables(), jnp.zeros(shape), train=False)


def test_step_with_objects():
    (total, (losses, assignment, _)), gradients = compiled_step()(*variables(), images(), targets())
    assert np.isfinite(total) and all(v > 0 for v in losses.values())
    positive = np.asarray(assignment.positive).sum(1)
    assert positive[0] == 0 and (positive[1:] > 0).all()  # the first image is empty
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    # A level without a positive prior teaches its regression nothing.
    regression = ("bbox_head/reg_convs/2", "bbox_head/rtm_reg/2")
    still = [p for p, leaf in flatten(gradients).items() if not np.abs(leaf).max() and not p.startswith(regression)]
    assert not still, f"no gradient reaches {still}"


def test_norms_see_the_batch_of_all_devices():
    """All the convolution forms and two norms; tests/training/test_run.py compares whole runs."""
    block = pure(lambda: SeparableConv(4, 4, 5))
    state = block.init(jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(8, 6, 5, 4)).astype(np.float32)
    x *= np.arange(1, 9)[:, None, None, None]  # what one device sees is not what all see

    @jax.jit
    def step(params, stats, x):
        def loss(params, x):
            y, new_stats = block.call(params, stats, SeparableConv.__call__, x, True)
            return jnp.mean(y**2), new_stats

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    one, eight = (jax.device_get(step(*on_devices(count, state, x))) for count in (1, 8))
    chex.assert_trees_all_close(one, eight, rtol=1e-5, atol=1e-6)


def test_training_moves_running_statistics_as_pytorch_does():
    (_, (_, _, stats)), _ = compiled_step()(*variables(), images(), targets())
    params, old = variables()
    x = jax.lax.conv_general_dilated(
        images(), params["backbone"]["stem"]["0"]["conv"]["kernel"], (2, 2), [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    before, after = (tree["backbone"]["stem"]["0"]["bn"] for tree in (old, stats))
    np.testing.assert_allclose(after["mean"], 0.9 * before["mean"] + 0.1 * np.mean(x, (0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after["var"], 0.9 * before["var"] + 0.1 * np.var(x, (0, 1, 2), ddof=1), rtol=1e-4)


def test_batch_without_any_object():
    (total, (losses, assignment, _)), gradients = compiled_step()(*variables(), images(), targets(valid=False))
    assert not assignment.positive.any() and losses["loss_box"] == 0 and losses["loss_cls"] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((total, gradients)))


def test_padding_rows_change_no_loss():
    output, _, _ = evaluated()
    truth = targets()
    more = Targets(*(np.concatenate([a, np.zeros_like(a[:, :2])], 1) for a in truth[:3]), *truth[3:])

    @functools.partial(jax.jit, compiler_options=QUICK)
    def loss(output, targets):
        assignment = detector().assign(output, targets)
        return detector().loss(output, targets, assignment), assignment

    (losses, one), (again, two) = (loss(output, t) for t in (truth, more))
    chex.assert_trees_all_close(losses, again, rtol=1e-6)
    np.testing.assert_array_equal(one.matched, two.matched)


def small_output():
    """One image of 32 x 32: 16 + 4 + 1 priors, two classes, boxes of 8 px around each prior."""
    maps = [(4, 8.0), (2, 16.0), (1, 32.0)]
    return DetectorOutput(
        strides=(8, 16, 32),
        cls_logits=tuple(jnp.full((1, side, side, 2), -20.0) for side, _ in maps),
        box_reg=tuple(jnp.full((1, side, side, 4), 4.0) for side, _ in maps),
    )


def test_loss_is_the_formula():
    output = small_output()
    n = 21
    logits = jnp.zeros((1, 4, 4, 2))
    output = DetectorOutput(strides=output.strides, cls_logits=(logits, *output.cls_logits[1:]), box_reg=output.box_reg)
    positive = np.zeros((1, n), bool)
    positive[0, 5] = True  # the prior (8, 8), whose box is 4 4 12 12
    ignore = np.zeros((1, n), bool)
    ignore[0, :5] = True
    assignment = Assignment(
        matched=np.where(positive, 0, -1),
        positive=positive,
        ignore=ignore,
        labels=np.where(positive, 1, 2),
        boxes=np.where(positive[..., None], np.array([4.0, 4, 12, 20]), 0),
        quality=np.where(positive, 0.5, 0.0),
    )
    losses = jax.jit(detector().loss, compiler_options=QUICK)(output, targets(), assignment)
    # Normalizer max(0.5, 1) = 1. Every class at 1/2: ten other priors and one wrong class add ln 2 / 4 each (beta = 2);
    # the true class is where its soft label wants it.
    assert losses["loss_cls"] == pytest.approx(21 * math.log(2) / 4, rel=1e-4)
    assert losses["loss_box"] == pytest.approx(2 * 0.5 * (1 - 0.5), rel=1e-4)  # IoU = GIoU = 1/2


def test_decode():
    output = small_output()
    fine = output.cls_logits[0].at[0, 1, 1, 0].set(3.0).at[0, 1, 1, 1].set(2.0).at[0, 3, 3, 1].set(1.0)
    output = DetectorOutput(strides=output.strides, cls_logits=(fine, *output.cls_logits[1:]), box_reg=output.box_reg)
    decode = jax.jit(functools.partial(detector().decode, max_detections=5), compiler_options=QUICK)
    found = decode(output, np.array([[32, 26]]))
    np.testing.assert_array_equal(found.valid[0], [True, True, True, False, False])
    np.testing.assert_array_equal(found.labels[0, :3], [0, 1, 1])
    np.testing.assert_allclose(found.scores[0, :3], jax.nn.sigmoid(np.array([3.0, 2.0, 1.0])), rtol=1e-5)
    np.testing.assert_array_equal(found.boxes[0, :3], [[4, 4, 12, 12], [4, 4, 12, 12], [20, 20, 26, 28]])
    fewer = decode(output, np.array([[32, 26]]), score_threshold=0.8)
    np.testing.assert_array_equal(fewer.valid[0], [True, True, False, False, False])


def test_flat_views_follow_the_priors():
    output, _, _ = evaluated()
    priors = detector().priors((SIDE, SIDE))
    logits, boxes = detector().class_logits(output), detector().decode_boxes(output)
    assert priors.shape == (84, 4) and logits.shape == (BATCH, 84, CLASSES) and boxes.shape == (BATCH, 84, 4)
    # Prior 64 + 4 + 2 is cell (1, 2) of the map with stride 16.
    np.testing.assert_array_equal(priors[70], [32, 16, 16, 16])
    np.testing.assert_array_equal(logits[:, 70], output.cls_logits[1][:, 1, 2])
    left, top, right, bottom = output.box_reg[1][0, 1, 2]
    np.testing.assert_allclose(boxes[0, 70], [32 - left, 16 - top, 32 + right, 16 + bottom], rtol=1e-5)


@pytest.mark.slow
def test_bfloat16_maps_with_everything_else_in_float32():
    """What `config.dtype` does: the maps alone change their precision, and the losses stay near."""
    params, stats = variables()

    def losses(params, x, assignment=None):
        output, new_stats = detector().apply(params, stats, x, train=True)
        if assignment is None:
            assignment = detector().assign(output, targets())
        values = detector().loss(output, targets(), assignment)
        return sum(values.values()), (output, new_stats, assignment)

    found, assignment = {}, None
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.asarray(images(), dtype)
        _, (output, new_stats, _) = jax.eval_shape(losses, params, x)
        assert {m.dtype for m in (*output.backbone, *output.neck, *output.neck_conv, *output.cls_tower[0])} == {
            jnp.dtype(dtype)
        }
        exact = (*output.cls_logits, *output.box_reg, *jax.tree.leaves(new_stats))
        assert {leaf.dtype for leaf in exact} == {jnp.dtype(jnp.float32)}
        step = jax.jit(jax.value_and_grad(losses, has_aux=True), compiler_options=QUICK)
        (value, (_, _, assignment)), gradient = step(params, x, assignment)  # both with that of float32
        found[dtype] = value, gradient
    (value, gradient), (near, near_gradient) = found.values()
    assert float(near) == pytest.approx(float(value), rel=0.02) and near != value
    assert {leaf.dtype for leaf in jax.tree.leaves(near_gradient)} == {jnp.dtype(jnp.float32)}
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (gradient, near_gradient))
    cosine = np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
    assert cosine > 0.9  # the deepest norms see 32 cells here, which amplifies the rounding


def test_a_background_prior_far_off_leaves_the_box_loss_alone():
    near, far = [0.0, 0, 10, 10], [-1e30, -1e30, 1e30, 1e30]
    positive = np.array([[True, False]])
    assignment = Assignment(
        matched=np.array([[0, -1]]),
        positive=positive,
        ignore=~positive & False,
        labels=np.array([[0, CLASSES]]),
        boxes=np.array([[[0.0, 0, 10, 20], [0, 0, 0, 0]]], np.float32),
        quality=positive.astype(np.float32),
    )
    logits = np.zeros((1, 2, CLASSES), np.float32)

    def box_loss(boxes):
        return jnp.sum(rtmdet.prior_losses(logits, boxes, assignment)[1])

    value, slope = jax.value_and_grad(box_loss)(jnp.array([[near, far]]))
    np.testing.assert_allclose(value, 2 * 0.5, rtol=1e-6)
    assert np.isfinite(slope).all() and np.any(slope[0, 0]) and not np.any(slope[0, 1])
