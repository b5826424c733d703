"""DeFeat: decoupled features, with separate terms for objects and background in the neck.

    L = weight * mean over levels of
            foreground_weight sum M (A(S) - T)^2 / max(2 C |M|, 1)
            + background_weight sum (1 - M) (A(S) - T)^2 / max(2 C |1 - M|, 1)
    M: the cells int(x1 / stride) .. int(x2 / stride) - 1 (y alike) of the boxes of the level,
       which is floor(log2(sqrt((w + 1) (h + 1)) / 56)) within the available ones;  |M| over the batch
    L += weight * (head_foreground_weight mean over positives of e + head_background_weight mean over background of e)
    e = tau^2 KL(softmax(z^T / tau) || softmax(z^S / tau)) of what both second stages say of the teacher's proposals

Paper: Guo et al., "Distilling Object Detectors via Decoupled Features", CVPR 2021.
Taps: neck (any detector). Needs the boxes of the ground truth. Trains one 3x3 convolution A per level, with initial
  weights near zero.
Open: the second part compares the class probabilities that both second stages give to the teacher's proposals,
  separately for positives (an IoU of at least 0.5 with an object) and background. It needs two-stage detectors on both
  sides and is off by default, as in the authors' released configuration; the paper's weights are 2 and 2, its
  temperatures 1 and 1. How the paper normalises it our sources do not say: here each sum is divided by its own number
  of proposals of the batch. For taps on the backbone, A can end with a ReLU (`relu`).
  The level of a box counts from the finest level of the tap, whatever its stride, as in the authors' code.
Proof: none: no reference numbers; masks and divisors equal loops over the formula.
Status: formula
"""

import jax
import jax.numpy as jnp

from kdjax.distill import adapters, method, taps
from kdjax.losses import distance, divergence, regions
from kdjax.structs import Array, DetectorOutput


def make(
    *,
    weight: float = 1.0,
    student: str = "neck",
    teacher: str = "neck",
    foreground_weight: float = 3.0,
    background_weight: float = 12.0,
    head_foreground_weight: float = 0.0,
    head_background_weight: float = 0.0,
    temperature: float = 1.0,
    relu: bool = False,
) -> method.Method:
    """Half the mean squared difference of two maps, over the cells of objects and over all others.

    Args:
      weight: of the whole loss; 1.
      student, teacher: taps.
      foreground_weight: of the objects' cells; 3 (Faster R-CNN on VOC).
      background_weight: of all other cells; 12 (Faster R-CNN on VOC).
      head_foreground_weight: of the scores of positive proposals; 2 in the paper, 0 in the released configuration.
      head_background_weight: of the scores of all others; 2 in the paper, 0 in the released configuration.
      temperature: tau > 0 of the class scores; 1.
      relu: ends the adapter with a ReLU, for a teacher's map that is the output of a ReLU.

    Raises:
      UserError: temperature not above 0.
    """
    method.check("defeat: temperature", temperature, temperature > 0, "above 0")
    weights = {
        "foreground": weight * foreground_weight,
        "background": weight * background_weight,
        "head_foreground": weight * head_foreground_weight,
        "head_background": weight * head_background_weight,
    }
    of_head = bool(weights["head_foreground"] or weights["head_background"])

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
        terms = {name: method.mean_over_levels([level[name] for level in levels]) for name in levels[0]}
        if of_head:
            asked = context.proposals
            apart = divergence.softmax_kl(asked.student.logits, asked.teacher.logits, temperature=temperature)
            positive, ignore = asked.assignment.positive, asked.assignment.ignore
            terms["head_foreground"] = method.mean_over_positives(apart, positive)
            terms["head_background"] = method.mean_over_positives(apart, ~positive & ~ignore)
        return {name: terms[name] for name in weights if weights[name]}

    # What the teacher proposes is made of the outputs of its first stage.
    first_stage = ("box_reg", "quality", "proposals") if of_head else ()
    return method.Method(init, apply, weights, taps.Reads((student, "targets"), (teacher, *first_stage)))
