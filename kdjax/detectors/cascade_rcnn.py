"""Cascade R-CNN: three second stages, each trained on the boxes of the one before, for higher and higher overlaps.

Reference: Cai and Vasconcelos, Cascade R-CNN: Delving into High Quality Object Detection, CVPR 2018; with masks
(Cascade Mask R-CNN): the same, IEEE TPAMI 2021. Peers: mmdetection 3.3.0, with the same module names and numbers.

What others may ask of it, `output.at`, is the last stage alone: what it says of given boxes, without the first two.
Methods that compare regions, with a cascade as student or as teacher, look at that.

Loads: state dicts with mmdetection's names; for the backbone alone, torchvision's and timm's ResNets. Published AP:
40.3, 42.0, 43.7 and 44.7 (r50, r101, x101-32x4d, x101-64x4d, 12 epochs); with masks 41.2, 42.9, 44.3 and 45.3, and of
the masks 35.9, 37.3, 38.3 and 39.2. Not reproduced yet (no published checkpoint was available).
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.boxes import coding
from kdjax.boxes.convert import clip
from kdjax.detectors import box_head, levels, mask_head, rpn, two_stage
from kdjax.detectors.api import Assign, Detector, Loss
from kdjax.errors import UserError
from kdjax.losses import distance
from kdjax.structs import Array, Assignment, DetectorOutput, Regions, Stage, Targets

VARIANTS = two_stage.VARIANTS
TITLE = "Cascade R-CNN"


class _Settings(NamedTuple):
    """Of one stage."""

    iou: float  # from which its regions are positive
    stds: tuple[float, ...]  # of its deltas
    weight: float  # of its losses


STAGES = (
    _Settings(0.5, (0.1, 0.1, 0.2, 0.2), 1.0),
    _Settings(0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
    _Settings(0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
)
RPN_BETA = 1 / 9  # of the smooth L1 distance of the anchors' deltas; that of the regions' is 1


class _RoIHead(nnx.Module):
    """The second stages; `masks` has the arguments of a `mask_head.MaskHead` beyond its inputs, if there are any."""

    def __init__(self, num_classes: int, channels: int, hidden: int, masks: tuple[int, int] | None) -> None:
        self.bbox_head = nnx.List(
            [box_head.BoxHead(num_classes, channels, hidden, of_any_class=True, stds=one.stds) for one in STAGES]
        )
        if masks is not None:
            self.mask_head = nnx.List([mask_head.MaskHead(num_classes, channels, *masks) for _ in STAGES])

    def regions(self, maps: tuple[Array, ...], boxes: Array, *, stage: int) -> Regions:
        return self.bbox_head[stage](box_head.features(maps, boxes, box_head.SIZE))

    def masks(self, maps: tuple[Array, ...], boxes: Array, labels: Array, *, stage: int) -> Array:
        return self.mask_head[stage](box_head.features(maps, boxes, mask_head.SIZE), labels)


_REGIONS, _MASKS = (
    [functools.partial(method, stage=stage) for stage in range(len(STAGES))]
    for method in (_RoIHead.regions, _RoIHead.masks)
)


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
    masks: bool = False,
    mask_channels: int = 256,
    mask_convs: int = 4,
    rpn_samples: int = 256,
    train_pre_nms: int = 2000,
    train_proposals: int = 2000,
    proposals: int = 1000,
    region_samples: int = 512,
) -> Detector:
    """Builds Cascade R-CNN.

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
      head_channels: outputs of the two linear layers of each second stage, >= 1.
      masks: whether it finds masks too, as Cascade Mask R-CNN.
      mask_channels: channels of the mask heads, >= 1.
      mask_convs: convolutions of each mask head, >= 1.
      rpn_samples: anchors of an image that are learned, >= 2; at most half of them are positive.
      train_pre_nms: largest number of anchors of a level that enter the NMS of the proposals in training, >= 1.
      train_proposals: number of proposals of an image in training, >= 1.
      proposals: number of proposals of an image in tests, >= 1.
      region_samples: regions of an image that each stage learns, >= 4; at most a quarter of them are positive.

    Returns:
      The detector. `box_reg` and `quality` of its output are the deltas and the objectness of three anchors in each
      cell; `output.stages` are the second stages, `output.at(boxes)` and `output.masks_at(boxes, labels)` the last one.

    Raises:
      UserError: unknown variant, or a value out of range.

    Peers: mmdetection 3.3.0, configs/cascade_rcnn/cascade-rcnn_{r,x}*_fpn_1x_coco.py and
      cascade-mask-rcnn_{r,x}*_fpn_1x_coco.py.

    Example:
      >>> make("r18", 5, base_channels=8, masks=True).masks
      'box'
    """
    given = dict(
        base_channels=base_channels, style=style, frozen_stages=frozen_stages, norm_eval=norm_eval,
        frozen_norm=frozen_norm, neck_channels=neck_channels, head_channels=head_channels, masks=masks,
        mask_channels=mask_channels, mask_convs=mask_convs, rpn_samples=rpn_samples, train_pre_nms=train_pre_nms,
        train_proposals=train_proposals, proposals=proposals, region_samples=region_samples,
    )  # fmt: skip
    sizes = {"mask_channels": mask_channels, "mask_convs": mask_convs, "train_proposals": train_proposals}
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{name} of {TITLE} must be >= 1, not {value}")

    def fields(bind: two_stage.Bind) -> dict[str, Any]:
        stages = tuple(
            Stage(bind(regions), bind(of_masks) if masks else None)
            for regions, of_masks in zip(_REGIONS, _MASKS, strict=True)
        )
        return {"stages": stages, "at": stages[-1].at, "masks_at": stages[-1].masks_at}

    numbers = range(len(STAGES))
    classifiers = tuple(f"bbox_head/{i}/fc_cls" for i in numbers)
    decode = two_stage.decoder(num_classes, proposals, look_through)
    second = two_stage.SecondStage(
        network=lambda: _RoIHead(
            num_classes, neck_channels, head_channels, (mask_channels, mask_convs) if masks else None
        ),
        fields=fields,
        classifiers=classifiers + tuple(f"mask_head/{i}/conv_logits" for i in numbers if masks),
        background=classifiers,
        assign=_assigner(num_classes, given),
        loss=_loss(masks),
        decode=mask_head.decoder(decode) if masks else decode,
        masks="box" if masks else "",
    )
    return two_stage.detector(TITLE, "cascade_rcnn", make, variant, num_classes, given, second)


def refine(found: Regions, boxes: Array, image_size: Array) -> Array:
    """Where a stage moves the boxes f32[B, R, 4] that it has looked at, clipped to the image; without gradient."""
    moved = coding.deltas_to_boxes(boxes, found.box_reg, stds=box_head.STDS)
    return jax.lax.stop_gradient(clip(moved, image_size))


def _assigner(num_classes: int, options: Mapping[str, Any]) -> Assign:
    def assign(output: DetectorOutput, targets: Targets, key: Array | None = None) -> Assignment:
        """Draws the anchors and each stage's regions, and says what each of them learns.

        The proposals of a stage are the regions that the one before has learned, where it has moved them, without the
        objects' own boxes; of the first stage, those of the RPN. Each stage adds the objects' boxes anew.

        Args:
          output: of `apply`.
          targets: ground truth.
          key: PRNG key of the draws.

        Returns:
          The assignment of the last stage's regions; those of the stages before are its `earlier`, that of the anchors
          is its `first`. Without gradient.

        Raises:
          UserError: no key.

        Peers: mmdetection 3.3.0 CascadeRoIHead.loss, but for the draws.
        """
        first, proposals, key_regions = two_stage.first_stage(
            output, targets, key, options, number=options["train_proposals"], inside_image=True
        )
        drawn = []
        keys = jax.random.split(key_regions, len(STAGES))
        for settings, stage, own_key in zip(STAGES, output.stages, keys, strict=True):
            one, own_box = box_head.draw_regions(
                proposals,
                targets,
                num_classes=num_classes,
                samples=options["region_samples"],
                key=own_key,
                positive_iou=settings.iou,
            )
            drawn.append(one._replace(masked=one.positive) if options["masks"] else one)
            assert one.regions is not None
            proposals = next_proposals(stage.at(one.regions), one, own_box, targets.image_size)
        return drawn[-1]._replace(first=first, earlier=tuple(drawn[:-1]))

    return assign


def next_proposals(found: Regions, drawn: Assignment, own_box: Array, image_size: Array) -> rpn.Proposals:
    """The proposals of the next stage: the regions of `drawn` but the objects' own boxes, where this stage moves them.

    Args:
      found: what the stage says of the regions.
      drawn: its assignment.
      own_box: bool[B, S], regions that are objects' own boxes.
      image_size: i32[B, 2].

    Peers: mmdetection 3.3.0 BBoxHead.refine_bboxes.
    """
    assert drawn.regions is not None
    valid = ~drawn.ignore & ~own_box
    boxes = jnp.where(valid[..., None], refine(found, drawn.regions, image_size), 0.0)
    return rpn.Proposals(boxes, jnp.zeros(valid.shape, jnp.float32), valid)


def _loss(masks: bool) -> Loss:
    def loss(output: DetectorOutput, targets: Targets, assignment: Assignment) -> dict[str, Array]:
        """The losses of the first stage and of each second one over the global batch, these with its weight.

        Args:
          output: of `apply`.
          targets: ground truth; with masks of any whole stride if masks are learned.
          assignment: what to learn, of `assign`.

        Returns:
          loss_rpn_cls, loss_rpn_box, and of the stages i = 0, 1 and 2 loss_cls_i, loss_box_i and, with masks,
          loss_mask_i, times 1, 0.5 and 0.25; each f32[] >= 0.

        Scope: the global batch.

        Peers: mmdetection 3.3.0 TwoStageDetector.loss on one device, the levels of the RPN added up.

        Reference: Cai and Vasconcelos, CVPR 2018, section 4.

        Raises:
          UserError: masks are learned and there are none, or they do not fit the input.
        """
        stride = mask_head.check_masks(TITLE, output, targets) if masks else 0
        assert assignment.first is not None, "an assignment of a cascade"
        apart = functools.partial(distance.smooth_l1, beta=RPN_BETA)
        of_anchors = rpn.anchor_losses(output, assignment.first, apart=apart)
        losses = levels.total(of_anchors, targets, assignment.first)
        stages = zip(STAGES, output.stages, (*assignment.earlier, assignment), strict=True)
        for i, (settings, stage, drawn) in enumerate(stages):
            assert drawn.regions is not None, "an assignment of a cascade"
            found = stage.at(drawn.regions)
            each = box_head.region_losses(found, drawn, stds=settings.stds, apart=distance.smooth_l1)
            if stage.masks_at is not None:
                each["loss_mask"] = mask_head.mask_losses(stage.masks_at, targets, drawn, stride=stride)
            each = levels.total(each, targets, drawn)
            losses |= {f"{name}_{i}": settings.weight * value for name, value in each.items()}
        return losses

    return loss


def look_through(output: DetectorOutput, proposals: rpn.Proposals, image_size: Array) -> tuple[rpn.Proposals, Regions]:
    """The boxes that the last stage looks at, and what it says of them, with the mean logits of all stages.

    Each stage looks at the boxes as the one before has moved them.

    Peers: mmdetection 3.3.0 CascadeRoIHead.predict_bbox.
    """
    boxes, logits = proposals.boxes, []
    for stage in output.stages[:-1]:
        found = stage.at(boxes)
        logits.append(found.logits)
        boxes = refine(found, boxes, image_size)
    last = output.stages[-1].at(boxes)
    mean = functools.reduce(jnp.add, logits, last.logits) / len(output.stages)
    return proposals._replace(boxes=boxes), last._replace(logits=mean)
