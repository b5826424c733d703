"""YOLOX in its authors' form: their module names, and ONNX files without norms.

Their ONNX files hold every batch norm folded into the convolution before it, and name only the predictors; the other
convolutions are identified by the order in which the network runs them.
"""

from pathlib import Path

import numpy as np

from kdjax.detectors.api import Detector, State, flatten
from kdjax.detectors.cspdarknet import EPS
from kdjax.errors import UserError

# The modules under the authors' and under mmdetection's names, in the order in which they run.
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
_RUNS = ("main_conv", "short_conv", "blocks", "final_conv")  # of a CSP layer
# What `load_onnx` calls the convolutions that have no name of their own.
_UNNAMED = "onnx."
# The first version that reads no external data through `..` or links out of the folder of a file.
ONNX = (1, 21)


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


def load_onnx(path: Path) -> State:
    """Reads the convolutions of an ONNX file.

    Args:
      path: the file.

    Returns:
      Name -> array (OIHW). A convolution with a named kernel has that name ("head.cls_preds.0.weight"), the others
      "onnx.N.weight" and "onnx.N.bias", N counting all convolutions in the order in which they run.

    Raises:
      UserError: the file cannot be read, or the package onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError("reading it needs onnx: install the extra kdjax[export]") from error
    if tuple(int(part) for part in onnx.__version__.split(".")[:2]) < ONNX:
        raise UserError(
            f"reading it needs onnx {'.'.join(map(str, ONNX))} or newer, not {onnx.__version__}: older ones may read "
            "external data outside of the folder"
        )
    try:
        graph = onnx.load(str(path)).graph
        arrays = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    except Exception as error:  # protobuf raises many types
        raise UserError(f"the weights cannot be read: {error}") from error
    state = {}
    for number, node in enumerate(node for node in graph.node if node.op_type == "Conv"):
        absent = [name for name in node.input[1:] if name not in arrays]
        if absent:
            missing = f"{', '.join(absent)} of {node.name}"
            raise UserError(f"the weights cannot be read: {missing} is not stored in the file")
        for name, leaf in zip(node.input[1:], ("weight", "bias"), strict=False):
            own = name if name.endswith(f".{leaf}") else f"{_UNNAMED}{number}.{leaf}"
            state[own] = arrays[name]
    return state


def is_folded(state: State) -> bool:
    """Whether a state is one of `load_onnx`."""
    return any(name.startswith(_UNNAMED) for name in state)


def unfolded(detector: Detector, state: State) -> State:
    """Names the convolutions of `load_onnx`, and adds to each a norm that only adds its bias.

    The norm has mean 0, variance 1 - eps and scale 1, so the network computes what the file does as long as it is not
    trained: the folded statistics cannot be recovered.

    Args:
      detector: a YOLOX.
      state: of `load_onnx` and `renamed`.

    Returns:
      A state dict under mmdetection's names. Where the number of convolutions differs, surplus ones keep their name.

    Raises:
      UserError: the detector is not a YOLOX.
    """
    if not detector.name.startswith("yolox_"):
        raise UserError(f"weights in ONNX files can only be read for YOLOX, not for {detector.name}")
    named = dict(state)
    for number, module in enumerate(_in_order(detector)):
        kernel, bias = (named.pop(f"{_UNNAMED}{number}.{leaf}", None) for leaf in ("weight", "bias"))
        if kernel is None or bias is None:
            continue
        norm = module.removesuffix("conv") + "bn"
        ones = np.ones_like(bias)
        named |= {f"{module}.weight": kernel, f"{norm}.weight": ones, f"{norm}.bias": bias}
        named |= {f"{norm}.running_mean": 0 * ones, f"{norm}.running_var": (1 - EPS) * ones}
    return named


def _in_order(detector: Detector) -> list[str]:
    """The convolutions of a YOLOX under mmdetection's names, in the order in which the authors' network runs them."""
    order = {new: place for place, (_, new) in enumerate(_MODULES)}

    def place(module: str) -> tuple[int, list[tuple[bool, int, str]]]:
        parts = module.split(".")
        within = next(count for count in range(len(parts), 0, -1) if ".".join(parts[:count]) in order)
        rest = [str(_RUNS.index(part)) if part in _RUNS else part for part in parts[within:]]
        # Numbers before names: the blocks of a layer by number.
        return order[".".join(parts[:within])], [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in rest]

    paths = (path for path in flatten(detector.shapes[0]) if path.endswith("/kernel"))
    return sorted((path.removesuffix("/kernel").replace("/", ".") for path in paths), key=place)
