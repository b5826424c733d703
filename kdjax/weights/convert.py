"""Fills a detector from a PyTorch state dict with mmdetection's names, or an ONNX file of YOLOX, and writes one."""

import pickle
import re
import warnings
import zipfile
import zlib
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_safetensors

from kdjax.detectors.api import Detector, Tree, flatten, unflatten
from kdjax.weights import yolox

# Our paths follow mmdetection's module names (those of torchvision and timm in a ResNet); only the leaves are renamed.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "factor": "scale",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# RTMDet's towers: PyTorch stores a convolution that the levels share once for each level.
_TOWER = re.compile(r"(bbox_head/(?:cls|reg)_convs)/0/(\d+/conv/kernel)")
# Layers whose outputs are the classes, of every anchor of a cell.
_CLASSIFIER = re.compile(
    r"bbox_head\.(rtm_cls\.\d+|retina_cls|conv_cls|gfl_cls|atss_cls|multi_level_conv_cls\.\d+)\.(weight|bias)"
)
# What a state dict holds beside weights: counters, and the bins 0 .. n of GFL's distributions.
_COUNTERS, _BINS, _BINS_OF = "num_batches_tracked", "bbox_head.integral.project", "bbox_head.gfl_reg.bias"
# A state dict with this name is that of a ResNet without a detector around it.
_STEM = "conv1.weight"
# What mmyolo's RTMDet calls otherwise; its modules are the same.
_MMYOLO_HEAD = "bbox_head.head_module."
_MMYOLO = (
    (_MMYOLO_HEAD, "bbox_head."),
    ("neck.reduce_layers.2.", "neck.reduce_layers.0."),
    ("neck.top_down_layers.0.0.", "neck.top_down_blocks.0."),
    ("neck.top_down_layers.0.1.", "neck.reduce_layers.1."),
    ("neck.top_down_layers.1.", "neck.top_down_blocks.1."),
    ("neck.downsample_layers.", "neck.downsamples."),
    ("neck.bottom_up_layers.", "neck.bottom_up_blocks."),
    ("neck.out_layers.", "neck.out_convs."),
)

_FORMATS = (".npz", ".safetensors", ".pth", ".onnx")


def torch_names(detector: Detector) -> dict[str, list[str]]:
    """The table of names: "params/path" or "stats/path" of ours -> the names in a PyTorch state dict.

    There are several where PyTorch stores a shared convolution several times.

    Example:
      >>> from kdjax.detectors import build
      >>> torch_names(build("rtmdet_pico", 5))["stats/backbone/stem/0/bn/mean"]
      ['backbone.stem.0.bn.running_mean']
    """
    params, stats = (flatten(tree) for tree in detector.shapes)
    table = {}
    for prefix, paths in (("params", params), ("stats", stats)):
        for path in paths:
            copies = [path]
            if shared := _TOWER.fullmatch(path):
                levels = range(1, len(detector.strides))
                others = [f"{shared[1]}/{level}/{shared[2]}" for level in levels]
                copies += [other for other in others if other not in params]
            table[f"{prefix}/{path}"] = [_torch_name(copy) for copy in copies]
    return table


def _torch_name(path: str) -> str:
    *modules, leaf = path.split("/")
    return ".".join([*modules, _LEAVES[leaf]])


def from_torch(
    detector: Detector,
    state: dict[str, np.ndarray],
    *,
    network: str = "student",
    key: jax.Array | None = None,
    other_classes: bool = False,
    keep_classifiers: bool = False,
) -> tuple[Tree, Tree]:
    """Fills a detector from a PyTorch state dict.

    Understood are mmdetection's names, mmyolo's of RTMDet and the authors' of YOLOX, behind `module.` (parallel
    wrappers and averaged models) and mmrazor's `architecture.`, `student.` and `teacher.`. Every key must be used and
    every array filled. If only the classes differ, the classifiers start anew with the focal prior, and a warning says
    so. A bare ResNet, as torchvision and timm have it, fills the backbone, and everything else starts anew.

    Args:
      detector: what to fill.
      state: name -> array, layout of PyTorch (OIHW).
      network: which one to take, "student" or "teacher", of a distiller's state that holds both.
      key: of the draws for what starts anew; by default the key of seed 0.
      other_classes: the state's classes are not the detector's, even if there are as many.
      keep_classifiers: refuse a state of another number of classes, or without classifiers (of a teacher).

    Returns:
      (params, stats) of float32 arrays.

    Raises:
      ValueError: one that lists every key without use, every array without source and every shape that differs.

    Warns:
      UserWarning: if the classifiers are not those of the state, or its norms are folded and it may be trained on.

    Peers: mmdetection 3.3.0, mmengine 0.10, mmrazor 1.0; torchvision's and timm's ResNet; YOLOX 0.3.0.
    """
    state = {name: value for name, value in plain(state, network).items() if not name.endswith(_COUNTERS)}
    if yolox.is_folded(state):
        state = yolox.unfolded(detector, state)
        if not keep_classifiers:
            warnings.warn(
                f"The norms of these weights are folded into the convolutions: as a teacher {detector.name} computes "
                "what it did, but one that is trained from here on starts with norms of scale 1.",
                stacklevel=2,
            )
    if _STEM in state:
        return _from_backbone(detector, state, key, keep_classifiers)
    wanted = {f"{side}/{path}": leaf for side, tree in zip(("params", "stats"), detector.shapes, strict=True)
              for path, leaf in flatten(tree).items()}  # fmt: skip
    filled, problems, classifiers = {}, [], {}
    if _BINS_OF in state and _BINS in state:
        bins = state.pop(_BINS)
        if not np.array_equal(bins, np.arange(len(state[_BINS_OF]) // 4)):
            problems.append(f"{_BINS} are not the whole numbers from 0 on")
    unused = set(state)
    for path, names in torch_names(detector).items():
        unused -= set(names)
        absent = [name for name in names if name not in state]
        if absent:
            problems += [f"{name} is missing" for name in absent]
            continue
        values = [_from_torch_layout(state[name], path) for name in names]
        if any(value.shape != values[0].shape or not np.array_equal(value, values[0]) for value in values):
            problems.append(f"{', '.join(names)} should be one shared array but differ")
        elif _is_classifier(names[0], values[0].shape, wanted[path].shape, detector):
            filled[path] = classifiers[path] = values[0]
        elif values[0].shape == wanted[path].shape:
            filled[path] = values[0]
        else:
            expected = torch_shape(wanted[path].shape, path)
            problems.append(f"{names[0]} has shape {np.shape(state[names[0]])} instead of {expected}")
    problems += [f"{name} has no place in the detector" for name in sorted(unused)]
    found_classes = {
        value.shape[-1] * detector.num_classes // wanted[path].shape[-1] for path, value in classifiers.items()
    }
    if len(found_classes) > 1:
        problems.append(f"the classifiers have different numbers of classes: {sorted(found_classes)}")
    if problems:
        raise ValueError(
            f"The weights do not fit {detector.name} with {detector.num_classes} classes and options "
            f"{detector.options}; {len(problems)} differences:\n  " + "\n  ".join(problems)
        )
    if keep_classifiers and found_classes != {detector.num_classes}:
        raise ValueError(f"The weights are for {found_classes.pop()} classes, but {detector.num_classes} are needed.")
    if other_classes or found_classes != {detector.num_classes}:
        initial = flatten({"params": detector.init(jax.random.key(0) if key is None else key)[0]})
        filled |= {path: initial[path] for path in classifiers}
        warnings.warn(
            f"The weights are for {found_classes.pop()} {'other ' if other_classes else ''}classes and {detector.name} "
            f"has {detector.num_classes}: its classifiers start anew, every class at the focal prior's probability of "
            "0.01.",
            stacklevel=2,
        )
    tree = unflatten({path: jax.numpy.asarray(value) for path, value in filled.items()})
    return tree["params"], tree["stats"]


def _from_backbone(
    detector: Detector, state: dict[str, np.ndarray], key: jax.Array | None, keep_classifiers: bool
) -> tuple[Tree, Tree]:
    """Fills the backbone from the state dict of a bare ResNet; its classifier of images is left out."""
    if keep_classifiers:
        raise ValueError(f"The weights are those of a bare ResNet: {detector.name} as a whole is needed.")
    params, stats = detector.init(jax.random.key(0) if key is None else key)
    whole = to_torch(detector, params, stats)
    rest = {name: value for name, value in whole.items() if not name.startswith("backbone.")}
    own = {f"backbone.{name}": value for name, value in state.items() if not name.startswith("fc.")}
    said = f"The weights are those of a bare ResNet: neck and head of {detector.name} start anew."
    if np.abs(detector.preprocess(np.zeros((1, 1, 1, 3), np.uint8))).max() > 10:
        said += (
            " Its form is Caffe's (BGR, not divided by the deviation): for torchvision's or timm's set style=pytorch."
        )
    warnings.warn(said, stacklevel=3)
    return from_torch(detector, rest | own)


def _is_classifier(name: str, shape: tuple[int, ...], wanted: tuple[int, ...], detector: Detector) -> bool:
    """Whether an array is a classifier that differs from the wanted one in nothing but the number of classes."""
    if not _CLASSIFIER.fullmatch(name) or shape[:-1] != wanted[:-1]:
        return False
    anchors = wanted[-1] // detector.num_classes
    return shape[-1] % anchors == 0


def count_classes(detector: Detector, state: dict[str, np.ndarray]) -> int:
    """The number of classes of a state dict of `plain`; 0 if it has no classifier of the detector's kind.

    Args:
      detector: of one class.
      state: name -> array.

    Example:
      >>> from kdjax.detectors import build
      >>> count_classes(build("retinanet_r18", 1), {"bbox_head.retina_cls.bias": np.zeros(9 * 5)})
      5
    """
    for path, leaf in flatten(detector.shapes[0]).items():
        name = _torch_name(path)
        if path.endswith("/bias") and _CLASSIFIER.fullmatch(name) and name in state:
            return np.size(state[name]) // leaf.shape[0]
    return 0


def to_torch(detector: Detector, params: Tree, stats: Tree) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: name -> float32 array in PyTorch's layout, batch norms' counters at 0.

    Peers: `torch.load`ed by mmdetection 3.3.0 as a state dict (not tried here; names and shapes are tested).
    """
    values = flatten({"params": params, "stats": stats})
    state = {}
    for path, names in torch_names(detector).items():
        value = np.asarray(_to_torch_layout(np.asarray(values[path], np.float32), path), order="C")
        state |= dict.fromkeys(names, value)
        if path.endswith("/var"):
            state |= {name.replace("running_var", _COUNTERS): np.zeros((), np.int64) for name in names}
    if _BINS_OF in state:
        state[_BINS] = np.arange(len(state[_BINS_OF]) // 4, dtype=np.float32)
    return state


def torch_shape(shape: tuple[int, ...], path: str) -> tuple[int, ...]:
    """The shape that PyTorch gives to the array at one of our paths: OIHW for HWIO kernels."""
    return tuple(shape[axis] for axis in (3, 2, 0, 1)) if path.endswith("/kernel") else tuple(shape)


def _from_torch_layout(value: np.ndarray, path: str) -> np.ndarray:
    value = np.asarray(value, np.float32)
    return value.transpose(2, 3, 1, 0) if path.endswith("/kernel") and value.ndim == 4 else value


def _to_torch_layout(value: np.ndarray, path: str) -> np.ndarray:
    return value.transpose(3, 2, 0, 1) if path.endswith("/kernel") else value


def plain(state: dict[str, np.ndarray], network: str = "student") -> dict[str, np.ndarray]:
    """The state dict of one network under mmdetection's names, without the prefixes of what it was wrapped in.

    Args:
      state: name -> array.
      network: "student" or "teacher" of a distiller's state.

    Returns:
      name -> array.

    Example:
      >>> list(plain({"architecture.bbox_head.head_module.rtm_cls.0.bias": np.zeros(3)}))
      ['bbox_head.rtm_cls.0.bias']
    """
    state = yolox.renamed(_unwrapped(state, network))
    if not is_mmyolo(state):
        return state

    def renamed(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in _MMYOLO if name.startswith(old)), name)

    return {renamed(name): value for name, value in state.items()}


def is_mmyolo(state: dict[str, np.ndarray]) -> bool:
    """Whether the names are mmyolo's, whose RTMDet takes distances without an exponential in all sizes."""
    return any(_MMYOLO_HEAD in name for name in state)


def _unwrapped(state: dict[str, np.ndarray], network: str) -> dict[str, np.ndarray]:
    if network not in ("student", "teacher"):
        raise ValueError(f"A distiller's state holds the networks student and teacher, not {network!r}.")
    # An averaged model counts its updates.
    state = {name: value for name, value in state.items() if name != "steps"}
    state = {name.removeprefix("module."): value for name, value in state.items()}
    prefixes = {"student": ("architecture.", "student."), "teacher": ("teacher.",)}
    groups = {
        who: {
            name.removeprefix(p).removeprefix("module."): v
            for p in ps
            for name, v in state.items()
            if name.startswith(p)
        }
        for who, ps in prefixes.items()
    }
    held = [who for who, group in groups.items() if group]
    if not held:
        return state
    chosen = network if network in held else held[0]
    # The rest of a distiller (the other network, connectors) is not the detector's.
    strays = [n for n in state if not n.startswith(("architecture.", "student.", "teacher.", "distiller."))]
    return groups[chosen] | {name: state[name] for name in strays}


def load_checkpoint(path: str | Path) -> tuple[dict[str, np.ndarray], list[str] | None]:
    """Reads a state dict, and the names of the classes if they are told; code inside the file is never run.

    Where a checkpoint of mmengine holds `state_dict` and `ema_state_dict`, the first is taken: mmengine swaps them when
    it saves, so that it is the first that holds the averaged weights.

    Args:
      path: `.npz`, `.safetensors`, `.pth` (needs the extra `kdjax[torch]`), or `.onnx` of YOLOX (needs onnx).

    Returns:
      name -> array, and the classes that mmengine's or mmdetection 2's `meta` names in a `.pth`, else None.

    Raises:
      ValueError: if the file is missing, of another kind, or broken, or PyTorch or onnx is needed and missing.
    """
    path = Path(path)
    if path.suffix not in _FORMATS:
        raise ValueError(f"Weights are read from files {', '.join(_FORMATS)}, not from {path}.")
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        if path.suffix == ".npz":
            if not zipfile.is_zipfile(path):  # a single array, or a pickle; neither is opened
                raise ValueError("it is no npz file, or only the beginning of one")
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                state = {name: arrays[name] for name in arrays.files}
            if odd := [name for name, value in state.items() if value.dtype.kind not in "biuf"]:
                raise ValueError(f"{odd[0]} is not of numbers")
            return _unwrap(state), None
        if path.suffix == ".safetensors":
            return _unwrap(load_safetensors(path)), None
    except (OSError, ValueError, KeyError, EOFError, SafetensorError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"The weights in {path} cannot be read: {error}.") from error
    return (yolox.load_onnx(path), None) if path.suffix == ".onnx" else _load_pth(path)


def _load_pth(path: Path) -> tuple[dict, list[str] | None]:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"Reading {path} needs PyTorch: install the extra kdjax[torch], or convert it to .safetensors or .npz."
        ) from error
    try:
        with warnings.catch_warnings(action="ignore"):  # of old formats; what they hold is looked at all the same
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {asked[1]}" if asked else "it is no file of PyTorch, or holds other things"
        raise ValueError(
            f"{path} cannot be read as weights alone: {what}, and kdjax never runs code from a file; save its "
            "state_dict by itself where it came from."
        ) from error
    except Exception as error:  # what torch raises differs from version to version
        why = str(error).partition(". ")[0].strip() or "it is empty"
        raise ValueError(f"The weights in {path} cannot be read: {why}.") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not weights by name.")

    def arrays(tree):
        if isinstance(tree, dict):
            return {name: arrays(value) for name, value in tree.items() if isinstance(value, dict | torch.Tensor)}
        return (tree.float() if tree.is_floating_point() else tree).detach().numpy()

    meta = checkpoint.get("meta") if isinstance(checkpoint.get("meta"), dict) else {}
    told = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), dict) else meta
    classes = told.get("classes") or told.get("CLASSES")
    return _unwrap(arrays(checkpoint)), [str(name) for name in classes] if isinstance(classes, list | tuple) else None


def _unwrap(checkpoint: dict) -> dict[str, np.ndarray]:
    """The state dict inside a checkpoint, nested or with its name as a prefix."""
    for wrapper in ("state_dict", "ema_state_dict", "model"):  # the last one is of YOLOX's authors
        if isinstance(checkpoint.get(wrapper), dict):
            return checkpoint[wrapper]
        inner = {
            name[len(wrapper) + 1 :]: value
            for name, value in checkpoint.items()
            if name.startswith((f"{wrapper}.", f"{wrapper}/"))
        }
        if inner:
            return inner
    return checkpoint
