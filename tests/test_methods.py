"""The contract of every method, discovered over kdjax/methods, on random outputs of two made-up detectors."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax.methods import api
from kdjax.structs import Assignment, DetectorOutput, Targets
from kdjax.training.step import weights_of
from tests.support.arrays import quick_jit

STRIDES, CLASSES, BOXES = (8, 16, 32), 3, 4
# What a method asks of the detectors besides the usual: ld needs box edges as distributions.
SPECIAL = {"ld": {"bins": 5}}
# Step sizes that are not 0.03: gid takes other instances in every step, and its boxes are 3 strides apart.
RATES = {"gid": 0.1}


def output(
    key, channels: int, size: int, *, batch: int = 2, dtype=jnp.float32, constant: bool = False, bins: int = 1
) -> DetectorOutput:
    """Every tap of an RTMDet-like detector, random or constant; with `bins`, box edges are logits as GFL has them."""
    count = iter(range(1000))

    def maps(width):
        sides = [max(size // stride, 1) for stride in STRIDES]
        if constant:
            return tuple(jnp.full((batch, side, side, width), 0.5, dtype) for side in sides)
        return tuple(
            jax.random.normal(jax.random.fold_in(key, next(count)), (batch, side, side, width), dtype) for side in sides
        )

    return DetectorOutput(
        strides=STRIDES,
        backbone_strides=STRIDES,
        backbone=maps(2 * channels),
        neck=maps(channels),
        neck_conv=maps(channels),
        cls_tower=(maps(channels), maps(channels)),
        reg_tower=(maps(channels), maps(channels)),
        cls_logits=maps(CLASSES),
        box_reg=maps(4 * bins) if bins > 1 else tuple(4 * jnp.exp(m) for m in maps(4)),
    )


def ground(size: int, *, objects: bool = True, batch: int = 2) -> tuple[Targets, Assignment, np.ndarray]:
    """Two boxes an image, with the priors nearest to their centres as positives; or none."""
    cells = [max(size // stride, 1) for stride in STRIDES]
    priors = np.concatenate(
        [[(x * s, y * s, s, s) for y in range(n) for x in range(n)] for n, s in zip(cells, STRIDES, strict=True)]
    ).astype(np.float32)
    boxes = np.zeros((batch, BOXES, 4), np.float32)
    boxes[:, 0], boxes[:, 1] = (2, 2, size * 0.5, size * 0.5), (size * 0.4, size * 0.3, size - 2, size - 4)
    labels = np.tile(np.array([0, 2, 0, 0], np.int32), (batch, 1))
    valid = np.tile(np.array([objects, objects, False, False]), (batch, 1))
    sides = np.full((batch, 2), size, np.int32)
    matched = np.full((batch, len(priors)), -1, np.int32)
    if objects:
        for j in (1, 0):
            centre = (boxes[0, j, :2] + boxes[0, j, 2:]) / 2
            near = np.argsort(np.square(priors[:, :2] - centre).sum(1), kind="stable")[: max(2, len(priors) // 12)]
            matched[:, near] = j
    positive = matched >= 0
    rows = np.take_along_axis(boxes, np.maximum(matched, 0)[..., None], 1) * positive[..., None]
    assignment = Assignment(
        matched=jnp.array(matched),
        positive=jnp.array(positive),
        ignore=jnp.zeros_like(jnp.array(positive)),
        labels=jnp.array(np.where(positive, np.take_along_axis(labels, np.maximum(matched, 0), 1), CLASSES)),
        boxes=jnp.array(rows, jnp.float32),
        quality=jnp.array(positive, jnp.float32),
    )
    targets = Targets(*(jnp.array(a) for a in (boxes * valid[..., None], labels, valid, sides, sides)))
    return targets, assignment, priors


def decode(priors):
    """Distances left, top, right, bottom to boxes, as RTMDet has them; of distributions the mean, times the stride."""

    def boxes(out: DetectorOutput):
        bins = out.box_reg[0].shape[-1] // 4
        reg = jnp.concatenate([m.reshape(m.shape[0], -1, 4, bins) for m in out.box_reg], 1).astype(jnp.float32)
        mean = jax.nn.softmax(reg) @ jnp.arange(bins, dtype=jnp.float32) * priors[:, 2:3]
        reg = mean if bins > 1 else reg[..., 0]
        return jnp.concatenate([priors[:, :2] - reg[..., :2], priors[:, :2] + reg[..., 2:]], -1)

    return boxes


def assign(priors):
    """An assigner that gives a prior to the first box around it."""

    def assignment(targets: Targets) -> Assignment:
        low, high = targets.boxes[:, :, None, :2], targets.boxes[:, :, None, 2:]
        inside = jnp.all((priors[:, :2] > low) & (priors[:, :2] < high), -1) & targets.valid[..., None]
        positive, owner = jnp.any(inside, 1), jnp.argmax(inside, 1)
        return Assignment(
            matched=jnp.where(positive, owner, -1),
            positive=positive,
            ignore=jnp.zeros_like(positive),
            labels=jnp.where(positive, jnp.take_along_axis(targets.labels, owner, 1), CLASSES),
            boxes=jnp.take_along_axis(targets.boxes, owner[..., None], 1) * positive[..., None],
            quality=positive.astype(jnp.float32),
        )

    return assignment


def head(features, *, branch: str, start: int):
    """A stand-in for the teacher's head: activation, then a fixed linear predictor."""
    width = CLASSES if branch == "cls" else 4
    return tuple(
        jax.nn.silu(f) @ jnp.cos(jnp.arange(f.shape[-1] * width, dtype=f.dtype)).reshape(-1, width) for f in features
    )


def context(student, teacher, *, size: int, objects: bool = True, step: int = 0, seed: int = 7) -> api.Context:
    targets, assignment, priors = ground(size, objects=objects)
    return api.Context(
        student=student,
        teacher=teacher,
        targets=targets,
        assignment=assignment,
        step=jnp.int32(step),
        key=jax.random.PRNGKey(seed),
        priors=jnp.array(priors),
        decode_student=decode(priors),
        decode_teacher=decode(priors),
        teacher_head=head,
        assign=assign(jnp.array(priors)),
    )


def total(method, params, ctx):
    return sum(method.apply(params, ctx).values())


class Made(NamedTuple):
    """What the contract's tests take: a method with its default options between two detectors' outputs."""

    name: str
    method: api.Method
    student: DetectorOutput
    teacher: DetectorOutput
    params: dict
    # (params, student, teacher, seed, truth) -> ((total, terms), gradients of the first three); compiled once for all
    # tests; truth is (targets, assignment) of `ground`.
    evaluate: Callable


TRUTH = ground(64)[:2]


def prepared(name: str) -> Made:
    method, special = api.build(name), SPECIAL.get(name, {})
    student, teacher = (output(jax.random.PRNGKey(i), c, 64, **special) for i, c in ((0, 4), (1, 6)))
    params = method.init(jax.random.PRNGKey(2), student, teacher)
    return Made(name, method, student, teacher, params, evaluation(method, 64))


def evaluation(method: api.Method, size: int) -> Callable:
    """The `evaluate` of `Made` for images of this size."""

    def loss(params, student, teacher, seed, truth):
        # The trainer stops the teacher's gradient in one place; here the same is done, and the rest must not undo it.
        seen = context(student, jax.lax.stop_gradient(teacher), size=size, seed=seed)
        terms = method.apply(params, seen._replace(targets=truth[0], assignment=truth[1]))
        return sum(terms.values()), terms

    return quick_jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


@pytest.fixture(scope="module", params=api.names())
def made(request):
    return prepared(request.param)


def test_teacher_gets_no_gradient_and_student_gets_one(made):
    _, (_, of_student, of_teacher) = made.evaluate(made.params, made.student, made.teacher, 7, TRUTH)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(of_teacher))
    size = sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(of_student))
    assert np.isfinite(size) and size > 0


def test_weights_and_terms_have_the_same_names(made):
    (_, terms), _ = made.evaluate(made.params, made.student, made.teacher, 7, TRUTH)
    assert set(made.method.weights) == set(terms)


def test_key_decides(made):
    values = [float(made.evaluate(made.params, made.student, made.teacher, seed, TRUTH)[0][0]) for seed in (1, 2, 1)]
    assert values[0] == values[2]


def test_thirty_steps_reduce_every_term(made):
    optimizer = optax.adam(RATES.get(made.name, 0.03))
    variables = (made.params, made.student)
    state, history = optimizer.init(variables), []

    @quick_jit
    def update(gradients, state, variables):
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(variables, updates), state

    for _ in range(31):
        (_, terms), (*gradients, _) = made.evaluate(*variables, made.teacher, 7, TRUTH)
        history.append(terms)
        variables, state = update(tuple(gradients), state, variables)
    for term, first in history[0].items():
        assert float(history[-1][term]) < float(first), f"{term}: {first} -> {history[-1][term]}"


@pytest.mark.parametrize(
    "case", [dict(dtype=jnp.bfloat16), dict(objects=False), dict(size=8), dict(constant=True)], ids=str
)
def test_value_and_gradient_stay_finite(made, case):
    case = SPECIAL.get(made.name, {}) | case
    size = case.pop("size", 64)
    truth = ground(size, objects=case.pop("objects", True))[:2]
    student, teacher = (output(jax.random.PRNGKey(i), c, size, **case) for i, c in ((0, 4), (1, 6)))
    evaluate = made.evaluate if size == 64 else evaluation(made.method, size)
    (value, _), (of_params, of_student, _) = evaluate(made.params, student, teacher, 7, truth)
    assert value.dtype == jnp.float32 and np.isfinite(value)
    assert all(np.all(np.isfinite(np.asarray(leaf, np.float32))) for leaf in jax.tree.leaves((of_params, of_student)))


def test_equal_channels_need_no_adapter_to_work(made):
    teacher = output(jax.random.PRNGKey(5), 4, 64, **SPECIAL.get(made.name, {}))
    params = made.method.init(jax.random.PRNGKey(2), made.student, teacher)
    value = quick_jit(lambda p, s, t: total(made.method, p, context(s, t, size=64)))(params, made.student, teacher)
    assert np.isfinite(value)


def test_wrong_tap_is_refused_at_start_with_the_valid_names(made):
    name, _, student, teacher, *_ = made
    for side in ("student", "teacher", "tap", "taps"):
        if side in api.options(name):
            wrong = api.build(name, **{side: "nack"})
            with pytest.raises(ValueError, match="nack.*neck"):
                wrong.init(jax.random.PRNGKey(0), student, teacher)
            return
    pytest.fail(f"{name} has no option for its taps")


def test_schedule():
    method = api.build("bckd", weight=2.0, start=10, warmup=4, stop=30, decay=5)
    steps = (0, 9, 10, 13, 20, 25, 29, 30, 99)
    at = [weights_of({"bckd": method}, step)["bckd/classes"] / method.weights["classes"] for step in steps]
    np.testing.assert_allclose(at, (0, 0, 0.25, 1, 1, 1, 0.2, 0, 0), rtol=1e-6)
    assert float(api.build("bckd").scale(0)) == 1.0
    for wrong in (dict(stop=3, start=5), dict(decay=5), dict(warmup=-1)):
        with pytest.raises(ValueError, match="not possible"):
            api.build("mkd", **wrong)


def test_taps_pair_by_stride():
    fine = output(jax.random.PRNGKey(0), 4, 64)
    coarse = DetectorOutput(strides=(16, 32, 64), neck=fine.neck)
    assert [p.stride for p in api.pair(fine, coarse, "neck")] == [16, 32]
    assert [p.stride for p in api.pair(fine, fine, "backbone.1")] == [16]
    assert [p.student.shape[-1] for p in api.pair(fine, fine, "cls_tower.1", "cls_logits")] == [4] * 3
    assert [p.stride for p in api.pair(fine, fine, "neck.0:2")] == [8, 16]
    assert [p.stride for p in api.pair(fine, fine, "neck", "backbone.1:3")] == [16, 32]
    for wrong in ("neck.1:1", "neck.0:4", "neck.:2", "cls_tower.0:1", "neck.0:2:3"):
        with pytest.raises(ValueError, match="there is no tap"):
            api.tap(fine, wrong)
    with pytest.raises(ValueError, match="no stride in common"):
        api.pair(fine, DetectorOutput(strides=(64,), neck=fine.neck[:1]), "neck")
    with pytest.raises(ValueError, match="factor of 2"):
        api.init_adapters(jax.random.PRNGKey(0), [api.Pair(8, fine.neck[0], fine.neck[2])])


def test_unknown_method_and_option_list_the_valid_ones():
    with pytest.raises(ValueError, match="mkdd.*mkd"):
        api.build("mkdd")
    with pytest.raises(ValueError, match="wieght.*weight"):
        api.build("mkd", wieght=1.0)


def test_mkd_options():
    """Every option of the term list changes what it names and nothing else."""
    student, teacher = output(jax.random.PRNGKey(0), 4, 64), output(jax.random.PRNGKey(1), 4, 64)
    ctx = context(student, teacher, size=64)

    def terms(**options):
        return {k: float(v) for k, v in api.build("mkd", **options).apply({}, ctx).items()}

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
    moved = context(jax.tree.map(lambda x: 3 * x + 1, student), teacher, size=64)
    again = api.build("mkd", normalize="pkd").apply({}, moved)
    assert {k: float(v) for k, v in again.items()} == pytest.approx(standard, rel=1e-4)
    with pytest.raises(ValueError, match="normalize"):
        api.build("mkd", normalize="bn")
