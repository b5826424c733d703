"""The images that make a row of a batch."""

import numpy as np
import pytest

from kdjax.data import plans, stages
from tests.support.data import settings


def test_partners_are_the_last_of_the_same_stream():
    cfg = settings("", augment=dict(mosaic=True, mixup=1.0, cache=7))
    [stage] = stages.read_stages(cfg)[0]
    planned = plans.TrainPlans(
        order=range(10**6), seed=3, batch=10, rows=range(10), stages=(stage,), starts=(0,)
    )  # every image is its position
    streams = [[10 * step + row for step in range(40) for row in rows] for rows in ([0, 1, 2, 3], [8, 9])]
    for stream in streams:
        ages = set()
        for row in (row for step in range(40) for row in planned[step]):
            if row.position not in stream:
                continue
            place = stream.index(row.position)
            assert row.images[0] == row.position and len(row.images) == 4
            allowed = stream[max(0, place - 7) : place] or [row.position]
            assert set(row.images[1:]) <= set(allowed)
            ages |= {place - stream.index(p) for p in row.images[1:]}
            partner = row.partner
            assert partner.position in (stream[max(0, place - 3) : place] or [row.position])
            before = planned[partner.position // 10][partner.position % 10]
            assert partner == before._replace(partner=None, mirrored=False)
            assert all(0.5 <= share <= 1.5 for share in row.centre)
        assert ages == {0, 1, 2, 3, 4, 5, 6, 7}  # 0 only at the beginning


def test_the_last_evaluation_batch_is_filled_up():
    planned = plans.EvalPlans(size=5, batch=3)
    assert [planned[i] for i in range(len(planned))] == [[0, 1, 2], [3, 4, None]]
    assert len(plans.EvalPlans(size=6, batch=3)) == 2


@pytest.mark.parametrize(("size", "count"), [(14, 1), (14, 2), (14, 3), (14, 8), (0, 2)])
def test_shards_of_an_evaluation_are_its_batches_in_order(size, count):
    whole = plans.EvalPlans(size=size, batch=3)
    shards = [plans.EvalPlans(size=size, batch=3, shard=(index, count)) for index in range(count)]
    assert [shard[i] for shard in shards for i in range(len(shard))] == [whole[i] for i in range(len(whole))]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1 and len(shards[0]) == max(map(len, shards))


def view_plans(views: int, order=range(10**6), *, batch=6, starts=(0,), **augment):
    cfg = settings("", augment=augment)
    [stage] = stages.read_stages(cfg)[0]
    order = [index % 11 for index in order] if isinstance(order, range) else order
    return plans.ViewPlans(
        order=order, size=11, views=views, batch=batch, rows=range(batch), stages=(stage,) * len(starts), starts=starts
    )


def test_a_view_is_a_function_of_image_view_and_stage():
    """Whatever the order, which the seed of a run decides; partners are any other images, in the same view."""
    mixed = dict(mosaic=True, mixup=0.6)
    planned = view_plans(3, range(11 * 8), starts=(0, 7), **mixed)
    shuffled = np.random.default_rng(0).permuted(np.tile(np.arange(11), (8, 1)), axis=1).reshape(-1).tolist()
    rows = [row for step in range(14) for row in planned[step]]
    others = [row for step in range(14) for row in view_plans(3, shuffled, starts=(0, 7), **mixed)[step]]
    by_entry = {planned.entry(row): row for row in rows}
    shared = [row for row in others if planned.entry(row) in by_entry]
    assert len(shared) > 40 and all(by_entry[planned.entry(row)] == row for row in shared)
    for place, row in enumerate(rows):
        assert row.images[0] == place % 11 and row.position // 11 == place // 11 % 3
        assert planned.row(planned.entry(row)) == row
        assert row.images[0] not in row.images[1:] and set(row.images) <= set(range(11))
        if row.partner:
            assert row.partner.position // 11 == row.position // 11 and row.partner.images[0] != row.images[0]
            assert row.partner == planned.row(planned.entry(row.partner))._replace(partner=None, mirrored=False)
    assert {image for row in rows for image in row.images[1:]} == set(range(11))
    assert 0.3 < np.mean([row.partner is not None for row in rows]) < 0.9


def test_the_entries_of_a_run_are_those_of_its_first_steps():
    for views, steps, starts in ((1, 5, (0,)), (3, 14, (0,)), (3, 4, (0,)), (2, 14, (0, 6)), (4, 9, (0, 40))):
        planned = view_plans(views, batch=5, starts=starts)
        shown = {planned.entry(row) for step in range(steps) for row in planned[step]}
        needed = planned.needed(steps)
        assert shown <= {entry for one in needed for entry in one}
        assert all(shown & set(one) for one in needed)  # no view for nothing
        assert needed == sorted(needed, key=lambda one: one.start)
    stream = plans.TrainPlans(order=range(99), seed=3, batch=5, rows=range(5), stages=planned.stages[:1], starts=(0,))
    assert stream.needed(7) == [range(35)] and [stream.entry(row) for row in stream[2]] == [10, 11, 12, 13, 14]
    assert stream.row(12) == stream[2][2]


def test_given_entries_fill_their_last_batch():
    planned = view_plans(2)
    given = plans.EntryPlans(of=planned, batches=[range(0, 3), range(20, 22)], batch=3)
    assert [[planned.entry(row) for row in given[k]] for k in range(len(given))] == [[0, 1, 2], [20, 21, 21]]
