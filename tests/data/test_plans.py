"""The images that make a row of a batch."""

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
