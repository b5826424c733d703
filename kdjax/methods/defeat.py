"""DeFeat: decoupled features, with separate terms for objects and background in the neck.

    L = weight * mean over levels of
            foreground_weight sum M (A(S) - T)^2 / max(2 C |M|, 1)
            + background_weight sum (1 - M) (A(S) - T)^2 / max(2 C |1 - M|, 1)
    M: the cells int(x1 / stride) .. int(x2 / stride) - 1 (y alike) of the boxes of the level,
       which is floor(log2(sqrt((w + 1) (h + 1)) / 56)) within the available ones;  |M| over the batch

Paper: Guo et al., "Distilling Object Detectors via Decoupled Features", CVPR 2021.
Taps: neck (any detector). Needs the boxes of the ground truth. Trains one 3x3 convolution A per level, with initial
  weights near zero.
Open: the paper's second part compares the class probabilities that both RoI heads give to the teacher's proposals,
  separately for positives and background (weights 2 and 2). It needs two-stage detectors, which kdjax does not have;
  the authors' released configuration does not use it either. For taps on the backbone, A can end with a ReLU (`relu`).
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
    """Half the mean squared difference of two maps, over the cells of objects and over all others.

    Args:
      weight: of the whole loss; 1.
      student, teacher: taps.
      foreground_weight: of the objects' cells; 3 (Faster R-CNN on VOC).
      background_weight: of all other cells; 12 (Faster R-CNN on VOC).
      relu: ends the adapter with a ReLU, for a teacher's map that is the output of a ReLU.
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
