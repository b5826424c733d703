"""Mask R-CNN: Faster R-CNN that also finds the mask of each object, with a small network on its box.

Reference: He et al., Mask R-CNN, ICCV 2017; on a pyramid: Lin et al., Feature Pyramid Networks, CVPR 2017. Peers:
mmdetection 3.3.0, with the same module names and numbers.

Loads: state dicts with mmdetection's names, and those of torchvision's maskrcnn_resnet50_fpn (v1), of whose 91 outputs
it takes the background and COCO's 80 classes; for the backbone alone, torchvision's and timm's ResNets. Published mask
AP: 34.7, 36.1, 37.5 and 38.4 (r50, r101, x101-32x4d, x101-64x4d, 12 epochs; box AP 38.2, 40.0, 41.9 and 42.8),
torchvision's 34.6 (37.9). Not reproduced yet (no published checkpoint was available).
"""

import functools

from flax import nnx

from kdjax.detectors import box_head, levels, mask_head, two_stage
from kdjax.detectors.api import Assign, Detector
from kdjax.errors import UserError
from kdjax.structs import Array, Assignment, DetectorOutput, Regions, Targets

VARIANTS = two_stage.VARIANTS
TITLE = "Mask R-CNN"


class _RoIHead(nnx.Module):
    """A second stage that finds boxes and masks."""

    def __init__(
        self, num_classes: int, channels: int, hidden: int, mask_channels: int, mask_convs: int, *, peer: str
    ) -> None:
        self.peer = peer
        self.bbox_head = box_head.BoxHead(num_classes, channels, hidden)
        self.mask_head = mask_head.MaskHead(num_classes, channels, mask_channels, mask_convs)

    def regions(self, maps: tuple[Array, ...], boxes: Array) -> Regions:
        return self.bbox_head(box_head.features(maps, boxes, box_head.SIZE, peer=self.peer))

    def masks(self, maps: tuple[Array, ...], boxes: Array, labels: Array) -> Array:
        return self.mask_head(box_head.features(maps, boxes, mask_head.SIZE, peer=self.peer), labels)


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
    head_channels: int = 1024,
    mask_channels: int = 256,
    mask_convs: int = 4,
    rpn_samples: int = 256,
    train_pre_nms: int = 2000,
    proposals: int = 1000,
    region_samples: int = 512,
    peer: str = "mmdetection",
) -> Detector:
    """Builds Mask R-CNN.

    Args:
      variant: r18, r34, r50, r101, x50-32x4d, x101-32x4d or x101-64x4d, the backbone (x: ResNeXt).
      num_classes: K >= 1.
      base_channels: channels of the backbone's stem, >= 1.
      style: "pytorch" (RGB; a bottleneck's stride in its 3x3 convolution) or "caffe" (BGR, only the mean subtracted;
        the stride in the first 1x1 convolution).
      frozen_stages: -1: the whole backbone is trained; 0: all but the stem; n: all but the stem and the first n stages.
      norm_eval: whether the backbone's norms keep their running statistics, as is usual for pretrained weights.
      frozen_norm: whether the scales and biases of these norms get no gradient.
      neck_channels: channels of the pyramid and of the RPN, >= 1.
      head_channels: outputs of the two linear layers of the second stage, >= 1.
      mask_channels: channels of the mask head, >= 1.
      mask_convs: convolutions of the mask head, >= 1.
      rpn_samples: anchors of an image that are learned, >= 2; at most half of them are positive.
      train_pre_nms: largest number of anchors of a level that enter the NMS of the proposals in training, >= 1.
      proposals: number of proposals of an image, in training and in tests, >= 1.
      region_samples: regions of an image that are learned, >= 4; at most a quarter of them are positive.
      peer: "mmdetection", or "torchvision": whose weights these are (see `faster_rcnn`). Weights with torchvision's
        names choose it by themselves.

    Returns:
      The detector. `box_reg` and `quality` of its output are the deltas and the objectness of three anchors in each
      cell; what the second stage says of given boxes is `output.at(boxes)` and `output.masks_at(boxes, labels)`. It
      returns masks of boxes.

    Raises:
      UserError: unknown variant, or a value out of range.

    Peers: mmdetection 3.3.0, configs/mask_rcnn/mask-rcnn_{r,x}*_fpn_1x_coco.py.

    Example:
      >>> make("r18", 5, base_channels=8).masks
      'box'
    """
    given = dict(
        base_channels=base_channels, style=style, frozen_stages=frozen_stages, norm_eval=norm_eval,
        frozen_norm=frozen_norm, neck_channels=neck_channels, head_channels=head_channels,
        mask_channels=mask_channels, mask_convs=mask_convs, rpn_samples=rpn_samples, train_pre_nms=train_pre_nms,
        proposals=proposals, region_samples=region_samples, peer=peer,
    )  # fmt: skip
    for name, value in (("mask_channels", mask_channels), ("mask_convs", mask_convs)):
        if value < 1:
            raise UserError(f"{name} of {TITLE} must be >= 1, not {value}")
    boxes = two_stage.box_stage(num_classes, given, match_low_quality=True)
    second = boxes._replace(
        network=lambda: _RoIHead(num_classes, neck_channels, head_channels, mask_channels, mask_convs, peer=peer),
        fields=lambda bind: {"at": bind(_RoIHead.regions), "masks_at": bind(_RoIHead.masks)},
        classifiers=(*boxes.classifiers, "mask_head/conv_logits"),
        assign=_assigner(boxes.assign),
        loss=loss,
        decode=mask_head.decoder(boxes.decode),
        masks="box",
    )
    return two_stage.detector(TITLE, "mask_rcnn", make, variant, num_classes, given, second)


def _assigner(of_boxes: Assign) -> Assign:
    @functools.wraps(of_boxes)
    def assign(output: DetectorOutput, targets: Targets, key: Array | None = None) -> Assignment:
        found = of_boxes(output, targets, key)
        return found._replace(masked=found.positive)

    return assign


def loss(output: DetectorOutput, targets: Targets, assignment: Assignment) -> dict[str, Array]:
    """The losses of Faster R-CNN and that of the masks over the global batch: `mask_head.mask_losses`.

    Args:
      output: of `apply`.
      targets: ground truth with masks of any whole stride.
      assignment: what to learn, of `assign`; the second stage looks at its regions.

    Returns:
      loss_rpn_cls, loss_rpn_box, loss_cls, loss_box and loss_mask, each f32[] >= 0.

    Scope: the global batch.

    Peers: mmdetection 3.3.0 TwoStageDetector.loss on one device, the levels of the RPN added up.

    Reference: He et al., Mask R-CNN, ICCV 2017, section 3.

    Raises:
      UserError: there are no masks, or they do not fit the input.
    """
    stride = mask_head.check_masks(TITLE, output, targets)
    assert output.masks_at is not None
    of_masks = mask_head.mask_losses(output.masks_at, targets, assignment, stride=stride)
    return two_stage.loss(output, targets, assignment) | levels.total({"loss_mask": of_masks}, targets, assignment)
