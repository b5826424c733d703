"""The fast choice of detections equals the plain one, to the bit, on problems of every kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.boxes import greedy, nms
from tests.shared import ROOT, script

plain = script(ROOT / "benchmarks" / "plain_nms.py")
KINDS, EACH = 10, 25  # of problems, and problems of a kind
LEVELS, CLASSES, PLACES = (48, 16, 6), 4, 40


def problems(seed, *, of_class=False):
    """Boxes and scores of 250 images, 25 of each kind."""
    rng = np.random.default_rng(seed)
    rows = sum(LEVELS)
    shape = (KINDS, EACH, rows, *[CLASSES] * of_class)
    centres = rng.choice(rng.uniform(0, 70, (8, 2)), shape) + rng.normal(0, 4, (*shape, 2))
    sides = rng.uniform(4, 30, (*shape, 2))
    scores = rng.uniform(0, 1, (KINDS, EACH, rows, CLASSES))
    scores[1] = np.round(scores[1], 1)  # many are equal
    scores[2] = 0.5  # all are
    scores[3] *= rng.uniform(0, 1, (EACH, rows, CLASSES)) < 0.02  # few, and none in some images
    scores[4] = 0
    centres[5] = rng.uniform(-20, 90, centres[5].shape)  # hardly one overlaps: more than there are places
    sides[5] = rng.uniform(0.5, 3, sides[5].shape)
    centres[6], sides[6] = np.round(centres[6]), np.round(sides[6] / 4) * 2  # whole pixels: equal overlaps
    centres[7], sides[7] = 30, 20  # all boxes are the same
    scores[8, :, :, 1:] *= 0.1  # the best of all rows are of one class, and a row's score is its number's
    scores[8, :, :, 0] = np.round(np.linspace(0.9, 0.4, rows), 2)
    sides[9] *= rng.choice([1, 1, 1, 0, -1], sides[9].shape)  # without area, or inverted
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], -1).astype(np.float32)
    count = KINDS * EACH
    return boxes.reshape(count, *shape[2:], 4), scores.reshape(count, rows, CLASSES).astype(np.float32)


def image_sizes(seed):
    return np.random.default_rng(seed).integers(30, 80, (KINDS * EACH, 2)).astype(np.int32)


@pytest.fixture(params=["small", "large"])
def sizes(request, monkeypatch):
    """Chunks and blocks that are much smaller than the problem, or as they are."""
    if request.param == "small":
        for name, value in (("ROWS", 7), ("PAIRS", 18), ("BLOCK", 5)):
            monkeypatch.setattr(greedy, name, value)
    return request.param


# Pairs of a level that enter, and what differs from the other problems: four times 250 problems.
CASES = {"all": (1000, {}), "few": (20, {}), "of_class": (60, {"of_class": True}), "quality": (30, {"quality": True})}


@pytest.mark.parametrize("case", CASES)
def test_the_plain_form_finds_the_same(case, sizes):
    seed = list(CASES).index(case)
    pre_nms, form = CASES[case]
    boxes, scores = problems(seed, of_class="of_class" in form)
    options = dict(score_threshold=0.1, iou_threshold=0.5, pre_nms=pre_nms, max_detections=PLACES, level_sizes=LEVELS)
    if "quality" in form:
        options["quality"] = np.random.default_rng(9).choice([0.2, 0.5, 1.0], scores.shape[:2]).astype(np.float32)
    size = image_sizes(seed)
    fast, slow = (
        jax.tree.map(np.asarray, jax.jit(functools.partial(select, image_size=size, **options))(boxes, scores))
        for select in (nms.select_rows, plain.select_rows)
    )
    for name, got, want in zip(fast[0]._fields, (*fast[0], fast[1]), (*slow[0], slow[1]), strict=False):
        np.testing.assert_array_equal(got, want, err_msg=name)
    np.testing.assert_array_equal(fast[1], slow[1])
    counts = fast[0].valid.sum(1).reshape(KINDS, EACH)
    assert counts[4].max() == 0 < counts[3].max() and counts[7].max() <= (EACH if form else CLASSES)
    assert pre_nms < 50 or (counts[5] == PLACES).any()  # there are more than places


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("places", [nms.FEW, nms.FEW + 1])
def test_greedy_nms_in_both_forms(labelled, places, sizes):
    boxes, scores = problems(5)
    scores = scores[..., 0]
    scores = np.where(scores < 0.2, -np.inf, np.where(scores < 0.3, -0.0, np.where(scores < 0.4, 0.0, scores - 0.6)))
    labels = np.random.default_rng(0).integers(0, 3, scores.shape) if labelled else None
    options = dict(iou_threshold=0.3, max_detections=places)
    fast = jax.jit(functools.partial(nms.greedy_nms, **options))(boxes, jnp.asarray(scores, jnp.float32), labels)
    slow = plain.greedy_nms(boxes, jnp.asarray(scores, jnp.float32), labels, **options)
    for got, want in zip(fast, slow, strict=True):
        np.testing.assert_array_equal(got, want)


def test_only_the_needed_pairs_are_sorted(monkeypatch):
    """Of 74 rows 7 are sorted at a time, and no more of them when the places are taken."""
    for name, value in (("ROWS", 7), ("PAIRS", 18), ("BLOCK", 5)):
        monkeypatch.setattr(greedy, name, value)
    boxes, scores = problems(5)
    seen = []

    def candidates(pairs):
        jax.debug.callback(lambda pairs: seen.append(pairs.shape), pairs)
        rows = pairs // CLASSES
        found = jnp.take_along_axis(jnp.asarray(boxes[5 * EACH : 5 * EACH + 1]), rows[..., None], 1)
        return greedy.Candidates(found, pairs % CLASSES, jnp.ones_like(pairs, bool))

    one = scores[5 * EACH : 5 * EACH + 1]
    pairs, valid = greedy.in_chunks(one, candidates, iou_threshold=0.5, max_detections=30)
    jax.effects_barrier()
    assert valid.all() and len(seen) <= 5 and set(seen) == {(1, 20)}
    order = np.argsort(-one.reshape(-1), kind="stable")
    assert np.isin(pairs, order[: 18 * len(seen)]).all()
