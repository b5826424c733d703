"""Which row meets which: the rules against slow loops, and what a pairing does to rows and assignments."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.distill import auto, by_hungarian, by_location, by_overlap, by_place, pairing
from kdjax.errors import UserError
from kdjax.structs import Assignment, Pairing, Rows
from tests.support.arrays import quick_jit


def rows(seed: int, count: int, *, classes: int = 3, batch: int = 2) -> Rows:
    """Rows of random boxes within 40 pixels."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 20, (batch, count, 2))
    return Rows(
        logits=rng.normal(size=(batch, count, classes)).astype(np.float32),
        boxes=np.concatenate([low, low + rng.uniform(4, 20, (batch, count, 2))], -1).astype(np.float32),
        location=np.concatenate([rng.permutation(count)[:, None] * 8.0, np.full((count, 3), 8.0)], 1).astype(
            np.float32
        ),
        level_sizes=(count,),
    )


def overlap(a, b) -> float:
    inner = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return inner / (sum(areas) - inner)


def shapes(one: Rows) -> Rows:
    return jax.eval_shape(lambda: one)


def test_by_place_needs_the_same_rows():
    one, other = rows(0, 6), rows(1, 6)
    assert by_place(one, other) is None and by_place(shapes(one), shapes(other)) is None
    levels = Rows(logits=other.logits, level_sizes=(4, 2))
    for wrong in (rows(1, 5), rows(1, 6, classes=4), levels):
        with pytest.raises(UserError, match=r"same levels, anchors and classes.*\(\(6,\), 3\) \(student\)"):
            by_place(one, wrong)
        with pytest.raises(UserError, match="same levels, anchors and classes"):
            by_place(shapes(one), shapes(wrong))


def test_by_location_equals_a_loop():
    student, teacher = rows(0, 7), rows(1, 5)
    found = by_location(student, teacher)
    assert all(leaf.shape == (2, 7) for leaf in found)
    for b, i in np.ndindex(2, 7):
        same = [j for j in range(5) if np.array_equal(student.location[i], teacher.location[j])]
        assert found.student[b, i] == i and found.valid[b, i] == bool(same)
        assert not same or found.teacher[b, i] == same[0]
    assert 0 < np.sum(found.valid) < 14
    other_stride = Rows(logits=teacher.logits, location=teacher.location * np.array([1, 1, 2, 2], np.float32))
    assert not np.any(by_location(student, other_stride).valid)


@pytest.mark.parametrize("threshold", [0.1, 0.2])
def test_by_overlap_equals_a_loop(threshold):
    student, teacher = rows(0, 9), rows(1, 6)
    found = quick_jit(lambda s, t: by_overlap(s, t, threshold=threshold))(student, teacher)
    for b, i in np.ndindex(2, 9):
        overlaps = [overlap(student.boxes[b, i], box) for box in teacher.boxes[b]]
        assert found.student[b, i] == i and found.teacher[b, i] == np.argmax(overlaps)
        assert found.valid[b, i] == (max(overlaps) >= threshold)
    assert 0 < np.sum(found.valid) < 18


def test_by_overlap_in_blocks_is_by_overlap_at_once():
    """More rows than a block of 1,024 has: those behind the first block are paired like all others."""
    few, teacher = rows(0, 9, batch=1), rows(1, 6, batch=1)
    many = Rows(boxes=np.tile(few.boxes, (1, 120, 1)))
    small, large = (quick_jit(by_overlap)(side, teacher) for side in (few, many))
    assert large.teacher.shape == (1, 1080)
    np.testing.assert_array_equal(large.teacher, np.tile(small.teacher, (1, 120)))
    np.testing.assert_array_equal(large.valid, np.tile(small.valid, (1, 120)))


@pytest.mark.parametrize("counts", [(5, 4), (3, 5), (4, 4)], ids=str)
def test_by_hungarian_has_the_least_cost(counts):
    student, teacher = rows(0, counts[0]), rows(1, counts[1])
    found = quick_jit(lambda s, t: by_hungarian(s, t, class_weight=0.5, box_weight=3.0))(student, teacher)
    fewer = min(counts)
    assert all(leaf.shape == (2, fewer) for leaf in found) and np.all(found.valid)
    for b in range(2):
        p, q = (1 / (1 + np.exp(-side.logits[b].astype(np.float64))) for side in (student, teacher))
        cost = 0.5 * np.abs(p[:, None] - q[None]).sum(-1)
        cost += 3 * np.array([[1 - overlap(x, y) for y in teacher.boxes[b]] for x in student.boxes[b]])
        choices = itertools.product(
            itertools.permutations(range(counts[0]), fewer), itertools.permutations(range(counts[1]), fewer)
        )
        best = min(cost[list(i), list(j)].sum() for i, j in choices)
        i, j = np.asarray(found.student[b]), np.asarray(found.teacher[b])
        assert len(set(i)) == len(set(j)) == fewer
        assert cost[i, j].sum() == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("rule", [by_location, by_overlap, by_hungarian])
def test_shapes_are_checked_before_anything_is_computed(rule):
    student, teacher = rows(0, 5), rows(1, 4)
    spec, real = rule(shapes(student), shapes(teacher)), rule(student, teacher)
    assert [(x.shape, x.dtype) for x in spec] == [(x.shape, x.dtype) for x in real]
    with pytest.raises(UserError, match="3 classes and the teacher 4"):
        rule(shapes(student), shapes(rows(1, 4, classes=4)))
    with pytest.raises(UserError, match=r"one side has no (locations|decoded boxes)"):
        rule(shapes(student), shapes(Rows(logits=teacher.logits)))


def test_hungarian_pairing_needs_logits():
    student, teacher = rows(0, 5), rows(1, 4)
    with pytest.raises(UserError, match="one side has no logits"):
        by_hungarian(student, Rows(boxes=teacher.boxes))


@pytest.mark.parametrize("rule", [by_overlap, by_hungarian])
def test_no_gradient_flows_through_a_pairing(rule):
    student, teacher = rows(0, 5), rows(1, 4)

    def total(boxes):
        pairs = rule(Rows(logits=student.logits, boxes=boxes), teacher)
        return jnp.sum(pairing.take(teacher, pairs.teacher).boxes * pairs.valid[..., None])

    assert not np.any(quick_jit(jax.grad(total))(student.boxes))


def test_take_orders_every_field():
    one = rows(0, 5)
    index = jnp.array([[4, 0, 0], [1, 2, 3]])
    found = pairing.take(one, index)
    for b, p in np.ndindex(2, 3):
        i = index[b, p]
        assert np.array_equal(found.logits[b, p], one.logits[b, i])
        assert np.array_equal(found.boxes[b, p], one.boxes[b, i])
        assert np.array_equal(found.location[b, p], one.location[i])
    assert found.quality is None and found.distribution is None and found.level_sizes == ()
    assert pairing.take(one, None) is one


def test_an_assignment_ignores_rows_without_a_partner():
    rng = np.random.default_rng(0)
    assignment = Assignment(
        matched=jnp.array([[0, -1, 1], [1, 0, -1]]),
        positive=jnp.array([[True, False, True], [True, True, False]]),
        ignore=jnp.array([[False, True, False], [False, False, False]]),
        labels=jnp.array([[2, 3, 0], [1, 1, 3]]),
        boxes=jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32),
        quality=jnp.asarray(rng.uniform(size=(2, 3)), jnp.float32),
        queries=jnp.zeros((4, 2, 5), jnp.int32),  # of objects, not of rows
    )
    assert pairing.take_assignment(assignment, None) is assignment
    index, valid = jnp.array([[2, 1], [1, 0]]), jnp.array([[True, True], [False, True]])
    found = pairing.take_assignment(assignment, Pairing(index, jnp.zeros_like(index), valid))
    for b, p in np.ndindex(2, 2):
        for field in ("matched", "labels", "boxes", "quality"):
            assert np.array_equal(getattr(found, field)[b, p], getattr(assignment, field)[b, index[b, p]])
    np.testing.assert_array_equal(found.positive, [[True, False], [False, True]])
    np.testing.assert_array_equal(found.ignore, [[False, True], [True, False]])


def queries(seed: int, count: int) -> Rows:
    return dataclasses.replace(rows(seed, count), location=None, level_sizes=())


def pairs(found: Pairing, image: int) -> set[tuple[int, int]]:
    i, j, valid = (np.asarray(part[image]) for part in found)
    return set(zip(i[valid].tolist(), j[valid].tolist(), strict=True))


def test_auto_takes_the_rule_that_fits():
    grid, other = rows(0, 6), rows(1, 6)
    assert auto(grid, other) is None and auto(shapes(grid), shapes(other)) is None
    with pytest.raises(UserError, match="same levels, anchors and classes"):
        auto(grid, rows(1, 5))
    chosen = {
        "hungarian": (queries(0, 6), queries(1, 5)),
        "student": (queries(0, 6), other),
        "teacher": (grid, queries(1, 6)),
    }
    for name, sides in chosen.items():
        rule = by_hungarian if name == "hungarian" else by_overlap
        found, expected = auto(*sides), rule(*sides, score=pairing.SCORE)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), name
        assert [x.shape for x in auto(*map(shapes, sides))] == [x.shape for x in found]
    with pytest.raises(UserError, match="the teacher's rows have no scores"):
        auto(grid, Rows(boxes=other.boxes))


@pytest.mark.parametrize("counts", [(7, 5), (4, 6)], ids=str)
@pytest.mark.parametrize("rule", [by_hungarian, by_overlap])
def test_rows_without_a_score_are_no_partners(rule, counts):
    """The pairs are those without these rows, whatever their boxes; the order of the teacher's rows is no matter."""
    student, teacher = queries(0, counts[0]), queries(1, counts[1])
    low = np.array([1, 3])
    logits, boxes = teacher.logits + 1, teacher.boxes.copy()
    logits[:, low], boxes[:, low] = -9, student.boxes[:, :2]
    kept = np.setdiff1d(np.arange(counts[1]), low)
    fewer = Rows(logits=logits[:, kept], boxes=boxes[:, kept])
    options = {"score": 0.05} | ({"threshold": 0.1} if rule is by_overlap else {})
    run = quick_jit(lambda s, t: rule(s, t, **options))
    found, expected = run(student, Rows(logits=logits, boxes=boxes)), run(student, fewer)
    order = np.random.default_rng(0).permutation(counts[1])
    shuffled = run(student, Rows(logits=logits[:, order], boxes=boxes[:, order]))
    for image in range(2):
        wanted = {(i, int(kept[j])) for i, j in pairs(expected, image)}
        assert wanted and pairs(found, image) == wanted
        assert {(i, int(order[j])) for i, j in pairs(shuffled, image)} == wanted
    nothing = run(student, Rows(logits=np.full_like(logits, -9), boxes=boxes))
    assert not np.any(nothing.valid)


def test_overlap_is_the_same_in_a_mirror():
    student, teacher = rows(0, 9), rows(1, 6)
    mirrored = [
        dataclasses.replace(side, boxes=40 - side.boxes[..., [2, 1, 0, 3]] * [1, -1, 1, -1] - [0, 40, 0, 40])
        for side in (student, teacher)
    ]
    for a, b in zip(by_overlap(student, teacher, threshold=0.2), by_overlap(*mirrored, threshold=0.2), strict=True):
        np.testing.assert_array_equal(a, b)
