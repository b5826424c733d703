"""torchvision's names and values of Faster and Mask R-CNN, made here from the detector's own."""

import re

import jax
import numpy as np
import pytest

from kdjax import weights
from kdjax.detectors import build, rpn
from kdjax.detectors.api import flatten
from kdjax.weights import torchvision

TINY = {"faster_rcnn_r18": dict(base_channels=4, neck_channels=8, head_channels=16)}
TINY["mask_rcnn_r18"] = TINY["faster_rcnn_r18"] | dict(mask_channels=4)
NAMES = (  # torchvision's names since 0.14, and those of the published files
    ("backbone.", "backbone.body.", "backbone.body."),
    ("neck.lateral_convs.N.conv.", "backbone.fpn.inner_blocks.N.0.", "backbone.fpn.inner_blocks.N."),
    ("neck.fpn_convs.N.conv.", "backbone.fpn.layer_blocks.N.0.", "backbone.fpn.layer_blocks.N."),
    ("rpn_head.rpn_conv.", "rpn.head.conv.0.0.", "rpn.head.conv."),
    ("rpn_head.rpn_cls.", "rpn.head.cls_logits.", "rpn.head.cls_logits."),
    ("rpn_head.rpn_reg.", "rpn.head.bbox_pred.", "rpn.head.bbox_pred."),
    ("roi_head.bbox_head.shared_fcs.0.", "roi_heads.box_head.fc6.", "roi_heads.box_head.fc6."),
    ("roi_head.bbox_head.shared_fcs.1.", "roi_heads.box_head.fc7.", "roi_heads.box_head.fc7."),
    ("roi_head.bbox_head.fc_cls.", "roi_heads.box_predictor.cls_score.", "roi_heads.box_predictor.cls_score."),
    ("roi_head.bbox_head.fc_reg.", "roi_heads.box_predictor.bbox_pred.", "roi_heads.box_predictor.bbox_pred."),
    ("roi_head.mask_head.upsample.", "roi_heads.mask_predictor.conv5_mask.", "roi_heads.mask_predictor.conv5_mask."),
    ("roi_head.mask_head.conv_logits.", *["roi_heads.mask_predictor.mask_fcn_logits."] * 2),
    *(
        (f"roi_head.mask_head.convs.{i}.conv.", f"roi_heads.mask_head.{i}.0.", f"roi_heads.mask_head.mask_fcn{i + 1}.")
        for i in range(4)
    ),
)


def as_torchvision(state, column=1):
    """A state dict as torchvision has it: its names, the background first, boxes for the background too."""
    out = {}
    for name, value in state.items():
        for names in NAMES:
            pattern = re.escape(names[0]).replace("N", r"(\d)")
            new, count = re.subn(f"^{pattern}", names[column].replace("N", r"\1"), name)
            if count:
                break
        if "fc_cls" in name:
            value = np.concatenate([value[-1:], value[:-1]])
        if "fc_reg" in name or "conv_logits" in name:
            value = np.concatenate([np.full_like(value[: 4 if "fc_reg" in name else 1], 7), value])
        out[new] = value
    return out


@pytest.mark.user_input(
    "Weights",
    "a state dict of torchvision's Faster or Mask R-CNN (v1), also with the names of its published files",
    "read: classes in its order, boxes with its coding",
)
@pytest.mark.parametrize("column", [1, 2])
@pytest.mark.parametrize(("name", "classes"), [("faster_rcnn_r18", 3), ("mask_rcnn_r18", 80)])
def test_names_classes_and_norms(column, name, classes):
    detector = build(name, classes, **TINY[name])
    params, stats = detector.init(jax.random.key(0))
    stats = jax.tree.map(lambda leaf: leaf + 0.01, stats)
    state = as_torchvision(weights.to_torch(detector, params, stats), column)
    if classes == 80:  # COCO's 90 numbers
        numbers = np.cumsum([i not in torchvision._UNUSED for i in range(91)])
        for module in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits"):
            for leaf in ("weight", "bias"):
                name = f"roi_heads.{module}.{leaf}"
                by_class = state[name].reshape(81, -1, *state[name].shape[1:])
                state[name] = by_class[numbers - 1].reshape(-1, *state[name].shape[1:])
        assert len(state["roi_heads.box_predictor.cls_score.bias"]) == 91
    assert weights.infer_options(detector, state).options["peer"] == "torchvision"
    got, got_stats = weights.from_torch(detector, state)
    old = flatten(params)
    for path, value in flatten(got).items():
        if path.endswith("/scale"):  # without the constant beside the variance
            variance = np.asarray(flatten(stats)[path.replace("scale", "var")])
            np.testing.assert_allclose(value / np.sqrt(variance + 1e-5), old[path] / np.sqrt(variance), rtol=1e-5)
        else:
            np.testing.assert_array_equal(value, old[path], err_msg=path)
    for path, value in flatten(got_stats).items():
        np.testing.assert_array_equal(value, flatten(stats)[path])


def test_boxes_are_those_of_rounded_anchors():
    """The same boxes as from anchors whose corners, around the middle, are rounded."""
    rng = np.random.default_rng(0)
    for stride in rpn.STRIDES:
        plain = rpn.priors.grid_anchors((stride, stride), (stride,), ratios=rpn.RATIOS, scales=rpn.SCALES)
        deltas = rng.normal(0, 0.3, plain.shape).astype(np.float32)
        scale, shift = (part.reshape(-1, 4) for part in rpn._of_rounded(stride))
        got = rpn.coding.deltas_to_boxes(plain, deltas * scale + shift)
        np.testing.assert_allclose(got, rpn.coding.deltas_to_boxes(np.round(plain), deltas), rtol=1e-5, atol=1e-3)
    assert np.round(plain).tolist()[0] == [-362, -181, 362, 181]
