"""MGD: masked generative distillation, the teacher's maps reconstructed from masked maps of the student.

    L = weight * sum over levels of 1/B sum_bhwc (G(m A(S)) - T)^2
    G = conv3x3, relu, conv3x3;  m[b, h, w] is 0 with probability drop, else 1, drawn anew for each step and level

Paper: Yang et al., "Masked Generative Distillation", ECCV 2022, Eqs. 2-3.
Taps: neck (any detector). Needs nothing else. Trains a 1x1 adapter A where channels differ and a generator G per level.
Open: weight and mask ratio are published by task: one-stage detectors 2e-5 and 0.65 (the defaults), two-stage ones 5e-7
  and 0.45, segmentation 0.75; classification masks channels instead of cells (`mask="channels"`, 7e-5 and 0.15). Kept
  values are not rescaled. The loss is a sum over H, W and C, so it grows with the size and the width of the maps, and
  the weight is for the authors' maps: 256 channels, images of 800 x 1333. The loss does not vanish for a student that
  equals its teacher. Within a family the authors initialise the student's neck and head from the teacher's, which is
  not possible where widths differ.
Proof: kd/mgd_* (the authors' code) with their mask, and the gradients of the generator: largest relative error 5.7e-7.
Status: proven
"""

from typing import Literal

import jax
import jax.numpy as jnp

from kdjax.distill import adapters, method, taps
from kdjax.losses import distance, reconstruction
from kdjax.structs import Array, DetectorOutput


def make(
    *,
    weight: float = 2e-5,
    student: str = "neck",
    teacher: str = "neck",
    drop: float = 0.65,
    mask: Literal["cells", "channels"] = "cells",
) -> method.Method:
    """Squared difference between the teacher's map and its reconstruction from the student's masked map.

    Args:
      weight: alpha of the sum over levels; 2e-5 for one-stage detectors, 5e-7 for two-stage ones.
      student, teacher: taps.
      drop: lambda, the probability 0 .. 1 that a cell is masked; 0.65 for one-stage detectors, 0.45 for two-stage ones.
      mask: "cells", shared over channels, or "channels", shared over cells.

    Raises:
      UserError: `drop` outside 0 .. 1, or unknown mask.
    """
    method.check("mgd: drop", drop, 0 <= drop <= 1, "within 0 .. 1")
    method.check_choice("mgd: mask", mask, ("cells", "channels"))

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        pairs = taps.pair(student_spec, teacher_spec, student, teacher)
        return adapters.init_adapters(key, pairs) | {"generators": adapters.init_generators(key, pairs)}

    def compare(s: Array, t: Array, generator: method.Params, key: Array) -> Array:
        batch, height, width, channels = s.shape
        shape = (batch, height, width, 1) if mask == "cells" else (batch, 1, 1, channels)
        kept = reconstruction.keep_mask(jax.random.uniform(key, shape), drop)
        return jnp.sum(distance.squared(reconstruction.reconstruct(kept * s, generator), t)) / batch

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        pairs = adapters.adapt(params, taps.pair(context.student, context.teacher, student, teacher))
        levels = [
            compare(s, t, params["generators"][str(stride)], jax.random.fold_in(context.key, stride))
            for stride, s, t in pairs
        ]
        return {"generation": method.sum_over_levels(levels)}

    return method.Method(init, apply, {"generation": weight}, taps.Reads((student,), (teacher,)))
