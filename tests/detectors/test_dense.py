"""RetinaNet, FCOS, GFL and ATSS: shapes, options, initialisation, losses without objects, decoding, weights.

What they compute is compared with the peers by the golden replay (`tests/golden_checks/dense.py`).
"""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import weights
from kdjax.detectors import build, resnet
from kdjax.detectors.api import flatten
from kdjax.errors import UserError
from kdjax.structs import DetectorOutput, Targets

NAMES = ("retinanet_r18", "fcos_r18", "fcos_r18-center", "gfl_r18", "atss_r18")
ANCHORS = {"retinanet_r18": 9}
STRIDES = (8, 16, 32, 64, 128)
SIDE, BATCH, CLASSES = 64, 3, 3
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def tiny(name, **options):
    """A shrunken detector; RetinaNet has no groups."""
    small = {"base_channels": 2, "neck_channels": 4, "head_channels": 4, "stacked_convs": 2}
    if not name.startswith("retinanet"):
        small["groups"] = 2
    return build(name, CLASSES, **small | options)


def specs(detector, hw=(64, 96), *, train=False, dtype=jnp.float32):
    x = jax.ShapeDtypeStruct((2, *hw, 3), dtype)
    return jax.eval_shape(functools.partial(detector.apply, train=train), *detector.shapes, x)


@pytest.mark.parametrize("name", [*NAMES, "retinanet_r50", "fcos_r101"])
def test_taps_have_their_shapes(name):
    detector = tiny(name)
    output, stats = specs(detector)
    anchors, wide = ANCHORS.get(name.replace("50", "18"), 1), 1 if "r18" in name else 4
    sides = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    assert detector.strides == output.strides == STRIDES and output.backbone_strides == (4, 8, 16, 32)
    assert output.anchors == anchors
    assert [m.shape[1:] for m in output.backbone] == [
        (64 // s, 96 // s, wide * c) for s, c in zip((4, 8, 16, 32), (2, 4, 8, 16), strict=True)
    ]
    for tower in (output.cls_tower, output.reg_tower):
        assert [[m.shape[1:] for m in maps] for maps in tower] == [[(*side, 4) for side in sides]] * 2
    numbers = 68 if name.startswith("gfl") else 4 * anchors
    quality = 1 if name.startswith(("fcos", "atss")) else 0
    for maps, channels in ((output.neck, 4), (output.neck_conv, 4), (output.cls_logits, CLASSES * anchors)):
        assert [m.shape[1:] for m in maps] == [(*side, channels) for side in sides]
    assert [m.shape[1:] for m in output.box_reg] == [(*side, numbers) for side in sides]
    assert [m.shape[1:] for m in output.quality] == [(*side, 1) for side in sides] * quality
    assert jax.tree.map(lambda leaf: leaf.shape, stats) == jax.tree.map(lambda leaf: leaf.shape, detector.shapes[1])
    priors = detector.priors((64, 96))
    assert priors.shape == (129 * anchors, 4)
    logits, boxes = (jax.eval_shape(f, output) for f in (detector.class_logits, detector.decode_boxes))
    assert logits.shape == (2, len(priors), CLASSES) and boxes.shape == (2, len(priors), 4)


@pytest.mark.parametrize("name", NAMES)
def test_maps_may_be_bfloat16_and_predictions_are_float32(name):
    output, stats = specs(tiny(name, frozen_stages=-1, norm_eval=False), train=True, dtype=jnp.bfloat16)
    assert {m.dtype for m in (*output.backbone, *output.neck, *output.reg_tower[1])} == {jnp.dtype(jnp.bfloat16)}
    exact = (*output.cls_logits, *output.box_reg, *output.quality, *jax.tree.leaves(stats))
    assert {leaf.dtype for leaf in exact} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", NAMES)
def test_head_is_entered_by_its_branches(name):
    detector = tiny(name)
    output, _ = specs(detector)
    fields = {"cls": output.cls_logits, "reg": output.box_reg} | ({"quality": output.quality} if output.quality else {})
    for branch, want in fields.items():
        for start in range(3):
            got = jax.eval_shape(
                functools.partial(detector.head, branch=branch, start=start), *detector.shapes, output.neck
            )
            assert [m.shape for m in got] == [m.shape for m in want]
    for wrong in ({"branch": "box", "start": 0}, {"branch": "cls", "start": 3}):
        with pytest.raises(ValueError, match=f"branch must be one of {', '.join(fields)}, start in 0 .. 2"):
            detector.head(*detector.shapes, output.neck, **wrong)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("retinanet_r18", {"groups": 2}, "retinanet_r18 has no option groups: its options are base_channels"),
        ("gfl_r18", {"head_channels": 6, "groups": 4}, "groups of GFL must divide head_channels: 4 does not divide 6"),
        ("gfl_r18", {"reg_max": 0}, "reg_max of GFL must be >= 1, not 0"),
        (
            "atss_r18",
            {"extra_convs": "on_lateral"},
            "extra_convs of ATSS must be one of on_input, on_output, not 'o",
        ),
        ("atss_r18", {"frozen_stages": 5}, "frozen_stages of ATSS must be one of -1, 0, 1, 2, 3, 4, not 5"),
        ("fcos_r18", {"style": "keras"}, "style of FCOS must be one of pytorch, caffe, not 'keras'"),
        ("fcos_r18", {"box_loss": "l1"}, "box_loss of FCOS must be iou or giou, not 'l1'"),
        ("fcos_r18", {"stacked_convs": 0}, "stacked_convs of FCOS must be >= 1, not 0"),
    ],
)
def test_build_errors(name, options, message):
    with pytest.raises(UserError, match=message):
        build(name, CLASSES, **options)
    with pytest.raises(ValueError, match="must be >= 1, not 0"):
        build(name, 0)


def test_apply_wants_sides_that_divide():
    with pytest.raises(ValueError, match=r"images of GFL must be .* multiples of 32, not"):
        specs(tiny("gfl_r18"), (48, 64))


@pytest.mark.parametrize(
    ("name", "millions"), [("retinanet_r50", 37.74), ("fcos_r50", 32.02), ("gfl_r50", 32.22), ("atss_r50", 32.07)]
)
def test_published_sizes(name, millions):
    """The peers leave out what is not trained (and FCOS's norms, of which the published number is rounded anew)."""
    detector = build(name, 80)
    trained = sum(
        np.prod(leaf.shape)
        for path, leaf in flatten(detector.shapes[0]).items()
        if not resnet.is_frozen(path, 1) and not (name == "fcos_r50" and "backbone" in path and len(leaf.shape) == 1)
    )
    assert trained / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize("name", NAMES)
def test_init_follows_the_peers(name):
    detector = tiny(name)
    params, stats = (flatten(tree) for tree in detector.init(jax.random.key(0)))
    assert all((leaf == (0 if path.endswith("mean") else 1)).all() for path, leaf in stats.items())
    (bias,) = (leaf for path, leaf in params.items() if path.endswith("_cls/bias"))
    np.testing.assert_allclose(jax.nn.sigmoid(bias), 0.01, rtol=1e-5)
    assert (params["backbone/layer2/0/bn2/scale"] == 0).all()  # every block starts as the identity
    assert (params["backbone/layer2/0/bn1/scale"] == 1).all()
    assert not any(leaf.any() for path, leaf in params.items() if path.startswith("neck") and path.endswith("bias"))
    assert {float(leaf) for path, leaf in params.items() if path.endswith("factor")} <= {1.0}


def test_draws_have_their_spread():
    params = flatten(build("retinanet_r18", 3).init(jax.random.key(0))[0])
    kernel = params["backbone/layer3/0/conv2/kernel"]
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 256)), rel=0.01)
    kernel = params["neck/lateral_convs/0/conv/kernel"]
    assert np.abs(kernel).max() == pytest.approx(np.sqrt(6 / (128 + 256)), rel=0.01)
    assert params["bbox_head/retina_reg/kernel"].std() == pytest.approx(0.01, rel=0.02)


def test_weight_decay_spares_norms_biases_and_what_is_frozen():
    for frozen, spared in ((-1, False), (0, True)):
        tree = flatten(tiny("gfl_r18", frozen_stages=frozen).no_decay(tiny("gfl_r18").shapes[0]))
        assert tree["backbone/conv1/kernel"] is spared and not tree["backbone/layer1/0/conv1/kernel"]
        assert tree["bbox_head/scales/0/factor"] and tree["bbox_head/cls_convs/0/gn/scale"]
        assert not tree["bbox_head/gfl_cls/kernel"]


def test_preprocess_follows_the_style():
    colours = np.array([[[[124, 116, 104]]], [[[255, 0, 0]]]], np.uint8)
    rgb = tiny("atss_r18").preprocess(colours)
    np.testing.assert_allclose(rgb[1, 0, 0, 0], (255 - 123.675) / 58.395, rtol=1e-6)
    bgr = tiny("atss_r18", style="caffe").preprocess(colours)
    np.testing.assert_allclose(bgr[:, 0, 0], [[0.47, -0.28, 0.325], [-103.53, -116.28, 131.325]], atol=1e-4)
    np.testing.assert_allclose(tiny("fcos_r18").preprocess(colours)[1, 0, 0], [-102.9801, -115.9465, 132.2283])


def random_output(detector):
    """Predictions of images of 64 x 64, and the function that puts such maps into an output."""
    spec, _ = specs(detector, (SIDE, SIDE))
    rng = np.random.default_rng(0)
    shapes = {f: [(BATCH, *m.shape[1:]) for m in getattr(spec, f)] for f in ("cls_logits", "box_reg", "quality")}
    maps = {f: tuple(jnp.asarray(rng.normal(0, 1, s), jnp.float32) for s in shapes[f]) for f in shapes}
    if detector.name.startswith("fcos"):
        maps["box_reg"] = tuple(jnp.exp(m + 1) for m in maps["box_reg"])
    return maps, lambda maps: DetectorOutput(strides=STRIDES, anchors=spec.anchors, **maps)


def truth(valid: np.ndarray) -> Targets:
    """One object in the second image, two in the third, in the rows that `valid` [4] says; nothing in the first."""
    boxes = np.zeros((BATCH, 4, 4), np.float32)
    labels, mask = np.zeros((BATCH, 4), np.int32), np.zeros((BATCH, 4), bool)
    objects = [(1, (2, 3, 60, 58), 1), (2, (0, 0, 42, 44), 2), (2, (20, 18, 62, 60), 0)]
    rows = {1: list(np.flatnonzero(valid)), 2: list(np.flatnonzero(valid))}
    for image, box, label in objects if valid.any() else ():
        row = rows[image].pop(0)
        boxes[image, row], labels[image, row], mask[image, row] = box, label, True
    size = np.full((BATCH, 2), SIDE, np.int32)
    return Targets(boxes, labels, mask, size, size)


@pytest.mark.parametrize("name", NAMES)
def test_losses_with_and_without_objects(name):
    detector = tiny(name)
    maps, output_of = random_output(detector)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(maps, targets):
        def total(maps):
            output = output_of(maps)
            assignment = detector.assign(output, targets)
            losses = detector.loss(output, targets, assignment)
            return sum(losses.values()), (losses, assignment)

        return jax.grad(total, has_aux=True)(maps)

    gradient, (losses, assignment) = step(maps, truth(np.array([True, True, False, False])))
    assert all(np.isfinite(v) and v > 0 for v in losses.values())
    positive = np.asarray(assignment.positive).sum(1)
    assert positive[0] == 0 and (positive[1:] > 0).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert all(np.abs(gradient[field][0]).max() > 0 for field in gradient if gradient[field])
    # Rows of padding change nothing, wherever they are.
    _, (again, moved) = step(maps, truth(np.array([False, True, False, True])))
    chex.assert_trees_all_close(losses, again, rtol=1e-6)
    np.testing.assert_array_equal(assignment.labels, moved.labels)
    gradient, (losses, assignment) = step(maps, truth(np.zeros(4, bool)))
    assert not assignment.positive.any() and losses.pop("loss_cls") > 0
    assert all(value == 0 for value in losses.values())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(("name", "ignored"), [("atss_r18", 63), ("retinanet_r18", 9 * 63), ("fcos_r18", 0)])
def test_priors_outside_the_padding_are_not_scored(name, ignored):
    """Of 64 x 64 pixels a quarter counts: 48, 12 and 3 cells lie outside; FCOS takes them for background."""
    targets = truth(np.ones(4, bool))._replace(pad_size=np.full((BATCH, 2), 32, np.int32))
    maps, output_of = random_output(tiny(name))
    assign = jax.jit(lambda maps: tiny(name).assign(output_of(maps), targets), compiler_options=QUICK)
    assert assign(maps).ignore[0].sum() == ignored  # the image without objects


def boxes_in_cell(name):
    """`box_reg` of one prior that spans 8 px to all sides of the point (8, 8) (FCOS: of the middle of its cell)."""
    if name.startswith("gfl"):  # one stride to each side
        return np.tile(np.where(np.arange(17) == 1, 50.0, 0.0), 4)
    if name.startswith("fcos"):
        return np.full(4, 8.0)
    if name.startswith("atss"):  # an anchor of 64 px, deviations of 0.2
        return np.array([0, 0, np.log(16 / 64) / 0.2, np.log(16 / 64) / 0.2])
    deltas = np.zeros((9, 4))
    deltas[3] = [0, 0, np.log(16 / 32), np.log(16 / 32)]  # ratio 1, the smallest scale: 32 px
    return deltas.ravel()


@pytest.mark.parametrize("name", NAMES)
def test_decode(name):
    detector = tiny(name)
    spec, _ = specs(detector, (SIDE, SIDE))
    logits, boxes = ([np.zeros((1, *m.shape[1:]), np.float32) for m in f] for f in (spec.cls_logits, spec.box_reg))
    quality = [np.full((1, *m.shape[1:]), 1.0, np.float32) for m in spec.quality]
    for level in logits:
        level -= 20.0
    logits[0][0, 1, 1, (3 if name.startswith("retinanet") else 0) * CLASSES + 2] = 2.0
    boxes[0][0, 1, 1] = boxes_in_cell(name)
    maps = {"cls_logits": tuple(logits), "box_reg": tuple(boxes), "quality": tuple(quality)}
    output = DetectorOutput(strides=STRIDES, anchors=spec.anchors, **maps)
    decode = jax.jit(functools.partial(detector.decode, max_detections=3), compiler_options=QUICK)
    found = decode(output, np.array([[SIDE, 18]]))
    np.testing.assert_array_equal(found.valid[0], [True, False, False])
    middle = 12 if name.startswith("fcos") else 8
    np.testing.assert_allclose(
        found.boxes[0, 0], [middle - 8, middle - 8, min(middle + 8, 18), middle + 8], rtol=1e-5, atol=1e-5
    )
    assert found.labels[0, 0] == 2
    score = jax.nn.sigmoid(2.0) * (jax.nn.sigmoid(1.0) if quality else 1)
    assert float(found.scores[0, 0]) == pytest.approx(float(score), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_weights_go_there_and_back(name, tmp_path):
    detector = tiny(name)
    variables = detector.init(jax.random.key(1))
    state = weights.to_torch(detector, *variables)
    chex.assert_trees_all_equal(weights.from_torch(detector, state), variables)
    weights.save(tmp_path, detector, *variables, classes=["a", "b", "c"], image_size=(64, 64))
    loaded, *again, _ = weights.load(tmp_path)
    chex.assert_trees_all_equal(tuple(again), variables)
    assert loaded.name == name and loaded.options == detector.options
    other = build(name, 5, **detector.options)
    with pytest.warns(UserWarning, match="classifiers of .* are re-initialised for 5 classes"):
        params, _ = weights.from_torch(other, state)
    assert flatten(params).keys() == flatten(other.shapes[0]).keys()


def test_bins_of_gfl_are_read_and_written():
    detector = tiny("gfl_r18")
    state = weights.to_torch(detector, *detector.init(jax.random.key(0)))
    np.testing.assert_array_equal(state["bbox_head.integral.project"], np.arange(17))
    assert state["bbox_head.scales.2.scale"].shape == ()
    state["bbox_head.integral.project"] = np.arange(17) / 2
    with pytest.raises(ValueError, match=r"bbox_head.integral.project must be 0, 1, ... 16"):
        weights.from_torch(detector, state)


def test_the_two_forms_of_fcos_have_their_own_colours_and_suppression():
    black = np.zeros((1, 1, 1, 3), np.uint8)
    for variant, blue, threshold in (("", 102.9801, 0.5), ("-center", 103.53, 0.6)):
        detector = build(f"fcos_r18{variant}", 3)
        np.testing.assert_allclose(detector.preprocess(black)[0, 0, 0, 0], -blue, rtol=1e-6)
        assert inspect.signature(detector.decode).parameters["iou_threshold"].default == threshold


@pytest.mark.filterwarnings("error")
def test_a_bare_resnet_of_another_form_is_told():
    options = dict(base_channels=4, neck_channels=8, head_channels=8, stacked_convs=1, groups=4)
    for style in ("caffe", "pytorch"):
        detector = build("fcos_r18", 3, style=style, **options)
        state = weights.to_torch(detector, *detector.init(jax.random.key(1)))
        bare = {n.removeprefix("backbone."): v for n, v in state.items() if n.startswith("backbone.")}
        with pytest.warns(UserWarning, match="only a ResNet backbone") as told:
            weights.from_torch(detector, bare)
        assert ("the option style=pytorch" in str(told[0].message)) == (style == "caffe")


def test_a_bare_resnet_fills_the_backbone():
    detector = tiny("atss_r18")
    variables = detector.init(jax.random.key(1))
    state = weights.to_torch(detector, *variables)
    bare = {n.removeprefix("backbone."): v for n, v in state.items() if n.startswith("backbone.")}
    bare |= {"fc.weight": np.zeros((1000, 16)), "fc.bias": np.zeros(1000)}
    with pytest.warns(UserWarning, match="only a ResNet backbone: atss_r18 has random neck and head"):
        params, stats = weights.from_torch(detector, bare, key=jax.random.key(2))
    fresh = detector.init(jax.random.key(2))[0]
    chex.assert_trees_all_equal(params, fresh | {"backbone": variables[0]["backbone"]})
    chex.assert_trees_all_equal(stats, variables[1])
    del bare["layer1.0.conv1.weight"]
    with (
        pytest.warns(UserWarning, match="only a ResNet backbone"),
        pytest.raises(ValueError, match=r"backbone.layer1.0.conv1.weight is missing"),
    ):
        weights.from_torch(detector, bare)
    with pytest.raises(ValueError, match="weights of the whole atss_r18 are needed"):
        weights.from_torch(detector, bare, keep_classifiers=True)
