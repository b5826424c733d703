"""KD-DETR: queries that both decoders answer, so that row i of both has the same question and nothing is matched.

    L = weight * sum over layers and over both groups of queries of sum_i w_i e_i / sum_i w_i
    e_i = class_weight sum_k KL(Bern(p_ik^T) || Bern(p_ik^S)) + l1_weight |b_i^T - b_i^S|_1
          + giou_weight (1 - GIoU(b_i^T, b_i^S)),   w_i = max_k p_ik^T,   b in shares of the sides of the image
    general:  boxes drawn anew in each step, centre uniform, sides log-uniform in 0.05 .. 0.6
    specific: the boxes from which the teacher's own queries begin

Paper: Wang et al., "KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation Points
    Sampling", CVPR 2024.
Taps: the decoders of two transformers with the same classes, which are asked about the shared queries beside their own.
Open: there is no public code. What is shared: RT-DETR and D-FINE have no learned queries, so boxes are shared, and each
    model begins with what its own encoder says at the centre of a box. The queries see those of their group, but not
    the model's own nor the other group. The paper's KL is of a softmax; here it is that of each sigmoid, summed over
    the classes. Weights 1, 5 and 2 are those of DETR's losses; both groups weigh the same. A layer of the student is
    compared with the teacher's at the same relative depth.
Proof: none: no public original; compared with a loop, and with what the formula says of equal models.
Status: formula
"""

import jax
import jax.numpy as jnp

from kdjax.distill import method, queries, taps
from kdjax.losses import divergence
from kdjax.structs import Array, Asked, DetectorOutput, Queries

SIZES = (0.05, 0.6)  # smallest and largest side of general boxes, as shares


def make(
    *,
    weight: float = 1.0,
    class_weight: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    general: int = 300,
    specific: bool = True,
) -> method.Method:
    """Divergence of the scores and distance of the boxes that both decoders give to the same queries.

    Args:
      weight: of all terms.
      class_weight, l1_weight, giou_weight: of the three terms.
      general: number of general queries, >= 0.
      specific: whether the teacher's own queries are asked too.

    Raises:
      UserError: `general` below 0, or no queries at all.
    """
    method.check("kd_detr: general", general, general >= 0, "at least 0")
    method.check("kd_detr: specific", specific, bool(general) or specific, "True where general is 0")
    weights = {"classes": weight * class_weight, "l1": weight * l1_weight, "giou": weight * giou_weight}

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        del key
        queries.check(student_spec, teacher_spec, asks=("student", "teacher"))
        return {}

    def groups(key: Array, teacher: DetectorOutput) -> list[Array]:
        """The boxes of each group, f32[B, D, 4]."""
        assert teacher.selected is not None
        own = teacher.selected.boxes
        found = [jax.lax.stop_gradient(own)] if specific else []
        if general:
            drawn = jax.random.uniform(key, (len(own), general, 4))
            low, high = jnp.log(jnp.array(SIZES))
            found.append(jnp.concatenate([drawn[..., :2], jnp.exp(low + drawn[..., 2:] * (high - low))], -1))
        return found

    def compare(s: Queries, t: Queries, ends: list[tuple[int, int]]) -> dict[str, Array]:
        trust = queries.scores(t)
        l1, giou = queries.box_terms(s.boxes, t.boxes)
        rows = {"classes": jnp.sum(divergence.sigmoid_kl(s.logits, t.logits), -1), "l1": l1, "giou": giou}
        return {
            name: method.sum_over_levels(queries.weighted_mean(x[:, a:b], trust[:, a:b]) for a, b in ends)
            for name, x in rows.items()
        }

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        del params
        assert context.student.ask is not None
        assert context.teacher.ask is not None
        chosen = groups(context.key, context.teacher)
        counts = [boxes.shape[1] for boxes in chosen]
        ends = [(sum(counts[:i]), sum(counts[: i + 1])) for i in range(len(counts))]
        group = jnp.repeat(jnp.arange(len(counts)), jnp.array(counts), total_repeat_length=sum(counts))
        asked = Asked(jnp.concatenate(chosen, 1), blocked=group[:, None] != group, sees_own=False)
        answers = context.student.ask(asked).layers, jax.lax.stop_gradient(context.teacher.ask(asked).layers)
        layers = [compare(s, t, ends) for s, t in queries.layer_pairs(*answers)]
        return {name: method.sum_over_levels(layer[name] for layer in layers) for name in weights if weights[name]}

    return method.Method(init, apply, weights, taps.Reads(("layers", "ask"), ("layers", "ask")))
