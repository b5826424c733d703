"""RTMDet-Ins: RTMDet that also predicts, in every cell, the parameters of a small network that finds its object's mask.

Reference: Lyu et al., RTMDet: An Empirical Study of Designing Real-Time Object Detectors, arXiv 2212.07784, section
3.5; the small networks are those of Tian et al., Conditional Convolutions for Instance Segmentation, ECCV 2020. Peers:
mmdetection 3.3.0, with the same module names and numbers. There, and so here, one tower serves classes and boxes (the
state dicts store it under both names), and its running statistics move twice in a step. kdjax computes it once.

Loads: state dicts with the names of mmdetection. Published mask AP: 35.4, 38.7, 42.1, 43.7 and 44.6 (tiny to x; box AP
40.5, 44.0, 48.8, 51.2 and 52.4). Not reproduced yet (no published checkpoint was available).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax import nn
from kdjax.boxes import dynamic, nms, priors
from kdjax.detectors import dynamic_masks, levels, rtmdet, towers
from kdjax.detectors.api import (
    Detector,
    PureModule,
    TorchNames,
    Tree,
    all_but_kernels,
    check_entry,
    check_images,
    pure,
)
from kdjax.detectors.keywords import changed
from kdjax.detectors.layers import FOCAL_BIAS, MOMENTUM, Conv, constant, normal
from kdjax.detectors.rtmdet import STRIDES
from kdjax.errors import UserError
from kdjax.losses import mask
from kdjax.structs import Array, Assignment, DetectorOutput, PaddedDetections, Targets

__all__ = ["VARIANTS", "make"]

VARIANTS = {name: own for name, own in rtmdet.VARIANTS.items() if not own["depthwise"]}
mask_logits = functools.partial(dynamic_masks.mask_logits, stride=STRIDES[0])

MASK_STRIDE = 4  # of the masks that the loss compares, in pixels
MASKS = 300  # of an image, which the loss reads at most
CHUNK = 32  # masks of an image that are computed together
EPS = 5e-6  # of the dice loss
_MASK_CONVS = 4


class _MaskHead(nnx.Module):
    """The prototypes: maps of all levels at the finest size, mixed, convolved and projected."""

    def __init__(self, inputs: int, channels: int, prototypes: int) -> None:
        self.fusion_conv = Conv(len(STRIDES) * inputs, inputs, 1, draw=normal(0.01), bias=constant(0.0))
        self.stacked_convs = nnx.List(
            [towers.TowerConv(channels if i else inputs, channels) for i in range(_MASK_CONVS)]
        )
        self.projection = Conv(channels, prototypes, 1, draw=normal(0.01), bias=constant(0.0))

    def __call__(self, maps: tuple[Array, ...], train: bool) -> Array:
        size = (maps[0].shape[1], maps[0].shape[2])
        x = self.fusion_conv(jnp.concatenate([maps[0], *(nn.resize_bilinear(m, size) for m in maps[1:])], -1))
        for layer in self.stacked_convs:
            assert layer.conv is not None
            x = jax.nn.silu(layer.bn(layer.conv(x), train))
        return self.projection(x).astype(jnp.float32)


class _Head(nnx.Module):
    """A tower for classes and boxes, one for the parameters of the masks' networks, and the prototypes."""

    def __init__(
        self, inputs: int, channels: int, num_classes: int, *, stacked_convs: int, share_conv: bool, prototypes: int
    ) -> None:
        # In PyTorch the shared tower runs twice in a step, once for each name.
        twice = 1 - (1 - MOMENTUM) ** 2
        self.cls_convs = towers.tower(inputs, channels, convs=stacked_convs, share_conv=share_conv, momentum=twice)
        self.kernel_convs = towers.tower(inputs, channels, convs=stacked_convs, share_conv=False)
        self.rtm_cls = towers.predictors(channels, num_classes, FOCAL_BIAS)
        self.rtm_reg = towers.predictors(channels, 4, 1.0)
        self.rtm_kernel = towers.predictors(channels, sum(dynamic_masks.sizes(prototypes)), 0.0)
        self.mask_head = _MaskHead(inputs, channels, prototypes)

    def branch(self, maps: tuple[Array, ...], name: str, start: int, train: bool) -> towers.Branch:
        """`towers.run_tower` of one branch."""
        if name == "kernel":
            return towers.run_tower(self.kernel_convs, self.rtm_kernel, maps, start, train)
        if name == "cls":
            return towers.run_tower(self.cls_convs, self.rtm_cls, maps, start, train)
        return towers.run_tower(self.cls_convs, self.rtm_reg, maps, start, train, _distances)

    def __call__(self, maps: tuple[Array, ...], train: bool) -> dict[str, Any]:
        """The head's fields of `DetectorOutput`."""
        tower, cls_logits = self.branch(maps, "cls", 0, train)
        last = tuple(jax.nn.silu(x) for x in tower[-1])
        box_reg = tuple(
            _distances(level, predict(x).astype(jnp.float32))
            for level, (predict, x) in enumerate(zip(self.rtm_reg, last, strict=True))
        )
        return {
            "cls_tower": tower,
            "reg_tower": tower,
            "cls_logits": cls_logits,
            "box_reg": box_reg,
            "kernels": self.branch(maps, "kernel", 0, train)[1],
            "prototypes": self.mask_head(maps, train),
        }


def _distances(level: int, y: Array) -> Array:
    return jax.nn.relu(y) * STRIDES[level]


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
    share_conv: bool = True,
    prototypes: int = 8,
) -> Detector:
    """Builds RTMDet-Ins in one of its sizes.

    Args:
      variant: pico, micro, tiny, s, m, l or x.
      num_classes: K >= 1.
      widen, deepen: factors of channels (>= 1/32) and of blocks (> 0); None: the variant's.
      expand_ratio: share of a CSP layer's channels that each of its halves has.
      attention: whether the backbone has channel attention.
      neck_channels, head_channels: channels of the neck's maps and of the towers; None: 256 widen.
      neck_blocks: blocks of each CSP layer of the neck; None: max(round(3 deepen), 1).
      stacked_convs: convolutions of each tower, >= 1.
      share_conv: whether the levels share the convolutions of the tower of classes and boxes.
      prototypes: maps that all masks are made of, >= 1.

    Returns:
      The detector. Its boxes are decoded from `box_reg`: distances left, top, right, bottom in pixels, >= 0. It
      returns masks of the whole canvas.

    Raises:
      UserError: unknown variant, or a value out of range.

    Peers: mmdetection 3.3.0, configs/rtmdet/rtmdet-ins_*_8xb32-300e_coco.py.

    Reference: arXiv 2212.07784, section 3.5.

    Example:
      >>> make("pico", 5, stacked_convs=1).options
      {'stacked_convs': 1}
    """
    given = dict(
        widen=widen, deepen=deepen, expand_ratio=expand_ratio, attention=attention, neck_channels=neck_channels,
        neck_blocks=neck_blocks, head_channels=head_channels, stacked_convs=stacked_convs, share_conv=share_conv,
        prototypes=prototypes,
    )  # fmt: skip
    options = rtmdet.resolved("RTMDet-Ins", VARIANTS, variant, num_classes, given)
    if prototypes < 1:
        raise UserError(f"prototypes of RTMDet-Ins must be >= 1, not {prototypes}")
    module = network(num_classes, **options)

    def apply(params: Tree, stats: Tree, x: Array, *, train: bool) -> tuple[DetectorOutput, Tree]:
        check_images("RTMDet-Ins", x)
        return module.call(params, stats, rtmdet.RTMDet.__call__, x, train)

    def head(params: Tree, stats: Tree, features: tuple[Array, ...], *, branch: str, start: int) -> tuple[Array, ...]:
        check_entry("RTMDet-Ins", ("cls", "reg"), stacked_convs, branch, start)
        return module.call(params, stats, lambda m: m.bbox_head.branch(features, branch, start, False)[1])[0]

    return Detector(
        name=f"rtmdet_ins_{variant}",
        num_classes=num_classes,
        options=changed(make, given),
        strides=STRIDES,
        size_divisor=32,
        pad_value=114,
        masks="canvas",
        shapes=module.shapes,
        classifiers=("bbox_head/rtm_cls",),
        torch=TorchNames(copies=functools.partial(_copies, share_conv=share_conv)),
        init=module.init,
        preprocess=rtmdet.preprocess,
        apply=apply,
        head=head,
        assign=assign_targets,
        loss=loss,
        decode=decode,
        decode_boxes=rtmdet.decode_boxes,
        class_logits=levels.class_logits,
        priors=lambda hw: priors.grid_priors(hw, STRIDES),
        no_decay=all_but_kernels,
    )


def network(
    num_classes: int, *, head_channels: int, stacked_convs: int, share_conv: bool, prototypes: int = 8, **trunk: Any
) -> PureModule:
    """Returns the network as pure functions; `trunk` are the keywords of `rtmdet.RTMDet`."""
    head = functools.partial(
        _Head,
        trunk["neck_channels"],
        head_channels,
        num_classes,
        stacked_convs=stacked_convs,
        share_conv=share_conv,
        prototypes=prototypes,
    )
    return pure(lambda: rtmdet.RTMDet(head, **trunk))


def _copies(path: str, *, share_conv: bool) -> list[str]:
    """The other names of an array of the tower: those of the other levels that share it, and of the branch of boxes."""
    copies = rtmdet.level_copies(path) if share_conv else []
    tower = "bbox_head/cls_convs/"
    return copies + [name.replace(tower, "bbox_head/reg_convs/") for name in (path, *copies) if name.startswith(tower)]


def _stride_of(masks: Array, output: DetectorOutput) -> int:
    """The stride of the truth's masks.

    Raises:
      UserError: the loss cannot take their pixels.
    """
    height, width = levels.input_size(output)
    stride = height // masks.shape[2]
    if MASK_STRIDE % stride or masks.shape[2:] != (height // stride, width // stride):
        raise UserError(
            f"instance_masks: RTMDet-Ins needs masks of stride 1, 2 or 4 of its {height}x{width} input, not "
            f"{masks.shape[2]}x{masks.shape[3]}"
        )
    return stride


def assign_targets(output: DetectorOutput, targets: Targets, key: Array | None = None) -> Assignment:
    """Assigns with RTMDet's dynamic soft-label assigner, by the masks' centres of mass, and samples masks.

    Args:
      output: of `apply`.
      targets: ground truth; without masks the centres are those of the boxes.
      key: chooses 300 masks of an image that has more positive priors; None takes the first ones.

    Returns:
      The assignment, without gradient.

    Peers: mmdetection 3.3.0, which learns the masks of all positive priors.

    Raises:
      UserError: the masks have another stride than 1, 2 or 4.
    """
    logits, boxes, masks = levels.class_logits(output), rtmdet.decode_boxes(output), targets.instance_masks
    centers = None if masks is None else dynamic.mask_centers(masks, stride=_stride_of(masks, output))
    found = dynamic.dynamic_soft_label(
        jax.lax.stop_gradient(logits), jax.lax.stop_gradient(boxes), levels.grid(output), targets, centers=centers
    )
    shape = found.positive.shape
    order = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.float32), shape)
    rank = jnp.where(found.positive, order if key is None else jax.random.uniform(key, shape), jnp.inf)
    last = jnp.sort(rank, axis=1)[:, min(MASKS, shape[1]) - 1, None]
    return found._replace(masked=found.positive & (rank <= last))


def loss(output: DetectorOutput, targets: Targets, assignment: Assignment) -> dict[str, Array]:
    """RTMDet's two losses and that of the masks, over the global batch.

    loss_mask = 2 sum dice(mask, truth) / max(n, 1), over the n rows that `assignment.masked` names: all positive priors
    if no image has more than 300 of them. Masks are compared at stride 4.

    Args:
      output: of `apply`.
      targets: ground truth with masks of stride 1, 2 or 4; of finer ones every fourth pixel is taken (2, 6, ... of
        stride 1).
      assignment: what to learn, of `assign_targets`.

    Returns:
      {"loss_cls": f32[], "loss_box": f32[], "loss_mask": f32[]}, all >= 0; the last two are 0 without any object.

    Scope: the global batch, all levels. Masks are computed in pieces, as many as there are masks, and again in the
    backward pass: the memory does not grow with their number.

    Peers: mmdetection 3.3.0 RTMDetInsHead.loss_by_feat on one device, its levels added up.

    Reference: arXiv 2212.07784, sections 3.3 and 3.5.

    Raises:
      UserError: there are no masks, or of another stride.
    """
    if targets.instance_masks is None:
        raise UserError("instance_masks: RTMDet-Ins learns masks, but the targets have none: the batch needs `masks`")
    return rtmdet.loss(output, targets, assignment) | {"loss_mask": _mask_loss(output, targets, assignment)}


def _mask_loss(output: DetectorOutput, targets: Targets, assignment: Assignment) -> Array:
    assert targets.instance_masks is not None
    assert output.prototypes is not None
    step = MASK_STRIDE // _stride_of(targets.instance_masks, output)
    truth = targets.instance_masks[:, :, step // 2 :: step, step // 2 :: step]
    masked = assignment.positive if assignment.masked is None else assignment.masked
    batch, count = masked.shape
    chunks = -(-min(MASKS, count) // CHUNK)
    # The rows in question, first in the image first; `count` fills up.
    place = jnp.where(masked, jnp.cumsum(masked, axis=1) - 1, chunks * CHUNK)
    empty = jnp.full((batch, chunks * CHUNK), count)
    rows = jax.vmap(lambda empty, place: empty.at[place].set(jnp.arange(count), mode="drop"))(empty, place)
    valid = rows < count
    rows = jnp.minimum(rows, count - 1)
    kernels = jnp.take_along_axis(levels.join(output.kernels, output.kernels[0].shape[-1]), rows[..., None], 1)
    points = jnp.asarray(levels.grid(output))[rows]
    objects = jnp.maximum(jnp.take_along_axis(assignment.matched, rows, 1), 0)
    weights = jnp.where(valid, levels.row_weights(targets.weights, objects), 0.0)

    @jax.checkpoint
    def of_chunk(prototypes: Array, kernels: Array, points: Array, objects: Array, weights: Array) -> Array:
        logits = dynamic_masks.doubled(mask_logits(kernels, points, prototypes))
        wanted = jax.vmap(lambda masks, index: masks[index])(truth, objects)
        return jnp.sum(jnp.where(weights > 0, weights * mask.dice(logits, wanted, eps=EPS), 0.0))

    def add(total: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        used = jnp.any(chunk[-1] > 0)
        of_used = functools.partial(of_chunk, output.prototypes)
        return total + jax.lax.cond(used, of_used, lambda *_: jnp.float32(0), *chunk), None

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(batch, chunks, CHUNK, *x.shape[2:]), 1, 0)

    total, _ = jax.lax.scan(add, jnp.float32(0), tuple(map(split, (kernels, points, objects, weights))))
    return 2 * total / jnp.maximum(jnp.sum(valid), 1)


def decode(
    output: DetectorOutput,
    image_size: Array,
    *,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.6,
    pre_nms: int = 1000,
    max_detections: int = 100,
) -> PaddedDetections:
    """Turns predictions into detections by NMS within each class, and computes the masks of what is left.

    Args:
      output: of `apply`.
      image_size: i32[B, 2], height and width that boxes are clipped to.
      score_threshold: pairs with a score at or below it are dropped, 0 .. 1.
      iou_threshold: a box is dropped if its IoU with a better one of its class is above it.
      pre_nms: largest number of (prior, class) pairs of each level that enter NMS.
      max_detections: D, the number of rows of the result.

    Returns:
      D detections per image, padded; `masks` are logits of the whole canvas at stride 8, f32[B, D, H/8, W/8].

    Scope: one image.

    Peers: mmdetection 3.3.0 RTMDetInsHead.predict_by_feat; the masks are resized and compared with the threshold
    afterwards, by `kdjax.inference.masks.from_canvas`.
    """
    assert output.prototypes is not None
    found, rows = nms.select_rows(
        rtmdet.decode_boxes(output),
        jax.nn.sigmoid(levels.class_logits(output)),
        image_size=image_size,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        pre_nms=pre_nms,
        level_sizes=levels.level_sizes(output),
        max_detections=max_detections,
    )
    kernels = jnp.take_along_axis(levels.join(output.kernels, output.kernels[0].shape[-1]), rows[..., None], 1)
    points = jnp.asarray(levels.grid(output))[rows]
    parts = [slice(start, start + CHUNK) for start in range(0, max_detections, CHUNK)]
    masks = [mask_logits(kernels[:, part], points[:, part], output.prototypes) for part in parts]
    return found._replace(masks=jnp.where(found.valid[..., None, None], jnp.concatenate(masks, 1), 0.0))
