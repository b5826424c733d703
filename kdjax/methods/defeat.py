"""DeFeat: decoupled features, objects and background of the neck apart.

    L = weight * mean over levels of
            foreground_weight sum M (A(S) - T)^2 / max(2 C |M|, 1)
            + background_weight sum (1 - M) (A(S) - T)^2 / max(2 C |1 - M|, 1)
    M: the cells int(x1 / stride) .. int(x2 / stride) - 1 (y alike) of the boxes of the level,
       which is floor(log2(sqrt((w + 1) (h + 1)) / 56)) within the available ones;  |M| over the batch

Paper: Guo et al., "Distilling Object Detectors via Decoupled Features", CVPR 2021.
Taps: neck (any detector). Needs the boxes of the ground truth. Trains a 3x3 convolution A a level, tiny at first.
Open: the paper's second part compares the class probabilities of the teacher's proposals behind both nets' RoI heads,
  positive and background ones apart (weights 2 and 2). It needs detectors of two stages, for which it comes; the
  authors' released configuration does not use it either. Optional taps on the backbone end A with a ReLU (`relu`).
  The level of a box counts from the finest level of the tap, whatever its stride, as in the authors' code.
Proof: none: no reference numbers; masks and divisors equal loops over the formula.
Status: formula
"""

import jax
import jax.numpy as jnp

from kdjax.distill import adapters, method, taps
from kdjax.losses import distance, regions
from kdjax.structs import Array, DetectorOutput


def make(
    *,
    weight: float = 1.0,
    student: str = "neck",
    teacher: str = "neck",
    foreground_weight: float = 3.0,
    background_weight: float = 12.0,
    relu: bool = False,
) -> method.Method:
    """Half the mean squared distance of two maps on the cells of objects, and on all others.

    Args:
      weight: of everything; 1.
      student, teacher: taps.
      foreground_weight: of the objects' cells; 3 (Faster R-CNN on VOC).
      background_weight: of all other cells; 12 (Faster R-CNN on VOC).
      relu: ends the adapter with a ReLU, for a teacher's map that is one's output.
    """
    weights = {"foreground": weight * foreground_weight, "background": weight * background_weight}

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        pairs = taps.pair(student_spec, teacher_spec, student, teacher)
        return adapters.init_adapters(key, pairs, kernel_size=3, always=True, deviation=1e-4)

    def compare(s: Array, t: Array, inside: Array) -> dict[str, Array]:
        error = distance.squared(jax.nn.relu(s) if relu else s, t)

        def half_mean(mask: Array) -> Array:
            return jnp.sum(mask * error) / jnp.maximum(2 * t.shape[-1] * jnp.sum(mask), 1)

        return {"foreground": half_mean(inside), "background": half_mean(~inside)}

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        pairs = adapters.adapt(params, taps.pair(context.student, context.teacher, student, teacher))
        masks = regions.level_masks(
            context.targets.boxes,
            context.targets.valid,
            [p.stride for p in pairs],
            [taps.map_size(p.teacher) for p in pairs],
        )
        levels = [compare(s, t, mask) for (_, s, t), mask in zip(pairs, masks, strict=True)]
        return {name: method.mean_over_levels([level[name] for level in levels]) for name in weights if weights[name]}

    return method.Method(init, apply, weights, taps.Reads((student, "targets"), (teacher,)))
