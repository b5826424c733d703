"""Methods on the predictions of dense heads (RM, PFI, DKD, Hinton, LD, CrossKD, BCKD) and Yao 2025, against NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import detectors, methods
from kdjax.boxes import assign
from kdjax.distill import Method
from kdjax.errors import UserError
from kdjax.losses import regions
from tests.support import methods as made
from tests.support.arrays import quick_jit
from tests.support.methods import Scene, apply, init

SIZE, BINS, CLASSES = 64, 5, made.CLASSES
PREDICTORS = ("rtm_cls", "rtm_reg")  # of RTMDet's head
NAMES = ("rm", "pfi", "dkd", "hinton", "ld", "crosskd", "bckd", "yao")


def edge_head(features, *, branch: str, start: int):
    """The made-up teacher's head with distributions of box edges."""
    width = CLASSES if branch == "cls" else 4 * BINS
    return tuple(jax.nn.silu(f) @ jnp.sin(jnp.arange(f.shape[-1] * width) + 0.5).reshape(-1, width) for f in features)


def output(seed: int, channels: int, bins: int = 1):
    """What `made.output` gives, with numbers drawn by NumPy: nothing is compiled."""
    shapes = functools.partial(made.output, channels=channels, size=SIZE, bins=bins)
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda x: rng.normal(size=x.shape), jax.eval_shape(shapes, jax.random.PRNGKey(0)))
    boxes = drawn.box_reg if bins > 1 else tuple(4 * np.exp(m) for m in drawn.box_reg)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), dataclasses.replace(drawn, box_reg=boxes))


@functools.cache
def scene(*, bins: int = 1, channels: int = 4) -> Scene:
    """Two images; in the second one object has no positive prior, and some priors are ignored."""
    context = made.scene(output(0, 4, bins), output(1, channels, bins), size=SIZE)
    kept = jnp.ones_like(context.assignment.positive).at[1].set(context.assignment.matched[1] != 1)
    assignment = context.assignment._replace(
        matched=jnp.where(kept, context.assignment.matched, -1),
        positive=context.assignment.positive & kept,
        ignore=jnp.zeros_like(kept).at[1, ::3].set(True) & ~context.assignment.positive,
        labels=jnp.where(kept, context.assignment.labels, CLASSES),
        boxes=context.assignment.boxes * kept[..., None],
    )
    return context._replace(assignment=assignment, teacher_head=edge_head if bins > 1 else made.head)


def terms(name: str, context: Scene, **options) -> dict[str, float]:
    method = methods.build(name, **options)
    params = init(method, context)
    return {term: float(value) for term, value in apply(method, params, context).items()}


def compiled(name: str, context: Scene, **options) -> dict[str, float]:
    """The same as one program, which is faster for shapes that come once; and it must be the same."""
    method = methods.build(name, **options)
    params = init(method, context)
    return made.values(method, params, context)


def trained(name: str, context: Scene, **options) -> dict:
    """The shapes of what a method trains."""
    return jax.tree.map(lambda x: x.shape, jax.eval_shape(lambda: init(methods.build(name, **options), context)))


def pulled_at(method: Method, context: Scene, fields: tuple[str, ...]) -> set[str]:
    """Which of the student's fields get a gradient from a method that trains nothing beside."""

    def total(student):
        return sum(apply(method, {}, context._replace(student=student)).values())

    gradient = quick_jit(jax.grad(total))(context.student)
    return {field for field in fields if any(np.any(m) for m in jax.tree.leaves(getattr(gradient, field)))}


# ------------------------------------------------------------------------------------------------- formulas in NumPy


def rows(maps, width: int = CLASSES) -> np.ndarray:
    return np.concatenate([np.float64(m).reshape(len(m), -1, width) for m in maps], 1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(student, teacher, temperature: float = 1.0) -> np.ndarray:
    """The terms of the sum over the last axis."""
    p, q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    return temperature**2 * np.exp(p) * (p - q)


def two_kl(student, teacher, temperature: float = 1.0) -> np.ndarray:
    p, q = sigmoid(teacher / temperature), sigmoid(student / temperature)
    return temperature**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))


def gap_bce(student, teacher) -> np.ndarray:
    p, q = sigmoid(teacher), sigmoid(student)
    return np.abs(p - q) * -(p * np.log(q) + (1 - p) * np.log(1 - q))


def overlap(a, b) -> tuple[np.ndarray, np.ndarray]:
    """IoU and GIoU of boxes at the same places; areas of inverted ones keep their sign."""

    def area(low, high, positive):
        sides = high - low
        return np.prod(np.maximum(sides, 0) if positive else sides, -1)

    a, b = np.float64(a), np.float64(b)
    inner = area(np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:]), True)
    hull = area(np.minimum(a[..., :2], b[..., :2]), np.maximum(a[..., 2:], b[..., 2:]), True)
    union = np.maximum(sum(area(x[..., :2], x[..., 2:], False) for x in (a, b)) - inner, 1e-6)
    return inner / union, inner / union - (hull - union) / np.maximum(hull, 1e-6)


def masks(context: Scene) -> tuple[np.ndarray, np.ndarray]:
    return np.array(context.assignment.positive), ~np.array(context.assignment.ignore)


def level_slices(context: Scene) -> list[slice]:
    ends = np.cumsum([m.shape[1] * m.shape[2] for m in context.student.cls_logits])
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


# ------------------------------------------------------------------------------------------------------- RM and PFI


def expected_rank(context, *, theta=1.0, quality="cls", per_image=False) -> float:
    z = rows(context.student.cls_logits), rows(context.teacher.cls_logits)
    boxes = context.decode_student(context.student), context.decode_teacher(context.teacher)
    matched, labels = np.array(context.assignment.matched), np.array(context.assignment.labels)
    values = []
    for b in range(2):
        values.append([])
        for j in range(made.BOXES):
            owned = np.flatnonzero(matched[b] == j)
            if len(owned):
                scores = []
                for side in range(2):
                    score = sigmoid(z[side][b, owned, labels[b, owned[0]]])
                    iou = overlap(boxes[side][b, owned], context.assignment.boxes[b, owned])[0]
                    scores.append({"cls": score, "iou": iou, "cls*iou": score * iou}[quality] / theta)
                values[b].append(kl(*scores).sum())
    return np.mean([np.mean(v) for v in values]) if per_image else np.mean(values[0] + values[1])


@pytest.mark.parametrize(
    "options", [{}, dict(theta=0.2), dict(quality="iou"), dict(quality="cls*iou"), dict(per_image=True)], ids=str
)
def test_rm_equals_a_loop_over_objects(options):
    found = terms("rm", scene(), **options)
    assert found == {"rank": pytest.approx(expected_rank(scene(), **options), rel=2e-4)}
    assert found["rank"] > 0


def test_rm_charges_a_reversed_ranking_and_does_not_calibrate():
    context = scene()
    teacher = context.teacher
    turned = dataclasses.replace(teacher, cls_logits=tuple(-m for m in teacher.cls_logits))
    assert terms("rm", context._replace(student=teacher))["rank"] < 1e-6
    assert terms("rm", context._replace(student=turned))["rank"] > 0.01


def expected_pfi(context, *, space="logits", form="mean", normalize_guide=False) -> float:
    levels = []
    for s, t, zs, zt in zip(
        *(context.student.neck, context.teacher.neck, context.student.cls_logits, context.teacher.cls_logits),
        strict=True,
    ):
        s, t, zs, zt = (np.float64(x) for x in (s, t, zs, zt))
        guide = np.square(sigmoid(zs) - sigmoid(zt) if space == "probs" else zs - zt).mean(-1)
        guide = guide / guide.mean() if normalize_guide else guide
        cells = guide * np.square(s - t).mean(-1)
        norms = np.sqrt(np.square(cells).sum((1, 2))) / cells[0].size
        levels.append(norms.mean() if form == "norm" else cells.mean())
    return np.mean(levels)


@pytest.mark.parametrize("options", [{}, dict(space="probs"), dict(form="norm"), dict(normalize_guide=True)], ids=str)
def test_pfi_equals_numpy(options):
    assert terms("pfi", scene(), **options) == {"feature": pytest.approx(expected_pfi(scene(), **options), rel=1e-5)}


def test_pfi_pulls_at_predictions_unless_the_guide_is_detached():
    context = scene()

    def pulls(**options):
        method = methods.build("pfi", **options)
        return pulled_at(method, context, ("neck", "cls_logits", "box_reg"))

    assert pulls() == {"neck", "cls_logits"}
    assert pulls(detach_guide=True) == {"neck"}
    assert terms("pfi", context, detach_guide=True) == terms("pfi", context)
    swapped = context._replace(student=context.teacher, teacher=context.student)
    assert terms("pfi", swapped)["feature"] == pytest.approx(terms("pfi", context)["feature"], rel=1e-6)


def test_pfi_needs_predictions_on_the_grid_of_the_features():
    context = scene()
    coarse = dataclasses.replace(context.teacher, neck=tuple(m[:, ::2, ::2] for m in context.teacher.neck))
    with pytest.raises(UserError, match=r"cell by cell.*stride 8"):
        terms("pfi", context._replace(teacher=coarse))


# -------------------------------------------------------------------------------------------------- DKD and Hinton


def expected_decoupled(context, *, head="sigmoid", temperature=1.0) -> tuple[float, float]:
    s, t = rows(context.student.cls_logits), rows(context.teacher.cls_logits)
    labels, target, others = np.array(context.assignment.labels), [], []
    for b, i in np.argwhere(np.array(context.assignment.positive)):
        y = labels[b, i]
        rest = [k for k in range(CLASSES) if k != y]
        others.append(kl(s[b, i, rest], t[b, i, rest], temperature).sum())
        if head == "sigmoid":
            target.append(two_kl(s[b, i, y], t[b, i, y]))
        else:
            p, q = (np.exp(log_softmax(x[b, i] / temperature))[y] for x in (t, s))
            target.append(temperature**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))))
    return np.mean(target), np.mean(others)


@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_dkd_equals_a_loop_over_positives(head, temperature):
    target, others = expected_decoupled(scene(), head=head, temperature=temperature)
    found = terms("dkd", scene(), head=head, temperature=temperature)
    assert found == {"target": pytest.approx(target, rel=1e-4), "others": pytest.approx(others, rel=1e-4)}
    logits = terms("yao", scene(), head=head, temperature=temperature, feature_weight=0.0, many_weight=0.0)
    assert logits == found


def test_dkd_weights_and_shift():
    weights = methods.build("dkd", weight=2.0, target_weight=3.0, other_weight=0.5).weights
    assert {k: float(v) for k, v in weights.items()} == {"target": 6.0, "others": 1.0}
    assert set(terms("dkd", scene(), target_weight=0.0)) == {"others"}
    shifted = shift(scene())
    for head, same in (("softmax", {"target", "others"}), ("sigmoid", {"others"})):
        before, after = terms("dkd", scene(), head=head), terms("dkd", shifted, head=head)
        assert {name for name in before if after[name] == pytest.approx(before[name], rel=1e-4)} == same


def shift(context: Scene, by: float = 2.0) -> Scene:
    """Adds one number to all class logits and, of distributions, to all logits of box edges."""
    student = context.student
    logits = {"cls_logits": tuple(m + by for m in student.cls_logits)}
    if student.box_reg[0].shape[-1] > 4:
        logits["box_reg"] = tuple(m + by for m in student.box_reg)
    return context._replace(student=dataclasses.replace(student, **logits))


@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    "options", [{}, dict(priors="all"), dict(temperature=3.0), dict(class_reduction="mean")], ids=str
)
def test_hinton_equals_numpy(head, options):
    context = scene()
    positive, scored = masks(context)
    s, t = rows(context.student.cls_logits), rows(context.teacher.cls_logits)
    by_class = (two_kl if head == "sigmoid" else kl)(s, t, options.get("temperature", 1.0))
    by_prior = by_class.mean(-1) if "class_reduction" in options else by_class.sum(-1)
    compared = scored if "priors" in options else positive
    count = positive.sum() if head == "sigmoid" else compared.sum()
    found = terms("hinton", context, head=head, **options)
    assert found == {"classes": pytest.approx(by_prior[compared].sum() / count, rel=1e-4)}
    after = terms("hinton", shift(context), head=head, **options)
    assert (after["classes"] == pytest.approx(found["classes"], rel=1e-4)) == (head == "softmax")


# --------------------------------------------------------------------------------------------------------------- LD


def expected_ld(
    context,
    *,
    temperature=10.0,
    class_temperature=2.0,
    gamma=0.25,
    anchor_scale=8.0,
    candidates=9,
    normalizer="weights",
):
    positive, scored = masks(context)
    edges = (rows(out.box_reg, 4 * BINS).reshape(2, -1, 4, BINS) for out in (context.student, context.teacher))
    edge_kl = kl(*edges, temperature).mean(-1).mean(-1)
    s, t = rows(context.student.cls_logits), rows(context.teacher.cls_logits)
    weight = sigmoid(s).max(-1) * positive
    x, y, stride, _ = np.array(context.priors).T
    half = anchor_scale * stride / 2
    anchors = np.stack([x - half, y - half, x + half, y + half], -1)
    slices, truth = level_slices(context), context.targets
    sizes = [level.stop - level.start for level in slices]
    *_, threshold = assign.atss_candidates(anchors, truth.boxes, level_sizes=sizes, topk=candidates)
    region = np.float64(regions.valuable_region(anchors, truth.boxes, truth.valid, threshold, gamma=gamma))
    total = max(weight.sum(), 1) if normalizer == "weights" else 1.0
    class_kl = kl(s, t, class_temperature).mean(-1) * positive
    return {
        "main": (weight * edge_kl).sum() / total,
        "region": (region * scored * edge_kl).sum() / total,
        "classes": sum(class_kl[:, at].sum() / max(positive[:, at].sum(), 1) for at in slices),
    }


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({}, []),
        (dict(temperature=3.0), ["main", "region"]),
        (dict(normalizer="sum"), ["main", "region"]),
        (dict(class_temperature=8.0), ["classes"]),
        (dict(gamma=0.6), ["region"]),
        (dict(anchor_scale=4.0), ["region"]),
        (dict(candidates=3), ["region"]),
    ],
    ids=str,
)
def test_ld_equals_numpy(options, changed):
    context = scene(bins=BINS)
    found, plain = terms("ld", context, **options), expected_ld(context)
    assert found == pytest.approx(expected_ld(context, **options), rel=2e-4)
    assert [name for name in plain if found[name] != pytest.approx(plain[name], rel=1e-3)] == changed
    assert all(value > 0 for value in found.values())


def test_ld_weights_shift_and_confidence():
    method = methods.build("ld", weight=2.0)
    assert method.weights == {"main": 0.5, "region": 0.125, "classes": 20.0}
    context = scene(bins=BINS)
    edges_alone = dict(class_weight=0.0, main_weight=0.0)
    assert set(terms("ld", context, **edges_alone)) == {"region"}
    before, after = (terms("ld", c, normalizer="sum") for c in (context, shift(context)))
    assert {name for name in before if after[name] == pytest.approx(before[name], rel=1e-3)} == {"region", "classes"}
    edges = methods.build("ld", class_weight=0.0)
    assert pulled_at(edges, context, ("cls_logits", "box_reg")) == {"box_reg"}, "the confidence is detached"


def several_anchors(out, count: int):
    """The output of a head with more anchors at every cell."""
    maps = {field: tuple(jnp.tile(m, count) for m in getattr(out, field)) for field in ("cls_logits", "box_reg")}
    return dataclasses.replace(out, anchors=count, **maps)


def test_ld_refuses_heads_without_distributions():
    plain, context = scene(), scene(bins=BINS)
    needed = "^ld: {}: tap 'rows.distribution': .*needs box edges as distributions over bins, as GFL"
    with pytest.raises(UserError, match=needed.format("student")):
        terms("ld", plain)
    with pytest.raises(UserError, match=needed.format("teacher")):
        terms("ld", context._replace(teacher=plain.teacher))
    fewer = dataclasses.replace(context.teacher, box_reg=tuple(m[..., :16] for m in context.teacher.box_reg))
    with pytest.raises(UserError, match=r"^ld: .*5 bins \(student\) and 4 \(teacher\)"):
        terms("ld", context._replace(teacher=fewer))
    # Five anchors a cell with one number an edge are not one anchor with five bins.
    several = {side: several_anchors(getattr(plain, side), BINS) for side in ("student", "teacher")}
    assert several["student"].box_reg[0].shape == context.student.box_reg[0].shape
    with pytest.raises(UserError, match=needed.format("student")):
        terms("ld", context._replace(**several))


# ---------------------------------------------------------------------------------------------------------- CrossKD


def expected_crosskd(context, *, conv=0, rectify=False, box_loss="giou", confidence=True):
    positive, scored = masks(context)
    found = {}
    for branch in ("cls", "reg"):
        features = []
        towers = [getattr(out, f"{branch}_tower")[conv] for out in (context.student, context.teacher)]
        for s, t in zip(*towers, strict=True):
            s, t = (np.maximum(x, 0) if rectify else np.float64(x) for x in (s, t))
            moments = [(x.mean((0, 1, 2)), x.std((0, 1, 2), ddof=1)) for x in (s, t)]
            features.append((s - moments[0][0]) / (moments[0][1] + 1e-6) * moments[1][1] + moments[1][0])
        features = [jnp.asarray(f, jnp.float32) for f in features]
        found[branch] = context.teacher_head(features, branch=branch, start=conv + 1)
    teacher = rows(context.teacher.cls_logits)
    count = np.maximum(positive.sum(1), 1).sum()
    trust = sigmoid(teacher).max(-1) * scored if confidence else scored
    classes = (gap_bce(rows(found["cls"]), teacher) * scored[..., None]).sum() / count
    if found["reg"][0].shape[-1] > 4:
        edges = [rows(m, 4 * BINS).reshape(2, -1, 4, BINS) for m in (found["reg"], context.teacher.box_reg)]
        return {"classes": classes, "boxes": (trust * kl(*edges).sum(-1).mean(-1)).sum() / trust.sum()}
    boxes = [
        context.decode_teacher(dataclasses.replace(context.teacher, box_reg=m))
        for m in (tuple(found["reg"]), context.teacher.box_reg)
    ]
    iou, giou = overlap(*boxes)
    apart = 1 - giou if box_loss == "giou" else -np.log(np.maximum(iou, 1e-6))
    return {"classes": classes, "boxes": (trust * apart).sum() / count}


@pytest.mark.parametrize(
    ("options", "reading"),
    [
        ({}, {}),
        (dict(student="tower.1", teacher="tower.-1"), dict(conv=1)),
        (dict(rectify=True), dict(rectify=True)),
        (dict(box_loss="log_iou"), dict(box_loss="log_iou")),
        (dict(confidence=False), dict(confidence=False)),
    ],
    ids=str,
)
def test_crosskd_equals_numpy(options, reading):
    assert terms("crosskd", scene(), **options) == pytest.approx(expected_crosskd(scene(), **reading), rel=3e-4)


def test_crosskd_takes_distributions_by_the_number_of_channels():
    context = scene(bins=BINS)
    assert terms("crosskd", context) == pytest.approx(expected_crosskd(context), rel=3e-4)
    assert set(terms("crosskd", context, box_weight=0.0)) == {"classes"}


@pytest.mark.parametrize("tower", ["cls", "reg"])
def test_crosskd_compares_the_quality_behind_its_tower(tower):
    context = scene()

    def head(features, *, branch, start):
        assert (branch, start) == ("quality", 1)
        return tuple(m[..., :1] for m in made.head(features, branch="cls", start=start))

    sides = {
        who: dataclasses.replace(out, quality=tuple(m[..., :1] for m in out.cls_logits), quality_tower=tower)
        for who, out in (("student", context.student), ("teacher", context.teacher))
    }
    alone = {"class_weight": 0.0, "box_weight": 0.0, "quality_weight": 2.0}
    (value,) = terms("crosskd", context._replace(**sides, teacher_head=head), **alone).values()
    features = []
    for s, t in zip(*(getattr(out, f"{tower}_tower")[0] for out in sides.values()), strict=True):
        s, t = np.float64(s), np.float64(t)
        centred = (s - s.mean((0, 1, 2))) / (s.std((0, 1, 2), ddof=1) + 1e-6)
        features.append(jnp.asarray(centred * t.std((0, 1, 2), ddof=1) + t.mean((0, 1, 2)), jnp.float32))
    found, own = (rows(m, 1)[..., 0] for m in (head(features, branch="quality", start=1), sides["teacher"].quality))
    p, q = sigmoid(own), sigmoid(found)
    entropy = -(p * np.log(q) + (1 - p) * np.log(1 - q))
    positive, _ = masks(context)
    assert value == pytest.approx((positive * entropy).sum() / np.maximum(positive.sum(1), 1).sum(), rel=3e-4)
    with pytest.raises(UserError, match=r"^crosskd: teacher: tap 'quality': .*no such tap"):
        terms("crosskd", context, quality_weight=1.0)


def test_crosskd_trains_the_student_below_the_cut_alone():
    context = scene()
    method = methods.build("crosskd")
    params = init(method, context)
    assert params == {"cls": {}, "reg": {}}
    loss = quick_jit(jax.value_and_grad(lambda s: sum(apply(method, params, context._replace(student=s)).values())))
    value, gradient = loss(context.student)
    fields = ("neck", "cls_tower", "reg_tower", "cls_logits", "box_reg")
    assert {f for f in fields if any(np.any(m) for m in jax.tree.leaves(getattr(gradient, f)))} == {
        "cls_tower",
        "reg_tower",
    }
    assert not np.any(gradient.cls_tower[1][0])
    towers = {
        field: (tuple(3 * m - 1 for m in getattr(context.student, field)[0]), getattr(context.student, field)[1])
        for field in ("cls_tower", "reg_tower")
    }
    assert float(loss(dataclasses.replace(context.student, **towers))[0]) == pytest.approx(float(value), rel=1e-4)


def test_crosskd_adapters_and_cuts():
    context = scene(channels=6)
    one = {"kernel": (1, 1, 4, 6), "bias": (6,)}
    shapes = {branch: {"8": one, "16": one, "32": one} for branch in ("cls", "reg")}
    assert trained("crosskd", context) == shapes
    assert trained("crosskd", context, student="neck", teacher="neck") == shapes
    assert trained("crosskd", context, box_weight=0.0) == {"cls": shapes["cls"]}
    for cut, message in (
        ("tower.2", "teacher: tap 'cls_tower.2': .*no such tap.*cls_tower.0, cls_tower.1"),
        ("tower.-3", "teacher: tap 'cls_tower.-3': .*no such tap"),
        ("cls_tower.0", "teacher is 'cls_tower.0': it must be 'neck' or 'tower.I'"),
        ("tower.x", "teacher is 'tower.x': it must be 'neck' or 'tower.I'"),
    ):
        with pytest.raises(UserError, match=f"^crosskd: {message}"):
            terms("crosskd", context, teacher=cut)


def test_crosskd_enters_the_head_of_rtmdet():
    """A student that is its teacher reproduces what the teacher's head predicts from the cut on."""
    detector = detectors.build("rtmdet_pico", CLASSES)
    params, stats = detector.init(jax.random.PRNGKey(1))
    # The predictors' kernels start almost silent: louder ones tell more.
    head = params["bbox_head"]
    loud = {name: jax.tree.map(lambda x: x if x.ndim == 1 else 30 * x, head[name]) for name in PREDICTORS}
    params["bbox_head"] = head | loud
    plain, other = (output(seed, 32) for seed in (5, 6))
    method = methods.build("crosskd")

    @quick_jit
    def values(params, plain, other):
        def head(features, **where):
            return detector.head(params, stats, features, **where)

        towers = {"cls": plain.cls_tower[0], "reg": plain.reg_tower[0]}
        classes, boxes = (head(towers[branch], branch=branch, start=1) for branch in ("cls", "reg"))
        teacher = dataclasses.replace(plain, cls_logits=classes, box_reg=boxes)
        context = made.scene(teacher, teacher, size=SIZE)._replace(
            decode_teacher=detector.decode_boxes, teacher_head=head
        )
        adapters = {"cls": {}, "reg": {}}
        return [apply(method, adapters, context._replace(student=s)) for s in (teacher, other)], boxes

    (same, different), boxes = values(params, plain, other)
    assert min(float(m.min()) for m in boxes) > 0, "no box is inverted, so equal boxes overlap fully"
    assert {k: float(v) for k, v in same.items()} == pytest.approx({"classes": 0.0, "boxes": 0.0}, abs=1e-5)
    assert min(map(float, different.values())) > 5e-4


# ------------------------------------------------------------------------------------------------------------- BCKD


def expected_bckd(context, *, overlap_mode="giou", gate=False):
    positive, scored = masks(context)
    if gate:
        levels = level_slices(context)
        scored = scored & np.concatenate([np.full(at.stop - at.start, positive[:, at].any()) for at in levels])
    s, t = rows(context.student.cls_logits), rows(context.teacher.cls_logits)
    gap = np.abs(sigmoid(s) - sigmoid(t)).max(-1)
    iou, giou = overlap(context.decode_student(context.student), context.decode_teacher(context.teacher))
    apart = 1 - (giou if overlap_mode == "giou" else iou)
    count = max(positive.sum(), 1)
    return {"classes": (gap_bce(s, t).sum(-1) * scored).sum() / count, "boxes": (gap * apart * scored).sum() / count}


def test_bckd_equals_numpy():
    context = scene()
    assert terms("bckd", context) == pytest.approx(expected_bckd(context), rel=1e-4)
    assert terms("bckd", context, overlap="iou") == pytest.approx(expected_bckd(context, overlap_mode="iou"), rel=1e-4)
    assert methods.build("bckd", weight=0.5).weights == {"classes": 0.5, "boxes": 2.0}
    assert set(terms("bckd", context, class_weight=0.0)) == {"boxes"}
    assert terms("bckd", shift(context))["classes"] != pytest.approx(terms("bckd", context)["classes"], rel=0.1)


def test_bckd_gate_leaves_out_levels_without_positives():
    context = scene()
    fine = jnp.zeros_like(context.assignment.positive).at[:, level_slices(context)[0]].set(True)
    context = context._replace(assignment=context.assignment._replace(positive=context.assignment.positive & fine))
    found = terms("bckd", context, per_level_gate=True)
    assert found == pytest.approx(expected_bckd(context, gate=True), rel=1e-4)
    assert found["classes"] < 0.95 * terms("bckd", context)["classes"]


def test_bckd_detaches_the_weight_of_the_boxes_only():
    context = scene()

    def pulled(**options):
        method = methods.build("bckd", **options)
        return pulled_at(method, context, ("cls_logits", "box_reg"))

    assert pulled(class_weight=0.0) == {"box_reg"}
    assert pulled(box_weight=0.0) == {"cls_logits"}


# -------------------------------------------------------------------------------------------------------------- Yao


def identity(size: int, channels: int) -> dict:
    kernel = jnp.zeros((size, size, channels, channels)).at[size // 2, size // 2].set(jnp.eye(channels))
    return {"kernel": kernel, "bias": jnp.zeros(channels)}


LEVEL = dict(student="neck.1", teacher="neck.1")  # one level of four by four cells is enough for most


def yao(context, params: dict, **options) -> dict[str, float]:
    return {k: float(v) for k, v in apply(methods.build("yao", logit_weight=0.0, **options), params, context).items()}


def positive_scene() -> Scene:
    """Neck maps without negative numbers, which a ReLU lets through."""
    context = scene()
    sides = (dataclasses.replace(x, neck=tuple(jnp.abs(m) for m in x.neck)) for x in (context.student, context.teacher))
    return context._replace(**dict(zip(("student", "teacher"), sides, strict=True)))


def necks(context):
    return [tuple(np.float64(x) for x in pair) for pair in zip(context.student.neck, context.teacher.neck, strict=True)]


def test_yao_features_with_an_identity_generator():
    context = positive_scene()
    gate = {"kernel": jnp.zeros((7, 7, 2, 1)), "bias": jnp.full(1, 0.5)}
    generator = {"first": identity(3, 4), "second": identity(3, 4)}
    params = {"adapters": {}, "generators": {"16": generator}, "attention": {"16": gate}}
    features = functools.partial(yao, params=params, many_weight=0.0, **LEVEL)
    s, t = necks(context)[1]

    def expected(seen, weight=1.0):
        return {"features": pytest.approx((weight * np.square(seen - t)).mean(), rel=1e-5)}

    plain = dict(resample="none", spatial_attention=False)
    assert features(context, **plain) == expected(s)
    assert features(context, **plain | dict(resample="interp", factor=1)) == expected(s)
    assert features(context, **plain | dict(resample="mask", drop=0.0)) == expected(s)
    assert features(context, drop=1.0) == expected(0.0)
    assert features(context, resample="none") == expected(sigmoid(0.5) * s)
    strength = np.exp(np.abs(t).mean(-1, keepdims=True) / 0.5)
    attention = strength / strength.mean((1, 2), keepdims=True)
    assert features(context, **plain, foreground=True) == expected(s, attention)
    # Windows of two cells, and the way back by interpolation: weights 3/4 and 1/4 of the windows on both sides.
    ends = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    windows = s.reshape(2, 2, 2, 2, 2, 4).mean((2, 4))
    back = np.einsum("ia,jb,nabc->nijc", ends, ends, windows)
    assert features(context, **plain | dict(resample="interp")) == expected(back)
    assert features(context) != features(context, drop=0.5)
    assert features(context._replace(key=jax.random.PRNGKey(8))) != features(context), "another key, another mask"


def test_yao_one_to_many():
    context = positive_scene()
    fams = {f"{i}-{j}": {"first": identity(1, 4), "second": identity(3, 4)} for i in made.STRIDES for j in made.STRIDES}
    many = functools.partial(yao, context, feature_weight=0.0)
    s, t = necks(context)[1]
    assert many({"many": fams}, **LEVEL) == {"many": pytest.approx(np.square(s - t).mean(), rel=1e-5)}
    # FAMs that give zero: what remains are the shares o_ij, 2/3 and 1/3 at the ends, 1/2 and twice 1/4 in the middle.
    zero = jax.tree.map(jnp.zeros_like, {"many": fams})
    a, b, c = (np.square(t).mean() for _, t in necks(context))
    expected = ((2 * a + b) / 3 + (a + 2 * b + c) / 4 + (b + 2 * c) / 3) / 3
    assert many(zero)["many"] == pytest.approx(expected, rel=1e-5)
    keys = {"8-8", "8-16", "16-8", "16-16", "16-32", "32-16", "32-32"}
    assert set(trained("yao", context)["many"]) == keys
    assert set(trained("yao", context, reach=0)["many"]) == {"8-8", "16-16", "32-32"}


def test_yao_switches():
    context = scene(channels=6)

    assert set(trained("yao", context)) == {"adapters", "generators", "attention", "many"}
    assert set(trained("yao", context, spatial_attention=False, many_weight=0.0)) == {"adapters", "generators"}
    assert set(trained("yao", context, feature_weight=0.0)) == {"many"}
    assert set(terms("yao", context, logit_weight=0.0, **LEVEL)) == {"features", "many"}
    assert set(terms("yao", context, feature_weight=0.0, many_weight=0.0, target_weight=0.0)) == {"others"}


# ------------------------------------------------------------------------------------------- what all have in common


@pytest.mark.parametrize("name", [n for n in NAMES if n != "yao"])
def test_zero_for_a_student_that_equals_its_teacher(name):
    context = scene(bins=BINS) if name in ("ld", "crosskd") else scene()
    teacher = context.teacher
    if name == "crosskd":  # its teacher predicts what its head makes of its towers
        classes, boxes = (
            context.teacher_head(tower[0], branch=branch, start=1)
            for branch, tower in (("cls", teacher.cls_tower), ("reg", teacher.reg_tower))
        )
        teacher = dataclasses.replace(teacher, cls_logits=classes, box_reg=boxes)
    found = terms(name, context._replace(student=teacher, teacher=teacher))
    assert found == pytest.approx(dict.fromkeys(found, 0.0), abs=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_twice_changes_nothing(name):
    context = scene(bins=BINS) if name == "ld" else scene()
    options = LEVEL | {"resample": "none"} if name == "yao" else {}
    doubled = context._replace(
        **{
            field: jax.tree.map(lambda x: jnp.concatenate([x, x]), getattr(context, field))
            for field in ("student", "teacher", "targets", "assignment")
        }
    )
    assert compiled(name, doubled, **options) == pytest.approx(terms(name, context, **options), rel=1e-4)
    if name == "ld":
        once = terms(name, context, normalizer="sum")
        sums = {"main": 2 * once["main"], "region": 2 * once["region"], "classes": once["classes"]}
        assert compiled(name, doubled, normalizer="sum") == pytest.approx(sums, rel=1e-4)


@pytest.mark.parametrize("name", ["rm", "ld"])
def test_rows_of_padding_change_nothing(name):
    context = scene(bins=BINS) if name == "ld" else scene()
    wide = [(0, 0), (0, 3)]
    targets = context.targets._replace(
        boxes=jnp.pad(context.targets.boxes, [*wide, (0, 0)]),
        labels=jnp.pad(context.targets.labels, wide),
        valid=jnp.pad(context.targets.valid, wide),
    )
    found = compiled(name, context._replace(targets=targets))
    assert found == pytest.approx(terms(name, context), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_predictions_of_other_classes_anchors_or_grids_are_refused(name):
    context = scene(bins=BINS) if name == "ld" else scene()
    teacher = context.teacher
    more = dataclasses.replace(
        teacher, cls_logits=tuple(jnp.pad(m, [(0, 0)] * 3 + [(0, 1)]) for m in teacher.cls_logits)
    )
    halved = {field: tuple(m[:, ::2] for m in getattr(teacher, field)) for field in ("cls_logits", "box_reg")}
    coarse = context._replace(
        teacher=dataclasses.replace(teacher, **halved), decode_teacher=lambda out: jnp.zeros((2, 42, 4))
    )
    others = [context._replace(teacher=more), context._replace(teacher=several_anchors(teacher, 3)), coarse]
    for other, rows in zip(others, (r"\(64, 16, 4\), 4\)", r"\(192, 48, 12\), 3\)", r"\(32, 8, 2\), 3\)"), strict=True):
        with pytest.raises(UserError, match=rf"^{name}: .*same levels, anchors and classes.* and \({rows} \(teacher"):
            terms(name, other)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rm", dict(quality="giou")),
        ("rm", dict(theta=0.0)),
        ("pfi", dict(space="scores")),
        ("pfi", dict(form="sum")),
        ("dkd", dict(head="tanh")),
        ("dkd", dict(temperature=0.0)),
        ("hinton", dict(head="tanh")),
        ("hinton", dict(priors="negative")),
        ("hinton", dict(class_reduction="max")),
        ("hinton", dict(temperature=-1.0)),
        ("ld", dict(normalizer="mean")),
        ("ld", dict(gamma=1.5)),
        ("ld", dict(temperature=0.0)),
        ("ld", dict(class_temperature=0.0)),
        ("crosskd", dict(box_loss="diou")),
        ("bckd", dict(overlap="diou")),
        ("yao", dict(resample="shuffle")),
        ("yao", dict(drop=1.5)),
        ("yao", dict(factor=0)),
        ("yao", dict(head="tanh")),
        ("yao", dict(temperature=0.0)),
        ("yao", dict(reach=-1)),
    ],
    ids=str,
)
def test_impossible_options_are_named(name, options):
    (option,) = options
    with pytest.raises(UserError, match=f"^{name}: {option} is "):
        methods.build(name, **options)


def test_rm_and_pfi_add_up():
    """Each method has its own terms, so the two of one paper run side by side."""
    both = {**terms("rm", scene()), **terms("pfi", scene())}
    assert set(both) == {"rank", "feature"}
