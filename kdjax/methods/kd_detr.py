"""KD-DETR: queries that both decoders answer, so that row i of both has the same question and nothing is matched.

    L = weight * sum over layers and over both groups of queries of sum_i w_i e_i / sum_i w_i
    e_i = class_weight sum_k KL(Bern(p_ik^T) || Bern(p_ik^S)) + l1_weight |b_i^T - b_i^S|_1
          + giou_weight (1 - GIoU(b_i^T, b_i^S)),   w_i = max_k p_ik^T,   b in shares of the sides of the image
    general:  boxes drawn anew in each step, centre uniform, sides log-uniform in 0.05 .. 0.6
    specific: the boxes from which the teacher's own queries begin
    dense, for students with priors on a grid: one group, boxes of 4 strides at the priors; the student's rows and the
        teacher's last layer

Paper: Wang et al., "KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation Points
    Sampling", CVPR 2024.
Taps: the decoders of two transformers with the same classes, which are asked about the shared queries beside their own;
    with `dense` the predictions of a student with one stage, and the boxes of the ground truth for the size of images.
Open: there is no public code. What is shared: RT-DETR and D-FINE have no learned queries, so boxes are shared, and each
    model begins with what its own encoder says at the centre of a box. The queries see those of their group, but not
    the model's own nor the other group. The paper's KL is of a softmax; here it is that of each sigmoid, summed over
    the classes. Weights 1, 5 and 2 are those of DETR's losses; both groups weigh the same. A layer of the student is
    compared with the teacher's at the same relative depth. For a grid the paper has no formula: its cells are the
    general queries, asked 300 at a time, which see those of their 300; anchors of one cell are one query.
Proof: none: no public original; compared with a loop, and with what the formula says of equal models.
Status: formula
"""

import jax
import jax.numpy as jnp

from kdjax.boxes import convert
from kdjax.distill import method, queries, taps
from kdjax.errors import UserError
from kdjax.losses import divergence
from kdjax.structs import Array, Asked, DetectorOutput, Queries

SIZES = (0.05, 0.6)  # smallest and largest side of general boxes, as shares
CELLS = 300  # of a grid that the decoder is asked about at a time
STRIDES = 4  # the sides of the boxes of a grid


def make(
    *,
    weight: float = 1.0,
    class_weight: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    general: int = 300,
    specific: bool = True,
    dense: bool = False,
) -> method.Method:
    """Divergence of the scores and distance of the boxes that both decoders give to the same queries.

    Args:
      weight: of all terms.
      class_weight, l1_weight, giou_weight: of the three terms.
      general: number of general queries, >= 0.
      specific: whether the teacher's own queries are asked too.
      dense: whether the student has priors on a grid, about which the teacher is asked instead.

    Raises:
      UserError: `general` below 0, or no queries at all.
    """
    method.check("kd_detr: general", general, general >= 0, "at least 0")
    method.check("kd_detr: specific", specific, bool(general) or specific, "True where general is 0")
    weights = {"classes": weight * class_weight, "l1": weight * l1_weight, "giou": weight * giou_weight}

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        del key
        if dense:
            _check_dense(student_spec, teacher_spec)
            return {}
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

    def terms_of(s: Queries, t: Queries) -> dict[str, Array]:
        l1, giou = queries.box_terms(s.boxes, t.boxes)
        return {"classes": jnp.sum(divergence.sigmoid_kl(s.logits, t.logits), -1), "l1": l1, "giou": giou}

    def compare(s: Queries, t: Queries, ends: list[tuple[int, int]]) -> dict[str, Array]:
        trust = queries.scores(t)
        return {
            name: method.sum_over_levels(queries.weighted_mean(x[:, a:b], trust[:, a:b]) for a, b in ends)
            for name, x in terms_of(s, t).items()
        }

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        del params
        if dense:
            cells, answers = _cells(context)
            found = compare(cells, answers, [(0, cells.boxes.shape[1])])
            return {name: found[name] for name in weights if weights[name]}
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

    of_grid = ("rows.logits", "rows.boxes", "rows.location", "targets")
    reads = taps.Reads(of_grid if dense else ("layers", "ask"), ("layers", "ask"))
    one_stage = "the teacher's decoder is asked about priors on a grid, and regions lie on none" if dense else ""
    return method.Method(init, apply, weights, reads, one_stage=one_stage)


def _check_dense(student: DetectorOutput, teacher: DetectorOutput) -> None:
    if teacher.ask is None:
        raise UserError("the teacher is no transformer whose decoder can be asked (`DetectorOutput.ask`)")
    assert student.rows is not None
    assert student.rows.logits is not None
    classes = [side.shape[-1] for side in (student.rows.logits, teacher.layers[-1].logits)]
    if classes[0] != classes[1]:
        raise UserError(f"the student has {classes[0]} classes and the teacher {classes[1]}: they must be the same")


def _cells(context: method.Context) -> tuple[Queries, Queries]:
    """The student's rows, and what the teacher's last layer says of boxes at their places."""
    rows, anchors, ask = context.student.rows, context.student.anchors, context.teacher.ask
    assert rows is not None
    assert rows.logits is not None
    assert rows.boxes is not None
    assert rows.location is not None
    assert ask is not None
    sides = jnp.tile(context.targets.pad_size[:, None, ::-1].astype(jnp.float32), 2)  # f32[B, 1, 4]
    place = jnp.asarray(rows.location, jnp.float32)[::anchors]
    place = place * jnp.array([1, 1, STRIDES, STRIDES], jnp.float32)
    boxes = jnp.clip(place / sides, 0, 1)
    batch, count, _ = boxes.shape
    size = min(CELLS, count)
    there = (jnp.arange(-(-count // size) * size) < count).reshape(-1, size)
    boxes = jnp.pad(boxes, ((0, 0), (0, there.size - count), (0, 0))).reshape(batch, -1, size, 4)

    def answer(piece: tuple[Array, Array]) -> tuple[Array, Array]:
        given, known = piece
        last = ask(Asked(given, blocked=jnp.broadcast_to(~known, (size, size)), sees_own=False)).layers[-1]
        return last.logits, last.boxes

    found = jax.lax.stop_gradient(jax.lax.map(answer, (jnp.moveaxis(boxes, 1, 0), there)))
    logits, said = (
        jnp.repeat(jnp.moveaxis(x, 0, 1).reshape(batch, there.size, -1)[:, :count], anchors, 1) for x in found
    )
    return Queries(rows.logits, convert.to_cxcywh(rows.boxes / sides)), Queries(logits, said)
