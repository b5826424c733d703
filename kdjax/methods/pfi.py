"""PFI: prediction-guided feature imitation, with features weighted by how much the predictions differ.

    P[b, h, w] = mean_{a,k} (z^S - z^T)^2,   F[b, h, w] = mean_c (S' - T)^2
    L = weight * mean over levels of mean_{b,h,w} P F

Paper: Li et al., "Knowledge Distillation for Object Detection via Rank Mimicking and Prediction-guided Feature
    Imitation", AAAI 2022.
Taps: neck or other maps of the same size as the class predictions, and cls_logits (dense heads, the same priors and
    classes on both sides). S' is the student's map, after a 1x1 convolution where the channels differ.
Open: space of the predictions: logits (the only one that the published weight fits) or space="probs". Scale of P:
    unchanged; normalize_guide=True divides it by its mean over the level, which is advised for heads other than
    RetinaNet's. Reduction: the mean of P F, or form="norm", the Euclidean norm of P F over the cells of an image
    divided by their number, averaged over images. All public codes let the gradient through P, so PFI also trains the
    predictions; detach_guide=True stops it.
Proof: none: no public original (unofficial ports).
Status: formula
"""

from typing import Literal

import jax
import jax.numpy as jnp

from kdjax.distill import adapters, method, taps
from kdjax.errors import UserError
from kdjax.losses import disagreement, distance, normalization
from kdjax.structs import Array, DetectorOutput


def make(
    *,
    weight: float = 1.5,
    student: str = "neck",
    teacher: str = "neck",
    space: Literal["logits", "probs"] = "logits",
    form: Literal["mean", "norm"] = "mean",
    normalize_guide: bool = False,
    detach_guide: bool = False,
) -> method.Method:
    """Squared feature difference, weighted in every cell by the squared difference of the class predictions.

    Args:
      weight: of the term; 1.5 for RetinaNet.
      student, teacher: taps of the features.
      space: of the predictions, "logits" or "probs" (their sigmoids).
      form: "mean" or "norm", how the cells are reduced.
      normalize_guide: scales P to mean 1 over the cells of the level in the batch.
      detach_guide: no gradient through P.

    Raises:
      UserError: unknown `space` or `form`.
    """
    method.check_choice("pfi: space", space, ("logits", "probs"))
    method.check_choice("pfi: form", form, ("mean", "norm"))

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        pairs = taps.pair(student_spec, teacher_spec, student, teacher)
        predictions = taps.pair(student_spec, teacher_spec, "cls_logits")
        sizes = {p.stride: p.teacher.shape[1:3] for p in predictions}
        for stride, _, of_teacher in pairs:
            if sizes.get(stride) != of_teacher.shape[1:3]:
                raise UserError(
                    f"pfi weights features by predictions cell by cell, but at stride {stride} the tap {teacher!r} of "
                    f"the teacher has {of_teacher.shape[1:3]} cells and its class logits {sizes.get(stride)}"
                )
        return adapters.init_adapters(key, pairs)

    def compare(s: Array, t: Array, logits: taps.Pair) -> Array:
        guide = disagreement.class_disagreement(logits.student, logits.teacher, space=space)
        if normalize_guide:
            guide = normalization.unit_mean(guide)
        if detach_guide:
            guide = jax.lax.stop_gradient(guide)
        cells = distance.guided_squared(s, t, guide)
        if form == "norm":
            norms = jax.vmap(lambda x: distance.frobenius(x, jnp.zeros_like(x)))(cells)
            return jnp.mean(norms) / (s.shape[1] * s.shape[2])
        return jnp.mean(cells)

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        pairs = adapters.adapt(params, taps.pair(context.student, context.teacher, student, teacher))
        predictions = {p.stride: p for p in taps.pair(context.student, context.teacher, "cls_logits")}
        levels = [compare(s, t, predictions[stride]) for stride, s, t in pairs]
        return {"feature": method.mean_over_levels(levels)}

    reads = taps.Reads((student, "cls_logits", "rows.logits"), (teacher, "cls_logits", "rows.logits"))
    why = "PFI weights the cells of a map by their class predictions, and a second stage classifies regions"
    grid = "PFI weights the cells of a map by their class predictions, and a decoder classifies queries"
    return method.Method(init, apply, {"feature": weight}, reads, one_stage=why, grid=grid)
