"""The schedule of a method's weight, and the means that methods share."""

import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.distill import method
from kdjax.errors import UserError


@pytest.mark.parametrize(
    ("options", "steps", "shares"),
    [
        ({}, (0, 10**6), (1, 1)),
        ({"start": 5}, (4, 5), (0, 1)),
        ({"stop": 5}, (4, 5, 6), (1, 0, 0)),
        ({"warmup": 4}, (0, 1, 2, 3, 4), (0.25, 0.5, 0.75, 1, 1)),
        ({"start": 3, "warmup": 2}, (2, 3, 4, 5), (0, 0.5, 1, 1)),
        ({"stop": 10, "decay": 4}, (5, 6, 7, 8, 9, 10), (1, 1, 0.75, 0.5, 0.25, 0)),
        ({"start": 2, "stop": 6, "warmup": 4, "decay": 4}, (1, 2, 3, 4, 5, 6), (0, 0.25, 0.375, 0.375, 0.25, 0)),
    ],
)
def test_schedule(options, steps, shares):
    scale = method.schedule(**options)
    np.testing.assert_allclose([scale(step) for step in steps], shares, rtol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [*({name: -1} for name in ("start", "stop", "warmup", "decay")), {"decay": 1}, {"start": 5, "stop": 5}],
    ids=str,
)
def test_a_schedule_that_is_not_possible_is_refused(wrong):
    with pytest.raises(UserError, match=r"schedule .*not possible"):
        method.schedule(**wrong)


def test_means():
    values, positive = jnp.array([[1.0, 2, 4], [8, 16, 32]]), jnp.array([[True, False, True], [False, False, True]])
    assert method.mean_over_positives(values, positive) == 37 / 3
    assert method.mean_over_positives(values, jnp.zeros_like(positive)) == 0
    assert method.mean_over_levels([jnp.array(1.0), jnp.array(2.0), jnp.array(6.0)]) == 3


def test_a_guided_weight_moves_to_the_far_bound_and_by_ten_times_at_most():
    settings = {"target": 0.11, "tolerance": 0.01, "default": 20.0}
    new = lambda share, **of_call: float(method.guided_weight(5.0, share, **settings, **of_call))  # noqa: E731
    assert [new(share) for share in (0.1, 0.11, 0.12)] == [5.0] * 3
    odds = lambda share: share / (1 - share)  # noqa: E731
    np.testing.assert_allclose(new(0.05), 5 * odds(0.12) / odds(0.05), rtol=1e-5)
    np.testing.assert_allclose(new(0.2), 5 * odds(0.10) / odds(0.2), rtol=1e-5)
    np.testing.assert_allclose([new(0.001), new(0.9)], [50, 0.5], rtol=1e-5)
    assert new(0.0) == 20 and new(0.2, plain=True) == 20
