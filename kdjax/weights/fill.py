"""Fills a detector from a PyTorch state dict, writes one, and re-initialises classifiers for other classes."""

import warnings

import jax
import numpy as np

from kdjax.detectors import api
from kdjax.detectors.api import Detector, State, Tree, flatten, unflatten
from kdjax.errors import UserError
from kdjax.weights import folded
from kdjax.weights.torch_names import (
    COUNTERS,
    foreign,
    from_torch_layout,
    is_classifier,
    plain,
    table,
    to_torch_layout,
    torch_name,
    torch_shape,
)

# A state dict with this name is a ResNet without a detector around it.
_STEM = "conv1.weight"


def from_torch(
    detector: Detector,
    state: State,
    *,
    network: str = "student",
    key: jax.Array | None = None,
    keep_classifiers: bool = False,
) -> tuple[Tree, Tree]:
    """Fills a detector from a PyTorch state dict.

    The names may be mmdetection's, mmyolo's of RTMDet, the authors' of YOLOX or torchvision's of Faster and Mask R-CNN,
    behind wrappers (`kdjax.weights.wrappers.unwrap`) and mmrazor's `architecture.`, `student.` and `teacher.`. Every
    key must be used and every array filled. If only the number of classes differs, the classifiers are re-initialised
    with a warning. A bare ResNet, as torchvision and timm have it, fills the backbone, and everything else is
    initialised.

    Args:
      detector: what to fill.
      state: name -> array, layout of PyTorch (OIHW). The ranges of int8, which it lacks, are yet to be observed.
      network: which one to take, "student" or "teacher", of a distiller's state that holds both.
      key: of the initial values of what the state does not fill; by default the key of seed 0.
      keep_classifiers: refuse a state with another number of classes, or without classifiers (for a teacher).

    Returns:
      (params, stats) of float32 arrays.

    Raises:
      UserError: one that lists every unused key, every missing array and every shape that differs, or every array with
        values that cannot be used (NaN, infinite, a negative variance, integers).

    Warns:
      UserWarning: the classifiers are not the state's, or its norms are folded.

    Peers: mmdetection 3.3.0, mmengine 0.10, mmrazor 1.0; torchvision's and timm's ResNet; YOLOX 0.3.0.
    """
    state = {name: value for name, value in plain(detector, state, network).items() if not name.endswith(COUNTERS)}
    if folded.is_folded(state):
        state = folded.unfolded(detector, state)
        if not keep_classifiers:
            warnings.warn(
                f"the norms of these weights are folded into the convolutions: as a teacher {detector.name} computes "
                "the same outputs, but fine-tuning starts from norms of scale 1",
                stacklevel=2,
            )
    if _STEM in state:
        return _fill_backbone(detector, state, key, keep_classifiers)
    if why := foreign(detector, state):
        raise UserError(why)
    filled, classes, problems, unusable = _match(detector, state)
    if unusable:
        count = f"{len(unusable)} {'array' if len(unusable) == 1 else 'arrays'}"
        raise UserError(f"the values of {count} cannot be used:\n  " + "\n  ".join(unusable))
    if problems:
        raise UserError(
            f"the weights do not fit {detector.name} with {detector.num_classes} classes and options "
            f"{detector.options}; {len(problems)} difference{'s' * (len(problems) > 1)}:\n  " + "\n  ".join(problems)
        )
    if keep_classifiers and classes != detector.num_classes:
        raise UserError(f"the weights are for {classes} classes, but {detector.num_classes} are needed")
    filled |= api.ranges(detector)
    tree = unflatten({path: jax.device_put(value) for path, value in filled.items()})
    if classes == detector.num_classes:
        return tree["params"], tree["stats"]
    return reset_classifiers(detector, tree["params"], key=key), tree["stats"]


def _match(detector: Detector, state: State) -> tuple[dict[str, np.ndarray], int, list[str], list[str]]:
    """The arrays by path, classifiers of the state's own number of classes, and that number.

    Also what does not fit the detector, and whose values cannot be used, by PyTorch's names.
    """
    shapes = {f"{side}/{path}": leaf.shape for side, tree in zip(("params", "stats"), detector.shapes, strict=True)
              for path, leaf in flatten(tree).items()}  # fmt: skip
    filled: dict[str, np.ndarray] = {}
    counts: set[int] = set()
    problems: list[str] = []
    unusable: list[str] = []
    for name, values in detector.torch.constants.items():
        if name in state and not np.array_equal(state[name], values):
            numbers = f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g}, {values[1]:g}, ... {values[-1]:g}"
            problems.append(f"{name} must be {numbers}")
    unused = set(state) - set(detector.torch.constants)
    for path, names in table(detector).items():
        unused -= set(names)
        absent = [name for name in names if name not in state]
        if absent:
            problems += [f"{name} is missing" for name in absent]
            continue
        if wrong := [why for name in names if (why := wrong_values(name, state[name], path))]:
            unusable += wrong
            continue
        values = [from_torch_layout(state[name], path) for name in names]
        shape, wanted = values[0].shape, shapes[path]
        if any(value.shape != shape or not np.array_equal(value, values[0]) for value in values):
            problems.append(f"{', '.join(names)} should be one shared array but differ")
        elif shape[:-1] == wanted[:-1] and (classes := _classes(detector, path.removeprefix("params/"), shape, wanted)):
            filled[path] = values[0]
            counts.add(classes)
        elif shape == wanted:
            filled[path] = values[0]
        else:
            problems.append(f"{names[0]} has shape {np.shape(state[names[0]])} instead of {torch_shape(wanted, path)}")
    problems += [f"{name} matches no parameter of the detector" for name in sorted(unused)]
    if len(counts) > 1:
        problems.append(f"the classifiers have different numbers of classes: {sorted(counts)}")
    return filled, min(counts, default=detector.num_classes), problems, unusable


def wrong_values(name: str, value: np.ndarray, path: str) -> str:
    """What is wrong with the values of an array of weights, after its name; "" if nothing is.

    Args:
      name: of the array, for the message.
      value: the array.
      path: in params or stats: variances are told from it.

    Example:
      >>> wrong_values("bn.running_var", np.float32([0.5, -1]), "stats/bn/var")
      'bn.running_var has a negative variance (-1)'
      >>> wrong_values("conv.weight", np.complex64([1]), "params/conv/kernel")
      'conv.weight is not an array of real numbers (complex64)'
    """
    if not np.can_cast(value.dtype, np.longdouble):
        return f"{name} is not an array of real numbers ({value.dtype})"
    if value.dtype.kind in "biu":
        return f"{name} holds integers ({value.dtype}): weights that are quantised are not read"
    with np.errstate(over="ignore"):
        single = np.asarray(value, np.float32)
    if np.isnan(single).any():
        return f"{name} contains NaN (a diverged run?)"
    if not np.isfinite(single).all():
        beyond = value.dtype.itemsize > 4 and np.isfinite(value).all()
        return f"{name} contains {'values beyond float32' if beyond else 'infinite values (a diverged run?)'}"
    if path.endswith("/var") and single.min(initial=0) < 0:
        return f"{name} has a negative variance ({single.min():g})"
    return ""


def _classes(detector: Detector, path: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> int:
    """The number of classes of a classifier's array, where `wanted` is the detector's own shape; 0 if it is none."""
    if not is_classifier(detector, path):
        return 0
    extra = int(path.rpartition("/")[0] in detector.background)
    each = (wanted[-1] - extra) // detector.num_classes
    return (shape[-1] - extra) // each if (shape[-1] - extra) % each == 0 else 0


def reset_classifiers(detector: Detector, params: Tree, *, key: jax.Array | None = None) -> Tree:
    """Initialises the classifiers for the classes of a detector; all other parameters are kept.

    Args:
      detector: with the new number of classes.
      params: of the same detector with any number of classes.
      key: of the initial values; by default the key of seed 0.

    Returns:
      The params of `detector`.

    Raises:
      UserError: the detector does not name its classifiers.

    Warns:
      UserWarning: always: classifiers are not those of the weights.
    """
    if not detector.classifiers:
        raise UserError(f"{detector.name} declares no classifiers: its weights cannot be used for other classes")
    initial = flatten(detector.init(jax.random.key(0) if key is None else key)[0])
    rare = any(
        np.max(initial[path]) < 0 for path in initial if path.endswith("/bias") and is_classifier(detector, path)
    )
    start = "every class starts at a probability of 0.01" if rare else "all classes start equally likely"
    warnings.warn(
        f"the classifiers of {detector.name} are re-initialised for {detector.num_classes} classes, because the "
        f"weights are for other classes: {start}",
        stacklevel=3,
    )
    kept = flatten(params)
    return unflatten({path: initial[path] if is_classifier(detector, path) else kept[path] for path in initial})


def _fill_backbone(
    detector: Detector, state: State, key: jax.Array | None, keep_classifiers: bool
) -> tuple[Tree, Tree]:
    """Fills the backbone from the state dict of a ResNet classifier, without its last layer."""
    if keep_classifiers:
        raise UserError(f"the weights are only a ResNet backbone: weights of the whole {detector.name} are needed")
    params, stats = detector.init(jax.random.key(0) if key is None else key)
    whole = to_torch(detector, params, stats)
    rest = {name: value for name, value in whole.items() if not name.startswith("backbone.")}
    own = {f"backbone.{name}": value for name, value in state.items() if not name.startswith("fc.")}
    message = f"the weights are only a ResNet backbone: {detector.name} has random neck and head"
    if np.abs(detector.preprocess(jax.numpy.zeros((1, 1, 1, 3), np.uint8))).max() > 10:
        message += (
            "; the detector expects Caffe's weights (BGR, not divided by the standard deviation): for torchvision's or "
            "timm's, set the option style=pytorch"
        )
    warnings.warn(message, stacklevel=3)
    return from_torch(detector, rest | own)


def count_classes(detector: Detector, state: State) -> int:
    """The number of classes of a state dict of `torch_names.plain`; 0 if it has no classifier of the detector.

    Args:
      detector: of one class.
      state: name -> array.

    Example:
      >>> from kdjax.detectors import build
      >>> count_classes(build("retinanet_r18", 1), {"bbox_head.retina_cls.bias": np.zeros(9 * 5)})
      5
    """
    for path, leaf in flatten(detector.shapes[0]).items():
        name = torch_name(path)
        if path.endswith("/bias") and is_classifier(detector, path) and name in state:
            return _classes(detector, path, np.shape(state[name]), leaf.shape)
    return 0


def to_torch(detector: Detector, params: Tree, stats: Tree) -> State:
    """The inverse of `from_torch`: name -> float32 array in PyTorch's layout, batch norms' counters at 0.

    Peers: mmdetection 3.3.0 can load it as a state dict (not tried; names and shapes are tested).
    """
    values = flatten({"params": params, "stats": stats})
    state: State = {}
    for path, names in table(detector).items():
        value = np.asarray(to_torch_layout(np.asarray(values[path], np.float32), path), order="C")
        state |= dict.fromkeys(names, value)
        if path.endswith("/var"):
            state |= {name.replace("running_var", COUNTERS): np.zeros((), np.int64) for name in names}
    return state | dict(detector.torch.constants)
