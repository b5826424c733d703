"""Several teachers at once, and the mean of their rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import detectors, methods
from kdjax.distill import Custom, Distiller, Distillers, mean, recorded
from kdjax.errors import UserError
from kdjax.structs import DetectorOutput, Rows
from tests.support.arrays import quick_jit

SIZE, BATCH = (64, 64), 2
STUDENT, NEAR, FAR = (detectors.build("rtmdet_pico", 3, widen=widen) for widen in (0.0625, 0.125, 0.25))
RNG = np.random.default_rng(0)


def random_output(detector):
    spec = dataclasses.replace(detector.spec(SIZE), rows=None)
    return jax.tree.map(lambda leaf: RNG.normal(size=(BATCH, *leaf.shape[1:])).astype(np.float32), spec)


def test_several_teachers_give_the_terms_of_each():
    one, two = (
        Distiller(STUDENT, NEAR, [methods.cwd(), methods.mkd()]),
        Distiller(STUDENT, FAR, [methods.cwd(weight=7.0)]),
    )
    both = Distillers({"near": one, "far": two})
    key, of_run = jax.random.key(0), jax.random.key(1)
    adapters = both.init(key, SIZE)
    output = random_output(STUDENT)
    observed = {"near": random_output(NEAR), "far": random_output(FAR)}
    batch = {"image": np.zeros((BATCH, *SIZE, 3), np.uint8)}
    terms = quick_jit(lambda output, observed: both.terms(adapters, output, batch, observed=observed, key=of_run))
    found = terms(output, observed)
    assert {"far/cwd/cwd", "near/cwd/cwd", "near/mkd/feature"} < set(found)
    alone = quick_jit(
        lambda output, observed: two.terms(adapters["far"], output, batch, observed=observed, key=of_run)
    )(output, observed["far"])
    np.testing.assert_allclose(found["far/cwd/cwd"], alone["cwd/cwd"], rtol=1e-6)
    weights = both.weights(0)
    assert weights["far/cwd/cwd"] == 7.0 and sorted(weights) == sorted(found)
    total = sum(weights[name] * value for name, value in found.items())
    np.testing.assert_allclose(both.total(found, 0), total, rtol=1e-6)


def test_two_teachers_do_not_share_what_is_random():
    """The same method with two equal teachers trains two adapters and draws two masks."""
    both = Distillers({name: Distiller(STUDENT, FAR, [methods.mkd()]) for name in "ab"})
    adapters = both.init(jax.random.key(0), SIZE)
    first, second = (jax.tree.leaves(adapters[name]) for name in "ab")
    assert any((one != two).any() for one, two in zip(first, second, strict=True))


def test_a_method_that_refuses_is_named_with_its_teacher():
    other = Distiller(STUDENT, detectors.build("rtmdet_pico", 4), [methods.rm()])
    with pytest.raises(UserError, match=r"^far: rm: .*rows per level"):
        Distillers({"far": other}).init(jax.random.key(0), SIZE)
    with pytest.raises(UserError, match=r"'a/b' is not a name"):
        Distillers({"a/b": other})


def rows_of(logits, boxes, bins=None):
    return Custom(
        spec=lambda _: DetectorOutput(strides=(8,), rows=Rows(logits=logits, boxes=boxes, level_sizes=(5,))),
        observe=lambda variables, batch: DetectorOutput(
            strides=(8,),
            rows=Rows(
                logits=logits + variables, boxes=boxes, quality=logits[..., 0], distribution=bins, level_sizes=(5,)
            ),
        ),
    )


def test_the_mean_of_teachers_is_that_of_probabilities_and_boxes():
    values = [
        (RNG.normal(size=(1, 5, 3)).astype(np.float32) * 4, RNG.uniform(0, 64, (1, 5, 4)).astype(np.float32))
        for _ in range(3)
    ]
    bins = [RNG.normal(size=(1, 5, 4, 9)).astype(np.float32) for _ in range(3)]
    ensemble = mean([rows_of(*value, one) for value, one in zip(values, bins, strict=True)])
    assert ensemble.spec(SIZE).rows.logits.shape == (1, 5, 3)
    rows = ensemble.observe((0.0, 1.0, 2.0), {}).rows
    logits = [value[0] + shift for value, shift in zip(values, range(3), strict=True)]
    np.testing.assert_allclose(
        jax.nn.sigmoid(rows.logits), np.mean([1 / (1 + np.exp(-x)) for x in logits], 0), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(
        jax.nn.sigmoid(rows.quality), np.mean([1 / (1 + np.exp(-x[..., 0])) for x, _ in values], 0), rtol=1e-5
    )
    np.testing.assert_allclose(rows.boxes, np.mean([boxes for _, boxes in values], 0), rtol=1e-6)
    np.testing.assert_allclose(
        jax.nn.softmax(rows.distribution), np.mean([jax.nn.softmax(jnp.asarray(one)) for one in bins], 0), rtol=1e-5
    )
    extreme = mean([rows_of(np.full((1, 5, 3), x, np.float32), values[0][1]) for x in (-200.0, -100.0)])
    np.testing.assert_allclose(extreme.observe((0.0, 0.0), {}).rows.logits, -100 - np.log(2), rtol=1e-5)


def test_a_mean_needs_teachers_with_the_same_rows():
    with pytest.raises(UserError, match="1 teachers: it needs at least 2"):
        mean([NEAR])
    with pytest.raises(UserError, match="teachers 1 and 2 do not predict the same rows"):
        mean([NEAR, detectors.build("rtmdet_pico", 4)]).spec(SIZE)
    with pytest.raises(UserError, match="teacher 2 has no rows on a grid"):
        mean([NEAR, detectors.build("rtdetr_pico", 3)]).spec(SIZE)
    ensemble = mean([NEAR, FAR])
    assert Distiller(STUDENT, ensemble, [methods.hinton()]).init(jax.random.key(0), SIZE) == {"hinton": {}}
    with pytest.raises(UserError, match="cwd"):
        Distiller(STUDENT, ensemble, [methods.cwd()]).init(jax.random.key(0), SIZE)


def test_the_mean_of_a_teacher_with_itself_is_that_teacher():
    batch = {"image": RNG.integers(0, 256, (1, *SIZE, 3)).astype(np.uint8)}
    variables = NEAR.init(jax.random.key(1))
    alone, twice = (
        quick_jit(Distiller(STUDENT, teacher, [methods.hinton()]).observe)(batch, given)
        for teacher, given in ((NEAR, variables), (mean([NEAR, NEAR]), (variables, variables)))
    )
    np.testing.assert_allclose(twice.rows.logits, alone.rows.logits, atol=1e-5)


def test_recorded_teachers_may_be_among_them():
    batch = {"image": np.zeros((BATCH, *SIZE, 3), np.uint8), "teacher": random_output(NEAR)}
    both = Distillers({"a": Distiller(STUDENT, recorded(NEAR.spec), [methods.cwd()])})
    found = both.terms(both.init(jax.random.key(0), SIZE), random_output(STUDENT), batch, key=jax.random.key(1))
    assert np.isfinite(found["a/cwd/cwd"])
