"""YOLOX under its authors' module names."""

from kdjax.detectors.api import State

# The modules under the authors' and under mmdetection's names.
_BODY = (
    ("backbone.backbone.stem", "backbone.stem"),
    *((f"backbone.backbone.dark{stage + 1}", f"backbone.stage{stage}") for stage in (1, 2, 3, 4)),
    ("backbone.lateral_conv0", "neck.reduce_layers.0"),
    ("backbone.C3_p4", "neck.top_down_blocks.0"),
    ("backbone.reduce_conv1", "neck.reduce_layers.1"),
    ("backbone.C3_p3", "neck.top_down_blocks.1"),
    ("backbone.bu_conv2", "neck.downsamples.0"),
    ("backbone.C3_n3", "neck.bottom_up_blocks.0"),
    ("backbone.bu_conv1", "neck.downsamples.1"),
    ("backbone.C3_n4", "neck.bottom_up_blocks.1"),
)
_HEAD = (
    ("stems", "neck.out_convs"),
    ("cls_convs", "bbox_head.multi_level_cls_convs"),
    ("cls_preds", "bbox_head.multi_level_conv_cls"),
    ("reg_convs", "bbox_head.multi_level_reg_convs"),
    ("reg_preds", "bbox_head.multi_level_conv_reg"),
    ("obj_preds", "bbox_head.multi_level_conv_obj"),
)
_MODULES = (*_BODY, *((f"head.{old}.{level}", f"{new}.{level}") for level in range(3) for old, new in _HEAD))
# Parts of a CSP layer and of a separable convolution; the blocks' own conv1 and conv2 keep their names.
_CSP = {"conv1": "main_conv", "conv2": "short_conv", "m": "blocks", "conv3": "final_conv"}
_SEPARABLE = {"dconv": "depthwise_conv", "pconv": "pointwise_conv"}


def renamed(state: State) -> State:
    """The state dict of an authors' YOLOX under mmdetection's names; any other is returned unchanged.

    Example:
      >>> list(renamed({"backbone.backbone.dark2.1.conv1.conv.weight": 0, "head.cls_preds.0.bias": 0}))
      ['backbone.stage1.1.main_conv.conv.weight', 'bbox_head.multi_level_conv_cls.0.bias']
    """
    if not any(name.startswith("head.cls_preds.") for name in state):
        return state
    return {_renamed(name): value for name, value in state.items()}


def _renamed(name: str) -> str:
    for old, new in _MODULES:
        if not name.startswith(f"{old}."):
            continue
        parts = [_SEPARABLE.get(part, part) for part in name.removeprefix(f"{old}.").split(".")]
        # A stage holds its CSP layer at the end, the fourth behind the SPP.
        layer = parts[:1] if new.startswith("backbone.stage") else []
        csp = layer == ["2" if new.endswith("4") else "1"] if layer else "blocks" in new
        inner = parts[len(layer) :]
        if csp and inner[0] in _CSP:
            inner[0] = _CSP[inner[0]]
        return ".".join([new, *layer, *inner])
    return name
