"""CrossKD: the student's features, given the teacher's statistics, go through the rest of the teacher's head."""

from kdjax.losses import common
from kdjax.structs import Array


def align(student: Array, teacher: Array, *, eps: float = 1e-6, ddof: int = 1, axis_name: str | None = None) -> Array:
    """Gives the student's map the mean and deviation of the teacher's, channel by channel.

        (student - mean_s) / (std_s + eps) * std_t + mean_t

    The gradient flows through the student's statistics. The result enters `Detector.head` of the teacher (activation,
    remaining convolutions, predictor, all frozen); its predictions are compared with the teacher's own by
    `logits.modulated_bce`, `box.giou` or `logits.softmax_kl`.

    Args:
      student: f32[B, H, W, C], output of a tower convolution before the activation.
      teacher: f32[B, H, W, C], the same place of the teacher.
      eps: added to the student's standard deviation.
      ddof: 1, the unbiased deviation of the published code, or 0.
      axis_name: under `pmap` or `shard_map`, the mapped axis that splits the batch.

    Returns:
      f32[B, H, W, C]; the teacher's map itself (up to eps) if the student's is a positive affine map of it.

    Scope: global batch.
    Peers: CrossKD's `align_scale`. Its code takes the maps before the activation, but the ReLU behind works in place
      and changes them too: what it really aligns is relu(student) with relu(teacher).
    Reference: Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", 2024, section 3.2.

    Example:
      >>> import numpy as np
      >>> teacher = np.array([1.0, 2.0, 6.0]).reshape(3, 1, 1, 1)
      >>> [round(float(v), 3) for v in align(5 * teacher - 3, teacher).ravel()]
      [1.0, 2.0, 6.0]
    """
    student, teacher = common.float32_pair(student, teacher, "align")
    _, centred, variance = common.moments(student, ddof=ddof, axis_name=axis_name)
    mean, _, teacher_variance = common.moments(teacher, ddof=ddof, axis_name=axis_name)
    scale = common.safe_sqrt(teacher_variance) / (common.safe_sqrt(variance) + eps)
    return centred * scale + mean
