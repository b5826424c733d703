"""What a detector is to the rest of the house: pure functions over nested dicts of arrays, and a few facts."""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

Array = jax.Array
Tree = dict[str, Any]  # nested dicts of arrays, keys are strings


State = dict[str, np.ndarray]  # a PyTorch state dict as arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchNames:
    """How a family's PyTorch state dicts differ from the detector's own paths, beyond the names of the leaves.

    - `copies(path) -> paths`: further modules under which a state dict stores the parameter at `path` again.
    - `rename(state) -> state`: names of other projects than the family's own, changed to its own.
    - `infer(state) -> options`: options of the detector that the names of a state dict imply.
    - `constants`: arrays that a state dict holds beside the weights, by name.
    """

    copies: Callable[[str], list[str]] = lambda path: []
    rename: Callable[[State], State] = lambda state: state
    infer: Callable[[State], dict[str, Any]] = lambda state: {}
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Detector:
    """The pure view of one module: values and functions, no state.

    Detectors are hashed and compared by identity; `kdjax.detectors.build` returns one object for equal arguments.

    Functions (shapes: B batch, H W input size, L levels, N priors, K classes):

    - `init(key) -> (params, stats)`: nested dicts of float32 arrays. Drawn by NumPy, nothing is compiled; the values
      depend on the key alone.
    - `preprocess(images u8[B, H, W, 3] RGB) -> f32[B, H, W, 3]`: colour order and normalisation of this detector.
    - `apply(params, stats, x f32[B, H, W, 3], *, train) -> (DetectorOutput, new_stats)`: with `train`, norms use the
      statistics of the global batch and `new_stats` has moved towards them; else `new_stats` equals `stats`.
    - `head(params, stats, features, *, branch, start) -> L predictions`: the branch "cls", "reg" or, if there is one,
      "quality" of the head in evaluation mode. `start=0`: on neck features; `start=i`: on the pre-activation output of
      the tower's conv i (1-based), which is activated first. Predictions have the form of
      `DetectorOutput.cls_logits`, `box_reg` or `quality`.
    - `loss(output, targets, *, assignment=None) -> ({name: f32[]}, Assignment)`: normalised over the global batch;
      assigns itself unless an assignment is given.
    - `decode(output, image_size i32[B, 2], *, score_threshold, iou_threshold, pre_nms, max_detections, select) ->
      PaddedDetections`; `select` has the arguments of `boxes.nms.select`, which it is by default.
    - `decode_boxes(output) -> f32[B, N, 4]`, `class_logits(output) -> f32[B, N, K]`: all levels in one array.
    - `priors((H, W)) -> f32[N, 4]`: NumPy; x, y, stride in x, stride in y, in pixels.
    - `no_decay(params) -> tree of bool`: True on what weight decay leaves alone: norms, biases, what is frozen.
    - `rois(params, stats, features, boxes f32[B, R, 4]) -> DetectorOutput`: the second stage on given boxes; None
      for the detectors of one stage, all so far.
    """

    name: str
    num_classes: int
    # JSON-able, those that differ from the defaults of `make`: build(name, num_classes, **options) gives this detector.
    options: dict[str, Any]
    strides: tuple[int, ...]
    size_divisor: int  # sides of the network input divide by it
    pad_value: int  # grey level of the canvas around an image
    round_down: bool = False  # in evaluations an image fitted to the canvas loses the fraction of a pixel
    shapes: tuple[Tree, Tree]  # (params, stats) as trees of jax.ShapeDtypeStruct
    # Paths of the modules whose last axis is the classes (of every anchor), such as "bbox_head/rtm_cls".
    classifiers: tuple[str, ...] = ()
    torch: TorchNames = TorchNames()
    init: Callable
    preprocess: Callable
    apply: Callable
    head: Callable
    loss: Callable
    decode: Callable
    decode_boxes: Callable
    class_logits: Callable
    priors: Callable
    no_decay: Callable
    rois: Callable | None = None


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts to one, keys joined by "/", in sorted order.

    Example:
      >>> flatten({"b": {"c": 1}, "a": 2})
      {'a': 2, 'b/c': 1}
    """
    flat = {}
    for key in sorted(tree):
        path = f"{prefix}{key}"
        flat.update(flatten(tree[key], f"{path}/") if isinstance(tree[key], dict) else {path: tree[key]})
    return flat


def unflatten(flat: dict[str, Any]) -> Tree:
    """The inverse of `flatten`.

    Example:
      >>> unflatten({"a": 2, "b/c": 1})
      {'a': 2, 'b': {'c': 1}}
    """
    tree: Tree = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _to_tree(state: nnx.State) -> Tree:
    return unflatten({"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)})


def _to_pure(tree: Tree) -> dict:
    """Nested dicts as NNX wants them: indices of lists are whole numbers."""
    return {int(k) if k.isdigit() else k: _to_pure(v) if isinstance(v, dict) else v for k, v in tree.items()}


@dataclasses.dataclass(frozen=True)
class PureModule:
    """An NNX module seen as pure functions on nested dicts with string keys.

    `shapes` is (params, stats), trees of `jax.ShapeDtypeStruct`.
    """

    shapes: tuple[Tree, Tree]
    init: Callable  # (key) -> (params, stats)
    call: Callable  # (params, stats, method of the module, *args) -> (result, new stats)


def pure(construct: Callable[[], nnx.Module]) -> PureModule:
    """Turns a constructor without arguments into pure functions; nothing is computed.

    Every `nnx.Variable` of the module carries the metadata `draw`: (np.random.Generator, shape) -> array, its initial
    value. Draws are seeded by the key and the variable's path, so they do not depend on the order of construction.
    """
    graph, params, stats = nnx.split(nnx.eval_shape(construct), nnx.Param, nnx.BatchStat)
    draws = {
        "/".join(map(str, path)): leaf.get_metadata()["draw"]
        for state in (params, stats)
        for path, leaf in nnx.to_flat_state(state)
    }
    shapes = (_to_tree(params), _to_tree(stats))

    def init(key: Array) -> tuple[Tree, Tree]:
        words = np.asarray(jax.random.key_data(key) if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) else key)

        def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
            seed = [*words.ravel().tolist(), zlib.crc32(path.encode())]
            return jax.numpy.asarray(draws[path](np.random.default_rng(seed), shape), jax.numpy.float32)

        return tuple(
            unflatten({path: draw(path, leaf.shape) for path, leaf in flatten(tree).items()}) for tree in shapes
        )

    def call(params: Tree, stats: Tree, method: Callable, *args, **kwargs):
        # The copy lets the statistics be written inside a transformed function.
        module = nnx.merge(graph, _to_pure(params), _to_pure(stats), copy=True)
        result = method(module, *args, **kwargs)
        return result, _to_tree(nnx.state(module, nnx.BatchStat))

    return PureModule(shapes, init, call)


def check_images(family: str, x: jax.Array) -> None:
    """Refuses what is no f32[B, H, W, 3] with sides that divide by 32.

    Raises:
      ValueError: with the shape.
    """
    if x.ndim != 4 or x.shape[1] % 32 or x.shape[2] % 32 or x.shape[3] != 3:
        raise ValueError(f"{family} takes images f32[B, H, W, 3] whose sides divide by 32, not {x.shape}.")


def check_entry(family: str, branches: Iterable[str], convs: int, branch: str, start: int) -> None:
    """Refuses a place at which a head cannot be entered.

    Raises:
      ValueError: with the branches and convolutions that there are.
    """
    if branch not in branches or not 0 <= start <= convs:
        raise ValueError(
            f"{family}'s head has the branches {', '.join(branches)} and can be entered at 0 to {convs}, not at "
            f"{branch!r}, {start}."
        )


def all_but_kernels(params: Tree) -> Tree:
    """True on norm scales and offsets and on biases, which weight decay leaves alone."""
    return unflatten({path: not path.endswith("/kernel") for path in flatten(params)})
