"""The names and values of torchvision's Faster and Mask R-CNN (v1) under those of mmdetection.

torchvision puts the background first, and its boxes have outputs for it too. The norms of its published weights add
nothing to the variance (eps = 0), which is taken into their scales.
"""

import re

import numpy as np

from kdjax.detectors.api import State
from kdjax.detectors.layers import EPS

# Those of 0.3 (the published files) and of later versions.
_NAMES = (
    (r"backbone\.body\.", "backbone."),
    (r"backbone\.fpn\.inner_blocks\.(\d)(?:\.0)?\.", r"neck.lateral_convs.\1.conv."),
    (r"backbone\.fpn\.layer_blocks\.(\d)(?:\.0)?\.", r"neck.fpn_convs.\1.conv."),
    (r"rpn\.head\.conv(?:\.0\.0)?\.", "rpn_head.rpn_conv."),
    (r"rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
    (r"rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
    (r"roi_heads\.box_head\.fc6\.", "roi_head.bbox_head.shared_fcs.0."),
    (r"roi_heads\.box_head\.fc7\.", "roi_head.bbox_head.shared_fcs.1."),
    (r"roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
    (r"roi_heads\.mask_head\.mask_fcn([1-4])\.", lambda m: f"roi_head.mask_head.convs.{int(m[1]) - 1}.conv."),
    (r"roi_heads\.mask_head\.(\d)\.0\.", r"roi_head.mask_head.convs.\1.conv."),
    (r"roi_heads\.mask_predictor\.conv5_mask\.", "roi_head.mask_head.upsample."),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi_head.mask_head.conv_logits."),
)
_MARK = "backbone.body.conv1.weight"
# The numbers below 91 that no category of COCO has.
_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)


def renamed(state: State) -> State:
    """The state dict of torchvision under mmdetection's names, its classes in that order; others are returned as is.

    Of 91 classes, those of COCO's own numbers, the 80 that exist are kept, so that the softmax leaves out ten logits.

    Example:
      >>> renamed({"backbone.body.conv1.weight": np.zeros(1), "rpn.head.conv.bias": np.zeros(2)}).keys()
      dict_keys(['backbone.conv1.weight', 'rpn_head.rpn_conv.bias'])
    """
    if _MARK not in state:
        return state
    named = {}
    for name, value in state.items():
        for pattern, new in _NAMES:
            found, count = re.subn(f"^{pattern}", new, name)
            if count:
                name = found
                break
        named[name] = value
    for name in [name for name in named if name.endswith(".running_var")]:
        scale, variance = name.replace("running_var", "weight"), np.asarray(named[name])
        with np.errstate(divide="ignore", invalid="ignore"):
            named[scale] = np.asarray(named[scale] * np.sqrt((variance + EPS) / variance), np.float32)
    for module, outputs in (("bbox_head.fc_cls", 1), ("bbox_head.fc_reg", 4), ("mask_head.conv_logits", 1)):
        for leaf in ("weight", "bias"):
            name = f"roi_head.{module}.{leaf}"
            if name not in named:
                continue
            by_class = np.reshape(named[name], (-1, outputs, *np.shape(named[name])[1:]))
            kept = [i for i in range(1, len(by_class)) if len(by_class) != 91 or i not in _UNUSED]
            chosen = by_class[kept + [0] * (module == "bbox_head.fc_cls")]
            named[name] = chosen.reshape(-1, *chosen.shape[2:])
    return named
