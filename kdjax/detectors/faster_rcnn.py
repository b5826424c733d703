"""Faster R-CNN: proposals of a first stage on a feature pyramid, each classified and moved by a second one.

Reference: Ren et al., Faster R-CNN, NeurIPS 2015; on a pyramid: Lin et al., Feature Pyramid Networks, CVPR 2017. Peers:
mmdetection 3.3.0, with the same module names and numbers (boxes by L1 on deltas, not smooth L1).

Loads: state dicts with mmdetection's names, and those of torchvision's fasterrcnn_resnet50_fpn (v1), of whose 91
outputs it takes the background and COCO's 80 classes; for the backbone alone, torchvision's and timm's ResNets.
Published AP: 37.4, 39.4, 41.2 and 42.1 (r50, r101, x101-32x4d, x101-64x4d, 12 epochs), torchvision's 37.0. Not
reproduced yet (no published checkpoint was available).
"""

from kdjax.detectors import two_stage
from kdjax.detectors.api import Detector

VARIANTS = two_stage.VARIANTS


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
    rpn_samples: int = 256,
    train_pre_nms: int = 2000,
    proposals: int = 1000,
    region_samples: int = 512,
    peer: str = "mmdetection",
) -> Detector:
    """Builds Faster R-CNN.

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
      rpn_samples: anchors of an image that are learned, >= 2; at most half of them are positive.
      train_pre_nms: largest number of anchors of a level that enter the NMS of the proposals in training, >= 1.
      proposals: number of proposals of an image, in training and in tests, >= 1.
      region_samples: regions of an image that are learned, >= 4; at most a quarter of them are positive.
      peer: "mmdetection", or "torchvision": whose weights these are. With torchvision's, deltas are those of anchors
        with rounded corners, and regions have two samples along each side of a cell and are shifted by half a cell.
        Weights with torchvision's names choose it by themselves.

    Returns:
      The detector. `box_reg` and `quality` of its output are the deltas and the objectness of three anchors in each
      cell; what the second stage says of given boxes is `output.at(boxes)`.

    Raises:
      UserError: unknown variant, or a value out of range.

    Peers: mmdetection 3.3.0, configs/faster_rcnn/faster-rcnn_{r,x}*_fpn_1x_coco.py.

    Example:
      >>> make("r18", 5, base_channels=8).strides
      (4, 8, 16, 32, 64)
    """
    given = dict(
        base_channels=base_channels, style=style, frozen_stages=frozen_stages, norm_eval=norm_eval,
        frozen_norm=frozen_norm, neck_channels=neck_channels, head_channels=head_channels, rpn_samples=rpn_samples,
        train_pre_nms=train_pre_nms, proposals=proposals, region_samples=region_samples,
        peer=peer,
    )  # fmt: skip
    second = two_stage.box_stage(num_classes, given)
    return two_stage.detector("Faster R-CNN", "faster_rcnn", make, variant, num_classes, given, second)
