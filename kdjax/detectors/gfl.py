"""GFL: ResNet, FPN, class scores that estimate the quality of the box, and box sides as distributions.

Reference: Li et al., Generalized Focal Loss, NeurIPS 2020. Peers: mmdetection 3.3.0, with the same module names and
numbers.

Loads: state dicts with mmdetection's names; for the backbone alone, torchvision's and timm's ResNets. Published AP:
40.2 and 44.7 (r50 in 12 epochs, r101 in 24 at several scales). Not reproduced yet (no published checkpoint was
available).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax.boxes import coding, iou, priors
from kdjax.detectors import dense, levels
from kdjax.detectors.api import Detector
from kdjax.detectors.layers import FOCAL_BIAS, Scale
from kdjax.errors import UserError
from kdjax.losses import box, classification
from kdjax.structs import Assignment, DetectorOutput, Targets

Array = jax.Array

VARIANTS = {f"r{depth}": {"depth": depth} for depth in (18, 34, 50, 101)}


class _Head(nnx.Module):
    def __init__(self, num_classes: int, options: Mapping[str, Any]) -> None:
        groups = options["groups"]
        self.cls_convs, self.reg_convs = (dense.tower(options, groups=groups, bias=False) for _ in range(2))
        self.gfl_cls = dense.predictor(options, num_classes, FOCAL_BIAS)
        self.gfl_reg = dense.predictor(options, 4 * (options["reg_max"] + 1))
        self.scales = nnx.List([Scale() for _ in dense.STRIDES])

    def branch(self, maps: tuple[Array, ...], tower: str, start: int, train: bool) -> dense.Branch:
        def predict(level: int, x: Array) -> dict[str, Array]:
            if tower == "cls":
                return {"cls": self.gfl_cls(x, train, level).astype(jnp.float32)}
            return {"reg": self.scales[level](self.gfl_reg(x, train, level).astype(jnp.float32))}

        return dense.run(self.cls_convs if tower == "cls" else self.reg_convs, maps, start, train, predict)


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
    extra_convs: str = "on_output",
    groups: int = 32,
    reg_max: int = 16,
    int8: bool = False,
) -> Detector:
    """Builds GFL.

    Args:
      variant: r18, r34, r50 or r101, the depth of the backbone.
      num_classes: K >= 1.
      base_channels, style, frozen_stages, norm_eval, frozen_norm, neck_channels, head_channels, stacked_convs,
        extra_convs: as in `kdjax.detectors.retinanet.make`.
      groups: of the group norm in the towers; divides head_channels.
      reg_max: the last bin of a side's distribution, in strides, >= 1.
      int8: whether it learns to compute with 8 bits (docs/int8.md).

    Returns:
      The detector. `box_reg` holds the logits of the bins, f32[B, H, W, 4 (reg_max + 1)], the sides in the order left,
      top, right, bottom.

    Raises:
      UserError: unknown variant, or a value out of range.

    Peers: mmdetection 3.3.0, configs/gfl/gfl_r*_fpn_*_coco.py.

    Example:
      >>> make("r18", 5, reg_max=8).options
      {'reg_max': 8}
    """
    if reg_max < 1:
        raise UserError(f"reg_max of GFL must be >= 1, not {reg_max}")
    given = dict(
        base_channels=base_channels, style=style, frozen_stages=frozen_stages, norm_eval=norm_eval,
        frozen_norm=frozen_norm, neck_channels=neck_channels, head_channels=head_channels,
        stacked_convs=stacked_convs, extra_convs=extra_convs, groups=groups, reg_max=reg_max,
        int8=int8,
    )  # fmt: skip
    return dense.detector(_FAMILY, make, variant, num_classes, given)


def grid_priors(hw: tuple[int, int]) -> np.ndarray:
    """x, y, stride and stride of every cell, f32[N, 4]."""
    return priors.grid_priors(hw, dense.STRIDES)


def _bins(output: DetectorOutput) -> Array:
    return levels.join(output.box_reg, output.box_reg[0].shape[-1])


def decode_boxes(output: DetectorOutput) -> Array:
    """Boxes of all priors, f32[B, N, 4] in pixels, not clipped: the expected distances of the distributions."""
    points = levels.grid(output)
    return coding.distance_to_boxes(points[:, :2], coding.expected_distance(_bins(output)) * points[:, 2:3])


def loss(output: DetectorOutput, targets: Targets, assignment: Assignment) -> dict[str, Array]:
    """GFL's three losses over the global batch.

    With q the IoU of a positive prior's box with its target (else 0), w = max_k sigmoid(logits) at positives (both
    without gradient), P = sum over images of max(positives, 1) and W = max(sum w, 1):
    loss_cls = sum quality_focal(logits, label, q) / P, loss_box = 2 sum w (1 - GIoU) / W,
    loss_dfl = 1/4 sum w (mean over the sides of the distribution focal loss) / W.

    Args:
      output: of `apply`.
      targets: ground truth.
      assignment: what to learn, of `assign_targets`.

    Returns:
      {"loss_cls": f32[], "loss_box": f32[], "loss_dfl": f32[]}, all >= 0.

    Scope: the global batch, all levels.

    Peers: mmdetection 3.3.0 GFLHead.loss_by_feat on one device, its levels added up.

    Reference: Li et al., NeurIPS 2020, equations 2, 6 and 8.
    """
    return levels.total(prior_losses(output, assignment), targets, assignment)


def prior_losses(output: DetectorOutput, assignment: Assignment) -> dict[str, Array]:
    """The losses of `loss` before the sum: f32[B, N] each, weighted and divided by the global normalizers."""
    positive, count = assignment.positive, dense.positives_of_images(assignment)
    logits, boxes, bins = levels.class_logits(output), decode_boxes(output), _bins(output)
    quality, confidence = jax.lax.stop_gradient(
        (iou.box_iou(boxes, assignment.boxes), jnp.max(jax.nn.sigmoid(logits), -1))
    )
    quality, confidence = (jnp.where(positive, x, 0.0) for x in (quality, confidence))
    normalizer = jnp.maximum(jnp.sum(confidence), 1.0)
    points, bins = levels.grid(output), bins.reshape(*bins.shape[:2], 4, -1)
    stride = points[:, 2:3]
    distances = coding.boxes_to_distance(
        points[:, :2] / stride, assignment.boxes / stride, max_distance=bins.shape[-1] - 1
    )
    focal = classification.quality_focal(logits, assignment.labels, quality)
    return {
        "loss_cls": jnp.where(assignment.ignore, 0.0, focal) / count,
        "loss_box": 2.0 * confidence * box.giou(boxes, assignment.boxes) / normalizer,
        "loss_dfl": 0.25 * confidence * jnp.mean(box.distribution_focal(bins, distances), -1) / normalizer,
    }


_FAMILY = dense.Family(
    title="GFL",
    variants=VARIANTS,
    classifier="gfl_cls",
    head=_Head,
    constants=lambda options: {"bbox_head.integral.project": np.arange(options["reg_max"] + 1, dtype=np.float32)},
    branches=lambda options: {"cls": "cls", "reg": "reg"},
    relu=False,
    assign=lambda options: dense.assign_atss,
    loss=lambda options: loss,
    iou_threshold=lambda options: 0.6,
    decode_boxes=decode_boxes,
    priors=grid_priors,
)
