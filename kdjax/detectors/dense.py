"""What RetinaNet, FCOS, GFL and ATSS share: ResNet, FPN on P3 to P7, two towers of convolutions, decoding.

A family (one file) has a head (`DenseHead`), a loss and boxes; `detector` combines them.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax.boxes import assign, nms, priors
from kdjax.detectors import levels, resnet
from kdjax.detectors.api import (
    Assign,
    Decode,
    Detector,
    Loss,
    TorchNames,
    Tree,
    check_entry,
    check_images,
    flatten,
    pure,
    unflatten,
)
from kdjax.detectors.fpn import FPN, SOURCES
from kdjax.detectors.keywords import changed, own_values, resolve
from kdjax.detectors.layers import Activation, Conv, GroupNorm, Quantiser, constant, for_int8, normal
from kdjax.errors import UserError
from kdjax.structs import Assignment, DetectorOutput, PaddedDetections, Targets

Array = jax.Array

STRIDES = (8, 16, 32, 64, 128)  # P3 to P7
# mmdetection pads with zeros after the normalisation; this is the nearest grey.
PAD_VALUE = 116

_OF_NETWORK = ("base_channels", "style", "frozen_stages", "norm_eval", "frozen_norm", "neck_channels", "extra_convs")


# Outputs of the convolutions of a tower before their activation (conv, then level), and predictions (name, then level).
Branch = tuple[tuple[tuple[Array, ...], ...], dict[str, tuple[Array, ...]]]


class TowerConv(nnx.Module):
    """A 3x3 convolution with optional bias, group norm if there are groups, and the ReLU of each level.

    In int8, runtimes fuse a convolution without norm with its ReLU, and have the output of one with group norm as
    bytes.
    """

    def __init__(self, inputs: int, outputs: int, *, groups: int, bias: bool) -> None:
        own, ranges = constant(0.0) if bias else None, len(STRIDES) if groups else 0
        self.conv = Conv(inputs, outputs, 3, draw=normal(0.01), bias=own, ranges=ranges)
        self.gn = GroupNorm(outputs, groups) if groups else None
        self.relus = nnx.List([Activation(jax.nn.relu) for _ in STRIDES])

    def normed(self, x: Array, train: bool, level: int) -> Array:
        """Returns the output before the activation."""
        x = self.conv(x, train, level)
        return x if self.gn is None else self.gn(x)


def tower(options: Mapping[str, Any], *, groups: int, bias: bool) -> nnx.List[TowerConv]:
    """The convolutions of a tower, shared by the levels; `groups=0`: no norm."""
    widths = [options["neck_channels"]] + [options["head_channels"]] * options["stacked_convs"]
    return nnx.List([TowerConv(*pair, groups=groups, bias=bias) for pair in itertools.pairwise(widths)])


def predictor(options: Mapping[str, Any], outputs: int, bias: float = 0.0) -> Conv:
    """The last 3x3 convolution after a tower."""
    width, ranges = options["head_channels"], len(STRIDES)
    return Conv(width, outputs, 3, draw=normal(0.01), bias=constant(bias), ranges=ranges)


def run(
    convs: nnx.List[TowerConv],
    maps: tuple[Array, ...],
    start: int,
    train: bool,
    predict: Callable[[int, Array], dict[str, Array]],
) -> Branch:
    """Runs a tower on all levels from conv `start` on (0-based; the maps are activated first if start > 0).

    `predict(level, features)` gives the predictions of a level by name. Returns the pre-activation outputs of the convs
    (conv, then level), and the predictions in float32, in which losses and boxes are computed (name, then level).
    """
    taps, predictions = [], []
    for level, x in enumerate(maps):
        x = convs[start - 1].relus[level](x, train) if start else x
        taps.append([])
        for conv in convs[start:]:
            taps[level].append(conv.normed(x, train, level))
            x = conv.relus[level](taps[level][-1], train)
        predictions.append(predict(level, x))
    names = predictions[0].keys()
    return tuple(zip(*taps, strict=True)), {name: tuple(level[name] for level in predictions) for name in names}


class DenseHead(Protocol):
    """An NNX module with two towers; `tower` is "cls" or "reg", and the result is that of `run`."""

    def branch(self, maps: tuple[Array, ...], tower: str, start: int, train: bool) -> Branch: ...


class Dense(nnx.Module):
    """The network; its parts have mmdetection's names."""

    def __init__(
        self,
        depth: int,
        head: Callable[[], DenseHead],
        *,
        neck_channels: int,
        extra_convs: str,
        relu: bool,
        anchors: int,
        quality_tower: str,
        **of_backbone: Any,
    ) -> None:
        self.anchors, self.quality_tower = anchors, quality_tower
        self.image = Quantiser()
        self.backbone = resnet.ResNet(depth, **of_backbone)
        inputs = self.backbone.channels[1:]
        self.neck = FPN(inputs, neck_channels, levels=len(STRIDES), extra_convs=extra_convs, relu=relu)
        self.bbox_head = head()

    def __call__(self, x: Array, train: bool) -> DetectorOutput:
        backbone = self.backbone(self.image(x, train), train)
        neck = self.neck(backbone[1:], train)
        cls_tower, of_cls = self.bbox_head.branch(neck, "cls", 0, train)
        reg_tower, of_reg = self.bbox_head.branch(neck, "reg", 0, train)
        predictions = of_cls | of_reg
        return DetectorOutput(
            strides=STRIDES,
            backbone_strides=resnet.STRIDES,
            anchors=self.anchors,
            backbone=backbone,
            neck=neck,
            neck_conv=neck,  # the pyramid's last convolutions have neither norm nor activation
            cls_tower=cls_tower,
            reg_tower=reg_tower,
            cls_logits=predictions["cls"],
            box_reg=predictions["reg"],
            quality=predictions.get("quality", ()),
            quality_tower=self.quality_tower,
        )


Options = dict[str, Any]  # all options of a detector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The facts and functions of one family of detectors; `title` is its name in messages."""

    title: str
    variants: Mapping[str, Mapping[str, Any]]  # name -> the variant's own options, and the backbone's "depth"
    classifier: str  # name of the head's module whose outputs are the classes
    head: Callable[[int, Options], DenseHead]  # of a number of classes
    branches: Callable[[Options], dict[str, str]]  # prediction -> the tower that it is predicted from
    relu: bool  # whether the pyramid's P6 is rectified before P7
    assign: Callable[[Options], Assign]
    loss: Callable[[Options], Loss]
    decode_boxes: Callable[[DetectorOutput], Array]
    priors: Callable[[tuple[int, int]], np.ndarray]
    iou_threshold: Callable[[Options], float]  # of the published NMS
    anchors: int = 1  # priors of a cell
    # The mean that the style "caffe" subtracts.
    bgr_mean: Callable[[Options], tuple[float, float, float]] = lambda options: resnet.BGR_MEAN
    constants: Callable[[Options], dict[str, np.ndarray]] = lambda options: {}  # `TorchNames.constants`


def detector(
    family: Family, make: Callable[..., Detector], variant: str, num_classes: int, given: dict[str, Any]
) -> Detector:
    """Builds a variant of a family.

    Args:
      family: facts and functions of the family.
      make: the family's `make`, whose defaults `Detector.options` leaves out.
      variant: a key of `family.variants`.
      num_classes: K >= 1.
      given: every option of `make`; None is replaced by the variant's own value.

    Raises:
      UserError: unknown variant, or a value out of range.
    """
    title = family.title
    own = own_values(title, family.variants, variant)
    depth, options = own.pop("depth"), resolve(given, own)
    _check(title, num_classes, options)
    branches, convs = family.branches(options), options["stacked_convs"]
    of_network = {name: options[name] for name in _OF_NETWORK}
    of_network |= {"relu": family.relu, "anchors": family.anchors, "quality_tower": branches.get("quality", "")}
    made = functools.partial(Dense, depth, lambda: family.head(num_classes, options), **of_network)
    module = pure(for_int8(made) if options["int8"] else made)

    def apply(params: Tree, stats: Tree, x: Array, *, train: bool) -> tuple[DetectorOutput, Tree]:
        check_images(title, x)
        return module.call(params, stats, Dense.__call__, x, train)

    def head(params: Tree, stats: Tree, features: tuple[Array, ...], *, branch: str, start: int) -> tuple[Array, ...]:
        check_entry(title, branches, convs, branch, start)

        def predict(network: Dense) -> dict[str, tuple[Array, ...]]:
            return network.bbox_head.branch(features, branches[branch], start, False)[1]

        return module.call(params, stats, predict)[0][branch]

    def no_decay(params: Tree) -> Tree:
        frozen = options["frozen_stages"]
        return unflatten(
            {path: not path.endswith("/kernel") or resnet.is_frozen(path, frozen) for path in flatten(params)}
        )

    return Detector(
        name=f"{title.lower()}_{variant}",
        num_classes=num_classes,
        options=changed(make, given),
        strides=STRIDES,
        size_divisor=32,
        pad_value=PAD_VALUE,
        shapes=module.shapes,
        classifiers=(f"bbox_head/{family.classifier}",),
        torch=TorchNames(constants=family.constants(options)),
        init=module.init,
        preprocess=functools.partial(resnet.preprocess, style=options["style"], bgr_mean=family.bgr_mean(options)),
        apply=apply,
        head=head,
        assign=family.assign(options),
        loss=family.loss(options),
        decode=decoder(family.decode_boxes, iou_threshold=family.iou_threshold(options)),
        decode_boxes=family.decode_boxes,
        class_logits=levels.class_logits,
        priors=family.priors,
        no_decay=no_decay,
    )


def _check(title: str, num_classes: int, options: dict[str, Any]) -> None:
    if num_classes < 1:
        raise UserError(f"num_classes of {title} must be >= 1, not {num_classes}")
    for name in ("base_channels", "neck_channels", "head_channels", "stacked_convs", "groups"):
        if options.get(name, 1) < 1:
            raise UserError(f"{name} of {title} must be >= 1, not {options[name]}")
    for name, values in (("style", resnet.STYLES), ("frozen_stages", (-1, 0, 1, 2, 3, 4)), ("extra_convs", SOURCES)):
        if options[name] not in values:
            raise UserError(f"{name} of {title} must be one of {', '.join(map(str, values))}, not {options[name]!r}")
    if options["head_channels"] % options.get("groups", 1):
        raise UserError(
            f"groups of {title} must divide head_channels: {options['groups']} does not divide "
            f"{options['head_channels']}"
        )


def square_anchors(output: DetectorOutput) -> np.ndarray:
    """The anchors of ATSS and GFL: one square per cell, eight strides wide; f32[N, 4] in NumPy."""
    return priors.grid_anchors(levels.input_size(output), output.strides, ratios=[1.0], scales=[8.0])


def assign_atss(output: DetectorOutput, targets: Targets, key: Array | None = None) -> Assignment:
    """What `boxes.assign.atss` decides on square anchors, nine candidates per level; `key` is not read."""
    del key
    return assign.atss(
        square_anchors(output),
        targets,
        num_classes=output.cls_logits[0].shape[-1],
        level_sizes=levels.level_sizes(output),
        inside=assign.inside_padding(levels.grid(output), targets.pad_size),
    )


def positives_of_images(assignment: Assignment) -> Array:
    """The sum over the images of the global batch of max(positive priors, 1), f32[]."""
    return jnp.sum(jnp.maximum(jnp.sum(assignment.positive, 1), 1)).astype(jnp.float32)


def decoder(decode_boxes: Callable[[DetectorOutput], Array], *, iou_threshold: float) -> Decode:
    """Returns the function `decode` of a family; its defaults are the published test settings."""

    def decode(
        output: DetectorOutput,
        image_size: Array,
        *,
        score_threshold: float = 0.05,
        iou_threshold: float = iou_threshold,
        pre_nms: int = 1000,
        max_detections: int = 100,
    ) -> PaddedDetections:
        """Turns predictions into detections by NMS within each class.

        Where there is a quality, scores are multiplied by it, after the threshold and `pre_nms`.

        Args:
          output: of `apply`.
          image_size: i32[B, 2], height and width that boxes are clipped to.
          score_threshold: pairs with a class score at or below it are dropped, 0 .. 1.
          iou_threshold: a box is dropped if its IoU with a better one of its class is above it.
          pre_nms: largest number of (prior, class) pairs of each level that enter NMS.
          max_detections: D, the number of rows of the result.

        Returns:
          D detections per image, padded.

        Scope: one image.

        Peers: mmdetection 3.3.0 BaseDenseHead.predict_by_feat without rescaling.
        """
        return nms.select_detections(
            decode_boxes(output),
            jax.nn.sigmoid(levels.class_logits(output)),
            quality=jax.nn.sigmoid(levels.join(output.quality, 1)[..., 0]) if output.quality else None,
            image_size=image_size,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            pre_nms=pre_nms,
            level_sizes=levels.level_sizes(output),
            max_detections=max_detections,
        )

    return decode
