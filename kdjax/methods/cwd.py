"""CWD: channel-wise distillation, each channel of a map compared as a distribution over space.

    p = softmax_hw(T / tau),  q = softmax_hw(A(S) / tau)
    L = weight * sum over levels of tau^2/(B C) sum_bc KL(p || q)

Paper: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, Eqs. 3-4.
Taps: neck (any detector), or cls_logits on both sides (dense class maps; no adapter: both must have the same classes).
  Needs nothing else. On the neck A is a 1x1 convolution where channels differ.
Open: the published weights differ with toolbox and tap (`weight`). One port computes the cross-entropy, which has the
  same gradient but does not vanish at equality; here it is the divergence. The same loss on normalised features is the
  method `rtmdet_cwd`.
Proof: kd/cwd_* (mmrazor's ChannelWiseDivergence): largest relative error 1.8e-6.
Status: proven
"""

import jax.numpy as jnp

from kdjax.distill import adapters, method, taps
from kdjax.errors import UserError
from kdjax.losses import divergence
from kdjax.structs import Array, DetectorOutput


def make(
    *,
    weight: float = 10.0,
    student: str = "neck",
    teacher: str = "neck",
    temperature: float = 1.0,
) -> method.Method:
    """Channel-wise divergence over space.

    Args:
      weight: of the sum over levels; 10 in mmrazor (RetinaNet, Faster R-CNN, 5 levels), 5 in mmdetection-distiller (4
        levels).
      student, teacher: taps; "cls_logits" on both sides or on neither.
      temperature: tau of both softmaxes; 1 for detectors, 4 is better for segmentation.

    Raises:
      UserError: a class map against another map, or a temperature not above 0.
    """
    classes, teacher_classes = (name.partition(".")[0] == "cls_logits" for name in (student, teacher))
    if classes != teacher_classes:
        raise UserError(
            f"cwd: student is {student!r} and teacher {teacher!r}: class maps compare with class maps only: "
            "both must be 'cls_logits', or neither"
        )
    method.check("cwd: temperature", temperature, temperature > 0, "above 0")

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        pairs = taps.pair(student_spec, teacher_spec, student, teacher)
        for stride, s, t in pairs:
            if classes and s.shape[-1] != t.shape[-1]:
                raise UserError(
                    f"cwd compares class maps without an adapter, but at stride {stride} the student has {s.shape[-1]} "
                    f"and the teacher {t.shape[-1]} of them: use the taps 'neck' if the classes differ"
                )
        return adapters.init_adapters(key, pairs)

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        pairs = adapters.adapt(params, taps.pair(context.student, context.teacher, student, teacher))
        levels = [jnp.mean(divergence.channel_kl(s, t, temperature=temperature)) for _, s, t in pairs]
        return {"cwd": method.sum_over_levels(levels)}

    return method.Method(init, apply, {"cwd": weight}, taps.Reads((student,), (teacher,)))
