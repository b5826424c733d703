"""RetinaNet: ResNet, FPN, and two towers that classify and regress nine anchors in each cell.

Reference: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017. Peers: mmdetection 3.3.0, with the same
module names and numbers (boxes by L1 on deltas, not smooth L1).

Loads: state dicts with mmdetection's names; for the backbone alone, torchvision's and timm's ResNets. Published AP:
36.5 and 38.5 (r50, r101, 12 epochs). Not reproduced yet (no published checkpoint was available).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax.boxes import assign, coding, priors
from kdjax.detectors import dense, levels
from kdjax.detectors.api import Detector
from kdjax.detectors.layers import FOCAL_BIAS
from kdjax.losses import classification, distance
from kdjax.structs import Assignment, DetectorOutput, Targets

Array = jax.Array

RATIOS = (0.5, 1.0, 2.0)
SCALES = priors.octave_scales(4, 3)
ANCHORS = len(RATIOS) * len(SCALES)
VARIANTS = {f"r{depth}": {"depth": depth} for depth in (18, 34, 50, 101)}


class _Head(nnx.Module):
    def __init__(self, num_classes: int, options: Mapping[str, Any]) -> None:
        self.cls_convs, self.reg_convs = (dense.tower(options, groups=0, bias=True) for _ in range(2))
        self.retina_cls = dense.predictor(options, ANCHORS * num_classes, FOCAL_BIAS)
        self.retina_reg = dense.predictor(options, ANCHORS * 4)

    def branch(self, maps: tuple[Array, ...], tower: str, start: int, train: bool) -> dense.Branch:
        convs, conv = (self.cls_convs, self.retina_cls) if tower == "cls" else (self.reg_convs, self.retina_reg)
        return dense.run(convs, maps, start, train, lambda level, x: {tower: conv(x, train, level).astype(jnp.float32)})


def make(
    variant: str,
    num_classes: int,
    *,
    base_channels: int = 64,
    style: str = "pytorch",
    frozen_stages: int = 1,
    norm_eval: bool = True,
    frozen_norm: bool = False,
    neck_channels: int = 256,
    head_channels: int = 256,
    stacked_convs: int = 4,
    extra_convs: str = "on_input",
    int8: bool = False,
) -> Detector:
    """Builds RetinaNet.

    Args:
      variant: r18, r34, r50 or r101, the depth of the backbone.
      num_classes: K >= 1.
      base_channels: channels of the backbone's stem, >= 1.
      style: "pytorch" (RGB; a bottleneck's stride in its 3x3 convolution) or "caffe" (BGR, only the mean subtracted;
        the stride in the first 1x1 convolution).
      frozen_stages: -1: the whole backbone is trained; 0: all but the stem; n: all but the stem and the first n stages.
      norm_eval: whether the backbone's norms keep their running statistics, as is usual for pretrained weights.
      frozen_norm: whether the scales and biases of these norms get no gradient.
      neck_channels, head_channels: channels of the pyramid and of the towers, >= 1.
      stacked_convs: convolutions of each tower, >= 1.
      extra_convs: input of the convolution of P6: "on_input" (C5) or "on_output" (P5).
      int8: whether it learns to compute with 8 bits (docs/int8.md).

    Returns:
      The detector. `box_reg` holds the deltas of nine anchors in each cell (`boxes.coding.boxes_to_deltas`), by ratio,
      then by scale; its priors repeat each cell nine times.

    Raises:
      UserError: unknown variant, or a value out of range.

    Peers: mmdetection 3.3.0, configs/retinanet/retinanet_r*_fpn_1x_coco.py.

    Example:
      >>> make("r18", 5, base_channels=8).strides
      (8, 16, 32, 64, 128)
    """
    given = dict(
        base_channels=base_channels, style=style, frozen_stages=frozen_stages, norm_eval=norm_eval,
        frozen_norm=frozen_norm, neck_channels=neck_channels, head_channels=head_channels,
        stacked_convs=stacked_convs, extra_convs=extra_convs,
        int8=int8,
    )  # fmt: skip
    return dense.detector(_FAMILY, make, variant, num_classes, given)


def grid_priors(hw: tuple[int, int]) -> np.ndarray:
    """x, y, stride and stride of every anchor's cell, f32[N, 4]."""
    return np.repeat(priors.grid_priors(hw, dense.STRIDES), ANCHORS, 0)


def anchors(output: DetectorOutput) -> np.ndarray:
    """The anchors of all levels, f32[N, 4] in pixels."""
    return priors.grid_anchors(levels.input_size(output), output.strides, ratios=RATIOS, scales=SCALES)


def decode_boxes(output: DetectorOutput) -> Array:
    """Boxes of all anchors, f32[B, N, 4] in pixels, not clipped."""
    return coding.deltas_to_boxes(anchors(output), levels.join(output.box_reg, 4))


def assign_targets(output: DetectorOutput, targets: Targets, key: Array | None = None) -> Assignment:
    """Matches anchors with an IoU of at least 0.5; those below 0.4 are background.

    Args:
      output: of `apply`.
      targets: ground truth.
      key: not used, because nothing is sampled.

    Returns:
      The assignment, without gradient.
    """
    del key
    cells = grid_priors(levels.input_size(output))
    return assign.max_iou(
        anchors(output),
        targets,
        num_classes=output.cls_logits[0].shape[-1] // ANCHORS,
        positive_iou=0.5,
        negative_iou=0.4,
        inside=assign.inside_padding(cells, targets.pad_size),
    )


def loss(output: DetectorOutput, targets: Targets, assignment: Assignment) -> dict[str, Array]:
    """RetinaNet's two losses over the global batch.

    With P = sum over images of max(positives, 1): loss_cls = sum focal(logits, label) / P over all priors that are
    not ignored, loss_box = sum |deltas - deltas of the box| / P over the positives.

    Args:
      output: of `apply`.
      targets: ground truth.
      assignment: what to learn, of `assign_targets`.

    Returns:
      {"loss_cls": f32[], "loss_box": f32[]}, both >= 0.

    Scope: the global batch, all levels.

    Peers: mmdetection 3.3.0 RetinaHead.loss_by_feat on one device, its levels added up.

    Reference: Lin et al., ICCV 2017, section 4.
    """
    return levels.total(prior_losses(output, assignment), targets, assignment)


def prior_losses(output: DetectorOutput, assignment: Assignment) -> dict[str, Array]:
    """The losses of `loss` before the sum: f32[B, N] each, divided by the global normalizer."""
    positive, count = assignment.positive, dense.positives_of_images(assignment)
    focal = jnp.sum(classification.sigmoid_focal(levels.class_logits(output), assignment.labels), -1)
    boxes = jnp.where(positive[..., None], assignment.boxes, anchors(output))
    apart = jnp.sum(distance.l1(levels.join(output.box_reg, 4), coding.boxes_to_deltas(anchors(output), boxes)), -1)
    return {
        "loss_cls": jnp.where(assignment.ignore, 0.0, focal) / count,
        "loss_box": jnp.where(positive, apart, 0.0) / count,
    }


_FAMILY = dense.Family(
    title="RetinaNet",
    variants=VARIANTS,
    classifier="retina_cls",
    head=_Head,
    branches=lambda options: {"cls": "cls", "reg": "reg"},
    relu=False,
    anchors=ANCHORS,
    assign=lambda options: assign_targets,
    loss=lambda options: loss,
    iou_threshold=lambda options: 0.5,
    decode_boxes=decode_boxes,
    priors=grid_priors,
)
