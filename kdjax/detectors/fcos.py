"""FCOS: ResNet, FPN, and two towers that classify and regress one point in each cell, with a centreness.

Reference: Tian et al., FCOS: Fully Convolutional One-Stage Object Detection, ICCV 2019. Peers: mmdetection 3.3.0, with
the same module names and numbers. It has the two published forms: the plain one, and the one with centre sampling,
distances in strides, the centreness on the regression tower, and GIoU (variants "...-center").

Loads: state dicts with mmdetection's names; for the backbone alone, torchvision's and timm's ResNets, with the option
style="pytorch" (the published detectors start from Caffe's). Published AP: 36.6 and 39.1 (r50, r101, 12 epochs). Not
reproduced yet (no published checkpoint was available).
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax.boxes import assign, coding, priors
from kdjax.detectors import dense, levels, resnet
from kdjax.detectors.api import Detector
from kdjax.detectors.layers import FOCAL_BIAS, Scale
from kdjax.errors import UserError
from kdjax.losses import box, classification
from kdjax.structs import Assignment, DetectorOutput, Targets

Array = jax.Array

# Largest distance of a point to a side of its box, in pixels, by level.
_RANGES = ((-1.0, 64.0), (64.0, 128.0), (128.0, 256.0), (256.0, 512.0), (512.0, np.inf))
_RADIUS = 1.5  # of the centre region, in strides
_CENTER = {
    "center_sampling": True,
    "norm_on_bbox": True,
    "centerness_on_reg": True,
    "conv_bias": True,
    "box_loss": "giou",
}
_PLAIN = dict.fromkeys(_CENTER, False) | {"box_loss": "iou"}
VARIANTS = {
    f"r{depth}{suffix}": {"depth": depth} | own
    for suffix, own in (("", _PLAIN), ("-center", _CENTER))
    for depth in (18, 34, 50, 101)
}


class _Head(nnx.Module):
    def __init__(self, num_classes: int, options: Mapping[str, Any]) -> None:
        self.cls_convs, self.reg_convs = (
            dense.tower(options, groups=options["groups"], bias=options["conv_bias"]) for _ in range(2)
        )
        self.conv_cls = dense.predictor(options, num_classes, FOCAL_BIAS)
        self.conv_reg = dense.predictor(options, 4)
        self.conv_centerness = dense.predictor(options, 1)
        self.scales = nnx.List([Scale() for _ in dense.STRIDES])
        self.norm_on_bbox = options["norm_on_bbox"]
        self.centerness_tower = "reg" if options["centerness_on_reg"] else "cls"

    def branch(self, maps: tuple[Array, ...], tower: str, start: int, train: bool) -> dense.Branch:
        def predict(level: int, x: Array) -> dict[str, Array]:
            if tower == "cls":
                predictions = {"cls": self.conv_cls(x, train, level).astype(jnp.float32)}
            else:
                y = self.scales[level](self.conv_reg(x, train, level).astype(jnp.float32))
                predictions = {"reg": jax.nn.relu(y) * dense.STRIDES[level] if self.norm_on_bbox else jnp.exp(y)}
            if tower == self.centerness_tower:
                predictions["quality"] = self.conv_centerness(x, train, level).astype(jnp.float32)
            return predictions

        return dense.run(self.cls_convs if tower == "cls" else self.reg_convs, maps, start, train, predict)


def make(
    variant: str,
    num_classes: int,
    *,
    base_channels: int = 64,
    style: str = "caffe",
    frozen_stages: int = 1,
    norm_eval: bool = True,
    frozen_norm: bool = True,
    neck_channels: int = 256,
    head_channels: int = 256,
    stacked_convs: int = 4,
    extra_convs: str = "on_output",
    groups: int = 32,
    center_sampling: bool | None = None,
    norm_on_bbox: bool | None = None,
    centerness_on_reg: bool | None = None,
    conv_bias: bool | None = None,
    box_loss: str | None = None,
    int8: bool = False,
) -> Detector:
    """Builds FCOS.

    Args:
      variant: r18, r34, r50 or r101, the depth of the backbone; "r18-center" and so on for the second form.
      num_classes: K >= 1.
      base_channels, style, frozen_stages, norm_eval, frozen_norm, neck_channels, head_channels, stacked_convs,
        extra_convs: as in `kdjax.detectors.retinanet.make`.
      groups: of the group norm in the towers; divides head_channels.
      center_sampling: whether only points near the centre of a box are positive. Here and below, None is the variant's
        value (True in the second form).
      norm_on_bbox: whether distances are relu(x) in strides, instead of exp(x) in pixels.
      centerness_on_reg: whether the regression tower predicts the centreness, instead of the class tower.
      conv_bias: whether the towers' convolutions have a bias before the norm.
      box_loss: "iou", -log of the IoU, or "giou"; None: the variant's ("giou" in the second form).
      int8: whether it learns to compute with 8 bits (docs/int8.md).

    Returns:
      The detector. `box_reg` holds distances left, top, right, bottom in pixels; `quality` the centreness logits.

    Raises:
      UserError: unknown variant, or a value out of range.

    Peers: mmdetection 3.3.0, configs/fcos/fcos_r*-caffe_fpn_gn-head*_1x_coco.py without deformable convolutions.

    Example:
      >>> make("r18-center", 5, base_channels=8).options
      {'base_channels': 8}
    """
    if box_loss not in (None, "iou", "giou"):
        raise UserError(f"box_loss of FCOS must be iou or giou, not {box_loss!r}")
    given = dict(
        base_channels=base_channels, style=style, frozen_stages=frozen_stages, norm_eval=norm_eval,
        frozen_norm=frozen_norm, neck_channels=neck_channels, head_channels=head_channels,
        stacked_convs=stacked_convs, extra_convs=extra_convs,
        groups=groups, center_sampling=center_sampling, norm_on_bbox=norm_on_bbox,
        centerness_on_reg=centerness_on_reg, conv_bias=conv_bias, box_loss=box_loss,
        int8=int8,
    )  # fmt: skip
    return dense.detector(_FAMILY, make, variant, num_classes, given)


def grid_priors(hw: tuple[int, int]) -> np.ndarray:
    """x, y, stride and stride of every cell's centre, f32[N, 4]."""
    return priors.grid_priors(hw, dense.STRIDES, offset=0.5)


def _points(output: DetectorOutput) -> np.ndarray:
    return priors.grid_priors(levels.input_size(output), output.strides, offset=0.5)


def decode_boxes(output: DetectorOutput) -> Array:
    """Boxes of all points, f32[B, N, 4] in pixels, not clipped."""
    return coding.distance_to_boxes(_points(output)[:, :2], levels.join(output.box_reg, 4))


def assign_targets(
    output: DetectorOutput, targets: Targets, key: Array | None = None, *, center_sampling: bool = False
) -> Assignment:
    """Assigns each point to the smallest box around it whose size is in the range of the level.

    Args:
      output: of `apply`.
      targets: ground truth.
      key: not used, because nothing is sampled.
      center_sampling: whether only points within 1.5 strides of the centre of a box are positive.

    Returns:
      The assignment.
    """
    del key
    return assign.smallest_box(
        _points(output),
        targets,
        num_classes=output.cls_logits[0].shape[-1],
        ranges=np.repeat(_RANGES, levels.level_sizes(output), axis=0),
        radius=_RADIUS if center_sampling else None,
    )


def loss(
    output: DetectorOutput, targets: Targets, assignment: Assignment, *, box_loss: str = "iou"
) -> dict[str, Array]:
    """FCOS's three losses over the global batch.

    With P = max(positives, 1), c the centreness of a positive point in its box and C = max(sum c, 1e-6):
    loss_cls = sum focal(logits, label) / P, loss_box = sum c (-log IoU) / C (or 1 - GIoU), loss_quality = sum over the
    positives of BCE(quality, c) / P.

    Args:
      output: of `apply`.
      targets: ground truth.
      assignment: what to learn, of `assign_targets`.
      box_loss: "iou" or "giou".

    Returns:
      {"loss_cls": f32[], "loss_box": f32[], "loss_quality": f32[]}, all >= 0.

    Scope: the global batch, all levels.

    Peers: mmdetection 3.3.0 FCOSHead.loss_by_feat on one device.

    Reference: Tian et al., ICCV 2019, equation 2 and section 3.3.
    """
    return levels.total(prior_losses(output, assignment, box_loss=box_loss), targets, assignment)


def prior_losses(output: DetectorOutput, assignment: Assignment, *, box_loss: str = "iou") -> dict[str, Array]:
    """The losses of `loss` before the sum: f32[B, N] each, divided by the global normalizers."""
    positive = assignment.positive
    count = jnp.maximum(jnp.sum(positive), 1).astype(jnp.float32)
    central = coding.centreness(coding.boxes_to_distance(_points(output)[:, :2], assignment.boxes))
    central = jnp.where(positive, central, 0.0)
    focal = jnp.sum(classification.sigmoid_focal(levels.class_logits(output), assignment.labels), -1)
    boxes = jnp.where(positive[..., None], decode_boxes(output), 0.0)
    apart = box.iou(boxes, assignment.boxes) if box_loss == "iou" else box.giou(boxes, assignment.boxes)
    entropy = classification.soft_binary_cross_entropy(levels.join(output.quality, 1)[..., 0], central)
    return {
        "loss_cls": jnp.where(assignment.ignore, 0.0, focal) / count,
        "loss_box": central * apart / jnp.maximum(jnp.sum(central), 1e-6),
        "loss_quality": jnp.where(positive, entropy, 0.0) / count,
    }


_FAMILY = dense.Family(
    title="FCOS",
    variants=VARIANTS,
    classifier="conv_cls",
    head=_Head,
    branches=lambda options: {"cls": "cls", "reg": "reg", "quality": "reg" if options["centerness_on_reg"] else "cls"},
    relu=True,
    assign=lambda options: functools.partial(assign_targets, center_sampling=options["center_sampling"]),
    loss=lambda options: functools.partial(loss, box_loss=options["box_loss"]),
    iou_threshold=lambda options: 0.6 if options["norm_on_bbox"] else 0.5,
    decode_boxes=decode_boxes,
    priors=grid_priors,
    bgr_mean=lambda options: resnet.BGR_MEAN if options["norm_on_bbox"] else (102.9801, 115.9465, 122.7717),
)
