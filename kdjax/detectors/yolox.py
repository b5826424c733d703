"""YOLOX: CSPDarknet, PAFPN and a head with separate towers and predictors for each level.

Reference: Ge et al., YOLOX: Exceeding YOLO Series in 2021, arXiv 2107.08430. Peers: mmdetection 3.3.0, with
the same module names and numbers; the authors' weights can be loaded too (`kdjax.weights.yolox`). Images are 640x640
where nothing says another size, 416x416 for nano and tiny, as published.

Loads: state dicts with the names of mmdetection or of the authors, and the authors' .onnx. Measured: the published
YOLOX-nano has 46.8 AP on 11 images of val2017 and 45.6 on 16 of train2017 (in onnxruntime: 46.9, 45.4).
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax.boxes import coding, dynamic, nms, priors
from kdjax.boxes.convert import clip
from kdjax.detectors import levels, pafpn
from kdjax.detectors.api import Detector, TorchNames, Tree, all_but_kernels, check_entry, check_images, pure
from kdjax.detectors.cspdarknet import EPS, CSPDarknet, conv3x3, conv_norm, csp_layer
from kdjax.detectors.keywords import changed, own_values, resolve
from kdjax.detectors.layers import (
    ACTIVATIONS,
    FOCAL_BIAS,
    Activation,
    Conv,
    ConvNorm,
    MakeConv,
    Quantiser,
    SeparableConv,
    check_activation,
    constant,
    for_int8,
)
from kdjax.detectors.pafpn import PAFPN
from kdjax.errors import UserError
from kdjax.losses import box, classification, distance
from kdjax.structs import Assignment, DetectorOutput, PaddedDetections, Targets

Array = jax.Array

STRIDES = (8, 16, 32)
# The published sizes, and a small one for CPUs (pico). Head and neck are as wide as the finest map.
VARIANTS = {
    "pico": {"widen": 0.125, "deepen": 0.33, "depthwise": True},
    "nano": {"widen": 0.25, "deepen": 0.33, "depthwise": True},
    "tiny": {"widen": 0.375, "deepen": 0.33, "depthwise": False},
    "s": {"widen": 0.5, "deepen": 0.33, "depthwise": False},
    "m": {"widen": 0.75, "deepen": 0.67, "depthwise": False},
    "l": {"widen": 1.0, "deepen": 1.0, "depthwise": False},
    "x": {"widen": 1.25, "deepen": 1.33, "depthwise": False},
}
_IMAGE_SIZES = {"nano": (416, 416), "tiny": (416, 416)}  # of the published weights, where these are not 640 x 640
# See `TorchNames.runs`: the order of the authors' network.
_RUNS = (
    *("backbone.stem", "backbone"),
    *pafpn.RUNS,
    *(
        f"{part}.{level}"
        for level in range(len(STRIDES))
        for part in (
            "neck.out_convs",
            "bbox_head.multi_level_cls_convs",
            "bbox_head.multi_level_conv_cls",
            "bbox_head.multi_level_reg_convs",
            "bbox_head.multi_level_conv_reg",
            "bbox_head.multi_level_conv_obj",
        )
    ),
    *("main_conv", "short_conv", "blocks", "final_conv"),
)
# The tower of each prediction.
_TOWERS = {"cls": "cls", "reg": "reg", "quality": "reg"}


class _Head(nnx.Module):
    """Two towers and three predictors for each level; the levels share nothing."""

    def __init__(self, channels: int, num_classes: int, *, stacked_convs: int, depthwise: bool, conv: MakeConv) -> None:
        make = conv3x3(depthwise, conv)

        def tower() -> nnx.List[nnx.List[Any]]:
            return nnx.List([nnx.List([make(channels, channels, 3) for _ in range(stacked_convs)]) for _ in STRIDES])

        def predictors(outputs: int, bias: float) -> nnx.List[Conv]:
            return nnx.List([Conv(channels, outputs, 1, bias=constant(bias)) for _ in STRIDES])

        self.multi_level_cls_convs, self.multi_level_reg_convs = tower(), tower()
        self.multi_level_conv_cls = predictors(num_classes, FOCAL_BIAS)
        self.multi_level_conv_reg = predictors(4, 0.0)
        self.multi_level_conv_obj = predictors(1, FOCAL_BIAS)

    def branch(
        self, maps: tuple[Array, ...], tower: str, start: int, train: bool
    ) -> tuple[tuple[tuple[Array, ...], ...], dict[str, tuple[Array, ...]]]:
        """Runs one tower on all levels from conv `start` on (0-based; the maps are activated first if start > 0).

        Returns the pre-activation outputs of its convs (conv, then level), and its predictions in float32, in which
        losses and boxes are computed (name, then level).
        """
        if tower == "cls":
            convs, predictors = self.multi_level_cls_convs, {"cls": self.multi_level_conv_cls}
        else:
            convs = self.multi_level_reg_convs
            predictors = {"reg": self.multi_level_conv_reg, "quality": self.multi_level_conv_obj}
        taps, ends = [], []
        for level, x in enumerate(maps):
            if start:
                activation = _activation(convs[level][start - 1])
                x = activation(activation.before(x, train), train)
            taps.append([])
            for conv in convs[level][start:]:
                taps[level].append(conv.normed(x, train))
                x = _activation(conv)(taps[level][-1], train)
            ends.append(x)
        predictions = {
            name: tuple(conv(x, train).astype(jnp.float32) for conv, x in zip(convs, ends, strict=True))
            for name, convs in predictors.items()
        }
        return tuple(zip(*taps, strict=True)), predictions


def _activation(layer: ConvNorm | SeparableConv) -> Activation:
    return layer.pointwise_conv.activation if isinstance(layer, SeparableConv) else layer.activation


class YOLOX(nnx.Module):
    """The network; its parts have mmdetection's names."""

    def __init__(
        self, num_classes: int, *, widen: float, deepen: float, depthwise: bool, stacked_convs: int, activation: str
    ) -> None:
        channels, blocks = int(256 * widen), max(round(3 * deepen), 1)
        conv = functools.partial(conv_norm, activation=ACTIVATIONS[activation])
        self.image = Quantiser()
        self.backbone = CSPDarknet(widen=widen, deepen=deepen, depthwise=depthwise, conv=conv)
        self.neck = PAFPN(
            self.backbone.channels,
            channels,
            layer=functools.partial(csp_layer, blocks=blocks, identity=False, depthwise=depthwise, conv=conv),
            size=1,
            conv=conv,
            down=conv3x3(depthwise, conv),
        )
        self.bbox_head = _Head(channels, num_classes, stacked_convs=stacked_convs, depthwise=depthwise, conv=conv)

    def __call__(self, x: Array, train: bool) -> DetectorOutput:
        backbone = self.backbone(self.image(x, train), train)
        neck, neck_conv = self.neck(backbone, train)
        cls_tower, of_cls = self.bbox_head.branch(neck, "cls", 0, train)
        reg_tower, of_reg = self.bbox_head.branch(neck, "reg", 0, train)
        return DetectorOutput(
            strides=STRIDES,
            backbone_strides=STRIDES,
            backbone=backbone,
            neck=neck,
            neck_conv=neck_conv,
            cls_tower=cls_tower,
            reg_tower=reg_tower,
            cls_logits=of_cls["cls"],
            box_reg=of_reg["reg"],
            quality=of_reg["quality"],
            quality_tower=_TOWERS["quality"],
        )


def make(
    variant: str,
    num_classes: int,
    *,
    widen: float | None = None,
    deepen: float | None = None,
    depthwise: bool | None = None,
    stacked_convs: int = 2,
    l1: bool = False,
    activation: str = "silu",
    int8: bool = False,
) -> Detector:
    """Builds YOLOX in one of its sizes.

    Args:
      variant: pico, nano, tiny, s, m, l or x.
      num_classes: K >= 1.
      widen, deepen: factors of channels (>= 1/64) and of blocks (> 0); None: the variant's.
      depthwise: whether 3x3 convolutions after the stem are depthwise separable; None: the variant's (True in pico and
        nano).
      stacked_convs: convolutions of each tower, >= 1.
      l1: whether the loss includes the absolute differences of the raw regressed values, as in the last 15 of the
        published 300 epochs.
      activation: of all convolutions with norm: silu, as published, relu or hard_swish.
      int8: whether it learns to compute with 8 bits (docs/int8.md).

    Returns:
      The detector. `box_reg` holds centre and size of boxes (`boxes.coding.cells_to_boxes`), `quality` the objectness
      logits.

    Raises:
      UserError: unknown variant, or a value out of range.

    Peers: mmdetection 3.3.0, configs/yolox/yolox_*_8xb8-300e_coco.py.

    Reference: arXiv 2107.08430, section 2.

    Example:
      >>> make("pico", 5, stacked_convs=1).options
      {'stacked_convs': 1}
    """
    given = dict(
        widen=widen, deepen=deepen, depthwise=depthwise, stacked_convs=stacked_convs, activation=activation
    )  # fmt: skip
    options = resolve(given, own_values("YOLOX", VARIANTS, variant))
    _check(num_classes, options)
    module = pure(for_int8(lambda: YOLOX(num_classes, **options)) if int8 else lambda: YOLOX(num_classes, **options))

    def apply(params: Tree, stats: Tree, x: Array, *, train: bool) -> tuple[DetectorOutput, Tree]:
        check_images("YOLOX", x)
        return module.call(params, stats, YOLOX.__call__, x, train)

    def head(params: Tree, stats: Tree, features: tuple[Array, ...], *, branch: str, start: int) -> tuple[Array, ...]:
        check_entry("YOLOX", _TOWERS, stacked_convs, branch, start)
        tower = _TOWERS[branch]
        return module.call(params, stats, lambda m: m.bbox_head.branch(features, tower, start, False)[1])[0][branch]

    return Detector(
        name=f"yolox_{variant}",
        num_classes=num_classes,
        options=changed(make, given | {"l1": l1, "int8": int8}),
        strides=STRIDES,
        size_divisor=32,
        pad_value=114,
        image_size=_IMAGE_SIZES.get(variant, (640, 640)),
        fit="down",
        shapes=module.shapes,
        classifiers=("bbox_head/multi_level_conv_cls",),
        torch=TorchNames(runs=_RUNS, eps=EPS),
        init=module.init,
        preprocess=preprocess,
        apply=apply,
        head=head,
        assign=assign_targets,
        loss=functools.partial(loss, l1=l1),
        decode=decode,
        decode_boxes=decode_boxes,
        class_logits=levels.class_logits,
        priors=lambda hw: priors.grid_priors(hw, STRIDES),
        no_decay=all_but_kernels,
    )


def _check(num_classes: int, options: Mapping[str, Any]) -> None:
    if num_classes < 1:
        raise UserError(f"num_classes of YOLOX must be >= 1, not {num_classes}")
    check_activation("YOLOX", options["activation"])
    if int(64 * options["widen"]) < 1 or options["deepen"] <= 0 or options["stacked_convs"] < 1:
        raise UserError(
            f"YOLOX needs widen >= 1/64, deepen > 0 and stacked_convs >= 1, not widen={options['widen']}, "
            f"deepen={options['deepen']}, stacked_convs={options['stacked_convs']}"
        )


def preprocess(images: Array) -> Array:
    """u8[B, H, W, 3] RGB -> f32[B, H, W, 3] BGR, 0 .. 255: nothing is normalised."""
    return images[..., ::-1].astype(jnp.float32)


def _objectness(output: DetectorOutput) -> Array:
    """Objectness logits of all levels, f32[B, N]."""
    return levels.join(output.quality, 1)[..., 0]


def decode_boxes(output: DetectorOutput) -> Array:
    """Boxes of all priors, f32[B, N, 4] in pixels, not clipped."""
    return coding.cells_to_boxes(levels.grid(output), levels.join(output.box_reg, 4))


def assign_targets(output: DetectorOutput, targets: Targets, key: Array | None = None) -> Assignment:
    """Assigns with SimOTA, on the scores sqrt(sigmoid(logit) sigmoid(objectness)) and the centres of the cells.

    Args:
      output: of `apply`.
      targets: ground truth.
      key: not used, because nothing is sampled.

    Returns:
      The assignment, without gradient.
    """
    del key
    points = levels.grid(output)
    middles = np.concatenate([points[:, :2] + points[:, 2:] / 2, points[:, 2:]], 1)
    scores = jnp.sqrt(jax.nn.sigmoid(levels.class_logits(output)) * jax.nn.sigmoid(_objectness(output))[..., None])
    return dynamic.sim_ota(jax.lax.stop_gradient(scores), decode_boxes(output), middles, targets)


def loss(output: DetectorOutput, targets: Targets, assignment: Assignment, *, l1: bool = False) -> dict[str, Array]:
    """YOLOX's losses over the global batch.

    With v the IoU of a positive prior's box and its target when it was assigned, IoU the same with a gradient, and P =
    max(positive priors, 1): loss_cls = sum over the positives and classes of BCE(logit, v at the label, else 0) / P,
    loss_box = 5 sum over the positives of (1 - IoU^2) / P, loss_obj = sum over all priors of BCE(objectness, 1 at
    positives, else 0) / P and, with `l1`, loss_l1 = sum over the positives and the four numbers of
    |box_reg - the numbers of the target| / P.

    Args:
      output: of `apply`.
      targets: ground truth.
      assignment: what to learn, of `assign_targets`.
      l1: whether there is loss_l1.

    Returns:
      {"loss_cls": f32[], "loss_box": f32[], "loss_obj": f32[]}, with `l1` "loss_l1", all >= 0.
      Without any box only loss_obj is not 0.

    Scope: the global batch, all levels.

    Peers: mmdetection 3.3.0 YOLOXHead.loss_by_feat on one device. Cells whose centre is outside the padded
      image are background there and left out here; kdjax's own batches have none.

    Reference: arXiv 2107.08430, section 2.1.
    """
    values = prior_losses(output, assignment)
    used = {name: value for name, value in values.items() if l1 or name != "loss_l1"}
    return levels.total(used, targets, assignment)


def prior_losses(output: DetectorOutput, assignment: Assignment) -> dict[str, Array]:
    """The losses of `loss` before the sum: f32[B, N] each, weighted and divided by the global normalizer."""
    positive, points = assignment.positive, levels.grid(output)
    count = jnp.maximum(jnp.sum(positive), 1).astype(jnp.float32)
    logits = levels.class_logits(output)
    label = jax.nn.one_hot(assignment.labels, logits.shape[-1]) * assignment.quality[..., None]
    entropy = jnp.sum(classification.soft_binary_cross_entropy(logits, label), -1)
    decoded = jnp.where(positive[..., None], decode_boxes(output), 0.0)
    apart = box.iou(decoded, assignment.boxes, form="square")
    presence = classification.soft_binary_cross_entropy(_objectness(output), positive.astype(jnp.float32))
    # A background prior has no box: its own cell stands in.
    boxes = jnp.where(positive[..., None], assignment.boxes, coding.cells_to_boxes(points, jnp.zeros((len(points), 4))))
    difference = jnp.sum(distance.l1(levels.join(output.box_reg, 4), coding.boxes_to_cells(points, boxes)), -1)
    return {
        "loss_cls": jnp.where(positive, entropy, 0.0) / count,
        "loss_box": 5.0 * jnp.where(positive, apart, 0.0) / count,
        "loss_obj": jnp.where(assignment.ignore, 0.0, presence) / count,
        "loss_l1": jnp.where(positive, difference, 0.0) / count,
    }


def decode(
    output: DetectorOutput,
    image_size: Array,
    *,
    score_threshold: float = 0.001,
    iou_threshold: float = 0.65,
    pre_nms: int = 30000,
    max_detections: int = 300,
) -> PaddedDetections:
    """Turns predictions into detections by NMS within each class.

    Scores are sigmoid(logit) sigmoid(objectness). NMS compares unclipped boxes; they are clipped afterwards, and those
    outside the image are left out.

    Args:
      output: of `apply`.
      image_size: i32[B, 2], height and width that boxes are clipped to.
      score_threshold: pairs with a score at or below it are dropped, 0 .. 1.
      iou_threshold: a box is dropped if its IoU with a better one of its class is above it.
      pre_nms: largest number of (prior, class) pairs of each level that enter NMS.
      max_detections: D, the number of rows of the result.

    Returns:
      D detections per image, padded.

    Scope: one image.

    Peers: mmdetection 3.3.0 YOLOXHead.predict_by_feat without rescaling, which considers only the best class of a prior
      and does not clip.
    """
    boxes = decode_boxes(output)
    inside = clip(boxes, image_size)
    scores = jax.nn.sigmoid(levels.class_logits(output)) * jax.nn.sigmoid(_objectness(output))[..., None]
    seen = jnp.all(inside[..., 2:] > inside[..., :2], -1, keepdims=True)
    found = nms.select_detections(
        boxes,
        jnp.where(seen, scores, 0.0),
        level_sizes=levels.level_sizes(output),
        image_size=None,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        pre_nms=pre_nms,
        max_detections=max_detections,
    )
    return found._replace(boxes=clip(found.boxes, image_size))
