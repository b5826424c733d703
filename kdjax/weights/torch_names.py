"""The table of names between a detector's parameters and a PyTorch state dict, and the layout of its arrays."""

import collections

import numpy as np

from kdjax.detectors.api import Detector, State, flatten
from kdjax.errors import listed
from kdjax.weights import torchvision, yolox
from kdjax.weights.wrappers import unwrap

# Paths follow mmdetection's module names (those of torchvision and timm in a ResNet); only the leaves are renamed.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "factor": "scale",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
COUNTERS = "num_batches_tracked"  # of batch norms in PyTorch; kdjax has none


def table(detector: Detector) -> dict[str, list[str]]:
    """The table of names: "params/path" or "stats/path" -> the names in a PyTorch state dict.

    There are several where PyTorch stores what several modules share several times. The observed ranges of int8 are not
    in it.

    Example:
      >>> from kdjax.detectors import build
      >>> table(build("rtmdet_pico", 5))["stats/backbone/stem/0/bn/mean"]
      ['backbone.stem.0.bn.running_mean']
    """
    params, stats = (flatten(tree) for tree in detector.shapes)
    return {
        f"{side}/{path}": [torch_name(copy) for copy in (path, *detector.torch.copies(path))]
        for side, paths in (("params", params), ("stats", stats))
        for path in paths
        if path.rpartition("/")[2] in _LEAVES
    }


def torch_name(path: str) -> str:
    """The name in a state dict of the array at a path of params or stats."""
    *modules, leaf = path.split("/")
    return ".".join([*modules, _LEAVES[leaf]])


def torch_shape(shape: tuple[int, ...], path: str) -> tuple[int, ...]:
    """The shape in PyTorch of the array at a path: OIHW for HWIO kernels, (out, in) for those of linear layers."""
    if not path.endswith("/kernel"):
        return tuple(shape)
    return tuple(shape[axis] for axis in ((3, 2, 0, 1) if len(shape) == 4 else (1, 0)))


def from_torch_layout(value: np.ndarray, path: str) -> np.ndarray:
    """The float32 array for a path from its array in PyTorch's layout."""
    value = np.asarray(value, np.float32)
    if not path.endswith("/kernel") or value.ndim not in (2, 4):
        return value
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def to_torch_layout(value: np.ndarray, path: str) -> np.ndarray:
    """The inverse of `from_torch_layout`."""
    if not path.endswith("/kernel"):
        return value
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def is_classifier(detector: Detector, path: str) -> bool:
    """Whether the array at a path of params belongs to a layer whose outputs are the classes.

    Example:
      >>> from kdjax.detectors import build
      >>> is_classifier(build("rtmdet_pico", 5), "bbox_head/rtm_cls/0/kernel")
      True
    """
    return path.startswith(tuple(f"{module}/" for module in detector.classifiers))


def plain(detector: Detector, state: State, network: str = "student") -> State:
    """The state dict of one network under the detector's names, without the prefixes of wrappers.

    Args:
      detector: of the family that the state dict is of.
      state: name -> array.
      network: "student" or "teacher", for the state dict of a distiller that holds both.

    Returns:
      name -> array.

    Raises:
      UserError: unknown `network`.

    Example:
      >>> from kdjax.detectors import build
      >>> state = {"architecture.bbox_head.head_module.rtm_cls.0.bias": np.zeros(3)}
      >>> list(plain(build("rtmdet_pico", 3), state))
      ['bbox_head.rtm_cls.0.bias']
    """
    state = unwrap(state, network)
    own = {part for names in table(detector).values() for name in names for part in name.split(".")}
    if "module" not in own:  # a wrapper around a part of the network
        state = {name.replace(".module.", "."): value for name, value in state.items()}
    return detector.torch.rename(torchvision.renamed(yolox.renamed(state)))


def foreign(detector: Detector, state: State) -> str:
    """Why no name of a state dict is one of the detector's; "" if some are.

    Args:
      detector: of the family that the state dict should be of.
      state: of `plain`.

    Example:
      >>> from kdjax.detectors import build
      >>> foreign(build("rtmdet_pico", 3), {"net.bbox_head.rtm_cls.0.bias": np.zeros(3)})
      "its names have the unknown prefix 'net.' (net.bbox_head.rtm_cls.0.bias): save the weights without it"
    """
    own = {name for names in table(detector).values() for name in names}
    prefix, inner = "", state
    while inner and not own & set(plain(detector, inner)):
        firsts = collections.Counter(name.partition(".")[0] for name in inner if "." in name)
        if all(name.startswith(("params/", "stats/")) for name in inner):
            return "it is the file of a kdjax model, which names its detector: give its folder, without a detector"
        if not firsts:
            names = listed(sorted(state), 3)
            return f"its names ({names}) are not those of {detector.name}: choose the detector that they are of"
        first = firsts.most_common(1)[0][0] + "."
        prefix += first
        inner = {name.removeprefix(first): value for name, value in inner.items() if name.startswith(first)}
    if not prefix:
        return ""
    return f"its names have the unknown prefix {prefix!r} ({prefix}{min(inner)}): save the weights without it"
