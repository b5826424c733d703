"""Replays `kd/*.npz`: distillation losses, value and gradient, through the public functions of `kdjax.losses`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.losses import distribution, feature, frequency
from tests.golden_checks.api import NOT_PART, Check, Checks, UnknownCase, each_case, relative_error

VALUE, GRADIENT = 1e-5, 1e-4  # relative, from the reference's README
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

    value, gradients = jax.value_and_grad(total)([jnp.asarray(s) for s in students])
    yield Check("value", relative_error(value, arrays["value"]), tolerances[0])
    if gradient:
        for level, (got, want) in enumerate(zip(gradients, expected, strict=True)):
            yield Check(f"gradient {level}" if len(expected) > 1 else "gradient", relative_error(got, want), tolerances[1])


def cwd(what: str, params: Params, arrays: Arrays) -> Checks:
    if not what.startswith("CWD"):
        raise UnknownCase(f"no check for {what!r}")
    temperature, weight = take(params, tau=1.0, loss_weight=1.0)
    loss = lambda s, t: weight * jnp.mean(distribution.channel_kl(s, t, temperature=temperature))  # noqa: E731
    yield from value_and_gradient(arrays, loss)


def feature_misc(what: str, params: Params, arrays: Arrays) -> Checks:
    if what == "attention transfer":
        yield Check(what, skip=NOT_PART)
    elif what.startswith("mmrazor L2Loss"):
        normalize, div_element, weight = take(params, normalize=True, div_element=False, loss_weight=1.0)

        def l2(s, t):
            if normalize:
                s, t = feature.unit_norm(s), feature.unit_norm(t)
            return weight * jnp.sum(feature.squared(s, t)) / (s.size if div_element else s.shape[0])

        yield from value_and_gradient(arrays, l2)
    elif what.startswith("mmrazor MGDLoss"):
        (alpha,) = take(params, alpha_mgd=2e-5)
        yield from value_and_gradient(arrays, lambda s, t: alpha * jnp.sum(feature.squared(s, t)) / s.shape[0])
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
    pooled = [feature.adaptive_avg_pool(x, (outputs, outputs)) for x in (student, teacher)]
    return jnp.mean(feature.squared(*pooled))


def multiscale(params: Params, arrays: Arrays) -> Checks:
    scales, weights = take(params, scales=None, weights=None)

    def pooled(s, t):
        total = 0.0
        for k, weight in zip(scales, weights or [1.0] * len(scales), strict=True):
            # The peer drops the windows that reach over the border, kdjax averages what they have.
            rows, columns = s.shape[1] // k * k, s.shape[2] // k * k
            inner = s[:, :rows, :columns], t[:, :rows, :columns]
            total += weight * jnp.mean(feature.multiscale(*inner, scales=(k,), per_scale_mean=True))
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
            t = frequency.apply_mask(t, mask)
        return jnp.mean(frequency.frequency_masked(s, t, mask))

    yield from value_and_gradient(arrays, masked)
    if "filtered" in arrays:
        filtered = frequency.apply_mask(nhwc(arrays["student"]), mask)
        yield Check("filtered", relative_error(nchw(filtered), arrays["filtered"]), VALUE)


def each(replay: Callable[[str, Params, Arrays], Checks]) -> Callable[[Path], Checks]:
    return lambda path: each_case(path, replay)


CHECKS = [
    ("kd/cwd_*.npz", each(cwd)),
    ("kd/feature_misc_*.npz", each(feature_misc)),
]
