"""RTMDet: CSPNeXt, CSPNeXt-PAFPN and a head whose levels share convolutions but not batch norms.

Reference: Lyu et al., RTMDet: An Empirical Study of Designing Real-Time Object Detectors, arXiv 2212.07784. Peers:
mmdetection 3.3.0, with the same module names and numbers. It differs in one place: without the exponential,
the distances' bias starts at 1 (as in mmdetection's RTMDet-Ins) instead of 0, so that first boxes are two cells wide
instead of empty; with the exponential both are the same.

nano is OpenMMLab's network for persons in images of 320x320: its 3x3 convolutions are depthwise separable, and its
levels share nothing. pico and micro are kdjax's own. Images are 640x640 where nothing says another size, 320x320 for
nano.

Loads: state dicts with the names of mmdetection, mmyolo and mmrazor's distillers, and .onnx of mmdeploy. Measured: the
published nano has 40.0 AP for persons on 2,693 images of val2017 that hold one (in onnxruntime: 40.0). Published AP:
41.1, 44.6, 49.4, 51.5 and 52.8 (tiny to x). Not reproduced yet (no published checkpoint was available).
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax.boxes import coding, dynamic, nms, priors
from kdjax.detectors import levels, pafpn, towers
from kdjax.detectors.api import (
    UNNAMED,
    Detector,
    PureModule,
    State,
    TorchNames,
    Tree,
    all_but_kernels,
    check_entry,
    check_images,
    pure,
)
from kdjax.detectors.cspnext import Block, CSPNeXt
from kdjax.detectors.keywords import changed, own_values, resolve
from kdjax.detectors.layers import (
    ACTIVATIONS,
    FOCAL_BIAS,
    ConvNorm,
    CSPLayer,
    Quantiser,
    SeparableConv,
    check_activation,
    for_int8,
)
from kdjax.detectors.pafpn import PAFPN
from kdjax.detectors.towers import STRIDES
from kdjax.errors import UserError
from kdjax.losses import box, classification
from kdjax.structs import Assignment, DetectorOutput, PaddedDetections, Targets

Array = jax.Array

_BGR_MEAN = np.array([103.53, 116.28, 123.675], np.float32)
_BGR_STD = np.array([57.375, 57.12, 58.395], np.float32)

# The published sizes, and two small ones of kdjax for CPUs (pico, micro). Head and neck are as wide as the finest map.
VARIANTS = {
    "pico": {"widen": 0.125, "deepen": 0.167, "exp_on_reg": False, "depthwise": False},
    "nano": {"widen": 0.25, "deepen": 0.33, "exp_on_reg": False, "depthwise": True},
    "micro": {"widen": 0.25, "deepen": 0.167, "exp_on_reg": False, "depthwise": False},
    "tiny": {"widen": 0.375, "deepen": 0.167, "exp_on_reg": False, "depthwise": False},
    "s": {"widen": 0.5, "deepen": 0.33, "exp_on_reg": False, "depthwise": False},
    "m": {"widen": 0.75, "deepen": 0.67, "exp_on_reg": True, "depthwise": False},
    "l": {"widen": 1.0, "deepen": 1.0, "exp_on_reg": True, "depthwise": False},
    "x": {"widen": 1.25, "deepen": 1.33, "exp_on_reg": True, "depthwise": False},
}
_IMAGE_SIZES = {"nano": (320, 320)}  # of the published weights, where these are not 640 x 640
# Towers in PyTorch: a convolution that the levels share is stored once for each level.
_SHARED_CONV = re.compile(r"(bbox_head/(?:cls|reg)_convs)/0/(\d+/conv/kernel)")
# See `TorchNames.runs`.
_RUNS = (
    *("backbone.stem", "backbone"),
    *pafpn.RUNS,
    "neck.out_convs",
    *(
        f"bbox_head.{part}.{level}"
        for level in range(len(STRIDES))
        for part in ("cls_convs", "rtm_cls", "reg_convs", "rtm_reg")
    ),
    *("short_conv", "main_conv", "blocks", "attention", "final_conv"),
)
_MMYOLO_HEAD = "bbox_head.head_module."
# mmyolo's names and mmdetection's; the modules are the same.
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


class _Head(nnx.Module):
    """Two towers over the levels: the convolutions are shared if `share_conv`, norms and predictors never."""

    def __init__(
        self,
        inputs: int,
        channels: int,
        num_classes: int,
        *,
        stacked_convs: int,
        share_conv: bool,
        exp_on_reg: bool,
        depthwise: bool,
        activation: str,
    ) -> None:
        self.exp_on_reg = exp_on_reg
        shared = functools.partial(towers.tower, share_conv=share_conv)
        tower = functools.partial(towers.separable_tower if depthwise else shared, activation=ACTIVATIONS[activation])
        self.cls_convs = tower(inputs, channels, convs=stacked_convs)
        self.reg_convs = tower(inputs, channels, convs=stacked_convs)
        self.rtm_cls = towers.predictors(channels, num_classes, FOCAL_BIAS)
        self.rtm_reg = towers.predictors(channels, 4, 0.0 if exp_on_reg else 1.0)

    def branch(self, maps: tuple[Array, ...], name: str, start: int, train: bool) -> towers.Branch:
        """`towers.run_tower` of one branch."""
        if name == "cls":
            return towers.run_tower(self.cls_convs, self.rtm_cls, maps, start, train)

        def distances(level: int, y: Array) -> Array:
            return (jnp.exp(y) if self.exp_on_reg else y) * STRIDES[level]

        return towers.run_tower(self.reg_convs, self.rtm_reg, maps, start, train, distances)

    def __call__(self, maps: tuple[Array, ...], train: bool) -> dict[str, Any]:
        """The head's fields of `DetectorOutput`."""
        cls_tower, cls_logits = self.branch(maps, "cls", 0, train)
        reg_tower, box_reg = self.branch(maps, "reg", 0, train)
        return {"cls_tower": cls_tower, "reg_tower": reg_tower, "cls_logits": cls_logits, "box_reg": box_reg}


class RTMDet(nnx.Module):
    """The network; its parts have mmdetection's names. `head()` makes a head: maps, train -> fields of the output."""

    def __init__(
        self,
        head: Callable[[], Callable[[tuple[Array, ...], bool], dict[str, Any]]],
        *,
        widen: float,
        deepen: float,
        expand_ratio: float,
        attention: bool,
        neck_channels: int,
        neck_blocks: int,
        depthwise: bool = False,
        activation: str = "silu",
    ) -> None:
        conv = functools.partial(ConvNorm, activation=ACTIVATIONS[activation])
        self.image = Quantiser()
        self.backbone = CSPNeXt(
            widen=widen,
            deepen=deepen,
            expand_ratio=expand_ratio,
            attention=attention,
            depthwise=depthwise,
            conv=conv,
        )
        layer = functools.partial(
            CSPLayer,
            blocks=neck_blocks,
            block=functools.partial(Block, identity=False, depthwise=depthwise, conv=conv),
            expand_ratio=expand_ratio,
            conv=conv,
        )
        last = functools.partial(SeparableConv, conv=conv) if depthwise else conv
        form = {"layer": layer, "size": 3, "conv": conv, "down": last, "out": last}
        self.neck = PAFPN(self.backbone.channels, neck_channels, **form)
        self.bbox_head = head()

    def __call__(self, x: Array, train: bool) -> DetectorOutput:
        return self.outputs(*self.features(x, train), train)

    def features(self, x: Array, train: bool) -> tuple[tuple[Array, ...], tuple[Array, ...], tuple[Array, ...]]:
        """Returns the maps of the backbone, of the neck, and of the neck's last convolutions."""
        backbone = self.backbone(self.image(x, train), train)
        return backbone, *self.neck(backbone, train)

    def outputs(
        self, backbone: tuple[Array, ...], neck: tuple[Array, ...], neck_conv: tuple[Array, ...], train: bool
    ) -> DetectorOutput:
        """Runs the head and names everything."""
        return DetectorOutput(
            strides=STRIDES,
            backbone_strides=STRIDES,
            backbone=backbone,
            neck=neck,
            neck_conv=neck_conv,
            **self.bbox_head(neck, train),
        )


def network(
    num_classes: int,
    *,
    head_channels: int,
    stacked_convs: int,
    share_conv: bool,
    exp_on_reg: bool,
    depthwise: bool = False,
    activation: str = "silu",
    int8: bool = False,
    **trunk: Any,
) -> PureModule:
    """Returns the network as pure functions, `int8`: of `for_int8`; `trunk` are the keywords of `RTMDet`."""
    head = functools.partial(
        _Head,
        trunk["neck_channels"],
        head_channels,
        num_classes,
        stacked_convs=stacked_convs,
        share_conv=share_conv,
        exp_on_reg=exp_on_reg,
        depthwise=depthwise,
        activation=activation,
    )
    made = functools.partial(RTMDet, head, depthwise=depthwise, activation=activation, **trunk)
    return pure(for_int8(made) if int8 else made)


def resolved(
    title: str, variants: Mapping[str, Mapping[str, Any]], variant: str, num_classes: int, given: Mapping[str, Any]
) -> dict[str, Any]:
    """All options of a network of a variant; None is replaced by the variant's own value.

    Raises:
      UserError: unknown variant, or a value out of range.
    """
    options = resolve(given, own_values(title, variants, variant))
    if num_classes < 1:
        raise UserError(f"num_classes of {title} must be >= 1, not {num_classes}")
    if int(64 * options["widen"] // 2) < 1 or options["deepen"] <= 0 or options["stacked_convs"] < 1:
        raise UserError(
            f"{title} needs widen >= 1/32, deepen > 0 and stacked_convs >= 1, not widen={options['widen']}, "
            f"deepen={options['deepen']}, stacked_convs={options['stacked_convs']}"
        )
    width, depth = int(256 * options["widen"]), max(round(3 * options["deepen"]), 1)
    options = resolve(options, {"neck_channels": width, "head_channels": width, "neck_blocks": depth})
    for name in ("neck_channels", "head_channels", "neck_blocks"):
        if options[name] < 1:
            raise UserError(f"{name} of {title} must be >= 1, not {options[name]}")
    if int(min(128 * options["widen"], options["neck_channels"]) * options["expand_ratio"]) < 1:
        raise UserError(
            f"expand_ratio of {title} must leave at least one of the channels of each CSP layer, not be "
            f"{options['expand_ratio']}"
        )
    return options


def make(
    variant: str,
    num_classes: int,
    *,
    widen: float | None = None,
    deepen: float | None = None,
    expand_ratio: float = 0.5,
    attention: bool = True,
    neck_channels: int | None = None,
    neck_blocks: int | None = None,
    head_channels: int | None = None,
    stacked_convs: int = 2,
    share_conv: bool | None = None,
    exp_on_reg: bool | None = None,
    depthwise: bool | None = None,
    activation: str = "silu",
    int8: bool = False,
) -> Detector:
    """Builds RTMDet in one of its sizes.

    Args:
      variant: pico, nano, micro, tiny, s, m, l or x.
      num_classes: K >= 1.
      widen, deepen: factors of channels (>= 1/32) and of blocks (> 0); None: the variant's.
      expand_ratio: share of a CSP layer's channels that each of its halves has.
      attention: whether the backbone has channel attention.
      neck_channels, head_channels: channels of the neck's maps and of the towers; None: 256 widen.
      neck_blocks: blocks of each CSP layer of the neck; None: max(round(3 deepen), 1).
      stacked_convs: convolutions of each tower, >= 1.
      share_conv: whether the levels share the towers' convolutions; None: unless they are depthwise separable.
      exp_on_reg: whether distances are exponentials or linear; None: the variant's (exponentials in m, l and x).
      depthwise: whether the 3x3 convolutions after the stem are depthwise separable; None: the variant's (True in
        nano).
      activation: of all convolutions with norm: silu, as published, relu or hard_swish.
      int8: whether it learns to compute with 8 bits (docs/int8.md).

    Returns:
      The detector. Its boxes are decoded from `box_reg`: distances left, top, right, bottom in pixels.

    Raises:
      UserError: unknown variant, or a value out of range.

    Peers: mmdetection 3.3.0, configs/rtmdet/rtmdet_*_8xb32-300e_coco.py; nano: mmpose 1.3,
      projects/rtmpose/rtmdet/person/rtmdet_nano_320-8xb32_coco-person.py.

    Reference: arXiv 2212.07784, table 2.

    Example:
      >>> make("pico", 5, stacked_convs=1).options
      {'stacked_convs': 1}
    """
    given = dict(
        widen=widen, deepen=deepen, expand_ratio=expand_ratio, attention=attention, neck_channels=neck_channels,
        neck_blocks=neck_blocks, head_channels=head_channels, stacked_convs=stacked_convs, share_conv=share_conv,
        exp_on_reg=exp_on_reg, depthwise=depthwise, activation=activation, int8=int8,
    )  # fmt: skip
    check_activation("RTMDet", activation)
    options = resolved("RTMDet", VARIANTS, variant, num_classes, given)
    options = resolve(options, {"share_conv": not options["depthwise"]})
    if options["share_conv"] and options["depthwise"]:
        raise UserError("share_conv of RTMDet: depthwise separable convolutions cannot be shared: it must be False")
    module = network(num_classes, **options)

    def apply(params: Tree, stats: Tree, x: Array, *, train: bool) -> tuple[DetectorOutput, Tree]:
        check_images("RTMDet", x)
        return module.call(params, stats, RTMDet.__call__, x, train)

    def head(params: Tree, stats: Tree, features: tuple[Array, ...], *, branch: str, start: int) -> tuple[Array, ...]:
        check_entry("RTMDet", ("cls", "reg"), stacked_convs, branch, start)
        return module.call(params, stats, lambda m: m.bbox_head.branch(features, branch, start, False)[1])[0]

    def infer(state: State) -> dict[str, bool]:
        linear = exp_on_reg is None and options["exp_on_reg"] and is_mmyolo(state)
        # With its level's norm folded into it, a shared convolution is another one in each level.
        apart = options["share_conv"] and any(name.startswith(UNNAMED) for name in state)
        return ({"exp_on_reg": False} if linear else {}) | ({"share_conv": False} if apart else {})

    return Detector(
        name=f"rtmdet_{variant}",
        num_classes=num_classes,
        options=changed(make, given),
        strides=STRIDES,
        size_divisor=32,
        pad_value=114,
        image_size=_IMAGE_SIZES.get(variant, (640, 640)),
        shapes=module.shapes,
        classifiers=("bbox_head/rtm_cls",),
        torch=TorchNames(
            copies=level_copies if options["share_conv"] else lambda path: [],
            rename=_from_mmyolo,
            infer=infer,
            runs=_RUNS,
        ),
        init=module.init,
        preprocess=preprocess,
        apply=apply,
        head=head,
        assign=assign_targets,
        loss=loss,
        decode=decode,
        decode_boxes=decode_boxes,
        class_logits=levels.class_logits,
        priors=lambda hw: priors.grid_priors(hw, STRIDES),
        no_decay=all_but_kernels,
    )


def level_copies(path: str) -> list[str]:
    """The other levels' names of a convolution that all levels share."""
    shared = _SHARED_CONV.fullmatch(path)
    return [f"{shared[1]}/{level}/{shared[2]}" for level in range(1, len(STRIDES))] if shared else []


def is_mmyolo(state: State) -> bool:
    """Whether the names of a state are mmyolo's, whose RTMDet has linear distances in all sizes."""
    return any(_MMYOLO_HEAD in name for name in state)


def _from_mmyolo(state: State) -> State:
    """The state under mmdetection's names; a state without mmyolo's names is returned unchanged."""
    if not is_mmyolo(state):
        return state

    def renamed(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in _MMYOLO if name.startswith(old)), name)

    return {renamed(name): value for name, value in state.items()}


def preprocess(images: Array) -> Array:
    """u8[B, H, W, 3] RGB -> f32[B, H, W, 3] BGR, minus ImageNet's mean, divided by its standard deviation."""
    return (images[..., ::-1].astype(jnp.float32) - _BGR_MEAN) / _BGR_STD


def decode_boxes(output: DetectorOutput) -> Array:
    """Boxes of all priors, f32[B, N, 4] in pixels; not clipped, and inverted where a linear distance is negative."""
    return coding.distance_to_boxes(levels.grid(output)[:, :2], levels.join(output.box_reg, 4))


def assign_targets(output: DetectorOutput, targets: Targets, key: Array | None = None) -> Assignment:
    """Assigns with RTMDet's dynamic soft-label assigner.

    Args:
      output: of `apply`.
      targets: ground truth.
      key: not used, because nothing is sampled.

    Returns:
      The assignment, without gradient.
    """
    del key
    logits, boxes = levels.class_logits(output), decode_boxes(output)
    return dynamic.dynamic_soft_label(
        jax.lax.stop_gradient(logits), jax.lax.stop_gradient(boxes), levels.grid(output), targets
    )


def loss(output: DetectorOutput, targets: Targets, assignment: Assignment) -> dict[str, Array]:
    """RTMDet's two losses over the global batch.

    With the quality q of each prior (IoU of a positive prior and its box, else 0) and n = max(sum q, 1):
    loss_cls = sum quality_focal(logits, label, q) / n, loss_box = 2 sum q (1 - GIoU) / n.

    Args:
      output: of `apply`.
      targets: ground truth.
      assignment: what to learn, of `assign_targets`.

    Returns:
      {"loss_cls": f32[], "loss_box": f32[]}, both >= 0. Without any box, loss_box is 0.

    Scope: the global batch, all levels.

    Peers: mmdetection 3.3.0 RTMDetHead.loss_by_feat on one device, its levels added up.

    Reference: arXiv 2212.07784, section 3.3.
    """
    focal, giou = prior_losses(levels.class_logits(output), decode_boxes(output), assignment)
    return levels.total({"loss_cls": focal, "loss_box": giou}, targets, assignment)


def prior_losses(logits: Array, boxes: Array, assignment: Assignment) -> tuple[Array, Array]:
    """The two losses of `loss` before the sum: f32[B, N] each, weighted and divided by the global normalizer."""
    quality = jnp.where(assignment.positive, assignment.quality, 0.0)
    normalizer = jnp.maximum(jnp.sum(quality), 1.0)
    focal = classification.quality_focal(logits, assignment.labels, quality)
    giou = box.giou(jnp.where(assignment.positive[..., None], boxes, 0.0), assignment.boxes)
    return jnp.where(assignment.ignore, 0.0, focal) / normalizer, 2.0 * quality * giou / normalizer


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

    Peers: mmdetection 3.3.0 RTMDetHead.predict_by_feat without rescaling.
    """
    return nms.select_detections(
        decode_boxes(output),
        jax.nn.sigmoid(levels.class_logits(output)),
        image_size=image_size,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        pre_nms=pre_nms,
        level_sizes=levels.level_sizes(output),
        max_detections=max_detections,
    )
