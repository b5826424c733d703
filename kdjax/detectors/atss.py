"""ATSS: ResNet, FPN, one square anchor in each cell with an adaptive selection of positives, and a centreness.

Reference: Zhang et al., Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample
Selection, CVPR 2020. Peers: mmdetection 3.3.0, with the same module names and numbers.

Loads: state dicts with mmdetection's names; for the backbone alone, torchvision's and timm's ResNets. Published AP:
39.4 and 41.5 (r50, r101, 12 epochs). Not reproduced yet (no published checkpoint was available).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax.boxes import coding, priors
from kdjax.detectors import dense, levels
from kdjax.detectors.api import Detector
from kdjax.detectors.layers import FOCAL_BIAS, Scale
from kdjax.losses import box, classification
from kdjax.structs import Assignment, DetectorOutput, Targets

Array = jax.Array

VARIANTS = {f"r{depth}": {"depth": depth} for depth in (18, 34, 50, 101)}
_STDS = (0.1, 0.1, 0.2, 0.2)  # of the deltas


class _Head(nnx.Module):
    def __init__(self, num_classes: int, options: Mapping[str, Any]) -> None:
        groups = options["groups"]
        self.cls_convs, self.reg_convs = (dense.tower(options, groups=groups, bias=False) for _ in range(2))
        self.atss_cls = dense.predictor(options, num_classes, FOCAL_BIAS)
        self.atss_reg = dense.predictor(options, 4)
        self.atss_centerness = dense.predictor(options, 1)
        self.scales = nnx.List([Scale() for _ in dense.STRIDES])

    def branch(self, maps: tuple[Array, ...], tower: str, start: int, train: bool) -> dense.Branch:
        def predict(level: int, x: Array) -> dict[str, Array]:
            if tower == "cls":
                return {"cls": self.atss_cls(x, train, level).astype(jnp.float32)}
            return {
                "reg": self.scales[level](self.atss_reg(x, train, level).astype(jnp.float32)),
                "quality": self.atss_centerness(x, train, level).astype(jnp.float32),
            }

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
    int8: bool = False,
) -> Detector:
    """Builds ATSS.

    Args:
      variant: r18, r34, r50 or r101, the depth of the backbone.
      num_classes: K >= 1.
      base_channels, style, frozen_stages, norm_eval, frozen_norm, neck_channels, head_channels, stacked_convs,
        extra_convs: as in `kdjax.detectors.retinanet.make`.
      groups: of the group norm in the towers; divides head_channels.
      int8: whether it learns to compute with 8 bits (docs/int8.md).

    Returns:
      The detector. `box_reg` holds the deltas of the square anchors (`boxes.coding.boxes_to_deltas`), `quality` the
      centreness logits.

    Raises:
      UserError: unknown variant, or a value out of range.

    Peers: mmdetection 3.3.0, configs/atss/atss_r*_fpn_1x_coco.py.

    Example:
      >>> make("r18", 5, groups=16).options
      {'groups': 16}
    """
    given = dict(
        base_channels=base_channels, style=style, frozen_stages=frozen_stages, norm_eval=norm_eval,
        frozen_norm=frozen_norm, neck_channels=neck_channels, head_channels=head_channels,
        stacked_convs=stacked_convs, extra_convs=extra_convs, groups=groups,
        int8=int8,
    )  # fmt: skip
    return dense.detector(_FAMILY, make, variant, num_classes, given)


def grid_priors(hw: tuple[int, int]) -> np.ndarray:
    """x, y, stride and stride of every cell, f32[N, 4]."""
    return priors.grid_priors(hw, dense.STRIDES)


def decode_boxes(output: DetectorOutput) -> Array:
    """Boxes of all anchors, f32[B, N, 4] in pixels, not clipped."""
    return coding.deltas_to_boxes(dense.square_anchors(output), levels.join(output.box_reg, 4), stds=_STDS)


def loss(output: DetectorOutput, targets: Targets, assignment: Assignment) -> dict[str, Array]:
    """ATSS's three losses over the global batch.

    With c the centreness of a positive anchor's centre in its box, P = sum over images of max(positives, 1) and
    C = max(sum c, 1): loss_cls = sum focal(logits, label) / P, loss_box = 2 sum c (1 - GIoU) / C, loss_quality = sum
    over the positives of BCE(quality, c) / P.

    Args:
      output: of `apply`.
      targets: ground truth.
      assignment: what to learn, of `assign_targets`.

    Returns:
      {"loss_cls": f32[], "loss_box": f32[], "loss_quality": f32[]}, all >= 0.

    Scope: the global batch, all levels.

    Peers: mmdetection 3.3.0 ATSSHead.loss_by_feat on one device, its levels added up.

    Reference: Zhang et al., CVPR 2020, section 4.
    """
    return levels.total(prior_losses(output, assignment), targets, assignment)


def prior_losses(output: DetectorOutput, assignment: Assignment) -> dict[str, Array]:
    """The losses of `loss` before the sum: f32[B, N] each, weighted and divided by the global normalizers."""
    positive, count = assignment.positive, dense.positives_of_images(assignment)
    central = coding.centreness(coding.boxes_to_distance(levels.grid(output)[:, :2], assignment.boxes))
    central = jnp.where(positive, central, 0.0)
    focal = jnp.sum(classification.sigmoid_focal(levels.class_logits(output), assignment.labels), -1)
    apart = box.giou(decode_boxes(output), assignment.boxes)
    entropy = classification.soft_binary_cross_entropy(levels.join(output.quality, 1)[..., 0], central)
    return {
        "loss_cls": jnp.where(assignment.ignore, 0.0, focal) / count,
        "loss_box": 2.0 * central * apart / jnp.maximum(jnp.sum(central), 1.0),
        "loss_quality": jnp.where(positive, entropy, 0.0) / count,
    }


_FAMILY = dense.Family(
    title="ATSS",
    variants=VARIANTS,
    classifier="atss_cls",
    head=_Head,
    branches=lambda options: {"cls": "cls", "reg": "reg", "quality": "reg"},
    relu=False,
    assign=lambda options: dense.assign_atss,
    loss=lambda options: loss,
    iou_threshold=lambda options: 0.6,
    decode_boxes=decode_boxes,
    priors=grid_priors,
)
