"""D-FINE: sizes, what its layers refine, where gradients go, names of weights.

What it computes is compared with the peers by the golden replay (`tests/golden_checks/dfine.py` and `detr_grad.py`).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import weights
from kdjax.detectors import api, build, detr_names, hgnetv2
from kdjax.errors import UserError
from kdjax.structs import Targets
from kdjax.weights import folder, torch_names
from tests.support.arrays import quick_jit

SIDE, CLASSES, BATCH = 64, 3, 2
TINY = dict(
    stem=[4, 4], middle=[4, 4, 4, 4], widths=[4, 8, 8, 8], blocks=[1, 1, 1, 1], block_layers=[1, 1, 1, 1],
    encoder_channels=8, encoder_hidden=8, repeats=1, channels=8, heads=2, hidden=8, layers=2, queries=6, bins=8,
    points=[2, 1], denoising=2,
)  # fmt: skip


def tiny(**options):
    return build("dfine_n", CLASSES, **TINY | options)


@pytest.mark.parametrize(("variant", "millions"), [("n", 3.78), ("s", 10.32), ("m", 19.59), ("l", 31.29), ("x", 62.72)])
def test_sizes_are_the_published_ones(variant, millions):
    """4, 10, 19, 31 and 62 million, as the authors count."""
    shapes = api.flatten(build(f"dfine_{variant}", 80).shapes[0]).values()
    assert round(sum(math.prod(leaf.shape) for leaf in shapes) / 1e6, 2) == millions


@pytest.mark.parametrize(("points", "strides"), [([2, 1], (16, 32)), ([1, 2, 1], (8, 16, 32))])
def test_taps_have_their_shapes(points, strides):
    detector = build("dfine_s", CLASSES, **TINY | {"points": points, "encoder_channels": 12})
    output = detector.spec((64, 96))
    assert detector.strides == output.strides == output.backbone_strides == strides
    assert [m.shape[1:] for m in output.backbone] == [(64 // s, 96 // s, 8) for s in strides]
    assert [m.shape[1:] for m in output.neck] == [(64 // s, 96 // s, 12) for s in strides]
    for layer in output.layers:
        shapes = [x.shape[1:] for x in layer]
        assert shapes == [(6, CLASSES), (6, 4), (6, 8), (6, 4, 9), (6, 4)]
    assert len(output.layers) == 2 and output.first.boxes.shape == output.selected.boxes.shape == (1, 6, 4)
    rows = output.rows
    assert rows.logits.shape == (1, 6, CLASSES) and rows.boxes.shape == (1, 6, 4)
    assert rows.distribution.shape == (1, 6, 4, 9) and rows.level_sizes == ()


def test_maps_may_be_bfloat16_and_predictions_are_float32():
    detector = tiny()
    x = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.bfloat16)
    output, stats = jax.eval_shape(functools.partial(detector.apply, train=True), *detector.shapes, x)
    assert {m.dtype for m in (*output.backbone, *output.neck)} == {jnp.dtype(jnp.bfloat16)}
    exact = [x for layer in output.layers for x in (layer.logits, layer.boxes, layer.corners, layer.reference)]
    exact += [output.first.boxes, output.selected.boxes, *jax.tree.leaves(stats)]
    assert {leaf.dtype for leaf in exact} == {jnp.dtype(jnp.float32)}


def targets():
    boxes = np.zeros((BATCH, 3, 4), np.float32)
    boxes[0, 0], boxes[0, 1], boxes[1, 0] = [4, 6, 30, 40], [20, 30, 60, 62], [10, 2, 50, 30]
    valid = boxes.any(-1)
    size = np.full((BATCH, 2), SIDE, np.int32)
    return Targets(boxes, np.array([[1, 2, 0], [0, 0, 0]], np.int32), valid, size, size)


def step(detector, params, stats, key):
    """The gradient of the losses, and these."""
    x = jax.random.normal(jax.random.key(5), (BATCH, SIDE, SIDE, 3))

    def total(params):
        output, _ = detector.apply(params, stats, x, train=True)
        losses = detector.loss(output, targets(), detector.assign(output, targets(), key))
        return sum(losses.values()), losses

    return jax.device_get(quick_jit(jax.grad(total, has_aux=True))(params))


@pytest.mark.slow
def test_a_step_reaches_every_parameter_that_is_trained():
    detector = tiny(frozen_stem=True, affine=True, encoder_channels=12, denoising=4)
    rng = np.random.default_rng(0)
    params, stats = detector.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), params)
    gradient, losses = step(detector, params, stats, jax.random.key(1))
    names = {f"loss_{part}{name}" for part in ("", "dn_") for name in ("cls", "l1", "giou", "fgl", "ddf")}
    assert set(losses) == names and all(np.isfinite(value) and value > 0 for value in losses.values())
    for path, leaf in api.flatten(gradient).items():
        assert np.isfinite(leaf).all()
        if hgnetv2.is_frozen(path, True):
            assert not leaf.any(), path
        elif path.endswith("/kernel"):  # a shift that the next norm takes away again has no gradient
            assert leaf.any(), path
    assert not gradient["decoder"]["denoising_class_embed"]["kernel"][:, -1].any()


def test_norms_biases_and_frozen_parts_have_no_decay():
    detector = tiny(frozen_stem=True, affine=True)
    free = api.flatten(detector.no_decay(detector.shapes[0]))
    layer = "backbone/stages/0/blocks/0/layers/0"
    assert free["backbone/embedder/stem1/conv/kernel"] and free["encoder/aifi/fc1/bias"]
    assert free[f"{layer}/activation/factor"] and free["decoder/layers/0/gateway/norm/scale"]
    assert not free[f"{layer}/conv/kernel"] and not free["decoder/heads/bbox_embed/0/layers/0/kernel"]


# transformers' `state_dict()`, what it saves, the authors' names; kdjax's path.
NAMES = [
    ("model.backbone.model.embedder.stem2a.lab.scale", "", "backbone.stem.stem2a.lab.scale",
     "backbone/embedder/stem2a/activation/factor"),
    ("model.backbone.model.encoder.stages.2.downsample.normalization.running_var", "",
     "backbone.stages.2.downsample.bn.running_var", "backbone/stages/2/downsample/bn/var"),
    ("model.backbone.model.encoder.stages.2.blocks.0.layers.0.conv2.convolution.weight", "",
     "backbone.stages.2.blocks.0.layers.0.conv2.conv.weight",
     "backbone/stages/2/blocks/0/layers/0/conv2/conv/kernel"),
    ("model.backbone.model.encoder.stages.0.blocks.0.aggregation.1.normalization.bias", "",
     "backbone.stages.0.blocks.0.aggregation.1.bn.bias", "backbone/stages/0/blocks/0/aggregation/1/bn/bias"),
    ("model.encoder_input_proj.0.1.weight", "", "encoder.input_proj.0.norm.weight", "encoder/input_proj/0/bn/scale"),
    ("model.encoder.aifi.0.layers.0.mlp.layers.1.weight", "model.encoder.encoder.0.layers.0.fc2.weight",
     "encoder.encoder.0.layers.0.linear2.weight", "encoder/aifi/fc2/kernel"),
    ("model.encoder.aifi.0.layers.0.self_attn.o_proj.bias", "model.encoder.encoder.0.layers.0.self_attn.out_proj.bias",
     "encoder.encoder.0.layers.0.self_attn.out_proj.bias", "encoder/aifi/self_attn/out_proj/bias"),
    ("model.encoder.fpn_blocks.0.conv1.conv.weight", "", "encoder.fpn_blocks.0.cv1.conv.weight",
     "encoder/fpn_blocks/0/conv1/conv/kernel"),
    ("model.encoder.pan_blocks.0.csp_rep2.bottlenecks.0.conv2.norm.running_mean", "",
     "encoder.pan_blocks.0.cv3.0.bottlenecks.0.conv2.norm.running_mean",
     "encoder/pan_blocks/0/csp_rep2/bottlenecks/0/conv2/bn/mean"),
    ("model.encoder.fpn_blocks.0.csp_rep1.conv1.conv.weight", "", "encoder.fpn_blocks.0.cv2.0.conv1.conv.weight",
     "encoder/fpn_blocks/0/csp_rep1/conv1/conv/kernel"),
    ("model.encoder.fpn_blocks.0.conv3.norm.bias", "", "encoder.fpn_blocks.0.cv3.1.norm.bias",
     "encoder/fpn_blocks/0/conv3/bn/bias"),
    ("model.encoder.downsample_convs.0.conv2.conv.weight", "", "encoder.downsample_convs.0.0.cv2.conv.weight",
     "encoder/downsample_convs/0/conv2/conv/kernel"),
    ("model.decoder_input_proj.1.0.weight", "", "decoder.input_proj.1.conv.weight", "decoder_input_proj/1/conv/kernel"),
    ("model.enc_output.0.weight", "", "decoder.enc_output.proj.weight", "decoder/enc_output/0/kernel"),
    ("model.enc_output.1.bias", "", "decoder.enc_output.norm.bias", "decoder/enc_output/1/bias"),
    ("model.denoising_class_embed.weight", "", "decoder.denoising_class_embed.weight",
     "decoder/denoising_class_embed/kernel"),
    ("model.decoder.layers.1.gateway.norm.weight", "", "decoder.decoder.layers.1.gateway.norm.weight",
     "decoder/layers/1/gateway/norm/scale"),
    ("model.decoder.layers.0.mlp.layers.0.bias", "model.decoder.layers.0.fc1.bias",
     "decoder.decoder.layers.0.linear1.bias", "decoder/layers/0/fc1/bias"),
    ("model.decoder.layers.0.encoder_attn.sampling_offsets.bias", "",
     "decoder.decoder.layers.0.cross_attn.sampling_offsets.bias",
     "decoder/layers/0/encoder_attn/sampling_offsets/bias"),
    ("model.decoder.layers.0.final_layer_norm.weight", "", "decoder.decoder.layers.0.norm3.weight",
     "decoder/layers/0/final_layer_norm/scale"),
    ("model.decoder.bbox_embed.1.layers.2.weight", "", "decoder.dec_bbox_head.1.layers.2.weight",
     "decoder/heads/bbox_embed/1/layers/2/kernel"),
    ("model.decoder.pre_bbox_head.layers.0.bias", "", "decoder.pre_bbox_head.layers.0.bias",
     "decoder/heads/pre_bbox_head/layers/0/bias"),
    ("model.decoder.lqe_layers.0.reg_conf.layers.1.weight", "",
     "decoder.decoder.lqe_layers.0.reg_conf.layers.1.weight",
     "decoder/heads/lqe_layers/0/reg_conf/layers/1/kernel"),
    ("model.decoder.query_pos_head.layers.1.bias", "", "decoder.query_pos_head.layers.1.bias",
     "decoder/query_pos_head/layers/1/bias"),
]  # fmt: skip


@pytest.mark.parametrize("layout", range(3), ids=["state_dict", "file", "authors"])
def test_names_of_the_peers_are_read(layout):
    detector = tiny(encoder_channels=12)
    own = set(torch_names.table(detector))
    state = {(names[layout] or names[0]).removeprefix("model."): np.float32(i) for i, names in enumerate(NAMES)}
    state |= {"decoder.decoder.up" if layout == 2 else "decoder.up": np.ones(1)}
    found = detr_names.renamed(state)
    for i, names in enumerate(NAMES):
        path = names[-1]
        assert f"{'stats' if path.endswith(('/mean', '/var')) else 'params'}/{path}" in own, path
        assert found[torch_names.torch_name(path)] == i, path
    assert "decoder.up" in found


def test_the_scale_of_the_bins_is_read_from_the_weights():
    detector = tiny(scale=8.0)
    params, stats = detector.init(jax.random.key(0))
    state = weights.to_torch(detector, params, stats)
    assert state["decoder.reg_scale"].tolist() == [8] and state["decoder.up"].tolist() == [0.5]
    read = folder.infer_options(tiny(), state)
    assert read is detector
    with pytest.raises(UserError, match=r"decoder\.reg_scale must be 4"):
        weights.from_torch(tiny(), state)
    again = weights.from_torch(read, state)
    assert all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, ((params, stats), again)), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": [3, 6]}, None),
        ({"points": [3, 6, 3, 3]}, "points of D-FINE must be 2 or 3 whole numbers >= 1, not"),
        ({"widths": [8, 8, 8]}, "widths of D-FINE must be 4 whole numbers >= 2"),
        ({"bins": 7}, "bins of D-FINE must be an even number >= 4, not 7"),
        ({"channels": 9}, "channels of D-FINE must be a multiple of heads, which is 2, not 9"),
        ({"encoder_channels": 10}, "encoder_channels of D-FINE must be a multiple of 4 and of heads"),
        ({"scale": 0.0}, "scale of D-FINE must be > 0"),
        ({"expansion": 0.01}, "expansion of D-FINE must be at least 0.25, not 0.01"),
        ({"label_noise": 1.5}, "label_noise of D-FINE must be within 0 .. 1"),
        ({"queries": 0}, "queries of D-FINE must be >= 1, not 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    if message is None:
        assert tiny(**options).strides == (16, 32)
        return
    with pytest.raises(UserError, match=message):
        tiny(**options)
