"""The interface of a detector: pure functions of nested dicts of arrays, and facts about them."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

import jax
import numpy as np
from flax import nnx

from kdjax.detectors import levels
from kdjax.detectors.layers import EPS, ON, RANGES
from kdjax.errors import UserError
from kdjax.structs import Array, Assignment, DetectorOutput, PaddedDetections, Rows, Targets

Tree = dict[str, Any]  # nested dicts of arrays, keys are strings


State = dict[str, np.ndarray]  # a PyTorch state dict as arrays

# What the convolutions of an ONNX file are called that have no name of their own, before their number in the graph.
UNNAMED = "onnx."


class Apply(Protocol):
    """`Detector.apply`."""

    def __call__(self, params: Tree, stats: Tree, x: Array, /, *, train: bool) -> tuple[DetectorOutput, Tree]: ...


class Head(Protocol):
    """`Detector.head`."""

    def __call__(
        self, params: Tree, stats: Tree, features: tuple[Array, ...], /, *, branch: str, start: int
    ) -> tuple[Array, ...]: ...


class Loss(Protocol):
    """`Detector.loss`."""

    def __call__(self, output: DetectorOutput, targets: Targets, assignment: Assignment) -> dict[str, Array]: ...


class Assign(Protocol):
    """`Detector.assign`."""

    def __call__(self, output: DetectorOutput, targets: Targets, key: Array | None = None) -> Assignment: ...


class Decode(Protocol):
    """`Detector.decode`; the defaults are the detector's published test settings."""

    def __call__(
        self,
        output: DetectorOutput,
        image_size: Array,
        *,
        score_threshold: float = ...,
        iou_threshold: float = ...,
        pre_nms: int = ...,
        max_detections: int = ...,
    ) -> PaddedDetections: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchNames:
    """How a family's PyTorch state dicts differ from the detector's own paths, beyond the names of the leaves.

    - `copies(path) -> paths`: further paths under which a state dict stores the array at `path` again.
    - `rename(state) -> state`: names of other projects than the family's own, changed to its own.
    - `infer(state) -> options`: options of the detector that the names of a state dict imply.
    - `constants`: arrays that a state dict holds beside the weights, by name.
    - `runs`: the order in which the network in PyTorch runs its convolutions, by which an ONNX file is read that does
      not name them: beginnings of names ("neck.reduce_layers.0"), and parts of layers ("main_conv"). What is not listed
      runs in the order of its numbers and names. (): such files are not read.
    - `eps`: of the batch norms that are folded in such a file.
    """

    copies: Callable[[str], list[str]] = lambda path: []
    rename: Callable[[State], State] = lambda state: state
    infer: Callable[[State], dict[str, Any]] = lambda state: {}
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    runs: tuple[str, ...] = ()
    eps: float = EPS


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
    - `assign(output, targets, key=None) -> Assignment`: which row learns what; a detector that samples reads the key.
    - `loss(output, targets, assignment) -> {name: f32[]}`: normalised over the global batch.
    - `decode(output, image_size i32[B, 2], *, score_threshold, iou_threshold, pre_nms, max_detections) ->
      PaddedDetections`. Its NMS is one of `kdjax.boxes.nms`, which exports replace by operators of other runtimes.
    - `decode_boxes(output) -> f32[B, N, 4]`, `class_logits(output) -> f32[B, N, K]`: all levels in one array.
    - `propose(output, image_size i32[B, 2]) -> (boxes f32[B, P, 4], valid bool[B, P])`: of a two-stage detector, the
      regions that its second stage looks at in tests, best first, without gradient.
    - `priors((H, W)) -> f32[N, 4]`: NumPy; x, y, stride in x, stride in y, in pixels.
    - `no_decay(params) -> tree of bool`: True for parameters without weight decay: norms, biases, frozen ones.
    """

    name: str
    num_classes: int
    # JSON-able, those that differ from the defaults of `make`: build(name, num_classes, **options) gives this detector.
    options: dict[str, Any]
    strides: tuple[int, ...]
    size_divisor: int  # sides of the network input divide by it
    pad_value: int  # grey level of the canvas around an image
    # Height and width of the network input in pixels where nothing says another: those of the published weights, if
    # these are for squares.
    image_size: tuple[int, int] = (640, 640)
    # How evaluations bring an image onto the canvas: "round" or "down" with its aspect ratio, in whole pixels, the
    # rest padded; "stretch" onto all of it.
    fit: Literal["round", "down", "stretch"] = "round"
    masks: str = ""  # which masks `decode` returns, "box" or "canvas" (`PaddedDetections.masks`); "": none
    shapes: tuple[Tree, Tree]  # (params, stats) as trees of jax.ShapeDtypeStruct
    # Paths of the modules whose last axis is the classes (of every anchor), such as "bbox_head/rtm_cls".
    classifiers: tuple[str, ...] = ()
    background: tuple[str, ...] = ()  # those of them with one more output, the background
    torch: TorchNames = TorchNames()
    init: Callable[[Array], tuple[Tree, Tree]]
    preprocess: Callable[[Array], Array]
    apply: Apply
    head: Head | None  # None: a detector that is asked about boxes (`DetectorOutput.at`) or queries (`ask`)
    assign: Assign
    loss: Loss
    decode: Decode
    decode_boxes: Callable[[DetectorOutput], Array]
    class_logits: Callable[[DetectorOutput], Array]
    propose: Callable[[DetectorOutput, Array], tuple[Array, Array]] | None = None  # None: a detector with one stage
    priors: Callable[[tuple[int, int]], np.ndarray]
    no_decay: Callable[[Tree], Tree]

    def spec(self, image_size: tuple[int, int]) -> DetectorOutput:
        """Shapes of the output for one image of (height, width) pixels; nothing is computed."""
        return _spec(self, tuple(image_size))

    def observe(self, variables: tuple[Tree, Tree], batch: Mapping[str, Any]) -> DetectorOutput:
        """The output in evaluation mode for `batch["image"]` u8[B, H, W, 3], with its rows."""
        return self._observe(variables, self.preprocess(batch["image"]))

    def _observe(self, variables: tuple[Tree, Tree], x: Array) -> DetectorOutput:
        output, _ = self.apply(*variables, x, train=False)
        return dataclasses.replace(output, rows=self.rows(output))

    def rows(self, output: DetectorOutput) -> Rows:
        """The predictions of all levels as rows, or those of a transformer's last layer.

        Of a two-stage detector only where its anchors are: the rows that it is compared by are regions, which are yet
        to be chosen.
        """
        if output.layers:
            found = output.layers[-1]
            boxes = self.decode_boxes(output)
            return Rows(logits=found.logits, boxes=boxes, distribution=found.corners)
        where = {"location": self.priors(levels.input_size(output)), "level_sizes": levels.level_sizes(output)}
        if output.at is not None:
            return Rows(**where)
        join, width = levels.join, output.box_reg[0].shape[-1] // output.anchors
        bins = join(output.box_reg, width).reshape(len(output.box_reg[0]), -1, 4, width // 4) if width > 4 else None
        return Rows(
            logits=self.class_logits(output),
            boxes=self.decode_boxes(output),
            quality=join(output.quality, 1)[..., 0] if output.quality else None,
            distribution=bins,
            **where,
        )


@functools.lru_cache(maxsize=256)
def _spec(detector: Detector, image_size: tuple[int, int]) -> DetectorOutput:
    image = jax.ShapeDtypeStruct((1, *image_size, 3), jax.numpy.float32)
    return jax.eval_shape(detector._observe, detector.shapes, image)


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


def _to_tree(state: nnx.State[Any, Any]) -> Tree:
    return unflatten({"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)})


def _to_pure(tree: Tree) -> dict[str | int, Any]:
    """Nested dicts in NNX's form, with integers as the indices of lists."""
    return {int(k) if k.isdigit() else k: _to_pure(v) if isinstance(v, dict) else v for k, v in tree.items()}


@dataclasses.dataclass(frozen=True)
class PureModule:
    """An NNX module seen as pure functions on nested dicts with string keys.

    `shapes` is (params, stats), trees of `jax.ShapeDtypeStruct`.
    """

    shapes: tuple[Tree, Tree]
    init: Callable[[Array], tuple[Tree, Tree]]  # key -> (params, stats)
    call: Callable[..., tuple[Any, Tree]]  # (params, stats, method of the module, *args) -> (result, new stats)


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
        typed = jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key)
        words = np.asarray(jax.random.key_data(key) if typed else key)

        def draw(path: str, shape: tuple[int, ...]) -> Array:
            seed = [*words.ravel().tolist(), zlib.crc32(path.encode())]
            drawn = draws[path](np.random.default_rng(seed), shape)
            return jax.device_put(np.asarray(drawn, np.float32))  # jax.numpy would compile a program for each shape

        params, stats = (
            unflatten({path: draw(path, leaf.shape) for path, leaf in flatten(tree).items()}) for tree in shapes
        )
        return params, stats

    def call(params: Tree, stats: Tree, method: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Tree]:
        # The copy lets the statistics be written inside a transformed function.
        module = nnx.merge(graph, _to_pure(params), _to_pure(stats), copy=True)
        result = method(module, *args, **kwargs)
        return result, _to_tree(nnx.state(module, nnx.BatchStat))

    return PureModule(shapes, init, call)


def switched(stats: Tree, on: Array | float) -> Tree:
    """The statistics of a detector with the option int8, with values rounded to 8 bits or not.

    Args:
      stats: of the detector.
      on: f32[], 0 or 1: whether values are rounded.

    Example:
      >>> switched({"image": {"low": -1.0, "on": 0.0}}, 1.0)
      {'image': {'low': -1.0, 'on': 1.0}}
    """
    return {
        name: switched(value, on) if isinstance(value, dict) else on if name == ON else value
        for name, value in stats.items()
    }


def is_rounded(stats: Tree) -> bool:
    """Whether a detector with these statistics computes with values rounded to 8 bits.

    Example:
      >>> [is_rounded({"image": {"on": value}}) for value in (0.0, 0.1)]
      [False, True]
    """
    return any(path.rpartition("/")[2] == ON and value > 0 for path, value in flatten(stats).items())


def ranges(detector: Detector) -> dict[str, np.ndarray]:
    """Initial values of what a detector with the option int8 has beside its weights: "stats/path" -> f32[]."""
    paths = flatten(detector.shapes[1])
    return {f"stats/{path}": np.zeros((), np.float32) for path in paths if path.rpartition("/")[2] in (ON, *RANGES)}


def check_images(family: str, x: jax.Array) -> None:
    """Checks that images are f32[B, H, W, 3] with sides that are multiples of 32.

    Raises:
      UserError: they are not.
    """
    if x.ndim != 4 or x.shape[1] % 32 or x.shape[2] % 32 or x.shape[3] != 3:
        raise UserError(f"images of {family} must be f32[B, H, W, 3], H and W multiples of 32, not {x.shape}")


def check_entry(family: str, branches: Iterable[str], convs: int, branch: str, start: int) -> None:
    """Checks the arguments `branch` and `start` of `Detector.head`.

    Args:
      family: for the message.
      branches: the branches of the head.
      convs: number of convolutions of a tower.
      branch: to check.
      start: to check.

    Raises:
      UserError: no such branch or convolution.
    """
    if branch not in branches or not 0 <= start <= convs:
        raise UserError(
            f"branch {branch!r}, start {start} of the head of {family}: branch must be one of {', '.join(branches)}, "
            f"start in 0 .. {convs}"
        )


def all_but_kernels(params: Tree) -> Tree:
    """True for the scales and biases of norms and for the biases of convolutions, which have no weight decay."""
    return unflatten({path: not path.endswith("/kernel") for path in flatten(params)})
