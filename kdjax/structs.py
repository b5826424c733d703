"""The arrays that travel between the parts of kdjax; every shape is documented once, here.

Letters: B batch, H W space, C channels, L levels (fine to coarse), N priors of all levels in level order, row-major
inside a level, M padded boxes, K classes, R regions of interest, Q queries, D further ones. Images and maps are NHWC.
Boxes are `x1 y1 x2 y2` in pixels of the network input, but those of queries are `cx cy w h` as shares of its sides.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.errors import UserError, imported

Array = jax.Array
AnyArray = jax.Array | np.ndarray  # what pure functions take; they return an `Array`
PyTree = Any  # nested dicts, lists, tuples and dataclasses of arrays


class Targets(NamedTuple):
    """Ground truth of a batch, padded to M boxes per image.

    Rows whose `valid` is False are padding: they hold zeros and change nothing.
    """

    boxes: Array  # f32[B, M, 4], pixels of the network input
    labels: Array  # i32[B, M], 0 .. K-1
    valid: Array  # bool[B, M]
    image_size: Array  # i32[B, 2], height and width of the image on the canvas: boxes are clipped to it
    pad_size: Array  # i32[B, 2], height and width within which priors are valid; kdjax's own batches have (H, W)
    # f32[B, M, h, w], share of each pixel or block of pixels that the object covers, 0 .. 1, or bool. H / h = W / w is
    # a whole number, the stride of the masks (4 in kdjax's own batches). None: the data has no masks.
    instance_masks: Array | None = None
    # f32[B, M + 1], >= 0: factors of what the rows lose that learn each object and, last, of those that learn none, for
    # targets that are not equally sure. The numbers that losses are divided by stay. None: 1.
    weights: Array | None = None


def targets_of(batch: Mapping[str, Array]) -> Targets:
    """The ground truth of a batch of kdjax's loader.

    Args:
      batch: `image` [B, H, W, 3], `boxes` f32[B, M, 4], `labels` i32[B, M], `valid` bool[B, M] and `image_size`
        i32[B, 2]; `masks` u8[B, M, H/4, W/4], 255 where the object covers a pixel, if they were asked for. The whole
        canvas is padded: every prior is valid.

    Returns:
      The targets.
    """
    canvas = jnp.broadcast_to(jnp.array(batch["image"].shape[1:3], jnp.int32), batch["image_size"].shape)
    masks = batch["masks"].astype(jnp.float32) / 255 if "masks" in batch else None
    return Targets(batch["boxes"], batch["labels"], batch["valid"], batch["image_size"], canvas, masks)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Predictions, one row each; a row is a point, an anchor, a region or a query.

    What a model does not predict is None. Rows are in level order, row-major inside a level; regions have no level.
    """

    logits: Array | None = None  # f32[B, N, K], of the classes; f32[B, N, K + 1] with `form` "softmax"
    # f32[B, N, 4], decoded, x1 y1 x2 y2 in pixels of the network input. Of a region: its box for the class that the
    # teacher finds most likely, on both sides.
    boxes: Array | None = None
    quality: Array | None = None  # f32[B, N], logits of centreness or objectness
    distribution: Array | None = None  # f32[B, N, 4, n + 1], logits of the bins of each edge's distance
    # f32[N, 4], x, y, stride in x, stride in y, in pixels; of regions f32[B, N, 4], centre, width and height.
    location: AnyArray | None = None
    # Rows of each level, fine to coarse; static. () if rows belong to no level.
    level_sizes: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    # What turns the logits into scores; static. "sigmoid": of each class; "softmax": over the classes and, last, the
    # background, as regions have it.
    form: Literal["sigmoid", "softmax"] = dataclasses.field(default="sigmoid", metadata={"static": True})


class Pairing(NamedTuple):
    """P pairs of a row of the student and a row of the teacher."""

    student: Array  # i32[B, P], index of the student's row
    teacher: Array  # i32[B, P], index of the teacher's row
    valid: Array  # bool[B, P], False where a row has no partner


class Regions(NamedTuple):
    """What the second stage of a two-stage detector predicts for R given boxes."""

    logits: Array  # f32[B, R, K + 1], of a softmax over the classes and, last, the background
    # f32[B, R, K * 4], deltas of the given box for each class, or f32[B, R, 4] for all of them
    # (`boxes.coding.boxes_to_deltas` with `boxes.coding.REGION_STDS`).
    box_reg: Array


class Stage(NamedTuple):
    """One second stage of a cascade; see `DetectorOutput.at` and `masks_at`."""

    at: Callable[[Array], Regions]
    masks_at: Callable[[Array, Array], Array] | None = None


class Queries(NamedTuple):
    """What one layer of a transformer's decoder predicts for Q queries."""

    logits: Array  # f32[B, Q, K], of a sigmoid for each class
    # f32[B, Q, 4], cx cy w h as shares of the sides of the network input, 0 .. 1; of D-FINE not clipped, and sides may
    # be negative.
    boxes: Array
    hidden: Array | None = None  # f32[B, Q, d], the layer's state; None of the encoder's selection
    corners: Array | None = None  # f32[B, Q, 4, n + 1], D-FINE: logits of the bins of each edge's distance
    reference: Array | None = None  # f32[B, Q, 4], D-FINE: the box that the distances refine, without gradient


class Asked(NamedTuple):
    """Further queries that a transformer's decoder is asked about, beside its own (`DetectorOutput.ask`).

    They look at the own queries and at each other; the own ones never look at them.
    """

    boxes: Array  # f32[B, D, 4], where each begins: cx cy w h as shares of the sides of the network input, 0 .. 1
    # i32[B, D], 0 .. K: a query begins with the learned embedding of its class (K: of none). None: it begins with what
    # the encoder's output says at the centre of its box.
    labels: Array | None = None
    blocked: Array | None = None  # bool[D, D] or bool[B, D, D], True where query i may not look at query j
    sees_own: bool = True  # whether they look at the own queries


class Decoded(NamedTuple):
    """What a transformer's decoder says of queries."""

    layers: tuple[Queries, ...]  # of each layer, first to last
    first: Queries | None = None  # D-FINE: the boxes that all layers refine, with the logits of the first layer


class Denoising(NamedTuple):
    """Noised objects, which the decoder of a transformer learns to restore; D of them in groups that are apart."""

    boxes: Array  # f32[B, D, 4], `Asked.boxes`
    labels: Array  # i32[B, D], `Asked.labels`
    blocked: Array  # bool[D, D], `Asked.blocked`
    matched: Array  # i32[B, D], index 0 .. M-1 of the object to restore, -1 where there is to be none
    live: Array  # bool[D], False where a place is not used
    groups: Array  # i32[], how many groups are used


class Assignment(NamedTuple):
    """What an assigner decided for every prior; no gradient flows through it.

    For a two-stage detector the N rows are the regions that were sampled, and `first` is the assignment of the anchors.
    For a transformer they are the queries of the last layer.
    """

    matched: Array  # i32[B, N], index 0 .. M-1 of the matched box, -1 for background
    positive: Array  # bool[B, N], foreground
    ignore: Array  # bool[B, N], not scored: outside the padded image, or left out by the assigner
    labels: Array  # i32[B, N], class of the matched box, K for background
    boxes: Array  # f32[B, N, 4], the matched box, zeros for background
    quality: Array  # f32[B, N], soft label in 0 .. 1: the IoU for RTMDet, 1 for hard labels, 0 for background
    # bool[B, N], positive rows whose mask is learned too; None: no masks are learned of these rows.
    masked: Array | None = None
    regions: Array | None = None  # f32[B, N, 4], of a two-stage detector: pixels, zeros where ignored
    first: "Assignment | None" = None  # of a two-stage detector: of its anchors, for one class
    earlier: tuple["Assignment", ...] = ()  # of a cascade: of the regions of the stages before the last, in turn
    # Of a transformer: i32[S, B, M], the query of each object, -1 for none, in each of S outputs: the decoder's layers,
    # D-FINE's first boxes, the encoder's selection.
    queries: Array | None = None
    denoising: Denoising | None = None  # of a transformer, unless it learns without


class PaddedDetections(NamedTuple):
    """A fixed number D of detections per image, best score first; rows whose `valid` is False hold zeros."""

    boxes: Array  # f32[B, D, 4], pixels of the network input
    scores: Array  # f32[B, D], 0 .. 1
    labels: Array  # i32[B, D], 0 .. K-1
    valid: Array  # bool[B, D]
    # None, or what `Detector.masks` says. "box": f32[B, D, m, m], probabilities in m x m cells of the detection's box.
    # "canvas": f32[B, D, H/s, W/s], logits of the whole canvas at the finest stride s of the detector: they are resized
    # before they are compared with a threshold.
    masks: Array | None = None


FOUND = ("found_boxes", "found_scores", "found_labels", "found_valid")  # keys of a batch, as `PaddedDetections`


def detections_of(batch: Mapping[str, Array]) -> PaddedDetections:
    """The detections of a batch of kdjax's loader whose data set has a file of them (`kdjax.data.with_found`).

    Args:
      batch: `found_boxes` f32[B, D, 4], `found_scores` f32[B, D], `found_labels` i32[B, D], `found_valid` bool[B, D].

    Returns:
      The detections.
    """
    return PaddedDetections(*(batch[name] for name in FOUND))


@dataclasses.dataclass(frozen=True, eq=False)
class Detections:
    """The detections of one image as NumPy arrays, best score first, in pixels of the original image.

    `len(detections)` is n. `detections[rows]` are the detections that a boolean mask, indices, one
    index or a slice select.

    Example:
      >>> found = Detections(np.zeros((2, 4)), np.array([0.9, 0.2]), np.array([1, 0]), ("cat", "dog"))
      >>> strong = found[found.scores >= 0.5]
      >>> len(strong), strong.class_names[strong.labels[0]]
      (1, 'dog')
    """

    boxes: np.ndarray  # f64[n, 4], x1 y1 x2 y2 in pixels of the original image
    scores: np.ndarray  # f32[n], 0 .. 1
    labels: np.ndarray  # i32[n], 0 .. K-1
    class_names: tuple[str, ...] = ()  # K names, the same for all images; () if unknown
    category_ids: tuple[int, ...] = ()  # K ids in COCO's json, the same for all images; () if unknown
    # n masks of the original image in COCO's compressed RLE: {"size": [height, width], "counts": bytes}. A validation
    # split with its masks in full resolution would not fit in memory. None: the detector finds boxes only.
    masks: tuple[dict[str, Any], ...] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: np.ndarray | slice | int) -> "Detections":
        chosen = np.atleast_1d(np.arange(len(self))[rows])
        arrays = {name: getattr(self, name)[chosen] for name in ("boxes", "scores", "labels")}
        kept = None if self.masks is None else tuple(self.masks[i] for i in chosen)
        return dataclasses.replace(self, **arrays, masks=kept)

    def to_supervision(self) -> Any:  # noqa: ANN401 - of an optional package
        """The same as `supervision.Detections`: `xyxy`, `confidence`, `class_id`, and `mask` bool[n, h, w].

        `data["class_name"]` has the names of the classes, if they are known.

        Raises:
          UserError: supervision is not installed.
        """
        supervision = imported("supervision", "Detections.to_supervision", "kdjax[supervision]")
        names = {"class_name": np.array(self._names())} if self.class_names else {}
        masks = None if not self.masks else np.stack([_decoded(mask) for mask in self.masks])
        return supervision.Detections(
            xyxy=np.asarray(self.boxes, np.float32).reshape(-1, 4),
            confidence=np.asarray(self.scores, np.float32),
            class_id=np.asarray(self.labels, int),
            mask=masks,
            data=names,
        )

    def to_fiftyone(self, width: int, height: int) -> Any:  # noqa: ANN401 - of an optional package
        """The same as `fiftyone.Detections`: boxes x y w h as shares of the image's sides, and masks cut to the boxes.

        Args:
          width, height: of the original image in pixels.

        Peers: what FiftyOne itself makes of COCO results (`kdjax.evals.coco.to_coco`), which need no package to write.

        Raises:
          UserError: fiftyone is not installed, or a size is not positive.
        """
        if min(width, height) < 1:
            raise UserError(f"Detections.to_fiftyone: the image must have a positive size, not {width}x{height}")
        fiftyone = imported("fiftyone", "Detections.to_fiftyone", "fiftyone")
        rows, sides = [], np.array([width, height] * 2, np.float64)
        for i, (box, score, name) in enumerate(zip(self.boxes, self.scores, self._names(), strict=True)):
            corner = np.asarray(box[:2], np.float64)
            place = np.concatenate([corner, box[2:] - corner]) / sides
            inside = {}
            if self.masks is not None:  # of the box, its edges rounded to pixels, as FiftyOne cuts those of COCO
                left, top, right, bottom = np.round(box).astype(int).tolist()
                inside = {"mask": _decoded(self.masks[i])[top : max(bottom, top + 1), left : max(right, left + 1)]}
            rows.append(fiftyone.Detection(label=name, bounding_box=place.tolist(), confidence=float(score), **inside))
        return fiftyone.Detections(detections=rows)

    def _names(self) -> list[str]:
        """The name of each detection's class; "class 3" where it is not known."""
        known = self.class_names
        return [known[k] if k < len(known) else f"class {k}" for k in self.labels.tolist()]


def _decoded(mask: Mapping[str, Any]) -> np.ndarray:
    """bool[height, width] of a mask of `Detections`."""
    from faster_coco_eval.core import mask as rle

    return np.asarray(rle.decode(dict(mask)), bool)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorOutput:
    """Everything that a detector computes and others may want, by name; the names are the taps of the methods.

    A tuple over levels runs fine to coarse and pairs with `strides`. What a detector does not have is `()`. Outputs
    that are not used are removed by the compiler.
    """

    # Strides of the levels of neck, towers and predictions; static.
    strides: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    # Strides of the backbone's levels; static.
    backbone_strides: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    anchors: int = dataclasses.field(default=1, metadata={"static": True})  # A, priors of a cell; static
    backbone: tuple[Array, ...] = ()  # L of f32[B, H, W, C]: what the backbone gives to the neck
    neck: tuple[Array, ...] = ()  # L of f32[B, H, W, C]: what the head consumes
    neck_conv: tuple[Array, ...] = ()  # L of f32[B, H, W, C]: the neck's last convolutions before norm and activation
    cls_tower: tuple[tuple[Array, ...], ...] = ()  # conv i, then L of f32[B, H, W, C]: output of conv i with its norm,
    reg_tower: tuple[tuple[Array, ...], ...] = ()  # before the activation (where `Detector.head` can enter again)
    cls_logits: tuple[Array, ...] = ()  # L of f32[B, H, W, A*K]
    # L of f32[B, H, W, A*4]: distances l t r b in pixels (RTMDet, FCOS), deltas of anchors (RetinaNet, ATSS), or centre
    # and size in cells (YOLOX); for GFL f32[B, H, W, 4*(n+1)], logits of the bins 0 .. n of each distance.
    box_reg: tuple[Array, ...] = ()
    quality: tuple[Array, ...] = ()  # L of f32[B, H, W, A]: centreness or objectness logits
    # L of f32[B, H, W, P]: the parameters of the small network that finds the mask of a cell's object (RTMDet-Ins); and
    # f32[B, H, W, C] at the finest stride: the maps that all of these networks read.
    kernels: tuple[Array, ...] = ()
    prototypes: Array | None = None
    quality_tower: str = dataclasses.field(default="", metadata={"static": True})  # "cls" or "reg", where it hangs
    # Of a two-stage detector, whose `box_reg` and `quality` are those of its proposals: the second stage, a function
    # of boxes f32[B, R, 4] in pixels: a `jax.tree_util.Partial` over parameters and maps, through which gradients flow.
    at: Callable[[Array], Regions] | None = None
    # Of a two-stage detector with masks, likewise: boxes f32[B, R, 4] and their classes i32[B, R] -> f32[B, R, m, m],
    # logits of the class's mask in m x m cells of the box.
    masks_at: Callable[[Array, Array], Array] | None = None
    stages: tuple[Stage, ...] = ()  # of a cascade, its second stages in turn; `at` and `masks_at` are those of the last
    # Of a transformer: what its own Q queries become in each layer of the decoder, first to last; and D-FINE's first
    # boxes (`Decoded.first`).
    layers: tuple[Queries, ...] = ()
    first: Queries | None = None
    selected: Queries | None = None  # of a transformer: the cells that become its queries, with gradient
    # Of a transformer: its decoder, asked about further queries: a `jax.tree_util.Partial` over parameters, the maps of
    # the encoder and the states of the own queries, through which gradients flow.
    ask: Callable[[Asked], Decoded] | None = None
    # What the model finds, as `Detector.decode` returns it: what a teacher may give that shows nothing else. Filled by
    # `Distiller.observe` where a method reads it.
    detections: "PaddedDetections | None" = None
    rows: Rows | None = (
        None  # the predictions of all levels as rows; filled by `Detector.observe`, or by a model of your own
    )
