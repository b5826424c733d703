"""Methods between transformers, and between a transformer and a dense detector: what is compared, what is refused."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import methods
from kdjax.boxes import matching
from kdjax.detectors import detr_loss
from kdjax.distill import Distiller, auto, by_hungarian, by_place
from kdjax.errors import UserError
from kdjax.structs import DetectorOutput, Rows, Targets
from tests.support import methods as dense
from tests.support.arrays import quick_jit
from tests.support.queries import CLASSES, QUERIES, SIZE, reordered, some_output, some_targets

BATCH, OBJECTS = 2, 4
TARGETS = some_targets(0, [3, 2], OBJECTS)
BY_ROWS = ["bckd", "dkd", "hinton"]


def rows_of(output: DetectorOutput) -> Rows:
    last = output.layers[-1]
    boxes = matching.corners(last.boxes) * jnp.array([SIZE[1], SIZE[0]] * 2)
    return Rows(logits=last.logits, boxes=boxes, distribution=last.corners)


def detector(output: DetectorOutput):
    """A transformer whose output is always the same."""
    with_rows = lambda: dataclasses.replace(output, rows=rows_of(output))  # noqa: E731
    return types.SimpleNamespace(
        spec=lambda image_size: jax.eval_shape(with_rows),
        observe=lambda variables, batch: with_rows(),
        rows=rows_of,
        assign=detr_loss.assigner(CLASSES, num_denoising=0),
        head=None,
    )


def batch_of(targets: Targets = TARGETS) -> dict:
    return {"image": np.zeros((BATCH, *SIZE, 3), np.uint8), **targets._asdict()}


def terms(distiller: Distiller, student: DetectorOutput, targets: Targets = TARGETS, **given) -> dict:
    params = distiller.init(jax.random.key(0), SIZE)
    return distiller.terms(params, student, batch_of(targets), key=jax.random.key(1), **given)


def permuted(output: DetectorOutput, order: np.ndarray) -> DetectorOutput:
    layers = jax.tree.map(lambda x: x[:, order], output.layers)
    return dataclasses.replace(output, layers=layers)


STUDENT, TEACHER = some_output(0, BATCH, OBJECTS), some_output(1, BATCH, OBJECTS)


def test_queries_are_compared_as_sets():
    """A student that says what its teacher says, in another order, has nothing to learn; order is no matter else."""
    order = np.random.default_rng(0).permutation(QUERIES)
    made = Distiller(detector(STUDENT), detector(TEACHER), [methods.build(name) for name in BY_ROWS], auto)
    same = Distiller(detector(STUDENT), detector(permuted(STUDENT, order)), list(made.methods.values()), auto)

    @quick_jit
    def values(student, teacher):
        shuffled = dataclasses.replace(teacher, rows=jax.tree.map(lambda x: x[:, order], rows_of(teacher)))
        own = dataclasses.replace(student, rows=jax.tree.map(lambda x: x[:, order], rows_of(student)))
        plain = terms(made, student, observed=dataclasses.replace(teacher, rows=rows_of(teacher)))
        nothing, pull = jax.vjp(lambda s: terms(same, s, observed=own), student)
        return plain, terms(made, student, observed=shuffled), nothing, pull(dict.fromkeys(nothing, 1.0))

    plain, other, nothing, gradients = jax.device_get(values(STUDENT, TEACHER))
    for term, value in plain.items():
        assert value > 0 and other[term] == pytest.approx(value, rel=1e-5), term
        assert nothing[term] == pytest.approx(0, abs=1e-6), term
    assert max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(gradients)) < 1e-6


def test_a_teacher_without_scores_and_images_without_objects_teach_nothing():
    made = Distiller(detector(STUDENT), detector(TEACHER), [methods.build(name) for name in BY_ROWS], auto)

    @quick_jit
    def values(student, observed, targets):
        return jax.value_and_grad(lambda s: sum(terms(made, s, targets, observed=observed).values()))(student)

    silent = dataclasses.replace(rows_of(TEACHER), logits=np.full((BATCH, QUERIES, CLASSES), -20, np.float32))
    empty = TARGETS._replace(valid=np.zeros_like(TARGETS.valid))
    for rows, targets in ((silent, TARGETS), (rows_of(TEACHER), empty)):
        value, gradients = values(STUDENT, dataclasses.replace(TEACHER, rows=rows), targets)
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))
        assert np.isfinite(value) and (value == 0 or rows is not silent)
    moved = values(
        STUDENT, dataclasses.replace(TEACHER, rows=rows_of(TEACHER)), reordered(TARGETS, np.array([2, 3, 0, 1]))
    )
    here = values(STUDENT, dataclasses.replace(TEACHER, rows=rows_of(TEACHER)), TARGETS)
    assert float(moved[0]) == pytest.approx(float(here[0]), rel=1e-5)


def test_what_is_observed_holds_what_pairs_queries():
    made = Distiller(detector(STUDENT), detector(TEACHER), [methods.build("hinton")], auto)
    found = jax.eval_shape(lambda: made.observe(batch_of()))
    assert found.rows.boxes is not None and not found.layers and found.ask is None and not found.neck


def grid(seed: int) -> tuple[DetectorOutput, object]:
    output = dense.output(jax.random.key(seed), 4, 64)
    seen = dense.scene(output, output, size=64)
    return output, dense.distiller(seen).student


@pytest.mark.parametrize("student_is_dense", [False, True])
def test_queries_and_priors_are_compared_where_they_overlap(student_is_dense):
    """Terms are those of the pairs of an overlap of 0.5: with none they are 0."""
    output, of_grid = grid(0)
    sides = (of_grid, detector(TEACHER)) if student_is_dense else (detector(STUDENT), of_grid)
    made = Distiller(*sides, [methods.build("bckd")], auto)
    student = output if student_is_dense else STUDENT
    rows = of_grid.rows(output) if student_is_dense else rows_of(STUDENT)
    partner = np.asarray(rows.boxes)[:, :QUERIES]
    other = sides[1].observe(None, batch_of())

    @quick_jit
    def values(student, boxes):
        count = other.rows.boxes.shape[1]
        all_boxes = jnp.tile(boxes, (1, -(-count // boxes.shape[1]), 1))[:, :count]
        observed = dataclasses.replace(other, rows=dataclasses.replace(other.rows, boxes=all_boxes))
        return sum(terms(made, student, observed=observed).values())

    assert values(student, np.full_like(partner, -50)) == 0
    assert values(student, partner) > 0


def refusal(name: str, student, teacher, pairing=auto) -> str:
    with pytest.raises(UserError) as caught:
        Distiller(student, teacher, [methods.build(name)], pairing).init(jax.random.key(0), SIZE)
    return str(caught.value)


def test_what_needs_a_grid_says_why():
    query, (_, of_grid) = detector(STUDENT), grid(0)
    for name in ("crosskd", "gid", "ld", "pfi", "rm"):
        for student, teacher, role in (
            (query, query, "student"),
            (query, of_grid, "student"),
            (of_grid, query, "teacher"),
        ):
            found = refusal(name, student, teacher)
            assert found.startswith(f"{name}: the {role} is a transformer, whose queries lie on no grid: "), found
    assert "needs priors on a grid" in refusal("fgfi", query, query)
    assert "queries, which have no place" in refusal("dkd", query, query, pairing=by_place)
    rows = dataclasses.replace(rows_of(TEACHER), logits=rows_of(TEACHER).logits[..., :2])
    other = types.SimpleNamespace(spec=lambda size: DetectorOutput(strides=(8,), rows=rows))
    assert "3 classes and the teacher 2" in refusal("dkd", query, other, pairing=by_hungarian)
