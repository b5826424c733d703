"""RT-DETR and RT-DETRv2: names of weights in all layouts, options, detections, a training step."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import detectors, weights
from kdjax.detectors.api import flatten
from kdjax.errors import UserError
from kdjax.structs import DetectorOutput, Queries, Targets
from tests.support.arrays import quick_jit

SIDE, CLASSES = 64, 3
TINY = dict(stem=4, widths=[4, 8, 8, 8], blocks=[1, 1, 1, 1], encoder_channels=8, encoder_hidden=8, channels=8)
TINY |= dict(heads=2, hidden=8, layers=2, queries=6, points=2, denoising=2)


@functools.cache
def detector(family="rtdetr", classes=CLASSES, **options):
    return detectors.build(f"{family}_pico", classes, **TINY | options)


@functools.cache
def variables():
    return detector().init(jax.random.key(0))


def written():
    return weights.to_torch(detector(), *variables())


def as_state_dict(state):
    """transformers' names in memory."""
    rules = (
        (r"^backbone\.embedder\.", "backbone.model.embedder.embedder."),
        (r"^backbone\.stages\.(\d)\.(\d)\.", r"backbone.model.encoder.stages.\1.layers.\2."),
        (r"(stages\.[1-3]\S*\.shortcut)\.", r"\1.1."),
        (r"^(backbone\S*)\.conv\.", r"\1.convolution."),
        (r"^(backbone\S*)\.bn\.", r"\1.normalization."),
        (r"^encoder\.input_proj\.(\d)\.conv", r"encoder_input_proj.\1.0"),
        (r"^encoder\.input_proj\.(\d)\.bn", r"encoder_input_proj.\1.1"),
        (r"^decoder_input_proj\.(\d)\.conv", r"decoder_input_proj.\1.0"),
        (r"^decoder_input_proj\.(\d)\.bn", r"decoder_input_proj.\1.1"),
        (r"^encoder\.aifi\.", "encoder.aifi.0.layers.0."),
        (r"^(encoder\S*)\.bn\.", r"\1.norm."),
        (r"\.out_proj\.", ".o_proj."),
        (r"\.fc([12])\.", r".mlp.fc\1."),
        (r"^decoder\.heads\.", "decoder."),
        (r"^decoder\.(enc_|denoising)", r"\1"),
    )
    return {f"model.{changed(name, rules)}": value for name, value in state.items()}


def changed(name, rules):
    for old, new in rules:
        name = re.sub(old, new, name)
    return name


def as_file(state):
    """transformers' names in a file of `save_pretrained`."""
    rules = ((r"encoder\.aifi", "encoder.encoder"), (r"\.mlp\.", "."), (r"\.o_proj", ".out_proj"))
    return {changed(name, rules): value for name, value in as_state_dict(state).items()}


def heads_twice(state):
    state = as_file(state)
    heads = {name: value for name, value in state.items() if re.match(r"model\.decoder\.(class|bbox)_embed", name)}
    return state | {name.removeprefix("model.decoder."): value for name, value in heads.items()}


def heads_outside(state):
    return {name: v for name, v in heads_twice(state).items() if not re.match(r"model\.decoder\.(class|bbox)_", name)}


def as_authors(state):
    rules = (
        (r"^backbone\.embedder\.0\.", "backbone.conv1.conv1_1."),
        (r"^backbone\.embedder\.1\.", "backbone.conv1.conv1_2."),
        (r"^backbone\.embedder\.2\.", "backbone.conv1.conv1_3."),
        (r"^backbone\.stages\.(\d)\.(\d)\.", r"backbone.res_layers.\1.blocks.\2."),
        (r"\.layer\.0\.", ".branch2a."),
        (r"\.layer\.1\.", ".branch2b."),
        (r"res_layers\.0(\S*)\.shortcut\.", r"res_layers.0\1.short."),
        (r"\.shortcut\.", ".short.conv."),
        (r"^encoder\.input_proj\.(\d)\.conv", r"encoder.input_proj.\1.0"),
        (r"^encoder\.input_proj\.(\d)\.bn", r"encoder.input_proj.\1.1"),
        (r"^encoder\.aifi\.final_layer_norm", "encoder.encoder.0.layers.0.norm2"),
        (r"^encoder\.aifi\.", "encoder.encoder.0.layers.0."),
        (r"^decoder\.layers\.", "decoder.decoder.layers."),
        (r"^decoder\.heads\.class_embed", "decoder.dec_score_head"),
        (r"^decoder\.heads\.bbox_embed", "decoder.dec_bbox_head"),
        (r"^decoder_input_proj", "decoder.input_proj"),
        (r"\.encoder_attn\.", ".cross_attn."),
        (r"\.fc([12])\.", r".linear\1."),
        (r"\.self_attn_layer_norm", ".norm1"),
        (r"\.encoder_attn_layer_norm", ".norm2"),
        (r"\.final_layer_norm", ".norm3"),
        (r"\.bn\.", ".norm."),
    )
    renamed = {changed(name, rules): value for name, value in state.items()}
    for stem in sorted({name.partition("q_proj")[0] for name in renamed if ".self_attn.q_proj" in name}):
        for leaf in ("weight", "bias"):
            parts = [renamed.pop(f"{stem}{part}_proj.{leaf}") for part in "qkv"]
            renamed[f"{stem}in_proj_{leaf}"] = np.concatenate(parts)
    extra = {"decoder.anchors": np.zeros((1, 4)), "decoder.valid_mask": np.zeros((1, 4))}
    extra |= {"decoder.decoder.layers.0.cross_attn.num_points_scale": np.zeros(4)}
    return {f"ema.module.{name}": value for name, value in (renamed | extra).items()}


@pytest.mark.parametrize("layout", [dict, as_state_dict, as_file, heads_twice, heads_outside, as_authors])
def test_weights_are_read_in_every_layout(layout):
    chex.assert_trees_all_equal(weights.from_torch(detector(), layout(written())), variables())


def test_heads_that_differ_are_refused():
    state = heads_twice(written())
    state["class_embed.0.bias"] = state["class_embed.0.bias"] + 1
    with pytest.raises(UserError, match=r"class_embed\.0\.bias matches no parameter"):
        weights.from_torch(detector(), state)


def test_other_classes_start_anew():
    state = as_file(written())
    with pytest.warns(UserWarning, match="every class starts at a probability of 0.01"):
        params, _ = weights.from_torch(detector(classes=5), state)
    assert params["decoder"]["denoising_class_embed"]["kernel"].shape == (8, 6)
    chex.assert_trees_all_equal(params["backbone"], variables()[0]["backbone"])
    with pytest.raises(UserError, match="weights are for 3 classes"):
        weights.from_torch(detector(classes=5), state, keep_classifiers=True)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"widths": [4, 8, 8]}, "widths of RT-DETR must be four whole numbers >= 1"),
        ({"stem": 3}, "stem of RT-DETR must be an even number, not 3"),
        ({"bottleneck": True, "widths": [4, 8, 8, 6]}, "widths of RT-DETR must be multiples of 4"),
        ({"encoder_channels": 6}, "encoder_channels of RT-DETR must be a multiple of 4 and of heads"),
        ({"channels": 9}, "channels of RT-DETR must be a multiple of heads, which is 2"),
        ({"eval_layers": 3}, r"eval_layers of RT-DETR must be within 1 .. 2, not 3"),
        ({"layers": 0}, "layers of RT-DETR must be >= 1, not 0"),
        ({"queries": 0}, "queries of RT-DETR must be >= 1"),
        ({"frozen_stages": 5}, "frozen_stages of RT-DETR must be -1, 0, 1, 2, 3 or 4"),
        ({"box_noise": 1.5}, r"box_noise of RT-DETR must be within 0 .. 1, not 1.5"),
        ({"expansion": 0.1}, "expansion of RT-DETR must be at least 0.125"),
    ],
)
def test_options_that_cannot_be(options, told):
    with pytest.raises(UserError, match=told):
        detectors.build("rtdetr_pico", CLASSES, **TINY | options)


def test_sizes_are_those_that_were_published():
    """Parameters in millions, of transformers' models, which keep the norms of deep backbones as buffers."""
    for name, millions in (("rtdetr_r18", 20.2), ("rtdetr_r34", 31.4), ("rtdetr_r50", 42.9), ("rtdetrv2_r101", 76.6)):
        count = sum(leaf.size for leaf in jax.tree.leaves(detectors.build(name, 80).shapes[0])) / 1e6
        assert count == pytest.approx(millions, abs=0.12), name
    assert (
        detectors.build("rtdetr_r50_m", 80).spec((SIDE, SIDE)).layers[2:]
        and len(detectors.build("rtdetr_r50_m", 80).spec((SIDE, SIDE)).layers) == 3
    )


def test_decode_takes_the_best_pairs_in_pixels():
    boxes = np.array([[[0.5, 0.5, 0.5, 1.0], [0.25, 0.5, 0.5, 0.5]]], np.float32)
    logits = np.array([[[0.0, 2.0], [1.0, -1.0]]], np.float32)
    output = DetectorOutput(strides=(8,), neck=(jnp.zeros((1, 4, 8, 1)),), layers=(Queries(logits, boxes),))
    found = detector().decode(output, np.array([[32, 64]]), score_threshold=0.3, max_detections=5)
    assert found.labels.tolist() == [[1, 0, 0, 0, 0]] and found.valid.tolist() == [[True, True, True, False, False]]
    np.testing.assert_allclose(found.boxes[0, :3], [[16, 0, 48, 32], [0, 8, 32, 24], [16, 0, 48, 32]])
    np.testing.assert_allclose(found.scores[0, :3], jax.nn.sigmoid(np.array([2.0, 1.0, 0.0])), rtol=1e-6)
    rows = detector().rows(output)
    np.testing.assert_allclose(rows.boxes, [[[16, 0, 48, 32], [0, 8, 32, 24]]])
    assert rows.form == "sigmoid" and rows.level_sizes == () and rows.location is None


@functools.cache
def step():
    """Gradients and new statistics of a training step of a detector whose stem and norms are frozen."""
    frozen = detector(frozen_stages=0, frozen_norm=True)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(size=(2, SIDE, SIDE, 3)), jnp.float32)
    boxes = np.array([[[4, 4, 40, 50], [10, 20, 60, 44]], [[8, 8, 30, 30], [0, 0, 0, 0]]], np.float32)
    valid, size = np.array([[True, True], [True, False]]), np.full((2, 2), SIDE, np.int32)
    targets = Targets(boxes, np.array([[1, 2], [0, 0]], np.int32), valid, size, size)

    def total(params, stats, key):
        output, new = frozen.apply(params, stats, x, train=True)
        losses = frozen.loss(output, targets, jax.lax.stop_gradient(frozen.assign(output, targets, key)))
        return sum(losses.values()), (losses, new)

    params, stats = frozen.init(jax.random.key(0))
    found = quick_jit(jax.grad(total, has_aux=True))(params, stats, jax.random.key(1))
    return frozen, flatten(found[0]), found[1][0], flatten(stats), flatten(found[1][1])


@pytest.mark.slow
def test_a_step_learns_all_that_is_not_frozen():
    _, gradient, losses, _, _ = step()
    assert set(losses) == {f"loss_{dn}{name}" for dn in ("", "dn_") for name in ("cls", "l1", "giou")}
    assert all(np.isfinite(value) and value > 0 for value in losses.values())
    still = {path for path, value in gradient.items() if not np.any(value)}
    norms = {path for path in gradient if re.match(r"backbone/\S+/bn/", path)}
    stem = {path for path in gradient if path.startswith("backbone/embedder/")}
    # The last layers of boxes begin at 0, so that nothing reaches what is before them.
    boxes = {path for path in gradient if re.search(r"bbox_(embed|head)\S*/layers/[01]/", path)}
    assert norms | stem <= still <= norms | stem | boxes


@pytest.mark.slow
def test_frozen_norms_keep_their_statistics():
    _, _, _, before, after = step()
    moved = {path for path in before if np.any(before[path] != after[path])}
    assert moved and not any(path.startswith("backbone/") for path in moved)


def test_weight_decay_is_for_kernels_that_are_trained():
    frozen = detector(frozen_stages=0, frozen_norm=True)
    spared = flatten(frozen.no_decay(variables()[0]))
    assert spared["backbone/embedder/0/conv/kernel"] and not spared["backbone/stages/0/0/layer/0/conv/kernel"]
    assert spared["decoder/layers/0/self_attn/q_proj/bias"] and not spared["decoder/denoising_class_embed/kernel"]


@pytest.mark.slow
def test_single_cells_are_another_answer_of_the_same_weights():
    x = jnp.asarray(np.random.default_rng(1).uniform(size=(1, SIDE, SIDE, 3)), jnp.float32)
    plain, discrete = (detector("rtdetrv2", discrete=one) for one in (False, True))
    run = [quick_jit(functools.partial(one.apply, train=False))(*variables(), x)[0] for one in (plain, discrete)]
    assert not np.allclose(run[0].layers[-1].logits, run[1].layers[-1].logits)
    chex.assert_trees_all_equal(run[0].neck, run[1].neck)
