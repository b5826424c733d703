"""GID: general instance distillation, of the features, relations and predictions of the places where the nets differ.

    score of a prior = max_k |sigmoid(z_T) - sigmoid(z_S)|, its box that of the surer net; suppressed at IoU 0.3, the
        best 10 of an image are its instances;  R = RoIAlign of an instance, 10 x 10 cells, on the level of its size
    L = weight * (
            feature_weight * mean over instances and cells of sum_c (R(A(S)) - R(T))^2
            + relation_weight * mean over images and pairs of smoothL1(d_S - d_T),  d = |R_i - R_j| / their mean
            + class_weight / P * sum_{priors} sum_k KL(sigmoid(z_T) || sigmoid(z_S))
            + box_weight / P * sum_{priors} |box_S - box_T|_1 / stride )
    priors: the P that the student's assigner gives to the instances, taken as ground truth

Paper: Dai et al., "General Instance Distillation for Object Detection", CVPR 2021.
Taps: neck; also reads class logits and decoded boxes (dense heads, the same priors and classes on both sides) and asks
  the student's assigner. Needs no ground truth. Trains one 3x3 convolution A, shared by the levels.
Open: the only public code is a third-party port, whose weights and reductions are the defaults; the paper is said to
  have 5e-4, 40 and 0.1, 1. The port never applies its adapter and so needs equal widths; here it is applied. It
  relates the instances of all images of a device to each other, which depends on the batch (`parity=True`); here a
  image's own. It takes binary cross-entropy, whose slope is that of the divergence here and which does not vanish
  for equal nets. It compares the regressed numbers of the box; in strides, that is the same for heads that regress
  distances. It leaves out boxes of less than 10 pixels and cuts them at the image; here nothing is left out.
Proof: none: no public original; the parts equal loops over the formulas, RoIAlign and its levels model/faster_* and
  model/mask_* (mmdetection): largest relative error 2e-6.
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
    """Distances of the features, the mutual distances and the predictions of a fixed number of instances per image.

    Args:
      weight: of everything; 1.
      student, teacher: taps of the features.
      feature_weight: 0.005 in the port.
      relation_weight: 40 in the port.
      class_weight: 0.1 in the port.
      box_weight: 0.1 in the port.
      count: instances per image, at least 1; 10. Relations need three.
      iou_threshold: of NMS, 0 .. 1; 0.3.
      parity: relates the instances of the whole batch to each other, not those of an image.

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
                "gid shares one adapter over the levels, which must have the same channels; the taps "
                f"{student!r} (student) and {teacher!r} (teacher) have {widths}"
            )
        for stride, s, t in pairs:
            taps.check_sizes(stride, s.shape, t.shape)
        return nn.init_conv2d(key, 3, *widths[0])

    def features(params: method.Params, context: method.Context, boxes: Array) -> Iterator[Array]:
        """Both nets' features of the boxes, f32[B, R, 10, 10, C]."""
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
        boxes, labels, valid = disagreement.general_instances(
            *scores, *predicted, count=count, iou_threshold=iou_threshold
        )
        s, t = features(params, context, boxes)
        pixels = valid[..., None, None] & jnp.ones(s.shape[2:4], bool)
        chosen = context.targets._replace(boxes=boxes, labels=labels, valid=valid)
        assignment = context.assign(chosen)
        positive = assignment.positive & ~assignment.ignore
        strides = jnp.tile(context.student_rows.location[..., 2:], 2)
        terms = {
            "feature": method.mean_over_positives(jnp.sum(distance.squared(s, t), -1), pixels),
            "relation": pair_distance(s, t, valid),
            "class": method.mean_over_positives(jnp.sum(divergence.sigmoid_kl(*scores), -1), positive),
            "box": method.mean_over_positives(jnp.sum(distance.l1(*predicted) / strides, -1), positive),
        }
        return {name: terms[name] for name in weights if weights[name]}

    names = ("rows.logits", "rows.boxes")
    reads = taps.Reads((student, *names, "rows.location", "targets", "assignment"), (teacher, *names))
    return method.Method(init, apply, weights, reads)
