"""`Distiller`: observing apart from comparing, keys, names, refusals; it holds no arrays."""

import dataclasses

import jax
import numpy as np
import pytest

from kdjax import detectors, methods
from kdjax.distill import Custom, Distiller, Method, Reads, by_overlap
from kdjax.errors import UserError
from kdjax.structs import DetectorOutput
from tests.support.arrays import quick_jit
from tests.support.methods import batch_of, distiller, output, scene

STUDENT, TEACHER = (output(jax.random.PRNGKey(i), c, 32) for i, c in ((0, 4), (1, 6)))
SCENE = scene(STUDENT, TEACHER, size=32)


def probe(terms, reads: Reads, name: str = "probe") -> Method:
    """A method that trains nothing; `terms` is a function of the context."""
    return Method(lambda *_: {}, lambda params, context: terms(context), {"term": 1.0}, reads, name=name)


def run(made: Distiller, seen=SCENE, **options):
    adapters = made.init(jax.random.key(2), seen.canvas)
    return made.terms(adapters, seen.student, batch_of(seen), ((), ()), **{"key": jax.random.key(3)} | options)


def test_terms_of_what_was_observed_are_the_terms():
    made = distiller(SCENE, methods.cwd(), methods.hinton(), methods.mkd())
    observed = made.observe(batch_of(SCENE), ((), ()))
    assert run(made, observed=observed) == run(made)
    assert observed.neck and not observed.backbone and not observed.cls_logits
    assert observed.rows.logits is not None and observed.rows.boxes is None


def test_what_is_observed_and_what_is_compared_have_no_gradient():
    made = distiller(SCENE, probe(lambda c: {"term": sum(m.sum() for m in c.teacher.neck)}, Reads((), ("neck",))))

    def observed_sum(neck):
        moved = distiller(SCENE._replace(teacher=dataclasses.replace(TEACHER, neck=neck)), *made.methods.values())
        return sum(m.sum() for m in moved.observe(batch_of(SCENE), ((), ())).neck)

    def compared(neck):
        return run(made, observed=dataclasses.replace(TEACHER, neck=neck))["probe/term"]

    for function in (observed_sum, compared):
        value, gradient = jax.value_and_grad(function)(TEACHER.neck)
        assert float(value) == pytest.approx(float(sum(m.sum() for m in TEACHER.neck)), rel=1e-5)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_the_step_is_folded_into_the_key():
    made = distiller(SCENE, methods.mkd())
    value = quick_jit(lambda key, step: run(made, key=key, step=step)["mkd/frequency"])
    key = jax.random.key(3)
    values = [float(value(key, step)) for step in (0, 1, 1)]
    assert values[0] != values[1] == values[2]
    folded = quick_jit(lambda key: run(made, key=key)["mkd/frequency"])(jax.random.fold_in(key, 1))
    assert float(folded) == pytest.approx(values[1], rel=1e-6)


def test_a_method_is_the_same_beside_others():
    """Neither its adapters nor its random numbers depend on which other methods run."""
    alone, both = (distiller(SCENE, *chosen) for chosen in ([methods.mkd()], [methods.cwd(), methods.mkd()]))
    one, two = (made.init(jax.random.key(2), SCENE.canvas)["mkd"] for made in (alone, both))
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(two)))
    found = run(both)
    assert run(alone) == {name: value for name, value in found.items() if name.startswith("mkd/")}


def test_a_sequence_and_a_mapping_of_methods():
    chosen = [methods.cwd(weight=2.0), methods.hinton(weight=3.0, start=5)]
    by_name = {method.name: method for method in chosen}
    one = distiller(SCENE, *chosen)
    two = dataclasses.replace(one, methods=by_name)
    assert one.methods == two.methods == by_name and run(one) == run(two)
    named = dataclasses.replace(one, methods={"first": methods.cwd(weight=1.0), "second": methods.cwd(weight=2.0)})
    assert set(run(named)) == {"first/cwd", "second/cwd"}
    assert {k: float(v) for k, v in one.weights(4).items()} == {"cwd/cwd": 2.0, "hinton/classes": 0.0}
    terms = run(one)
    assert float(one.total(terms, 4)) == pytest.approx(2 * float(terms["cwd/cwd"]), rel=1e-6)
    expected = 2 * float(terms["cwd/cwd"]) + 3 * float(terms["hinton/classes"])
    assert float(one.total(terms, 5)) == pytest.approx(expected, rel=1e-6)
    for wrong in ([methods.cwd(), methods.cwd()], [methods.cwd()._replace(name="")]):
        with pytest.raises(UserError, match="each method needs a name of its own"):
            distiller(SCENE, *wrong)


def test_init_names_the_method_that_refuses():
    other = SCENE._replace(teacher=DetectorOutput(strides=(8, 16, 32), neck=TEACHER.neck))
    with pytest.raises(UserError, match=r"^pfi: teacher: tap 'cls_logits'"):
        distiller(other, methods.cwd(), methods.pfi()).init(jax.random.key(0), SCENE.canvas)


def test_what_is_no_model_is_refused():
    with pytest.raises(UserError, match=r"^teacher: 'rtmdet_micro' has no `spec`: pass a detector or"):
        Distiller(detectors.build("rtmdet_pico", 3), "rtmdet_micro", [methods.cwd()])


def test_a_rule_of_pairing_orders_rows_and_assignment():
    """With rows in the order of another rule, row i of both sides and of the assignment are of the same place."""

    def terms(context):
        assert context.student_rows.boxes.shape == context.teacher_rows.boxes.shape
        far = abs(context.student_rows.boxes - context.teacher_rows.boxes).sum(-1)
        return {"term": (far * context.assignment.positive).sum(), "ignored": context.assignment.ignore.sum()}

    reads = Reads(("rows.boxes", "assignment"), ("rows.boxes",))
    made = distiller(SCENE._replace(teacher=STUDENT), probe(terms, reads))
    by_boxes = dataclasses.replace(made, pairing=by_overlap)
    assert float(run(made)["probe/term"]) == float(run(by_boxes)["probe/term"]) == 0
    strict = dataclasses.replace(made, pairing=lambda s, t: by_overlap(s, t, threshold=1.5))
    found = run(strict, assignment=SCENE.assignment)
    assert float(found["probe/ignored"]) == SCENE.assignment.ignore.size


def test_it_holds_no_arrays():
    made = Distiller(*(detectors.build(n, 3) for n in ("rtmdet_pico", "rtmdet_micro")), [methods.mkd(), methods.gid()])
    values = [getattr(made, field.name) for field in dataclasses.fields(made)]
    leaves = jax.tree.leaves([values, [list(m) for m in made.methods.values()]])
    assert not any(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
    assert made.variables is None


def test_what_is_missing_is_named():
    student, teacher = detectors.build("rtmdet_pico", 3), detectors.build("rtmdet_micro", 3)
    output = student.spec((64, 64))
    blind = Distiller(student, Custom(spec=teacher.spec), [methods.build("cwd")])
    with pytest.raises(UserError, match="teacher: it has no `observe`: pass its output to `terms` as `observed`"):
        blind.observe({"image": None})
    with pytest.raises(UserError, match="batch: boxes, labels missing: a method reads the ground truth"):
        Distiller(student, teacher, [methods.build("defeat")]).terms(
            {}, output, {"image": 0, "valid": 0, "image_size": 0}, observed=output, key=jax.random.key(0)
        )
