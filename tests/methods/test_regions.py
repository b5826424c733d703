"""fkd, fgfi, defeat and gid: their values by plain loops, and what each option changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kdjax import methods
from kdjax.boxes import roi
from kdjax.distill import Method, Reads
from kdjax.errors import UserError
from kdjax.losses import disagreement, relation
from kdjax.structs import Assignment
from tests.support.arrays import quick_jit
from tests.support.methods import CLASSES, STRIDES, Scene, apply, batch_of, distiller, init, output
from tests.support.methods import scene as plain_scene

SIZE = 64


def normal(seed: int, shapes):
    """A tree of shapes filled by NumPy, which compiles nothing."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)


def drawn(seed: int, channels: int, size: int = SIZE, batch: int = 2):
    """A made-up detector's output."""
    made = normal(seed, jax.eval_shape(lambda: output(jax.random.PRNGKey(0), channels, size, batch=batch)))
    return dataclasses.replace(made, box_reg=tuple(4 * np.exp(m) for m in made.box_reg))


STUDENT, TEACHER = drawn(0, 4), drawn(1, 6)
# Boxes of three sizes, for the methods that give each to a level: two on the first, one on the last.
BOXES = np.array([[4, 6, 30, 28], [20, 10, 61, 50], [-100, -90, 170, 150], [0, 0, 0, 0]], np.float32)


def scene(student=STUDENT, teacher=TEACHER, size: int = SIZE) -> Scene:
    ctx = plain_scene(student, teacher, size=size)
    valid = jnp.array([[True, True, True, False], [False, True, False, False]])
    return ctx._replace(targets=ctx.targets._replace(boxes=jnp.array([BOXES, BOXES]), valid=valid))


@functools.cache
def shaken(name: str):
    """Random parameters of the method."""
    shapes = jax.eval_shape(lambda: init(methods.build(name), scene()))
    return jax.tree.map(lambda x: 0.3 * x, normal(2, shapes))


def variants(name: str, params, chosen: dict, ctx: Scene | None = None) -> dict:
    """The terms of the method under each of the chosen options, in one program."""
    ctx = scene() if ctx is None else ctx

    @quick_jit
    def run(params, student, teacher):
        moved = ctx._replace(student=student, teacher=teacher)
        return {label: apply(methods.build(name, **options), params, moved) for label, options in chosen.items()}

    return jax.tree.map(float, run(params, ctx.student, ctx.teacher))


def changed(terms: dict, plain: dict) -> set:
    assert set(terms) == set(plain)
    return {name for name in plain if not np.isclose(terms[name], plain[name], rtol=1e-6, atol=0)}


def slow_conv(x, layer):
    """Convolution of f64[B, H, W, C] with a 1x1 or 3x3 kernel, zeros around."""
    kernel, bias = np.float64(layer["kernel"]), np.float64(layer["bias"])
    reach = kernel.shape[0] // 2
    padded = np.pad(np.float64(x), ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    height, width = x.shape[1:3]
    return bias + sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i, j in np.ndindex(kernel.shape[:2]))


def slow_softmax(x, axes):
    x = np.exp(x - x.max(axes, keepdims=True))
    return x / x.sum(axes, keepdims=True)


def doubled(tree):
    return jax.tree.map(lambda x: jnp.concatenate([x, x]), tree)


# FKD -----------------------------------------------------------------------------------------------------------------


def slow_fkd(params, *, paper: bool) -> dict:
    terms = dict.fromkeys(("feature", "channel", "spatial", "non_local"), 0.0)
    for stride, pool, s, t in zip(STRIDES, (4, 2, 2), STUDENT.neck, TEACHER.neck, strict=True):
        layer = {name: layers[str(stride)] for name, layers in params.items()}
        block = quick_jit(relation.non_local_block, static_argnames="pool")
        related = [
            np.float64(block(x, layer["blocks"][side], pool=pool)) for side, x in (("student", s), ("teacher", t))
        ]
        s, t = np.float64(s), np.float64(t)
        adapted = slow_conv(s, layer["feature"])
        cells, channels = s.shape[1] * s.shape[2], t.shape[-1]
        strengths = [np.abs(x).mean(3, keepdims=True) for x in (s, t)]
        if paper:
            across = sum(np.abs(x).mean((1, 2), keepdims=True) for x in (adapted, t))
            mask = cells * slow_softmax(sum(strengths) / 0.5, (1, 2)) * channels * slow_softmax(across / 0.5, (3,))
        else:
            mask = cells * sum(slow_softmax(x / 0.5, (1, 2)) for x in strengths) / 2
        differences = {
            "feature": np.sqrt(mask) * (adapted - t),
            "channel": slow_conv(s.mean((1, 2), keepdims=True), layer["channel"]) - t.mean((1, 2), keepdims=True),
            "spatial": slow_conv(s.mean(3, keepdims=True), layer["spatial"]) - t.mean(3, keepdims=True),
            "non_local": slow_conv(related[0], layer["non_local"]) - related[1],
        }
        for name, x in differences.items():
            terms[name] += np.sqrt(np.square(x).sum() / len(x))
    return terms


def test_fkd_equals_a_slow_loop():
    params = shaken("fkd")
    assert params["blocks"]["8"]["teacher"]["phi"]["kernel"].shape[-1] == 6 // 4
    assert params["blocks"]["32"]["teacher"]["phi"]["kernel"].shape[-1] == 6 // 2
    chosen = {"plain": {}, "paper": dict(paper=True), "tau": dict(temperature=0.1), "parity": dict(parity=True)}
    found = variants("fkd", params, chosen)
    assert found["plain"] == pytest.approx(slow_fkd(params, paper=False), rel=1e-4)
    assert found["paper"] == pytest.approx(slow_fkd(params, paper=True), rel=1e-4)
    assert changed(found["paper"], found["plain"]) == changed(found["tau"], found["plain"]) == {"feature"}
    assert found["parity"] == pytest.approx({k: 2**0.5 * v for k, v in found["plain"].items()}, rel=1e-5)


def test_fkd_of_equal_nets():
    """Identity adapters, and non-local blocks as they start: every term is 0, with a finite gradient."""
    shapes = jax.eval_shape(lambda: init(methods.build("fkd"), scene(STUDENT, STUDENT)))
    params = normal(4, shapes)
    for blocks in params["blocks"].values():
        blocks["student"]["norm"] = blocks["teacher"]["norm"] = {"scale": jnp.zeros(4), "bias": jnp.zeros(4)}
    eye = {"kernel": jnp.eye(4)[None, None], "bias": jnp.zeros(4)}
    for name in ("feature", "channel", "non_local"):
        params[name] = dict.fromkeys(params[name], eye)
    one = {"kernel": jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0), "bias": jnp.zeros(1)}
    params["spatial"] = dict.fromkeys(params["spatial"], one)

    def total(student):
        terms = apply(methods.build("fkd"), params, scene(student, STUDENT))
        return sum(terms.values())

    value, gradient = quick_jit(jax.value_and_grad(total))(STUDENT)
    assert float(value) < 1e-5
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


# FGFI ----------------------------------------------------------------------------------------------------------------


def slow_overlap(a, b) -> float:
    inter = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    area = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return inter / (sum(area) - inter)


def slow_fgfi(params, ctx, *, psi=0.5, scale=8.0, ratios=(1.0,), relu=False, port=False, offset=0.0) -> float:
    cells, errors = [], []
    for stride, s, t in zip(STRIDES, ctx.student.neck, ctx.teacher.neck, strict=True):
        s = slow_conv(s, params[str(stride)])
        error = np.square((np.maximum(s, 0) if relu else s) - np.float64(t))
        for y, x in np.ndindex(t.shape[1:3]):
            cx, cy = (x + offset) * stride, (y + offset) * stride
            sides = [(scale * stride / 2 / ratio**0.5, scale * stride / 2 * ratio**0.5) for ratio in ratios]
            cells.append((stride, [(cx - w, cy - h, cx + w, cy + h) for w, h in sides]))
            errors.append(error[:, y, x].sum(-1))
    kept = np.zeros((2, len(cells)), bool)
    for b, j in np.ndindex(2, 4):
        if ctx.targets.valid[b, j]:
            box = np.float64(ctx.targets.boxes[b, j])
            side = np.sqrt((box[2] - box[0] + 1) * (box[3] - box[1] + 1))
            level = STRIDES[int(np.clip(np.floor(np.log2(side / 56)), 0, 2))]
            of = [i for i, (stride, _) in enumerate(cells) if not port or stride == level]
            overlaps = np.array([[slow_overlap(box, anchor) for anchor in cells[i][1]] for i in of])
            kept[b, np.array(of)[(overlaps > psi * overlaps.max()).any(1)]] = True
    errors = np.array(errors).T
    if not port:
        return (errors * kept).sum() / (2 * kept.sum())
    levels = [np.array([stride == s for stride, _ in cells]) for s in STRIDES]
    return np.mean([(errors * kept)[:, at].sum() / (2 * max(kept[:, at].sum(), 1) * 6) for at in levels])


def test_fgfi_equals_a_slow_loop():
    params, ctx = shaken("fgfi"), scene()
    chosen = {
        "plain": {}, "psi": dict(psi=0.8), "scale": dict(anchor_scale=3.0), "relu": dict(relu=True),
        "port": dict(port=True), "ratios": dict(anchor_ratios=(0.5, 1.0, 2.0)),
    }  # fmt: skip
    found = variants("fgfi", params, chosen, ctx)
    for label, options in chosen.items():
        options = {k.removeprefix("anchor_"): v for k, v in options.items()}
        assert found[label]["feature"] == pytest.approx(slow_fgfi(params, ctx, **options), rel=1e-4), label
    assert len({terms["feature"] for terms in found.values()}) == len(chosen)
    centred = ctx._replace(priors=ctx.priors + 0.5 * jnp.tile(ctx.priors[:, 2:], 2) * jnp.array([1.0, 1.0, 0.0, 0.0]))
    value = variants("fgfi", params, {"centred": {}}, centred)["centred"]["feature"]
    assert value == pytest.approx(slow_fgfi(params, ctx, offset=0.5), rel=1e-4)


# DeFeat --------------------------------------------------------------------------------------------------------------


def slow_defeat(params, ctx, *, relu=False) -> dict:
    terms = {"foreground": 0.0, "background": 0.0}
    for level, (stride, s, t) in enumerate(zip(STRIDES, ctx.student.neck, ctx.teacher.neck, strict=True)):
        s = slow_conv(s, params[str(stride)])
        error = np.square((np.maximum(s, 0) if relu else s) - np.float64(t))
        inside = np.zeros(error.shape[:3], bool)
        for b, j in np.ndindex(2, 4):
            x1, y1, x2, y2 = np.float64(ctx.targets.boxes[b, j])
            size = np.floor(np.log2(np.sqrt((x2 - x1 + 1) * (y2 - y1 + 1)) / 56))
            if ctx.targets.valid[b, j] and np.clip(size, 0, 2) == level:
                x1, y1, x2, y2 = (int(v / stride) for v in (x1, y1, x2, y2))
                inside[b, max(y1, 0) : max(y2, y1 + 1), max(x1, 0) : max(x2, x1 + 1)] = True
        for name, mask in (("foreground", inside), ("background", ~inside)):
            terms[name] += error[mask].sum() / max(2 * 6 * mask.sum(), 1) / len(STRIDES)
    return terms


def test_defeat_equals_a_slow_loop():
    params, ctx = shaken("defeat"), scene()
    found = variants("defeat", params, {"plain": {}, "relu": dict(relu=True)}, ctx)
    assert found["plain"] == pytest.approx(slow_defeat(params, ctx), rel=1e-4)
    assert found["relu"] == pytest.approx(slow_defeat(params, ctx, relu=True), rel=1e-4)


def test_tiny_adapters_start_from_the_teacher_alone():
    """Half the mean of T^2 a region at first, and hardly a pull on the student."""
    for name in ("defeat", "fgfi"):
        params = init(methods.build(name), scene())
        for layer in params.values():
            assert 0 < float(jnp.std(layer["kernel"])) < 2e-4 and not np.any(layer["bias"])
    silent = jax.tree.map(jnp.zeros_like, params)
    first, nothing = (variants("defeat", p, {"plain": {}})["plain"] for p in (params, silent))
    assert first == pytest.approx(nothing, rel=1e-2)


# GID -----------------------------------------------------------------------------------------------------------------


def slow_gid(params, ctx) -> dict:
    """From the chosen boxes and their RoIAlign on; those have loops of their own."""
    adapted = [jnp.asarray(slow_conv(m, params), jnp.float32) for m in ctx.student.neck]

    @quick_jit
    def look(student, teacher):
        scores = [jnp.concatenate([m.reshape(2, -1, CLASSES) for m in out.cls_logits], 1) for out in (student, teacher)]
        predicted = ctx.decode_student(student), ctx.decode_teacher(teacher)
        boxes, _, valid = disagreement.general_instances(*scores, *predicted)
        level = roi.roi_levels(boxes, 3, finest=14 * 8)
        maps = adapted, teacher.neck
        of = [roi.roi_align(m, boxes, level, strides=STRIDES, size=10) for m in maps]
        return scores, predicted, boxes, valid, of

    scores, predicted, boxes, valid, of = jax.tree.map(np.asarray, look(ctx.student, ctx.teacher))
    of = [np.float64(x) for x in of]
    points, strides = np.asarray(ctx.priors[:, :2]), np.asarray(ctx.priors[:, 2:])
    feature, pairs, cls, box, instances_, priors = 0.0, [], 0.0, 0.0, 0, 0
    for b in range(len(boxes)):
        chosen = np.flatnonzero(valid[b])
        instances_ += len(chosen)
        feature += sum(np.square(of[0][b, r] - of[1][b, r]).sum() / 100 for r in chosen)
        distances = []
        for x in of:
            d = np.array([[np.linalg.norm(x[b, i] - x[b, j]) for j in chosen] for i in chosen])
            distances.append(d / d[~np.eye(len(d), dtype=bool)].mean())
        gap = np.abs(distances[0] - distances[1])
        smooth = np.where(gap < 1, gap**2 / 2, gap - 0.5)
        pairs.append(smooth[~np.eye(len(gap), dtype=bool)].mean() if len(chosen) > 2 else 0.0)
        for i, point in enumerate(points):
            if any(np.all(point > boxes[b, r, :2]) and np.all(point < boxes[b, r, 2:]) for r in chosen):
                priors += 1
                p, q = (1 / (1 + np.exp(-np.float64(z[b, i]))) for z in scores[::-1])
                cls += (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum()
                box += (np.abs(np.float64(predicted[0][b, i]) - predicted[1][b, i]) / np.tile(strides[i], 2)).sum()
    assert priors > 0
    return {
        "feature": feature / instances_, "relation": np.mean(pairs), "class": cls / priors, "box": box / priors
    }  # fmt: skip


def test_gid_equals_a_slow_loop():
    params, ctx = shaken("gid"), scene()
    chosen = {"plain": {}, "parity": dict(parity=True), "few": dict(count=2), "sparse": dict(iou_threshold=0.02)}
    found = variants("gid", params, chosen, ctx)
    assert found["plain"] == pytest.approx(slow_gid(params, ctx), rel=1e-3)
    assert changed(found["parity"], found["plain"]) == {"relation"}
    assert found["few"]["relation"] == 0  # two instances have no relation
    assert changed(found["few"], found["plain"]) == changed(found["sparse"], found["plain"]) == set(found["plain"])


def test_gid_of_equal_nets_is_zero():
    eye = {"kernel": jnp.zeros((3, 3, 4, 4)).at[1, 1].set(jnp.eye(4)), "bias": jnp.zeros(4)}
    terms = variants("gid", eye, {"plain": {}}, scene(STUDENT, STUDENT))["plain"]
    assert terms == pytest.approx(dict.fromkeys(terms, 0.0), abs=1e-6)


def test_gid_selects_without_gradient():
    """Which boxes are looked at depends on logits and boxes, but the features' terms have no slope in them."""
    params = shaken("gid")

    def features(student):
        terms = apply(methods.build("gid"), params, scene(student))
        return terms["feature"] + terms["relation"]

    gradient = quick_jit(jax.grad(features))(STUDENT)
    assert not any(np.any(x) for x in (*gradient.cls_logits, *gradient.box_reg))
    assert any(np.any(x) for x in gradient.neck)


# All -----------------------------------------------------------------------------------------------------------------

METHODS = ("fkd", "fgfi", "defeat", "gid")


@pytest.mark.parametrize("name", METHODS)
def test_the_size_of_the_batch_changes_nothing(name):
    params, once = shaken(name), scene()
    twice = once._replace(**{k: doubled(getattr(once, k)) for k in ("student", "teacher", "targets", "assignment")})
    parity = {"fkd": {"parity": dict(parity=True)}, "gid": {"parity": dict(parity=True)}}.get(name, {})
    a, b = (variants(name, params, {"plain": {}} | parity, ctx) for ctx in (once, twice))
    assert b["plain"] == pytest.approx(a["plain"], rel=1e-4)
    if name == "fkd":
        assert b["parity"] == pytest.approx({k: 2**0.5 * v for k, v in a["parity"].items()}, rel=1e-4)
    if name == "gid":  # an image's instances are related to those of its copy too
        assert changed(b["parity"], a["parity"]) >= {"relation"}


def test_devices_change_nothing():
    """GID, which gathers and sorts: eight images on one device, and on eight devices with one each."""
    student, teacher = (drawn(i, c, 32, batch=8) for i, c in ((4, 4), (5, 6)))
    ctx, params = plain_scene(student, teacher, size=32), shaken("gid")
    total = quick_jit(lambda s, t: apply(methods.build("gid"), params, ctx._replace(student=s, teacher=t)))
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:8]), ("data",)), PartitionSpec("data"))
    one, eight = total(student, teacher), total(*jax.device_put((student, teacher), sharding))
    assert jax.tree.map(float, eight) == pytest.approx(jax.tree.map(float, one), rel=1e-4)


def test_a_weight_of_zero_takes_its_term_away():
    for name, part in (("fkd", "channel"), ("defeat", "background"), ("gid", "box")):
        without = methods.build(name, **{f"{part}_weight": 0.0})
        found = jax.eval_shape(lambda params, method=without: apply(method, params, scene()), shaken(name))
        assert found and set(found) == set(without.weights) == set(methods.build(name).weights) - {part}


@pytest.mark.parametrize("name", METHODS)
def test_images_without_objects(name):
    ctx = scene()
    ctx = ctx._replace(targets=ctx.targets._replace(valid=jnp.zeros_like(ctx.targets.valid)))
    terms = variants(name, shaken(name), {"plain": {}}, ctx)["plain"]
    nothing = {"fgfi": {"feature"}, "defeat": {"foreground"}}.get(name, set())
    assert {k for k, v in terms.items() if v == 0} == nothing


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fkd", dict(temperature=0.0), "fkd: temperature is 0.0"),
        ("fgfi", dict(psi=1.5), "fgfi: psi is 1.5"),
        ("fgfi", dict(anchor_scale=0), "fgfi: anchor_scale is 0"),
        ("fgfi", dict(anchor_ratios=()), r"fgfi: anchor_ratios is \(\): it must be numbers above 0, at least one"),
        ("defeat", dict(temperature=0), "defeat: temperature is 0"),
        ("gid", dict(count=0), "gid: count is 0"),
        ("gid", dict(iou_threshold=2), "gid: iou_threshold is 2"),
        *((name, dict(start=5, stop=5), "not possible") for name in METHODS),
    ],
)
def test_wrong_options_are_refused(name, options, words):
    with pytest.raises(UserError, match=words):
        methods.build(name, **options)


def test_gid_refuses_what_it_cannot_compare():
    method, other = methods.build("gid"), drawn(3, 6)
    classes = dataclasses.replace(other, cls_logits=other.box_reg)
    with pytest.raises(
        UserError, match=r"^gid: .*same levels, anchors and classes.* 3\) \(student\) and .* 4\) \(teacher"
    ):
        init(method, scene(STUDENT, classes))
    with pytest.raises(UserError, match=r"gid.*shares one adapter"):
        init(method, scene(dataclasses.replace(STUDENT, neck=(*STUDENT.neck[:2], other.neck[2]))))


def test_a_method_gets_the_students_assigner_without_its_gradient():
    ctx = scene()
    seen = []

    def probe(params, context):
        seen.append(context.assign(ctx.targets))
        return {"quality": jnp.sum(seen[-1].quality)}

    method = Method(lambda *_: {}, probe, {"quality": 1.0}, Reads(("assignment",)), name="probe")

    def quality(student):
        made = distiller(ctx, method)
        plain = made.student.assign

        def assign(out, targets, key):
            assignment = plain(out, targets, key)
            return assignment._replace(quality=jnp.mean(out.cls_logits[0]) * assignment.quality)

        made.student.assign = assign
        terms = made.terms({"probe": {}}, student, batch_of(ctx), ((), ()), assignment=ctx.assignment, key=ctx.key)
        return terms["probe/quality"]

    value, gradient = jax.value_and_grad(quality)(STUDENT)
    assert float(value) != 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    assert isinstance(seen[0], Assignment) and CLASSES in np.asarray(seen[0].labels)
