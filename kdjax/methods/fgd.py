"""FGD: focal and global distillation of the neck.

    L = weight * sum over levels of 1/B sum_b
            foreground_weight sum_hwc Mfg As(T) Ac(T) (S' - T)^2 + background_weight sum_hwc Mbg As(T) Ac(T) (S' - T)^2
            + attention_weight (sum_hw |As(S') - As(T)| + sum_c |Ac(S') - Ac(T)|)
            + relation_weight sum_hwc (R_s(S') - R_t(T))^2
    S' = A(S),  As(X) = H W softmax_hw(mean_c |X| / tau),  Ac(X) = C softmax_c(mean_hw |X| / tau)
    Mfg = 1 / (cells of the smallest box there),  Mbg = 1 / (background cells),  R(X) = X + W2 relu(LN(W1 context(X)))

Paper: Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, Eqs. 2-3, 8, 9, 12.
Taps: neck (any detector). Needs the boxes of the ground truth; an image without any counts as background. Trains a 1x1
  adapter A where channels differ and for student and teacher a context block R per level, which is the identity at
  first.
Open: the official code scales boxes by the size of the unpadded image onto the map of the padded batch, which shifts
  them where there is padding; here it is the padded size (`unpadded=True` is the official code). The cells at a box's
  right and lower border count as foreground, as in the code. The four weights differ by detector: the defaults are
  FCOS's with tau 0.8; with tau 0.5, RepPoints has the same, RetinaNet and GFL have 1e-3, 5e-4, 5e-4, 5e-6, YOLOX 2e-3,
  1e-3, 1e-3, 1e-5, and two-stage detectors 5e-5, 2.5e-5, 5e-5, 5e-7. Within a family the authors initialise the
  student's neck and head from the teacher's, which is not possible where widths differ.
Proof: kd/fgd_* (the authors' code), all terms, masks and the gradients of the blocks: largest relative error 1.7e-6.
Status: proven
"""

import jax
import jax.numpy as jnp

from kdjax.distill import adapters, method, taps
from kdjax.losses import attention, distance, regions, relation
from kdjax.structs import Array, DetectorOutput, Targets


def make(
    *,
    weight: float = 1.0,
    student: str = "neck",
    teacher: str = "neck",
    foreground_weight: float = 1.6e-3,
    background_weight: float = 8e-4,
    attention_weight: float = 8e-4,
    relation_weight: float = 8e-6,
    temperature: float = 0.8,
    unpadded: bool = False,
) -> method.Method:
    """Focal terms (foreground, background, attention) and a global term (relation) between two maps.

    Args:
      weight: of the whole loss; 1.
      student, teacher: taps.
      foreground_weight: alpha, 1.6e-3 (FCOS).
      background_weight: beta, 8e-4 (FCOS).
      attention_weight: gamma, 8e-4 (FCOS).
      relation_weight: lambda, 8e-6 (FCOS).
      temperature: tau of the attentions; 0.8 for FCOS, 0.5 for all others.
      unpadded: scales boxes by the size of the image without its padding, as the official code does.

    Raises:
      UserError: a temperature not above 0.
    """
    method.check("fgd: temperature", temperature, temperature > 0, "above 0")
    weights = {
        "foreground": weight * foreground_weight,
        "background": weight * background_weight,
        "attention": weight * attention_weight,
        "relation": weight * relation_weight,
    }

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        pairs = taps.pair(student_spec, teacher_spec, student, teacher)
        key, *keys = jax.random.split(key, 3)
        blocks = {
            str(stride): {
                side: relation.init_context(jax.random.fold_in(k, stride), t.shape[-1])
                for side, k in zip(("student", "teacher"), keys, strict=True)
            }
            for stride, _, t in pairs
        }
        return adapters.init_adapters(key, pairs) | {"blocks": blocks}

    def compare(s: Array, t: Array, blocks: method.Params, targets: Targets) -> dict[str, Array]:
        size = targets.image_size if unpadded else targets.pad_size
        foreground, background = regions.focal_masks(targets.boxes, targets.valid, size, taps.map_size(t))
        attended = attention.attention_weighted(s, t, temperature=temperature)
        s_context = relation.context_block(s, blocks["student"])
        t_context = relation.context_block(t, blocks["teacher"])
        return {
            "foreground": foreground * attended,
            "background": background * attended,
            "attention": attention.attention_difference(s, t, temperature=temperature),
            "relation": distance.squared(s_context, t_context),
        }

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        pairs = adapters.adapt(params, taps.pair(context.student, context.teacher, student, teacher))
        levels = [compare(s, t, params["blocks"][str(stride)], context.targets) for stride, s, t in pairs]
        return {
            name: method.sum_over_levels(jnp.sum(level[name]) / len(level[name]) for level in levels)
            for name in weights
            if weights[name]
        }

    return method.Method(init, apply, weights, taps.Reads((student, "targets"), (teacher,)))
