"""ONNX files of networks that PyTorch ran: every batch norm is folded into the convolution before it.

Such a file names only the convolutions without a norm (predictors, channel attention); the others are identified by the
order in which the network runs them (`kdjax.detectors.api.TorchNames.runs`).
"""

from pathlib import Path

import numpy as np

from kdjax.detectors.api import UNNAMED, Detector, State, flatten
from kdjax.errors import UserError

# The first version that reads no external data through `..` or links out of the folder of a file.
ONNX = (1, 21)


def load_onnx(path: Path) -> State:
    """Reads the convolutions of an ONNX file.

    Args:
      path: the file.

    Returns:
      Name -> array (OIHW). A convolution with a named kernel has that name ("bbox_head.rtm_cls.0.weight"), the others
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
            own = name if name.endswith(f".{leaf}") else f"{UNNAMED}{number}.{leaf}"
            state[own] = arrays[name]
    return state


def is_folded(state: State) -> bool:
    """Whether a state is one of `load_onnx`."""
    return any(name.startswith(UNNAMED) for name in state)


def unfolded(detector: Detector, state: State) -> State:
    """Names the convolutions of `load_onnx`, and adds to each a norm that only adds its bias.

    The norm has mean 0, variance 1 - eps and scale 1, so the network computes what the file does as long as it is not
    trained: the folded statistics cannot be recovered.

    Args:
      detector: of the family that the file is of.
      state: of `load_onnx`, under mmdetection's names.

    Returns:
      A state dict under mmdetection's names. Where the number of convolutions differs, surplus ones keep their name.

    Raises:
      UserError: it is not known in which order the detector's convolutions run.
    """
    if not detector.torch.runs:
        raise UserError(f"weights in ONNX files can only be read for YOLOX and RTMDet, not for {detector.name}")
    named = dict(state)
    for number, module in enumerate(in_order(detector)):
        kernel, bias = (named.pop(f"{UNNAMED}{number}.{leaf}", None) for leaf in ("weight", "bias"))
        if kernel is None or bias is None:
            continue
        norm = module.removesuffix("conv") + "bn"
        ones = np.ones_like(bias)
        named |= {f"{module}.weight": kernel, f"{norm}.weight": ones, f"{norm}.bias": bias}
        named |= {f"{norm}.running_mean": 0 * ones, f"{norm}.running_var": (1 - detector.torch.eps) * ones}
    return named


def in_order(detector: Detector) -> list[str]:
    """The convolutions of a detector under mmdetection's names, in the order in which they run in PyTorch."""
    order = {name: place for place, name in enumerate(detector.torch.runs)}

    def rank(part: str) -> tuple[int, int, str]:
        """Numbers, then what is listed, then the rest by name."""
        return (0, int(part), "") if part.isdigit() else (1, order[part], "") if part in order else (2, 0, part)

    def place(module: str) -> tuple[int, list[tuple[int, int, str]]]:
        parts = module.split(".")
        within = next(count for count in range(len(parts), 0, -1) if ".".join(parts[:count]) in order)
        return order[".".join(parts[:within])], [rank(part) for part in parts[within:]]

    paths = (path for path in flatten(detector.shapes[0]) if path.endswith("/kernel"))
    return sorted((path.removesuffix("/kernel").replace("/", ".") for path in paths), key=place)
