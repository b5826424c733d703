"""SSIM, PKD, CWD, FitNet, FGD, MGD and MKD's generator: values against NumPy, options, refusals, properties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import methods
from kdjax.errors import UserError
from kdjax.structs import DetectorOutput, Targets
from tests.support.arrays import quick_jit
from tests.support.methods import Scene, apply, init, output, scene

STRIDES, SIDES = (8, 16, 32), ((6, 8), (3, 4), (2, 2))  # a canvas of 48 x 64 pixels
BOXES = [
    [[3, 2, 30, 20], [20, 10, 62, 47], [0, 0, 0, 0]],
    [[33, 5, 52, 30], [0, 0, 64, 48], [1, 1, 9, 9]],
]
TARGETS = Targets(
    boxes=jnp.array(BOXES, jnp.float32),
    labels=jnp.zeros((2, 3), jnp.int32),
    valid=jnp.array([[True, True, False], [True, False, False]]),
    image_size=jnp.array([[40, 52], [48, 60]], jnp.int32),
    pad_size=jnp.array([[48, 64], [48, 64]], jnp.int32),
)


def detector(seed: int, channels: int = 4, *, classes: int = 3, batch: int = 2) -> DetectorOutput:
    """A neck and class maps of random numbers."""
    rng = np.random.default_rng(seed)

    def maps(width):
        return tuple(jnp.asarray(rng.normal(size=(batch, *side, width)), jnp.float32) for side in SIDES)

    return DetectorOutput(strides=STRIDES, neck=maps(channels), cls_logits=maps(classes))


def with_neck(output: DetectorOutput, change) -> DetectorOutput:
    return dataclasses.replace(output, neck=tuple(change(x) for x in output.neck))


def context(student, teacher, *, targets=TARGETS) -> Scene:
    return scene(student, teacher, size=64)._replace(targets=targets, canvas=(48, 64))


def terms(name: str, student, teacher, choices: dict[str, dict], *, params=None, **kwargs) -> dict:
    """{label: {term: value}} for each choice of options, all in one compilation; `params` is for all, or from init."""

    def all_terms(student, teacher, params):
        found = {}
        for label, options in choices.items():
            method = methods.build(name, **options)
            own = init(method, context(student, teacher), jax.random.PRNGKey(2)) if params is None else params
            found[label] = apply(method, own, context(student, teacher, **kwargs))
        return found

    return jax.tree.map(float, quick_jit(all_terms)(student, teacher, params))


def random_params(name: str, student, teacher, /, **options):
    """Parameters as `init` shapes them, all random: nothing is zero or the identity as it may be at first."""
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    shapes = jax.eval_shape(lambda k: init(methods.build(name, **options), context(student, teacher), k), key)
    rng = np.random.default_rng(11)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) / 2, shapes)


def adapted(params, student, teacher, tap: str = "neck") -> list[tuple[np.ndarray, np.ndarray]]:
    """Both maps of each level in float64, the student's behind the adapter that `params` has for it."""
    pairs = []
    for stride, s, t in zip(STRIDES, getattr(student, tap), getattr(teacher, tap), strict=True):
        s, t = np.asarray(s, np.float64), np.asarray(t, np.float64)
        if str(stride) in params:
            s = s @ params[str(stride)]["kernel"][0, 0] + params[str(stride)]["bias"]
        pairs.append((s, t))
    return pairs


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


# ------------------------------------------------------------------------------------------------ values by formula


def test_published_weights_are_the_defaults():
    weights = {name: methods.build(name).weights for name in ("ssim", "pkd", "cwd", "fitnet", "fgd", "mgd")}
    flat = {f"{name} {term}": float(w) for name, found in weights.items() for term, w in found.items()}
    assert flat == pytest.approx(
        {"ssim structural": 4, "pkd correlation": 10, "cwd cwd": 10, "fitnet feature": 1, "mgd generation": 2e-5}
        | {"fgd foreground": 1.6e-3, "fgd background": 8e-4, "fgd attention": 8e-4, "fgd relation": 8e-6}
    )
    halved = methods.build("fgd", weight=0.5, relation_weight=0.0).weights
    assert {k: float(v) for k, v in halved.items()} == pytest.approx(
        {"foreground": 8e-4, "background": 4e-4, "attention": 4e-4}
    )


def test_fitnet():
    student, teacher = detector(0, 3), detector(1)
    params = random_params("fitnet", student, teacher)
    choices = {"l2": {}, "l1": dict(distance="l1"), "sum": dict(reduction="sum")}
    got = terms("fitnet", student, teacher, choices, params=params)
    differences = [s - t for s, t in adapted(params, student, teacher)]
    want = {
        "l2": np.mean([np.mean(d**2) for d in differences]),
        "l1": np.mean([np.mean(abs(d)) for d in differences]),
        "sum": np.mean([np.sum(d**2) / 2 for d in differences]),
    }
    assert {label: found["feature"] for label, found in got.items()} == pytest.approx(want, rel=1e-5)


def test_fitnet_gradient():
    student, teacher = detector(0), detector(1)

    def loss(neck):
        return apply(methods.build("fitnet"), {}, context(DetectorOutput(strides=STRIDES, neck=neck), teacher))[
            "feature"
        ]

    for got, s, t in zip(quick_jit(jax.grad(loss))(student.neck), student.neck, teacher.neck, strict=True):
        np.testing.assert_allclose(got, 2 * (s - t) / s.size / len(STRIDES), rtol=1e-5, atol=1e-9)


def test_pkd():
    student, teacher = detector(0, 3), detector(1)
    params = random_params("pkd", student, teacher)
    got = terms("pkd", student, teacher, {"biased": {}, "unbiased": dict(ddof=1)}, params=params)
    want = {"biased": 0.0, "unbiased": 0.0}
    for s, t in adapted(params, student, teacher):
        r = [np.corrcoef(s[..., c].ravel(), t[..., c].ravel())[0, 1] for c in range(4)]
        cells = t[..., 0].size
        want["biased"] += np.mean(1 - np.array(r))
        want["unbiased"] += np.mean(1 - np.array(r)) * (cells - 1) / cells
    assert {label: found["correlation"] for label, found in got.items()} == pytest.approx(want, rel=1e-4)


def test_pkd_sees_neither_scale_nor_shift_of_a_channel_but_of_a_image():
    student, teacher = detector(0), detector(1)
    rng = np.random.default_rng(3)
    by_channel = with_neck(student, lambda x: x * rng.uniform(0.5, 2, 4) + rng.normal(size=4))
    by_image = with_neck(student, lambda x: x * np.array([1, 3]).reshape(2, 1, 1, 1))
    method = methods.build("pkd")
    value = quick_jit(lambda student: apply(method, {}, context(student, teacher))["correlation"])
    assert float(value(by_channel)) == pytest.approx(float(value(student)), rel=1e-4)
    assert float(value(by_image)) != pytest.approx(float(value(student)), rel=1e-3)


def test_cwd():
    student, teacher = detector(0, 3), detector(1)
    params = random_params("cwd", student, teacher)
    classes = dict(student="cls_logits", teacher="cls_logits")
    got = terms("cwd", student, teacher, {"neck": {}, "tau": dict(temperature=4.0)}, params=params)
    got |= terms("cwd", student, teacher, {"classes": classes})

    def divergence(pairs, tau):
        total = 0.0
        for s, t in pairs:
            batch, channels = len(t), t.shape[-1]
            for b in range(batch):
                for c in range(channels):
                    q, p = softmax(s[b, ..., c] / tau), softmax(t[b, ..., c] / tau)
                    total += tau**2 / (batch * channels) * np.sum(p * np.log(p / q))
        return total

    neck = adapted(params, student, teacher)
    want = {"neck": divergence(neck, 1.0), "tau": divergence(neck, 4.0)}
    want["classes"] = divergence(adapted({}, student, teacher, "cls_logits"), 1.0)
    assert {label: found["cwd"] for label, found in got.items()} == pytest.approx(want, rel=1e-4)
    assert random_params("cwd", student, teacher, **classes) == {}, "class maps have no adapter"


def similarity(s, t, window: int, exponents) -> np.ndarray:
    """SSIM cell by cell as a product of three factors, for maps [H, W] in 0 .. 1."""
    half = window // 2
    line = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    c1, c2 = 0.01**2, 0.03**2
    s_padded, t_padded = (np.pad(x, half, mode="reflect") for x in (s, t))
    found = np.zeros_like(s)
    for y, x in np.ndindex(*s.shape):
        a, b = (m[y : y + window, x : x + window] for m in (s_padded, t_padded))
        mean_a, mean_b = np.sum(weights * a), np.sum(weights * b)
        var_a, var_b = np.sum(weights * (a - mean_a) ** 2), np.sum(weights * (b - mean_b) ** 2)
        cov, deviations = np.sum(weights * (a - mean_a) * (b - mean_b)), np.sqrt(var_a * var_b)
        luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        contrast = (2 * deviations + c2) / (var_a + var_b + c2)
        structure = (cov + c2 / 2) / (deviations + c2 / 2)
        found[y, x] = luminance ** exponents[0] * contrast ** exponents[1] * structure ** exponents[2]
    return found


def test_ssim():
    student, teacher = detector(0, 3), detector(1)
    params = random_params("ssim", student, teacher)
    choices = {
        "image": {},
        "channel": dict(scope="channel"),
        "batch": dict(scope="batch"),
        "window": dict(window=3),
        "none": dict(scope="none", window=3),
        "exponents": dict(exponents=(0.5, 1.0, 0.0)),
    }
    got = terms("ssim", student, teacher, choices, params=params)
    axes = {"channel": (1, 2), "batch": (0, 1, 2, 3)}

    def rescaled(x, scope):
        low, high = (f(x, axes.get(scope, (1, 2, 3)), keepdims=True) for f in (np.min, np.max))
        return (x - low) / (high - low)

    for label, options in choices.items():
        want, exponents = 0.0, options.get("exponents", (1.0, 1.0, 1.0))
        fitting = {(6, 8): options.get("window", 5), (3, 4): 3}  # two cells leave a window of one: nothing to compare
        for s, t in adapted(params, student, teacher):
            if t.shape[1:3] in fitting:
                if label != "none":
                    s, t = rescaled(s, label), rescaled(t, label)
                values = [
                    (1 - similarity(s[b, ..., c], t[b, ..., c], fitting[t.shape[1:3]], exponents)) / 2
                    for b in range(2)
                    for c in range(4)
                ]
                want += np.mean(values)
        assert got[label]["structural"] == pytest.approx(want, rel=1e-4), label
        assert 0 <= want <= 2, "at most 1 a level"


def test_ssim_on_raw_maps_as_the_authors_early_code_has_it():
    """Against kornia 0.9.0 on torch 2.13, `sum(kornia.losses.ssim_loss(s, t, 3))` of these maps in float64.

    The largest difference seen, relative to the largest number: 8e-8 of the value, 4.9e-5 of the gradients (the norm of
    kornia's own float32 gradient is off by 2e-5).
    """

    def raw(seed, sign):
        """Two levels with means of opposite signs, far outside of 0 .. 1, and a channel that is flat."""
        levels = [3 * x - sign for x in detector(seed).neck[:2]]
        return dataclasses.replace(
            detector(seed), strides=STRIDES[:2], neck=tuple(x.at[..., 3].set(0.25 * sign) for x in levels)
        )

    student, teacher = raw(0, 1.0), raw(1, -2.0)
    method = methods.build("ssim", scope="none", window=3, weight=1.0)
    assert method.weights == {"structural": 1.0} and random_params("ssim", student, teacher, scope="none") == {}

    def loss(neck):
        seen = context(dataclasses.replace(student, neck=neck), teacher)
        return apply(method, {}, seen)["structural"]

    value, gradients = quick_jit(jax.value_and_grad(loss))(student.neck)
    assert float(value) == pytest.approx(0.5954214026614122 + 0.5832886731433736, rel=2e-6)
    norms = [float(jnp.linalg.norm(g.ravel())) for g in gradients]
    assert norms == pytest.approx([0.02650824933133147, 0.05717130698905366], rel=1e-4)
    assert float(gradients[0][1, 3, 4, 2]) == pytest.approx(0.0005909314012851544, rel=1e-4)


def test_ssim_sees_no_positive_affine_map_of_what_it_rescales():
    student, teacher = detector(0), detector(1)
    of_map = with_neck(student, lambda x: 3 * x + 5)
    of_channel = with_neck(student, lambda x: x * np.array([1, 2, 3, 4]) + np.array([0, 1, 0, 2]))
    of_image = with_neck(student, lambda x: x * np.array([1, 3]).reshape(2, 1, 1, 1))
    choices = {scope: dict(scope=scope) for scope in ("image", "channel", "batch")}
    built = {label: methods.build("ssim", **options) for label, options in choices.items()}

    @quick_jit
    def values(student):
        return {label: apply(method, {}, context(student, teacher))["structural"] for label, method in built.items()}

    plain = values(student)
    for changed, blind in ((of_map, "image channel batch"), (of_channel, "channel"), (of_image, "image channel")):
        same = {k for k, v in values(changed).items() if float(v) == pytest.approx(float(plain[k]), rel=1e-3)}
        assert same == set(blind.split())


def test_ssim_adapts_equal_channels_only_if_asked():
    student, teacher = detector(0), detector(1)
    assert random_params("ssim", student, teacher) == {}
    assert set(random_params("ssim", student, teacher, always_adapt=True)) == {"8", "16", "32"}


def focal_reference(params, student, teacher, tau: float, sizes) -> dict:
    """FGD's four terms in loops."""
    found = dict.fromkeys(("foreground", "background", "attention", "relation"), 0.0)

    def strength(x):  # [H, W, C] -> spatial and channel attention
        height, width, channels = x.shape
        spatial = height * width * softmax(np.mean(abs(x), 2) / tau)
        return spatial, channels * softmax(np.mean(abs(x), (0, 1)) / tau)

    def related(x, block):
        weights = softmax((x @ block["attend"]["kernel"][0, 0])[..., 0] + block["attend"]["bias"])
        hidden = np.sum(weights[..., None] * x, (0, 1)) @ block["down"]["kernel"][0, 0] + block["down"]["bias"]
        hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5)
        hidden = np.maximum(hidden * block["norm"]["scale"] + block["norm"]["bias"], 0)
        return x + hidden @ block["up"]["kernel"][0, 0] + block["up"]["bias"]

    for stride, (s_maps, t_maps) in zip(STRIDES, adapted(params, student, teacher), strict=True):
        for b, (s, t) in enumerate(zip(s_maps, t_maps, strict=True)):
            height, width, _ = t.shape
            foreground = np.zeros((height, width))
            for (x1, y1, x2, y2), valid in zip(np.asarray(TARGETS.boxes[b]), np.asarray(TARGETS.valid[b]), strict=True):
                if valid:
                    left, right = int(np.floor(x1 / sizes[b][1] * width)), int(np.ceil(x2 / sizes[b][1] * width))
                    top, bottom = int(np.floor(y1 / sizes[b][0] * height)), int(np.ceil(y2 / sizes[b][0] * height))
                    area = (right - left + 1) * (bottom - top + 1)
                    cells = foreground[top : bottom + 1, left : right + 1]
                    np.maximum(cells, 1 / area, out=cells)
            background = (foreground == 0) / max(np.sum(foreground == 0), 1)
            (s_space, s_channel), (t_space, t_channel) = strength(s), strength(t)
            square = t_space[..., None] * t_channel * (s - t) ** 2
            found["foreground"] += np.sum(foreground[..., None] * square) / 2
            found["background"] += np.sum(background[..., None] * square) / 2
            found["attention"] += (np.sum(abs(s_space - t_space)) + np.sum(abs(s_channel - t_channel))) / 2
            blocks = params["blocks"][str(stride)]
            found["relation"] += np.sum((related(s, blocks["student"]) - related(t, blocks["teacher"])) ** 2) / 2
    return found


def test_fgd():
    student, teacher = detector(0, 3), detector(1)
    params = random_params("fgd", student, teacher)
    choices = {
        "plain": {},
        "tau": dict(temperature=0.5),
        "unpadded": dict(unpadded=True),
        "off": dict(relation_weight=0.0),
    }
    got = terms("fgd", student, teacher, choices, params=params)
    padded, unpadded = np.asarray(TARGETS.pad_size), np.asarray(TARGETS.image_size)
    assert got["plain"] == pytest.approx(focal_reference(params, student, teacher, 0.8, padded), rel=1e-4)
    assert got["tau"] == pytest.approx(focal_reference(params, student, teacher, 0.5, padded), rel=1e-4)
    assert got["unpadded"] == pytest.approx(focal_reference(params, student, teacher, 0.8, unpadded), rel=1e-4)
    changed = {
        label: {term for term in got["plain"] if got[label].get(term) != pytest.approx(got["plain"][term], rel=1e-6)}
        for label in choices
    }
    assert changed == {
        "plain": set(),
        "tau": {"foreground", "background", "attention"},
        "unpadded": {"foreground", "background"},
        "off": {"relation"},
    }


def test_fgd_boxes_and_first_values():
    """Padding rows change nothing, no boxes leave the background alone, and equal nets cost nothing at first."""
    student, teacher = detector(0), detector(1)
    method = methods.build("fgd")
    none = TARGETS._replace(valid=jnp.zeros_like(TARGETS.valid))
    more = TARGETS._replace(
        boxes=jnp.concatenate([TARGETS.boxes, TARGETS.boxes], 1),
        labels=jnp.concatenate([TARGETS.labels] * 2, 1),
        valid=jnp.concatenate([TARGETS.valid, none.valid], 1),
    )

    @quick_jit
    def values(student, teacher):
        params = init(method, context(student, teacher), jax.random.PRNGKey(2))
        found = {name: apply(method, params, context(student, teacher, targets=t)) for name, t in boxes.items()}
        return found | {"equal": apply(method, params, context(teacher, teacher))}

    boxes = {"plain": TARGETS, "more": more, "none": none}
    got = jax.tree.map(float, values(student, teacher))
    assert got["more"] == got["plain"]
    assert got["none"]["foreground"] == 0 < got["none"]["background"]
    assert got["none"]["attention"] == pytest.approx(got["plain"]["attention"])
    squares = sum(np.sum((s - t) ** 2) / 2 for s, t in adapted({}, student, teacher))
    assert got["plain"]["relation"] == pytest.approx(squares, rel=1e-5)
    assert got["equal"] == dict.fromkeys(got["plain"], 0.0)


def convolved(x, layer) -> np.ndarray:
    """3x3 convolution of [H, W, C] with a border of zeros."""
    padded, found = np.pad(x, ((1, 1), (1, 1), (0, 0))), np.zeros_like(x)
    for y, column in np.ndindex(*x.shape[:2]):
        window = padded[y : y + 3, column : column + 3]
        found[y, column] = np.tensordot(window, layer["kernel"], 3) + layer["bias"]
    return found


def test_mgd():
    student, teacher = detector(0, 3), detector(1)
    params = random_params("mgd", student, teacher)
    choices = {"whole": dict(drop=0.0), "nothing": dict(drop=1.0), "cells": {}, "channels": dict(mask="channels")}
    got = {k: v["generation"] for k, v in terms("mgd", student, teacher, choices, params=params).items()}
    want = {"whole": 0.0, "nothing": 0.0}
    for stride, (s_maps, t_maps) in zip(STRIDES, adapted(params, student, teacher), strict=True):
        layers = params["generators"][str(stride)]
        for s, t in zip(s_maps, t_maps, strict=True):
            for label, x in (("whole", s), ("nothing", 0 * s)):
                made = convolved(np.maximum(convolved(x, layers["first"]), 0), layers["second"])
                want[label] += np.sum((made - t) ** 2) / 2
    assert {label: got[label] for label in want} == pytest.approx(want, rel=1e-4)
    assert len(set(got.values())) == 4
    assert terms("mgd", detector(5, 3), teacher, choices, params=params)["nothing"] == {"generation": got["nothing"]}


def identity(channels: int) -> dict:
    """A generator that gives back what is positive."""
    layer = {"kernel": np.zeros((3, 3, channels, channels), np.float32), "bias": np.zeros(channels, np.float32)}
    layer["kernel"][1, 1] = np.eye(channels)
    return {"first": layer, "second": layer}


@pytest.mark.parametrize("mask", ["cells", "channels"])
def test_mgd_holes(mask):
    """With an identity as generator and a teacher of zeros the gradient of the student's map shows the mask."""
    side, channels = 24, 12

    def output(value):
        return DetectorOutput(strides=(8, 16), neck=(jnp.full((4, side, side, channels), value),) * 2)

    method = methods.build("mgd", mask=mask)
    params = {"generators": {"8": identity(channels), "16": identity(channels)}}

    @quick_jit
    def masks(neck, seed):
        def loss(neck):
            ctx = scene(DetectorOutput(strides=(8, 16), neck=neck), output(0.0), size=64)
            return apply(method, params, ctx._replace(key=jax.random.PRNGKey(seed)))["generation"]

        return [2 * gradient for gradient in jax.grad(loss)(neck)]  # d/ds of (m s)^2 / B with B = 4, s = 1

    fine, coarse = map(np.asarray, masks(output(1.0).neck, 1))
    again, others = masks(output(1.0).neck, 1)[0], masks(output(1.0).neck, 2)[0]
    assert set(np.unique(fine)) == {0.0, 1.0}, "what is kept is not scaled"
    shared = fine[..., :1] if mask == "cells" else fine[:, :1, :1]
    np.testing.assert_array_equal(fine, np.broadcast_to(shared, fine.shape))
    draws = np.concatenate([x.ravel() for x in (shared, coarse[..., :1] if mask == "cells" else coarse[:, :1, :1])])
    assert abs(np.mean(draws == 0) - 0.65) < 3 * np.sqrt(0.65 * 0.35 / draws.size)
    np.testing.assert_array_equal(fine, again)
    assert (fine != others).any() and (fine != coarse).any() and (fine[0] != fine[1]).any()


# ------------------------------------------------------------------------------------------------- what several share


def test_equal_maps_cost_nothing_and_a_doubled_batch_the_same():
    student, teacher = detector(0), detector(1)
    built = {name: methods.build(name) for name in ("ssim", "pkd", "cwd", "fitnet", "fgd")}
    params = {name: random_params(name, student, teacher) for name in built}

    @quick_jit
    def values(student, teacher, targets):
        ctx = context(student, teacher, targets=targets)
        found = {name: apply(method, params[name], ctx) for name, method in built.items()}
        return {f"{name} {term}": value for name, values in found.items() for term, value in values.items()}

    once, equal = values(student, teacher, TARGETS), values(teacher, teacher, TARGETS)
    twice = values(*jax.tree.map(lambda x: jnp.concatenate([x, x]), (student, teacher, TARGETS)))
    for name, value in once.items():
        assert float(value) > 0 and float(twice[name]) == pytest.approx(float(value), rel=1e-5), name
        if name != "fgd relation":  # zero at first alone (above): the two blocks learn apart from each other
            assert abs(float(equal[name])) < 1e-6 * max(float(value), 1), name


def test_mkd_options():
    """Every option of the term list changes what it names and nothing else."""
    student, teacher = output(jax.random.PRNGKey(0), 4, 64), output(jax.random.PRNGKey(1), 4, 64)
    ctx = scene(student, teacher, size=64)

    def terms(**options):
        return {k: float(v) for k, v in apply(methods.build("mkd", **options), {}, ctx).items()}

    plain = terms()
    assert set(plain) == {"feature", "multiscale", "frequency", "alignment"}
    assert terms(scales=(1,))["multiscale"] == pytest.approx(plain["feature"])
    assert terms(zeta=0.0)["frequency"] == pytest.approx(plain["feature"], rel=1e-5)
    for options, term in (
        (dict(per_scale_mean=True), "multiscale"),
        (dict(multiscale_mode="hcl"), "multiscale"),
        (dict(hermitian=False), "frequency"),
        (dict(keep_dc=True), "frequency"),
        (dict(temperature=2.0), "alignment"),
        (dict(attention_weighted=True), "alignment"),
    ):
        changed = terms(**options)
        assert {name for name in plain if changed[name] != plain[name]} == {term}, options
    assert set(terms(feature_weight=0.0)) == set(plain) - {"feature"}
    standard = terms(normalize="pkd")
    moved = scene(jax.tree.map(lambda x: 3 * x + 1, student), teacher, size=64)
    again = apply(methods.build("mkd", normalize="pkd"), {}, moved)
    assert {k: float(v) for k, v in again.items()} == pytest.approx(standard, rel=1e-4)
    with pytest.raises(UserError, match="normalize"):
        methods.build("mkd", normalize="bn")


def test_mkd_generator():
    """It changes the frequency term alone; what it trains is among the parameters and gets a gradient."""
    student, teacher = with_neck(detector(0), abs), detector(1)
    params = random_params("mkd", student, teacher, generator=True)
    assert set(params) == {"generators"} and set(params["generators"]) == {"8", "16", "32"}
    assert random_params("mkd", student, teacher) == {}
    same = {"generators": dict.fromkeys(params["generators"], identity(4))}
    choices = {"off": {}, "on": dict(generator=True), "whole": dict(generator=True, zeta=0.0)}
    got = terms("mkd", student, teacher, choices, params=same)
    assert {term for term in got["off"] if got["on"][term] != got["off"][term]} == {"frequency"}
    # The generator is the identity on what is positive: without a mask it leaves the plain distance.
    assert got["whole"]["frequency"] == pytest.approx(got["whole"]["feature"], rel=1e-5)

    def loss(params):
        method = methods.build("mkd", generator=True, feature_weight=0.0, multiscale_weight=0.0, alignment_weight=0.0)
        return apply(method, params, context(student, teacher))["frequency"]

    assert all(np.any(leaf) for leaf in jax.tree.leaves(quick_jit(jax.grad(loss))(params)))


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("fitnet", dict(distance="l3"), "fitnet: distance is 'l3'.*l2.*l1"),
        ("fitnet", dict(reduction="max"), "fitnet: reduction is 'max'.*mean.*sum"),
        ("pkd", dict(ddof=2), "pkd: ddof is 2.*0.*1"),
        ("cwd", dict(temperature=0.0), "cwd: temperature is 0.0.*above 0"),
        ("cwd", dict(student="cls_logits"), "cwd: student is 'cls_logits' and teacher 'neck'.*both"),
        ("ssim", dict(scope="row"), "ssim: scope is 'row'.*image.*channel.*batch.*none"),
        ("ssim", dict(window=4), "ssim: window is 4.*odd"),
        ("ssim", dict(window=1), "ssim: window is 1.*at least 3"),
        ("ssim", dict(exponents=(1.0, -1.0, 1.0)), "ssim: exponents"),
        ("ssim", dict(exponents=(1.0, 1.0)), "ssim: exponents"),
        ("fgd", dict(temperature=-1.0), "fgd: temperature is -1.0.*above 0"),
        ("mgd", dict(drop=1.5), r"mgd: drop is 1.5.*0 \.\. 1"),
        ("mgd", dict(mask="rows"), "mgd: mask is 'rows'.*cells.*channels"),
    ],
)
def test_impossible_options_are_refused(name, options, sentence):
    with pytest.raises(UserError, match=f"^{sentence}"):
        methods.build(name, **options)


def test_cwd_refuses_class_maps_of_other_classes():
    method = methods.build("cwd", student="cls_logits", teacher="cls_logits")
    with pytest.raises(UserError, match="stride 8 the student has 3 and the teacher 80"):
        init(method, context(detector(0), detector(1, classes=80)))


@pytest.mark.parametrize(("side", "stride"), [((4, 4), 16), ((6, 4), 16), ((2, 2), 32), ((1, 1), 64)])
def test_dsi_compares_the_coarsest_maps_whatever_their_strides(side, stride):
    """The student's has 2 x 2 cells: of 4 x 4 the teacher's are averaged, of 6 x 4 and 1 x 1 resized bilinearly."""
    rng = np.random.default_rng(3)
    vision = rng.normal(size=(2, *side, 7)).astype(np.float32)
    student, teacher = detector(1), DetectorOutput(strides=(stride,), neck=(jnp.asarray(vision),))
    projection = {"kernel": rng.normal(size=(1, 1, 4, 7)), "bias": rng.normal(size=7)}
    params = {"projection": {name: jnp.asarray(value, jnp.float32) for name, value in projection.items()}}
    found = terms("dsi", student, teacher, {"": {}}, params=params)[""]
    own = np.asarray(student.neck[2]) @ projection["kernel"][0, 0] + projection["bias"]
    if side == (4, 4):
        other = vision.reshape(2, 2, 2, 2, 2, 7).mean((2, 4))
    elif side == (6, 4):  # cells 0.5 and 2.5 of 4, 1 and 4 of 6
        other = vision[:, [1, 4]].reshape(2, 2, 2, 2, 7).mean(3)
    else:
        other = np.broadcast_to(vision, own.shape)
    lengths = np.linalg.norm(own, axis=-1) * np.linalg.norm(other, axis=-1)
    assert found["alignment"] == pytest.approx(np.mean(1 - (own * other).sum(-1) / lengths), abs=1e-6)


def test_dsi_takes_the_map_that_its_tap_names():
    student, teacher = detector(1), DetectorOutput(strides=(16,), neck=(jnp.ones((2, 3, 4, 5)),))
    found = terms("dsi", student, teacher, {tap: {"student": tap} for tap in ("neck", "neck.0", "neck.2")})
    assert found["neck"] == found["neck.2"] != found["neck.0"]
