"""MKD: multi-scale, frequency-mask and channel-alignment distillation of the neck.

    L = weight * (feature + multiscale + frequency + alignment), each with a weight of its own and a mean over levels

    feature    = mean_bhwc (S' - T)^2                                                       (Eq. 6), S' = A(S)
    multiscale = 1/(B H W C) sum_k sum (pool_k S' - pool_k T)^2,  k = 1, 2, 4               (Eq. 1)
    frequency  = mean_bhwc (Re IDFT(M DFT(S')) - T)^2                                       (Eqs. 2-4)
    alignment  = tau^2/(B C) sum_bc KL(softmax_hw T/tau || softmax_hw S'/tau)               (Eq. 5)

    M is a random binary mask over the frequencies of an image and level, shared over channels, 0 with probability zeta

Paper: "Multi-Knowledge Distillation for Real-Time Object Detection on Edge Devices", ACML 2024, Eqs. 1-6.
Taps: neck (any detector). Needs nothing else. A is a 1x1 convolution where channels differ; the teacher is the next
  larger detector (the paper says so for tiny; for the others its metrics suggest it).
Open: there is no public code, and the paper leaves much of the implementation open:
  - The taps: neck outputs, strides 8, 16, 32 (`student`, `teacher`), after adapters, which it does not mention.
  - Weights of parts and levels: only alpha = 1 is given (`weight`). The parts have equal weights
    (`feature_weight`, `multiscale_weight`, `frequency_weight`, `alignment_weight`), and levels are averaged.
  - The scales and their divisor: 1, 2, 4, divided by the unpooled H W as printed (`scales`, `per_scale_mean`,
    `multiscale_mode="hcl"`); the distance is read as squared, and divided by B and C too, like Eq. 4.
  - An i.i.d. mask is not Hermitian, so the masked map is complex; its real part biases the optimum by 2/(2 - zeta).
    One draw for the frequencies u and -u makes it exactly real (`hermitian=False` follows the paper literally).
  - The channel mean is masked as well (`keep_dc=True` keeps it).
  - zeta is 0.5 and tau 1 (`zeta`, `temperature`); in the paper tau is only a factor in front, which is the same at 1.
  - The introduction describes a random mask with a generator, the equations have none: `generator=True` puts MGD's
    generator after the inverse transform.
  - The text around Eq. 5 mentions attention over positions, the equation has none: `attention_weighted=True` weights
    positions by FKD's joint attention.
  - The abstract calls the sum of three parts the loss, the text adds L_fea: it is included (`feature_weight=0`: not).
  - The scale of student and teacher features: unchanged (`normalize="pkd"` standardises both).
  - The frequency term has a floor of about zeta * mean T^2 and does not reach zero.
  - The paper's main AP metrics equal those of an earlier public recipe to the printed digit, so they do not
    distinguish MKD from it; compare with `rtmdet_cwd`.
Proof: kd/feature_misc_* (multi-scale pooling, the transform under a given mask): largest relative error 8.2e-7;
  kd/cwd_* (the alignment): 1.8e-6. The method as a whole has no public original.
Status: formula
"""

from typing import Literal

import jax
import jax.numpy as jnp

from kdjax.distill import adapters, method, taps
from kdjax.losses import attention, distance, divergence, frequency, normalization, reconstruction
from kdjax.structs import Array, DetectorOutput


def make(
    *,
    weight: float = 1.0,
    student: str = "neck",
    teacher: str = "neck",
    feature_weight: float = 1.0,
    multiscale_weight: float = 1.0,
    frequency_weight: float = 1.0,
    alignment_weight: float = 1.0,
    scales: tuple[int, ...] = (1, 2, 4),
    multiscale_mode: Literal["pool", "hcl"] = "pool",
    per_scale_mean: bool = False,
    zeta: float = 0.5,
    hermitian: bool = True,
    keep_dc: bool = False,
    generator: bool = False,
    temperature: float = 1.0,
    attention_weighted: bool = False,
    normalize: Literal["none", "pkd"] = "none",
) -> method.Method:
    """Four comparisons of two maps: unchanged, pooled, without random frequencies, and as distributions over space.

    Args:
      weight: alpha of the total (Eq. 6), 1 in the paper.
      student, teacher: taps.
      feature_weight: of `feature`, L_fea; 0 if the loss is read as the three other parts alone.
      multiscale_weight: of `multiscale`, L_ms.
      frequency_weight: of `frequency`, L_fdmd.
      alignment_weight: of `alignment`, L_fad.
      scales: sides k of the pooling windows in cells, each >= 1.
      multiscale_mode: "pool" (Eq. 1), or "hcl", ReviewKD's hierarchical loss, which has scales of its own.
      per_scale_mean: divides each scale by its own number of cells, not by that of the unpooled map.
      zeta: probability 0 .. 1 that a frequency is dropped.
      hermitian: one draw for the frequencies u and -u; False follows the paper literally.
      keep_dc: never drops frequency 0, the channel mean.
      generator: passes the masked map through MGD's generator, which is trained beside the student (an extension).
      temperature: tau of `alignment`, > 0.
      attention_weighted: multiplies the positions of `alignment` by the joint spatial attention of FKD (an extension).
      normalize: "none" (as in the paper), or "pkd": both features are standardised per channel over the batch first.

    Raises:
      UserError: unknown `normalize`, or an option that is out of its range.
    """
    method.check_choice("mkd: normalize", normalize, ("none", "pkd"))
    method.check("mkd: zeta", zeta, 0 <= zeta <= 1, "within 0 .. 1")
    weights = {
        "feature": weight * feature_weight,
        "multiscale": weight * multiscale_weight,
        "frequency": weight * frequency_weight,
        "alignment": weight * alignment_weight,
    }

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        pairs = taps.pair(student_spec, teacher_spec, student, teacher)
        params = adapters.init_adapters(key, pairs)
        return params | {"generators": adapters.init_generators(key, pairs)} if generator else params

    def compare(pair: taps.Pair, params: method.Params, key: Array) -> dict[str, Array]:
        stride, s, t = pair
        if normalize == "pkd":
            s, t = normalization.standardize(s), normalization.standardize(t)
        mask = frequency.frequency_mask(key, (len(s), *taps.map_size(s)), zeta, hermitian=hermitian, keep_dc=keep_dc)
        if generator:
            made = reconstruction.reconstruct(
                frequency.apply_frequency_mask(s, mask), params["generators"][str(stride)]
            )
            masked = distance.squared(made, t)
        else:
            masked = frequency.frequency_masked(s, t, mask)
        positions = attention.joint_spatial_attention(s, t) if attention_weighted else None
        return {
            "feature": distance.squared(s, t),
            "multiscale": distance.multiscale(
                s, t, scales=tuple(scales), mode=multiscale_mode, per_scale_mean=per_scale_mean
            ),
            "frequency": masked,
            "alignment": divergence.channel_kl(s, t, temperature=temperature, position_weight=positions),
        }

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        pairs = adapters.adapt(params, taps.pair(context.student, context.teacher, student, teacher))
        levels = [compare(pair, params, jax.random.fold_in(context.key, pair.stride)) for pair in pairs]
        means = {name: [jnp.mean(level[name]) for level in levels] for name in weights if weights[name]}
        return {name: method.mean_over_levels(values) for name, values in means.items()}

    return method.Method(init, apply, weights, taps.Reads((student,), (teacher,)))
