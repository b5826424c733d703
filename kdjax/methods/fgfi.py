"""FGFI: fine-grained feature imitation around the objects.

    L = weight / (2 Np) * sum over levels of sum_{kept cells} sum_c (A(S) - T)^2,  Np the kept cells of all levels
    kept: some anchor of the cell overlaps some box by more than psi times the best overlap of that box, over all levels

Paper: Wang et al., "Distilling Object Detectors with Fine-grained Feature Imitation", CVPR 2019, section 3.2.
Taps: neck, or one map such as backbone.2 (any detector). Needs the boxes of the ground truth and the location of the
  priors. Trains one 3x3 convolution A per level, with initial weights near zero.
Open: the original has one map and nine anchors per cell. Here each cell has one square anchor, 8 strides wide like
  those of ATSS and GFL, around the location of the prior (`anchor_scale`), so that detectors without anchors can be
  used too; with anchor_ratios=(0.5, 1, 2) they are those of the first stage of two-stage detectors. The best overlap of
  a box is taken over all levels; the port of the DeFeat authors (`port=True`) assigns every box to the one level of its
  size, as DeFeat does, divides each level by 2 Np C (C channels, Np of that level) and averages levels. The original
  ends A with a ReLU, which the port leaves out because the maps of a neck are signed; `relu=True` is for maps that are
  not negative. Without any object the original divides by zero; here the loss is 0. The original starts after 400 steps
  (set `start`).
Proof: none: no reference numbers; the masks equal loops over the formula.
Status: formula
"""

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.boxes import priors, roi
from kdjax.distill import adapters, method, taps
from kdjax.losses import distance, regions
from kdjax.structs import Array, DetectorOutput


def make(
    *,
    weight: float = 0.01,
    student: str = "neck",
    teacher: str = "neck",
    psi: float = 0.5,
    anchor_scale: float = 8.0,
    anchor_ratios: tuple[float, ...] = (1.0,),
    relu: bool = False,
    port: bool = False,
) -> method.Method:
    """Squared difference of two maps on the cells whose anchors overlap an object most.

    Args:
      weight: mu; 0.01.
      student, teacher: taps.
      psi: 0 .. 1, the share of the best overlap above which an anchor counts; 0.5.
      anchor_scale: square root of the area of a cell's anchors, in strides.
      anchor_ratios: height / width of a cell's anchors, each above 0; (0.5, 1, 2) are those of an RPN.
      relu: ends the adapter with a ReLU, for a teacher's map that is the output of a ReLU.
      port: assigns boxes to levels and normalises as the port to feature pyramids does.

    Raises:
      UserError: `psi` outside 0 .. 1, or `anchor_scale` or a ratio not above 0.
    """
    method.check("fgfi: psi", psi, 0 <= psi <= 1, "within 0 .. 1")
    method.check("fgfi: anchor_scale", anchor_scale, anchor_scale > 0, "above 0")
    possible = bool(anchor_ratios) and min(anchor_ratios) > 0
    method.check("fgfi: anchor_ratios", anchor_ratios, possible, "numbers above 0, at least one")

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        pairs = taps.pair(student_spec, teacher_spec, student, teacher)
        return adapters.init_adapters(key, pairs, kernel_size=3, always=True, deviation=1e-4)

    def anchors(stride: int, shape: tuple[int, ...], offset: Array) -> Array:
        """f32[H, W, A, 4]; `offset` is the position of a prior in its cell, 0 .. 1."""
        size = shape[1] * stride, shape[2] * stride
        boxes = priors.grid_anchors(size, [stride], ratios=list(anchor_ratios), scales=[anchor_scale])
        return jnp.add(boxes.reshape(*shape[1:3], -1, 4), jnp.tile(offset, 2) * stride)

    def masks(pairs: list[taps.Pair], context: method.Context) -> list[Array]:
        """The kept cells of each level, bool[B, H, W, 1]."""
        boxes, valid = context.targets.boxes, context.targets.valid
        location = context.student_rows.location[0]
        offset = location[:2] / location[2:]
        of_levels = [anchors(stride, t.shape, offset) for stride, _, t in pairs]
        if port:
            level = roi.roi_levels(boxes + jnp.array([0.0, 0.0, 1.0, 1.0]), len(pairs))
            return [
                regions.fine_grained_mask(boxes, valid & (level == i), grid, psi=psi)
                for i, grid in enumerate(of_levels)
            ]
        # All levels as one map.
        column = jnp.concatenate([grid.reshape(-1, 1, *grid.shape[2:]) for grid in of_levels])
        kept = regions.fine_grained_mask(boxes, valid, column, psi=psi)
        ends = np.cumsum([grid.shape[0] * grid.shape[1] for grid in of_levels])
        parts = jnp.split(kept, ends[:-1], 1)
        return [part.reshape(-1, *grid.shape[:2], 1) for part, grid in zip(parts, of_levels, strict=True)]

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        pairs = adapters.adapt(params, taps.pair(context.student, context.teacher, student, teacher))
        kept = masks(pairs, context)
        cells = [jnp.sum(mask) for mask in kept]
        errors = [
            jnp.sum(mask * distance.squared(jax.nn.relu(s) if relu else s, t))
            for mask, (_, s, t) in zip(kept, pairs, strict=True)
        ]
        if port:
            levels = zip(errors, cells, pairs, strict=True)
            return {
                "feature": method.mean_over_levels(
                    [error / (2 * jnp.maximum(n, 1) * p.teacher.shape[-1]) for error, n, p in levels]
                )
            }
        return {"feature": sum(errors) / (2 * jnp.maximum(sum(cells), 1))}

    reads = taps.Reads((student, "rows.location", "targets"), (teacher,))
    return method.Method(init, apply, {"feature": weight}, reads)
