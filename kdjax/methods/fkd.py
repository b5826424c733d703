"""FKD: attention-guided and non-local distillation of the neck.

    L = weight * sum over levels of
            feature_weight |sqrt(Ms) (A(S) - T)| + channel_weight |D(mean_hw S) - mean_hw T|
            + spatial_weight |E(mean_c S) - mean_c T| + non_local_weight |F(R_s(S)) - R_t(T)|
    |X| = sqrt(1/B sum X^2), not squared,  Ms = (As(S) + As(T)) / 2,  As(X) = H W softmax_hw(mean_c |X| / tau)
    R(X) = X + BN(W (theta(X) phi(X)^T / n) g(X)),  n the cells of the pooled phi and g
    A, F: 1x1 convolutions,  D: a linear layer on the channels,  E: one 3x3 convolution from one channel to one

Paper: Zhang and Ma, "Improve Object Detection with Feature-based Knowledge Distillation: Towards Accurate and
  Efficient Detectors", ICLR 2021, Eqs. 2-5.
Taps: neck (any detector). Needs nothing else. Trains A, D, E, F and, for student and teacher, a non-local block R per
  level, which is the identity at first. Channels of R are reduced by 4, 4, 2, 2 and phi and g pooled by 8, 4, 2, 2 at
  P2 .. P5.
Open: the paper's norms run over the whole batch, so its loss grows with sqrt(B); here it is divided by that
  (`parity=True` is the original, whose weights were set for two images per device). The paper's masks are softmaxes of
  the sum of the student's and the teacher's maps, over space and over channels (`paper=True`, with the channels of
  A(S)); mmrazor's port, followed here, averages two softmaxes over space and has none over channels, like the authors'
  code according to a comment in the port. The means over space and channels keep their sign, as in the port. The
  defaults are the port's, the weights for two-stage detectors; the paper reportedly has these with tau 0.1, and 4e-4,
  2e-2, 2e-2, 4e-4 with tau 0.5 for one-stage ones.
Proof: none: no public original; its parts equal loops over the formulas.
Status: formula
"""

from typing import Any

import jax
import jax.numpy as jnp

from kdjax import nn
from kdjax.distill import adapters, method, taps
from kdjax.losses import attention, distance, relation
from kdjax.structs import Array, DetectorOutput


def make(
    *,
    weight: float = 1.0,
    student: str = "neck",
    teacher: str = "neck",
    feature_weight: float = 7e-5,
    channel_weight: float = 4e-3,
    spatial_weight: float = 4e-3,
    non_local_weight: float = 7e-5,
    temperature: float = 0.5,
    paper: bool = False,
    parity: bool = False,
) -> method.Method:
    """Norms of the differences of attention-weighted maps, of means over space and channels, and of non-local blocks.

    Args:
      weight: of the whole loss; 1.
      student, teacher: taps.
      feature_weight: of the attention-weighted maps; 7e-5 in the port.
      channel_weight: of the means over space; 4e-3 in the port.
      spatial_weight: of the means over channels; 4e-3 in the port.
      non_local_weight: of the outputs of the non-local blocks; 7e-5 in the port.
      temperature: tau of the attention; 0.5 in the port.
      paper: masks as in the paper, over space and over channels, instead of mmrazor's over space alone.
      parity: norms over the whole batch, which grow with the square root of its size.

    Raises:
      UserError: a temperature not above 0.
    """
    method.check("fkd: temperature", temperature, temperature > 0, "above 0")
    weights = {
        "feature": weight * feature_weight,
        "channel": weight * channel_weight,
        "spatial": weight * spatial_weight,
        "non_local": weight * non_local_weight,
    }

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        pairs = taps.pair(student_spec, teacher_spec, student, teacher)
        keys = iter(jax.random.split(key, 6))
        params: dict[str, Any] = {
            name: adapters.init_adapters(next(keys), pairs, always=True) for name in ("feature", "channel", "non_local")
        }
        spatial, *blocks = keys
        params["spatial"] = {
            str(p.stride): nn.init_conv2d(jax.random.fold_in(spatial, p.stride), 3, 1, 1) for p in pairs
        }
        params["blocks"] = {
            str(p.stride): {
                side: relation.init_non_local(
                    jax.random.fold_in(k, p.stride), getattr(p, side).shape[-1], reduction=4 if p.stride <= 8 else 2
                )
                for side, k in zip(("student", "teacher"), blocks, strict=True)
            }
            for p in pairs
        }
        return params

    def mask(s: Array, adapted: Array, t: Array) -> Array:
        spatial = attention.joint_spatial_attention(s, t, temperature=temperature, paper=paper)
        if not paper:
            return spatial
        strength = jnp.mean(jnp.abs(adapted), (1, 2), keepdims=True) + jnp.mean(jnp.abs(t), (1, 2), keepdims=True)
        return spatial * jax.lax.stop_gradient(t.shape[-1] * jax.nn.softmax(strength / temperature, 3))

    def compare(stride: int, s: Array, t: Array, params: method.Params) -> dict[str, Array]:
        adapter = {name: layers[str(stride)] for name, layers in params.items()}
        pool = max(32 // stride, 2)
        s_related, t_related = (
            relation.non_local_block(x, adapter["blocks"][side], pool=pool)
            for side, x in (("student", s), ("teacher", t))
        )
        adapted = nn.conv2d(s, **adapter["feature"])
        norms = {
            "feature": distance.frobenius(adapted, t, weight=mask(s, adapted, t)),
            "channel": distance.frobenius(
                nn.conv2d(jnp.mean(s, (1, 2), keepdims=True), **adapter["channel"]), jnp.mean(t, (1, 2), keepdims=True)
            ),
            "spatial": distance.frobenius(
                nn.conv2d(jnp.mean(s, 3, keepdims=True), **adapter["spatial"]), jnp.mean(t, 3, keepdims=True)
            ),
            "non_local": distance.frobenius(nn.conv2d(s_related, **adapter["non_local"]), t_related),
        }
        return {name: norm if parity else norm / len(s) ** 0.5 for name, norm in norms.items()}

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        pairs = adapters.adapt({}, taps.pair(context.student, context.teacher, student, teacher))  # resizes, if at all
        levels = [compare(stride, s, t, params) for stride, s, t in pairs]
        return {name: method.sum_over_levels(level[name] for level in levels) for name in weights if weights[name]}

    return method.Method(init, apply, weights, taps.Reads((student,), (teacher,)))
