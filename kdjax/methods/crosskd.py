"""CrossKD: predictions of the teacher's head on the student's tower features, compared with the teacher's own.

    f~ = (A f^S - mean_S) / (std_S + 1e-6) std_T + mean_T, per channel over the batch
    p^ = class logits, d^ = boxes, q^ = edge distributions of the teacher's head, entered with f~
    classes: L = class_weight * sum_{i,k} l_i |sigmoid(p^) - sigmoid(p^T)| BCE(p^, sigmoid(p^T)) / P
    boxes:   L = box_weight * sum_i c_i (1 - GIoU(d^_i, d_i^T)) / P,   c_i = l_i max_k sigmoid(p_ik^T)
             with distributions: box_weight * sum_i c_i 1/4 sum over edges of KL(softmax q^T || softmax q^) / sum_i c_i
    quality: L = quality_weight * sum_{i positive} BCE(o^_i, sigmoid(o_i^T)) / P,   o^ the centreness of the same head
    l_i = 0 on ignored priors else 1;  P = sum over images of max(positives of the image, 1)

Paper: Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024.
Taps: cls_tower and reg_tower, the output of a convolution before its activation (any head of both sides with the same
    priors and classes), or neck; A is a 1x1 convolution where the widths differ. It needs the teacher's head, the
    student's assignment and, without distributions, decoded boxes.
Open: where the student's features enter: the published place, conv 3 of 4, is "tower.-2", the last but one (with FCOS
    conv 2, "tower.1"). The code is meant to align maps before the activation, but its ReLU works in place, so it aligns
    relu(f^S) with relu(f^T): rectify=True, for heads with ReLU. Here the maps are aligned before the activation, which
    fits every activation (such as SiLU), and the teacher's head activates them. The box term weights priors by the
    teacher's scores as the code does; in the paper all have weight 1: confidence=False. The paper's feature term is the
    method pkd, to be added to this one. With FCOS the code divides by the sum of the centreness of the positives
    instead of P.
Proof: kd/crosskd_* (the authors' code on four detectors, through this method, and whole steps of both networks with
    their gradients): largest relative error 1.0e-6; kd/logit_github_*: 3.8e-7.
Status: proven
"""

from typing import Literal

import jax
import jax.numpy as jnp

from kdjax.distill import adapters, method, taps
from kdjax.losses import box, classification, divergence, normalization
from kdjax.structs import Array, DetectorOutput

TOWERS = {"cls": "cls_tower", "reg": "reg_tower"}


def make(
    *,
    weight: float = 1.0,
    student: str = "tower.-2",
    teacher: str = "tower.-2",
    class_weight: float = 1.0,
    box_weight: float = 1.0,
    quality_weight: float = 0.0,
    box_loss: Literal["giou", "log_iou"] = "giou",
    confidence: bool = True,
    rectify: bool = False,
) -> method.Method:
    """Predictions of the teacher's head on the student's features, compared with the teacher's own.

    Args:
      weight: of all terms.
      student, teacher: the student's tap that enters the teacher's head, and the teacher's tap that it replaces:
        "tower.I", the output of conv I of both towers, counted from 0, or from the end with -1 as the last; or "neck".
      class_weight: of the class term; 1, with FCOS 0.4 in the paper's code.
      box_weight: of the box term; 1 for boxes (FCOS 0.75), 4 for distributions (GFL) in the paper's code.
      quality_weight: of the centreness term, for heads that have it; 1 with ATSS in the paper's code, 0 with FCOS.
      box_loss: of heads without distributions, "giou" or "log_iou" (-log IoU, FCOS in the paper's code).
      confidence: whether priors have the weight c_i in the box term, or l_i alone.
      rectify: applies ReLU to both maps before they are aligned, as in the paper's code.

    Raises:
      UserError: unknown `box_loss`.
    """
    method.check_choice("crosskd: box_loss", box_loss, ("giou", "log_iou"))
    for side, cut in (("student", student), ("teacher", teacher)):
        whole = cut.startswith("tower.") and cut.removeprefix("tower.").removeprefix("-").isdigit()
        method.check(f"crosskd: {side}", repr(cut), cut == "neck" or whole, "'neck' or 'tower.I' with a whole number I")
    weights = {
        "classes": weight * class_weight,
        "boxes": weight * box_weight,
        "quality": weight * quality_weight,
    }

    def towers(teacher_output: DetectorOutput) -> list[str]:
        """The towers that the student's features enter."""
        of_terms = {"classes": "cls", "boxes": "reg", "quality": teacher_output.quality_tower}
        return sorted({tower for term, tower in of_terms.items() if weights[term]})

    def place(name: str, branch: str) -> str:
        """The tap that "tower.I" stands for in a branch of a head."""
        return name if name == "neck" else name.replace("tower", TOWERS[branch], 1)

    def pairs_of(
        student_output: DetectorOutput, teacher_output: DetectorOutput, branch: str
    ) -> tuple[list[taps.Pair], int]:
        """The paired maps of a branch, and where the teacher's head continues from them."""
        teacher_tap = place(teacher, branch)
        field, indices = taps.resolve(teacher_output, teacher_tap)
        pairs = taps.pair(student_output, teacher_output, place(student, branch), teacher_tap)
        return pairs, 0 if field == "neck" or indices is None else indices[0] + 1

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        chosen = towers(teacher_spec)
        pairs = {tower: pairs_of(student_spec, teacher_spec, tower)[0] for tower in chosen}
        return {
            tower: adapters.init_adapters(jax.random.fold_in(key, number), pairs[tower])
            for number, tower in enumerate(chosen)
        }

    def reused(params: method.Params, context: method.Context, branch: str) -> tuple[Array, ...]:
        """What a branch of the teacher's head predicts from the student's features."""
        tower = context.teacher.quality_tower if branch == "quality" else branch
        pairs, go_on = pairs_of(context.student, context.teacher, tower)
        features = []
        for _, s, t in adapters.adapt(params[tower], pairs):
            if rectify and go_on:
                s, t = jax.nn.relu(s), jax.nn.relu(t)
            features.append(normalization.match_statistics(s, t))
        return tuple(context.teacher_head(tuple(features), branch=branch, start=go_on))

    def box_term(params: method.Params, context: method.Context, trust: Array, positives: Array) -> Array:
        reused_maps, own = reused(params, context, "reg"), context.teacher.box_reg
        edges = [rows_of(maps, context) for maps in (reused_maps, own)]
        if edges[0].shape[-1] > 4:
            kl = divergence.softmax_kl(*(x.reshape(*x.shape[:2], 4, -1) for x in edges))
            return jnp.sum(trust * jnp.mean(kl, -1)) / jnp.maximum(jnp.sum(trust), 1e-6)
        boxes = [context.teacher_boxes(maps) for maps in (reused_maps, own)]
        apart = box.giou(*boxes) if box_loss == "giou" else box.iou(*boxes, form="log")
        return jnp.sum(trust * apart) / positives

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        own = context.teacher_rows.logits
        scored = ~context.assignment.ignore
        positives = jnp.sum(jnp.maximum(jnp.sum(context.assignment.positive, 1), 1))
        terms = {}
        if weights["classes"]:
            found = rows_of(reused(params, context, "cls"), context)
            by_prior = jnp.sum(classification.modulated_bce(found, own), -1)
            terms["classes"] = jnp.sum(jnp.where(scored, by_prior, 0.0)) / positives
        if weights["boxes"]:
            trust = jnp.max(jax.nn.sigmoid(own), -1) if confidence else 1.0
            terms["boxes"] = box_term(params, context, jnp.where(scored, trust, 0.0), positives)
        if weights["quality"]:
            sides = reused(params, context, "quality"), context.teacher.quality
            found, own = (rows_of(maps, context)[..., 0] for maps in sides)
            entropy = classification.soft_binary_cross_entropy(found, jax.nn.sigmoid(own))
            terms["quality"] = jnp.sum(jnp.where(context.assignment.positive, entropy, 0.0)) / positives
        return terms

    used = [branch for term, branch in (("classes", "cls"), ("boxes", "reg")) if weights[term]]
    used = ["cls", "reg"] if weights["quality"] else used  # the quality hangs on either
    maps = [name for term, name in (("boxes", "box_reg"), ("quality", "quality")) if weights[term]]
    reads = taps.Reads(
        (*dict.fromkeys(place(student, branch) for branch in used), "rows.logits", "assignment"),
        (*dict.fromkeys(place(teacher, branch) for branch in used), *maps, "rows.logits", "head"),
    )
    why = "CrossKD enters the tower of a head over the maps, and a second stage has none"
    grid = "CrossKD enters the tower of a head over the maps, and a decoder has none"
    return method.Method(init, apply, weights, reads, one_stage=why, grid=grid)


def rows_of(maps: tuple[Array, ...], context: method.Context) -> Array:
    """A prediction of all levels with one row each: L of f32[B, H, W, A*C] -> f32[B, N, C], in float32."""
    count = context.teacher_rows.logits.shape[1]
    width = maps[0].shape[-1] * sum(m.shape[1] * m.shape[2] for m in maps) // count
    return jnp.concatenate([m.reshape(m.shape[0], -1, width) for m in maps], 1).astype(jnp.float32)
