"""One-to-one matching against scipy, and what must not change it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from kdjax.boxes import matching
from kdjax.errors import UserError
from tests.support.arrays import quick_jit
from tests.support.boxes import slow_iou

QUERIES, OBJECTS = 30, 12
hungarian = quick_jit(matching.hungarian)


def problems(seed: int, count: int, queries: int = QUERIES, objects: int = OBJECTS):
    """Costs of several kinds, and objects that are anywhere among the padding; some have none or no padding."""
    rng = np.random.default_rng(seed)
    costs = rng.normal(0, 2, (count, queries, objects))
    near = rng.normal(0, 2, (count, 1, objects)) + 0.01 * costs  # all objects want the same queries
    costs = np.where(rng.random((count, 1, 1)) < 0.5, costs, near + rng.normal(0, 1, (count, queries, 1)))
    valid = rng.random((count, objects)) < rng.choice([0.0, 0.2, 0.5, 0.9, 1.0], (count, 1))
    garbage = rng.choice([0.0, -50.0, 1e9, np.nan], (count, 1, objects))
    return np.where(valid[:, None], costs, garbage).astype(np.float32), valid


def check(cost, valid, found):
    """Each object has a query of its own, at scipy's cost; which one, if no other way costs as little."""
    wrong = 0
    for matrix, there, queries in zip(np.float64(cost), valid, np.asarray(found), strict=True):
        own, real = queries[there], matrix[:, there]
        row, column = linear_sum_assignment(real)
        best = np.full(len(own), -1)
        best[column] = row
        assert (queries[~there] == -1).all() and (own >= 0).sum() == len(row)
        assert len(set(own[own >= 0])) == len(row) and own.max(initial=-1) < len(real)
        kept = np.flatnonzero(own >= 0)
        assert real[own[kept], kept].sum() == pytest.approx(real[row, column].sum(), abs=1e-4)
        wrong += (own != best).any()
    return wrong


def test_equals_scipy_on_a_thousand_padded_problems():
    cost, valid = problems(0, 1000)
    assert 0 in valid.sum(1) and OBJECTS in valid.sum(1) and np.isnan(cost).any()
    assert check(cost, valid, hungarian(cost, valid)) == 0


def test_equal_costs_are_resolved_at_the_lowest_sum():
    cost, valid = problems(1, 100)
    check(np.round(np.nan_to_num(cost)), valid, hungarian(np.round(np.nan_to_num(cost)), valid))


@pytest.mark.parametrize("queries", [5, 11])
def test_more_places_than_queries(queries):
    """Whether there are more objects, too, or only more padding."""
    cost, valid = problems(2, 100, queries=queries)
    assert (valid.sum(1) > queries).any() and (valid.sum(1) < queries).any()
    few = valid.sum(1) <= queries
    found = np.asarray(hungarian(cost, valid))
    assert check(cost[few], valid[few], found[few]) == 0
    assert check(cost[~few], valid[~few], found[~few]) == 0


def test_padding_and_the_order_of_objects_change_nothing():
    cost, valid = problems(3, 50)
    found = np.asarray(hungarian(cost, valid))
    order = np.random.default_rng(0).permutation(OBJECTS)
    np.testing.assert_array_equal(hungarian(cost[:, :, order], valid[:, order]), found[:, order])
    padded = np.pad(cost, [(0, 0), (0, 0), (3, 5)], constant_values=np.nan)
    more = np.pad(valid, [(0, 0), (3, 5)])
    np.testing.assert_array_equal(hungarian(padded, more)[:, 3:-5], found)
    several = hungarian(cost.reshape(5, 10, QUERIES, -1), valid.reshape(5, 10, -1))
    np.testing.assert_array_equal(several.reshape(50, -1), found)


def test_costs_that_are_not_numbers_end_too():
    cost = np.full((1, 4, 3), np.nan, np.float32)
    cost[0, 1, 2], cost[0, 2, 1] = 1.0, -np.inf
    found = np.asarray(hungarian(cost, np.ones((1, 3), bool)))[0]
    assert found[2] == 1 and found[1] == 2 and found[0] in (0, 3)


def test_no_places_and_wrong_shapes():
    assert matching.hungarian(np.zeros((2, 5, 0)), np.zeros((2, 0), bool)).shape == (2, 0)
    with pytest.raises(UserError, match=r"valid must have the shape \[..., M\]"):
        matching.hungarian(np.zeros((5, 3)), np.zeros(2, bool))


def test_cost_is_the_formula():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, (2, 6, 4)).astype(np.float32), rng.integers(0, 4, (2, 3))
    boxes, truth = (rng.uniform(0.1, 0.6, (2, n, 4)).astype(np.float32) for n in (6, 3))
    boxes[0, 0, 2] = -0.1  # an inverted box has no width in the GIoU, and its own in L1
    weights = {"class_weight": 3, "l1_weight": 4, "giou_weight": 5}
    cost = np.asarray(
        quick_jit(functools.partial(matching.matching_cost, **weights, alpha=0.4, gamma=3))(
            logits, boxes, labels, truth
        )
    )
    solid = boxes * [1, 1, 0, 1] + np.maximum(boxes, 0) * [0, 0, 1, 0]
    corners = [np.concatenate([x[..., :2] - x[..., 2:] / 2, x[..., :2] + x[..., 2:] / 2], -1) for x in (solid, truth)]
    for b in range(2):
        for q in range(6):
            for m in range(3):
                p = 1 / (1 + np.exp(-np.float64(logits[b, q, labels[b, m]])))
                present, absent = -0.4 * (1 - p) ** 3 * np.log(p + 1e-8), -0.6 * p**3 * np.log(1 - p + 1e-8)
                giou = slow_iou(corners[0][b, q], corners[1][b, m], "giou")
                want = 3 * (present - absent) + 4 * np.abs(boxes[b, q] - truth[b, m]).sum() - 5 * giou
                assert cost[b, q, m] == pytest.approx(want, abs=1e-4)


def test_no_gradient_flows():
    slope = quick_jit(jax.grad(lambda x: jnp.sum(matching.matching_cost(x, x, np.array([0]), np.full((1, 4), 0.5)))))
    assert not np.any(slope(np.full((3, 4), 0.3, np.float32)))


def test_each_query_keeps_the_object_it_met_most_often():
    rng = np.random.default_rng(0)
    found = np.stack([[rng.permutation(8)[:5] for _ in range(3)] for _ in range(4)])
    found[:, 1, 2:] = -1
    got = np.asarray(matching.objects_of(found, 8))
    for b in range(3):
        for q in range(8):
            counts = [(found[:, b, m] == q).sum() for m in range(5)]
            assert got[b, q] == (int(np.argmax(counts)) if max(counts) else -1)
