"""SSIM: structural distillation, luminance, contrast and structure of the neck's maps in a sliding window.

    L = weight * sum over levels of mean_bhwc (1 - SSIM(psi(A(S)), psi(T))) / 2
    psi(x) = (x - min) / (max - min),  SSIM = lum^a con^b str^g of each cell's 11 x 11 Gaussian window, a = b = g = 1

Paper: de Rijk et al., "Structural Knowledge Distillation for Object Detection", NeurIPS 2022.
Taps: neck (any detector), all levels. Needs nothing else.
Open: Two forms. The paper's, which is the default, rescales the maps, with a window of 11 and a weight of 4; its code
  is not public. The authors' early public code (github PhilipdeRijk/KD, November 2021, a year before the paper)
  compares the raw maps of both necks by kornia's `ssim_loss`, window 3, weight 1, no adapter: `scope="none", window=3,
  weight=1.0`. Both have the same operator: a Gaussian of 1.5 cells, maps reflected at their border, (1 - SSIM) / 2
  within 0 and 1, the mean of a level, the sum over levels. The paper does not state the axes of minimum and maximum in
  psi: here H, W and C of each image, which keeps the relative strength of channels and does not depend on the batch
  (`scope="channel"` and `scope="batch"` are the alternatives); the gradient flows through the student's minimum and
  maximum. Raw maps of opposite signs may count as alike (see `kdjax.losses.ssim`). Small maps: the window is the
  largest odd number within `window`, H and W, and a level where that is 1 is left out. With exponents other than 1 a
  negative structure counts as 0. The adapter is 1x1 where channels differ, in both forms; in the paper an adapter for
  equal channels too (`always_adapt`) gains 1.1 AP between detectors of different families, and nothing within a family.
  In the paper weights of 2 and 4 are best, with a spread below 0.5 AP, and the size of the window hardly matters.
Proof: kd/ssim_* (kornia, pytorch-msssim, scikit-image), the operator and its loss on one level, also on raw maps with
  the window of the early form: largest relative error 2.9e-6, of the gradient 9.7e-6. The early form as a whole, over
  two levels: tests/methods/test_feature.py (NumPy; kornia). The rescaling has no public original.
Status: formula
"""

from typing import Literal

import jax.numpy as jnp

from kdjax.distill import adapters, method, taps
from kdjax.losses import normalization, similarity
from kdjax.structs import Array, DetectorOutput


def make(
    *,
    weight: float = 4.0,
    student: str = "neck",
    teacher: str = "neck",
    scope: Literal["image", "channel", "batch", "none"] = "image",
    window: int = 11,
    exponents: tuple[float, float, float] = (1.0, 1.0, 1.0),
    always_adapt: bool = False,
) -> method.Method:
    """Structural dissimilarity of rescaled maps.

    Args:
      weight: lambda of the sum over levels; 4 (2 is as good).
      student, teacher: taps.
      scope: what minimum and maximum of the rescaling run over: "image" (H, W and C of an image), "channel" (H and W)
        or "batch" (everything); "none": the raw maps, as in the authors' early code, with kornia's eps of 1e-12.
      window: side of the Gaussian window in cells, odd, at least 3; its standard deviation is always 1.5 cells; 11.
      exponents: of luminance, contrast and structure, >= 0; 0 leaves a factor out; 1, 1, 1.
      always_adapt: a 1x1 adapter even where channels agree, for teachers of another family.

    Raises:
      UserError: unknown `scope`, or `window` or `exponents` out of range.
    """
    method.check_choice("ssim: scope", scope, ("image", "channel", "batch", "none"))
    method.check("ssim: window", window, window >= 3 and window % 2 == 1, "odd and at least 3")
    possible = len(exponents) == 3 and min(exponents) >= 0
    method.check("ssim: exponents", exponents, possible, "three numbers, none below 0")

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        pairs = taps.pair(student_spec, teacher_spec, student, teacher)
        return adapters.init_adapters(key, pairs, always=always_adapt)

    luminance, contrast, structure = exponents

    def compare(s: Array, t: Array) -> Array:
        if scope != "none":
            s, t = normalization.min_max(s, scope=scope), normalization.min_max(t, scope=scope)
        eps = 1e-12 if scope == "none" else 0.0  # kornia's
        factors = (luminance, contrast, structure)
        return jnp.mean(similarity.structural_dissimilarity(s, t, window=window, exponents=factors, eps=eps))

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        pairs = adapters.adapt(params, taps.pair(context.student, context.teacher, student, teacher))
        return {"structural": method.sum_over_levels(compare(s, t) for _, s, t in pairs)}

    return method.Method(init, apply, {"structural": weight}, taps.Reads((student,), (teacher,)))
