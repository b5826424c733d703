"""DSI: the direction of each cell of one map, compared with that of a vision foundation model.

    L = weight * mean_bhw (1 - cos(P S, R(T)))

    P a linear map from the student's to the teacher's channels, with a bias; R brings the teacher's map to the
    student's size: the average over the n x n cells that lie in one of the student, or bilinear resizing where no n
    fits.

Paper: Liao et al., "RT-DETRv4: Painlessly Furthering Real-Time Object Detection with Vision Foundation Models", 2025.
Taps: neck (any detector; of several levels the coarsest). Needs nothing else: the teacher may be a backbone that knows
  no boxes and no classes, and the strides of the two maps may differ (where the finest strides are the same, both sides
  have only the levels that they share).
Open: the paper injects into the output of the encoder's attention, before the maps of several strides are fused;
  kdjax's detectors have no such tap, and the coarsest map of the neck stands in. The published code pools DINOv3's
  patches of 16 px 2 x 2 to the student's stride; here n x n of any map are, as they fit, and other maps are resized as
  there. The published weight is adapted once an epoch to a share of the gradient (GAM,
  `kdjax.distill.method.guided_weight`); here it is fixed, by default where the size S begins.
Proof: ops/detr_losses_* (DSI: value and gradient of the mean, by the criterion of RT-DETRv4): largest relative error
  3.6e-7.
Status: formula
"""

import jax.numpy as jnp

from kdjax import nn
from kdjax.distill import method, taps
from kdjax.losses import distance
from kdjax.structs import Array, DetectorOutput


def make(
    *,
    weight: float = 5.0,
    student: str = "neck",
    teacher: str = "neck",
) -> method.Method:
    """One minus the cosine of projected maps.

    Args:
      weight: of the mean over cells; the published runs begin with 5 (S) and 15 (L).
      student, teacher: taps; of one with several levels the coarsest is compared.
    """

    def coarsest(output: DetectorOutput, tap: str) -> Array:
        maps = taps.tap(output, tap)
        return maps[max(maps)]

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        channels = (coarsest(spec, tap).shape[-1] for spec, tap in ((student_spec, student), (teacher_spec, teacher)))
        return {"projection": nn.init_conv2d(key, 1, *channels)}

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        own, other = coarsest(context.student, student), coarsest(context.teacher, teacher)
        projected = nn.conv2d(own.astype(jnp.float32), params["projection"]["kernel"], params["projection"]["bias"])
        return {"alignment": jnp.mean(distance.cosine(projected, fitted(other, own.shape[1:3])))}

    return method.Method(init, apply, {"alignment": weight}, taps.Reads((student,), (teacher,)))


def fitted(x: Array, size: tuple[int, ...]) -> Array:
    """A map f32[B, H, W, C] at another size (h, w): averages of square blocks where they fit, else bilinear.

    Example:
      >>> fitted(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2)).ravel().tolist()
      [2.5, 4.5, 10.5, 12.5]
    """
    x, (height, width) = x.astype(jnp.float32), size
    block = x.shape[1] // height
    if block > 1 and x.shape[1:3] == (block * height, block * width):
        return nn.avg_pool(x, block)
    return nn.resize_bilinear(x, (height, width))
