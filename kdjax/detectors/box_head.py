"""The second stage of two-stage detectors: what it looks at, learns and finds in regions.

Reference: Girshick, Fast R-CNN, ICCV 2015; Ren et al., Faster R-CNN, NeurIPS 2015; on a pyramid: Lin et al., FPN, CVPR
2017, section 4.2. Module names follow mmdetection 3.3.0.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax.boxes import assign, coding, roi
from kdjax.detectors import rpn
from kdjax.detectors.layers import Linear, normal, uniform_fans
from kdjax.losses import classification, distance
from kdjax.structs import Array, Assignment, Regions, Targets

SIZE = 7  # cells of a region along each side
STDS = coding.REGION_STDS  # of the deltas
POSITIVE_IOU = 0.5
POSITIVE_SHARE = 0.25  # of the samples, at most


class BoxHead(nnx.Module):
    """Two linear layers that classes and boxes share; features f32[B, R, 7, 7, C] -> `Regions`.

    With `of_any_class` the deltas are the same for all classes. They are learned with `stds`, and returned with `STDS`.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        hidden: int,
        *,
        of_any_class: bool = False,
        stds: tuple[float, ...] = STDS,
    ) -> None:
        self.stds = stds
        inputs = SIZE * SIZE * channels
        self.shared_fcs = nnx.List(
            [Linear(inputs, hidden, draw=uniform_fans), Linear(hidden, hidden, draw=uniform_fans)]
        )
        self.fc_cls = Linear(hidden, num_classes + 1, draw=normal(0.01))
        self.fc_reg = Linear(hidden, 4 if of_any_class else num_classes * 4, draw=normal(0.001))

    def __call__(self, features: Array) -> Regions:
        x = jnp.moveaxis(features, -1, 2)  # PyTorch's order of the inputs: channels first
        x = x.reshape(*x.shape[:2], -1)
        for layer in self.shared_fcs:
            x = jax.nn.relu(layer(x))
        logits, deltas = self.fc_cls(x).astype(jnp.float32), self.fc_reg(x).astype(jnp.float32)
        if self.stds != STDS:
            deltas = deltas * np.resize(np.divide(self.stds, STDS), deltas.shape[-1]).astype(np.float32)
        return Regions(logits, deltas)


def features(maps: tuple[Array, ...], boxes: Array, size: int, *, peer: str = "mmdetection") -> Array:
    """The features of regions, each on the level that matches its size: f32[B, R, size, size, C].

    Args:
      maps: of the pyramid, of which P2 to P5 are used.
      boxes: f32[B, R, 4] in pixels, inside the network input.
      size: cells along each side.
      peer: "mmdetection", or "torchvision", which takes two samples along each side of a cell and shifts regions by
        half a cell of the map.

    Peers: mmdetection 3.3.0 SingleRoIExtractor, whose number of samples is not bounded; here it is bounded by what a
      box inside the network input needs. torchvision's MultiScaleRoIAlign.
    """
    maps, strides = maps[:4], rpn.STRIDES[:4]
    return roi.roi_align(
        maps,
        boxes,
        roi.roi_levels(boxes, len(maps), finest=14.0 * strides[0]),
        strides=strides,
        size=size,
        sampling_ratio=0 if peer == "mmdetection" else 2,
        max_samples=-(-max(maps[0].shape[1:3]) // size),
        aligned=peer == "mmdetection",
    )


def most_positive(samples: int) -> int:
    """How many of the regions of an image may be positive; they are the first ones."""
    return int(samples * POSITIVE_SHARE)


def draw_regions(
    proposals: rpn.Proposals,
    targets: Targets,
    *,
    num_classes: int,
    samples: int,
    key: Array | None = None,
    chosen: tuple[Array, Array] | None = None,
    match_low_quality: bool = False,
    positive_iou: float = POSITIVE_IOU,
) -> tuple[Assignment, Array]:
    """Draws regions of each image among its objects' own boxes and the proposals, and says what each of them learns.

    Args:
      proposals: of the first stage, P of each image.
      targets: ground truth; its M boxes are regions too.
      num_classes: K, the label of background.
      samples: S, number of regions; at most a quarter of them positive.
      key: PRNG key of the draw.
      chosen: instead of a draw, (index i32[B, S] into the M boxes followed by the P proposals; valid bool[B, S]).
      match_low_quality: whether each object also gets its best proposals, if their IoU is at least `positive_iou`.
      positive_iou: proposals with less are background, 0 .. 1.

    Returns:
      The assignment of the S regions, positive ones first, with `regions`; `ignore` marks rows without a region. And
      bool[B, S], which of them are objects' own boxes.

    Scope: each image on its own.

    Peers: mmdetection 3.3.0 MaxIoUAssigner, then RandomSampler with `add_gt_as_proposals`.

    Reference: Girshick, Fast R-CNN, ICCV 2015, section 2.3.
    """
    found = assign.max_iou(
        proposals.boxes,
        targets,
        num_classes=num_classes,
        positive_iou=positive_iou,
        negative_iou=positive_iou,
        min_positive_iou=positive_iou,
        match_low_quality=match_low_quality,
        inside=proposals.valid,
    )
    own = jnp.where(targets.valid, jnp.arange(targets.boxes.shape[1]), -1)
    boxes = jnp.concatenate([targets.boxes, proposals.boxes], 1)
    matched = jnp.concatenate([own.astype(jnp.int32), found.matched], 1)
    negative = jnp.concatenate([jnp.zeros_like(targets.valid), ~found.positive & ~found.ignore], 1)
    if chosen is None:
        assert key is not None, "regions are drawn, which needs a key"
        most = most_positive(samples)
        chosen = rpn.sample(matched >= 0, negative, number=samples, most_positive=most, key=key)
    index, valid = chosen
    matched = jnp.where(valid, jnp.take_along_axis(matched, index, 1), -1)
    regions = jnp.where(valid[..., None], jnp.take_along_axis(boxes, index[..., None], 1), 0)
    ones = jnp.ones(index.shape, jnp.float32)
    drawn = assign.assignment_of(matched, ~valid, ones, num_classes, targets)
    own_box = valid & (index < targets.boxes.shape[1])
    return drawn._replace(regions=jax.lax.stop_gradient(regions)), own_box


def assign_regions(*given: Any, **settings: Any) -> Assignment:
    """The assignment of `draw_regions`, which has the same arguments."""
    return draw_regions(*given, **settings)[0]


def deltas_of(found: Regions) -> Array:
    """The deltas of each class, f32[B, R, K, 4], or f32[B, R, 1, 4] of all of them."""
    return found.box_reg.reshape(*found.box_reg.shape[:2], -1, 4)


def region_losses(
    found: Regions,
    assignment: Assignment,
    *,
    stds: tuple[float, ...] = STDS,
    apart: Callable[..., Array] = distance.l1,
) -> dict[str, Array]:
    """The two losses of each region, f32[B, R], divided by the number of regions of the global batch.

    loss_cls = cross-entropy of the class, loss_box = sum |deltas of the class - deltas of the box| of the positives,
    both divided by max(number of sampled regions, 1). The deltas are compared with `stds`; `apart` is another distance
    than the absolute difference.

    Peers: mmdetection 3.3.0 BBoxHead.loss on one device.
    """
    positive, regions = assignment.positive, assignment.regions
    assert regions is not None
    count = jnp.maximum(jnp.sum(~assignment.ignore), 1).astype(jnp.float32)
    entropy = classification.cross_entropy(found.logits, assignment.labels)
    deltas = deltas_of(found)
    of_class = jnp.minimum(assignment.labels, deltas.shape[2] - 1)[..., None, None]
    deltas = jnp.take_along_axis(deltas, of_class, 2)[:, :, 0]
    if stds != STDS:
        deltas = deltas * np.divide(STDS, stds).astype(np.float32)
    unit = jnp.array([0, 0, 1, 1], jnp.float32)  # any box with an area, where there is nothing to learn
    given, wanted = (jnp.where(positive[..., None], boxes, unit) for boxes in (regions, assignment.boxes))
    of_boxes = jnp.sum(apart(deltas, coding.boxes_to_deltas(given, wanted, stds=stds)), -1)
    return {
        "loss_cls": jnp.where(assignment.ignore, 0.0, entropy) / count,
        "loss_box": jnp.where(positive, of_boxes, 0.0) / count,
    }
