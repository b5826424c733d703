"""What two-stage detectors share: ResNet or ResNeXt, a pyramid on P2 to P6, proposals, a second stage, decoding."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax.boxes import coding, nms
from kdjax.detectors import box_head, dense, levels, resnet, rpn
from kdjax.detectors.api import (
    Assign,
    Decode,
    Detector,
    Loss,
    State,
    TorchNames,
    Tree,
    check_images,
    flatten,
    pure,
    unflatten,
)
from kdjax.detectors.fpn import FPN
from kdjax.detectors.keywords import changed, own_values, resolve
from kdjax.errors import UserError
from kdjax.structs import Array, Assignment, DetectorOutput, PaddedDetections, Regions, Targets

# Variants of a family: the depth, and of a ResNeXt the groups and their width in the first stage.
VARIANTS = {f"r{depth}": {"depth": depth} for depth in (18, 34, 50, 101)} | {
    f"x{depth}-{groups}x{width}d": {"depth": depth, "groups": groups, "group_width": width}
    for depth, groups, width in ((50, 32, 4), (101, 32, 4), (101, 64, 4))
}
PEERS = ("mmdetection", "torchvision")
# (Region, class) pairs that enter the last NMS, at most; mmdetection takes all above the threshold.
PAIRS = 5000
PRE_NMS = 1000  # largest number of anchors of each level that enter the NMS of the proposals in tests


Bind = Callable[[Callable[..., Any]], Callable[..., Any]]


class SecondStage(NamedTuple):
    """The second stage of a family: its network, and how it learns and finds."""

    network: Callable[[], nnx.Module]  # makes the part `roi_head`
    # The fields of `DetectorOutput` that ask it about boxes. `bind` gives a method of the network (always the same
    # object) the parameters and its first argument, the maps of the pyramid.
    fields: Callable[[Bind], dict[str, Any]]
    classifiers: tuple[str, ...]  # as those of `Detector`, without "roi_head/"
    background: tuple[str, ...]
    assign: Assign
    loss: Loss
    decode: Decode
    masks: str = ""  # `Detector.masks`


class RoIHead(nnx.Module):
    """A second stage that finds boxes."""

    def __init__(self, num_classes: int, channels: int, hidden: int, *, peer: str) -> None:
        self.peer = peer
        self.bbox_head = box_head.BoxHead(num_classes, channels, hidden)

    def regions(self, maps: tuple[Array, ...], boxes: Array) -> Regions:
        """What it says of boxes f32[B, R, 4]."""
        return self.bbox_head(box_head.features(maps, boxes, box_head.SIZE, peer=self.peer))


def box_stage(num_classes: int, options: Mapping[str, Any], *, match_low_quality: bool = False) -> SecondStage:
    """The second stage of Faster R-CNN; `match_low_quality`: see `box_head.assign_regions`."""
    return SecondStage(
        network=lambda: RoIHead(num_classes, options["neck_channels"], options["head_channels"], peer=options["peer"]),
        fields=lambda bind: {"at": bind(RoIHead.regions)},
        classifiers=("bbox_head/fc_cls", "bbox_head/fc_reg"),
        background=("bbox_head/fc_cls",),
        assign=assigner(num_classes, options, match_low_quality=match_low_quality),
        loss=loss,
        decode=decoder(num_classes, options["proposals"]),
    )


class TwoStage(nnx.Module):
    """The network; its parts have mmdetection's names. Called, it computes all but the second stage."""

    def __init__(
        self, depth: int, roi_head: Callable[[], nnx.Module], neck_channels: int, peer: str, **of_backbone: Any
    ) -> None:
        self.backbone = resnet.ResNet(depth, **of_backbone)
        self.neck = FPN(self.backbone.channels, neck_channels, levels=len(rpn.STRIDES))
        self.rpn_head = rpn.RPNHead(neck_channels, rounded=peer == "torchvision")
        self.roi_head = roi_head()

    def __call__(self, x: Array, train: bool) -> DetectorOutput:
        backbone = self.backbone(x, train)
        neck = self.neck(backbone)
        logits, deltas = self.rpn_head(neck)
        return DetectorOutput(
            strides=rpn.STRIDES,
            backbone_strides=resnet.STRIDES,
            anchors=rpn.ANCHORS,
            backbone=backbone,
            neck=neck,
            neck_conv=neck,  # the pyramid's last convolutions have neither norm nor activation
            box_reg=deltas,
            quality=logits,
        )


def detector(
    title: str,
    name: str,
    make: Callable[..., Detector],
    variant: str,
    num_classes: int,
    given: dict[str, Any],
    second: SecondStage,
) -> Detector:
    """Builds a variant of a family.

    Args:
      title: the family's name in messages.
      name: of the family's file.
      make: the family's `make`, whose defaults `Detector.options` leaves out.
      variant: a key of `VARIANTS`.
      num_classes: K >= 1.
      given: every option of `make`.
      second: the second stage.

    Raises:
      UserError: unknown variant, or a value out of range.
    """
    own = own_values(title, VARIANTS, variant)
    options = resolve(given, own)
    _check(title, num_classes, options)
    of_network = {key: options[key] for key in ("base_channels", "style", "frozen_stages", "norm_eval", "frozen_norm")}
    of_network |= {"neck_channels": options["neck_channels"], "peer": options.get("peer", PEERS[0])} | own

    module, second_module = pure(lambda: TwoStage(roi_head=second.network, **of_network)), pure(second.network)

    @functools.cache
    def call_of(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, maps, *args: second_module.call(params, {}, method, maps, *args)[0]

    def apply(params: Tree, stats: Tree, x: Array, *, train: bool) -> tuple[DetectorOutput, Tree]:
        check_images(title, x)
        output, stats = module.call(params, stats, TwoStage.__call__, x, train)
        known = (params["roi_head"], output.neck[:4])
        fields = second.fields(lambda method: jax.tree_util.Partial(call_of(method), *known))
        return dataclasses.replace(output, **fields), stats

    def propose(output: DetectorOutput, image_size: Array) -> tuple[Array, Array]:
        found = rpn.propose(output, image_size, pre_nms=PRE_NMS, number=options["proposals"])
        return found.boxes, found.valid

    def no_decay(params: Tree) -> Tree:
        frozen = options["frozen_stages"]
        return unflatten(
            {path: not path.endswith("/kernel") or resnet.is_frozen(path, frozen) for path in flatten(params)}
        )

    return Detector(
        name=f"{name}_{variant}",
        num_classes=num_classes,
        options=changed(make, given),
        strides=rpn.STRIDES,
        size_divisor=32,
        pad_value=dense.PAD_VALUE,
        masks=second.masks,
        shapes=module.shapes,
        classifiers=tuple(f"roi_head/{path}" for path in second.classifiers),
        background=tuple(f"roi_head/{path}" for path in second.background),
        torch=TorchNames(infer=peer_of) if "peer" in options else TorchNames(),
        init=module.init,
        preprocess=functools.partial(resnet.preprocess, style=options["style"]),
        apply=apply,
        head=None,
        assign=second.assign,
        loss=second.loss,
        decode=second.decode,
        decode_boxes=rpn.decode_boxes,
        class_logits=rpn.objectness,
        propose=propose,
        priors=rpn.grid_priors,
        no_decay=no_decay,
    )


def peer_of(state: State) -> dict[str, Any]:
    """The option `peer` that the names of a state dict imply."""
    return {"peer": "torchvision"} if any(name.endswith("backbone.body.conv1.weight") for name in state) else {}


def _check(title: str, num_classes: int, options: Mapping[str, Any]) -> None:
    if num_classes < 1:
        raise UserError(f"num_classes of {title} must be >= 1, not {num_classes}")
    least = dict.fromkeys(("base_channels", "neck_channels", "head_channels", "proposals", "train_pre_nms"), 1)
    for name, smallest in (least | {"rpn_samples": 2, "region_samples": 4}).items():
        if options[name] < smallest:
            raise UserError(f"{name} of {title} must be >= {smallest}, not {options[name]}")
    for name, values in (("style", resnet.STYLES), ("peer", PEERS), ("frozen_stages", (-1, 0, 1, 2, 3, 4))):
        if name in options and options[name] not in values:
            raise UserError(f"{name} of {title} must be one of {', '.join(map(str, values))}, not {options[name]!r}")


def first_stage(
    output: DetectorOutput,
    targets: Targets,
    key: Array | None,
    options: Mapping[str, Any],
    *,
    number: int,
    inside_image: bool = False,
) -> tuple[Assignment, rpn.Proposals, Array]:
    """What `assign` does first: the assignment of the anchors, `number` proposals, and a key for the regions.

    Raises:
      UserError: no key.
    """
    if key is None:
        raise UserError("assign: a two-stage detector draws anchors and regions: pass a PRNG key")
    key_anchors, key_regions = jax.random.split(key)
    samples = options["rpn_samples"]
    first = rpn.assign_anchors(output, targets, key_anchors, samples=samples, inside_image=inside_image)
    found = rpn.propose(output, targets.image_size, pre_nms=options["train_pre_nms"], number=number)
    return first, found, key_regions


def assigner(num_classes: int, options: Mapping[str, Any], *, match_low_quality: bool) -> Assign:
    """Returns the function `assign` of a detector."""

    def assign(output: DetectorOutput, targets: Targets, key: Array | None = None) -> Assignment:
        """Draws the anchors and the regions that are learned, and says what each of them learns.

        Args:
          output: of `apply`.
          targets: ground truth.
          key: PRNG key of the two draws.

        Returns:
          The assignment of the regions; that of the anchors is its `first`. Without gradient.

        Raises:
          UserError: no key.
        """
        first, proposals, key_regions = first_stage(output, targets, key, options, number=options["proposals"])
        drawn = box_head.assign_regions(
            proposals,
            targets,
            num_classes=num_classes,
            samples=options["region_samples"],
            key=key_regions,
            match_low_quality=match_low_quality,
        )
        return drawn._replace(first=first)

    return assign


def loss(output: DetectorOutput, targets: Targets, assignment: Assignment) -> dict[str, Array]:
    """The losses of both stages over the global batch: those of `rpn.anchor_losses` and `box_head.region_losses`.

    Args:
      output: of `apply`.
      targets: ground truth.
      assignment: what to learn, of `assign`; the second stage looks at its regions.

    Returns:
      loss_rpn_cls, loss_rpn_box, loss_cls and loss_box, each f32[] >= 0.

    Scope: the global batch.

    Peers: mmdetection 3.3.0 TwoStageDetector.loss on one device, the levels of the RPN added up.

    Reference: Ren et al., Faster R-CNN, NeurIPS 2015, section 3.1.2; Girshick, Fast R-CNN, ICCV 2015, section 2.3.
    """
    first, at = assignment.first, output.at
    assert first is not None, "an assignment of a two-stage detector"
    assert at is not None, "an output of a two-stage detector"
    assert assignment.regions is not None, "an assignment of a two-stage detector"
    of_regions = box_head.region_losses(at(assignment.regions), assignment)
    of_anchors = levels.total(rpn.anchor_losses(output, first), targets, first)
    return of_anchors | levels.total(of_regions, targets, assignment)


Look = Callable[[DetectorOutput, rpn.Proposals, Array], tuple[rpn.Proposals, Regions]]


def look_once(output: DetectorOutput, proposals: rpn.Proposals, image_size: Array) -> tuple[rpn.Proposals, Regions]:
    """What the second stage says of the proposals."""
    del image_size
    assert output.at is not None
    return proposals, output.at(proposals.boxes)


def decoder(num_classes: int, proposals: int, look: Look = look_once) -> Decode:
    """Returns the function `decode` of a detector; its defaults are the published test settings.

    Args:
      num_classes: K.
      proposals: number of proposals of an image.
      look: (output, proposals, image_size) -> the boxes that the second stage looked at last, and what it said of them.
    """

    def decode(
        output: DetectorOutput,
        image_size: Array,
        *,
        score_threshold: float = 0.05,
        iou_threshold: float = 0.5,
        pre_nms: int = PRE_NMS,
        max_detections: int = 100,
    ) -> PaddedDetections:
        """Runs the second stage on the proposals, and turns its predictions into detections by NMS within each class.

        Args:
          output: of `apply`.
          image_size: i32[B, 2], height and width that boxes are clipped to.
          score_threshold: (region, class) pairs with a probability at or below it are dropped, 0 .. 1.
          iou_threshold: a box is dropped if its IoU with a better one of its class is above it.
          pre_nms: largest number of anchors of each level that enter the NMS of the proposals.
          max_detections: D, the number of rows of the result.

        Returns:
          D detections per image, padded.

        Scope: one image.

        Peers: mmdetection 3.3.0 BBoxHead.predict_by_feat without rescaling; here the best 5,000 (region, class) pairs
          enter the last NMS, there all of them.
        """
        found = rpn.propose(output, image_size, pre_nms=pre_nms, number=proposals)
        return detections_of(
            *look(output, found, image_size),
            image_size,
            num_classes=num_classes,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
        )

    return decode


def detections_of(
    proposals: rpn.Proposals,
    found: Regions,
    image_size: Array,
    *,
    num_classes: int,
    **settings: Any,
) -> PaddedDetections:
    """The detections among the predictions of the second stage for the proposals."""
    scores = jax.nn.softmax(found.logits)[..., :num_classes]
    boxes = coding.deltas_to_boxes(proposals.boxes[:, :, None], box_head.deltas_of(found), stds=box_head.STDS)
    return nms.select_detections(
        boxes if boxes.shape[2] == num_classes else boxes[:, :, 0],
        jnp.where(proposals.valid[..., None], scores, 0.0),
        image_size=image_size,
        pre_nms=PAIRS,
        level_sizes=(proposals.boxes.shape[1],),
        **settings,
    )
