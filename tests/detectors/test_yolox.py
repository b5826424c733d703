"""YOLOX: shapes, initialisation, loss against NumPy, training, decoding, names of weights, and real weights."""

import dataclasses
import functools
import json
import math
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import weights
from kdjax.commands import import_weights
from kdjax.data import records
from kdjax.detectors import build, cspdarknet, yolox
from kdjax.detectors.api import flatten, pure, unflatten
from kdjax.detectors.layers import BatchNorm
from kdjax.evals import coco, complexity
from kdjax.inference import load
from kdjax.inference.predict import on_canvas
from kdjax.structs import DetectorOutput, Targets
from kdjax.weights import folded as folded_names
from kdjax.weights import torch_names
from kdjax.weights import yolox as yolox_names
from tests.shared import SHARED
from tests.support.boxes import slow_sim_ota

SIDE, BATCH, CLASSES = 64, 2, 3
STRIDES = (8, 16, 32)
# A program that runs once spends its time in the compiler.
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def tiny(**options):
    return build("yolox_pico", CLASSES, **{"widen": 0.0625, "deepen": 0.1, "depthwise": False} | options)


def specs(detector, *, train=False, dtype=jnp.float32):
    x = jax.ShapeDtypeStruct((BATCH, SIDE, 96, 3), dtype)
    return jax.eval_shape(functools.partial(detector.apply, train=train), *detector.shapes, x)


@functools.cache
def variables(seed=0):
    """Weights with norms that are not those of a new network."""
    rng = np.random.default_rng(seed)
    trees = []
    for tree in tiny().init(jax.random.key(seed)):
        noise = {p: rng.uniform(0.5, 1.5, v.shape).astype(np.float32) for p, v in flatten(tree).items()}
        trees.append(unflatten({p: noise[p] if "/bn/" in p else v for p, v in flatten(tree).items()}))
    return tuple(trees)


@functools.cache
def images():
    pixels = np.random.default_rng(1).integers(0, 255, (BATCH, SIDE, SIDE, 3)).astype(np.uint8)
    return tiny().preprocess(pixels)


def targets(valid=True):
    """Nothing in the first image, two objects in the second."""
    boxes, labels = np.zeros((BATCH, 4, 4), np.float32), np.zeros((BATCH, 4), np.int32)
    mask = np.zeros((BATCH, 4), bool)
    if valid:
        boxes[1, :2], labels[1, :2], mask[1, :2] = [[2, 3, 40, 58], [20, 18, 62, 44]], [1, 2], True
    sides = np.full((BATCH, 2), SIDE, np.int32)
    return Targets(boxes, labels, mask, sides, sides)


@functools.cache
def program():
    """Evaluation, and a step of plain gradient descent with the loss before it."""

    def evaluate(params, stats, x):
        output, _ = tiny().apply(params, stats, x, train=False)
        entries = {}
        for branch, tower in (("cls", output.cls_tower), ("reg", output.reg_tower), ("quality", output.reg_tower)):
            for start in range(3):
                maps = tower[start - 1] if start else output.neck
                entries[branch, start] = tiny().head(params, stats, maps, branch=branch, start=start)
        return output, entries

    def step(params, stats, x, truth):
        def total(params):
            output, moved = tiny().apply(params, stats, x, train=True)
            assignment = tiny().assign(output, truth)
            losses = tiny().loss(output, truth, assignment)
            return sum(losses.values()), (losses, assignment, moved)

        (value, found), gradient = jax.value_and_grad(total, has_aux=True)(params)
        return value, found, gradient, jax.tree.map(lambda p, g: p - 0.003 * g, params, gradient)

    return tuple(jax.jit(function, compiler_options=QUICK) for function in (evaluate, step))


@pytest.mark.parametrize("depthwise", [False, True])
def test_taps_have_their_shapes(depthwise):
    detector = tiny(depthwise=depthwise)
    output, stats = specs(detector)
    sides = [(8, 12), (4, 6), (2, 3)]
    assert output.strides == output.backbone_strides == STRIDES and output.quality_tower == "reg"
    assert [m.shape[1:] for m in output.backbone] == [(*s, c) for s, c in zip(sides, (16, 32, 64), strict=True)]
    for maps, channels in (
        (output.neck, 16),
        (output.neck_conv, 16),
        (output.cls_logits, CLASSES),
        (output.box_reg, 4),
        (output.quality, 1),
    ):
        assert [m.shape for m in maps] == [(BATCH, *side, channels) for side in sides]
    for tower in (output.cls_tower, output.reg_tower):
        assert [[m.shape[1:] for m in maps] for maps in tower] == [[(*side, 16) for side in sides]] * 2
    priors = tiny().priors((SIDE, 96))
    logits, boxes = (jax.eval_shape(f, output) for f in (tiny().class_logits, tiny().decode_boxes))
    assert priors.shape == (126, 4) and logits.shape == (BATCH, 126, CLASSES) and boxes.shape == (BATCH, 126, 4)
    assert jax.tree.map(lambda leaf: leaf.shape, stats) == jax.tree.map(lambda leaf: leaf.shape, detector.shapes[1])


def test_maps_may_be_bfloat16_and_predictions_are_float32():
    output, stats = specs(tiny(), train=True, dtype=jnp.bfloat16)
    assert {m.dtype for m in (*output.backbone, *output.neck, *output.reg_tower[1])} == {jnp.dtype(jnp.bfloat16)}
    exact = (*output.cls_logits, *output.box_reg, *output.quality, *jax.tree.leaves(stats))
    assert {leaf.dtype for leaf in exact} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("variant", "millions"), [("nano", 0.91), ("tiny", 5.06), ("s", 8.97), ("m", 25.3), ("l", 54.2), ("x", 99.1)]
)
def test_published_sizes(variant, millions):
    count = complexity.parameters(build(f"yolox_{variant}", 80).shapes[0])
    assert count / 1e6 == pytest.approx(millions, abs=0.005 if millions < 10 else 0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wide": 1}, "yolox_pico has no option wide: its options are widen, deepen, depthwise, stacked_convs, l1"),
        ({"widen": 0.01}, "widen >= 1/64"),
        ({"stacked_convs": 0}, "stacked_convs >= 1"),
    ],
)
def test_build_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build("yolox_pico", CLASSES, **options)
    with pytest.raises(ValueError, match="num_classes of YOLOX must be >= 1, not 0"):
        build("yolox_pico", 0)
    with pytest.raises(ValueError, match="the variants are pico, nano, tiny, s, m, l, x"):
        yolox.make("xxl", 3)


def test_wrong_inputs_get_a_sentence():
    with pytest.raises(ValueError, match=r"images of YOLOX must be .* multiples of 32, not"):
        tiny().apply(*variables(), jnp.zeros((1, 48, 64, 3)), train=False)
    for wrong in ({"branch": "obj", "start": 0}, {"branch": "reg", "start": 3}):
        with pytest.raises(ValueError, match=r"branch must be one of cls, reg, quality, start in 0 .. 2"):
            tiny().head(*variables(), specs(tiny())[0].neck, **wrong)


def test_preprocess_is_bgr_as_it_is():
    got = tiny().preprocess(np.array([[[[123, 116, 7]]]], np.uint8))
    assert got.dtype == jnp.float32 and got.ravel().tolist() == [7, 116, 123] and tiny().pad_value == 114


def test_init_follows_the_peers():
    params = flatten(build("yolox_tiny", CLASSES, widen=0.125).init(jax.random.key(0))[0])
    for level in range(3):
        for part in ("cls", "obj"):
            bias = params[f"bbox_head/multi_level_conv_{part}/{level}/bias"]
            np.testing.assert_allclose(jax.nn.sigmoid(bias), 0.01, rtol=1e-5)
        assert not params[f"bbox_head/multi_level_conv_reg/{level}/bias"].any()  # boxes of one cell
    kernel = np.asarray(params["backbone/stage4/0/conv/kernel"])
    bound = 1 / math.sqrt(np.prod(kernel.shape[:3]))
    assert 0.99 * bound < np.abs(kernel).max() <= bound
    spared = flatten(tiny().no_decay(tiny().shapes[0]))
    assert all(spared[path] == (len(leaf.shape) == 1) for path, leaf in flatten(tiny().shapes[0]).items())


def test_head_can_be_entered_anywhere():
    output, entries = program()[0](*variables(), images())
    wanted = {"cls": output.cls_logits, "reg": output.box_reg, "quality": output.quality}
    assert all(np.abs(maps[0]).max() > 0 for maps in wanted.values())
    for (branch, _), got in entries.items():
        chex.assert_trees_all_close(got, wanted[branch], rtol=1e-4, atol=1e-4)


def test_stem_and_norms_are_the_peers():
    """The first layer, trained and not, from the formulas: corners of 2x2 cells, eps 0.001, momentum 0.03."""
    x = np.asarray(images())
    params, stats = (tree["backbone"]["stem"]["conv"] for tree in variables())
    corners = [x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]]
    y = jax.lax.conv_general_dilated(
        np.concatenate(corners, -1), params["conv"]["kernel"], (1, 1), [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    _, (_, _, moved), _, _ = program()[1](*variables(), images(), targets())
    after = moved["backbone"]["stem"]["conv"]["bn"]
    for name, seen in (("mean", np.mean(y, (0, 1, 2))), ("var", np.var(y, (0, 1, 2), ddof=1))):
        np.testing.assert_allclose(after[name], 0.97 * stats["bn"][name] + 0.03 * seen, rtol=1e-4, atol=1e-3)
    norm = tiny_stem(params["bn"], stats["bn"], np.float32([[0.5] * 4]))
    want = (0.5 - stats["bn"]["mean"]) / np.sqrt(stats["bn"]["var"] + 1e-3) * params["bn"]["scale"]
    np.testing.assert_allclose(norm[0], want + params["bn"]["bias"], rtol=1e-5)


def tiny_stem(params, stats, x):
    """The norm of the stem by itself."""
    norm = pure(lambda: cspdarknet.conv_norm(1, 4, 1).bn)
    return norm.call(params, stats, BatchNorm.__call__, x, False)[0]


def test_steps_reduce_the_loss():
    params, stats = variables()
    values = []
    for _ in range(20):
        value, (losses, assignment, stats), gradient, params = program()[1](params, stats, images(), targets())
        values.append(float(value))
        assert set(losses) == {"loss_cls", "loss_box", "loss_obj"} and all(v > 0 for v in losses.values())
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        if len(values) == 1:
            positive = np.asarray(assignment.positive).sum(1)
            assert positive[0] == 0 and positive[1] > 0  # the first image is empty
            unreached = {p for p, leaf in flatten(gradient).items() if not np.abs(leaf).max()}
            # A level without a positive prior teaches its boxes and classes nothing.
            assert all(path.split("/")[1] in ("multi_level_cls_convs", "multi_level_conv_cls", "multi_level_conv_reg")
                       for path in unreached), unreached  # fmt: skip
    assert np.mean(values[-5:]) < 0.75 * values[0], values


def test_a_batch_without_any_object():
    _, (losses, assignment, _), gradient, _ = program()[1](*variables(), images(), targets(valid=False))
    assert not assignment.positive.any()
    assert losses["loss_cls"] == losses["loss_box"] == 0 and losses["loss_obj"] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def random_output(seed=0):
    rng = np.random.default_rng(seed)

    def maps(channels, mean):
        return tuple(rng.normal(mean, 1, (BATCH, SIDE // s, SIDE // s, channels)).astype(np.float32) for s in STRIDES)

    return DetectorOutput(strides=STRIDES, cls_logits=maps(CLASSES, -1), box_reg=maps(4, 0.7), quality=maps(1, -1))


def slow_loss(output, truth):
    """The losses prior by prior in float64, with the positives of the slow assigner."""

    def rows(maps):
        return np.concatenate([np.float64(m).reshape(BATCH, -1, m.shape[-1]) for m in maps], 1)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def entropy(logit, target):
        return -(target * np.log(sigmoid(logit)) + (1 - target) * np.log(1 - sigmoid(logit)))

    logits, numbers, objectness = rows(output.cls_logits), rows(output.box_reg), rows(output.quality)[..., 0]
    corners = np.array([(x * s, y * s, s) for s in STRIDES for y in range(SIDE // s) for x in range(SIDE // s)])
    sums, positives = dict.fromkeys(("loss_cls", "loss_box", "loss_obj", "loss_l1"), 0.0), 0
    for row in range(BATCH):
        boxes = []
        for (x, y, s), (dx, dy, w, h) in zip(corners, numbers[row], strict=True):
            cx, cy, w, h = x + dx * s, y + dy * s, s * math.exp(w), s * math.exp(h)
            boxes.append((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
        scores = np.sqrt(sigmoid(logits[row]) * sigmoid(objectness[row])[:, None])
        middles = [(x + s / 2, y + s / 2, s, s) for x, y, s in corners]
        matched, overlaps = slow_sim_ota(scores, boxes, middles, truth, row)
        for n, m in enumerate(matched):
            sums["loss_obj"] += entropy(objectness[row, n], float(m >= 0))
            if m < 0:
                continue
            positives += 1
            x1, y1, x2, y2 = np.float64(truth.boxes[row, m])
            for k in range(CLASSES):
                label = overlaps[n] if k == truth.labels[row, m] else 0.0
                sums["loss_cls"] += entropy(logits[row, n, k], label)
            sums["loss_box"] += 5 * (1 - overlaps[n] ** 2)
            x, y, s = corners[n]
            centre, sides = [((x1 + x2) / 2 - x) / s, ((y1 + y2) / 2 - y) / s], [(x2 - x1) / s, (y2 - y1) / s]
            sums["loss_l1"] += np.abs(numbers[row, n] - [*centre, *np.log(sides)]).sum()
    assert positives > 2
    return {name: value / positives for name, value in sums.items()}


@functools.cache
def assigned_loss():
    """(output, targets) -> (losses, assignment)."""

    def run(output, truth):
        assignment = tiny().assign(output, truth)
        return tiny(l1=True).loss(output, truth, assignment), assignment

    return jax.jit(run, compiler_options=QUICK)


def test_loss_equals_the_slow_loop():
    want = slow_loss(random_output(), targets())
    losses, assignment = assigned_loss()(random_output(), targets())
    assert set(losses) == set(want) == {"loss_cls", "loss_box", "loss_obj", "loss_l1"}
    for name, value in want.items():
        assert float(losses[name]) == pytest.approx(value, rel=1e-4), name
    # With the assignment given, eager, without the last of the losses.
    again = tiny().loss(random_output(), targets(), assignment)
    del losses["loss_l1"]
    chex.assert_trees_all_close(again, losses, rtol=1e-5)


def test_padding_rows_change_no_loss():
    truth = targets()
    moved = Targets(*(np.asarray(a)[:, [3, 2, 0, 1]] for a in truth[:3]), *truth[3:])
    chex.assert_trees_all_close(*(assigned_loss()(random_output(), t)[0] for t in (truth, moved)), rtol=1e-6)


def test_priors_outside_the_padding_are_not_scored():
    half = targets()._replace(pad_size=np.full((BATCH, 2), 32, np.int32))
    _, assignment = assigned_loss()(random_output(), half)
    assert assignment.ignore[0].sum() == 84 - 21
    near = tiny().loss(random_output(), half, assignment)
    loud = random_output()
    loud.quality[0][:, 5:] = 9.0  # cells below the padding
    far = tiny().loss(loud, half, assignment)
    assert near["loss_obj"] == far["loss_obj"]


def small_output():
    """One image of 32 x 32: 16 + 4 + 1 priors, two classes, boxes of one cell around each prior."""
    sides = (4, 2, 1)
    return {
        "cls_logits": [np.full((1, s, s, 2), -20.0, np.float32) for s in sides],
        "box_reg": [np.zeros((1, s, s, 4), np.float32) for s in sides],
        "quality": [np.full((1, s, s, 1), 2.0, np.float32) for s in sides],
    }


def test_decode():
    maps = small_output()
    maps["cls_logits"][0][0, 1, 1] = [3.0, 2.0]
    maps["cls_logits"][0][0, 0, 3, 1] = 1.0  # a third is right of the image, the half above it
    maps["box_reg"][1][0, 1, 1] = [-0.25, 0.5, math.log(0.5), math.log(2)]
    maps["cls_logits"][1][0, 1, 1, 0] = 4.0
    maps["quality"][1][0, 1, 1] = -1.0
    maps["cls_logits"][2][0, 0, 0, 1] = 5.0  # left and above, but for its last quarter
    maps["box_reg"][2][0, 0, 0] = [-1.0, -1.0, 0, 0]  # outside: left out
    output = DetectorOutput(strides=STRIDES, **{name: tuple(value) for name, value in maps.items()})
    decode = jax.jit(functools.partial(tiny().decode, max_detections=5), compiler_options=QUICK)
    found = decode(output, np.array([[32, 26]]))
    np.testing.assert_array_equal(found.valid[0], [True, True, True, True, False])
    np.testing.assert_array_equal(found.labels[0, :4], [0, 1, 1, 0])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    scores = [sigmoid(3) * sigmoid(2), sigmoid(2) * sigmoid(2), sigmoid(1) * sigmoid(2), sigmoid(4) * sigmoid(-1)]
    np.testing.assert_allclose(found.scores[0, :4], scores, rtol=1e-5)
    boxes = [[4, 4, 12, 12], [4, 4, 12, 12], [20, 0, 26, 4], [8, 8, 16, 32]]
    np.testing.assert_allclose(found.boxes[0, :4], boxes, atol=1e-5)
    assert decode(output, np.array([[32, 26]]), score_threshold=0.7).valid[0].sum() == 2


def authors_convs(*, blocks, depthwise, convs=2):
    """Names of the convolutions in the authors' code (yolox/models), in the order in which they run."""

    def conv(name):
        return [f"{name}.dconv.conv", f"{name}.pconv.conv"] if depthwise else [f"{name}.conv"]

    def csp(name, count):
        names = [f"{name}.conv1.conv", f"{name}.conv2.conv"]
        for i in range(count):
            names += [f"{name}.m.{i}.conv1.conv", *conv(f"{name}.m.{i}.conv2")]
        return [*names, f"{name}.conv3.conv"]

    names = ["backbone.backbone.stem.conv.conv"]
    for stage, count in ((2, blocks), (3, 3 * blocks), (4, 3 * blocks)):
        names += [*conv(f"backbone.backbone.dark{stage}.0"), *csp(f"backbone.backbone.dark{stage}.1", count)]
    names += conv("backbone.backbone.dark5.0")
    names += [f"backbone.backbone.dark5.1.conv{i}.conv" for i in (1, 2)] + csp("backbone.backbone.dark5.2", blocks)
    for squeeze, layer in (("lateral_conv0", "C3_p4"), ("reduce_conv1", "C3_p3")):
        names += [f"backbone.{squeeze}.conv", *csp(f"backbone.{layer}", blocks)]
    for down, layer in (("bu_conv2", "C3_n3"), ("bu_conv1", "C3_n4")):
        names += [*conv(f"backbone.{down}"), *csp(f"backbone.{layer}", blocks)]
    for level in range(3):
        names.append(f"head.stems.{level}.conv")
        names += [n for i in range(convs) for n in conv(f"head.cls_convs.{level}.{i}")] + [f"head.cls_preds.{level}"]
        names += [n for i in range(convs) for n in conv(f"head.reg_convs.{level}.{i}")]
        names += [f"head.reg_preds.{level}", f"head.obj_preds.{level}"]
    return names


@pytest.mark.parametrize(("variant", "blocks"), [("nano", 1), ("s", 1), ("m", 2), ("x", 4)])
def test_names_are_mmdetections_and_the_authors(variant, blocks):
    detector = build(f"yolox_{variant}", 80)
    depthwise = variant == "nano"
    ours = {name for names in torch_names.table(detector).values() for name in names}
    last = "depthwise_conv." if depthwise else ""
    for name in (
        "backbone.stem.conv.conv.weight",
        f"backbone.stage1.0.{last}conv.weight",
        f"backbone.stage2.1.blocks.{3 * blocks - 1}.conv2.{last}bn.running_var",
        "backbone.stage4.1.conv2.conv.weight",
        "backbone.stage4.2.short_conv.bn.bias",
        "neck.reduce_layers.1.conv.weight",
        f"neck.top_down_blocks.0.blocks.{blocks - 1}.conv1.conv.weight",
        f"neck.downsamples.1.{last}conv.weight",
        "neck.bottom_up_blocks.1.final_conv.bn.weight",
        "neck.out_convs.2.conv.weight",
        f"bbox_head.multi_level_cls_convs.0.1.{last}bn.running_mean",
        f"bbox_head.multi_level_reg_convs.2.0.{last}conv.weight",
        "bbox_head.multi_level_conv_cls.0.bias",
        "bbox_head.multi_level_conv_reg.1.weight",
        "bbox_head.multi_level_conv_obj.2.weight",
    ):
        assert name in ours, name
    authors = authors_convs(blocks=blocks, depthwise=depthwise)
    leaves = [f"{name}.weight" for name in authors]
    renamed = yolox_names.renamed(dict.fromkeys(leaves))
    assert [f"{name}.weight" for name in folded_names.in_order(detector)] == list(renamed)
    assert {*renamed} == {n for n in ours if n.endswith("weight") and not n.endswith("bn.weight")}


def authors_state(state):
    """A state dict of ours under the authors' names."""
    names = {f"{name}.{leaf}" for name in authors_convs(blocks=1, depthwise=True) for leaf in ("weight", "bias")}
    leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    before = {name.removesuffix("conv.weight") for name in names if name.endswith("conv.weight")}
    names |= {f"{name}bn.{leaf}" for name in before for leaf in leaves}
    table = {yolox_names._renamed(name): name for name in names}
    return {table[name]: value for name, value in state.items()}


def test_weights_go_there_and_back(tmp_path):
    detector = build("yolox_pico", CLASSES, widen=0.0625)
    given = detector.init(jax.random.key(1))
    state = weights.to_torch(detector, *given)
    chex.assert_trees_all_equal(weights.from_torch(detector, state), given)
    chex.assert_trees_all_equal(weights.from_torch(detector, authors_state(state)), given)
    weights.save(tmp_path, detector, *given, classes=["a", "b", "c"], image_size=(64, 64))
    loaded, *again, _ = weights.load(tmp_path)
    chex.assert_trees_all_equal(tuple(again), given)
    assert loaded.name == "yolox_pico" and loaded.options == detector.options
    assert weights.count_classes(build("yolox_pico", 1, **detector.options), state) == CLASSES
    with pytest.warns(UserWarning, match="classifiers of yolox_pico are re-initialised for 5 classes"):
        params, _ = weights.from_torch(build("yolox_pico", 5, **detector.options), state)
    assert params["bbox_head"]["multi_level_conv_cls"]["0"]["bias"].shape == (5,)


def folded():
    """The weights of `variables` as an ONNX file holds them."""
    state = weights.to_torch(tiny(), *variables())
    held = {}
    for number, module in enumerate(folded_names.in_order(tiny())):
        kernel = state[f"{module}.weight"]
        if f"{module}.bias" in state:
            what, level = module.removeprefix("bbox_head.multi_level_conv_").split(".")
            held[f"head.{what}_preds.{level}.weight"] = kernel
            held[f"head.{what}_preds.{level}.bias"] = state[f"{module}.bias"]
            continue
        leaves = ("weight", "bias", "running_mean", "running_var")
        scale, bias, mean, var = (state[f"{module.removesuffix('conv')}bn.{leaf}"] for leaf in leaves)
        factor = scale / np.sqrt(var + 1e-3)
        held[f"onnx.{number}.weight"] = kernel * factor[:, None, None, None]
        held[f"onnx.{number}.bias"] = bias - mean * factor
    return held


def test_folded_norms_are_unfolded():
    output, _ = program()[0](*variables(), images())
    fill = functools.partial(weights.from_torch, keep_classifiers=True)
    again, _ = program()[0](*fill(tiny(), folded()), images())
    chex.assert_trees_all_close(again.cls_logits, output.cls_logits, rtol=1e-3, atol=1e-3)
    chex.assert_trees_all_close(again.quality, output.quality, rtol=1e-3, atol=1e-3)
    lacking = folded()
    del lacking["onnx.4.weight"]
    with pytest.raises(ValueError, match=r"do not fit yolox_pico"):
        fill(tiny(), lacking)
    with pytest.raises(ValueError, match=r"do not fit yolox_pico .*\n.* matches no parameter of the detector"):
        fill(tiny(), folded() | {"onnx.900.weight": np.zeros(3)})
    with pytest.warns(UserWarning, match="fine-tuning starts from norms of scale 1"):
        weights.from_torch(tiny(), folded())


def test_an_onnx_file_is_read(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx", reason="ONNX files need the package onnx")
    kernel, bias = np.arange(4, dtype=np.float32).reshape(2, 2, 1, 1), np.ones(2, np.float32)
    arrays = [("12", kernel), ("13", bias), ("head.cls_preds.0.weight", kernel), ("head.cls_preds.0.bias", bias)]
    stored = [onnx.numpy_helper.from_array(value, name) for name, value in arrays]
    nodes = [
        onnx.helper.make_node("Conv", ["x", "12", "13"], ["y"]),
        onnx.helper.make_node("Conv", ["y", "head.cls_preds.0.weight", "head.cls_preds.0.bias"], ["z"]),
    ]
    graph = onnx.helper.make_graph(nodes, "net", [], [], stored)
    file = tmp_path / "net.onnx"
    onnx.save(onnx.helper.make_model(graph), str(file))
    state, classes = weights.read_checkpoint(file)
    assert list(state) == ["onnx.0.weight", "onnx.0.bias", "head.cls_preds.0.weight", "head.cls_preds.0.bias"]
    assert classes is None and folded_names.is_folded(state)
    np.testing.assert_array_equal(state["onnx.0.weight"], kernel)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"net.onnx: the weights cannot be read"):
        weights.read_checkpoint(file)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"net.onnx: reading it needs onnx: install the extra kdjax\[export\]"):
        weights.read_checkpoint(file)


# ------------------------------------------------------------------------------------------------------- real weights

# Of the stored detections, as their README has them: AP, AP50.
README = {"train": (0.4535, 0.6654), "val": (0.4690, 0.6335)}


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """The published YOLOX-nano as a user imports it."""
    pytest.importorskip("onnx", reason="ONNX files need the package onnx")
    if SHARED is None:
        pytest.skip("the published weights are not here")
    out = tmp_path_factory.mktemp("nano") / "nano"
    import_weights.run(
        file=str(SHARED / "weights" / "yolox_nano.onnx"),
        detector="yolox_nano",
        out=str(out),
        classes=str(SHARED / "data" / "coco_mini" / "annotations" / "instances_val.json"),
        image_size=None,
        network="student",
    )
    model = load(out)
    assert model.image_size == (416, 416)
    return model


def corners(rows, factor=1.0, edge=np.inf):
    """Boxes of COCO results, f64[n, 4] x1 y1 x2 y2 times a factor, clipped to the edge."""
    boxes = np.array([row["bbox"] for row in rows])
    boxes[:, 2:] += boxes[:, :2]
    return np.clip(boxes * factor, 0, edge)


@pytest.mark.parametrize("split", ["val", pytest.param("train", marks=pytest.mark.slow)])
def test_published_weights_find_what_is_stored(nano, split):
    """Weights, preprocessing, decoding, suppression and metrics together, on real photographs."""
    data = SHARED / "data" / "coco_mini"
    truth = json.loads((data / "annotations" / f"instances_{split}.json").read_text())
    stored = json.loads((SHARED / "weights" / f"yolox_nano_coco_mini_{split}.json").read_text())
    metrics = coco.coco_metrics(truth, stored)
    assert (metrics["AP"], metrics["AP50"]) == pytest.approx(README[split], abs=1e-4)

    given = dataclasses.replace(nano, category_ids=tuple(sorted(entry["id"] for entry in truth["categories"])))
    files = {entry["id"]: data / "images" / split / entry["file_name"] for entry in truth["images"]}
    images = (records.decode(file.read_bytes()) for file in files.values())
    sizes = {entry["id"]: np.array([entry["width"], entry["height"]] * 2) for entry in truth["images"]}
    found, best = [], []
    for image_id, (_, detections) in zip(files, given.stream(images), strict=True):
        rows = coco.to_coco(detections, image_id)
        found, best = found + rows, best + rows[:100]  # as many as are stored of an image at most
        mine, theirs = rows[:100], [row for row in stored if row["image_id"] == image_id]
        assert len(mine) == len(theirs)
        # The stored boxes are those of the canvas over one ratio, ours over the true ratio of each axis, and clipped.
        ratio = 416 / sizes[image_id].max()
        placed = np.floor(sizes[image_id] * ratio + 1e-6)
        boxes = corners(mine, placed / sizes[image_id] / ratio), corners(theirs, edge=placed / ratio)
        (scores, ids), (their_scores, their_ids) = (
            np.array([(row["score"], row["category_id"]) for row in side]).T for side in (mine, theirs)
        )
        away = np.abs(boxes[0][:, None] - boxes[1]).max(-1)
        same = (away < 0.1) & (np.abs(scores[:, None] - their_scores) < 1e-4) & (ids[:, None] == their_ids)
        assert same.any(0).all() and same.any(1).all(), image_id
    for rows in (found, best):
        mine = coco.coco_metrics(truth, rows)
        assert mine["AP"] == pytest.approx(README[split][0], abs=0.005)
    assert mine["AP50"] == pytest.approx(README[split][1], abs=0.005)


def test_maps_equal_onnxruntimes(nano):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    image = next((SHARED / "data" / "coco_mini" / "images" / "val").glob("*.jpg"))
    canvas, _ = on_canvas(records.decode(image.read_bytes()), (416, 416), fit="down")
    x = nano.detector.preprocess(canvas[None])
    session = runtime.InferenceSession(str(SHARED / "weights" / "yolox_nano.onnx"), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"images": np.asarray(x).transpose(0, 3, 1, 2)})
    output, _ = jax.jit(functools.partial(nano.detector.apply, train=False), compiler_options=QUICK)(*nano.variables, x)
    maps = [
        np.concatenate([np.asarray(m).reshape(1, -1, m.shape[-1]) for m in field], 1)
        for field in (output.box_reg, *(map(jax.nn.sigmoid, f) for f in (output.quality, output.cls_logits)))
    ]
    np.testing.assert_allclose(np.concatenate(maps, -1), theirs, atol=2e-4, rtol=1e-3)
