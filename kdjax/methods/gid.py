"""GID: general instance distillation, of features, relations and predictions where student and teacher differ most.

    score of a prior = max_k |sigmoid(z_T) - sigmoid(z_S)|, its box that of the model with the higher score; the best
        10 per image after NMS at IoU 0.3 are the instances;  R = RoIAlign of an instance to 10 x 10 cells, on the level
        of its size
    L = weight * (
            feature_weight * mean over instances and cells of sum_c (R(A(S)) - R(T))^2
            + relation_weight * mean over images and pairs of smoothL1(d_S - d_T),  d = |R_i - R_j| / their mean
            + class_weight / P * sum_{priors} sum_k KL(sigmoid(z_T) || sigmoid(z_S))
            + box_weight / P * sum_{priors} |box_S - box_T|_1 / stride )
    priors: the P that the student's assigner gives to the instances, taken as ground truth
    two stages: regions instead of priors, softmax instead of sigmoid, a region's width and height instead of the stride

Paper: Dai et al., "General Instance Distillation for Object Detection", CVPR 2021.
Taps: neck; also reads class logits and decoded boxes of priors (dense heads, the same priors and classes on both sides)
  or of regions (two stages on both sides, the same classes), and runs the student's assigner. The ground truth must be
  in the batch, but its boxes are replaced by the instances. Trains one 3x3 convolution A, shared by the levels.
Open: the only public code is a third-party port, whose weights and reductions are the defaults; the paper reportedly
  has 5e-4, 40 and 0.1, 1. The port never applies its adapter and so needs equal widths; here it is applied. The port
  relates the instances of all images of a device to each other, which depends on the batch (`parity=True`); here those
  of one image are related. The port takes the binary cross-entropy, which has the gradient of the divergence used here
  but does not vanish at equality. It compares the raw box regression, which for heads that regress distances equals the
  comparison in strides used here. It leaves out boxes smaller than 10 pixels and clips boxes to the image; here nothing
  is left out or clipped. Our sources do not say which predictions of two-stage detectors are compared: here those of
  the regions that the student's assigner draws, as in DKD. A region belongs to an instance that it overlaps with an IoU
  of at least 0.5, and its box is, on both sides, that of the class that the teacher finds most likely.
Proof: none: no public original; the parts equal loops over the formulas, RoIAlign and its levels those of
  model/faster_* and model/mask_* (mmdetection).
Status: formula
"""

from collections.abc import Iterator

import jax.numpy as jnp

from kdjax import nn
from kdjax.boxes import roi
from kdjax.distill import adapters, method, taps
from kdjax.errors import UserError
from kdjax.losses import disagreement, distance, divergence, relation
from kdjax.structs import Array, DetectorOutput


def make(
    *,
    weight: float = 1.0,
    student: str = "neck",
    teacher: str = "neck",
    feature_weight: float = 0.005,
    relation_weight: float = 40.0,
    class_weight: float = 0.1,
    box_weight: float = 0.1,
    count: int = 10,
    iou_threshold: float = 0.3,
    parity: bool = False,
) -> method.Method:
    """Distances between features, relations and predictions of a fixed number of instances per image.

    Args:
      weight: of the whole loss; 1.
      student, teacher: taps of the features.
      feature_weight: 0.005 in the port.
      relation_weight: 40 in the port.
      class_weight: 0.1 in the port.
      box_weight: 0.1 in the port.
      count: instances per image, at least 1; 10. Relations need three.
      iou_threshold: of NMS, 0 .. 1; 0.3.
      parity: relates the instances of the whole batch to each other, not only those of one image.

    Raises:
      UserError: `count` below 1, or `iou_threshold` outside 0 .. 1.
    """
    method.check("gid: count", count, count >= 1, "at least 1")
    method.check("gid: iou_threshold", iou_threshold, 0 <= iou_threshold <= 1, "within 0 .. 1")
    weights = {
        "feature": weight * feature_weight,
        "relation": weight * relation_weight,
        "class": weight * class_weight,
        "box": weight * box_weight,
    }

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        pairs = taps.pair(student_spec, teacher_spec, student, teacher)
        widths = sorted({(p.student.shape[-1], p.teacher.shape[-1]) for p in pairs})
        if len(widths) > 1:
            raise UserError(
                "gid shares one adapter over the levels, which must have the same channels, but the taps "
                f"{student!r} (student) and {teacher!r} (teacher) have {widths}"
            )
        for stride, s, t in pairs:
            taps.check_sizes(stride, s.shape, t.shape)
        return nn.init_conv2d(key, 3, *widths[0])

    def features(params: method.Params, context: method.Context, boxes: Array) -> Iterator[Array]:
        """Features of the boxes, f32[B, R, 10, 10, C], of the student and of the teacher."""
        pairs = taps.pair(context.student, context.teacher, student, teacher)
        pairs = adapters.adapt({str(p.stride): params for p in pairs}, pairs)
        strides = [p.stride for p in pairs]
        level = roi.roi_levels(boxes, len(pairs), finest=14.0 * strides[0])
        return (
            roi.roi_align(maps, boxes, level, strides=strides, size=10)
            for maps in ([p.student for p in pairs], [p.teacher for p in pairs])
        )

    def pair_distance(s: Array, t: Array, valid: Array) -> Array:
        rows = (1, -1) if parity else valid.shape
        s, t = (x.reshape(*rows, x[0, 0].size) for x in (s, t))
        return jnp.mean(relation.pairwise_relation(s, t, valid.reshape(rows)))

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        rows = context.student_rows, context.teacher_rows
        scores, predicted = [side.logits for side in rows], [side.boxes for side in rows]
        by_regions = context.student_rows.form == "softmax"
        boxes, labels, valid = disagreement.general_instances(
            *scores,
            *predicted,
            count=count,
            iou_threshold=iou_threshold,
            softmax=by_regions,
            valid=~context.assignment.ignore if by_regions else None,
        )
        s, t = features(params, context, boxes)
        pixels = valid[..., None, None] & jnp.ones(s.shape[2:4], bool)
        chosen = context.targets._replace(boxes=boxes, labels=labels, valid=valid)
        assignment = context.assign(chosen)
        positive = assignment.positive & ~assignment.ignore
        sides = jnp.tile(context.student_rows.location[..., 2:], 2)
        sides = jnp.maximum(sides, 1e-6) if by_regions else sides  # a region without area is ignored
        apart = divergence.softmax_kl(*scores) if by_regions else jnp.sum(divergence.sigmoid_kl(*scores), -1)
        terms = {
            "feature": method.mean_over_positives(jnp.sum(distance.squared(s, t), -1), pixels),
            "relation": pair_distance(s, t, valid),
            "class": method.mean_over_positives(apart, positive),
            "box": method.mean_over_positives(jnp.sum(distance.l1(*predicted) / sides, -1), positive),
        }
        return {name: terms[name] for name in weights if weights[name]}

    names = ("rows.logits", "rows.boxes")
    reads = taps.Reads((student, *names, "rows.location", "targets", "assignment"), (teacher, *names))
    grid = "GID assigns what it chooses to priors, and no query learns from another"
    return method.Method(init, apply, weights, reads, grid=grid)
