"""Methods on regions: what two made-up second stages say about the same boxes, against NumPy; what is refused."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import methods
from kdjax.boxes import coding, roi
from kdjax.distill import Custom, Distiller, Method, Reads, on_host, taps
from kdjax.errors import UserError
from kdjax.structs import Assignment, DetectorOutput, Regions, Rows, targets_of
from tests.support.arrays import on_shards, quick_jit

SIDE, CLASSES, REGIONS, STRIDES = 64, 3, 12, (8, 16)
OBJECTS = np.array([[4, 6, 34, 40], [30, 20, 62, 60], [0, 0, 0, 0]], np.float32)


def second_stage(weights, maps, boxes) -> Regions:
    """Of the box and of the mean of a map: logits and deltas that depend on both."""
    mean = jnp.mean(maps, (1, 2))[:, None] * jnp.ones((1, boxes.shape[1], 1))
    hidden = jnp.sin(jnp.concatenate([boxes / SIDE, mean], -1) @ weights["hidden"])
    return Regions(hidden @ weights["logits"], hidden @ weights["deltas"])


def output(seed: int, channels: int, *, batch: int = 2, classes: int = CLASSES, boxes_by_class: bool = True):
    """The maps of a two-stage detector on images of 64 pixels, and its second stage."""
    rng = np.random.default_rng(seed)

    def drawn(*shape, scale=1.0):
        return jnp.asarray(rng.normal(0, scale, shape), jnp.float32)

    neck = tuple(drawn(batch, SIDE // stride, SIDE // stride, channels) for stride in STRIDES)
    first = {"box_reg": tuple(m[..., :4] for m in neck), "quality": tuple(m[..., :1] for m in neck)}
    weights = {
        "hidden": drawn(4 + channels, 16, scale=2),
        "logits": drawn(16, classes + 1),
        "deltas": drawn(16, 4 * classes if boxes_by_class else 4, scale=0.3),
    }
    stage = jax.tree_util.Partial(second_stage, weights, neck[0])
    return DetectorOutput(strides=STRIDES, neck=neck, **first, at=stage)


STUDENT, TEACHER = output(0, 4), output(1, 6)


def drawn_regions(batch: int = 2) -> Assignment:
    """Regions around the objects and elsewhere; the last two of the second image are missing."""
    rng = np.random.default_rng(5)
    near = OBJECTS[rng.integers(0, 2, (batch, REGIONS))] + rng.uniform(-8, 8, (batch, REGIONS, 4))
    low, high = rng.uniform(0, 30, (batch, REGIONS, 2)), rng.uniform(32, SIDE, (batch, REGIONS, 2))
    boxes = np.where((np.arange(REGIONS) < 8)[:, None], near, np.concatenate([low, high], -1))
    ignore = np.zeros((batch, REGIONS), bool)
    ignore[1, -2:] = True
    labels = np.where(ignore, CLASSES, rng.integers(0, CLASSES + 1, (batch, REGIONS)))
    positive = labels < CLASSES
    return Assignment(
        matched=jnp.asarray(np.where(positive, 0, -1), jnp.int32),
        positive=jnp.asarray(positive),
        ignore=jnp.asarray(ignore),
        labels=jnp.asarray(labels, jnp.int32),
        boxes=jnp.zeros((batch, REGIONS, 4)),
        quality=jnp.asarray(positive, jnp.float32),
        regions=jnp.asarray(np.where(ignore[..., None], 0, boxes), jnp.float32),
    )


ASSIGNED = drawn_regions()


def batch_of(size: int = 2) -> dict:
    return {
        "image": np.zeros((size, SIDE, SIDE, 3), np.uint8),
        "boxes": np.tile(OBJECTS, (size, 1, 1)),
        "labels": np.tile(np.array([1, 2, 0], np.int32), (size, 1)),
        "valid": np.tile([True, True, False], (size, 1)),
        "image_size": np.full((size, 2), SIDE, np.int32),
    }


def propose(output, image_size):
    """The regions of the assignment, moved by a pixel; half of them exist."""
    del output
    shift = jnp.array([1.0, 0.0, 0.0, 1.0])
    boxes = jnp.minimum(ASSIGNED.regions + shift, image_size[:, None, :1].astype(jnp.float32))
    return boxes, jnp.broadcast_to(jnp.arange(REGIONS) % 2 == 0, boxes.shape[:2])


def model(seen: DetectorOutput, **more) -> Custom:
    shape = lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]) if x.ndim > 2 else x.shape, x.dtype)  # noqa: E731
    one = jax.tree.map(shape, seen)
    return Custom(spec=lambda size: one, observe=lambda variables, batch: seen, **more)


def distiller(*chosen: Method, student=STUDENT, teacher=TEACHER, **more) -> Distiller:
    return Distiller(model(student, assign=lambda *_: ASSIGNED), model(teacher, propose=propose), chosen, **more)


@functools.cache
def terms(name: str, equal: bool = False, **options) -> dict[str, float]:
    made = distiller(methods.build(name, **options), teacher=STUDENT if equal else TEACHER)

    def run():
        adapters = made.init(jax.random.key(0), (SIDE, SIDE))
        return made.terms(adapters, STUDENT, batch_of(), key=jax.random.key(1))

    return {term.partition("/")[2]: float(value) for term, value in quick_jit(run)().items()}


def logits() -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.float64(side.at(ASSIGNED.regions).logits) for side in (STUDENT, TEACHER))


def softmax(x) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def kl(p, q) -> float:
    return float((p * np.log(p / q)).sum())


# Logits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dkd_is_the_mean_over_all_regions_with_the_background(temperature):
    s, t = logits()
    target, others = [], []
    for b, r in np.argwhere(~np.asarray(ASSIGNED.ignore)):
        y = int(ASSIGNED.labels[b, r])
        rest = [k for k in range(CLASSES + 1) if k != y]
        p, q = softmax(t[b, r] / temperature), softmax(s[b, r] / temperature)
        target.append(temperature**2 * kl(np.array([p[y], 1 - p[y]]), np.array([q[y], 1 - q[y]])))
        others.append(temperature**2 * kl(softmax(t[b, r, rest] / temperature), softmax(s[b, r, rest] / temperature)))
    assert len(target) == 2 * REGIONS - 2 and (np.asarray(ASSIGNED.labels) == CLASSES).sum() > 4
    expected = {"target": pytest.approx(np.mean(target), rel=1e-4), "others": pytest.approx(np.mean(others), rel=1e-4)}
    found = terms("dkd", temperature=temperature)
    assert found == expected
    assert terms("yao", temperature=temperature, feature_weight=0.0, many_weight=0.0) == found
    assert methods.build("dkd").weights == {"target": 1.0, "others": 0.25}


@pytest.mark.parametrize("options", [{}, {"priors": "positive"}, {"temperature": 3.0}, {"class_reduction": "mean"}])
def test_hinton_is_the_mean_over_regions(options):
    s, t = logits()
    tau = options.get("temperature", 1.0)
    kept = np.asarray(ASSIGNED.positive if "priors" in options else ~ASSIGNED.ignore)
    each = [tau**2 * kl(softmax(t[b, r] / tau), softmax(s[b, r] / tau)) for b, r in np.argwhere(kept)]
    by = CLASSES + 1 if "class_reduction" in options else 1
    assert terms("hinton", **options) == {"classes": pytest.approx(np.mean(each) / by, rel=1e-4)}


def test_hinton_is_dkd_with_the_teachers_weight():
    """KL = TCKD + (1 - p_y) NCKD, region by region; here of one region."""
    s, t = logits()
    only = ASSIGNED._replace(ignore=jnp.ones_like(ASSIGNED.ignore).at[0, 3].set(False))
    made, key = distiller(methods.dkd(), methods.hinton()), jax.random.key(0)
    found = quick_jit(lambda: made.terms({"dkd": {}, "hinton": {}}, STUDENT, batch_of(), assignment=only, key=key))()
    y = int(ASSIGNED.labels[0, 3])
    share = 1 - softmax(t[0, 3])[y]
    assert float(found["hinton/classes"]) == pytest.approx(kl(softmax(t[0, 3]), softmax(s[0, 3])), rel=1e-4)
    assert float(found["hinton/classes"]) == pytest.approx(
        float(found["dkd/target"] + share * found["dkd/others"]), rel=1e-4
    )


align = quick_jit(functools.partial(roi.roi_align, strides=STRIDES, size=10))


# GID -----------------------------------------------------------------------------------------------------------------


def overlap(a, b) -> float:
    inter = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - inter
    return inter / union if union > 0 else 0.0


@pytest.mark.parametrize("by_class", [True, False], ids=["boxes of each class", "one box"])
def test_gid_equals_a_slow_loop(by_class):
    """Without the features' adapter, which the tests of dense heads cover."""
    sides = [output(i, 4, boxes_by_class=by_class) for i in range(2)]
    made = distiller(methods.gid(), student=sides[0], teacher=sides[1])
    eye = {"kernel": jnp.zeros((3, 3, 4, 4)).at[1, 1].set(jnp.eye(4)), "bias": jnp.zeros(4)}
    found = quick_jit(lambda: made.terms({"gid": eye}, sides[0], batch_of(), key=jax.random.key(1)))()
    said, regions = [side.at(ASSIGNED.regions) for side in sides], np.float64(ASSIGNED.regions)
    scores = [softmax(np.float64(side.logits)) for side in said]
    feature, cls, box, count, rows = 0.0, 0.0, 0.0, 0, 0

    def look(image: int, instances: list) -> list:
        at = jnp.asarray(np.resize(instances, (1, 10, 4)), jnp.float32)
        level = roi.roi_levels(at, 2, finest=14.0 * STRIDES[0])
        maps = [[m[image : image + 1] for m in side.neck] for side in sides]
        return [align(of, at, level)[0] for of in maps]

    for b in range(2):
        boxes, gaps = [], scores[1][b, :, :-1] - scores[0][b, :, :-1]
        best = np.abs(gaps).argmax(-1)
        likely = scores[1][b, :, :-1].argmax(-1) if by_class else np.zeros(REGIONS, int)
        for side in said:
            deltas = np.asarray(side.box_reg[b]).reshape(REGIONS, -1, 4)[np.arange(REGIONS), likely]
            boxes.append(np.float64(coding.deltas_to_boxes(regions[b], deltas, stds=(0.1, 0.1, 0.2, 0.2))))
        instances = []
        for r in sorted(range(REGIONS), key=lambda r: -np.abs(gaps[r]).max()):
            one = boxes[int(gaps[r, best[r]] > 0)][r]
            free = all(overlap(one, other) <= 0.3 for other in instances)
            if not ASSIGNED.ignore[b, r] and free and len(instances) < 10:
                instances.append(one)
        count += len(instances)
        looked = [np.float64(x)[: len(instances)] for x in look(b, instances)]
        feature += np.square(looked[0] - looked[1]).sum() / 100
        for r in np.flatnonzero(~np.asarray(ASSIGNED.ignore[b])):
            if max(overlap(regions[b, r], one) for one in instances) >= 0.5:
                rows += 1
                cls += kl(scores[1][b, r], scores[0][b, r])
                sides_of = np.tile(regions[b, r, 2:] - regions[b, r, :2], 2)
                box += (np.abs(boxes[0][r] - boxes[1][r]) / sides_of).sum()
    assert rows > 4
    expected = {"feature": feature / count, "class": cls / rows, "box": box / rows}
    assert {k: float(found[f"gid/{k}"]) for k in expected} == pytest.approx(expected, rel=1e-3)
    assert float(found["gid/relation"]) > 0


# DeFeat --------------------------------------------------------------------------------------------------------------

HEAD = {"head_foreground_weight": 2.0, "head_background_weight": 2.0}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_head_part_of_defeat_looks_at_the_teachers_proposals(temperature):
    boxes, valid = (np.asarray(x) for x in propose(None, np.full((2, 2), SIDE)))
    s, t = (np.float64(side.at(jnp.asarray(boxes)).logits) for side in (STUDENT, TEACHER))
    each = {"head_foreground": [], "head_background": []}
    for b, r in np.argwhere(valid):
        inside = max(overlap(boxes[b, r], box) for box in OBJECTS) >= 0.5
        divergence = temperature**2 * kl(softmax(t[b, r] / temperature), softmax(s[b, r] / temperature))
        each["head_foreground" if inside else "head_background"].append(divergence)
    assert all(len(values) > 2 for values in each.values())
    found = terms("defeat", temperature=temperature, **HEAD)
    assert {name: found[name] for name in each} == pytest.approx({k: np.mean(v) for k, v in each.items()}, rel=1e-4)
    plain = terms("defeat")
    assert plain == {name: pytest.approx(found[name]) for name in ("foreground", "background")}
    assert set(methods.build("defeat", **HEAD).weights) == {*each, *plain}


# All of them ---------------------------------------------------------------------------------------------------------

ON_REGIONS = {"dkd": {}, "hinton": {}, "yao": {"feature_weight": 0.0, "many_weight": 0.0}, "gid": {}, "defeat": HEAD}


def test_equal_detectors_differ_in_nothing():
    for name, options in ON_REGIONS.items():
        found = terms(name, equal=True, **options)
        of_logits = {k: v for k, v in found.items() if k not in ("feature", "relation", "foreground", "background")}
        assert of_logits and all(abs(value) < 1e-6 for value in of_logits.values()), (name, found)


@pytest.fixture(scope="module")
def everything():
    """The distiller of all methods on regions, their parameters, and (student, observed, assignment) -> terms."""
    made = distiller(*(methods.build(name, **options) for name, options in ON_REGIONS.items()))
    adapters = jax.tree.map(jnp.asarray, made.init(jax.random.key(0), (SIDE, SIDE)))

    def run(student, observed, assignment, batch):
        return made.terms(
            adapters, student, batch, observed=observed, assignment=assignment, key=jax.random.key(1), step=0
        )

    return made, adapters, run


def test_every_term_pulls_at_the_student_and_none_at_the_teacher(everything):
    made, _, run = everything
    observed = made.observe(batch_of())

    @quick_jit
    def gradients(student, observed):
        values, pull_back = jax.vjp(lambda *sides: run(*sides, ASSIGNED, batch_of()), student, observed)
        each = dict(zip(values, jnp.eye(len(values)), strict=True))
        return each, jax.vmap(lambda one: pull_back(one))(each)

    each, pulled = gradients(STUDENT, observed)
    for number, name in enumerate(each):
        of_student, of_teacher = jax.tree.map(lambda leaf: leaf[number], pulled)  # noqa: B023
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_teacher)), name
        weights = of_student.at.args[0]
        of_boxes = name == "gid/box"
        of_maps = name.partition("/")[2] in ("feature", "relation", "foreground", "background")
        assert np.any(weights["logits"]) == (not of_maps and not of_boxes), name
        assert np.any(weights["deltas"]) == of_boxes, name
        assert of_maps == any(np.any(m) for m in of_student.neck), name
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(of_student)), name


def test_missing_regions_and_their_order_change_nothing(everything):
    _, _, run = everything
    order = np.random.default_rng(0).permutation(REGIONS)
    moved = jax.tree.map(lambda x: x[:, order], ASSIGNED)
    other = ASSIGNED._replace(regions=jnp.where(ASSIGNED.ignore[..., None], 7.0, ASSIGNED.regions))
    value = quick_jit(lambda assignment: run(STUDENT, TEACHER, assignment, batch_of()))
    plain, *others = (value(assignment) for assignment in (ASSIGNED, moved, other))
    for found in others:
        assert jax.tree.map(float, found) == pytest.approx(jax.tree.map(float, plain), rel=1e-4)


def test_ten_images_equal_five_and_five(everything):
    """Means over regions: the terms of two halves with equally many regions, averaged, are those of the whole.

    The halves may be mapped over, or lie on two devices.
    """
    _, adapters, _ = everything
    sides = [output(i, c, batch=10) for i, c in ((0, 4), (1, 5))]
    assigned = drawn_regions(10)._replace(ignore=jnp.zeros((10, REGIONS), bool))
    assigned = assigned._replace(labels=jnp.tile(assigned.labels[:1], (10, 1)))
    made = distiller(methods.dkd(), methods.hinton())

    def run(student, teacher, assignment, batch):
        return made.terms(adapters, student, batch, observed=teacher, assignment=assignment, key=jax.random.key(0))

    def part(tree, start, end):
        return jax.tree.map(lambda x: x[start:end] if len(x) == 10 else x, tree)

    arguments = (*sides, assigned, batch_of(10))
    once = quick_jit(run)
    whole, *halves = (once(*(part(a, *ends) for a in arguments)) for ends in ((0, 10), (0, 5), (5, 10)))
    for name, value in whole.items():
        assert float(value) == pytest.approx(float(halves[0][name] + halves[1][name]) / 2, rel=1e-5)
        assert float(halves[0][name]) != float(halves[1][name])
    axes = jax.tree.map(lambda x: 0 if len(x) == 10 else None, arguments)
    by_half = jax.tree.map(lambda x: x.reshape(2, 5, *x.shape[1:]) if len(x) == 10 else x, arguments)
    for mapped in (quick_jit(jax.vmap(run, axes)), jax.pmap(run, in_axes=axes, devices=jax.devices()[:2])):
        for name, values in mapped(*by_half).items():
            assert values.tolist() == pytest.approx([float(half[name]) for half in halves], rel=1e-5)


def test_devices_change_nothing():
    sides = [output(i, c, batch=8) for i, c in ((0, 4), (1, 6))]
    made = distiller(methods.dkd(), methods.hinton())
    adapters = made.init(jax.random.key(0), (SIDE, SIDE))

    def run(necks, assignment):
        student, teacher = (
            dataclasses.replace(side, neck=neck, at=jax.tree_util.Partial(second_stage, side.at.args[0], neck[0]))
            for side, neck in zip(sides, necks, strict=True)
        )
        return made.terms(
            adapters, student, batch_of(8), observed=teacher, assignment=assignment, key=jax.random.key(0)
        )

    arrays = tuple(side.neck for side in sides), drawn_regions(8)
    leaves, tree = jax.tree.flatten(arrays)
    one = quick_jit(run)(*arrays)
    eight = on_shards(lambda *leaves: run(*jax.tree.unflatten(tree, leaves)), *leaves)
    assert jax.tree.map(float, eight) == pytest.approx(jax.tree.map(float, one), rel=1e-4)


# The seam ------------------------------------------------------------------------------------------------------------


def test_both_sides_are_asked_about_the_students_regions():
    seen = []

    def probe(params, context):
        seen.append(context)
        return {"nothing": jnp.zeros(())}

    names = ("rows.logits", "rows.boxes", "rows.location")
    method = Method(lambda *_: {}, probe, {"nothing": 1.0}, Reads((*names, "assignment"), names), name="probe")
    distiller(method).terms({"probe": {}}, STUDENT, batch_of(), key=jax.random.key(0))
    (context,) = seen
    best = jnp.argmax(TEACHER.at(ASSIGNED.regions).logits[..., :-1], -1)
    for side, rows in ((STUDENT, context.student_rows), (TEACHER, context.teacher_rows)):
        said = side.at(ASSIGNED.regions)
        np.testing.assert_array_equal(rows.logits, said.logits)
        deltas = jnp.take_along_axis(said.box_reg.reshape(2, REGIONS, CLASSES, 4), best[..., None, None], 2)[:, :, 0]
        expected = coding.deltas_to_boxes(ASSIGNED.regions, deltas, stds=coding.REGION_STDS)
        np.testing.assert_allclose(rows.boxes, expected, rtol=1e-6)
        corners = jnp.concatenate([rows.location[..., :2] - rows.location[..., 2:] / 2, rows.location[..., 2:]], -1)
        np.testing.assert_allclose(corners[..., :2], ASSIGNED.regions[..., :2], atol=1e-5)
        assert rows.form == "softmax" and rows.level_sizes == ()
    np.testing.assert_array_equal(context.assignment.regions, ASSIGNED.regions)
    assert context.student.at is None and context.teacher.at is None, "a method sees rows, not stages"
    # Other targets are matched to the same regions.
    matched = context.assign(targets_of(batch_of()))
    assert matched.labels.shape == ASSIGNED.labels.shape and bool(jnp.any(matched.positive))
    assert not bool(jnp.any(matched.positive & ASSIGNED.ignore))


def test_the_second_stage_is_observed_only_where_rows_are_read():
    kept = {
        name: taps.only(TEACHER, names).at for name, names in (("rows", ["neck", "rows.logits"]), ("maps", ["neck"]))
    }
    assert kept["rows"] is not None and kept["maps"] is None
    assert "rows.logits" in taps.taps(TEACHER) and "rows.quality" not in taps.taps(TEACHER)
    of_maps, of_rows = (distiller(*chosen).observe(batch_of()) for chosen in ([methods.cwd()], [methods.dkd()]))
    assert of_maps.at is None and of_maps.neck and of_rows.at is not None and not of_rows.neck


def refusal(method: Method, **sides) -> str:
    with pytest.raises(UserError) as caught:
        distiller(method, **sides).init(jax.random.key(0), (SIDE, SIDE))
    return str(caught.value)


PRIORS = DetectorOutput(
    strides=STRIDES,
    neck=TEACHER.neck,
    rows=Rows(logits=jnp.zeros((2, 80, CLASSES)), boxes=jnp.zeros((2, 80, 4)), location=np.ones((80, 4), np.float32)),
)


@pytest.mark.parametrize("name", ["dkd", "hinton", "yao", "gid"])
def test_regions_and_priors_are_not_compared(name):
    found = refusal(methods.build(name), teacher=PRIORS)
    assert found.startswith(f"{name}: predictions are compared row by row, and the rows of the student are regions, ")
    found = refusal(methods.build(name), student=PRIORS)
    assert "the rows of the student are priors, those of the teacher regions: take two detectors with two" in found


def test_what_cannot_be_compared_is_told_before_anything_is_computed():
    assert refusal(methods.dkd(), teacher=output(1, 6, classes=5)) == (
        "dkd: the second stage of the student knows 3 classes and that of the teacher 5: the classes must be the same"
    )
    for name in ("dkd", "hinton", "yao"):
        assert refusal(methods.build(name, head="sigmoid")) == (
            f"{name}: head is 'sigmoid', but the student's regions have softmax scores: leave head out"
        )
    blind = types.SimpleNamespace(spec=model(TEACHER).spec, observe=model(TEACHER).observe)
    with pytest.raises(UserError, match=r"^defeat: the method reads the teacher's proposals, which this teacher does"):
        Distiller(model(STUDENT), blind, [methods.defeat(**HEAD)]).init(jax.random.key(0), (SIDE, SIDE))
    assert refusal(methods.defeat(**HEAD), teacher=PRIORS, student=PRIORS) == (
        "defeat: the teacher's proposals are compared, which needs a student and a teacher with two stages"
    )
    assert refusal(methods.dkd(), teacher=DetectorOutput(strides=STRIDES, neck=TEACHER.neck)).startswith(
        "dkd: teacher: tap 'rows.logits': this model has no such tap"
    )
    with pytest.raises(UserError, match=r"^student: it has two stages, but its assignment has no `regions`"):
        distiller(methods.dkd()).terms(
            {"dkd": {}}, STUDENT, batch_of(), assignment=ASSIGNED._replace(regions=None), key=jax.random.key(0)
        )
    with pytest.raises(UserError, match=r"^teacher: the rows of the student are regions, about which this teacher can"):
        distiller(methods.dkd()).terms(
            {"dkd": {}}, STUDENT, batch_of(), observed=PRIORS, assignment=ASSIGNED, key=jax.random.key(0)
        )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rm", "RM ranks all priors of one object"),
        ("pfi", "PFI weights the cells of a map"),
        ("ld", "LD compares box edges as distributions"),
        ("crosskd", "CrossKD enters the tower of a head"),
        ("bckd", "BCKD is made for the sigmoid scores"),
    ],
)
def test_methods_of_one_stage_say_why(name, words):
    for role, sides in (("student", {"teacher": PRIORS}), ("teacher", {"student": PRIORS})):
        assert refusal(methods.build(name), **sides).startswith(f"{name}: the {role} has two stages: {words}")


def test_a_teacher_on_the_host_is_not_asked_about_regions():
    plain = dataclasses.replace(TEACHER, at=None)
    teacher = on_host(lambda images: plain, model(plain).spec)
    made = Distiller(model(STUDENT, assign=lambda *_: ASSIGNED), teacher, [methods.dkd()])
    with pytest.raises(UserError, match=r"^dkd: teacher: tap 'rows.logits': this model has no such tap"):
        made.init(jax.random.key(0), (SIDE, SIDE))
