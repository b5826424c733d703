"""Replays `kd/*.npz`: distillation losses, value and gradient, through the public functions of `kdjax.losses`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import nn
from kdjax.losses import (
    attention,
    classification,
    distance,
    divergence,
    frequency,
    normalization,
    reconstruction,
    regions,
    relation,
    similarity,
)
from tests.golden_checks.api import NOT_PART, Check, Checks, UnknownCase, each_case, mismatches, relative_error

VALUE, GRADIENT, SSIM_GRADIENT = 1e-5, 1e-4, 1e-3  # relative, from the reference's README
Arrays = dict[str, np.ndarray]
Params = dict[str, Any]


def nhwc(x: np.ndarray) -> np.ndarray:
    """Maps [B, C, H, W] with the channels last; what has no space stays as it is."""
    return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


def nchw(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1) if np.ndim(x) == 4 else np.asarray(x)


def take(params: Params, **defaults) -> list:
    """The values of the named parameters; a parameter that the check does not know makes the case unknown."""
    unknown = sorted(set(params) - set(defaults))
    if unknown:
        raise UnknownCase(f"no check for the parameter {unknown[0]!r}")
    return [params.get(name, default) for name, default in defaults.items()]


def pairs(arrays: Arrays) -> tuple[list, list, list]:
    """Student maps, teacher maps and the gradients of the student's, by level; a case without levels has one."""
    levels = [""] if "student" in arrays else [str(i) for i in range(sum(k.startswith("student") for k in arrays))]
    return tuple([nhwc(arrays[f"{key}{i}"]) for i in levels] for key in ("student", "teacher", "grad_student"))


def value_and_gradient(
    arrays: Arrays, loss: Callable, *, gradient: bool = True, tolerances: tuple[float, float] = (VALUE, GRADIENT)
) -> Checks:
    """Compares `loss(student, teacher)` summed over levels with the stored value, and its gradient by level."""
    students, teachers, expected = pairs(arrays)

    def total(students):
        return sum(loss(jnp.asarray(s), jnp.asarray(t)) for s, t in zip(students, teachers, strict=True))

    value, gradients = jax.jit(jax.value_and_grad(total))([jnp.asarray(s) for s in students])
    yield Check("value", relative_error(value, arrays["value"]), tolerances[0])
    if gradient:
        for level, (got, want) in enumerate(zip(gradients, expected, strict=True)):
            yield Check(
                f"gradient {level}" if len(expected) > 1 else "gradient", relative_error(got, want), tolerances[1]
            )


def cwd(what: str, params: Params, arrays: Arrays) -> Checks:
    if not what.startswith("CWD"):
        raise UnknownCase(f"no check for {what!r}")
    temperature, weight = take(params, tau=1.0, loss_weight=1.0)
    loss = lambda s, t: weight * jnp.mean(divergence.channel_kl(s, t, temperature=temperature))  # noqa: E731
    yield from value_and_gradient(arrays, loss)


def feature_misc(what: str, params: Params, arrays: Arrays) -> Checks:
    if what == "attention transfer":
        yield Check(what, skip=NOT_PART)
    elif what.startswith("mmrazor L2Loss"):
        normalize, div_element, weight = take(params, normalize=True, div_element=False, loss_weight=1.0)

        def l2(s, t):
            if normalize:
                s, t = normalization.unit_norm(s), normalization.unit_norm(t)
            return weight * jnp.sum(distance.squared(s, t)) / (s.size if div_element else s.shape[0])

        yield from value_and_gradient(arrays, l2)
    elif what.startswith("mmrazor MGDLoss"):
        (alpha,) = take(params, alpha_mgd=2e-5)
        yield from value_and_gradient(arrays, lambda s, t: alpha * jnp.sum(distance.squared(s, t)) / s.shape[0])
    elif what.startswith("multi-scale average pooling"):
        yield from multiscale(params, arrays)
    elif what.startswith("multi-scale ADAPTIVE average pooling"):
        (outputs,) = take(params, outputs=None)
        yield from value_and_gradient(arrays, lambda s, t: sum(adaptive(s, t, o) for o in outputs))
    elif what == "global average pooling + L2":
        take(params)
        yield from value_and_gradient(arrays, lambda s, t: adaptive(s, t, 1))
    elif what.startswith("FFT mask"):
        yield from frequency_mask(what, params, arrays)
    else:
        raise UnknownCase(f"no check for {what!r}")


def adaptive(student, teacher, outputs: int):
    pooled = [distance.adaptive_avg_pool(x, (outputs, outputs)) for x in (student, teacher)]
    return jnp.mean(distance.squared(*pooled))


def multiscale(params: Params, arrays: Arrays) -> Checks:
    scales, weights = take(params, scales=None, weights=None)

    def pooled(s, t):
        total = 0.0
        for k, weight in zip(scales, weights or [1.0] * len(scales), strict=True):
            # The peer drops the windows that reach over the border, kdjax averages what they have.
            rows, columns = s.shape[1] // k * k, s.shape[2] // k * k
            inner = s[:, :rows, :columns], t[:, :rows, :columns]
            total += weight * jnp.mean(distance.multiscale(*inner, scales=(k,), per_scale_mean=True))
        return total

    yield from value_and_gradient(arrays, pooled)


def frequency_mask(what: str, params: Params, arrays: Arrays) -> Checks:
    norm, _ = take(params, norm="backward", kind=None)  # scaling there and back cancels, whichever the norm
    if norm not in ("backward", "ortho", "forward"):
        raise UnknownCase(f"no check for the norm {norm!r}")
    mask = arrays["mask"]
    mask = np.moveaxis(mask, 0, -1)[None] if mask.ndim == 3 else mask[None, :, :, None]

    def masked(s, t):
        if "both" in what:
            t = frequency.apply_frequency_mask(t, mask)
        return jnp.mean(frequency.frequency_masked(s, t, mask))

    yield from value_and_gradient(arrays, masked)
    if "filtered" in arrays:
        filtered = frequency.apply_frequency_mask(nhwc(arrays["student"]), mask)
        yield Check("filtered", relative_error(nchw(filtered), arrays["filtered"]), VALUE)


def pkd(what: str, params: Params, arrays: Arrays) -> Checks:
    if not what.startswith("PKD"):
        raise UnknownCase(f"no check for {what!r}")
    resize_student, weight = take(params, resize_stu=True, loss_weight=1.0)

    def loss(s, t):
        if s.shape != t.shape:
            s, t = (
                (nn.resize_bilinear(s, t.shape[1:3]), t) if resize_student else (s, nn.resize_bilinear(t, s.shape[1:3]))
            )
        return weight * jnp.mean(distance.pearson(s, t, ddof=1))

    if "student" in arrays and "constant student channel" not in what:
        constant = np.ptp(arrays["student"], axis=(0, 2, 3)) == 0
        if constant.any():
            # The case with a constant channel was written into the tensor of this one before it was stored: the value
            # belongs to a student that the file does not hold. Channels do not mix, so the other ones can be compared.
            yield Check("value", skip="the file holds another student than the one its value was computed with")
            students, teachers, (expected,) = pairs(arrays)
            gradient = jax.grad(lambda s: loss(s, jnp.asarray(teachers[0])))(jnp.asarray(students[0]))
            yield Check(
                "gradient, other channels", relative_error(*(x[..., ~constant] for x in (gradient, expected))), GRADIENT
            )
            return
    yield from value_and_gradient(arrays, loss, gradient="gradient there is not defined" not in what)


def ssim(what: str, params: Params, arrays: Arrays) -> Checks:
    if "MS-SSIM" in what:
        yield Check("MS-SSIM", skip=NOT_PART)
        return
    if what.startswith("pytorch_msssim"):
        data_range, window, sigma, (k1, k2) = take(params, data_range=255.0, win_size=11, win_sigma=1.5, K=[0.01, 0.03])
        options = {"data_range": data_range, "k1": k1, "k2": k2, "padding": "valid"}
        loss = lambda s, t: jnp.mean(1 - similarity.ssim(s, t, window=window, sigma=sigma, **options))  # noqa: E731
    elif what.startswith("kornia ssim_loss"):
        data_range, window, padding, eps = take(params, max_val=1.0, window_size=None, padding="same", eps=1e-12)
        if eps != 1e-12:
            raise UnknownCase(f"no check for the parameter eps={eps}")
        options = {"data_range": data_range, "padding": padding, "window": window}
        loss = lambda s, t: jnp.mean(similarity.structural_dissimilarity(s, t, **options))  # noqa: E731
    else:
        raise UnknownCase(f"no check for {what!r}")
    yield from value_and_gradient(arrays, loss, tolerances=(VALUE, SSIM_GRADIENT))
    student, teacher = nhwc(arrays["student"]), nhwc(arrays["teacher"])
    if "ssim_per_image" in arrays:
        by_image = jnp.mean(similarity.ssim(student, teacher, window=window, sigma=sigma, **options), (1, 2, 3))
        yield Check("by image", relative_error(by_image, arrays["ssim_per_image"]), VALUE)
    if "skimage_gauss_per_channel" in arrays:  # its window is always 11 x 11, its sigma 1.5
        by_channel = jnp.mean(similarity.ssim(student, teacher, **options), (1, 2))
        yield Check("scikit-image by channel", relative_error(by_channel, arrays["skimage_gauss_per_channel"]), VALUE)
    if "skimage_uniform7_per_channel" in arrays:
        yield Check("scikit-image, uniform window", skip="kdjax has the Gaussian window alone, as the paper's operator")


def reduced(loss, arrays: Arrays, reduction: str = "mean", avg_factor: float | None = None):
    """mmdetection's reduction of a weighted loss; without weights "batchmean" divides by the batch."""
    if "weight" in arrays:
        weight = jnp.asarray(arrays["weight"])
        loss = loss * (weight if loss.ndim == weight.ndim else weight[:, None])
    if avg_factor is not None and reduction == "mean":
        return jnp.sum(loss) / avg_factor
    if avg_factor is None and reduction in ("mean", "sum"):
        return jnp.mean(loss) if reduction == "mean" else jnp.sum(loss)
    raise UnknownCase(f"no check for the reduction {reduction!r} with avg_factor {avg_factor}")


def logit(what: str, params: Params, arrays: Arrays) -> Checks:
    if what == "DIST":
        yield Check(what, skip=NOT_PART)
        return
    if what.startswith("KL (Hinton)") or what.startswith("KL over channel axis"):
        temperature, reduction, weight = take(params, tau=1.0, reduction="batchmean", loss_weight=1.0)

        def loss(s, t):
            kl = divergence.softmax_kl(s, t, temperature=temperature)
            if reduction == "mean":  # PyTorch's mean runs over the classes too
                kl = kl / s.shape[-1]
            return weight * (jnp.sum(kl) / s.shape[0] if reduction == "batchmean" else reduced(kl, {}, reduction))

    elif what.startswith("DKD"):
        names = (
            {"temperature": 4.0} if "mdistiller" in what else {"tau": 1.0, "reduction": "batchmean", "loss_weight": 1.0}
        )
        temperature, *rest, alpha, beta = take(params, **names, alpha=1.0, beta=1.0)
        reduction, weight = rest or ("batchmean", 1.0)

        def loss(s, t):
            target, others = divergence.decoupled_kl(s, t, jnp.asarray(arrays["labels"]), temperature=temperature)
            total = alpha * target + beta * others
            # mmrazor's port sums whatever its `reduction` is, but PyTorch still divides a "batchmean" by the batch.
            return weight * (jnp.mean(total) if reduction == "batchmean" else jnp.sum(total))

    elif what.startswith("KD (mdistiller)"):
        (temperature,) = take(params, temperature=4.0)
        loss = lambda s, t: jnp.mean(divergence.softmax_kl(s, t, temperature=temperature))  # noqa: E731
    elif what.startswith(("LD / KD: mmdet", "LD (LD repo)", "CrossKD KL")):
        options = take(params, T=10, loss_weight=1.0, reduction="mean", avg_factor=None, class_reduction="mean")
        temperature, weight, reduction, avg_factor, class_reduction = options

        def loss(s, t):
            kl = divergence.softmax_kl(s, t, temperature=temperature, class_reduction=class_reduction)
            return weight * reduced(kl, arrays, reduction, avg_factor)

    elif what.startswith(("CrossKD KD-QFL", "BCKD classification")):
        beta, weight, avg_factor = take(params, beta=1.0, loss_weight=1.0, avg_factor=None)

        def loss(s, t):
            bce = classification.modulated_bce(s, t, beta=beta)
            return weight * reduced(jnp.sum(bce, -1) if what.startswith("BCKD") else bce, arrays, "mean", avg_factor)

    elif what.startswith("CrossKD PKD"):
        (weight,) = take(params, loss_weight=1.0)
        loss = lambda s, t: weight * jnp.mean(distance.pearson(s, t, ddof=1))  # noqa: E731
    else:
        raise UnknownCase(f"no check for {what!r}")
    yield from value_and_gradient(arrays, loss)


def convolution(arrays: Arrays, name: str) -> dict:
    """A convolution's weight and bias (and of its gradient), in kdjax's layout."""
    return {"kernel": np.transpose(arrays[f"{name}.weight"], (2, 3, 1, 0)), "bias": arrays[f"{name}.bias"]}


def norm(arrays: Arrays, name: str) -> dict:
    return {"scale": arrays[f"{name}.weight"].ravel(), "bias": arrays[f"{name}.bias"].ravel()}


def layer_errors(got: dict, want: dict, name: str) -> Checks:
    """One check a layer, kernel and bias together: a bias before a softmax has a gradient of rounding alone."""
    if all(isinstance(value, dict) for value in want.values()):
        for key in want:
            yield from layer_errors(got[key], want[key], f"{name} {key}")
    else:
        flat = [np.concatenate([np.ravel(x[key]) for key in sorted(want)]) for x in (got, want)]
        yield Check(name, relative_error(*flat), GRADIENT)


def context_params(arrays: Arrays, prefix: str, side: str) -> dict:
    add = f"{prefix}/channel_add_conv_{side}"
    return {
        "attend": convolution(arrays, f"{prefix}/conv_mask_{side}"),
        "down": convolution(arrays, f"{add}.0"),
        "norm": norm(arrays, f"{add}.1"),
        "up": convolution(arrays, f"{add}.3"),
    }


def fgd(what: str, params: Params, arrays: Arrays) -> Checks:
    if not what.startswith("FGD"):
        raise UnknownCase(f"no check for {what!r}")
    temperature, alpha, beta, gamma, lambda_, align, _ = take(
        params, temp=0.5, alpha_fgd=1e-3, beta_fgd=5e-4, gamma_fgd=1e-3, lambda_fgd=5e-6, align=True, kinds=None
    )
    count = len(arrays["student"])
    ground_truth = [arrays[f"gt{i}"] for i in range(count)]
    boxes = np.zeros((count, max(map(len, ground_truth)) + 1, 4), np.float32)  # a row of padding at least
    valid = np.zeros(boxes.shape[:2], bool)
    for i, rows in enumerate(ground_truth):
        boxes[i, : len(rows)], valid[i, : len(rows)] = rows, True

    def weights(prefix):
        found = {side: context_params(arrays, prefix, side) for side in ("s", "t")}
        return found | ({"align": convolution(arrays, f"{prefix}/align")} if align else {})

    student, teacher = jnp.asarray(nhwc(arrays["student"])), jnp.asarray(nhwc(arrays["teacher"]))
    # The file holds the size of the unpadded image: what the official code scales boxes with.
    foreground, background = regions.focal_masks(boxes, valid, arrays["img_shape"], teacher.shape[1:3])

    def terms(student, w):
        student = nn.conv2d(student, **w["align"]) if align else student
        attended = attention.attention_weighted(student, teacher, temperature=temperature)
        blocks = relation.context_block(student, w["s"]), relation.context_block(teacher, w["t"])
        return student, {
            "fg_loss": jnp.sum(foreground * attended) / count,
            "bg_loss": jnp.sum(background * attended) / count,
            "mask_loss": jnp.sum(attention.attention_difference(student, teacher, temperature=temperature)) / count,
            "rela_loss": jnp.sum(distance.squared(*blocks)) / count,
        }

    def total(student, w):
        _, t = terms(student, w)
        return alpha * t["fg_loss"] + beta * t["bg_loss"] + gamma * t["mask_loss"] + lambda_ * t["rela_loss"]

    w = weights("w")
    value, (gradient, of_weights) = jax.jit(jax.value_and_grad(total, (0, 1)))(student, w)
    yield Check("value", relative_error(value, arrays["value"]), VALUE)
    yield Check("gradient", relative_error(gradient, nhwc(arrays["grad_student"])), GRADIENT)
    yield from layer_errors(of_weights, weights("gw"), "gradient")
    adapted, parts = jax.jit(terms)(student, w)
    parts |= {"mask_fg": foreground[..., 0], "mask_bg": background[..., 0]}
    for side, x in (("s", adapted), ("t", teacher)):
        parts[f"S_{side}"] = attention.spatial_attention(x, temperature=temperature)[..., 0]
        parts[f"C_{side}"] = attention.channel_attention(x, temperature=temperature)[:, 0, 0]
    for name, part in parts.items():
        if name in arrays:
            yield Check(name, relative_error(part, arrays[name]), VALUE)


def mgd(what: str, params: Params, arrays: Arrays) -> Checks:
    if not what.startswith("MGD; mask (1 keeps, 0 drops)"):
        raise UnknownCase(f"no check for {what!r}")
    alpha, drop, align = take(params, alpha_mgd=2e-5, lambda_mgd=0.65, align=True)

    def weights(prefix):
        found = {"first": f"{prefix}/generation.0", "second": f"{prefix}/generation.2"}
        found |= {"align": f"{prefix}/align"} if align else {}
        return {key: convolution(arrays, name) for key, name in found.items()}

    student, teacher = jnp.asarray(nhwc(arrays["student"])), jnp.asarray(nhwc(arrays["teacher"]))
    mask = reconstruction.keep_mask(nhwc(arrays["uniform"]), drop)

    def total(student, w):
        student = nn.conv2d(student, **w["align"]) if align else student
        generated = reconstruction.reconstruct(mask * student, w)
        return alpha * jnp.sum(distance.squared(generated, teacher)) / len(student)

    value, (gradient, of_weights) = jax.jit(jax.value_and_grad(total, (0, 1)))(student, weights("w"))
    yield Check("mask", mismatches(nchw(mask), arrays["mask"]), 0)
    yield Check("value", relative_error(value, arrays["value"]), VALUE)
    yield Check("gradient", relative_error(gradient, nhwc(arrays["grad_student"])), GRADIENT)
    yield from layer_errors(of_weights, weights("gw"), "gradient")


def each(replay: Callable[[str, Params, Arrays], Checks]) -> Callable[[Path], Checks]:
    return lambda path: each_case(path, replay)


CHECKS = [
    ("kd/cwd_*.npz", each(cwd)),
    ("kd/feature_misc_*.npz", each(feature_misc)),
    ("kd/fgd_*.npz", each(fgd)),
    ("kd/logit_*.npz", each(logit)),
    ("kd/mgd_*.npz", each(mgd)),
    ("kd/pkd_*.npz", each(pkd)),
    ("kd/ssim_*.npz", each(ssim)),
]
