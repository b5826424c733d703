"""DETRDistill: matched predictions of every layer, features where the teacher's queries look, and its queries as prior.

    classes, l1, giou: sum over layers of sum_(i,j) w_j e_ij / sum_j w_j,  w_j = max_k p_jk^T
        e: sum_k KL(Bern(p_jk^T) || Bern(p_ik^S)), |b_i - b_j|_1, 1 - GIoU(b_i, b_j); pairs (i, j) one to one, of least
        total sum_k CE(z_ik^S, p_jk^T) + 5 |b_i - b_j|_1 - 2 GIoU(b_i, b_j)
    features: sum over layers l of the teacher and over levels of mean_bhwc (M_l (A(S) - T))^2
        M_l = max(sum_q u_q cos(h_ql, T), 0.01), divided by its maximum over the image
        u_q = best class score of query q, times its best IoU with an object where the image has objects
    prior: sum over layers of (VFL + 5 L1 + 2 (1 - GIoU)) / objects, of the student's answers to the boxes from which
        the teacher's queries begin; each learns the object that the teacher's last layer matches it with
    L = weight * (class_weight classes + l1_weight l1 + giou_weight giou + feature_weight features + prior_weight prior)

Paper: Chang et al., "DETRDistill: A Universal Knowledge Distillation Framework for DETR-families", ICCV 2023.
Taps: the decoders of two transformers with the same classes, of which the student's is asked, and neck. Needs the boxes
    of the ground truth. The teacher's neck must be as wide as its decoder; A is a 1x1 convolution where the two necks
    differ.
Open: in the code all rows of the teacher weigh the same, so that background drowns the objects; the paper lets it weigh
    less: here w_j. Its cross-entropy with the teacher's scores is written as a divergence, which has the same gradient
    and is 0 for equal scores. The code pairs layers one by one; here those at the same relative depth. The prior shares
    boxes, not embeddings, because these decoders begin with what the encoder says at the centre of a box.
Proof: none: our sources have the authors' formulas, but no numbers of their code; pairs equal SciPy's, masks and sums
    equal loops.
Status: formula
"""

import jax
import jax.numpy as jnp

from kdjax.boxes import iou, matching
from kdjax.distill import adapters, method, queries, taps
from kdjax.errors import UserError
from kdjax.losses import classification, distance, divergence
from kdjax.structs import Array, Asked, DetectorOutput, Queries, Targets


def make(
    *,
    weight: float = 1.0,
    student: str = "neck",
    teacher: str = "neck",
    class_weight: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    feature_weight: float = 1.0,
    prior_weight: float = 1.0,
) -> method.Method:
    """Matched predictions, features under the teacher's queries, and the teacher's queries in the student's decoder.

    Args:
      weight: of all terms.
      student, teacher: taps of the features.
      class_weight, l1_weight, giou_weight: of matched predictions.
      feature_weight: of the features; 0 switches them off.
      prior_weight: of the teacher's queries; 0 switches them off.
    """
    weights = {
        "classes": weight * class_weight,
        "l1": weight * l1_weight,
        "giou": weight * giou_weight,
        "features": weight * feature_weight,
        "prior": weight * prior_weight,
    }

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        queries.check(student_spec, teacher_spec, asks=("student",) if weights["prior"] else ())
        if not weights["features"]:
            return {}
        pairs = taps.pair(student_spec, teacher_spec, student, teacher)
        hidden = teacher_spec.layers[-1].hidden
        width = None if hidden is None else hidden.shape[-1]
        for stride, _, t in pairs:
            if t.shape[-1] != width:
                raise UserError(
                    f"the teacher's queries are compared with its maps, but they have {width} channels and the tap "
                    f"{teacher!r} at stride {stride} has {t.shape[-1]}: set feature_weight=0"
                )
        return adapters.init_adapters(key, pairs)

    def predictions(context: method.Context) -> dict[str, Array]:
        pairs = queries.paired(queries.layer_pairs(context.student.layers, context.teacher.layers))
        layers = []
        for s, t in pairs:
            l1, giou = queries.box_terms(s.boxes, t.boxes)
            kl = jnp.sum(divergence.sigmoid_kl(s.logits, t.logits), -1)
            layers.append([queries.weighted_mean(x, queries.scores(t)) for x in (kl, l1, giou)])
        return dict(zip(("classes", "l1", "giou"), map(method.sum_over_levels, zip(*layers, strict=True)), strict=True))

    def features(params: method.Params, context: method.Context) -> Array:
        pairs = adapters.adapt(params, taps.pair(context.student, context.teacher, student, teacher))
        masks = [(t, attention(layer, t, context.targets)) for _, _, t in pairs for layer in context.teacher.layers]
        apart = {id(t): distance.squared(s, t) for _, s, t in pairs}
        return method.sum_over_levels(jnp.mean(jnp.square(mask)[..., None] * apart[id(t)]) for t, mask in masks)

    def prior(context: method.Context) -> Array:
        teacher_output, targets = context.teacher, context.targets
        assert context.student.ask is not None
        assert teacher_output.selected is not None
        truth, last = queries.truth(targets), teacher_output.layers[-1]
        cost = matching.matching_cost(last.logits, last.boxes, targets.labels, truth)
        matched = matching.objects_of(matching.hungarian(cost, targets.valid)[None], last.logits.shape[1])
        index = jnp.maximum(matched, 0)
        wanted = jnp.take_along_axis(truth, index[..., None], 1)
        labels = jnp.where(matched >= 0, jnp.take_along_axis(targets.labels, index, 1), last.logits.shape[-1])
        count = jnp.maximum(jnp.sum(targets.valid), 1)
        answers = context.student.ask(Asked(jax.lax.stop_gradient(teacher_output.selected.boxes), sees_own=False))
        total = []
        for layer in answers.layers:
            l1, giou = queries.box_terms(layer.boxes, wanted)
            quality = iou.box_iou(matching.corners(layer.boxes), matching.corners(wanted), eps=queries.EPS)
            of_classes = classification.varifocal(layer.logits, labels, jax.lax.stop_gradient(quality))
            total.append(jnp.sum(of_classes) + jnp.sum(jnp.where(matched >= 0, 5 * l1 + 2 * giou, 0.0)))
        return method.sum_over_levels(total) / count

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        terms = predictions(context)
        if weights["features"]:
            terms["features"] = features(params, context)
        if weights["prior"]:
            terms["prior"] = prior(context)
        return {name: terms[name] for name in weights if weights[name]}

    maps = [(student, teacher)] if weights["features"] else []
    asks = ("ask",) if weights["prior"] else ()
    reads = taps.Reads(
        (*(s for s, _ in maps), "layers", *asks, "targets"),
        (*(t for _, t in maps), "layers"),
    )
    return method.Method(init, apply, weights, reads)


def attention(layer: Queries, x: Array, targets: Targets) -> Array:
    """Where the queries of a layer look in a map [B, H, W, C]: f32[B, H, W], in 0 .. 1, the largest of an image 1."""
    assert layer.hidden is not None
    boxes, objects = matching.corners(layer.boxes), matching.corners(queries.truth(targets))
    overlap = jnp.where(targets.valid[:, None], iou.pairwise_iou(boxes, objects, eps=queries.EPS), 0.0)
    labelled = jnp.any(targets.valid, 1, keepdims=True)
    trust = queries.scores(layer) * jnp.where(labelled, jnp.max(overlap, -1), 1.0)

    def unit(values: Array) -> Array:
        values = values.astype(jnp.float32)
        return values / jnp.maximum(jnp.linalg.norm(values, axis=-1, keepdims=True), 1e-12)

    # The sum of cosines is the cosine with the sum of the unit states.
    looked_for = jnp.einsum("bq,bqc->bc", trust, unit(layer.hidden), precision="highest")
    mask = jnp.maximum(jnp.einsum("bc,bhwc->bhw", looked_for, unit(x), precision="highest"), 0.01)
    return jax.lax.stop_gradient(mask / jnp.max(mask, (1, 2), keepdims=True))
