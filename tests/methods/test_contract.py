"""The contract of every method, discovered over kdjax/methods, on random outputs of two made-up detectors."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import methods
from kdjax.distill import Method, taps
from kdjax.errors import UserError
from kdjax.structs import DetectorOutput
from tests.support.arrays import quick_jit
from tests.support.methods import STRIDES, apply, batch_of, distiller, ground, init, output, scene

# What a method asks of the detectors besides the usual: ld needs box edges as distributions.
SPECIAL = {"ld": {"bins": 5}}
# Step sizes that are not 0.03: gid takes other instances in every step, and its boxes are 3 strides apart.
RATES = {"gid": 0.1}
# Methods whose terms, with their default options, depend on the key: random masks.
RANDOM = {"mgd", "mkd", "yao"}
# Methods that compare maps and make an adapter only where the channels of the two sides differ.
ADAPT_IF_NEEDED = {"crosskd", "cwd", "fgd", "fitnet", "mgd", "mkd", "pfi", "pkd", "ssim", "yao"}
# Methods that always make one, and those that have none.
ADAPT_ALWAYS = {"defeat", "dsi", "fgfi", "fkd", "gid", "rtmdet_cwd"}
ADAPT_NEVER = {"bckd", "dkd", "hinton", "ld", "rm"}
# Methods between the decoders of two transformers, and what reads detections: test_decoders.py, test_teach_detr.py and
# test_teach_boxes.py.
ELSEWHERE = {"detrdistill", "go_lsd", "kd_detr", "teach_boxes", "teach_detr"}
# The methods of the package: a method of the user's keeps the contract, but is in none of these lists.
OWN = {path.stem for path in Path(methods.__file__).parent.glob("*.py")} - {"__init__"}
# Taps of the teacher whose values do not matter: they are read to refuse predictions that do not pair.
FOR_SHAPES = {"pfi": {"rows.logits"}}


class Made(NamedTuple):
    """What the contract's tests take: a method with its default options between two detectors' outputs."""

    name: str
    method: Method
    student: DetectorOutput
    teacher: DetectorOutput
    observed: DetectorOutput  # what the distiller observes of the teacher: the taps that the method reads
    params: dict
    # (params, student, observed, seed, truth) -> ((total, terms), gradients of the first three); compiled once for all
    # tests; truth is (targets, assignment) of `ground`.
    evaluate: Callable


TRUTH = ground(64)[:2]


def prepared(name: str) -> Made:
    method, special = methods.build(name), SPECIAL.get(name, {})
    student, teacher = (output(jax.random.PRNGKey(i), c, 64, **special) for i, c in ((0, 4), (1, 6)))
    params = init(method, scene(student, teacher, size=64), jax.random.PRNGKey(2))
    observed = observation(method, student, teacher, 64)
    return Made(name, method, student, teacher, observed, params, evaluation(method, 64))


def observation(method: Method, student: DetectorOutput, teacher: DetectorOutput, size: int) -> DetectorOutput:
    """What the distiller observes of the teacher on images of this size."""
    seen = scene(student, teacher, size=size)
    return distiller(seen, method).observe(batch_of(seen))


def evaluation(method: Method, size: int) -> Callable:
    """The `evaluate` of `Made` for images of this size."""

    def loss(params, student, observed, seed, truth):
        seen = scene(student, observed, size=size, seed=seed)._replace(targets=truth[0], assignment=truth[1])
        terms = apply(method, params, seen, observed=observed)
        return sum(terms.values()), terms

    return quick_jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def test_every_method_of_the_package_is_in_one_list_of_adapters():
    assert sorted([*ADAPT_IF_NEEDED, *ADAPT_ALWAYS, *ADAPT_NEVER, *ELSEWHERE]) == sorted(OWN)


@pytest.fixture(scope="module", params=[name for name in methods.names() if name not in ELSEWHERE])
def made(request):
    return prepared(request.param)


def test_teacher_gets_no_gradient_and_student_gets_one(made):
    _, (_, of_student, of_teacher) = made.evaluate(made.params, made.student, made.observed, 7, TRUTH)
    assert jax.tree.leaves(of_teacher) and all(not np.any(leaf) for leaf in jax.tree.leaves(of_teacher))
    size = sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(of_student))
    assert np.isfinite(size) and size > 0


def test_weights_and_terms_have_the_same_names(made):
    (_, terms), _ = made.evaluate(made.params, made.student, made.observed, 7, TRUTH)
    assert set(made.method.weights) == set(terms)


def test_equal_keys_give_equal_terms_and_only_random_methods_depend_on_the_key(made):
    values = [float(made.evaluate(made.params, made.student, made.observed, seed, TRUTH)[0][0]) for seed in (1, 2, 1)]
    assert values[0] == values[2]
    if made.name in OWN:
        assert (values[0] != values[1]) == (made.name in RANDOM)


def test_a_method_sees_what_it_declares_and_nothing_else(made):
    """Of detectors that have every tap."""
    contexts = []

    def probe(params, context):
        contexts.append(context)
        return {"nothing": jnp.zeros(())}

    quality = {"quality": tuple(m[..., :1] for m in made.student.cls_logits), "quality_tower": "cls"}
    bins = output(jax.random.PRNGKey(3), 4, 64, bins=5)
    whole = dataclasses.replace(bins, **quality)
    seen, spy = scene(whole, whole, size=64), made.method._replace(apply=probe)
    jax.eval_shape(lambda: apply(spy, {}, seen))
    (context,) = contexts
    for side, names in made.method.reads._asdict().items():
        shown, rows = getattr(context, side), getattr(context, f"{side}_rows")
        own = {(f, i) for f in (*taps.LEVELS, *taps.TOWERS) for i, m in enumerate(getattr(shown, f)) if m is not None}
        own |= {("rows", field) for field in taps.ROWS if getattr(rows, field) is not None}
        declared = set()
        for name in set(names) - {"targets", "assignment", "head"}:
            field, indices = taps.resolve(distiller(seen, spy).specs(seen.canvas)[0], name)
            declared |= {(field, i) for i in indices or range(3)} if field != "rows" else {tuple(name.split("."))}
        assert own == declared, side
    reads = made.method.reads
    assert (context.targets is not None) == ("targets" in reads.student)
    assert (context.assignment is not None) == (context.assign is not None) == ("assignment" in reads.student)
    assert (context.teacher_head is not None) == (context.teacher_boxes is not None) == ("head" in reads.teacher)


def test_every_declared_tap_of_the_teacher_matters(made):
    """Another value of it changes a term or its gradient."""

    def result(observed):
        value, gradients = made.evaluate(made.params, made.student, observed, 7, TRUTH)
        return jax.tree.leaves((value, gradients[:2]))

    plain = result(made.observed)
    for name in made.method.reads.teacher:
        if name == "head":
            continue
        field, _, part = name.partition(".")
        change = functools.partial(
            jax.tree.map, lambda x: x + jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
        )
        if field == "rows":
            rows = dataclasses.replace(made.observed.rows, **{part: change(getattr(made.observed.rows, part))})
            other = dataclasses.replace(made.observed, rows=rows)
        else:
            other = dataclasses.replace(made.observed, **{field: change(getattr(made.observed, field))})
        same = all(np.array_equal(a, b) for a, b in zip(plain, result(other), strict=True))
        assert same == (name in FOR_SHAPES.get(made.name, ())), name


def test_a_side_without_what_a_method_reads_is_refused_at_the_start(made):
    backbone = dataclasses.replace(
        DetectorOutput(strides=STRIDES), backbone_strides=STRIDES, backbone=made.student.backbone
    )
    for side in ("student", "teacher"):
        seen = scene(made.student, made.teacher, size=64)._replace(**{side: backbone})
        with pytest.raises(UserError, match=rf"^{made.name}: {side}: tap .*its taps are backbone, "):
            init(made.method, seen)


def test_thirty_steps_reduce_every_term(made):
    optimizer = optax.adam(RATES.get(made.name, 0.03))
    variables = (made.params, made.student)
    state, history = optimizer.init(variables), []

    @quick_jit
    def update(gradients, state, variables):
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(variables, updates), state

    for _ in range(31):
        (_, terms), (*gradients, _) = made.evaluate(*variables, made.observed, 7, TRUTH)
        history.append(terms)
        variables, state = update(tuple(gradients), state, variables)
    for term, first in history[0].items():
        assert float(history[-1][term]) < float(first), f"{term}: {first} -> {history[-1][term]}"


@pytest.mark.parametrize(
    "case",
    [
        dict(dtype=jnp.bfloat16, size=8),
        dict(objects=False),
        dict(constant=True),
        pytest.param(dict(dtype=jnp.bfloat16), marks=pytest.mark.slow),
        pytest.param(dict(size=8), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_value_and_gradient_stay_finite(made, case):
    case = SPECIAL.get(made.name, {}) | case
    size = case.pop("size", 64)
    truth = ground(size, objects=case.pop("objects", True))[:2]
    student, teacher = (output(jax.random.PRNGKey(i), c, size, **case) for i, c in ((0, 4), (1, 6)))
    evaluate = made.evaluate if size == 64 else evaluation(made.method, size)
    observed = observation(made.method, student, teacher, size)
    (value, _), (of_params, of_student, _) = evaluate(made.params, student, observed, 7, truth)
    assert value.dtype == jnp.float32 and np.isfinite(value)
    assert all(np.all(np.isfinite(np.asarray(leaf, np.float32))) for leaf in jax.tree.leaves((of_params, of_student)))


def adapters_of(params) -> list[str]:
    """Paths of what `init_adapters` made, without generators, attentions and blocks."""
    paths = ["/".join(str(k.key) for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return [path for path in paths if not path.startswith(("generators/", "attention/", "many/", "blocks/"))]


def test_equal_channels_need_no_adapter_to_work(made):
    teacher = output(jax.random.PRNGKey(5), 4, 64, **SPECIAL.get(made.name, {}))
    seen = scene(made.student, teacher, size=64)
    params = init(made.method, seen, jax.random.PRNGKey(2))
    value = quick_jit(lambda p, s, t: sum(apply(made.method, p, seen._replace(student=s, teacher=t)).values()))
    assert np.isfinite(value(params, made.student, teacher))
    if made.name in OWN:
        assert bool(adapters_of(params)) == (made.name in ADAPT_ALWAYS)
        assert bool(adapters_of(made.params)) == (made.name in ADAPT_ALWAYS | ADAPT_IF_NEEDED)


def test_wrong_tap_is_refused_at_start_with_the_valid_names(made):
    name, _, student, teacher, *_ = made
    sides = [side for side in ("student", "teacher") if side in methods.options(name)]
    assert sides or made.method.reads.student[0] == "rows.logits", "a method without options for its taps reads rows"
    for side in sides:
        with pytest.raises(UserError, match=rf"^{name}: .*nack.*neck"):
            init(methods.build(name, **{side: "nack"}), scene(student, teacher, size=64), jax.random.PRNGKey(0))
